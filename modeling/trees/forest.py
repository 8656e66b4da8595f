"""A forest, scored for all candidates of a request together.

LightGBM walks each candidate down each tree: a jump in memory at every node. Here 64 candidates share a
word of memory, a bit each, and go down all trees at once:

1. **conditions**: of each threshold, which candidates lie at or below it; of each set of categories,
   which candidates' are in it;
2. **nodes**, level by level: who meets the condition of a node goes to its left child (`node &
   condition`), the rest to its right one;
3. **leaves**: a tree's leaves are numbered from left to right in Gray's code, in which neighbours differ in one
   bit, so that the leaves whose number has a bit are a few whole subtrees: a candidate's bit p is set if it
   reaches the root of one. Values of leaves are then looked up and summed in LightGBM's order.

After QuickScorer (Lucchese et al., SIGIR 2015), which keeps a word of leaves for each candidate and tree;
words of candidates for each node cost less where candidates are many and trees shallow. The result is
LightGBM's own to the bit for float32 inputs (tests), at a fraction of its time
(`benchmarks/trees.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modeling.trees.text import ForestText, Node, Tree, read_forest

WORD = 64
# Candidates that are scored at a time: what is held of them stays in a core's cache
PIECE = 512
Words = np.ndarray  # int64, … × words of candidates


class Forest:
    """Trees of one task.

    Example:
        >>> forest = Forest(booster.model_to_string())
        >>> np.allclose(forest.scores(rows_NF), booster.predict(rows_NF, raw_score=True))
        True

    Args:
        text: of a LightGBM model.

    Raises:
        ForestError: it cannot be read.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        read = read_forest(text)
        self.names = read.names
        self.num_trees = len(read.trees)
        self._numbers = _Thresholds.of(read)
        self._categories = _Sets.of(read)
        self._levels = _levels_of(read.trees, self._numbers, self._categories)
        self._leaves = _Leaves.of(read.trees)

    def scores(self, rows_NF: np.ndarray) -> np.ndarray:
        """Sums of leaf values, float64, N.

        Args:
            rows_NF: float32, a column for each of `names`; NaN where a number is missing, whole
                numbers of categories.
        """
        if not self.num_trees:
            return np.zeros(len(rows_NF))
        pieces = [
            self._piece(rows_NF[start : start + PIECE]) for start in range(0, len(rows_NF), PIECE)
        ]
        return np.concatenate(pieces) if pieces else np.zeros(0)

    def _piece(self, rows_NF: np.ndarray) -> np.ndarray:
        candidates = _Candidates.of(len(rows_NF))
        # 1. Who meets each condition.
        met = np.concatenate(
            [self._numbers.met(rows_NF, candidates), self._categories.met(rows_NF, candidates)]
        )
        # 2. Who reaches each node, level by level, and each leaf.
        reached = np.tile(candidates.all, (self.num_trees, 1))
        nodes = [np.zeros((1, candidates.num_words), np.int64), reached]
        for level in self._levels:
            here = reached.take(level.nodes, axis=0)
            reached = np.empty((len(here), 2, candidates.num_words), np.int64)
            np.bitwise_and(here, met.take(level.conditions, axis=0), out=reached[:, 0])
            np.bitwise_xor(here, reached[:, 0], out=reached[:, 1])
            reached = reached.reshape(-1, candidates.num_words)
            nodes.append(reached)
        # 3. The values of leaves.
        return self._leaves.values(np.concatenate(nodes), len(rows_NF))


