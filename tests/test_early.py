"""What cannot work is refused before a model is downloaded or loaded: here no model may be looked for at all."""

import io
import shutil
from contextlib import nullcontext

import click
import pytest
import torch
from click.testing import CliRunner
from command import run_command
from printed import parsed

from kbne_edit import Checks, Output, bake, fold
from kbne_edit.commands import cli
from kbne_edit.commands.findings import doubts
from kbne_edit.edit import Edit
from kbne_edit.errors import InputError
from kbne_edit.hub import source
from kbne_edit.settings import Doubt, Settings
from mutants import DEMO

REFUSED = [
    ("bake", ["--rule", "paired"], "twin"),
    ("bake", ["--quadrature", "foo"], "gauss-N"),
    ("bake", ["--quadrature", "gauss-0"], "gauss-N"),
    ("bake", ["--memory", "lots"], "--memory 'lots' is not a size"),
    ("bake", ["--device", "warp"], "no device of torch"),
    ("bake", ["--questions", "7"], "--questions 7"),
    ("bake", ["--dimensions", "weather"], "no question is of weather"),
    ("bake", ["--tau", "0.1", "--top", "0.1"], "--tau and --top"),
    ("bake", ["--rule", "specific", "--tau", "0.1"], "--top"),
    ("bake", ["--answers", '{"maybe": ["Maybe"]}'], "'maybe'"),
    ("bake", ["--recipe", "nothing.yaml"], "nothing.yaml"),
    ("bake", ["--shard-size", "lots"], "--shard-size 'lots'"),
    ("bake", ["--as", "peft", "--shard-size", "5GB"], "--shard-size"),
    ("bake", ["--edit", "missing.json"], "cannot read missing.json"),
    ("bake", ["--edit", "e.json", "--recipe", "nothing.yaml"], "nothing.yaml"),
    *(
        ("bake", ["--edit", "e.json", *given], f"{given[0]}: says how to locate neurons")
        for given in (
            ["--tau", "0.1"],
            ["--beta", "0.2"],
            ["--top", "0.1"],
            ["--rule", "specific"],
            ["--combine", "union"],
            ["--dimensions", "gender"],
            ["--same-sign"],
            ["--min-stability", "0.5"],
            ["--drop-wrong"],
            ["--questions", "9"],
            ["--site", "gate"],
            ["--objective", "log-odds"],
            ["--before", "Hello."],
        )
    ),
    ("locate", ["--quadrature", "simpson"], "gauss-N"),
    ("locate", ["--memory", "8"], "not a size"),
    ("bake", ["--edit", "e.json", "--memory", "lots"], "--memory 'lots' is not a size"),
    ("evaluate", ["--memory", "lots"], "--memory 'lots' is not a size"),
    ("evaluate", ["--device", "warp", "--tasks", "probes"], "no device of torch"),
    ("evaluate", ["--recipe", "nothing.yaml", "--tasks", "probes"], "nothing.yaml"),
]


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A model that would have to be downloaded, where looking for it fails the test."""

    def never(*_):
        pytest.fail("a model was looked for before the options were refused")

    monkeypatch.setattr(source, "download", never)
    monkeypatch.chdir(tmp_path)
    Edit("down", {0: {1: 2.0}}).save("e.json")
    return "org/never"


@pytest.mark.parametrize("command, options, words", REFUSED)
def test_what_cannot_work_is_refused_first(command, options, words, nowhere, tmp_path):
    out = [] if command == "evaluate" else ["--out", "out"]
    result = CliRunner().invoke(cli, [command, "--in", nowhere, *out, *options])
    assert isinstance(result.exception, InputError) and words in str(result.exception)
    assert {path.name for path in tmp_path.iterdir()} == {"e.json"}


def test_a_device_that_is_not_here(nowhere, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli, ["bake", "--in", nowhere, "--out", "out", "--device", "cuda"])
    assert "--device cuda: torch finds no such device" in str(result.exception)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    result = CliRunner().invoke(cli, ["bake", "--in", nowhere, "--out", "out", "--device", "cuda:2"])
    assert "there are 2 here" in str(result.exception)


def test_an_output_that_exists_is_refused_before_a_download(nowhere, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    result = CliRunner().invoke(cli, ["bake", "--in", nowhere, "--out", "out"])
    assert "--overwrite" in str(result.exception)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "part, typed, force, raised",
    [
        ("answers", "n\n", False, click.Abort),
        ("answers", "y\n", False, None),
        ("answers", "n\n", True, None),
        ("specific", "n\n", False, None),
    ],
)
def test_a_doubt_on_a_terminal(part, typed, force, raised, monkeypatch):
    monkeypatch.setattr("sys.stdin", _Terminal(typed))
    monkeypatch.setattr("sys.stderr", _Terminal())
    with pytest.raises(raised) if raised else nullcontext():
        doubts(force)(Doubt(part, "yes to everything"))


def test_a_doubt_elsewhere_stops_nothing(monkeypatch):
    typed = io.StringIO("n\n")
    monkeypatch.setattr("sys.stdin", typed)
    doubts(False)(Doubt("answers", "yes to everything"))
    assert typed.read() == "n\n"  # nothing was asked


def test_a_selection_that_is_not_specific_is_said_before_the_fold(tmp_path, caplog):
    caplog.set_level("INFO", "kbne_edit")
    told = []
    settings = Settings(questions=9)
    bake("demo", tmp_path / "out", settings, output=Output(dry_run=True), checks=Checks(doubtful=told.append))
    assert [doubt.part for doubt in told] == ["specific"] and not (tmp_path / "out").exists()
    assert any(line.startswith("selected: ") for line in caplog.messages)


@pytest.mark.parametrize(
    "arguments, kind",
    [
        (["bake", "--in", "nowhere", "--out", "o"], "CheckpointError"),
        (["bake", "--out", "o"], "MissingParameter"),
        (["verify", "nowhere"], "InputError"),
        (["verify", "nowhere", "--baked", "other"], "UsageError"),
    ],
)
def test_an_error_as_json(arguments, kind, tmp_path):
    result = run_command(*arguments, "--json", cwd=tmp_path)
    error = parsed("error", result.stdout)["error"]
    assert (error["type"], error["status"], result.returncode) == (kind, 2, 2)
    assert error["message"].splitlines() == [error["message"]] and error["message"] in result.stderr
    assert not run_command(*arguments, cwd=tmp_path).stdout


def test_a_result_that_misses_a_requirement_is_the_only_json(tmp_path):
    Edit("down", {1: {5: 2.0}}).save(tmp_path / "edit.json")
    arguments = [
        "bake",
        "--in",
        "demo",
        "--edit",
        "edit.json",
        "--out",
        "o",
        "--no-measure",
        "--require",
        "effect",
        "--json",
    ]
    result = run_command(*arguments, cwd=tmp_path)
    assert result.returncode == 4 and parsed("bake", result.stdout)["verdict"]["effect"] == "NOT MEASURED"


def test_the_base_that_a_manifest_names(debiased, tmp_path):
    """Of a model of the Hub, or the demo; a folder's name says nothing of its place."""
    plain = run_command("verify", debiased, "--no-behaviour", cwd=tmp_path)
    assert plain.returncode == 0 and "base: demo, by the manifest" in plain.stderr
    named = run_command("verify", "--in", "demo", "--baked", debiased, "--no-behaviour", cwd=tmp_path)
    assert named.returncode == 0 and named.stdout == plain.stdout and "by the manifest" not in named.stderr
    shutil.copytree(DEMO, tmp_path / "mine")
    fold(tmp_path / "mine", Edit("down", {1: {5: 2.0}}), tmp_path / "out")
    refused = run_command("verify", "out", cwd=tmp_path)
    assert refused.returncode == 2 and "add --in MODEL" in refused.stderr
