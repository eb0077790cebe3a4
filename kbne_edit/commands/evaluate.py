from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import completing, options
from .edited import BAKED, EDITED, SOURCE, base_of, directory
from .explain import EXPLAIN
from .findings import REQUIRE, impact_lines, verdict_lines
from .kept import TRACK, keep_results, keep_run, log_results

if TYPE_CHECKING:
    from ..edit import Edit
    from ..evaluation.benchmark import Figure
    from ..evaluation.evaluate import Evaluation
    from ..evaluation.result import FigureResult, TaskResult


@click.command("evaluate")
@EDITED
@SOURCE
@BAKED
@click.option("--edit", "edit_path", type=click.Path(path_type=Path), help="Evaluate this edit.json, applied by hooks.")
@options.evaluating
@options.MEMORY
@EXPLAIN
@click.option(
    "--recipe",
    shell_complete=completing.recipe,
    help="Recipe that supplies questions and probes.  [default: social-bias; the demo has its own]",
)
@click.option(
    "--scores",
    type=click.Path(path_type=Path),
    help="Scores file. Adds the neurons of its control questions as a control.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Also write the result as JSON to this file, and beside it .results.json and .run.yaml.",
)
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    help="Directory whose manifest and card keep the result.  [default: EDITED]",
)
@click.option("--no-record", is_flag=True, help="Leave EDITED as it is: keep nothing of the result in it.")
@options.OVERWRITE
@REQUIRE
@TRACK
@options.JSON
def command(
    source: str | None,
    edit_path: Path | None,
    out: Path | None,
    require: tuple[str, ...],
    as_json: bool,
    **values: Any,
) -> None:
    """Measure what an edit does to bias and capability. Base, edit and controls are measured on the same items.

    The result goes into the manifest and the card of EDITED, and the verdict there follows it.

    \b
    Bias:        stereoset_intrasentence, stereoset_intersentence, crows_pairs, bbq, winogender, probes
    Knowledge:   knowledge, knowledge_controls (the recipe's questions)
    Capability:  arc_easy, arc_challenge, openbookqa, copa
    Measures of the package, by name alone (`measures`: all in English):
                 decisions, decisions_names, associations (also with _de, _fr, _es, _zh), questions, help_parity,
                 regard_parity

    Without EDITED or --edit, only the base is measured. Needs lm-eval: pip install 'kbne-edit[eval]'.
    """
    from ..edit import Edit
    from ..errors import OutputError
    from ..evaluation.evaluate import evaluate
    from ..evaluation.settings import Controls, Measurement
    from ..files import forbid_overlap, write_json
    from ..recording import record_evaluation
    from ..results import Results

    values["baked"] = directory(values.pop("edited"), values["baked"])
    source = base_of(values["baked"], source)
    if out and not out.absolute().parent.is_dir():  # before an hour's work
        raise OutputError(f"cannot write {out}: its folder does not exist")
    if out:
        model = None if source == "demo" else Path(source).expanduser()
        forbid_overlap(out, *filter(None, [model, edit_path, values["baked"], values["scores"]]))
        options.check_free(out, values["overwrite"])
    del values["overwrite"]
    trackers = values.pop("track")
    edit = Edit.load(edit_path) if edit_path else None
    into = _kept_in(values["baked"], edit, values.pop("into"), values.pop("no_record"))
    measurement = options.taken(Measurement, values)
    controls = options.taken(Controls, values)
    result = evaluate(source, edit=edit, measurement=measurement, controls=controls, **values)
    if result is None:  # one of several processes, and not the first
        return
    record, lines = result.to_dict(), _lines(result)
    if into:
        record_evaluation(into, result, source, measurement.recipe)
        keep_results(into, run="evaluate.run.yaml")
        lines.append(f"recorded: {into} (manifest and card; `kbne-edit report {into} --out {into}.html` shows it)")
    if out:
        write_json(out, record)
        keep_run(out.with_suffix(".run.yaml"))
        lines.append(f"written: {out}")
    if result.edit and (out or trackers):
        figures = Results.of_evaluation(result, measurement.recipe)
        if out:
            write_json(out.with_suffix(".results.json"), figures.to_dict())
        log_results(trackers, figures, f"evaluate {(into or edit_path or Path(source)).name}")
    options.show(record, as_json, lines)
    if result.verdict:
        result.verdict.require(require)


