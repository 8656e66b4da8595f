"""Errors of this room that a person can mend; commands print one as a line.

feature_repo.errors.ExpectedError
├── RecipeError            no such recipe, model or field, or a value that it does not take
├── DataError              the data holds nothing to learn, choose or measure from, or does not fit the recipe
├── NotTrainedError        a run was asked for that was not trained, or not evaluated, on the tables in force
├── DeviceError            a device that this machine or this build of torch does not have
├── RunError               another process holds the run's folder, its tables were rebuilt meanwhile, a checkpoint is damaged
├── ScoresError            scores that are no finite numbers, or a period without requests
├── dataset.JoinError      the point-in-time join lost, added or moved rows
├── dataset.StaleFeaturesError
├── bundle.BundleError     a bundle must not be served
└── trainer.LossError      the loss is no finite number
"""

from __future__ import annotations

from feature_repo.errors import ExpectedError


class RecipeError(ExpectedError, ValueError):
    """A recipe, model or field that does not exist, or a value that it does not take."""


class DataError(ExpectedError, ValueError):
    """Data from which nothing can be learned, chosen or measured, or that does not fit the
    recipe.
    """


class NotTrainedError(ExpectedError, FileNotFoundError):
    """A run that was not trained, or not evaluated, on the tables in force."""


class RunError(ExpectedError, RuntimeError):
    """A run that cannot go on: its folder is held, its tables were rebuilt, or what it left is
    damaged.
    """


class DeviceError(ExpectedError, ValueError):
    """A device that torch cannot use on this machine."""


class ScoresError(ExpectedError, ValueError):
    """Scores that no metric can be taken of."""
