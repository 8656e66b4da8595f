"""Where a ranking request's time goes, stage by stage, without sockets: CPU, calls of Python, dispatches of torch, page
faults, and a floor beside each stage.

Of the dataset in force: the live bundle, or the newest of each recipe asked for (`--recipes`), and users from the store in
force. No encoded user is kept, so that each request is a cold one. Floors: of decoding msgspec alone; of items and
features one gather of as many numbers; of the model its matrix products at the rate of a large one; of order and answer a
sort and msgspec alone.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from feature_repo.benchmarks import interleaved, parser, report
from feature_repo.home.catalogue import Catalogue
from feature_repo.settings import Settings
from feature_repo.store.store import open_store
from modeling.benchmarks.worlds import flops, gemm_rate
from modeling.inputs.encoder import Encoded
from serving.api.messages import (
    JSON,
    RankRequest,
    decode_request,
    encoded,
    request_of,
)
from serving.benchmarks.load import CANDIDATES, requests_of
from serving.live.live import BundleSource
from serving.ranking.ranker import Clock, RankService
from serving.ranking.request import context_columns
from serving.stores.features import UserDecoder, UserRow

REQUESTS = 50


def main() -> None:
    """Run."""
    flags = parser("serving.benchmarks.path", __doc__)
    flags.add_argument("--recipes", nargs="+", default=[], help="that were exported")
    arguments = flags.parse_args()
    settings = Settings.from_env()
    catalogue = Catalogue(settings.catalogue_url)
    bundles: list[Path | None] = [
        settings.path(catalogue.bundle(settings.dataset, name).path) for name in arguments.recipes
    ]
    rate = gemm_rate()
    rows = []
    for bundle in bundles or [None]:
        ranker = BundleSource(settings, bundle, replay=True).load().ranker
        asked = _asked(settings, ranker, 5 if arguments.quick else REQUESTS)
        rows += _measured(asked, rate, 2 if arguments.quick else arguments.repeats)
    report("path", {"candidates": CANDIDATES, "gemm_gflop_s": rate / 1e9}, rows, arguments.json)


@dataclass(frozen=True)
class Asked:
    """Requests of one ranker with all that its stages take.

    Args:
        stored: what the store holds of each request's user, by feature.
    """

    ranker: RankService
    bodies: Sequence[bytes]
    requests: Sequence[RankRequest]
    stored: Sequence[dict[str, Any]]
    users: Sequence[UserRow]
    numbers: Sequence[Encoded]


def _asked(settings: Settings, ranker: RankService, number: int) -> Asked:
    contract = ranker.contract
    drawn = requests_of(settings)
    bodies = [drawn(n) for n in range(number)]
    requests = [decode_request(body, contract) for body in bodies]
    decoder = UserDecoder(contract, ranker.bundle.tokens)
    store = open_store(settings)
    service = store.get_feature_service(ranker.bundle.manifest["online_service"])
    key = contract.user.join_key
    version = {} if ranker.bundle.tokens is None else {"token_version": ranker.bundle.tokens}
    stored = []
    for one in requests:
        found = store.get_online_features(service, [{key: one.user_id, **version}]).to_dict()
        stored.append({name: values[0] for name, values in found.items()})
    users = [decoder.row(one.user_id, values) for one, values in zip(requests, stored, strict=True)]
    numbers = [_numbers(ranker, one, user) for one, user in zip(requests, users, strict=True)]
    return Asked(ranker, bodies, requests, stored, users, numbers)


def _numbers(ranker: RankService, request: RankRequest, user: UserRow) -> Encoded:
    items = ranker.items.take(request.candidates)
    at = ranker.time_of(request, user)
    context = context_columns(ranker.contract, request.context)
    return ranker.requests.encoded(user, request.candidates, at, items, context)


def _measured(asked: Asked, rate: float, repeats: int) -> list[dict[str, Any]]:
    """A row for each stage, and one for the whole."""
    ranker = asked.ranker
    model = ranker.bundle.model
    contract = ranker.contract
    encoder = ranker.bundle.encoder
    decoder = UserDecoder(contract, ranker.bundle.tokens)
    one = np.array([0])
    # 1. What each stage takes.
    batches = [encoder.collate(numbers, one) for numbers in asked.numbers]
    with torch.inference_mode():
        states = [model.encode_user(batch.user) for batch in batches]
    answers = [
        ranker.answer(request, user, Clock()).response
        for request, user in zip(asked.requests, asked.users, strict=True)
    ]
    bare = msgspec.json.Decoder(request_of(contract))
    rows_XF = np.zeros((len(ranker.items), encoder.sizes.candidate.dense), np.float32)
    places = [np.maximum(ranker.items.known.places(r.candidates), 0) for r in asked.requests]
    scores = np.zeros(CANDIDATES)

    # 2. The stages, each a call of request n.
    def whole(n: int) -> Any:
        request = decode_request(asked.bodies[n], contract)
        user = decoder.row(request.user_id, asked.stored[n])
        return encoded(ranker.answer(request, user, Clock()).response, JSON)

    stages: dict[str, Callable[[int], Any]] = {
        "decode": lambda n: decode_request(asked.bodies[n], contract),
        "user": lambda n: decoder.row(asked.requests[n].user_id, asked.stored[n]),
        "items, features": lambda n: _numbers(ranker, asked.requests[n], asked.users[n]),
        "collate": lambda n: encoder.collate(asked.numbers[n], one),
        "encode_user": lambda n: model.encode_user(batches[n].user),
        "score": lambda n: model.score(states[n], batches[n].candidates),
        "whole": whole,
    }
    floors: dict[str, Callable[[int], Any]] = {
        "decode": lambda n: bare.decode(asked.bodies[n]),
        "items, features": lambda n: rows_XF[places[n]],
        "order, answer": lambda n: (np.argsort(-scores), encoded(answers[n], JSON)),
    }
    # 3. Times, in turns; counts, apart from them.
    many = range(len(asked.requests))
    calls = {name: _over(call, many) for name, call in stages.items()}
    calls |= {f"floor: {name}": _over(call, many) for name, call in floors.items()}
    spent = interleaved(calls, repeats)
    ms = {name: 1000 * found["cpu_s"] / len(many) for name, found in spent.items()}
    for name in ("encode_user", "score"):
        ms[f"floor: {name}"] = 1000 * flops(calls[name]) / len(many) / rate
    ms["order, answer"] = ms["whole"] - sum(ms[name] for name in stages if name != "whole")
    rows = []
    for name in (*(name for name in stages if name != "whole"), "order, answer", "whole"):
        counted = _counts(calls[name], len(many)) if name in stages else {}
        floor = ms.get(f"floor: {name}")
        rows.append(
            {"bundle": ranker.bundle.name, "stage": name, "cpu_ms": ms[name], "floor_ms": floor}
            | counted
        )
    rows[-1]["floor_ms"] = sum(row["floor_ms"] or 0.0 for row in rows[:-1])
    return rows


def _over(call: Callable[[int], Any], numbers: range) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        for number in numbers:
            call(number)

    return run


class _Dispatches(TorchDispatchMode):
    """Counts what torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def _counts(call: Callable[[], None], number: int) -> dict[str, float]:
    """Calls of Python, dispatches and page faults, a request."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    with _Dispatches() as dispatched:
        call()
    python = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal python
        python += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {
        "python_calls": round(python / number),
        "dispatches": round(dispatched.number / number),
        "faults": round(faults / number, 1),
    }


if __name__ == "__main__":
    main()