@dataclass(frozen=True)
class _Candidates:
    """Bits of so many candidates.

    Args:
        word: of each candidate.
        bit: of each candidate within its word.
        all: words with every candidate's bit.
    """

    word: np.ndarray
    bit: np.ndarray
    all: np.ndarray

    @staticmethod
    def of(number: int) -> _Candidates:
        place = np.arange(number)
        word = place // WORD
        bit = (np.uint64(1) << (place % WORD).astype(np.uint64)).view(np.int64)
        return _Candidates(word, bit, np.bitwise_or.reduceat(bit, np.arange(0, number, WORD)))

    @property
    def num_words(self) -> int:
        return len(self.all)

    def sorted_into(self, bins: np.ndarray, number: int) -> Words:
        """Which candidates are in each of so many bins, number × words.

        Args:
            bins: of each candidate, … × N.
        """
        found = torch.zeros(number * self.num_words, dtype=torch.int64)
        at = torch.from_numpy((bins * self.num_words + self.word).reshape(-1))
        bits = torch.from_numpy(np.broadcast_to(self.bit, bins.shape).reshape(-1))
        # A candidate is in one bin of a column, so that adding bits sets them.
        return found.scatter_add_(0, at, bits).numpy().reshape(number, self.num_words)

    def where(self, flags: np.ndarray) -> Words:
        """Words of booleans, … × N."""
        padded = np.zeros((len(flags), self.num_words * WORD), bool)
        padded[:, : flags.shape[1]] = flags
        return np.packbits(padded, axis=1, bitorder="little").view(np.int64)


@dataclass(frozen=True)
class _Thresholds:
    """Conditions on numbers: at or below a threshold, and what becomes of missing ones.

    A column's bins lie between its thresholds; one more holds what is above all of them, or missing.

    Args:
        columns: that any condition reads.
        missing: whether a missing number of the column has a direction; else it is 0.
        bounds: each column's thresholds in order, padded with infinity.
        first: number of each column's first bin.
        bin: of each condition, the last one that meets it.
        directed: of each condition, 1 + the place of its column if missing numbers meet it, else 0.
        numbered: of each (column, threshold, missing_left), the number of its condition.
    """

    columns: np.ndarray
    missing: np.ndarray
    bounds: torch.Tensor
    first: np.ndarray
    bin: np.ndarray
    directed: np.ndarray
    numbered: dict[tuple[int, float, bool | None], int]

    @staticmethod
    def of(read: ForestText) -> _Thresholds:
        nodes = [n for tree in read.trees for n in tree.nodes if n.threshold is not None]
        keys = sorted(
            {_numerical(n) for n in nodes}, key=lambda key: (key[0], key[1], bool(key[2]))
        )
        columns = sorted({column for column, _, _ in keys})
        place = {column: at for at, column in enumerate(columns)}
        bounds = [np.unique([t for c, t, _ in keys if c == column]) for column in columns]
        first = np.cumsum([0, *(len(own) + 1 for own in bounds)])
        widest = max(map(len, bounds), default=0)
        padded = [np.pad(own, (0, widest - len(own)), constant_values=np.inf) for own in bounds]
        directions = {column: left is not None for column, _, left in keys}
        return _Thresholds(
            np.array(columns, np.int64),
            np.array([directions[column] for column in columns], bool),
            torch.from_numpy(np.array(padded, np.float32).reshape(len(columns), widest)),
            first,
            np.array(
                [first[place[c]] + np.searchsorted(bounds[place[c]], t) for c, t, _ in keys],
                np.int64,
            ),
            np.array([1 + place[c] if left else 0 for c, _, left in keys], np.int64),
            {key: number for number, key in enumerate(keys)},
        )

    def met(self, rows_NF: np.ndarray, candidates: _Candidates) -> Words:
        """Who meets each condition, conditions × words."""
        if not len(self.columns):
            return np.zeros((0, candidates.num_words), np.int64)
        values = np.ascontiguousarray(rows_NF.T.take(self.columns, axis=0), np.float32)
        gone = np.isnan(values)
        values[gone & ~self.missing[:, None]] = 0
        gone &= self.missing[:, None]
        # A number's bin is the first threshold that it is not above.
        bins = torch.searchsorted(self.bounds, torch.from_numpy(values)).numpy()
        bins += self.first[:-1, None]
        # Missing numbers stand in a bin of nothing, behind all.
        last = int(self.first[-1])
        bins[gone] = last
        inside = candidates.sorted_into(bins, last + 1)
        missing = np.zeros((len(self.columns) + 1, candidates.num_words), np.int64)
        missing[1:] = candidates.where(gone)
        # Who is at or below a threshold is in a bin up to it: a running sum over bins, from which each
        # column takes off what the column before it has added up to.
        inside[self.first[1:-1]] -= candidates.all & ~missing[1:-1]
        below = np.cumsum(inside[:last], axis=0)
        return below.take(self.bin, axis=0) | missing.take(self.directed, axis=0)


