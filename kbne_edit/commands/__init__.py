"""The command line. Each sub-command is one thin module: options, a call, a rendering; loaded when it is called."""

from __future__ import annotations

import ctypes
import io
import json
import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import click

from .. import __version__
from ..errors import ErrorJSON, KbneError, RequirementError, one_line, short
from ..progress import show_progress
from .config import PREFIX, config, from_environment

COMMANDS = {
    "bake": "locate the neurons, fold the factors, prove the result",
    "locate": "attribute questions to neurons, into a scores file",
    "fit": "fit factors to sentence pairs, to lower the preference for stereotypes",
    "select": "choose neurons from a scores file (no model needed)",
    "stability": "show how far a selection depends on which questions are asked",
    "verify": "prove that a directory is its base with an edit",
    "apply": "put a delta into a copy of its base",
    "report": "write one page about an edited directory, for reviewers and auditors",
    "ask": "show the replies of an edited model, beside those of its base",
    "serve": "show base and edit side by side in a browser",
    "compare": "put two or more edits side by side",
    "revert": "restore the base from an edited directory alone",
    "push": "publish an edited directory on the Hub, after checking its hashes and proofs",
    "evaluate": "measure an edit on benchmarks, beside its controls",
    "tune": "choose factor and thresholds on one half of the items, confirm them once on the other",
    "recipes": "list, show, check or create recipes",
    "doctor": "show what this machine can do, and how it would treat a model",
}


class _Lazy(click.Group):
    """Knows its commands by name; imports one only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = import_module(f".{name}", __name__).command
        if not isinstance(command, click.Group) and "quiet" not in {param.name for param in command.params}:
            command.params += [config(), _quiet()]
            from_environment(command, name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _quiet() -> click.Option:
    """-q of every command: results only."""

    def hush(context: click.Context, option: click.Parameter, value: bool) -> None:
        if value:
            show_progress(False)

    return click.Option(
        ["-q", "--quiet"], is_flag=True, expose_value=False, callback=hush, help="Results only: no progress on stderr."
    )


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="kbne-edit")
def cli() -> None:
    """Fold know-bias neuron enhancement into a language model's checkpoint, and prove that it equals the hooks.

    \b
    First steps:  kbne-edit bake --in demo --out ./debiased
    """
    show_progress()


def main() -> None:
    """Run the command line; errors become one line and an exit status.

    0 done, 1 a proof failed, 2 wrong input, 3 disk, memory or network failed, 4 a requirement is not met, 70 a fault of
    kbne-edit itself, 130 interrupted.
    """
    _keep_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files and tensors need not be text
    try:
        status = cli.main(standalone_mode=False, auto_envvar_prefix=PREFIX)
        sys.exit(status if isinstance(status, int) else 0)
    except click.ClickException as error:
        error.show()
        _print_json(type(error).__name__, error.format_message(), 2)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: nothing was published; run the same command again to resume", err=True)
        sys.exit(130)
    except KbneError as error:
        _fail(str(error), error.exit_code, type(error).__name__)
    except BrokenPipeError:  # who read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        _fail(f"{error.strerror or error}{where}", 3, "OSError")
    except MemoryError:
        _fail("out of memory: use fewer --questions or a machine with more", 3, "MemoryError")
    except SystemExit:
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        _fail(f"internal: {_described(error)}: this is a fault of kbne-edit; please report it", 70, "InternalError")


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def _keep_memory() -> None:
    """Let glibc use the memory of freed tensors again.

    It gives large blocks back to the system, and each new tensor pays for its pages once more: a tenth of the time of
    effect and cost. Elsewhere there is no such setting.
    """
    with suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_MMAP_THRESHOLD, 1 << 30)
        set_option(_TRIM_THRESHOLD, (1 << 31) - 1)


def _fail(text: str, status: int, kind: str) -> NoReturn:
    line = one_line(text)[:600]
    click.echo(f"error: {line}", err=True)
    _print_json(kind, line, status)
    sys.exit(status)


def _print_json(kind: str, message: str, status: int) -> None:
    """What ended the run, for a program that reads stdout. A result that misses a requirement stands there already."""
    if "--json" in sys.argv[1:] and status != RequirementError.exit_code:
        error: ErrorJSON = {"error": {"type": kind, "message": one_line(message), "status": status}}
        click.echo(json.dumps({"version": 1, **error}, indent=1))


def _described(error: BaseException) -> str:
    """What happened, and at which line of which module."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = f" at {Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else ""
    return f"{type(error).__name__} ({short(error)}){where}"
