"""Options that several commands share, and the rendering of a summary."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import one_line
from ..families import SITES
from ..rule import COMBINE, RULES
from . import completing
from .config import converted

if TYPE_CHECKING:
    from ..attribution.answers import AttributionSummary
    from ..proofs.outcome import ProofsJSON
    from ..selection.summary import SelectionSummary

Command = TypeVar("Command", bound=Callable)
Group = TypeVar("Group")

SOURCE = click.option(
    "--in",
    "source",
    shell_complete=completing.model,
    required=True,
    metavar="MODEL",
    help="Directory, ORG/NAME[@REVISION], or demo.",
)
SHARD_SIZE = click.option(
    "--shard-size",
    metavar="SIZE",
    help="Split the weights into files of at most this size, e.g. 5GB.  [default: as in MODEL]",
)


def without(option: str, name: str, help: str) -> Callable[[Command], Command]:
    """A flag that switches `name` off."""
    return click.option(option, name, is_flag=True, callback=converted(operator.not_), help=help)


NO_BEHAVIOUR = without("--no-behaviour", "behaviour", "Skip the second proof, which loads the model.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
VERBOSE = click.option(
    "-v", "--verbose", is_flag=True, help="Also print how the neurons were located, and each figure."
)
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="Torch device; auto: the accelerator, if any."
)


def _limit_memory(size: str | None) -> None:
    if size is not None:
        from ..models.memory import limited

        click.get_current_context().with_resource(limited(size))


MEMORY = click.option(
    "--memory",
    metavar="SIZE",
    expose_value=False,
    callback=converted(_limit_memory),
    help="Memory for models, e.g. 8GB. A model that does not fit is read layer by layer, or refused.  "
    "[default: most of the free memory]",
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an existing output.")


def out(help: str, default: str) -> Callable[[Command], Command]:
    """--out. default: a path, or what it is made of (EDITED.html); then the command makes it."""
    path = click.Path(path_type=Path)
    if re.search("[A-Z]", default):
        return click.option("--out", type=path, help=f"{help}  [default: {default}]")
    return click.option("--out", default=default, show_default=True, type=path, help=help)


def beside(edited: Path, suffix: str) -> Path:
    """The default output of a command about EDITED, in the same folder."""
    return edited.parent / f"{edited.absolute().name}{suffix}"


def check_free(path: Path, overwrite: bool) -> None:
    """Raise OutputError if a file is there that must not be replaced: asked before work that takes long."""
    from ..errors import OutputError

    if path.is_file() and not overwrite:
        raise OutputError(f"{path} exists: choose another --out, or pass --overwrite")


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order of the help."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _names(_: click.Context, __: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """Names, separated by commas."""
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _answers(text: str | None) -> dict[str, list[str]] | None:
    """{answer: [surface, …]} from JSON."""
    if text is None:
        return None
    try:
        answers = json.loads(text)
        if not all(isinstance(v, list) and all(isinstance(s, str) for s in v) for v in answers.values()):
            raise ValueError
    except (ValueError, AttributeError):
        raise click.UsageError('--answers takes JSON such as {"yes": ["Yes", " yes"], "no": ["No"]}') from None
    return answers


# What is asked, and how it is attributed.
locating = _together(
    click.option(
        "--recipe",
        shell_complete=completing.recipe,
        help="Recipe by name or path.  [default: social-bias; the demo has its own]",
    ),
    click.option(
        "--questions",
        type=int,
        help="Number of questions; must be one of the recipe's subsets.  [default: the largest of at most 48]",
    ),
    click.option(
        "--site",
        type=click.Choice(SITES),
        default="down",
        show_default=True,
        help="Where to scale: input of the down-projection, or output of the gate or up projection.",
    ),
    click.option(
        "--quadrature",
        default="gauss",
        show_default=True,
        help="gauss (refined until complete), gauss-N, or riemann-N (riemann-20 is the published sum).",
    ),
    click.option(
        "--objective",
        type=click.Choice(["probability", "log-odds"]),
        default="probability",
        show_default=True,
        help="Attribute the probability of the right answer, or its log-odds.",
    ),
    click.option(
        "--positions",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Number of last positions of a prompt to scale and score. The work grows in proportion.",
    ),
    click.option(
        "--prompt",
        type=click.Choice(["chat", "plain"]),
        default="chat",
        show_default=True,
        help="Use the chat template if the model has one, or plain text.",
    ),
    click.option(
        "--before",
        default="",
        metavar="TEXT",
        help="Text before each question: a conversation, or steps of reasoning.",
    ),
    click.option(
        "--answers",
        metavar="JSON",
        callback=converted(_answers),
        help='Tokens that count as each answer, e.g. {"yes": ["Yes"], "no": ["No"]}.',
    ),
    DEVICE,
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help="Data type of the attribution.",
    ),
    click.option(
        "--memory",
        metavar="SIZE",
        help="Memory for attribution, proofs and measures, e.g. 8GB. A model that does not fit "
        "is read layer by layer.  [default: most of the free memory]",
    ),
)


# Which neurons are kept.
selecting = _together(
    click.option("--rule", type=click.Choice(RULES), help="Selection rule.  [default: the recipe's, paper]"),
    click.option(
        "--tau",
        type=click.FloatRange(0, 1),
        help="Threshold: share of a question's largest score.  [default: 0.1]",
    ),
    click.option(
        "--beta",
        type=click.FloatRange(0, 1),
        help="Share of a dimension's questions that a neuron must reach.  [default: 0.1]",
    ),
    click.option(
        "--top",
        type=click.FloatRange(0, 1),
        help="Instead of --tau: keep this share of all neurons, the largest "
        "scores first.  [default: 0.002 with --rule specific]",
    ),
    click.option("--combine", type=click.Choice(COMBINE), help="How to combine dimensions.  [default: union]"),
    click.option(
        "--dimensions",
        metavar="NAMES",
        callback=_names,
        help="Use only these dimensions, separated by commas.  [default: all]",
    ),
    click.option("--factor", type=float, help="Multiplier of the selected neurons.  [default: the recipe's, 2]"),
    click.option(
        "--same-sign",
        is_flag=True,
        default=None,
        help="Keep only neurons that help the right answer, whichever answer that is.",
    ),
    click.option(
        "--min-stability",
        type=click.FloatRange(0, 1),
        help="Keep neurons that are selected in at least this share of 200 resamples of the questions.",
    ),
    click.option("--drop-wrong", is_flag=True, help="Leave out questions that the model answers incorrectly."),
)


# What is measured, and beside which controls.
evaluating = _together(
    click.option(
        "--tasks",
        shell_complete=completing.tasks,
        callback=_names,
        help="Names, separated by commas.  [default: all that have data]",
    ),
    click.option(
        "--data",
        type=click.Path(path_type=Path),
        help="Folder with the tasks' files.  [default: download from the Hub]",
    ),
    click.option(
        "--limit",
        type=click.IntRange(1),
        help="Number of items of each task, drawn with a fixed seed.  [default: all]",
    ),
    click.option(
        "--draws",
        type=click.IntRange(1),
        default=39,
        show_default=True,
        help="Number of draws of random neurons. Fewer than 19 give no evidence.",
    ),
    click.option(
        "--margin",
        type=click.FloatRange(0, 100, min_open=True),
        default=5.0,
        show_default=True,
        help="Loss of capability that must be excluded, in points of accuracy.",
    ),
    DEVICE,
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help="Data type of the computation.",
    ),
)


def taken(kind: type[Group], values: dict[str, Any], **more: Any) -> Group:
    """Settings of one kind from the options with the names of its fields, which are removed from `values`."""
    names = [field.name for field in dataclasses.fields(kind) if field.name in values]  # type: ignore[arg-type]
    given = {name: value for name in names if (value := values.pop(name)) is not None}
    return kind(**given, **more)


def show(result: Mapping[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print results to stdout, as JSON or as lines; on a terminal lines are wrapped, with states in colour.

    The JSON of each command has a version, 1 unless it says another, and a schema in docs/schemas/.
    """
    if as_json:
        click.echo(json.dumps({"version": 1} | dict(result), indent=1, default=str))
        return
    for line in map(one_line, lines):
        click.echo(_painted(_wrapped(line)) if sys.stdout.isatty() else line)


