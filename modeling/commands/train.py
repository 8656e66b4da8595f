"""`python -m modeling train`: a recipe, trained to its end."""

from __future__ import annotations

from pathlib import Path

from feature_repo.home.catalogue import Catalogue
from feature_repo.settings import Settings
from modeling import recipes
from modeling.commands.next_item import train_next_item
from modeling.commands.options import refuse_data, use_threads
from modeling.recipes import NextItemRecipe
from modeling.training.changes import Changes, changed


def run_train(
    name: str,
    data: Path | None,
    changes: Changes,
    device: str,
    force: bool = False,
    threads: int = 1,
) -> None:
    """Train a recipe to its end; with `force` from the beginning, trained or not."""
    from modeling.layers.host import device_named
    from modeling.training.training_run import note_newest, open_run, train

    use_threads(threads)
    device_named(device)
    settings = Settings.from_env()
    recipe = changed(recipes.load(name), changes)
    if isinstance(recipe, NextItemRecipe):
        train_next_item(settings, recipe, data, changes, device, force)
        return
    refuse_data(recipe, data, settings)
    run = open_run(settings, recipe)
    train(run, run.encodings(), Catalogue(settings.catalogue_url), device, force=force)
    note_newest(run, changes)
