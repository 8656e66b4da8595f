"""`python -m modeling road`: the commands that lead to a recipe."""

from __future__ import annotations

from modeling.recipes import AnyRecipe, Recipe
from modeling.registry import makes_tokens


def road(recipe: AnyRecipe, runner: str) -> list[str]:
    """The commands, behind `python -m`, that lead from built tables to a recipe that can be served: a recipe that reads
    another's summary tokens comes behind that one, whose tokens are then kept as they were at each week's end.
    """
    commands = []
    if isinstance(recipe, Recipe) and recipe.tokens is not None:
        commands += _trained(recipe.tokens, "--not_live")
        commands.append(_tokens_of(recipe.tokens, runner, "--every_days", "7"))
    commands += _trained(recipe.name)
    if makes_tokens(recipe):
        commands.append(_tokens_of(recipe.name, runner))
    return commands


def _trained(name: str, *options: str) -> list[str]:
    return [
        f"modeling train {name}",
        f"modeling evaluate {name}",
        " ".join((f"modeling export {name}", *options)),
    ]


def _tokens_of(name: str, runner: str, *options: str) -> str:
    return " ".join((f"beam_jobs summary_tokens --bundle {name} --runner={runner}", *options))