def _kept_in(edited: Path | None, edit: Edit | None, into: Path | None, no_record: bool) -> Path | None:
    """The directory that records the result, None for none. It is checked before an hour's work."""
    from ..disk.manifest import Manifest
    from ..recording import check_recordable

    if into and (no_record or (edited is None and edit is None)):
        raise click.UsageError("--into needs an edit that is evaluated: EDITED or --edit, and no --no-record")
    if no_record or not (into or edited):
        return None
    if into is None and edited is not None and Manifest.read(edited) is None:
        return None  # made elsewhere, without a manifest
    path = into or edited
    assert path is not None
    check_recordable(path)
    return path


def _lines(result: Evaluation) -> list[str]:
    lines = [f"model: {result.model}" + (f" at {result.commit}" if result.commit else "")]
    if edit := result.edit:
        lines.append(
            f"edit: {edit.num_neurons} neurons, site {edit.site}, factor "
            f"{', '.join(f'{f:g}' for f in edit.distinct_factors)}, by {result.how}"
        )
        lines.append(f"controls: {_controls(result)}")
    for task in result.tasks.values():
        lines += task_lines(task)
    lines.append(f"neutral text ({result.neutral.texts} sentences, {result.neutral.origin})")
    for figure, values in result.neutral.figures.items():
        lines.append(f"  {figure}: " + ", ".join(f"{run} {value.value:.4g}" for run, value in values.items()))
    if result.comparisons:
        lines.append(
            f"p: Holm's for {result.comparisons} comparisons; intervals: 95 % each, without a correction, paired "
            "bootstrap over items that hang together"
        )
    lines += impact_lines(result.impact)
    return lines + (verdict_lines(result.verdict) if result.verdict else [])


def _controls(result: Evaluation) -> str:
    draws = [n for name, n in result.controls.items() if name.startswith("random ")]
    others = [f"{name} ({n} neurons)" for name, n in result.controls.items() if not name.startswith("random ")]
    shown = [f"random neurons ({len(draws)} draws of {draws[0]})"] if draws else []
    temperature = result.temperature
    return ", ".join(shown + others) + (
        f", flattened (temperature {temperature:.4f})" if temperature else "; no temperature gives this KL"
    )


def task_lines(task: TaskResult) -> list[str]:
    """Figures of a task, their changes and controls, and its groups."""
    lines = [f"{task.name} ({task.items} items)"]
    for name, result in task.figures.items():
        line = f"  {name}: {_values(result)}"
        if result.change:
            line += f", change {interval(result.figure, result.change)}"
        lines.append(line + (f", p {result.p_holm:.2g}: {result.described}" if result.tested else ""))
        if result.controls is not None:
            shown = (f"{kind} {interval(result.figure, change)}" for kind, change in result.controls.items())
            lines.append("    " + "; ".join(shown))
    if loss := task.loss:
        state = "excluded" if loss.excluded else "not excluded"
        lines.append(
            f"    a loss of {loss.margin:g} points is {state} (lower end {loss.lowest:+.1f} of what is above chance, "
            f"{loss.points:+.1f} in accuracy)"
        )
    for group, (items, figures) in task.groups.items():
        shown = (f"{name} {_values(result)}" for name, result in figures.items())
        lines.append(f"  of which {group} ({items}): " + ", ".join(shown))
    return lines


def _values(result: FigureResult) -> str:
    names = [name for name in ("base", "edit") if name in result.values]
    return " to ".join(f"{result.values[name]:.{result.figure.digits}f}" for name in names)


def interval(figure: Figure, values: Sequence[float]) -> str:
    """A change with its interval, in the figure's own decimals."""
    value, low, high = (f"{round(v, 6) + 0.0:+.{figure.digits}f}" for v in values)  # + 0.0: no "-0.0"
    return f"{value} [{low}, {high}]"
