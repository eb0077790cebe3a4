"""Work on files from outside in a child process, within limits of time and memory.

A chat template may loop for ever, a tokenizer's normaliser may double its input forty times, and the libraries that
interpret them have no limits of their own. The child is a fork, so it costs milliseconds and takes along what is
loaded; requests and answers are JSON. It must not use torch: a fork does not take OpenMP's threads along.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import select
import signal
import struct
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointError, InputError, KbneError, short
from .memory import kilobytes

SECONDS, BYTES = 10, 2 << 30
_MOST = 1 << 28  # bytes of a message
_WAIT = 30  # times the limit by the clock: it counts CPU time, of which a busy machine gives little
_EACH = 0.1  # seconds of CPU time that every further request of a worker adds to its limit
_LENGTH = struct.Struct("<q")


def confined(path: Path, work: Callable[..., Any], *args: Any, seconds: int = SECONDS, memory: int = BYTES) -> Any:
    """work(*args) in a child; its result must be JSON. path: whose files it reads, for messages.

    seconds: of CPU time; memory: bytes beyond those that this process has. Raises CheckpointError that names the limit
    or the child's error; InputError of the work itself passes through.
    """
    worker = Worker(path, lambda: lambda: work(*args), seconds=seconds, memory=memory)
    try:
        return worker.ask()
    finally:
        worker.close()


class Worker:
    """A child that answers one request after the other, until it exceeds a limit or is no longer referred to.

    Limits as of `confined`; each request after the first adds .1 s to that of time.
    """

    def __init__(
        self, path: Path, make: Callable[[], Callable[..., Any]], *, seconds: int = SECONDS, memory: int = BYTES
    ) -> None:
        """make: called in the child once, gives what answers: arguments and result must be JSON."""
        self._path, self._seconds, self._memory, self._calls = path, seconds, memory, 0
        self._owner, self._alive = os.getpid(), True
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _serve(requests, answers, make, seconds, memory)
        os.close(requests)
        os.close(answers)
        self._status: list[int] = []
        #: Ends the child; is called when the worker is collected, too.
        self.close = weakref.finalize(
            self, _close, self._owner, self._pid, (self._requests, self._answers), self._status
        )

    @property
    def usable(self) -> bool:
        """Whether it can answer here. In a fork of its owner it cannot: two would read each other's answers."""
        return self._alive and self._owner == os.getpid()

    def ask(self, *args: Any) -> Any:
        """Raises CheckpointError where the child exceeds a limit or fails; the child is not usable then.

        A request that raises an error of Python in the child leaves it usable. InputError passes through.
        """
        self._calls += 1
        self._alive = False  # an interrupt would leave an answer in the pipe, which belongs to no later request
        seconds = _allowed(self._seconds, self._calls)
        try:
            _write(self._requests, json.dumps(args).encode())
            answer = _read(self._answers, time.monotonic() + _WAIT * seconds)
        except BrokenPipeError:
            answer = b""
        if not answer:
            self.close()
            raise self._ended(seconds, None if answer is None else self._status[0])
        self._alive = True
        kind, value = json.loads(answer)
        if kind == "value":
            return value
        if kind == "input":
            raise InputError(value)
        if kind == "memory":
            raise self._too_large()
        raise CheckpointError(f"transformers cannot use {self._path}: {value}")

    def _ended(self, seconds: int, status: int | None) -> CheckpointError:
        """status: the exit status, below 0 for a signal; None where the child was waited for in vain."""
        if status in (None, -signal.SIGXCPU, -signal.SIGKILL):
            return self._beyond(f"takes more than {seconds} s, the limit")
        if status == -signal.SIGABRT:  # how Rust ends where memory is refused
            return self._too_large()
        return self._beyond(f"ended its process (status {status})")

    def _too_large(self) -> CheckpointError:
        return self._beyond(f"takes more than {self._memory / (1 << 30):g} GB of memory, the limit")

    def _beyond(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"the tokenizer or chat template of {self._path} {what}: use another model, or repair it"
        )


def _allowed(seconds: int, calls: int) -> int:
    return seconds + int(_EACH * (calls - 1))


def _serve(requests: int, answers: int, make: Callable[[], Callable[..., Any]], seconds: int, memory: int) -> NoReturn:
    """The child."""
    try:
        _confine(memory, (requests, answers))
        work, calls = None, 0
        while (request := _read(requests)) is not None and request:
            calls += 1
            _limit(resource.RLIMIT_CPU, _allowed(seconds, calls))
            if work is None:
                kind, work = _outcome(make)
                if kind != "value":
                    _write(answers, json.dumps([kind, work]).encode())
                    break
            _write(answers, json.dumps(_outcome(work, *json.loads(request))).encode())
    except BaseException:
        os._exit(1)
    os._exit(0)


def _confine(memory: int, pipes: tuple[int, int]) -> None:
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's, which then closes the pipe
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # no file of the parent is closed by the collector
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # Rust prints what it panics of
        os.dup2(quiet, stream)
    low, high = sorted(pipes)
    for first, last in ((3, low), (low + 1, high), (high + 1, os.sysconf("SC_OPEN_MAX"))):
        os.closerange(first, last)  # locks and other workers' pipes among them: they would outlive the parent's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_AS, int(min(kilobytes("/proc/self/status", "VmSize"), 1 << 62)) + memory)


def _outcome(work: Callable[..., Any], *args: Any) -> tuple[str, Any]:
    try:
        return "value", work(*args)
    except MemoryError:
        return "memory", None
    except KbneError as error:
        return ("error" if isinstance(error, CheckpointError) else "input"), str(error)
    except BaseException as error:  # a panic of a Rust library is no Exception
        return "error", short(error)


def _limit(kind: int, value: int) -> None:
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _write(pipe: int, message: bytes) -> None:
    rest = memoryview(_LENGTH.pack(len(message)) + message)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def _read(pipe: int, until: float | None = None) -> bytes | None:
    """The next message; b"" where the other side has ended, None where it takes until then, or is too large."""
    head = _exactly(pipe, _LENGTH.size, until)
    if not head:
        return head
    (length,) = _LENGTH.unpack(head)
    return _exactly(pipe, length, until) if 0 < length <= _MOST else None


def _exactly(pipe: int, length: int, until: float | None) -> bytes | None:
    parts = bytearray()
    while len(parts) < length:
        if until is not None and not select.select([pipe], [], [], max(until - time.monotonic(), 0))[0]:
            return None
        part = os.read(pipe, min(length - len(parts), 1 << 20))
        if not part:
            return b""
        parts += part
    return bytes(parts)


def _close(owner: int, pid: int, pipes: tuple[int, ...], status: list[int]) -> None:
    """End the child, and keep its exit status."""
    if os.getpid() != owner:  # a fork of the owner has copies of the pipes, but no child of its own
        return
    for pipe in pipes:
        os.close(pipe)
    status.append(_end(pid))


def _end(pid: int) -> int:
    """Wait for a child whose pipes are closed, or end it; its exit status, below 0 for a signal."""
    for _ in range(20):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