_INDENT = 36  # column of the reasons of a verdict
_COLOURS = {"PASS": "green", "FAIL": "red", "NO EVIDENCE": "yellow", "NOT MEASURED": "yellow"}


def _wrapped(line: str) -> str:
    """A line wrapped to the width of the terminal; commands to paste stay whole."""
    width = shutil.get_terminal_size().columns
    if len(line) <= width or line.lstrip().startswith(("kbne-edit ", "python ", "/")):
        return line
    state = re.match(r"  .{18} (?:PASS|FAIL|NO EVIDENCE|NOT MEASURED) ", line)
    indent = min(_INDENT, width // 2) if state else len(line) - len(line.lstrip()) + 2
    return "\n".join(textwrap.wrap(line, width, subsequent_indent=" " * indent, break_long_words=False))


def _painted(text: str) -> str:
    """States in colour, unless NO_COLOR is set (no-color.org)."""
    if os.environ.get("NO_COLOR"):
        return text
    state = re.match(r"(  .{18} )(PASS|FAIL|NO EVIDENCE|NOT MEASURED)", text)
    if state:
        word = state[2]
        return state[1] + click.style(word, fg=_COLOURS[word], bold=True) + text[state.end() :]
    return click.style(text, bold=True) if text.startswith("VERDICT: ") else text


def shell(program: str, *words: object) -> str:
    """A command to paste, quoted. "python" and "kbne-edit" get a path if the shell would find another one, or none."""
    here = Path(sys.executable).with_name(program)
    if program == "python" and not here.exists():
        here = Path(sys.executable)
    path = shutil.which(here.name)
    if here.exists():
        program = here.name if path and Path(path).parent == here.parent else str(here)
    return shlex.join([program, *map(str, words)])


def selection_lines(summary: SelectionSummary) -> list[str]:
    """Neurons per dimension, overlap between dimensions, and with the controls."""
    lines = []
    for name, part in summary.dimensions.items():
        shared = "" if part.controls_overlap is None else f", {part.controls_overlap} of them by the controls too"
        lines.append(f"  {name}: {part.neurons} neurons in {len(part.layers)} layers{shared}")
    if summary.overlap:
        lines.append("  in common: " + ", ".join(f"{pair}: {n}" for pair, n in summary.overlap.items()))
    if (share := summary.controls_share) is not None:
        lines.append(
            f"controls: unrelated questions select {summary.controls_neurons} neurons; "
            f"{summary.controls_overlap} of the {summary.neurons} ({share:.0%}) are among them"
        )
        if share > 0.5:
            advice = ": compare with --rule specific" if summary.rule == "paper" else ""
            lines.append(f"  most of this selection is not specific to bias{advice}")
    if unseen := summary.unseen_share:
        lines.append(
            f"held-out controls: {unseen.value:.0%} [{unseen.low:.0%}, {unseen.high:.0%}] of the selected neurons also "
            "serve unrelated questions that the selection never saw"
        )
    return lines


def attribution_lines(summary: AttributionSummary) -> list[str]:
    """Answers, warnings if they carry little information, completeness."""
    answers = summary.answers
    by_answer = ", ".join(f"{name} {tally.right} of {tally.total}" for name, tally in answers.by_answer.items())
    lines = [
        f"answers: {answers.questions.right} of {answers.questions.total} questions right, {answers.controls.right} of "
        f"{answers.controls.total} controls; by answer: {by_answer}"
    ]
    lines += [f"  wrong: {text}" for text in answers.wrong[:3]]
    if len(answers.wrong) > 3:
        lines.append(f"  and {len(answers.wrong) - 3} more (--json lists them; --drop-wrong leaves them out)")
    if answers.constant is not None:
        value, low, high = answers.balanced
        lines.append(
            f"  warning: no better than the same answer to everything (balanced accuracy {value:.0%} [{low:.0%}, "
            f"{high:.0%}], controls included): these scores say little about what the model knows"
        )
    if answers.mass and answers.mass.small:
        lines.append(
            f"  warning: at the position that is attributed, all answers together have a probability of "
            f"{answers.mass.median:.1%} (median): what is attributed is hardly the model's answer"
        )
    lines.append(
        f"attribution: largest completeness residual {summary.largest_residual:.1%} of a question's largest score, "
        f"{summary.nodes_per_layer:.1f} nodes per layer"
    )
    return lines


def proof_lines(proofs: ProofsJSON) -> list[str]:
    """Both proofs, with their figures."""
    if proofs["file_proof"]:
        lines = [
            f"proof 1, the files hold the edit: holds ({proofs['edited']} of {proofs['tensors']} tensors are the "
            f"rounded product, the others and {proofs['files']} files are as expected; edit {proofs['source']})"
        ]
    else:
        lines = ["proof 1, the files hold the edit: FAILS"] + [f"  {fault}" for fault in proofs["faults"][:10]]
        if len(proofs["faults"]) > 10:
            lines.append(f"  and {len(proofs['faults']) - 10} more")
    lines += [f"  note: {note}" for note in proofs.get("notes", [])[:10]]
    for entry in proofs["behaviour"] or []:
        verdict = "holds" if entry["ok"] else "FAILS"
        if entry["bit_equal"]:
            figures = f"bit-equal at {entry['positions']} positions"
        else:
            figures = f"largest difference {entry['difference']:.1e} of the logits' spread "
            figures += f"(rounding noise {entry['noise']:.1e})"
            figures += f", KL {entry['kl']:.1e}, same top token {entry['top1']:.1%}" if "kl" in entry else ""
        if entry.get("rerouted"):
            figures += f", {entry['rerouted']:.1%} of positions left out: rounding turned a router's choice"
        if "greedy" in entry:
            figures += f", same greedy text {entry['greedy']:.0%}"
        lines.append(
            f"proof 2, the model behaves as the hooks, {entry['dtype']}, {entry['how']}: {verdict} ({figures})"
        )
    return lines
