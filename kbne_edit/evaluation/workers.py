"""Several processes at one evaluation: the first one runs it, and all score their share of each batch of texts.

Only the first process (rank 0) resolves, decides, prints and writes. The others load the models that it loads, answer
its requests, and end when it ends. Each text is scored by one process, with the same passes as by a single process, so
the figures are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

from ..distributed import Processes, process_group

T = TypeVar("T")
P = ParamSpec("P")
_ALONE = Processes(0, 1)
_processes = _ALONE  # those that share the work while `shared` is entered


class Request(Protocol):
    """What a process is asked to do. scorer: of the model that was loaded last."""

    def answer(self, scorer: Any) -> Any: ...


class LoadRequest(Protocol):
    """A model to load."""

    def load(self) -> Any: ...


@contextmanager
def shared() -> Iterator[bool]:
    """True on the process that runs the evaluation; on the others False, after they have served it to its end."""
    global _processes
    with process_group() as processes:
        _processes = processes
        try:
            if processes.rank:
                _serve(processes)
                yield False
                return
            try:
                yield True
            finally:
                processes.broadcast(None)
        finally:
            _processes = _ALONE


def by_all(function: Callable[P, T]) -> Callable[P, T | None]:
    """The function, run by the first of several processes; on the others, which help it, it returns None."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T | None:
        with shared() as first:
            return function(*args, **kwargs) if first else None

    return run


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of what all of them work through."""
    return items[_processes.rank :: _processes.size]


def answers(request: Request, here: Callable[[], T]) -> list[T]:
    """What each process makes of a request. here: the first process's own part. Raises what any of them raised."""
    if _processes.size == 1:
        return [here()]
    _processes.broadcast(request)
    results = _processes.gather(here()) or []
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def announce(request: LoadRequest) -> None:
    """Let the other processes load a model, too."""
    if _processes.size > 1 and _processes.rank == 0:
        _processes.broadcast(request)


def _serve(processes: Processes) -> None:
    scorer: Any = None
    request: Any
    while (request := processes.broadcast(None)) is not None:
        if hasattr(request, "load"):
            scorer = None  # one model is in memory at a time
            scorer = request.load()
            continue
        try:
            result = request.answer(scorer)  # type: ignore[attr-defined]
        except Exception as error:  # the first process raises it
            result = error
        processes.gather(result)
