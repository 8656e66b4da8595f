"""What summary tokens are worth on a dataset's own tables: refresh policies, how they are stored,
how many, reconstruction.

Trains `vista_stream` and variants of it (or takes finished runs of the same home), then ranks the
test period from stored tokens as each refresh policy would have left them: fresh at every event,
after every so many events, at whole multiples of so many hours, or never after the test period
began. A user whom the policy has given no tokens yet is ranked from the short history, as the
server does. Figures are means over seeds; `±` is their standard deviation.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feature_repo.benchmarks import parser, report
from feature_repo.contract.arrow import iso_micros
from feature_repo.history.envelope import KINDS, Envelope, Kind, from_bytes, to_bytes
from feature_repo.history.history import HistoryLog
from feature_repo.history.transforms import MICROS_PER_DAY
from feature_repo.settings import Settings
from modeling.benchmarks.shapes import shaped
from modeling.comparison.ranking import finish
from modeling.evaluation.evaluate import measure
from modeling.evaluation.report import BLUE, GREY, ORANGE, plots, png_of
from modeling.inputs.encoder import Encoded, Encoder
from modeling.models.base import Ranker
from modeling.recipes import SERVICE, Recipe
from modeling.summaries.summariser import Summariser
from modeling.training.trainer import predict
from modeling.training.training_run import load_trained, open_run
from modeling.training_set.encodings import Encodings

METRICS = ("ndcg@10", "gauc", "auc", "log_loss")
Policy = Callable[["Asked"], np.ndarray]


@dataclass(frozen=True)
class Asked:
    """Test requests: row of the log, events known, time, and all event times of each user."""

    log: HistoryLog
    rows: np.ndarray
    ends: np.ndarray
    times: np.ndarray

    def events_before(self, instants: np.ndarray) -> np.ndarray:
        """Events of each request's user before an instant, among those known."""
        histories = self.log.gather(self.rows, self.ends)
        owner = np.repeat(np.arange(len(self.rows)), histories.lengths)
        return np.bincount(owner, histories.times < instants[owner], len(self.rows)).astype(
            np.int64
        )


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.token_quality", __doc__)
    flags.add_argument("--recipe", default="vista_stream")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument(
        "--ablation_seeds", type=int, default=2, help="of variants with other tokens (default 2)"
    )
    flags.add_argument("--learning_rate", type=float, default=4e-3)
    flags.add_argument("--plots", type=Path, help="folder for the plots")
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    settings = Settings.from_env()
    base = shaped(arguments.recipe, settings.dataset)
    assert isinstance(base, Recipe)
    seeds, more = (1, 0) if arguments.quick else (arguments.seeds, arguments.ablation_seeds)
    base = replace(base, training=replace(base.training, learning_rate=arguments.learning_rate))
    if arguments.quick:
        base = replace(base, name=f"{base.name}-quick", training=replace(base.training, epochs=1))
    encodings = Encodings(settings, SERVICE)
    rows = _policies(settings, encodings, base, seeds)
    ablation = _ablation(settings, encodings, base, seeds, more)
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        dataset = settings.dataset
        (arguments.plots / f"token_refresh_{dataset}.png").write_bytes(
            _refresh_plot(rows, encodings.set_of(base).describe())
        )
        if more:
            (arguments.plots / f"token_ablation_{dataset}.png").write_bytes(
                _ablation_plot(ablation, base)
            )
    config = {
        "dataset": settings.dataset,
        "recipe": base.name,
        "seeds": seeds,
        "ablation_seeds": more,
    }
    report("token_quality", config, [*rows, *ablation], arguments.json)


