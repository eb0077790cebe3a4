"""Trackers: a run's results through each client. The clients themselves where they are installed, else what they are
asked for."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from kbne_edit.commands import cli
from kbne_edit.errors import InputError, OutputError
from kbne_edit.results import load_results
from kbne_edit.tracking import TRACKERS, check_trackers, metrics, params, track


@pytest.fixture(scope="module")
def results(debiased):
    return load_results(debiased)


@pytest.fixture
def asked(monkeypatch):
    """Clients that only note what they are asked for."""
    calls = []

    def noted(name):
        return lambda *args, **given: calls.append((name, args, given))

    @contextmanager
    def session(*args, **given):
        calls.append(("begin", args, given))
        yield SimpleNamespace(log=noted("log"), add_scalar=noted("add_scalar"), add_text=noted("add_text"))

    fakes = {
        "mlflow": {"start_run": session, **{n: noted(n) for n in ("log_params", "log_metrics", "log_dict")}},
        "wandb": {"init": session},
        "torch.utils.tensorboard": {"SummaryWriter": session},
    }
    for name, functions in fakes.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))
    return calls


def test_figures_have_names_that_every_client_takes(results):
    result = metrics(results)
    (row,) = (row for row in results.rows if row.task == "twins")
    assert (
        result["twins/absolute score/edit"] == row.edit and result["twins/absolute score/change low"] == row.change.low
    )
    assert len(result) == 5 * len(results.rows)
    assert params(results)["verdict"] == results.verdict.ship and params(results)["verdict cost"] == "PASS"


@pytest.mark.parametrize("name", TRACKERS)
def test_each_client_gets_them(name, results, asked):
    track([name], results, "my run")
    reply = repr(asked)
    assert asked[0][0] == "begin" and "my run" in reply.replace("my_run", "my run")
    assert "twins/absolute score/change" in reply and str(results.edit["sha256"]) in reply and "do not ship" in reply


def test_a_client_that_fails_is_one_line(results, asked, monkeypatch):
    def fails(**given):
        raise RuntimeError("no disk\nno network")

    monkeypatch.setattr(sys.modules["wandb"], "init", fails)
    with pytest.raises(OutputError, match="--track wandb: no disk \\(the output itself is written\\)") as raised:
        track(["wandb"], results, "run")
    assert raised.value.exit_code == 3


def test_a_client_that_is_missing_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'kbne-edit\[wandb\]'"):
        check_trackers(["wandb"])
    given = ["bake", "--in", "demo", "--out", str(tmp_path / "out"), "--track", "wandb"]
    assert isinstance(CliRunner().invoke(cli, given).exception, InputError) and not (tmp_path / "out").exists()


def test_mlflow_itself(results, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/runs.db")
    track(["mlflow"], results, "run")
    (run,) = mlflow.search_runs(output_format="list")
    assert run.data.metrics == pytest.approx(metrics(results)) and run.data.params["base"] == results.base


def test_tensorboard_itself(results, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    track(["tensorboard"], results, "run")
    (folder,) = (tmp_path / "runs").iterdir()
    read = events.EventAccumulator(str(folder))
    read.Reload()
    assert {name: read.Scalars(name)[0].value for name in read.Tags()["scalars"]} == pytest.approx(metrics(results))


def test_wandb_itself_offline(results, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track(["wandb"], results, "run")
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
