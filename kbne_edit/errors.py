"""The exception tree.

    KbneError
    ├── InputError            exit status 2: the input is wrong
    │   ├── SourceError       --in cannot be turned into a local checkpoint
    │   ├── CheckpointError   the files of a checkpoint are damaged or of a kind that cannot be edited
    │   ├── FamilyError       an architecture that kbne-edit does not know
    │   ├── RecipeError       a recipe with faults (all of them in one message)
    │   ├── EditError         an edit that is malformed or made for another model
    │   ├── ScoresError       a scores file that is damaged or belongs to other settings
    │   └── OutputError       the output cannot be written, or exists already
    ├── ProofError            exit status 1: a proof failed
    └── RequirementError      exit status 4: the result does not meet a requirement

Exit status 3: the disk, the memory or the network failed (`of_the_machine`); 70: a fault of kbne-edit itself.

Each message is one sentence or two: what is wrong, where, and what to do.
"""

import errno
from typing import TypedDict


class ErrorDetails(TypedDict):
    """type: class of the exception; message: one line; status: the exit status."""

    type: str
    message: str
    status: int


class ErrorJSON(TypedDict):
    """What a command prints with --json in place of its result."""

    error: ErrorDetails


class KbneError(Exception):
    """Base of all errors that kbne-edit raises on purpose."""

    exit_code = 2


class InputError(KbneError):
    """The input is wrong."""


class SourceError(InputError):
    """The model source cannot be turned into a local checkpoint directory."""


class CheckpointError(InputError):
    """The files of a checkpoint are damaged, incomplete, or of a kind that cannot be edited."""


class FamilyError(InputError):
    """The architecture is unknown or does not fit what its family promises."""


class RecipeError(InputError):
    """A recipe has faults; `faults` lists all of them, the message the first twenty."""

    def __init__(self, where: str, faults: list[str]):
        self.faults = faults
        listed = "; ".join(faults[:20]) + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
        super().__init__(f"{where}: {len(faults)} fault{'s' * (len(faults) != 1)}: {listed}")


class EditError(InputError):
    """An edit is malformed, changes nothing, or was made for another model."""


class ScoresError(InputError):
    """A scores file is damaged or belongs to another model, recipe or setting."""


class OutputError(InputError):
    """The output cannot be written, or exists already."""


class ProofError(KbneError):
    """A proof failed; `report` holds the figures."""

    exit_code = 1

    def __init__(self, message: str, report: object = None):
        self.report = report
        super().__init__(message)


# Error numbers that mean that the machine fails, not the request.
_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ECONNRESET, errno.ETIMEDOUT),
}


def of_the_machine(error: KbneError, number: int | None = None) -> KbneError:
    """The same error, with exit status 3 if it is the disk, the memory or the network that failed.

    number: errno; None if the caller knows that the machine failed.
    """
    if number is None or number in _MACHINE:
        error.exit_code = 3
    return error


def short(error: BaseException) -> str:
    """The first line of another library's message."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0][:120])


def shown(value: object) -> str:
    """A value as a message quotes it: one line of at most 80 characters, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of more than 4300 digits
        text = f"a huge {type(value).__name__}"
    return one_line(text if len(text) <= 80 else text[:79] + "…")


def one_line(text: str) -> str:
    """Escape line breaks, terminal codes and undecodable bytes in text from outside."""
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)


class RequirementError(KbneError):
    """The output is written, but a part of the verdict that was required does not pass."""

    exit_code = 4