def policies(test_from: int) -> dict[str, Policy]:
    """Which events the tokens have seen by each request."""

    def every(number: int) -> Policy:
        return lambda asked: asked.ends // number * number

    def at_multiples(hours: float) -> Policy:
        step = int(hours * MICROS_PER_DAY / 24)
        return lambda asked: asked.events_before(asked.times // step * step)

    return {
        "every event": lambda asked: asked.ends,
        **{f"every {number} events": every(number) for number in (8, 32, 128)},
        **{f"every {hours} hours": at_multiples(hours) for hours in (2, 24, 168)},
        "never after the test began": lambda asked: asked.events_before(
            np.full(len(asked.rows), test_from)
        ),
    }


def _policies(
    settings: Settings, encodings: Encodings, recipe: Recipe, seeds: int
) -> list[dict[str, Any]]:
    training_set = encodings.set_of(recipe)
    test = encodings.period(recipe, "test")
    log = training_set.warehouse.log
    contract = training_set.warehouse.contract
    rows_of = test.log_rows
    asked = Asked(log, rows_of, test.history_lengths, test.encoded.times)
    known = rows_of >= 0
    asked = Asked(log, np.maximum(rows_of, 0), np.where(known, asked.ends, 0), asked.times)
    found: dict[str, list[dict[str, float]]] = {}
    behind: dict[str, tuple[float, float]] = {}
    for seed in range(1, seeds + 1):
        one = replace(recipe, training=replace(recipe.training, seed=seed))
        finish(settings, encodings, one)
        model, encoder, encoded = _trained(settings, encodings, one)
        summariser = Summariser(model, encoder)
        if not summariser.streams:
            raise ValueError(
                f"{recipe.name} does not stream: its tokens depend on the time at which they were made"
            )

        def note(
            name: str,
            ranked: Encoded,
            model: Ranker = model,
            encoder: Encoder = encoder,
        ) -> None:
            values = measure(ranked, test.users, predict(model, encoder, ranked)[:, 0], 0)
            found.setdefault(name, []).append({metric: values[metric].value for metric in METRICS})

        note("stage 1 at the request, newest events", encoded)
        for name, policy in policies(iso_micros(contract.spec.requests.test_from)).items():
            ends = policy(asked)
            note(name, replace(encoded, gather_tokens=_gather(summariser, asked, ends, "fp32")))
            behind[name] = (float((asked.ends - ends).mean()), float((ends == 0).mean()))
        for kind in KINDS[1:]:
            note(
                f"every event, {kind}",
                replace(encoded, gather_tokens=_gather(summariser, asked, asked.ends, kind)),
            )
    rows = []
    reference = found["every event"]
    for name, values in found.items():
        row: dict[str, Any] = {"case": "refresh", "tokens": name}
        if name in behind:
            row |= {"events_behind": behind[name][0], "without_tokens": behind[name][1]}
        row |= _spread(values)
        change = [
            one["ndcg@10"] / other["ndcg@10"] - 1
            for one, other in zip(values, reference, strict=True)
        ]
        auc = [one["auc"] - other["auc"] for one, other in zip(values, reference, strict=True)]
        row |= {"ndcg_change_%": 100 * statistics.mean(change), "auc_change": statistics.mean(auc)}
        rows.append({**row, "auc_change ±": statistics.stdev(auc) if len(auc) > 1 else 0.0})
    return rows


def _gather(summariser: Summariser, asked: Asked, ends: np.ndarray, kind: Kind) -> Any:
    """Tokens of each request, computed once for each user and number of events, and stored as
    `kind`.
    """
    pairs, place = np.unique(np.stack([asked.rows, ends]), axis=1, return_inverse=True)
    tokens = np.zeros((pairs.shape[1], *summariser.stage_1.token_shape), np.float32)
    item_of_key = summariser.encoder.vocabularies[summariser.encoder.item_key].indices_of(
        asked.log.items
    )
    for start in range(0, pairs.shape[1], 512):
        part = slice(start, start + 512)
        histories = asked.log.gather(pairs[0, part], pairs[1, part])
        tokens[part] = summariser.whole(
            histories, item_of_key, np.zeros(len(histories.lengths), np.int64)
        ).tokens_BSD
    if kind != "fp32":
        for index, one in enumerate(tokens):
            stored = to_bytes(Envelope("0" * 32, 0, 0, 1, one), index, kind)
            restored = from_bytes(stored, index).tokens_SD
            assert restored is not None
            tokens[index] = restored
    has = ends > 0
    return lambda chosen: (tokens[place[chosen]], has[chosen])


def _ablation(
    settings: Settings, encodings: Encodings, base: Recipe, seeds: int, more: int
) -> list[dict[str, Any]]:
    variants: dict[str, dict[str, Any]] = {}
    if more:
        variants |= {f"{number} tokens": {"num_seeds": number} for number in (4, 8, 128)}
        variants |= {"no reconstruction": {"reconstruction": 0.0}}
        nothing = {
            "summary_layers": 0,
            "causal": False,
            "seed_role": "source",
            "reconstruction": 0.0,
        }
        variants |= {"no stage 1: the same tokens for everybody": nothing}
    rows = []
    for name, changes in {f"{base.config['num_seeds']} tokens": {}, **variants}.items():
        results = []
        for seed in range(1, (more if changes else seeds) + 1):
            named = (
                base.name if not changes else f"{base.name}-{name.split(':')[0].replace(' ', '_')}"
            )
            one = replace(
                base,
                name=named,
                config={**base.config, **changes},
                training=replace(base.training, seed=seed),
            )
            results.append(finish(settings, encodings, one).result)
        values = [
            {metric: result["test"][metric]["value"] for metric in METRICS} for result in results
        ]
        cpu = statistics.mean(result["summary"]["cpu_seconds"] for result in results)
        bytes_of = 2 * {**base.config, **changes}["num_seeds"] * base.config["width"]
        rows.append(
            {
                "case": "ablation",
                "tokens": name,
                **_spread(values),
                "cpu_s": cpu,
                "fp16_bytes": bytes_of,
            }
        )
    return rows


def _trained(
    settings: Settings, encodings: Encodings, recipe: Recipe
) -> tuple[Ranker, Encoder, Encoded]:
    model, encoder = load_trained(open_run(settings, recipe, encodings.sample))
    # Rounding of tokens is compared, not what dropout draws.
    return model.eval(), encoder, encodings.period(recipe, "test").encoded


def _spread(values: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for metric in METRICS:
        of_seeds = [value[metric] for value in values]
        row[metric] = statistics.mean(of_seeds)
        row[f"{metric} ±"] = statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0.0
    return row


def _refresh_plot(rows: list[dict[str, Any]], title: str) -> bytes:
    plt = plots()
    figure, axes = plt.subplots(figsize=(7.6, 4.6))
    shown = sorted(
        (row for row in rows if "events_behind" in row), key=lambda row: row["events_behind"]
    )
    axes.axhline(0, color=GREY, linewidth=0.8)
    for number, row in enumerate(shown):
        colour = ORANGE if "hours" in row["tokens"] else GREY if "never" in row["tokens"] else BLUE
        x = max(row["events_behind"], 0.5)
        y = row["auc_change"]
        deviation = row["auc_change ±"]
        axes.errorbar(x, y, yerr=deviation, fmt="o", color=colour, capsize=3)
        above = number % 2 == 0
        axes.annotate(
            row["tokens"],
            (x, y + deviation if above else y - deviation),
            xytext=(0, 6 if above else -6),
            textcoords="offset points",
            fontsize=8,
            rotation=40,
            ha="left" if above else "right",
            va="bottom" if above else "top",
        )
    axes.set(
        xscale="log",
        xlabel="events that the tokens have not seen, mean over requests (0 is drawn at 0.5)",
    )
    axes.set_ylabel("AUC less that of fresh tokens, by seed")
    axes.set_title(f"Refresh policies. {title.split(',')[0]}", fontsize=10)
    axes.margins(x=0.2, y=0.6)
    return png_of(plt, figure)


def _ablation_plot(rows: list[dict[str, Any]], base: Recipe) -> bytes:
    plt = plots()
    figure, (counts, losses) = plt.subplots(
        1, 2, figsize=(9.2, 3.8), width_ratios=(2, 1), sharey=True
    )
    by_count = sorted(
        (row for row in rows if row["tokens"].split()[0].isdigit()),
        key=lambda row: row["fp16_bytes"],
    )
    counts.errorbar(
        [int(row["tokens"].split()[0]) for row in by_count],
        [row["ndcg@10"] for row in by_count],
        yerr=[row["ndcg@10 ±"] for row in by_count],
        fmt="o-",
        color=BLUE,
        capsize=3,
    )
    counts.set(
        xscale="log", xlabel="summary tokens of a user", ylabel="NDCG@10", title="Number of tokens"
    )
    numbers = [int(row["tokens"].split()[0]) for row in by_count]
    counts.set_xticks(numbers, [str(number) for number in numbers])
    counts.minorticks_off()
    pair = [f"{base.config['num_seeds']} tokens", "no reconstruction"]
    chosen = [next(row for row in rows if row["tokens"] == name) for name in pair]
    losses.errorbar(
        ["with", "without"],
        [r["ndcg@10"] for r in chosen],
        yerr=[r["ndcg@10 ±"] for r in chosen],
        fmt="o",
        color=ORANGE,
        capsize=3,
    )
    losses.set(title="Reconstruction loss")
    losses.margins(x=0.5)
    return png_of(plt, figure)


if __name__ == "__main__":
    main()
