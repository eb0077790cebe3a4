"""Every option of every command in one table, and the names that mean two things.

An option means one thing everywhere: one type of value, and one sentence of help. Where commands say it in words of
their own (what --out writes), COMMON holds the meaning that they share.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import click

COMMON = {
    "--in": "The base: a directory, ORG/NAME[@REVISION], or demo.",
    "--out": "What the command writes: a directory or a file.",
    "--edit": "An edit.json, instead of one that is located or on record.",
    "--recipe": "Recipe by name or path: its questions, probes and default thresholds.",
    "--scores": "Scores file of `locate`.",
    "--data": "Folder with the files of benchmarks.",
    "--questions": "Number of questions.",
    "--draws": "Number of draws of the random control.",
    "--seed": "Seed of every random choice.",
    "--site": "Where to scale.",
    "--device": "Torch device.",
    "--dtype": "Data type of the computation.",
    "--max-kl": "Bound on the KL from the base on neutral text, in nats per token.",
    "--memory": "Memory that may be used, e.g. 8GB. A model that does not fit is read layer by layer.",
    "--dry-run": "Do everything but write or send.",
}


class Use(NamedTuple):
    """One option of one command. value: what its value is; text: its help without the default."""

    command: str
    option: str
    value: str
    text: str


def uses(group: click.Group, name: str = "") -> Iterator[Use]:
    """Every option that a user can see, of every command below a group."""
    context = click.Context(group)
    for child in group.list_commands(context):
        command = group.get_command(context, child)
        assert command is not None
        path = f"{name} {child}".strip()
        if isinstance(command, click.Group):
            yield from uses(command, path)
            continue
        for param in command.params:
            if isinstance(param, click.Option) and not param.hidden:
                text = re.sub(r"\s*\[default:[^]]*(\[[^]]*\][^]]*)*\]", "", param.help or "").strip()
                yield Use(path, max(param.opts, key=len), _value(param), text)


def _value(param: click.Option) -> str:
    """A word for what an option takes: --seed takes a number, however far it may go."""
    if param.is_flag:
        return "flag"
    if isinstance(param.type, (click.types.IntParamType, click.types.FloatParamType)):
        return "number"
    return "list" if param.type.name == "LIST" else "text"


def doubles(every: list[Use]) -> list[str]:
    """Options with two meanings: two types of value, or two sentences of help and no entry in COMMON."""
    faults = []
    for option in sorted({use.option for use in every}):
        of = [use for use in every if use.option == option]
        values, texts = {use.value for use in of}, {use.text for use in of}
        where = ", ".join(use.command for use in of)
        if len(values) > 1:
            faults.append(f"{option} takes {' and '.join(sorted(values))} ({where})")
        if len(texts) > 1 and option not in COMMON:
            faults.append(f"{option} means {len(texts)} things ({where}): {' | '.join(sorted(texts))}")
        if len(texts) == 1 and option in COMMON and len(of) > 1:
            faults.append(f"{option} needs no entry in COMMON")
    return faults


def page() -> str:
    """docs/options.md."""
    from kbne_edit.commands import cli

    every = list(uses(cli))
    commands = dict.fromkeys(use.command for use in every)
    head = (
        "# Options across commands\n\nAn option means the same in every command that has it; a test fails otherwise. "
        "Written by `scripts/make_docs.py`: change the commands, not this. `-q`, `--config` and `-h` are options of "
        f"every command, `-V` of `kbne-edit` itself. {len({use.option for use in every})} options, "
        f"{len(commands)} commands.\n"
    )
    rows = ["| option | value | meaning | commands |", "|---|---|---|---|"]
    for option in sorted({use.option for use in every} - {"--quiet", "--config"}):
        of = [use for use in every if use.option == option]
        text = COMMON.get(option, of[0].text) if len(of) > 1 else of[0].text
        cells = (f"`{option}`", of[0].value, text.replace("|", "\\|"), ", ".join(use.command for use in of))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, *rows, ""])
