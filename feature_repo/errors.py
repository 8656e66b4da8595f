"""Errors that a person can mend. Commands print one as a line; anything else is a fault of ours and
shows its traceback.

ExpectedError                     exit code 1
├── UsageError                    exit code 2: options that do not exist, or values that they do not take
├── SettingsError                 an environment variable that is unknown, or holds what it may not
├── DeclarationError              a dataset module declares what cannot be
├── RawDataError                  raw data is missing, or not of the shape that its module expects
├── sequence_file.SequenceFileError
├── tables.TableNotBuiltError     a table was asked for that no finished run has written
├── tables.StaleTableError        a table was built under another contract, or by another run than the one named
├── tables.JobRunningError        another run holds the folder
├── expectations.GateError        too many rows are bad
├── store.StoreError              the registry or the online store is not what the settings name
├── offline_store.EntityFrameError
├── catalogue.NoLiveBundleError, catalogue.NotRecordedError
├── token_log.TokenLogError
└── online_tokens.CannotRemoveError

Decoders of stored bytes have errors of their own (`history.HistoryError`,
`envelope.EnvelopeError`): readers catch them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# What clients put around what Redis said, with the key in it, and what Beam puts behind it
AROUND = re.compile(
    r"^Command # \d+ .* of pipeline caused error: (\(['\"])?|['\"],\)$| \[while running '[^']*'\]$",
    re.DOTALL,
)
# What to do by the error's class
ADVICE = {
    "AuthenticationError": "look at user and password in MEMOIR_REDIS",
    "NoPermissionError": "the user in MEMOIR_REDIS needs more rights: docs/production.md lists the commands",
    "ReadOnlyError": "MEMOIR_REDIS names a replica: name the master, or its Sentinels (MEMOIR_REDIS_TYPE=redis_sentinel)",
    "MovedError": "this is a node of a cluster: MEMOIR_REDIS_TYPE=redis_cluster",
    "ClusterDownError": "a part of the cluster is away; run the command again once it is there",
    "OutOfMemoryError": "its memory is full: raise maxmemory, and run the command again",
    "ConnectionError": "it is away, or MEMOIR_REDIS names another place; run the command again once it is there",
    "TimeoutError": "it is away, or MEMOIR_REDIS names another place; run the command again once it is there",
}


class ExpectedError(Exception):
    """Base of all errors that a person can mend; the message says what was expected, what came, and
    what to do.
    """

    exit_code = 1


class UsageError(ExpectedError, ValueError):
    """A command was given an option that it does not have, or a value that the option does not
    take.
    """

    exit_code = 2


class SettingsError(ExpectedError, ValueError):
    """An environment variable is unknown, or holds what it may not."""


class DeclarationError(ExpectedError, ValueError):
    """A dataset module declares what cannot be; the message names each field, what it holds and
    what is possible.
    """


class RawDataError(ExpectedError, ValueError):
    """The raw data is missing or has another shape than its dataset module expects."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the name that was probably meant, as the end of a message; empty where none is
    near.

    >>> nearest("max_bad_fractoin", ["max_bad_fraction", "seed"])
    '; did you mean max_bad_fraction?'
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def said_by_redis(error: BaseException) -> str:
    """Return what Redis said, without the keys and values that clients put around it."""
    text = AROUND.sub("", str(error)).removesuffix(".")
    return f"{type(error).__name__}: {text}"


def advice_on(error: BaseException) -> str | None:
    """A line for people on a Redis that is away or refuses, where that is what an error comes from; None of any other
    error, which keeps its traceback.
    """
    found: BaseException | None = error
    while found is not None and not type(found).__module__.startswith("redis."):
        found = found.__cause__
    if found is None:
        return None
    names = [one.__name__ for one in type(found).__mro__]
    advice = next((ADVICE[name] for name in names if name in ADVICE), None)
    if advice is None:
        return None
    return f"the online store's Redis did not do it, {said_by_redis(found)}; {advice}"
