"""`train` and `evaluate` of next-item recipes, of which nothing is exported."""

from __future__ import annotations

from pathlib import Path

from feature_repo.settings import Settings
from modeling import recipes
from modeling.console import print_table, say
from modeling.errors import NotTrainedError
from modeling.recipes import NextItemRecipe
from modeling.training.changes import Changes


def train_next_item(
    settings: Settings,
    recipe: NextItemRecipe,
    data: Path | None,
    changes: Changes,
    device: str,
    force: bool = False,
) -> None:
    """Train a next-item recipe, or say that it was, and show its test metrics."""
    from modeling.comparison.comparison import metric_lines
    from modeling.next_item.next_item import finished, named, open_source, train_and_evaluate

    source = open_source(settings, data)
    recipe = named(recipe, changes.epochs)
    result = None if force else finished(source, recipe)
    say(recipes.about(recipe))
    say(f"train {recipe.name}: {'up to date' if result else source.describe()}")
    result = result or train_and_evaluate(source, recipe, device, force=force)
    say(f"{recipe.name}, seed {result['seed']}, test targets of {source.title}")
    print_table(metric_lines(result))


def show_next_item(
    settings: Settings, recipe: NextItemRecipe, data: Path | None, changes: Changes
) -> None:
    """Test metrics of a finished next-item run, baselines beside it.

    Raises:
        NotTrainedError: it is not finished.
    """
    from modeling.comparison.comparison import baseline_lines, metric_lines
    from modeling.next_item.baselines import baseline_metrics
    from modeling.next_item.next_item import finished, named, open_source

    source = open_source(settings, data)
    recipe = named(recipe, changes.epochs)
    result = finished(source, recipe)
    if result is None:
        seed = recipe.training.seed
        raise NotTrainedError(
            f"{recipe.name} with seed {seed} is not trained to its end on {source.title}: train it first"
        )
    say(f"{recipe.name}, seed {result['seed']}, test targets of {source.title}")
    print_table(metric_lines(result))
    say("beside it, on the whole catalogue (FULL), without training")
    print_table(baseline_lines(baseline_metrics(source.sequences)))
