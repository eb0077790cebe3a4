"""Writes the pages of docs/ that are made: commands.md and options.md from the commands' own help,
architectures.md from the table of families, map.svg from map.json, schemas/ from the types of what is printed as JSON.

    python scripts/make_docs.py              # a test fails if one of them is out of date
    python scripts/make_docs.py --measure    # map.json first: bakes the demo, about ten seconds

The README shows the map beside what `bake --in demo` prints: measure when that changes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kbne_edit.architectures import Family

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
_WIDTH = 100  # of the help, in characters

sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from option_table import page as options  # noqa: E402
from schemas import outputs, schema_of  # noqa: E402


def commands() -> str:
    """One section for each command, in the order of the help."""
    from kbne_edit.commands import cli

    head = "# Commands\n\nWhat `--help` prints. Written by `scripts/make_docs.py`: change the commands, not this.\n"
    return "\n".join([head, *_sections(cli, "kbne-edit", None)])


def _sections(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(command, parent, name, terminal_width=_WIDTH, help_option_names=["-h", "--help"])
    yield f"## {context.command_path}\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            yield from _sections(command.get_command(context, child), child, context)


def architectures() -> str:
    """What is known of each architecture, from the table that the code reads."""
    from kbne_edit.architectures import FAMILIES, INFERRED, MULTIMODAL, NOT_CAUSAL, REASONS

    head = (
        "# Architectures\n\nBy the model type in config.json. Written by `scripts/make_docs.py` from "
        "`kbne_edit/architectures.py`. `python benchmarks/architectures.py` runs every causal architecture of the "
        "installed transformers, tiny and seeded, and prints what works.\n"
    )
    rows = ["| architecture | feed-forward block | sites | attribution | IA³ form |", "|---|---|---|---|---|"]
    rows += [_architecture(name, family) for name, family in sorted(FAMILIES.items())]
    known = (
        f"{len(FAMILIES)} architectures. If the text part of a multimodal checkpoint is one of them, kbne-edit edits "
        "the text part and copies the rest bit for bit. Tested: "
        f"{', '.join(f'`{name}`' for name in MULTIMODAL)}.\n"
    )
    known += (
        "\nAn architecture that is not in the table is inferred if transformers can build it: kbne-edit takes the one "
        "projection that closes each layer's feed-forward block. The site is down, and both proofs apply as for any "
        f"other. `kbne-edit bake` prints a note. Tested: {', '.join(f'`{name}`' for name in INFERRED)}.\n"
        "\nAttribution by packed rows computes all layers of many questions in one pass. Where layers hand a state "
        "from token to token, share keys and values, or bias attention by position, the model runs whole for each "
        "layer, prompt by prompt: the same scores, many times the work. Gemma 4 E2B and E4B and Falcon with ALiBi run "
        "whole, too. A block that Zamba uses in several layers has its neurons in the first of them.\n"
    )
    reasons: dict[str, list[str]] = {
        f"{kind}, not a causal language model": list(names) for kind, names in NOT_CAUSAL.items()
    }
    for name, reason in REASONS.items():
        reasons.setdefault(reason, []).append(name)
    refused = ["## Refused, with the reason\n", "| architecture | reason |", "|---|---|"]
    refused += [f"| {', '.join(f'`{name}`' for name in names)} | {reason} |" for reason, names in reasons.items()]
    return "\n".join([head, known, *rows, "", *refused, ""])


def _architecture(name: str, family: Family) -> str:
    block = "mixture of experts" if family.experts else "gated" if family.gate else "plain"
    block += ", gate and up in one tensor" if family.packed else ""
    block += ", a shared expert" if family.shared else ""
    block += ", not in every layer" if family.sparse else ""
    sites = "down, gate, up" if family.gate else "down"
    rows = "whole prompts" if family.recurrent else "packed rows"
    return f"| `{name}` | {block} | {sites} | {rows} | {'no' if family.experts else 'yes'} |"


def picture() -> str:
    """The report's map as a file of its own."""
    from kbne_edit.plots import neuron_map, standalone

    return standalone(neuron_map(**json.loads((DOCS / "map.json").read_text(encoding="utf-8"))))


def measure() -> str:
    """The marks of the map, as JSON: what `bake --in demo` selects, and what `report` shows of it."""
    from kbne_edit import bake
    from kbne_edit.reporting.contents import report
    from kbne_edit.reporting.neurons import marks

    with tempfile.TemporaryDirectory() as folder:
        bake("demo", Path(folder) / "debiased")
        result = marks(report(Path(folder) / "debiased")).to_dict()
    return "{\n" + ",\n".join(f' "{key}": {json.dumps(value)}' for key, value in result.items()) + "\n}\n"


def schema(name: str, kind: Any) -> str:
    """What a command prints with --json, as a JSON schema."""
    return json.dumps(schema_of(name, kind), indent=2) + "\n"


PAGES = {"commands.md": commands, "options.md": options, "architectures.md": architectures, "map.svg": picture}
PAGES |= {f"schemas/{name}.json": partial(schema, name, kind) for name, kind in outputs().items()}

if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        (DOCS / "map.json").write_text(measure(), encoding="utf-8")
    for name, text in PAGES.items():
        (DOCS / name).write_text(text(), encoding="utf-8")
