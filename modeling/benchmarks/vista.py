"""VISTA: ranking from summary tokens behind any history, stage 1 on growing ones, and one more
event.

`ranking`: 500 candidates against 128 stored tokens (decoded, keys and values made, scored) behind
1,000 to a million events. `against`: the same at L = 4,096, C = 256 beside the amortised DLRM of
four layers with its KV cache at hand, anew, and once for each candidate. `stage 1`: whole histories
in chunks, in a process of its own for peak memory, beside the rate of a large matrix product.
`refresh`: one new event into a stored stream, beside computing it anew. `drift`: a stream in single
precision after very many single events, beside double precision.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from feature_repo.benchmarks import interleaved, parser, report
from feature_repo.history.envelope import Envelope, from_bytes, to_bytes
from modeling import models
from modeling.benchmarks.worlds import flops, gemm_rate, sizes_of
from modeling.comparison.processes import ask, peak_mb
from modeling.inputs.batch import FeatureSizes, UserInputs
from modeling.inputs.made_up import requests
from modeling.layers.memory import keep_freed_memory
from modeling.models.vista import VISTA
from modeling.models.vista_stage_1 import StreamingStage1

WIDTH = 128
SEEDS = 128
CHUNK = 2048
STAGE_1: dict[str, Any] = {"width": WIDTH, "num_heads": 4, "num_seeds": SEEDS, "summary_layers": 3}
STAGE_1["interaction"] = "dot"  # as of the ranker that it is compared with
STREAM: dict[str, Any] = {**STAGE_1, "causal": True, "seed_role": "target", "block": 128}


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.vista", __doc__)
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--drift_events", type=int, help="default: a million; 20,000 with --quick")
    flags.add_argument(
        "--only", choices=("ranking", "against", "stage_1", "refresh", "drift"), nargs="*"
    )
    flags.add_argument("--child", choices=("stage_1",), help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.child:
        print(json.dumps(_stage_1_alone(json.loads(sys.stdin.read()))))
        return
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    lengths = [1_000, 4_000, 16_000] if arguments.quick else [1_000, 10_000, 100_000, 1_000_000]
    cases: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "ranking": lambda: _ranking(lengths, arguments.repeats),
        "against": lambda: _against(
            512 if arguments.quick else 4096, 64 if arguments.quick else 256, arguments.repeats
        ),
        "stage_1": lambda: _stage_1(lengths, arguments.threads),
        "refresh": lambda: _refresh(lengths, arguments.repeats),
        "drift": lambda: _drift(
            arguments.drift_events or (20_000 if arguments.quick else 1_000_000)
        ),
    }
    rows = [
        row
        for name, case in cases.items()
        if not arguments.only or name in arguments.only
        for row in case()
    ]
    config = {"width": WIDTH, "seeds": SEEDS, "stage 1 layers": 3, "threads": arguments.threads}
    report("vista", config, rows, arguments.json)


def _build(config: dict[str, Any], sizes: FeatureSizes) -> VISTA:
    torch.manual_seed(0)
    return cast(VISTA, models.build("vista", config, sizes).eval().requires_grad_(False))


def _maker(config: dict[str, Any], sizes: FeatureSizes) -> StreamingStage1:
    """Stage 1 alone; one that does not stream has what all of them have."""
    return cast(StreamingStage1, _build(config, sizes).stage_1)


@lru_cache(maxsize=4)
def _events(size: int, seed: int = 0) -> UserInputs:
    return requests(sizes_of(512), 1, size, 1, seed).user


def _chunks(length: int) -> Iterator[UserInputs]:
    """One user's events; every chunk is the same, so that reading them costs nothing."""
    for start in range(0, length, CHUNK):
        yield _events(min(CHUNK, length)).events(0, length - start)


