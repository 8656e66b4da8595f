"""What the commands share: threads, and options that go with some recipes alone."""

from __future__ import annotations

from pathlib import Path

from feature_repo.settings import Settings
from modeling.errors import RecipeError
from modeling.recipes import Recipe


def use_threads(number: int) -> None:
    """So many threads for torch and, by them, for scikit-learn. One by default: two that wait for each
    other beside other load are a tenth as fast as one, and results do not depend on the machine.
    """
    import torch

    torch.set_num_threads(number)


def refuse_data(recipe: Recipe, data: Path | None, settings: Settings) -> None:
    """Refuse `--data` for a ranking recipe.

    Raises:
        RecipeError: a file was given.
    """
    if data is not None:
        raise RecipeError(
            f"--data is for next-item recipes; {recipe.name} ranks from the tables of dataset {settings.dataset}"
        )
