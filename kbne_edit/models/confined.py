"""Work on files from outside in a child process, within limits of time and memory.

A chat template may loop for ever, a tokenizer's normaliser may double its input forty times, and the libraries that
interpret them have no limits of their own. The child is a fork, so it costs milliseconds and takes along what is
loaded; its result comes back as JSON. It must not use torch: a fork does not take OpenMP's threads along.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError, KbneError, short
from .memory import kilobytes

SECONDS, BYTES = 10, 2 << 30
_MOST = 1 << 28  # bytes of a result
_WAIT = 30  # times the limit by the clock: it counts CPU time, of which a busy machine gives little


def confined(path: Path, work: Callable[..., Any], *args: Any, seconds: int = SECONDS, memory: int = BYTES) -> Any:
    """work(*args) in a child; its result must be JSON. path: whose files it reads, for messages.

    seconds: of CPU time; memory: bytes beyond those that this process has. Raises CheckpointError that names the limit
    or the child's error; InputError of the work itself passes through.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _child(write, work, args, seconds, memory)
    os.close(write)
    try:
        answer = _read(read, time.monotonic() + _WAIT * seconds)
    finally:
        os.close(read)
        status = _end(pid)
    whose = f"the tokenizer or chat template of {path}"
    if answer is None or status in (-signal.SIGXCPU, -signal.SIGKILL):
        raise CheckpointError(f"{whose} takes more than {seconds} s, the limit: use another model, or repair it")
    kind, value = json.loads(answer) if answer else ("memory" if status == -signal.SIGABRT else "crash", None)
    if kind == "crash":
        raise CheckpointError(f"{whose} ended its process (status {status}): use another model, or repair it")
    if kind == "memory":
        raise CheckpointError(
            f"{whose} takes more than {memory / (1 << 30):g} GB of memory, the limit: use another model, or repair it"
        )
    if kind == "error":
        raise CheckpointError(f"transformers cannot use {path}: {value}")
    if kind == "input":
        raise InputError(value)
    return value


def _child(write: int, work: Callable[..., Any], args: tuple, seconds: int, memory: int) -> None:
    """Never returns. Writes [kind, value] as JSON."""
    try:
        faulthandler.disable()
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        quiet = os.open(os.devnull, os.O_WRONLY)  # Rust prints what it panics of
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _limit(resource.RLIMIT_CPU, seconds)
        _limit(resource.RLIMIT_AS, int(min(kilobytes("/proc/self/status", "VmSize"), 1 << 62)) + memory)
        answer = json.dumps(_outcome(work, args))
        with os.fdopen(write, "w") as pipe:
            pipe.write(answer)
    except BaseException:
        os._exit(1)
    os._exit(0)


def _outcome(work: Callable[..., Any], args: tuple) -> tuple[str, Any]:
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


def _read(pipe: int, until: float) -> bytes | None:
    """What the child wrote, up to its end; None if it takes too long."""
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([pipe], [], [], max(until - time.monotonic(), 0))
        if not ready:
            return None
        part = os.read(pipe, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
        if sum(map(len, parts)) > _MOST:
            return None


def _end(pid: int) -> int:
    """Wait for the child, which has closed its pipe or is ended now; its exit status, below 0 for a signal."""
    for _ in range(20):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
