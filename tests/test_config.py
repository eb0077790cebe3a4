"""Options from a file and from the environment, and which of them counts."""

import click
import pytest
from command import run_command

from kbne_edit import Edit
from kbne_edit.commands import cli
from kbne_edit.commands.config import PREFIX


@pytest.fixture
def folder(tmp_path):
    Edit("down", {1: {5: 2.0}}).save(tmp_path / "edit.json")
    return tmp_path


def params(name, folder, *arguments):
    """What the command would be called with."""
    whole = click.Context(cli, info_name="kbne-edit", auto_envvar_prefix=PREFIX, help_option_names=["-h", "--help"])
    with cli.get_command(whole, name).make_context(name, [*map(str, arguments)], parent=whole) as context:
        return context.params


def test_the_command_line_then_the_environment_then_the_file(folder, monkeypatch):
    (folder / "run.yaml").write_text("rule: contrastive\ntau: 0.3\n")
    arguments = ["--in", "demo", "--out", "out", "--config", folder / "run.yaml"]
    assert params("bake", folder, *arguments[:4])["rule"] is None
    of_file = params("bake", folder, *arguments)
    assert (of_file["rule"], of_file["tau"]) == ("contrastive", 0.3)
    monkeypatch.setenv("KBNE_EDIT_BAKE_TAU", "0.2")
    of_both = params("bake", folder, *arguments)
    assert (of_both["rule"], of_both["tau"]) == ("contrastive", 0.2)
    assert params("bake", folder, *arguments, "--tau", "0.15")["tau"] == 0.15


@pytest.mark.parametrize("name", ["apply", "bake", "verify"])
def test_a_variable_is_called_as_the_option(name, folder, monkeypatch):
    """Also where the command takes what the option leaves out, or calls it otherwise."""
    where = {"IN": "demo", "OUT": "out"} if name != "verify" else {"IN": "demo"}
    for option, value in where.items():
        monkeypatch.setenv(f"KBNE_EDIT_{name.upper()}_{option}", value)
    arguments = () if name == "bake" else ("edited",)
    plain = params(name, folder, *arguments)
    assert plain["source"] == "demo" and plain["behaviour"] is True
    monkeypatch.setenv(f"KBNE_EDIT_{name.upper()}_NO_BEHAVIOUR", "1")
    assert params(name, folder, *arguments)["behaviour"] is False


def test_the_environment_reaches_the_command(folder):
    result = run_command("bake", "--in", "demo", "--out", "out", cwd=folder, env={"KBNE_EDIT_BAKE_RULE": "nonsense"})
    assert result.returncode == 2 and "nonsense" in result.stderr


def test_lists(folder):
    (folder / "fit.yaml").write_text("in: demo\nout: fit.json\npairs: [own, stereoset]\n")
    assert params("fit", folder, "--config", folder / "fit.yaml")["pairs"] == ("own", "stereoset")
    (folder / "evaluate.yaml").write_text("in: demo\ntasks: [bbq, copa]\n")
    assert params("evaluate", folder, "--config", folder / "evaluate.yaml")["tasks"] == ("bbq", "copa")


def test_required_options_and_flags_may_stand_in_the_file(folder):
    (folder / "run.yaml").write_text(
        "in: demo\nout: out\nedit: edit.json\nno-behaviour: true\nno-measure: true\nrequire: [effect, cost]\n"
    )
    result = run_command("bake", "--config", "run.yaml", cwd=folder)
    assert result.returncode == 4 and (folder / "out" / "kbne_edit.json").exists(), result.stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("rules: paper\n", "bake has no option 'rules'"),
        ("- rule\n", "must be a mapping"),
        ("rule: [\n", "not YAML that can be read"),
        ("rule: nonsense\n", "nonsense"),
        ("config: other.yaml\n", "no option 'config'"),
    ],
)
def test_a_wrong_file_is_one_line(text, message, folder):
    (folder / "run.yaml").write_text(text)
    result = run_command("bake", "--in", "demo", "--out", "out", "--config", "run.yaml", cwd=folder)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (folder / "out").exists()
