"""A wrapper of the Hub's client: each failure becomes one line of advice, without secrets.

huggingface_hub alone handles tokens (`hf auth login`, HF_TOKEN): kbne-edit never reads, stores or passes one.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import InputError, of_the_machine, one_line

TIMEOUT = 30.0  # seconds without an answer; the client itself would wait forever


@contextmanager
def talking(name: str, error: type[InputError], revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """A context for calls of huggingface_hub about repository `name`: its errors become `error`, in one line."""
    from huggingface_hub.errors import HTTPError

    with _quiet():
        try:
            yield
        except (HTTPError, OSError, ValueError, RuntimeError) as failure:
            raised = error(_explain(failure, name, revision, writing))
            raise of_the_machine(raised) if _unreachable(failure) else raised from None


def passing(failure: BaseException) -> bool:
    """True if the Hub is unreachable, overloaded or failing, so that the request itself may be right."""
    response = _answer(failure)
    return response is None or response.response.status_code == 429 or response.response.status_code >= 500


def _unreachable(failure: BaseException) -> bool:
    """True if the network or the Hub fails, not the request."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    if _answer(failure) is not None:
        return passing(failure)
    kinds = (HTTPError, ConnectionError, TimeoutError, OfflineModeIsEnabled)
    return any(isinstance(error, kinds) for error in _chain(failure))


def _chain(failure: BaseException) -> list[BaseException]:
    """The failure and its causes: the client wraps the Hub's answer in errors of its own."""
    chain = [failure]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _answer(failure: BaseException) -> Any:
    """The HfHubHTTPError behind a failure; None if the Hub did not answer."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((e for e in _chain(failure) if isinstance(e, HfHubHTTPError)), None)


def _explain(failure: BaseException, name: str, revision: str | None, writing: bool) -> str:
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    chain = _chain(failure)
    if (answer := _answer(failure)) is not None:
        return _explain_answer(answer, name, revision, writing)
    instead = "run the same command again" if writing else "give a directory"
    if any(isinstance(e, HFValidationError) for e in chain):
        return f"{name!r} is neither a directory nor a Hub id of the form ORG/NAME[@REVISION]"
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return f"HF_HUB_OFFLINE is set, so the Hub cannot be reached for {name}: unset it, or {instead}"
    if any(isinstance(e, (HTTPError, ConnectionError, TimeoutError)) for e in chain):
        return f"{name}: the Hub cannot be reached at {hub_address()}: check the network, or {instead}"
    if isinstance(failure, OSError) and failure.errno:
        return f"{name}: {failure.strerror}{f' ({failure.filename})' if failure.filename else ''}"
    what = "push" if writing else "download"
    return f"{name}: the {what} failed ({_first_line(failure)}): run the same command again"


def _explain_answer(answer: Any, name: str, revision: str | None, writing: bool) -> str:
    """One line for a refusal. The client's own text is not shown: it can hold signed addresses."""
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page, status = f"{hub_address()}/{name}", answer.response.status_code
    if isinstance(answer, GatedRepoError):
        return f"{name} is gated: accept its terms on {page}, then log in with `hf auth login`"
    if isinstance(answer, RevisionNotFoundError):
        return f"{name} has no revision {revision}: {page}/commits/main lists its branches and commits"
    if isinstance(answer, DisabledRepoError):
        return f"{name} was disabled on the Hub: {page} says why"
    if isinstance(answer, RepositoryNotFoundError):
        if writing:
            return f"{name} is not a repository that you can see and write to: check the spelling and `hf auth whoami`"
        return (
            f"{name} is neither a local directory nor a model on the Hub that you can see: check the spelling; "
            "if it is private, log in with `hf auth login`"
        )
    if status == 401:
        return f"{name}: the Hub refuses your token: log in again with `hf auth login`, or correct HF_TOKEN"
    if status == 403 and writing:
        owner = name.partition("/")[0]
        return f"{name}: your token may not write here: use one with write access to {owner} ({_tokens_page()})"
    if status == 403:
        return f"{name}: your token may not read this model: use one with read access to it ({_tokens_page()})"
    if status == 429:
        wait = answer.response.headers.get("Retry-After", "")
        after = f"in {wait} seconds" if wait.isdigit() else "in a few minutes"
        return f"{name}: the Hub answers 429, too many requests: run the same command again {after}"
    if status >= 500:
        return f"{name}: the Hub answers {status}, a fault on its side: run the same command again later"
    return f"{name}: the Hub refuses the request ({status}: {answer.server_message or 'no reason given'})"


def _tokens_page() -> str:
    return f"{hub_address()}/settings/tokens"


def hub_address() -> str:
    """The Hub's address as messages show it: HF_ENDPOINT can hold a user's name and password."""
    from huggingface_hub import constants

    return without_password(constants.ENDPOINT)


def without_password(url: str) -> str:
    """An address without the user name and password before its host, on one line."""
    scheme, separator, rest = url.rpartition("://")
    host, slash, path = rest.partition("/")
    return one_line(scheme + separator + host.rpartition("@")[2] + slash + path)


def _first_line(failure: BaseException) -> str:
    return _unsigned((str(failure) or type(failure).__name__).splitlines()[0][:120])


def _unsigned(text: str) -> str:
    """Remove the query of addresses: that of a store or CDN is a signature, which works like a token for a while."""
    return re.sub(r"(https?://[^\s?]+)\?[^\s:]*", r"\1", text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars only on a terminal. The client's warnings (retries, waiting) stay, without signed addresses."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    def unsigned(record: logging.LogRecord) -> bool:
        record.msg, record.args = _unsigned(record.getMessage()), ()
        return True

    handlers, hide = logging.getLogger("huggingface_hub").handlers, not sys.stderr.isatty()
    hide = hide and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    for handler in handlers:
        handler.addFilter(unsigned)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(unsigned)
        if hide:
            enable_progress_bars()
