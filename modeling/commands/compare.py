"""`python -m modeling compare`: recipes × seeds side by side."""

from __future__ import annotations

from feature_repo.settings import Settings
from modeling import recipes
from modeling.errors import RecipeError
from modeling.recipes import Recipe
from modeling.training.changes import Comparison


def run_compare(asked: Comparison) -> None:
    """Recipes × seeds side by side.

    Raises:
        DeviceError: there is no such device.
        RecipeError: recipes of two kinds, or options of the other kind.
    """
    from modeling.layers.host import device_named

    device_named(asked.device)
    settings = Settings.from_env()
    if {type(recipes.load(name)) for name in asked.recipes} == {Recipe}:
        if asked.data is not None:
            raise RecipeError(
                f"--data is for next-item recipes; ranking reads the tables of dataset {settings.dataset}"
            )
        if asked.split != "leave_one_out":
            raise RecipeError("--split is for next-item recipes; ranking is split by time as it is")
        from modeling.comparison.ranking import compare
    else:
        from modeling.comparison.comparison import compare
    compare(settings, asked)
