"""Where a ranking request's time goes, stage by stage, without sockets: CPU, calls of Python, dispatches of torch, page
faults, and a floor beside each stage.

Of the dataset in force: the live bundle, or the newest of each recipe asked for (`--recipes`), and users from the store in
force. No encoded user is kept, so that each request is a cold one. Floors: of decoding msgspec alone; of items and
features one gather of as many numbers; of the model its matrix products at the rate of a large one; of order and answer a
sort and msgspec alone.
"""

from __future__ import annotations

import itertools
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
REST = "order, answer, cold caches"


def main() -> None:
    """Run."""
    flags = parser("serving.benchmarks.path", __doc__)
    flags.add_argument("--recipes", nargs="+", default=[], help="that were exported")
    flags.add_argument("--eager", action="store_true", help="also without compiled steps")
    arguments = flags.parse_args()
    settings = Settings.from_env()
    catalogue = Catalogue(settings.catalogue_url)
    bundles: list[Path | None] = [
        settings.path(catalogue.bundle(settings.dataset, name).path) for name in arguments.recipes
    ]
    rate = gemm_rate()
    sites = []
    for bundle, compiled in itertools.product(
        bundles or [None], (False, True) if arguments.eager else (True,)
    ):
        source = BundleSource(settings, bundle, replay=True, compiled=compiled)
        ranker = source.load().ranker
        sites.append(_site(_asked(settings, ranker, 5 if arguments.quick else REQUESTS)))
    # All in turns, so that a slow moment meets all of them.
    calls = {
        f"{number} {name}": call
        for number, site in enumerate(sites)
        for name, call in site.calls.items()
    }
    spent = interleaved(calls, 2 if arguments.quick else arguments.repeats)
    rows = []
    for number, site in enumerate(sites):
        of_site = {name: spent[f"{number} {name}"]["cpu_s"] for name in site.calls}
        rows += _rows(site, of_site, rate)
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


@dataclass(frozen=True)
class Site:
    """A ranker's stages, each as a call over all requests.

    Args:
        calls: stages, `whole`, and floors as `floor: stage`.
        flop: of the model's products in a request, by stage.
    """

    ranker: RankService
    requests: int
    calls: dict[str, Callable[[], None]]
    flop: dict[str, float]


STAGES = ("decode", "user", "items, features", "collate", "encode_user", "score")


def _site(asked: Asked) -> Site:
    ranker = asked.ranker
    model = ranker.model
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
        REST: lambda n: (np.argsort(-scores), encoded(answers[n], JSON)),
    }
    many = range(len(asked.requests))
    calls = {name: _over(call, many) for name, call in stages.items()}
    calls |= {f"floor: {name}": _over(call, many) for name, call in floors.items()}
    # 3. The model's products: of the model itself, since compiled code does not say.
    plain = ranker.bundle.model
    products: dict[str, Callable[[int], Any]] = {
        "encode_user": lambda n: plain.encode_user(batches[n].user),
        "score": lambda n: plain(batches[n]),
    }
    flop = {name: flops(_over(call, many)) / len(many) for name, call in products.items()}
    flop["score"] -= flop["encode_user"]
    return Site(ranker, len(many), calls, flop)


def _rows(site: Site, cpu_s: dict[str, float], rate: float) -> list[dict[str, Any]]:
    """A row for each stage, and one for the whole."""
    ms = {name: 1000 * spent / site.requests for name, spent in cpu_s.items()}
    ms |= {f"floor: {name}": 1000 * number / rate for name, number in site.flop.items()}
    # What is left: order and answer, and what it costs that one stage throws another out of the cache
    ms[REST] = ms["whole"] - sum(ms[name] for name in STAGES)
    about = {"bundle": site.ranker.bundle.name, "compiled": len(site.ranker.compiled.steps)}
    rows: list[dict[str, Any]] = []
    for name in (*STAGES, REST, "whole"):
        counted = _counts(site.calls[name], site.requests) if name in site.calls else {}
        floor = ms.get(f"floor: {name}")
        rows.append({**about, "stage": name, "cpu_ms": ms[name], "floor_ms": floor, **counted})
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
        super().__init__()  # type: ignore[no-untyped-call]
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
