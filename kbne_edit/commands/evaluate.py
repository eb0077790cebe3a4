from __future__ import annotations

from pathlib import Path

import click

from . import options
from .explain import EXPLAIN


@click.command("evaluate")
@options.SOURCE
@click.option("--edit", "edit_path", type=click.Path(path_type=Path), help="Evaluate this edit.json, by hooks.")
@click.option("--baked", type=click.Path(path_type=Path), help="Evaluate this baked directory.")
@options.evaluating
@EXPLAIN
@click.option("--recipe", help="Whose questions are asked.  [default: social-bias; the demo has its own]")
@click.option("--scores", type=click.Path(path_type=Path), help="Scores file: adds the neurons of its controls.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the result as JSON to this file.")
@options.JSON
def command(source, edit_path, tasks, out, as_json, **values) -> None:
    """Does the edit work, is it about bias, and what does it cost? Base and edit on the same items, beside controls.

    \b
    Bias:        stereoset_intrasentence, stereoset_intersentence, crows_pairs, bbq, winogender, probes
    Knowledge:   knowledge, knowledge_controls (the recipe's questions)
    Capability:  arc_easy, arc_challenge, openbookqa, copa
    Measures of the package, by name alone (`measures`: all in English):
                 decisions, decisions_names, associations (also with _de, _fr, _es, _zh), questions, help_parity,
                 regard_parity

    Without --edit and --baked the base alone is measured. Needs lm-eval: pip install 'kbne-edit[eval]'.
    """
    from ..edit import Edit
    from ..errors import OutputError
    from ..evaluation.evaluate import evaluate
    from ..files import forbid_overlap, write_json

    if out and not out.absolute().parent.is_dir():  # said now, not after an hour
        raise OutputError(f"cannot write {out}: its folder does not exist")
    if out:
        model = None if source == "demo" else Path(source).expanduser()
        forbid_overlap(out, *filter(None, [model, edit_path, values["baked"], values["scores"]]))
    edit = Edit.load(edit_path) if edit_path else None
    result = evaluate(source, edit=edit, tasks=options.names(tasks), **values)
    lines = _lines(result)
    if out:
        write_json(out, result)
        lines.append(f"written: {out}")
    options.show(result, as_json, lines)


def _lines(result: dict) -> list[str]:
    lines = [f"model: {result['model']}" + (f" at {result['commit']}" if result["commit"] else "")]
    if edit := result["edit"]:
        lines.append(
            f"edit: {edit['neurons']} neurons, site {edit['site']}, factor "
            f"{', '.join(f'{f:g}' for f in edit['factors'])}, by {edit['how']}"
        )
        heat = result["temperature"]
        lines.append(
            "controls: "
            + ", ".join(f"{name} ({n} neurons)" for name, n in result["controls"].items())
            + (f", flattened (temperature {heat:.4f})" if heat else "; no temperature gives this KL")
        )
    for name, task in result["tasks"].items():
        lines += task_lines(name, task)
    text = result["neutral"]
    lines.append(f"neutral text ({text['texts']} sentences, {text['source']})")
    for figure in ("perplexity", "KL from the base"):
        shown = (f"{run} {low_high[0]:.4g}" for run, low_high in text[figure].items())
        lines.append(f"  {figure}: " + ", ".join(shown))
    if result["comparisons"]:
        lines.append(f"p: Holm's for {result['comparisons']} comparisons; intervals: 95 %, paired bootstrap over items")
    return lines


def task_lines(name: str, task: dict) -> list[str]:
    lines = [f"{name} ({task['items']} items)"]
    for figure, found in task["figures"].items():
        line = f"  {figure}: {_values(figure, found)}"
        if "change" in found:
            line += f", change {interval(figure, found['change'])}"
        lines.append(line + (f", p {found['p_holm']:.2g}: {found['verdict']}" if "p" in found else ""))
        if "controls" in found:
            lines.append("    " + "; ".join(f"{n} {interval(figure, v)}" for n, v in found["controls"].items()))
        if loss := found.get("non_inferior"):
            said = "excluded" if loss["shown"] else "not excluded"
            lines.append(f"    a loss of {loss['margin']:g} points is {said} (lower end {loss['lowest']:+.1f})")
    for group, found in task["groups"].items():
        shown = (f"{figure} {_values(figure, v)}" for figure, v in found.items() if figure != "items")
        lines.append(f"  of which {group} ({found['items']}): " + ", ".join(shown))
    return lines


def _digits(figure: str) -> int:
    """Margins are nats per token, all other figures percent."""
    return 4 if "margin" in figure else 1


def _values(figure: str, found: dict) -> str:
    return " to ".join(f"{found[name]:.{_digits(figure)}f}" for name in ("base", "edit") if name in found)


def interval(figure: str, values: list[float]) -> str:
    value, low, high = (f"{round(v, 6) + 0.0:+.{_digits(figure)}f}" for v in values)  # + 0.0: no "-0.0"
    return f"{value} [{low}, {high}]"
