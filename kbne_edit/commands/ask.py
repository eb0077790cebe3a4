from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError, one_line
from . import options

if TYPE_CHECKING:
    from ..asking import AskJSON, Reply, Speaker
    from ..models.generation import Sampling, Turn

_MOST_BYTES = 1 << 20  # of a file of prompts


@click.command("ask")
@click.argument("edited", required=False)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--against", metavar="MODEL", help="The base, to show its replies too: a directory, ORG/NAME[@REVISION], or demo."
)
@click.option("--in", "source", metavar="MODEL", help="With --edit: the base, to which hooks apply the edit.")
@click.option("--edit", "edit_path", type=click.Path(path_type=Path), help="An edit.json to apply by hooks.")
@click.option("--file", "file", type=click.Path(path_type=Path), help="File with one prompt per line.")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=60, show_default=True, help="Maximum length of a reply, in tokens."
)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="Sampling temperature; 0 is greedy."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for sampling at a temperature above 0.")
@click.option("--plain", is_flag=True, help="Leave out the chat template: the model continues the prompt.")
@options.JSON
def command(edited: str | None, prompts: tuple[str, ...], plain: bool, as_json: bool, **given: Any) -> None:
    """Show the replies of an edited model, beside those of its base.

    \b
    kbne-edit ask ./debiased --against MODEL "The nurse told the doctor that"
    kbne-edit ask --in MODEL --edit edit.json "The nurse told the doctor that"
    kbne-edit ask ./debiased --against MODEL        # a conversation, on a terminal
    """
    from ..asking import ask, openers
    from ..edit import Edit
    from ..models.generation import Sampling

    source, against, file = given["source"], given["against"], given["file"]
    edit = Edit.load(given["edit_path"]) if given["edit_path"] else None
    if edit is None and (edited is None or source is not None):
        raise click.UsageError("give the edited directory, or --in MODEL with --edit edit.json")
    if edit is not None:
        if source is None:
            raise click.UsageError("--edit needs --in MODEL, the model that the edit is for")
        prompts = prompts if edited is None else (edited, *prompts)
    model = str(edited if edit is None else source)
    sampling = Sampling(given["max_tokens"], given["temperature"], given["seed"])
    every = [*prompts, *(_prompts_in(file) if file else [])]
    if not every and not as_json and sys.stdin.isatty():
        with ExitStack() as stack:
            speakers = [s for opener in openers(model, against, edit) for s in stack.enter_context(opener())]
            return _chat(speakers, sampling, plain)
    if not every:
        raise click.UsageError("there is no prompt: give one, pass --file, or run the command on a terminal")
    replies = ask(model, every, against=against, edit=edit, sampling=sampling, plain=plain)
    result: AskJSON = {"replies": [reply.to_dict() for reply in replies]}
    options.show(result, as_json, _lines(replies))
    return None


def _prompts_in(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises InputError."""
    from ..files import open_input

    with open_input(path) as stream:
        data = stream.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise InputError(f"{path} has more than {_MOST_BYTES:,} bytes: ask in several runs")
    try:
        return [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: give a text file with one prompt a line") from None


def _lines(replies: tuple[Reply, ...]) -> list[str]:
    """Prompt and replies, the base's first."""
    lines = []
    for reply in replies:
        lines.append(f"> {one_line(reply.prompt)}")
        if reply.base is not None:
            lines.append(f"  base:   {_text(reply.base)}")
        lines.append(f"  edited: {_text(reply.edited)}")
        if reply.base == reply.edited:
            lines.append("  (the same)")
    return lines


def _text(reply: str) -> str:
    """A reply on one line: a model may write terminal control codes."""
    return one_line(" ".join(reply.split())) or "(nothing)"


def _chat(speakers: list[Speaker], sampling: Sampling, plain: bool) -> None:
    """A conversation with each model, fed the same lines; an empty line ends it."""
    histories: dict[str, list[Turn]] = {speaker.name: [] for speaker in speakers}
    click.echo("Each model answers what you type and keeps its own conversation. An empty line ends it.")
    while line := click.prompt(">", default="", show_default=False, prompt_suffix=" ").strip():
        for speaker in speakers:
            history = histories[speaker.name]
            history.append({"role": "user", "content": line})
            click.secho(f"  {speaker.name}: ", nl=False, bold=True)
            reply = speaker.reply(history, sampling, plain, lambda text: click.echo(one_line(text), nl=False))
            click.echo()
            history.append({"role": "assistant", "content": reply})
