"""A run's results, handed to an experiment tracker through its own client: MLflow, Weights & Biases or TensorBoard.

Where the run goes is the client's business: MLFLOW_TRACKING_URI, WANDB_MODE and the rest hold as in any other program.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from .errors import InputError, OutputError, of_the_machine, short
from .results import Results


def track(names: Sequence[str], results: Results, run: str) -> None:
    """Log the results under the name `run`. names: of TRACKERS.

    Raises InputError for a client that is missing, OutputError where one fails: its exceptions are its own.
    """
    clients = {name: _client(name) for name in names}
    for name, client in clients.items():
        try:
            TRACKERS[name](client, results, run)
        except Exception as error:
            failure = OutputError(f"--track {name}: {short(error)} (the output itself is written)")
            raise of_the_machine(failure) from None


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError unless the clients are installed: asked before work that takes long."""
    for name in names:
        _client(name)


def metrics(results: Results) -> dict[str, float]:
    """{"task/figure/base", "…/edit", "…/change", "…/change low", "…/change high": value} of every figure."""
    result: dict[str, float] = {}
    for row in results.rows:
        name = re.sub(r"[^\w ./-]", "_", f"{row.task}/{row.figure}")  # what every client takes
        result |= {f"{name}/base": row.base, f"{name}/edit": row.edit}
        result |= dict(zip((f"{name}/change", f"{name}/change low", f"{name}/change high"), row.change, strict=True))
    return result


def params(results: Results) -> dict[str, str | int]:
    """What was edited, with which recipe, and the verdict."""
    model, edit = results.model, results.edit
    result: dict[str, str | int] = {
        "model": str(model) if model else "",
        "base": results.base or "",
        "recipe": results.recipe.name if results.recipe else "",
        "site": edit["site"],
        "neurons": edit["neurons"],
        "factors": ", ".join(f"{factor:g}" for factor in edit["factors"][:8]),
        "edit": edit["sha256"],
        "tool": results.tool,
        "verdict": results.verdict.ship,
    }
    return result | {f"verdict {name}": part.state for name, part in results.verdict}


def _mlflow(mlflow: ModuleType, results: Results, run: str) -> None:
    with mlflow.start_run(run_name=run):
        mlflow.log_params(params(results))
        mlflow.log_metrics(metrics(results))
        mlflow.log_dict(dict(results.to_dict()), "results.json")


def _wandb(wandb: ModuleType, results: Results, run: str) -> None:
    with wandb.init(name=run, config=params(results)) as session:
        session.log(metrics(results))


def _tensorboard(tensorboard: ModuleType, results: Results, run: str) -> None:
    with tensorboard.SummaryWriter(comment=f"-{re.sub('[^A-Za-z0-9_.-]', '_', run)}") as writer:
        for name, value in metrics(results).items():
            writer.add_scalar(name, value, 0)
        rows = "\n".join(f"| {name} | {value} |" for name, value in params(results).items())
        writer.add_text("run", f"| | |\n|---|---|\n{rows}")


TRACKERS: dict[str, Callable[[Any, Results, str], None]] = {
    "mlflow": _mlflow,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
}
_MODULES = {"tensorboard": "torch.utils.tensorboard"}  # whose writer needs the tensorboard package


def _client(name: str) -> ModuleType:
    """The client's module. Raises InputError where it is not installed."""
    try:
        return importlib.import_module(_MODULES.get(name, name))
    except ImportError:
        raise InputError(f"--track {name} needs its client: pip install 'kbne-edit[{name}]'") from None
