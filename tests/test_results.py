"""Results files: what a run leaves, and several people's runs side by side."""

import copy
import json
import shutil

import click
import pytest
import yaml
from click.testing import CliRunner
from printed import parsed

from kbne_edit import Edit
from kbne_edit.commands import cli
from kbne_edit.commands.config import PREFIX
from kbne_edit.disk.manifest import Manifest
from kbne_edit.errors import InputError
from kbne_edit.results import Results, collect_results, load_results


def run(*args):
    result = CliRunner().invoke(cli, list(map(str, args)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    """A bake of a given edit on the command line, with its work folder. Not to be changed."""
    folder = tmp_path_factory.mktemp("results")
    Edit("down", {1: {3: 2.0, 7: 4.0}}).save(folder / "edit.json")
    given = ["--in", "demo", "--edit", folder / "edit.json", "--out", folder / "out", "--no-behaviour"]
    assert run("bake", *given, "--require", "cost").exit_code == 0
    return folder / "out"


def test_a_bake_leaves_its_results(baked):
    text = (baked.parent / "out.work" / "results.json").read_text()
    written, manifest = parsed("results", text), Manifest.read(baked)
    rows = {(row["task"], row["figure"]): row for row in written["figures"]}
    effect, cost = manifest.summary["effect"], manifest.summary["cost"]
    twins, kl = rows["twins", "absolute score"], rows["neutral text", "KL from the base"]
    assert [twins["base"], twins["edit"]] == effect["mean_abs_margin"] and twins["change"] == effect["change_abs"]
    assert twins["random"] == effect["random_change_abs"] and twins["items"] == effect["twins"]
    assert kl["change"] == cost["kl"] and kl["edit"] == cost["kl"][0]
    assert rows["neutral text", "perplexity ratio"]["edit"] == pytest.approx(cost["perplexity_rise"][0], abs=1e-12)
    assert written["verdict"] == manifest.summary["verdict"] and written["base"] == manifest.edit.base
    assert (written["model"], written["edit"]["factors"]) == ("demo", [2.0, 4.0])
    assert str(baked.parent) not in text  # it may be given away
    assert Results.from_dict(json.loads(text)).to_dict() == written == load_results(baked).to_dict()


def test_a_run_writes_options_that_give_the_same_run(baked, tmp_path):
    path = baked.parent / "out.work" / "run.yaml"
    given = yaml.safe_load(path.read_text())
    assert given["in"] == "demo" and given["no-behaviour"] is True and given["require"] == ["cost"]
    assert "device" not in given and "json" not in given
    again = tmp_path / "again"
    assert run("bake", "--config", path, "--out", again, "--no-behaviour").exit_code == 0
    for name in ("model.safetensors", "kbne_edit.json"):
        assert (again / name).read_bytes() == (baked / name).read_bytes()


def test_what_a_command_takes_otherwise_is_kept_as_typed(tmp_path):
    """no-behaviour, force and answers, which reach the command as settings."""
    from kbne_edit.commands.config import used

    whole = click.Context(cli, info_name="kbne-edit", auto_envvar_prefix=PREFIX, help_option_names=["-h", "--help"])
    typed = ["--in", "demo", "--out", "x", "--no-behaviour", "--force", "--answers", '{"yes": ["Yes"]}', "--tau", "0.2"]
    with cli.get_command(whole, "bake").make_context("bake", typed, parent=whole) as context:
        assert context.params["behaviour"] is False and context.params["answers"] == {"yes": ["Yes"]}
        kept = yaml.safe_load(used())
    assert kept["no-behaviour"] is True and kept["force"] is True and kept["answers"] == '{"yes": ["Yes"]}'
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(kept))
    typed = ["--config", str(tmp_path / "run.yaml")]
    with cli.get_command(whole, "bake").make_context("bake", typed, parent=whole) as context:
        assert yaml.safe_load(used()) == kept and context.params["behaviour"] is False


def test_lists_and_arguments_come_back(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("scores: [a.safetensors, 'b,c.safetensors']\nfactors: [1.5, 2]\nin: demo\nout: tuned\n")
    whole = click.Context(cli, info_name="kbne-edit", auto_envvar_prefix=PREFIX, help_option_names=["-h", "--help"])
    with cli.get_command(whole, "tune").make_context("tune", ["--config", str(path)], parent=whole) as context:
        assert [str(scores) for scores in context.params["scores"]] == ["a.safetensors", "b,c.safetensors"]
        assert context.params["factors"] == (1.5, 2.0)
        from kbne_edit.commands.config import used

        assert yaml.safe_load(used()) == yaml.safe_load(path.read_text())


def test_several_runs_in_one_table(baked, debiased):
    results = baked.parent / "out.work" / "results.json"
    collected = collect_results(results, debiased)
    (rows,) = (rows for key, rows in collected.figures().items() if key[:2] == ("twins", "absolute score"))
    assert list(rows) == [str(results), str(debiased)] and rows[str(results)] != rows[str(debiased)]
    reply = run("compare", "--results", results, debiased).stdout
    for row in rows.values():
        assert "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row.change) in reply
    assert f"[1] {results}: demo, 2 neurons" in reply and "note" not in reply
    printed = parsed("compare-results", run("compare", "--results", results, debiased, "--json").stdout)
    assert [one["ship"] for one in printed["runs"]] == [run.verdict.ship for run in collected.runs.values()]


def test_what_makes_a_comparison_doubtful_is_said(baked, tmp_path):
    record = load_results(baked).to_dict()
    other = tmp_path / "other.json"
    other.write_text(json.dumps(record | {"base": "0" * 64, "recipe": {"name": "demo", "sha256": "1"}, "tool": "old"}))
    assert len(collect_results(baked, other).notes) == 3 and not collect_results(baked).notes
    with pytest.raises(InputError, match="twice"):
        collect_results(other, other)


def test_a_file_of_another_form_is_refused(baked, tmp_path):
    record, path = load_results(baked).to_dict(), tmp_path / "r.json"
    damaged = [{**record, "kbne_results": 2}, [record], {}]
    for key in record:
        if key != "kbne_results":
            damaged += [{k: v for k, v in record.items() if k != key}]
    for change in ({"change": [1, 2]}, {"items": "many"}, {"random": 3}):
        one = copy.deepcopy(record)
        one["figures"][0] |= change
        damaged.append(one)
    for data in damaged:
        path.write_text(json.dumps(data))
        with pytest.raises(InputError, match="r.json"):
            load_results(path)
    shutil.copy(baked / "config.json", tmp_path)
    with pytest.raises(InputError, match="has no kbne_edit.json"):
        load_results(tmp_path)


def test_an_evaluation_by_hooks_leaves_them_beside_its_output(baked, tmp_path):
    out = tmp_path / "r.json"
    edit = baked.parent / "edit.json"
    given = ["--in", "demo", "--edit", edit, "--tasks", "knowledge", "--limit", 4, "--draws", 1, "--out", out]
    assert run("evaluate", *given).exit_code == 0
    result = load_results(tmp_path / "r.results.json")
    evaluated = parsed("evaluate", out.read_text())
    (row,) = (row for row in result.rows if row.task == "knowledge")
    assert row.edit == evaluated["tasks"]["knowledge"]["figures"]["accuracy"]["edit"] and row.items == 4
    assert result.verdict.to_dict() == evaluated["verdict"]
    assert yaml.safe_load((tmp_path / "r.run.yaml").read_text())["limit"] == 4
