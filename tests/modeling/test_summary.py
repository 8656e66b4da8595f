"""Summaries outside a request: any split of a history gives the same tokens; batches, chunks and
padding change nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch

from feature_repo import datasets
from feature_repo.history.envelope import from_bytes
from feature_repo.history.history import Histories
from modeling import models
from modeling.bundle.summary import envelopes, stored_summary
from modeling.inputs.columns import Vocabulary, nothing_known
from modeling.inputs.encoder import Encoder
from modeling.models.vista import VISTA
from modeling.summaries import summariser as summaries
from modeling.summaries.summariser import Summariser, Summary
from modeling.summaries.token_identity import token_fingerprint
from tests.elsewhere import ELSEWHERE, elsewhere

CONTRACT = datasets.load_contract("online_retail")
ITEMS = 30
STREAM: dict[str, Any] = {
    "width": 16,
    "num_heads": 2,
    "num_seeds": 4,
    "summary_layers": 2,
    "ranking_layers": 1,
    "causal": True,
    "seed_role": "target",
    "block": 8,
}
CODES = np.arange(1, ITEMS + 1)


def summariser(seed: int = 1, history_length: int = 64, **config: Any) -> Summariser:
    return Summariser(*ranker(seed, history_length, **config))


def ranker(seed: int = 1, history_length: int = 64, **config: Any) -> tuple[VISTA, Encoder]:
    items = Vocabulary(pa.array([str(item) for item in range(ITEMS)]))
    vocabularies = nothing_known(CONTRACT) | {"item_id": items}
    encoder = Encoder(CONTRACT, vocabularies, history_length)
    torch.manual_seed(seed)
    model = models.build("vista", {**STREAM, **config}, encoder.sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return cast(VISTA, model.eval()), encoder


def drawn(lengths: list[int] | np.ndarray, seed: int = 0) -> Histories:
    rng, total = np.random.default_rng(seed), int(np.sum(lengths))
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    times = np.concatenate([np.sort(rng.integers(10**12, 10**15, number)) for number in lengths])
    columns = {"action": rng.integers(0, 2, total).astype(np.int8), "event_timestamp": times}
    columns |= {c.name: rng.random(total).astype(np.float32) for c in CONTRACT.spec.event_features}
    return Histories(offsets, rng.integers(0, ITEMS, total), columns)


def test_ten_thousand_random_splits_give_the_tokens_of_the_whole() -> None:
    """Stored state, then the rest of the events, at every place where a history can be cut; in
    blocks and across them.
    """
    one, rng, checked = summariser(), np.random.default_rng(3), 0
    while checked < 10_000:
        lengths = rng.integers(0, 60, 1000)
        found = drawn(lengths, checked)
        cut = rng.integers(0, lengths + 1)
        times = np.zeros(len(lengths), np.int64)
        whole = one.whole(found, CODES, times)
        first = one.whole(found.take(found.offsets[:-1], found.offsets[:-1] + cut), CODES, times)
        rest = one.extended(first, found.take(found.offsets[:-1] + cut, found.offsets[1:]), CODES)
        np.testing.assert_allclose(rest.tokens_BSD, whole.tokens_BSD, atol=1e-5, rtol=1e-4)
        assert rest.streams_BRK is not None
        assert whole.streams_BRK is not None
        np.testing.assert_allclose(rest.streams_BRK, whole.streams_BRK, atol=1e-4, rtol=1e-4)
        np.testing.assert_array_equal(rest.num_events, lengths)
        np.testing.assert_array_equal(rest.as_of, whole.as_of)
        checked += len(lengths)


@pytest.mark.parametrize(
    "config",
    [{}, {"causal": False, "seed_role": "source"}, {"causal": False, "attention": "softmax"}],
)
def test_who_else_is_summarised_changes_nothing(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, lengths = summariser(**config), [0, 3, 40, 1, 64, 17, 9]
    found, times = drawn(lengths), np.full(7, 10**15)
    together = one.whole(found, CODES, times)
    monkeypatch.setattr(
        summaries, "PADDED_EVENTS", 24
    )  # small batches, and chunks for the longer ones
    if config.get("attention") != "softmax":
        np.testing.assert_allclose(
            one.whole(found, CODES, times).tokens_BSD, together.tokens_BSD, atol=1e-5, rtol=1e-4
        )
    monkeypatch.undo()
    for row in range(len(lengths)):
        alone = one.whole(
            found.take(found.offsets[[row]], found.offsets[[row + 1]]), CODES, times[:1]
        )
        np.testing.assert_allclose(
            alone.tokens_BSD[0], together.tokens_BSD[row], atol=1e-5, rtol=1e-4
        )


def test_a_bidirectional_stage_reads_the_newest_events_it_was_trained_for() -> None:
    one, found = summariser(history_length=10, causal=False), drawn([40])
    whole = one.whole(found, CODES, np.array([10**15]))
    newest = one.whole(found.newest(10), CODES, np.array([10**15]))
    np.testing.assert_allclose(whole.tokens_BSD, newest.tokens_BSD, atol=1e-6)
    assert (whole.num_events, newest.num_events) == (40, 10)


def test_stored_bytes_go_on_as_if_they_had_never_been_stored() -> None:
    one, found = summariser(), drawn([30])
    first = one.whole(found.take(np.array([0]), np.array([21])), CODES, np.array([0]))
    tokens, state = envelopes(first, 0, "u", one.fingerprint, 7, "int8", 3)
    assert state is not None
    restored = stored_summary(from_bytes(tokens, "u"), from_bytes(state, "u"))
    rest = found.take(np.array([21]), np.array([30]))
    after, straight = (one.extended(s, rest, CODES) for s in (restored, first))
    np.testing.assert_array_equal(
        after.tokens_BSD, straight.tokens_BSD
    )  # streams are stored in full precision


def test_the_fingerprint_knows_all_that_tokens_depend_on_and_nothing_else() -> None:
    model, encoder = ranker()
    one = Summariser(model, encoder)
    assert token_fingerprint(model, encoder) == one.fingerprint == summariser().fingerprint
    for other in (
        summariser(seed=2),
        summariser(block=4),
        summariser(divide=False),
        summariser(causal=False),
    ):
        assert other.fingerprint != one.fingerprint
    assert summariser(history_length=32).fingerprint == one.fingerprint  # a stream reads everything
    assert (
        summariser(causal=False, history_length=32).fingerprint
        != summariser(causal=False).fingerprint
    )
    with torch.no_grad():
        for parameter in (*model.stage_2.parameters(), *model.heads.parameters()):
            parameter += 1
    assert token_fingerprint(model, encoder) == one.fingerprint
    # The item embeddings of candidates are those of events.
    weights = (model.features.item.weight, *one.stage_1.parameters())
    for parameter in filter(torch.numel, weights):
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter += 1e-3
        assert token_fingerprint(model, encoder) != one.fingerprint
        with torch.no_grad():
            parameter.copy_(before)
    assert token_fingerprint(model, encoder) == one.fingerprint


def test_what_cannot_be_summarised_is_refused() -> None:
    encoder = summariser().encoder
    dlrm = models.build("amortised_dlrm", {"width": 16}, encoder.sizes)
    assert token_fingerprint(dlrm, encoder) is None
    with pytest.raises(ValueError, match="makes no summary tokens"):
        Summariser(dlrm, encoder)
    both = summariser(causal=False)
    with pytest.raises(ValueError, match="only a streaming stage 1"):
        both.extended(both.whole(drawn([3]), CODES, np.array([0])), drawn([1]), CODES)
    one = summariser()
    wrong = Summary(
        np.zeros((1, 4, 16)), np.zeros((1, 3, 3), np.float32), np.array([1]), np.array([1])
    )
    with pytest.raises(ValueError, match="stored streams have shape"):
        one.extended(wrong, drawn([1]), CODES)


def test_stage_2_alone_wants_tokens_of_its_shape() -> None:
    sizes = replace(summariser().encoder.sizes, tokens=(4, 16))
    with pytest.raises(ValueError, match="does not go with stored tokens"):
        models.build("vista", STREAM, sizes)
    with pytest.raises(ValueError, match="has no stage 1"):
        models.build("vista", {**STREAM, "stored": True}, sizes)


def test_tokens_made_on_another_device_are_the_same() -> None:
    """Whole ones, and those of a stored state with more events."""
    made = []
    found, none = drawn([9, 30, 70]), np.zeros(3, np.int64)
    cut = np.array([4, 30, 41])
    starts, ends = found.offsets[:-1], found.offsets[1:]
    with elsewhere():
        for device in ("cpu", ELSEWHERE):
            model, encoder = ranker()
            one = Summariser(model.to(device), encoder)
            before = one.whole(found.take(starts, starts + cut), CODES, none)
            after = one.extended(before, found.take(starts + cut, ends), CODES)
            made.append((one.whole(found, CODES, none).tokens_BSD, after.tokens_BSD))
    for here, there in zip(*made, strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-5)