@dataclass(frozen=True)
class _Sets:
    """Conditions on categories: in a set.

    Args:
        columns: that any condition reads.
        first: number of each column's first bin; a bin for each of its categories up to the largest in any set,
            and one for all others, which is in none.
        members: bins of each set, one set behind the other; an empty set has a bin of nothing.
        start: where each set begins.
        numbered: of each (column, categories), the number of its condition.
    """

    columns: np.ndarray
    first: np.ndarray
    members: np.ndarray
    start: np.ndarray
    numbered: dict[tuple[int, tuple[int, ...]], int]

    @staticmethod
    def of(read: ForestText) -> _Sets:
        nodes = [n for tree in read.trees for n in tree.nodes if n.categories is not None]
        keys = sorted({_categorical(node) for node in nodes})
        columns = sorted({column for column, _ in keys})
        largest = [max(max(own, default=0) for c, own in keys if c == column) for column in columns]
        first = np.cumsum([0, *(most + 2 for most in largest)])
        place = {column: at for at, column in enumerate(columns)}
        nothing = int(first[-1])
        sets = [[int(first[place[c]]) + v for v in own] or [nothing] for c, own in keys]
        return _Sets(
            np.array(columns, np.int64),
            first,
            np.array([member for one in sets for member in one], np.int64),
            np.cumsum([0, *map(len, sets)])[:-1],
            {key: number for number, key in enumerate(keys)},
        )

    def met(self, rows_NF: np.ndarray, candidates: _Candidates) -> Words:
        """Who meets each condition, conditions × words."""
        if not len(self.columns):
            return np.zeros((0, candidates.num_words), np.int64)
        values = rows_NF.T.take(self.columns, axis=0)
        others = (np.diff(self.first) - 1)[:, None]
        # Missing, negative or unheard of: in no set
        known = (values >= 0) & (values < others)
        bins = np.where(known, values, others).astype(np.int64) + self.first[:-1, None]
        inside = candidates.sorted_into(bins, int(self.first[-1]) + 1)
        inside[self.first[1:] - 1] = 0
        return np.bitwise_or.reduceat(inside.take(self.members, axis=0), self.start, axis=0)


@dataclass(frozen=True)
class _Level:
    """Nodes of one depth, of all trees.

    Args:
        nodes: which of the level's rows are inner nodes; their children are the next level's rows, left and right in
            turn.
        conditions: of the inner nodes.
    """

    nodes: np.ndarray
    conditions: np.ndarray


def _levels_of(trees: Sequence[Tree], numbers: _Thresholds, categories: _Sets) -> list[_Level]:
    """Levels from the roots down, in the order of `_walk`, but for the last, which has leaves alone."""
    levels = []
    for rows in _walk(trees)[:-1]:
        inner = [row for row, (_, number) in enumerate(rows) if number >= 0]
        nodes = [trees[tree].nodes[number] for tree, number in rows if number >= 0]
        conditions = [
            numbers.numbered[_numerical(node)]
            if node.categories is None
            else len(numbers.numbered) + categories.numbered[_categorical(node)]
            for node in nodes
        ]
        levels.append(_Level(np.array(inner, np.int64), np.array(conditions, np.int64)))
    return levels


def _walk(trees: Sequence[Tree]) -> list[list[tuple[int, int]]]:
    """Return the tree and the number of each node, level by level; of a leaf, `~number`."""
    rows = [(tree, 0 if one.nodes else -1) for tree, one in enumerate(trees)]
    levels = []
    while rows:
        levels.append(rows)
        inner = [(tree, trees[tree].nodes[number]) for tree, number in rows if number >= 0]
        rows = [(tree, child) for tree, node in inner for child in (node.left, node.right)]
    return levels


