from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options
from .findings import FORCE, impact_lines, measuring, verdict_lines
from .kept import TRACK, keep_results, log_results

if TYPE_CHECKING:
    from ..baking import BakeJSON, BakeResult


@click.command("bake")
@options.SOURCE
@options.out("Directory of the new checkpoint.", "./debiased")
@options.locating
@options.selecting
@click.option(
    "--edit",
    type=click.Path(path_type=Path),
    help="Fold this edit.json, or the IA3 adapter in this folder. Nothing is located then.",
)
@click.option(
    "--fit",
    "fitted",
    is_flag=True,
    help="Fold factors that `fit` computes from sentence pairs. Nothing is located then.",
)
@click.option(
    "--as",
    "form",
    type=click.Choice(["checkpoint", "peft", "delta"]),
    default="checkpoint",
    show_default=True,
    help="Form of OUT: the model, an IA3 adapter for PEFT, or only the edited columns.",
)
@options.SHARD_SIZE
@click.option(
    "--skip-inexact",
    is_flag=True,
    help="Leave out neurons of a quantised model that cannot take their factor exactly.  [default: refuse]",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder for scores, edit, results.json and run.yaml, to resume from.  [default: OUT.work]",
)
@click.option("--dry-run", is_flag=True, help="Print the plan of the fold, and write no checkpoint.")
@options.NO_BEHAVIOUR
@measuring
@FORCE
@TRACK
@options.JSON
@options.VERBOSE
@options.OVERWRITE
def command(
    source: str, out: Path, fitted: bool, require: tuple[str, ...], as_json: bool, verbose: bool, **given: Any
) -> None:
    """Locate know-bias neurons, fold their factors into the weights, and prove the result.

    The defaults follow the paper: 48 questions, tau 0.1, beta 0.1, union over dimensions, factor 2.
    """
    from ..baking import bake
    from ..results import load_results
    from ..settings import Checks, Output, Settings

    track = given.pop("track")
    edit: Path | None = given.pop("edit")
    output = options.taken(Output, given)
    checks = options.taken(Checks, given)
    if fitted:
        edit = _fitted(source, out, edit, output.work)
    result = bake(source, out, Settings(**given), edit=edit, output=output, checks=checks)
    if result:  # None in all but the first of several processes
        if not result.dry_run:
            log_results(track, load_results(keep_results(result.out, output.work)), result.out.name)
        options.show(result.to_dict(), as_json, _lines(result, verbose))
        if not result.dry_run:
            result.verdict.require(require)


def _fitted(source: str, out: Path, edit: Path | None, work: str | Path | None) -> Path:
    """An edit fitted with the defaults of `kbne-edit fit`, in the work folder, where its gradients are kept."""
    from ..errors import InputError
    from ..files import work_folder
    from ..fitting.fit import fit

    if edit:
        raise InputError("bake takes --fit or --edit, not both")
    path = Path(work or work_folder(out)) / "fitted.json"
    fit(source, path)
    return path


def _lines(result: BakeResult, verbose: bool) -> list[str]:
    """The edit and its verdict; if `verbose`, also how it was located and what was measured."""
    summary = result.to_dict()
    lines = [_head(summary)]
    if result.dry_run:
        lines += _details(result, summary)
        lines += [f"  {step['tensor']} ({step['file']}): neurons {step['neurons']}" for step in summary["plan"]]
        return [*lines, "dry run: nothing was written"]
    if verbose:
        lines += _details(result, summary)
    return [*lines, *verdict_lines(result.verdict), *_next_lines(result, summary)]


def _head(summary: BakeJSON) -> str:
    """Base, output, and the size of the edit."""
    base = summary["model"] + (f" at {summary['commit'][:12]}" if summary["commit"] else "")
    factors = summary["factors"]
    times = ", ".join(f"{f:g}" for f in factors) if len(factors) <= 4 else f"{min(factors):g} to {max(factors):g}"
    return (
        f"{base} -> {summary['out']}: {summary['neurons']:,} neurons ({summary['share']:.3%}) in "
        f"{len(summary['layers'])} layers, factor {times}, site {summary['site']}"
    )


def _details(result: BakeResult, summary: BakeJSON) -> list[str]:
    """How the neurons were located, the figures of the proofs, effect and cost beside their controls."""
    lines = []
    if result.located:
        lines += options.attribution_lines(result.located.attribution)
        lines += options.selection_lines(result.located.selection)
    if "shards" in summary:
        lines.append("weights: in {1} files instead of {0}".format(*summary["shards"]))
    if result.dry_run:
        return lines
    if summary["form"] == "checkpoint":
        lines += options.proof_lines(summary["proofs"])
    lines += impact_lines(result.impact)
    return lines


def _next_lines(result: BakeResult, summary: BakeJSON) -> list[str]:
    """The files written, and next commands to paste; first the one that the verdict advises."""
    from ..evaluation.verdict import next_command
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
        scores = [] if work == work_folder(Path(out)) else ["--scores", str(work / "scores.safetensors")]
        commands = [
            ("python", "-c", f"{loader}A.from_pretrained({_literal(out)}{_gguf(out)})"),
            ("kbne-edit", "verify", out, "--in", model),
            ("kbne-edit", "report", out, *scores, "--out", f"{out}.html"),
            ("kbne-edit", "revert", out, "--out", f"{out}-reverted"),
        ]
    lines = ["  " + options.shell(*command) for command in commands]
    if result.form == "checkpoint":
        purpose, command = next_command(result.verdict, model, out)
        lines.insert(0, f"  {command}   # {purpose}")
    return [f"written: {out}{note}; -v shows the details", "next:", *lines]


def _gguf(out: str) -> str:
    """The argument that transformers needs for an output whose weights are a GGUF file."""
    from ..disk.refusals import gguf_file

    file = gguf_file(Path(out))
    return f", gguf_file={_literal(file.name)}" if file else ""


def _base(summary: BakeJSON) -> str:
    """Python that loads the base."""
    from ..hub.source import DEMO

    revision = f", revision={_literal(summary['commit'])}" if summary["commit"] else ""
    path = DEMO if summary["model"] == "demo" else Path(summary["model"]).expanduser()
    return f"A.from_pretrained({_literal(str(path))}{revision})"


def _literal(text: str) -> str:
    """Text in Python, in double quotes: single ones are the shell's."""
    return json.dumps(text, ensure_ascii=False)
