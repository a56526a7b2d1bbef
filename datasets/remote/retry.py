"""Trying again: which failures of a remote read may pass by themselves, and how long they are waited out."""

from __future__ import annotations

import errno
import itertools
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from mmctx.errors import DataError

PATIENCE = 60.0
"""Seconds from the first attempt after which no new one begins; a server that restarts is back by then."""

_FIRST_DELAY, _LONGEST_DELAY = 0.25, 8.0
_AGAIN = {408, 425, 429}  # HTTP statuses below 500 that say so themselves
_UNREACHED = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EPIPE}
# By name, since only the package of the protocol at hand is installed: aiohttp, botocore, google-auth.
_TRANSIENT = {
    "ClientConnectionError",
    "ClientPayloadError",
    "HTTPClientError",
    "ConnectionError",
    "TimeoutError",
    "ResponseStreamingError",
    "IncompleteReadError",
    "TransportError",
}
_PERMANENT = {"ClientSSLError", "ClientConnectorCertificateError", "SSLError"}

# Processes that fail together must not come back together. No sample depends on it, so it takes no seed.
_jitter = random.SystemRandom()
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class ShortRead(Exception):
    """The server ended an answer before the bytes that were asked for."""


def persist(call: Callable[[], _T], what: str) -> _T:
    """`call`, again and again while it fails in ways that may pass, with delays that double.

    Args:
        what: names the url and the range in errors and warnings.

    Raises:
        DataError: it failed for good, or `PATIENCE` ran out. One that `call` raises itself is passed on at once.
    """
    began = time.monotonic()
    for attempt in itertools.count(1):
        try:
            return call()
        except DataError:
            raise
        except Exception as error:
            spent = time.monotonic() - began
            delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1.5)
            if not is_transient(error) or spent + delay > PATIENCE:
                tried = f"{attempt} attempt{'s' * (attempt > 1)} in {spent:.1f} s, last: {describe(error)}"
                raise DataError(f"{what}: {tried}; {_remedy(error)}") from error
            _log.warning("%s: attempt %d: %s; trying again in %.1f s", what, attempt, describe(error), delay)
            time.sleep(delay)
    raise AssertionError("unreachable")


def is_transient(error: BaseException) -> bool:
    """Whether a failure may pass by itself: no connection, no answer in time, a busy or failing server."""
    status = http_status(error)
    if status is not None:
        return status >= 500 or status in _AGAIN
    return any(map(_may_pass, _causes(error)))


def is_absent(error: BaseException) -> bool:
    """Whether a failure says that there is no such file, or none for us: S3 answers 403 where listing is forbidden."""
    status = http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _AGAIN
    absent = any(isinstance(cause, FileNotFoundError | PermissionError) for cause in _causes(error))
    return absent and not is_transient(error)


def http_status(error: BaseException) -> int | None:
    """The status that a server answered with, if it answered."""
    for cause in _causes(error):
        if _may_pass(
            cause
        ):  # a broken answer: what lies below, such as the parser's own 400, did not come from the server
            return None
        for status in (getattr(cause, "status", None), _botocore_status(cause)):
            if isinstance(status, int):
                return status
        if type(cause).__name__ == "HttpError":  # gcsfs
            return int(getattr(cause, "code", None) or 500)
    return None


def _botocore_status(error: BaseException) -> Any:
    response = getattr(error, "response", None)
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None


def describe(error: BaseException) -> str:
    """The root of a failure in one line: fsspec turns every failure to ask for a size into FileNotFoundError."""
    *_, root = _causes(error)
    return " ".join(f"{type(root).__name__}: {root}".split())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _may_pass(error: BaseException) -> bool:
    names = {base.__name__ for base in type(error).__mro__}
    if names & _PERMANENT:
        return False
    if isinstance(error, ShortRead) or names & _TRANSIENT:
        return True
    return isinstance(error, OSError) and error.errno in _UNREACHED


def _remedy(error: BaseException) -> str:
    status, causes = http_status(error), list(_causes(error))
    if status in {401, 403} or any(isinstance(cause, PermissionError) for cause in causes):
        return "check the credentials and what they may read"
    if any("Credentials" in type(cause).__name__ for cause in causes):
        return "give credentials in the way of the protocol's own tools, such as AWS_ACCESS_KEY_ID"
    if is_transient(error):
        return "check the network and the server, then start again: a run goes on where it was saved"
    if status == 404 or any(isinstance(cause, FileNotFoundError) for cause in causes):
        return "there is no such file: check the url"
    return "check the url and the server"
