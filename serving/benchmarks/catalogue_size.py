"""One ranking call of 500 candidates beside how many items are known: it costs what is asked, not
what is known.

The store is a reader in this process, the model a small amortised DLRM with random weights, the
user has 256 events. Floor: the same call's `encode_user` and `score` alone. Look-ups of 756 ids are
shown apart, beside `pyarrow.compute.index_in`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from feature_repo.benchmarks import interleaved, parser, report
from feature_repo.contract.arrow import arrow_type, from_micros, history_schema
from feature_repo.contract.key_index import KeyIndex
from feature_repo.datasets import load_contract
from modeling import models
from modeling.bundle.bundle import Bundle
from modeling.inputs.columns import Index, Vocabulary
from modeling.inputs.encoder import Encoder
from serving.api.messages import RankContext, RankRequest, RankResponse
from serving.ranking.ranker import Clock, RankService
from serving.stores.features import UserRow
from serving.stores.items import ItemTable, Loaded, item_columns

CONTRACT = load_contract("online_retail")
SIZES = (3_000, 200_000, 1_000_000)
QUICK = (3_000, 50_000)
EVENTS = 256
CANDIDATES = 500
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Reader:
    """A store in this process."""

    def __init__(self, ids: pa.Array) -> None:
        rng = np.random.default_rng(0)
        micros = int(NOW.timestamp() * 1e6) - np.sort(rng.integers(10**9, 10**13, EVENTS))[::-1]
        columns = {
            "item_id": ids.take(pa.array(rng.integers(0, len(ids), EVENTS))),
            "action": pa.array(np.zeros(EVENTS, np.int8)),
            "event_timestamp": from_micros(micros),
            "quantity": pa.array(np.ones(EVENTS, np.float32)),
            "unit_price": pa.array(np.ones(EVENTS, np.float32)),
        }
        schema = history_schema(CONTRACT)
        history = pa.RecordBatch.from_arrays(
            [columns[name] for name in schema.names], schema=schema
        )
        # By the contract, so that a column more does not break the benchmark.
        known: dict[str, Any] = {c.name: 1 for c in CONTRACT.user_columns}
        known |= {"country": "France", "history_end": EVENTS, "other_events": 0}
        self.user = UserRow(known, history)

    def read_user(self, user_id: Any) -> UserRow:
        return self.user

    def read_items(self, item_ids: Sequence[Any]) -> pa.Table:
        """The same features for every item."""
        number = len(item_ids)
        texts: dict[str, Any] = {"description": "x", "description_tokens": ["word"]}
        columns = {"item_id": pa.array(list(item_ids), pa.string())}
        for _, column in item_columns(CONTRACT):
            value = texts.get(column.name, 1)
            columns[column.name] = pa.array([value] * number, arrow_type(column.dtype))
        return pa.table(columns)


def service(number: int) -> tuple[RankService, RankRequest]:
    """A service that knows so many items, and a request."""
    ids = pa.array(np.arange(number)).cast(pa.string())
    ids = pa.compute.binary_join_element_wise(pa.scalar("item"), ids, "-")
    vocabularies: dict[str, Index] = {
        "item_id": Vocabulary(ids.sort()),
        "country": Vocabulary(pa.array(["France"])),
        "description_tokens": Vocabulary(pa.array(["word"])),
    }
    encoder = Encoder(CONTRACT, vocabularies, EVENTS)
    torch.manual_seed(0)
    config = {"width": 16, "num_layers": 2, "num_heads": 2}
    model = models.build("amortised_dlrm", config, encoder.sizes).eval()
    manifest = {"recipe": "random", "tokens": None}
    reader = Reader(ids)
    made = RankService(
        Bundle("0" * 64, Path(), manifest, model, encoder),
        reader,
        ItemTable(encoder, reader.read_items, lambda: Loaded(reader.read_items(ids.to_pylist()))),
    )
    chosen = ids.take(
        pa.array(np.random.default_rng(1).choice(number, CANDIDATES, replace=False))
    ).to_pylist()
    return made, RankRequest(1, chosen, k=10, context=RankContext(NOW + timedelta(days=1)))


def ranked(made: RankService, asked: RankRequest) -> RankResponse:
    """Rank as the server does, but for HTTP."""
    return made.answer(asked, made.reader.read_user(asked.user_id), Clock()).response


def main() -> None:
    """Run."""
    arguments = parser("serving.benchmarks.catalogue_size", __doc__).parse_args()
    torch.set_num_threads(1)
    services = {number: service(number) for number in (QUICK if arguments.quick else SIZES)}
    calls: dict[str, Callable[[], Any]] = {
        str(number): partial(ranked, made, asked) for number, (made, asked) in services.items()
    }
    rounds = 20 if arguments.quick else 100
    times = interleaved(calls, rounds, warm_up=5)
    first = times[str(next(iter(services)))]["wall_s"]
    rows = []
    for number, (made, asked) in services.items():
        keys = made.bundle.encoder.items.values
        wanted = keys.take(
            pa.array(np.random.default_rng(2).integers(0, number, EVENTS + CANDIDATES))
        )
        index = KeyIndex(keys)
        looked = interleaved(
            {
                "index": partial(index.places, wanted),
                "index_in": partial(pc.index_in, wanted, keys),
            },
            20,
            3,
        )
        answer = ranked(made, asked).timings_ms
        rows.append(
            {
                "items": number,
                "rank_ms": 1000 * times[str(number)]["wall_s"],
                "of_smallest": times[str(number)]["wall_s"] / first,
                "floor_ms (encode_user + score)": answer.encode_user + answer.score,
                "lookup_ms": 1000 * looked["index"]["wall_s"],
                "index_in_ms": 1000 * looked["index_in"]["wall_s"],
            }
        )
    config = {"candidates": CANDIDATES, "events": EVENTS, "rounds": rounds, "threads": 1}
    report("catalogue_size", config, rows, arguments.json)


if __name__ == "__main__":
    main()
