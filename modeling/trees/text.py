"""Trees as LightGBM writes them in its text format.

Read: numerical splits with or without a direction for missing numbers, categorical splits. Refused: what no
forest of ours holds, such as linear leaves, several trees an iteration, or zero as missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from feature_repo.errors import ExpectedError

# Bits of LightGBM's `decision_type`
CATEGORICAL = 1
DEFAULT_LEFT = 2
NAN_IS_MISSING = 2
ZERO_IS_MISSING = 1


class ForestError(ExpectedError, ValueError):
    """A text that holds no forest that can be scored here."""


@dataclass(frozen=True)
class Node:
    """An inner node: a row that meets its condition goes left.

    Args:
        threshold: a number at or below it goes left; None of a categorical node.
        missing_left: whether a missing number goes left; None: it counts as 0.
        categories: which go left; None of a numerical node.
        left, right: numbers of inner nodes, or `~leaf`.
    """

    feature: int
    threshold: float | None
    missing_left: bool | None
    categories: tuple[int, ...] | None
    left: int
    right: int


@dataclass(frozen=True)
class Tree:
    """Inner nodes, the root first, and the values of leaves; without a node, one leaf."""

    nodes: tuple[Node, ...]
    values: np.ndarray


@dataclass(frozen=True)
class ForestText:
    """What a text says: names of columns, and trees in the order in which they are summed."""

    names: tuple[str, ...]
    trees: tuple[Tree, ...]


def read_forest(text: str) -> ForestText:
    """Read a model's text.

    Raises:
        ForestError: it is no LightGBM model, is cut off, or holds trees that are not read here.
    """
    head, *blocks = text.split("\nTree=")
    about = _entries(head)
    if "end of trees" not in text or "feature_names" not in about:
        raise ForestError("this is no whole LightGBM model: it has no `end of trees`")
    if about.get("num_tree_per_iteration") != "1" or "average_output" in head:
        raise ForestError("a forest here is one tree an iteration, summed and not averaged")
    try:
        trees = tuple(_tree(_entries(block.split("\n\n")[0])) for block in blocks)
    except (KeyError, ValueError, IndexError) as error:
        raise ForestError(f"a tree of this LightGBM model cannot be read: {error!r}") from error
    return ForestText(tuple(about["feature_names"].split()), trees)


def _entries(block: str) -> dict[str, str]:
    lines = (line.partition("=") for line in block.splitlines())
    return {name: value for name, equals, value in lines if equals}


def _tree(entries: dict[str, str]) -> Tree:
    """A tree of its entries.

    Raises:
        ForestError: its leaves are linear, or zero is missing to it.
    """
    if entries.get("is_linear", "0") != "0":
        raise ForestError("linear leaves are not scored here: train with linear_tree=False")
    values = np.array(entries["leaf_value"].split(), np.float64)
    if int(entries["num_leaves"]) == 1:
        return Tree((), values)
    bounds = [int(word) for word in entries.get("cat_boundaries", "").split()]
    words = [int(word) for word in entries.get("cat_threshold", "").split()]
    columns = [
        entries[name].split()
        for name in ("split_feature", "threshold", "decision_type", "left_child", "right_child")
    ]
    nodes = []
    for feature, threshold, decided, left, right in zip(*columns, strict=True):
        kind = int(decided)
        children = (int(left), int(right))
        if kind & CATEGORICAL:
            number = int(float(threshold))
            chosen = _members(words[bounds[number] : bounds[number + 1]])
            nodes.append(Node(int(feature), None, None, chosen, *children))
            continue
        missing = kind >> 2 & 3
        if missing == ZERO_IS_MISSING:
            raise ForestError("zero is missing to these trees: train with zero_as_missing=False")
        side = bool(kind & DEFAULT_LEFT) if missing == NAN_IS_MISSING else None
        nodes.append(Node(int(feature), float(threshold), side, None, *children))
    return Tree(tuple(nodes), values)


def _members(words: list[int]) -> tuple[int, ...]:
    """The categories whose bits are set, 32 to a word."""
    bits = np.unpackbits(np.array(words, "<u4").view(np.uint8), bitorder="little")
    return tuple(np.flatnonzero(bits).tolist())
