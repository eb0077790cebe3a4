from __future__ import annotations

from pathlib import Path

import click

from . import options


@click.command("bake")
@options.SOURCE
@options.out("Directory of the new checkpoint.")
@options.locating
@options.selecting
@click.option("--edit", "edit_path", type=click.Path(path_type=Path), help="Fold this edit.json instead of locating.")
@click.option("--work", type=click.Path(path_type=Path), help="Keeps scores and edit, to resume.  [default: OUT.work]")
@click.option("--dry-run", is_flag=True, help="Print what would be folded, and write no checkpoint.")
@click.option("--no-behaviour", is_flag=True, help="Skip the second proof (it loads the model).")
@options.JSON
@options.OVERWRITE
def command(source, out, edit_path, work, dry_run, no_behaviour, as_json, overwrite, **values) -> None:
    """Locate know-bias neurons, fold their factors into the weights, and prove the result.

    With no option it does what the paper does: 45 questions, tau 0.1, beta 0.1, union over dimensions, factor 2.
    """
    from ..edit import Edit
    from ..pipeline import bake

    edit = Edit.load(edit_path) if edit_path else None
    summary = bake(
        source, out, options.settings(**values), edit=edit, dry_run=dry_run, overwrite=overwrite,
        behaviour=not no_behaviour, work=work,
    )  # fmt: skip
    if summary:  # empty in all but the first of several processes
        options.show(summary, as_json, _lines(summary))


def _lines(summary: dict) -> list[str]:
    lines = [f"model: {summary['model']}" + (f" at {summary['commit']}" if summary["commit"] else "")]
    if found := summary.get("attribution"):
        lines += options.attribution_lines(found)
    factors = ", ".join(f"{f:g}" for f in summary["factors"])
    lines.append(
        f"edit: {summary['neurons']} neurons ({summary['share']:.3%}) in {len(summary['layers'])} layers, "
        f"site {summary['site']}, factor {factors}"
    )
    if "selection" in summary:
        lines += options.selection_lines(summary["selection"])
    if summary.get("dry_run"):
        lines += [f"  {p['tensor']} ({p['file']}): neurons {p['neurons']}" for p in summary["plan"]]
        return [*lines, "dry run: nothing was written"]
    lines += options.proof_lines(summary["proofs"])
    if "effect" in summary:
        lines += _effect_lines(summary["effect"])
    out, pinned = summary["out"], f"@{summary['commit']}" if summary["commit"] else ""
    return [
        *lines,
        f"written: {out}",
        "next:",
        f"  python -c \"from transformers import AutoModelForCausalLM as A; A.from_pretrained('{out}')\"",
        f"  kbne-edit verify --in {summary['model']}{pinned} --baked {out}",
        f"  kbne-edit revert {out} --out {out}-reverted",
    ]


def _effect_lines(effect: dict) -> list[str]:
    def interval(values: list[float]) -> str:
        return f"{values[0]:+.4f} [{values[1]:+.4f}, {values[2]:+.4f}]"

    before, after = effect["mean_abs_margin"]
    return [
        f"effect on {effect['probes']} stereotype probes (mean absolute margin, nats per token; 95 % intervals):",
        f"  this edit: {before:.4f} to {after:.4f}, change {interval(effect['change_abs'])}; "
        f"signed {interval(effect['change_signed'])}",
        f"  random neurons, same layers ({effect['random_draws']} draws): {interval(effect['random_change_abs'])}",
        "  stereotype preferred in {:.0%}, afterwards {:.0%}".format(*effect["stereotype_share"]),
        f"  verdict: {effect['found']}",
    ]