@dataclass(frozen=True)
class _Leaves:
    """Leaves by their numbers.

    Args:
        value: trees × numbers.
        members: rows of the subtrees whose leaves' numbers have a bit, bit by bit and tree by tree; row 0 has no candidate.
        start: where each bit of each tree begins.
        bits: of a number.
    """

    value: np.ndarray
    members: np.ndarray
    start: np.ndarray
    bits: int

    @staticmethod
    def of(trees: Sequence[Tree]) -> _Leaves:
        most = max((len(tree.values) for tree in trees), default=1)
        bits = max((most - 1).bit_length(), 1)
        value = np.zeros((len(trees), 1 << bits))
        # 1. The row of each node and leaf among all that are reached, from 1 on.
        met = [pair for level in _walk(trees) for pair in level]
        row = {pair: 1 + number for number, pair in enumerate(met)}
        # 2. Leaves from left to right, and the subtrees that have each bit.
        sets: list[list[list[int]]] = [[] for _ in range(bits)]
        for number, tree in enumerate(trees):
            span = _spans(tree)
            for node, (first, _) in span.items():
                if node < 0:
                    value[number, first ^ first >> 1] = tree.values[~node]
            for bit in range(bits):
                whole = _whole_subtrees(tree, span, bit)
                sets[bit].append([row[number, node] for node in whole] or [0])
        flat = [one for of_bit in sets for one in of_bit]
        members = np.array([member for one in flat for member in one], np.int64)
        return _Leaves(value, members, np.cumsum([0, *map(len, flat)])[:-1], bits)

    def values(self, reached: Words, number: int) -> np.ndarray:
        """Sums over trees, float64, N.

        Args:
            reached: who reaches each node and leaf, in the order of `_walk`; row 0 has no candidate.
        """
        trees, numbers = self.value.shape
        planes = np.bitwise_or.reduceat(reached.take(self.members, axis=0), self.start, axis=0)
        bits = np.unpackbits(planes.view(np.uint8), axis=1, bitorder="little", count=None)
        bits = bits.reshape(self.bits, trees, -1)
        # A leaf's number from its highest bit down, by doubling: numpy shifts small integers one at a time.
        leaf = bits[-1].astype(np.uint8 if self.bits <= 8 else np.int32)
        for lower in bits[-2::-1]:
            leaf += leaf
            leaf |= lower
        place = leaf.astype(np.intp)
        place += numbers * np.arange(trees)[:, None]
        # Tree by tree, as LightGBM adds
        total: np.ndarray = self.value.reshape(-1).take(place).sum(0)[:number]
        return total


def _spans(tree: Tree) -> dict[int, tuple[int, int]]:
    """The first leaf of each node's subtree and the one behind its last, counted from left to right; of a leaf,
    `~number`, itself.
    """
    found: dict[int, tuple[int, int]] = {}
    passed = 0
    # Nodes that wait: each is met again, closed, behind its children.
    waiting = [(0 if tree.nodes else -1, False)]
    while waiting:
        node, closed = waiting.pop()
        if node < 0:
            found[node] = (passed, passed + 1)
            passed += 1
        elif closed:
            one = tree.nodes[node]
            found[node] = (found[one.left][0], found[one.right][1])
        else:
            one = tree.nodes[node]
            waiting += [(node, True), (one.right, False), (one.left, False)]
    return found


def _whole_subtrees(tree: Tree, span: dict[int, tuple[int, int]], bit: int) -> list[int]:
    """The fewest nodes below which lie exactly the leaves whose number in Gray's code has a bit."""
    found = []
    waiting = [0 if tree.nodes else -1]
    while waiting:
        node = waiting.pop()
        leaves = range(*span[node])
        having = sum((leaf ^ leaf >> 1) >> bit & 1 for leaf in leaves)
        if having == len(leaves):
            found.append(node)
        elif having:
            waiting += [tree.nodes[node].left, tree.nodes[node].right]
    return found


def _numerical(node: Node) -> tuple[int, float, bool | None]:
    """Return what makes two numerical conditions the same. The threshold is the largest float32 at or below
    it: a float32 number is at or below one if it is at or below the other.
    """
    assert node.threshold is not None
    rounded = np.float32(node.threshold)
    # As numbers of 64 bits: numpy would compare in 32
    if float(rounded) > node.threshold:
        rounded = np.nextafter(rounded, np.float32(-np.inf))
    return node.feature, float(rounded), node.missing_left


def _categorical(node: Node) -> tuple[int, tuple[int, ...]]:
    assert node.categories is not None
    return node.feature, node.categories
