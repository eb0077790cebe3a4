from __future__ import annotations

from pathlib import Path

import click

from . import completing


@click.command("serve")
@click.argument("edited", type=click.Path(path_type=Path))
@click.option(
    "--against",
    metavar="MODEL",
    shell_complete=completing.model,
    help="The base, to show its replies too: a directory, ORG/NAME[@REVISION], or demo.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to serve at. Others than this machine's own are open to the network.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True, help="Port to serve at.")
def command(edited: Path, against: str | None, host: str, port: int) -> None:
    """Show base and edit side by side in a browser, with the report. Needs Gradio: pip install 'kbne-edit[serve]'.

    \b
    kbne-edit serve ./debiased --against MODEL      # http://127.0.0.1:7860
    """
    from ..serving import launch, served

    with served(edited, against) as page:
        launch(page, host, port)
