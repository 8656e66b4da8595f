"""Changes that a command line asks for: any field of a recipe, by name and type (`--set model.width=64`), which
is part of the run's identity; and a comparison.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from feature_repo.errors import nearest
from modeling.errors import RecipeError
from modeling.recipes import AnyRecipe, Recipe, SplitName

R = TypeVar("R", bound=AnyRecipe)
# Not fields to be set: a name, and what holds further fields
FIXED = (
    "name",
    "config",
    "training",
    "trees",
)


@dataclass(frozen=True)
class Changes:
    """Changes of a recipe by a command line.

    >>> changed(load("vista_tiny"), Changes(seed=3, assignments=("model.width=32",))).config["width"]
    32
    """

    seed: int | None = None
    epochs: int | None = None
    assignments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Arguments of `compare`; see its help."""

    recipes: tuple[str, ...]
    data: Path | None = None
    seeds: int = 1
    epochs: int | None = None
    learning_rates: tuple[float, ...] = ()
    device: str = "cpu"
    threads: int = 1
    scaling: bool = True
    split: SplitName = "leave_one_out"
    # Fields of every recipe, as `--set` has them
    assignments: tuple[str, ...] = ()


def changed(recipe: R, changes: Changes) -> R:
    """Return the recipe with these fields changed: its own (`history_length`), its model (`model.…`) or its
    training (`training.…`).

    Raises:
        RecipeError: no such field, or a value of the wrong type; the message lists what there is.
    """
    words = list(changes.assignments)
    words += [
        f"training.{name}={value}"
        for name in ("seed", "epochs")
        if (value := getattr(changes, name)) is not None
    ]
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise RecipeError(
                f"--set expects a field and a value, such as model.width=64, not {word!r}"
            )
        recipe = _set(recipe, name, text)
    return recipe


def _set(recipe: R, name: str, text: str) -> R:
    from modeling import models

    # 1. Find the dataclass that declares the field: the recipe, its model or its training.
    group, _, field = name.rpartition(".")
    owners = {
        "": type(recipe),
        "model": models.config_class(recipe.model),
        "training": type(recipe.training),
    }
    if isinstance(recipe, Recipe) and recipe.trees is not None:
        owners["trees"] = models.config_class("trees")
    if group not in owners:
        listed = ", ".join(f"{owner}.…" for owner in owners if owner)
        raise RecipeError(
            f"--set {name}: expected a field of the recipe, or one of {listed}, not {group!r}"
        )
    # 2. Refuse a field that the dataclass lacks or that must not be set.
    known = [f.name for f in fields(owners[group]) if group or f.name not in FIXED]
    if field not in known:
        prefix = f"{group}." if group else ""
        raise RecipeError(
            f"--set {name}: {recipe.name} has no such field{nearest(field, known)} There are {', '.join(prefix + k for k in known)}"
        )
    # 3. Replace the value; a model's config is a plain dict in the recipe.
    value = _value(name, text, get_type_hints(owners[group])[field])
    if group == "model":
        return replace(recipe, config={**recipe.config, field: value})
    if group == "trees":
        assert isinstance(recipe, Recipe)
        trees = {**(recipe.trees or {}), field: value}
        return cast(R, replace(recipe, trees=trees))
    if group == "training":
        training: Any = replace(recipe.training, **{field: value})
        return replace(recipe, training=training)
    return replace(recipe, **{field: value})


def _value(name: str, text: str, kind: Any) -> Any:
    """Text as a value of a field's type."""
    if get_origin(kind) in (Union, types.UnionType):
        if text == "None" and type(None) in get_args(kind):
            return None
        kinds: Sequence[Any] = [one for one in get_args(kind) if one is not type(None)]
    else:
        kinds = [kind]
    for one in kinds:
        try:
            return _as(text, one)
        except ValueError:
            continue
    shown = " or ".join(
        str(list(get_args(one))) if get_origin(one) is Literal else one.__name__ for one in kinds
    )
    raise RecipeError(f"--set {name}={text}: expected {shown}")


def _as(text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(text)
        return text
    if kind is bool:
        if text not in ("True", "False", "true", "false"):
            raise ValueError(text)
        return text in ("True", "true")
    if kind in (int, float, str):
        return kind(text)
    raise ValueError(text)
