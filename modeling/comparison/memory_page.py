"""What memory is worth, in words, as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from modeling.comparison.memory_worth import (
    ALL_REQUESTS,
    MOST_LOST,
    WITH_TOKENS,
    Measured,
    Worth,
    may_do,
    recommended,
)
from modeling.console import print_table, say
from modeling.evaluation.report import BLUE, GREY, Section, plots, png_of, write_sections

METRIC = "ndcg@10"
# Characters of a bar that stands for everything
BAR = 40


def tell(measured: Measured) -> None:
    """Print it: what any history is worth, what lengths keep of it, what to do."""
    whole = measured.of_all(METRIC)
    say(
        f"Any history over none: {_worth(whole)}, {whole.requests:,} requests of {measured.dataset}."
    )
    print_table(kept_rows(measured))
    print_table(reader_rows(measured))
    for line in sentences(measured):
        say(line)


def sentences(measured: Measured) -> list[str]:
    """What follows from the figures: the noise, the traps, and what is recommended."""
    noise = ", ".join(f"{_upper(name)} {value:.4f}" for name, value in measured.noise.items())
    lines = [f"Two trainings on the same events differ by {noise}: less than that is noise."]
    lines += [f"Mind {trap.name}: {trap.says}." for trap in measured.traps]
    return [*lines, recommendation(measured)]


def recommendation(measured: Measured) -> str:
    """One sentence: a length, a recipe, and tokens or not."""
    whole = measured.of_all(METRIC)
    # A share of what may be nothing would recommend a length by noise.
    if whole.low <= 0:
        return (
            "Recommended: cannot tell. A history is not surely worth anything to these requests "
            f"({_worth(whole)}): rank by what is known of items, and measure again with more of them."
        )
    length = recommended(measured)
    if length is None:
        said = f"cannot tell: {_undecided(measured)}; keep all events meanwhile"
    elif length == "all":
        said = (
            f"keep all events: every shorter history surely loses more than {MOST_LOST:.0%} of that"
        )
    else:
        low = whole.kept[length].low
        said = f"the newest {length} events: they keep {low:.0%} of it at least"
    added = measured.network
    if added is None:
        return f"Recommended: {said}; `python -m modeling memory` says whether a network beside trees pays."
    value, low, high = added.by_metric[METRIC]
    worth = f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
    cost = f"{added.token_bytes:,} bytes of tokens a user, {added.request_ms:.1f} CPU ms a request"
    if low > measured.noise[METRIC]:
        reads = f"summary tokens of all events add {worth} to trees: `{WITH_TOKENS}` ({cost})"
    elif high < 0:
        reads = f"a network with summary tokens takes something from trees ({worth}): `trees`, without tokens"
    else:
        reads = f"summary tokens of all events add nothing to trees that is clear ({worth}): `trees`, without tokens"
    return f"Recommended: {said}; {reads}."


def _undecided(measured: Measured) -> str:
    """The shortest length that may do, and what is not known of it."""
    name = may_do(measured)[0]
    kept = measured.of_all(METRIC).kept[name]
    return f"whether the newest {name} events do ({kept.share:.0%} [{kept.low:.0%}, {kept.high:.0%}] of it) is not decided"


def kept_rows(measured: Measured) -> list[list[str]]:
    """For each kind of requests what a history is worth, and the share that each length keeps."""
    lengths = list(measured.of_all(METRIC).kept)
    rows = [
        [
            "requests",
            "number",
            "any history over none",
            *(f"newest {n}" if n != "all" else n for n in lengths),
        ]
    ]
    for one in measured.worth:
        if one.metric == METRIC:
            shares = [
                ""
                if np.isnan(kept.share)
                else f"{kept.share:.0%} [{kept.low:.0%}, {kept.high:.0%}]"
                for kept in one.kept.values()
            ]
            rows.append([one.kind, f"{one.requests:,}", _worth(one), *shares])
    return rows


def reader_rows(measured: Measured) -> list[list[str]]:
    """Metrics of each reader by length, and what a length costs."""
    lengths = list(measured.cost)
    rows = [["reader", *lengths]]
    for reader, found in measured.readers.items():
        cells = [
            f"{found[n][METRIC]:.4f} / {found[n]['gauc']:.4f}" if n in found else ""
            for n in lengths
        ]
        rows.append([f"{reader}, NDCG@10 / GAUC", *cells])
    costs = [measured.cost[n] for n in lengths]
    return [
        *rows,
        ["trees: CPU ms a request", *(f"{cost.request_ms:.2f}" for cost in costs)],
        ["bytes of the median user", *(f"{cost.user_bytes:,.0f}" for cost in costs)],
        ["days of the median user", *(f"{cost.days:,.0f}" for cost in costs)],
        ["decisions in them", *(f"{cost.decisions:,.0f}" for cost in costs)],
    ]


def write_page(measured: Measured, folder: Path, name: str = "memory") -> Path:
    """`memory.html`, `memory.md` and the picture, under a name; returns the page's path."""
    whole = measured.of_all(METRIC)
    sections = [
        Section(
            "What lengths keep",
            "Share of what all events are worth over none, with the 95 % interval over users, of trees.",
            kept_rows(measured),
            {"memory": picture(measured)},
        ),
        Section("Readers and costs", "On the same requests.", reader_rows(measured)),
    ]
    about = [
        f"{measured.dataset}: {whole.requests:,} test requests with a positive; the median user has {measured.median_events:,.0f} events.",
        f"Any history over none: {_worth(whole)}.",
        *sentences(measured),
    ]
    return write_sections(folder, name, "What memory is worth", about, sections)