@torch.inference_mode()
def _ranking(lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    sizes = sizes_of(512)
    batch = requests(sizes, 1, 1, 500)
    calls = dict[str, Callable[[], Tensor]]()
    none = batch.user.events(0, 0)
    model = _build({**STREAM, "ranking_layers": 3}, sizes)
    stage_1 = cast(StreamingStage1, model.stage_1)
    for length in lengths:
        tokens, _ = stage_1.stream(_chunks(length))
        stored = to_bytes(Envelope("0" * 32, 1, 1, length, tokens[0].numpy()), "user")

        def rank(stored: bytes = stored) -> Tensor:
            found = from_bytes(stored, "user").tokens_SD
            assert found is not None
            return model.score(
                model.state_of(torch.from_numpy(found)[None], none), batch.candidates
            )

        calls[str(length)] = rank
    seconds = interleaved(calls, 3 * repeats, 3)
    shortest = seconds[str(lengths[0])]["wall_s"]
    return [
        {
            "case": "ranking",
            "events": length,
            "C": 500,
            "ms": 1000 * seconds[str(length)]["wall_s"],
            "to_shortest": seconds[str(length)]["wall_s"] / shortest,
            "gflop": flops(calls[str(length)]) / 1e9,
        }
        for length in lengths
    ]


@torch.inference_mode()
def _against(length: int, number: int, repeats: int) -> list[dict[str, Any]]:
    sizes = sizes_of(length)
    batch = requests(sizes, 1, length, number)
    four = {"width": WIDTH, "num_layers": 4, "num_heads": 4, "dropout": 0.0}
    torch.manual_seed(0)
    amortised = models.build("amortised_dlrm", four, sizes).eval()
    cached = amortised.encode_user(batch.user)
    none = batch.user.events(0, 0)
    calls = dict[str, Callable[[], Any]]()
    for layers in (1, 2, 3):
        model = _build({**STREAM, "ranking_layers": layers}, sizes)
        assert model.stage_1 is not None
        tokens = model.stage_1(batch.user)
        stored = to_bytes(Envelope("0" * 32, 1, 1, length, tokens[0].numpy()), "user")

        def rank(model: VISTA = model, stored: bytes = stored) -> Tensor:
            found = from_bytes(stored, "user").tokens_SD
            assert found is not None
            return model.score(
                model.state_of(torch.from_numpy(found)[None], none), batch.candidates
            )

        calls[f"summary tokens, {layers} stage 2 layers"] = rank
    calls["KV cache at hand"] = lambda: amortised.score(cached, batch.candidates)
    calls["amortised, anew"] = lambda: amortised(batch)
    seconds = interleaved(calls, repeats)
    once = interleaved(
        {
            "": lambda: amortised(
                type(batch)(batch.user, batch.candidates.select(slice(0, 1)), batch.labels_BCT)
            )
        },
        repeats,
    )
    naive = once[""]["wall_s"] * number
    rows = []
    for name, call in calls.items():
        taken = seconds[name]["wall_s"]
        row = {
            "case": "against",
            "what": name,
            "L": length,
            "C": number,
            "ms": 1000 * taken,
            "gflop": flops(call) / 1e9,
        }
        if name.startswith("summary"):
            row |= {
                "KV_hit_over_it": seconds["KV cache at hand"]["wall_s"] / taken,
                "anew_over_it": seconds["amortised, anew"]["wall_s"] / taken,
                "naive_over_it": naive / taken,
            }
        rows.append(row)
    rows.append(
        {
            "case": "against",
            "what": "naive: once a candidate",
            "L": length,
            "C": number,
            "ms": 1000 * naive,
        }
    )
    return rows


def _stage_1(lengths: list[int], threads: int) -> list[dict[str, Any]]:
    rows = []
    limit = gemm_rate()
    for name, config in (("bidirectional", STAGE_1), ("stream", STREAM)):
        first = None
        for length in lengths:
            question = {"config": config, "length": length, "threads": threads}
            found = ask("modeling.benchmarks.vista", "stage_1", question)
            found["us_per_event"] = 1e6 * found["cpu_s"] / length
            first = first or found
            rows.append(
                {
                    "case": "stage 1",
                    "what": name,
                    "events": length,
                    **found,
                    "events_per_s": length / found["cpu_s"],
                    "of_gemm": found["gflop"] * 1e9 / found["cpu_s"] / limit,
                }
            )
    return rows


def _stage_1_alone(question: dict[str, Any]) -> dict[str, Any]:
    """One whole history, however long, in a process of its own."""
    torch.set_num_threads(question["threads"])
    keep_freed_memory()
    length = question["length"]
    config = question["config"]
    stage_1 = _maker(config, sizes_of(512))
    size = min(CHUNK, length)
    stage_1.summarise(lambda: _chunks(size))
    repeats = max(1, 50_000 // length)
    cpu = []
    for _ in range(5 if length <= 100_000 else 1):
        started = time.process_time()
        for _ in range(repeats):
            stage_1.summarise(lambda: _chunks(length))
        cpu.append((time.process_time() - started) / repeats)
    with torch.inference_mode():
        work = flops(lambda: stage_1.summarise(lambda: _chunks(size))) * length / size
    return {"cpu_s": statistics.median(cpu), "gflop": work / 1e9, "peak_mb": peak_mb()}


@torch.inference_mode()
def _refresh(lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    stage_1 = _maker(STREAM, sizes_of(512))
    rows = []
    one = _events(1, 99)
    calls: dict[str, Callable[[], Any]] = {}
    anew = {}
    for length in lengths:
        started = time.process_time()
        _, streams = stage_1.stream(_chunks(length))
        anew[length] = time.process_time() - started
        stored = stage_1.stored_streams(streams)
        number = torch.tensor([length])

        def refresh(stored: Tensor = stored, number: Tensor = number) -> Any:
            tokens, after = stage_1.stream([one], stage_1.restored_streams(stored, number))
            return tokens, stage_1.stored_streams(after)

        calls[str(length)] = refresh
    seconds = interleaved(calls, 10 * repeats, 5)
    for length in lengths:
        taken = seconds[str(length)]["wall_s"]
        rows.append(
            {
                "case": "refresh",
                "events": length,
                "ms": 1000 * taken,
                "to_shortest": taken / seconds[str(lengths[0])]["wall_s"],
                "anew_s": anew[length],
                "anew_over_it": anew[length] / taken,
                "state_kb": stored.numel() * 4 / 1024,
                "gflop": flops(calls[str(length)]) / 1e9,
            }
        )
    return rows


@torch.inference_mode()
def _drift(events: int) -> list[dict[str, Any]]:
    """Two layers of width 32: a stream fed one event at a time, beside the same in double
    precision, whole.
    """
    sizes = sizes_of(512)
    small = {
        **STREAM,
        "width": 32,
        "num_heads": 2,
        "num_seeds": 8,
        "summary_layers": 2,
        "block": 32,
    }
    single = _maker(small, sizes)
    double = _maker(small, sizes).double()
    streams = None
    rows = []
    marks = sorted({events // 100, events // 10, events})
    exact = None
    done = 0
    while marks:
        chunk = _events(min(CHUNK, marks[0] - done), done)
        for index in range(chunk.mask_BL.shape[1]):
            tokens, streams = single.stream([chunk.events(index, index + 1)], streams)
        precise = UserInputs(
            **{
                k: v.double() if v is not None and v.is_floating_point() else v
                for k, v in vars(chunk).items()
            }
        )
        expected, exact = double.stream([precise], exact)
        done += chunk.mask_BL.shape[1]
        assert streams is not None
        if done == marks[0]:
            marks.pop(0)
            state = single.stored_streams(streams)
            right = double.stored_streams(exact)
            rows.append(
                {
                    "case": "drift",
                    "events": done,
                    "state_relative": float((state - right).norm() / right.norm()),
                    "tokens_difference": float((tokens - expected).abs().max()),
                }
            )
    return rows


if __name__ == "__main__":
    main()
