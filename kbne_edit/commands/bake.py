from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import options
from .findings import cost_lines, effect_lines, measuring, verdict_lines

if TYPE_CHECKING:
    from ..baking import BakeResult


@click.command("bake")
@options.SOURCE
@options.out("Directory of the new checkpoint.")
@options.locating
@options.selecting
@click.option(
    "--edit",
    type=click.Path(path_type=Path),
    help="Fold this edit.json, or the IA3 adapter in this folder, instead of locating.",
)
@click.option(
    "--as",
    "form",
    type=click.Choice(["checkpoint", "peft", "delta"]),
    default="checkpoint",
    show_default=True,
    help="What OUT holds: the model; an IA3 adapter for PEFT; the edited columns alone.",
)
@options.SHARD_SIZE
@click.option(
    "--skip-inexact",
    is_flag=True,
    help="Of a quantised model, leave out neurons that cannot take their factor exactly.  [default: refuse]",
)
@click.option("--work", type=click.Path(path_type=Path), help="Keeps scores and edit, to resume.  [default: OUT.work]")
@click.option("--dry-run", is_flag=True, help="Print what would be folded, and write no checkpoint.")
@options.NO_BEHAVIOUR
@measuring
@options.JSON
@options.OVERWRITE
def command(
    source,
    out,
    edit,
    form,
    shard_size,
    skip_inexact,
    work,
    dry_run,
    no_behaviour,
    no_measure,
    require,
    as_json,
    overwrite,
    **values,
) -> None:
    """Locate know-bias neurons, fold their factors into the weights, and prove the result.

    With no option it does what the paper does: 48 questions, tau 0.1, beta 0.1, union over dimensions, factor 2.
    """
    from ..baking import bake

    result = bake(
        source,
        out,
        options.settings(**values),
        edit=edit,
        form=form,
        shard_size=shard_size,
        dry_run=dry_run,
        overwrite=overwrite,
        behaviour=not no_behaviour,
        work=work,
        measure=not no_measure,
        skip_inexact=skip_inexact,
    )
    if result:  # None in all but the first of several processes
        options.show(result.to_dict(), as_json, _lines(result))
        if not result.dry_run:
            result.verdict.require(require)


def _lines(result: BakeResult) -> list[str]:
    from ..evaluation.verdict import next_command

    summary = result.to_dict()
    lines = [f"model: {summary['model']}" + (f" at {summary['commit']}" if summary["commit"] else "")]
    if result.located:
        lines += options.attribution_lines(result.located.attribution)
    factors = ", ".join(f"{f:g}" for f in summary["factors"])
    lines.append(
        f"edit: {summary['neurons']} neurons ({summary['share']:.3%}) in {len(summary['layers'])} layers, "
        f"site {summary['site']}, factor {factors}"
    )
    if result.located:
        lines += options.selection_lines(result.located.selection)
    if "shards" in summary:
        lines.append("weights: in {1} files instead of {0}".format(*summary["shards"]))
    if summary.get("dry_run"):
        lines += [f"  {p['tensor']} ({p['file']}): neurons {p['neurons']}" for p in summary["plan"]]
        return [*lines, "dry run: nothing was written"]
    if summary["form"] == "checkpoint":
        lines += options.proof_lines(summary["proofs"])
    lines += effect_lines(result.impact.effect) if result.impact.effect else []
    lines += cost_lines(result.impact.cost) if result.impact.cost else []
    model = summary["model"] + (f"@{summary['commit']}" if summary["commit"] else "")
    following = next_command(result.verdict, model, summary["out"]) if result.form == "checkpoint" else None
    return [*lines, *_next_lines(summary), *verdict_lines(result.verdict, [following] if following else [])]


def _next_lines(summary: dict) -> list[str]:
    """What was written, and commands that work as they stand here."""
    from ..files import work_folder

    out, model = summary["out"], summary["model"] + (f"@{summary['commit']}" if summary["commit"] else "")
    loader = f"from transformers import {summary['auto_class']} as A; "
    if summary["form"] == "peft":
        note = f" ({summary['bytes']:,} bytes; read back, the adapter is the edit)"
        code = f"from peft import PeftModel as P; P.from_pretrained({_base(summary)}, {_literal(out)})"
        commands = [
            ("python", "-c", loader + code),
            ("kbne-edit", "bake", "--in", model, "--edit", out, "--out", f"{out}-merged"),
        ]
    elif summary["form"] == "delta":
        note = f" ({summary['bytes']:,} bytes; its columns put in give the hashes of the folded weights)"
        commands = [("kbne-edit", "apply", out, "--in", model, "--out", f"{out}-applied")]
    else:
        note, work = "", Path(summary.get("work", work_folder(Path(out))))
        scores = [] if work == work_folder(Path(out)) else ["--scores", work / "scores.safetensors"]
        commands = [
            ("python", "-c", f"{loader}A.from_pretrained({_literal(out)})"),
            ("kbne-edit", "verify", "--in", model, "--baked", out),
            ("kbne-edit", "report", out, *scores, "--out", f"{out}.html"),
            ("kbne-edit", "revert", out, "--out", f"{out}-reverted"),
        ]
    return [f"written: {out}{note}", "next:", *("  " + options.shell(*command) for command in commands)]


def _base(summary: dict) -> str:
    """Python that loads the base."""
    from ..hub.source import DEMO

    revision = f", revision={_literal(summary['commit'])}" if summary["commit"] else ""
    path = DEMO if summary["model"] == "demo" else Path(summary["model"]).expanduser()
    return f"A.from_pretrained({_literal(str(path))}{revision})"


def _literal(text: str) -> str:
    """Text in Python, in double quotes: single ones are the shell's."""
    return json.dumps(text, ensure_ascii=False)