def text_picture(measured: Measured) -> list[str]:
    """The picture for a terminal: a bar for each length, and what is recommended."""
    whole = measured.of_all(METRIC)
    lines = [f"what memory is worth, any history over none: {_worth(whole)}"]
    for name, kept in whole.kept.items():
        label = f"  {'all' if name == 'all' else f'newest {name}':<12}"
        if np.isnan(kept.share):
            lines.append(f"{label}{_upper(METRIC)} {kept.value:.3f}")
            continue
        bar = "█" * round(BAR * min(max(kept.share, 0), 1))
        lines.append(
            f"{label}{bar:<{BAR}} {kept.share:4.0%} of it [{kept.low:.0%}, {kept.high:.0%}]"
        )
    return [*lines, recommendation(measured)]


def picture(measured: Measured) -> bytes:
    """The share that each length keeps, for all requests and for the kinds that say something."""
    plt = plots()
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    shown = [one for one in measured.worth if one.metric == METRIC and not np.isnan(_last(one))]
    names = list(measured.of_all(METRIC).kept)
    places = np.arange(len(names))
    for one in shown:
        first = one.kind == ALL_REQUESTS
        # Users by length are four further lines that cross all others: the table has them.
        if not first and one.kind.startswith("users of"):
            continue
        values = np.array([kept.share for kept in one.kept.values()])
        low, high = (
            np.array([getattr(kept, end) for kept in one.kept.values()]) for end in ("low", "high")
        )
        style: dict[str, Any] = (
            {"color": BLUE, "linewidth": 2.5} if first else {"linewidth": 1, "alpha": 0.8}
        )
        axes.errorbar(
            places,
            values,
            yerr=[np.maximum(values - low, 0), np.maximum(high - values, 0)] if first else None,
            capsize=3,
            marker="o",
            label=one.kind,
            **style,
        )
    axes.axhline(1 - MOST_LOST, color=GREY, linewidth=1, linestyle=":")
    axes.set_xticks(places, names)
    axes.set(
        xlabel="newest events that are known",
        ylabel="share of what all events are worth",
        title=f"What memory is worth: {measured.dataset}",
    )
    if shown:
        axes.legend(frameon=False, fontsize=8)
    return png_of(plt, figure)


def _last(one: Worth) -> float:
    return list(one.kept.values())[-1].share


def _worth(one: Worth) -> str:
    return f"{_upper(one.metric)} {one.all_events:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"


def _upper(metric: str) -> str:
    return "NDCG@10" if metric == "ndcg@10" else metric.upper()
