"""The files that a run writes beside its output: run.yaml with its options, and results.json with its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .config import used

if TYPE_CHECKING:
    from ..results import Results

RUN = "run.yaml"


def _trackers(_: click.Context, __: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    """Refused in the first second where a client is not installed."""
    if names:
        from ..tracking import check_trackers

        check_trackers(names)
    return names


TRACK = click.option(
    "--track",
    type=click.Choice(["mlflow", "wandb", "tensorboard"]),
    multiple=True,
    callback=_trackers,
    help="Log the results with this tracker, too; its own settings say where to. Repeatable.",
)


def log_results(trackers: Sequence[str], results: Results, run: str) -> None:
    """Hand the results to the trackers, under the name of the run."""
    if trackers:
        from ..tracking import track

        track(trackers, results, run)


def keep_run(path: Path) -> None:
    """Write the options of this command, for `--config`. Raises OutputError."""
    from ..files import write_text

    write_text(path, used())


def keep_results(edited: Path, folder: str | Path | None = None, run: str = RUN) -> Path:
    """Write options and results of the run that made (or evaluated) a directory. Returns the results file.

    folder: where to; None: the work folder beside the directory. run: name of the file for the options.
    Raises OutputError.
    """
    from ..disk.publishing import write_errors
    from ..files import work_folder, write_json
    from ..results import FILE, load_results

    folder = Path(folder or work_folder(edited))
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    keep_run(folder / run)
    write_json(folder / FILE, load_results(edited).to_dict())
    return folder / FILE
