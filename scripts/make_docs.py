"""Writes docs/commands.md from the commands' own help; a test fails if the page is out of date."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "commands.md"
_WIDTH = 100


def text() -> str:
    """The page: one section for each command, in the order of the help."""
    sys.path.insert(0, str(ROOT))
    from kbne_edit.commands import cli

    head = "# Commands\n\nWhat `--help` prints. Written by `scripts/make_docs.py`: change the commands, not this.\n"
    return "\n".join([head, *_sections(cli, "kbne-edit", None)])


def _sections(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(command, parent, name, terminal_width=_WIDTH, help_option_names=["-h", "--help"])
    yield f"## {context.command_path}\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            yield from _sections(command.get_command(context, child), child, context)


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
