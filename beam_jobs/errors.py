"""Errors of this room that a person can mend; commands print one as a line.

feature_repo.errors.ExpectedError
├── OptionsError             options that do not go together, or name what is not there (exit code 2)
├── RunnerError              a runner cannot run here
├── OtherCodeError           a worker has other code than the machine that started the run
├── OtherPlaceError          a worker would read or write another place than is meant
├── NotEnoughItemsError      an evaluation request cannot get its fixed number of negatives
└── BreaksLiveError          the live bundle reads what would no longer be online

`LostRowsError` is not among them: rows that vanish are our fault, and its traceback is shown.
"""

from __future__ import annotations

from feature_repo.errors import ExpectedError, UsageError


class OptionsError(UsageError):
    """Options that do not go together, or name what is not there."""


class RunnerError(ExpectedError, RuntimeError):
    """A runner cannot run here."""


class OtherCodeError(ExpectedError, RuntimeError):
    """A worker has other code than the machine that started the run."""


class OtherPlaceError(ExpectedError, RuntimeError):
    """A worker would read or write another place than is meant."""


class NotEnoughItemsError(ExpectedError, ValueError):
    """An evaluation request cannot get its fixed number of negatives."""


class BreaksLiveError(ExpectedError, RuntimeError):
    """The live bundle reads what would no longer be online."""


class LostRowsError(RuntimeError):
    """Rows that went into a run did not come out of it."""


class ErasureError(ExpectedError, RuntimeError):
    """Something of a user is still there, or no such user can be erased."""
