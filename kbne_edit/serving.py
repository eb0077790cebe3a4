"""Serve: base and edit side by side in a browser, and the report of the edit. With Gradio, on this machine alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from html import escape
from pathlib import Path
from typing import Any

from .asking import Speaker, openers
from .disk.manifest import Manifest
from .errors import InputError, KbneError, one_line
from .models.generation import Sampling
from .progress import say
from .reporting.contents import report

LOCAL = "127.0.0.1"
_MOST_TOKENS = 400
_MOST_LETTERS = 8000  # of a prompt


@contextmanager
def served(edited: str | Path, against: str | None = None) -> Iterator[Any]:
    """The page as Gradio's Blocks, with the models loaded for as long as the block runs; `launch` shows it.

    edited: a directory that kbne-edit wrote, or any checkpoint; against: its base, None to show the edit alone.
    Raises InputError or a subclass, also where Gradio is not installed.
    """
    gradio = _gradio()
    with ExitStack() as stack:
        speakers = [s for opener in openers(str(edited), against, None) for s in stack.enter_context(opener())]
        yield _blocks(gradio, speakers, Path(edited))


def launch(blocks: Any, host: str = LOCAL, port: int = 7860, *, wait: bool = True) -> str:
    """Show the page at http://host:port, and return this address; wait: until it is interrupted.

    Nothing is shared beyond the host. Raises InputError where the port is taken.
    """
    gradio = _gradio()
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no font of another host
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=theme,
        )
    except OSError as error:
        raise InputError(f"cannot serve at {host}:{port}: {one_line(str(error))}: choose another --port") from None
    address = f"http://{host}:{port}"
    if wait:
        say(f"{address}: Ctrl-C ends it")
        blocks.block_thread()
    return address


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it would report each start
    try:
        import gradio
    except ImportError:
        raise InputError("serve needs Gradio: pip install 'kbne-edit[serve]'") from None
    return gradio


def _blocks(gradio: Any, speakers: Sequence[Speaker], edited: Path) -> Any:
    with gradio.Blocks(title=f"{edited.name}, beside its base", analytics_enabled=False) as blocks:
        gradio.Markdown(_verdict(edited))
        with gradio.Tab("Ask"):
            _ask_tab(gradio, speakers)
        with gradio.Tab("Report"):
            gradio.HTML(_page(edited))
    return blocks


def _ask_tab(gradio: Any, speakers: Sequence[Speaker]) -> None:
    """A prompt, its settings, and a box for the reply of each model."""
    prompt = gradio.Textbox(label="Prompt", lines=2, max_length=_MOST_LETTERS, autofocus=True)
    with gradio.Row():
        tokens = gradio.Slider(1, _MOST_TOKENS, value=60, step=1, label="Most tokens")
        temperature = gradio.Slider(0, 2, value=0, step=0.05, label="Temperature (0: greedy)")
        seed = gradio.Number(value=0, precision=0, label="Seed")
        plain = gradio.Checkbox(label="Without the chat template")
    with gradio.Row():
        boxes = [gradio.Textbox(label=speaker.name, lines=8, interactive=False) for speaker in speakers]

    def reply(text: str, most: float, heat: float, number: float, bare: bool) -> Any:
        if not text.strip():
            raise gradio.Error("There is no prompt to ask.")
        sampling = Sampling(min(int(most), _MOST_TOKENS), float(heat), int(number or 0))
        try:
            replies = [s.reply([{"role": "user", "content": text[:_MOST_LETTERS]}], sampling, bare) for s in speakers]
        except KbneError as error:
            raise gradio.Error(str(error)) from None
        return replies if len(replies) > 1 else replies[0]

    button = gradio.Button("Ask", variant="primary")
    gradio.on([button.click, prompt.submit], reply, [prompt, tokens, temperature, seed, plain], boxes)


def _verdict(edited: Path) -> str:
    """The verdict on record, as Markdown."""
    try:
        manifest = Manifest.read(edited)
        ship = report(edited, hashes=False).verdict if manifest else None
    except KbneError as error:
        return f"# {escape(edited.name)}\n\n{escape(str(error))}"
    if ship is None:
        return f"# {escape(edited.name)}\n\nMade elsewhere: there is no verdict on record."
    parts = ", ".join(f"{name} {part.state}" for name, part in ship)
    return f"# {escape(edited.name)}\n\n**Verdict: {ship.ship}** ({parts}), on record; the report has the reasons."


def _page(edited: Path) -> str:
    """The report in a frame of its own, in which nothing runs."""
    try:
        page = report(edited).html()
    except KbneError as error:
        return f"<p>There is no report: {escape(str(error))}</p>"
    style = "width:100%;height:75vh;border:1px solid #8888"
    return f'<iframe title="Report" sandbox srcdoc="{escape(page, quote=True)}" style="{style}"></iframe>'
