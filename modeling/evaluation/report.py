"""Self-contained HTML files. Of a ranking run: metrics table, loss, calibration, NDCG@10 by history
length, scores.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling.evaluation.evaluate import metric_rows, undefined
from modeling.training.trainer import read_metrics

BLUE = "#2f6fb0"
ORANGE = "#d9822b"
GREY = "#8a8a8a"


def write_report(
    folder: Path, title: str, about: Sequence[str], evaluation: dict[str, Any]
) -> Path:
    """Write `report.html` (pictures inside) and the same pictures as PNG files; returns the page's
    path.

    Args:
        about: what was trained, how, on what and when, a line each.
    """
    plt = plots()
    figures = evaluation["figures"]
    pictures = {
        "loss": _loss(plt, folder),
        "calibration": _calibration(plt, figures["calibration"]),
        "ndcg_by_history_length": _by_length(plt, figures["ndcg_by_history_length"]),
        "scores": _histogram(plt, figures["histogram"]),
        "importance": _importance(plt, figures["importance"]),
    }
    lines = [*about, "Intervals are half the width of the 95 % bootstrap over users."]
    tables = {
        task: metric_rows(rows) + [[note] for note in [undefined(rows)] if note]
        for task, rows in evaluation["tasks"].items()
    }
    first, *others = tables.items()
    primary = tables.pop(evaluation["primary"], first[1])
    more = {f"Task {task}": rows for task, rows in tables.items()} if others else {}
    more["Answers that do without something"] = metric_rows(evaluation["degraded"])
    return write_page(folder / "report.html", title, lines, primary, pictures, more)


def plots() -> Any:
    """Matplotlib's pyplot without a screen, in the report's style."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    )
    return plt


def png_of(plt: Any, figure: Any) -> bytes:
    """A finished figure as a PNG file."""
    sink = io.BytesIO()
    figure.tight_layout()
    figure.savefig(sink, format="png")
    plt.close(figure)
    return sink.getvalue()


def write_page(
    path: Path,
    title: str,
    about: Sequence[str],
    rows: list[list[str]],
    pictures: dict[str, bytes],
    more: Mapping[str, list[list[str]]] | None = None,
) -> Path:
    """Write a self-contained page, its tables' first rows being their headings, and its pictures as
    files beside it.

    Args:
        more: further tables by title.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        (path.parent / f"{name}.png").write_bytes(png)
    path.write_text(_page(title, about, rows, pictures, more or {}))
    return path


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a line of text, a table whose first row is its heading, pictures."""

    title: str
    text: str
    rows: list[list[str]]
    pictures: dict[str, bytes] = field(default_factory=dict)


def write_sections(
    folder: Path, name: str, title: str, about: Sequence[str], sections: Sequence[Section]
) -> Path:
    """Write `<name>.html`, self-contained, `<name>.md`, and the pictures beside it; returns the HTML
    page's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for picture, png in section.pictures.items():
            (folder / f"{picture}.png").write_bytes(png)
    body = "".join(f"<p>{html.escape(line)}</p>" for line in about)
    text = [f"# {title}", *about]
    for section in sections:
        body += f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>"
        body += _table(section.rows) + _images(section.pictures)
        text += [f"## {section.title}", section.text, _markdown(section.rows)]
        text += [f"![{picture}]({picture}.png)" for picture in section.pictures]
    (folder / f"{name}.md").write_text("\n\n".join(part for part in text if part) + "\n")
    page = folder / f"{name}.html"
    page.write_text(_html(title, body))
    return page


def _markdown(rows: list[list[str]]) -> str:
    """A table; a bar inside a cell would end it."""
    head, *body = [[cell.replace("|", "/") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _loss(plt: Any, folder: Path) -> bytes:
    # Steps and epochs share one log: an epoch's line has the number of its last step.
    lines = list(read_metrics(folder))
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps:
        return _growth(plt, [line for line in lines if line["kind"] == "tree"])
    epochs = [line for line in lines if line["kind"] == "epoch"]
    figure, axes = plt.subplots(figsize=(5.2, 3.4))
    # Single steps stay pale behind their smoothed curve, for their noise hides the trend.
    axes.plot(
        [s["step"] for s in steps],
        [s["loss"] for s in steps],
        color=BLUE,
        alpha=0.25,
        linewidth=0.8,
    )
    axes.plot(
        [s["step"] for s in steps],
        _smooth([s["loss"] for s in steps]),
        color=BLUE,
        label="training",
    )
    axes.plot(
        [e["step"] for e in epochs],
        [e["validation_loss"] for e in epochs],
        "o-",
        color=ORANGE,
        label="validation",
    )
    axes.set(xlabel="step", ylabel="log loss", title="Loss")
    axes.legend(frameon=False)
    return png_of(plt, figure)


def _growth(plt: Any, trees: list[dict[str, Any]]) -> bytes:
    """What the validation period gained tree by tree."""
    figure, axes = plt.subplots(figsize=(5.2, 3.4))
    axes.plot([t["step"] for t in trees], [t["validation"] for t in trees], color=ORANGE)
    metric = trees[0]["metric"] if trees else ""
    axes.set(xlabel="trees", ylabel=f"validation {metric}", title="Trees")
    return png_of(plt, figure)


def _calibration(plt: Any, points: list[list[float]]) -> bytes:
    figure, axes = plt.subplots(figsize=(5.2, 3.4))
    top = max([value for point in points for value in point] + [0.01]) * 1.05
    axes.plot([0, top], [0, top], color=GREY, linewidth=1, linestyle="--")
    axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=BLUE)
    axes.set(
        xlabel="mean probability",
        ylabel="mean label",
        title="Calibration",
        xlim=(0, top),
        ylim=(0, top),
    )
    return png_of(plt, figure)


def _by_length(plt: Any, rows: list[list[Any]]) -> bytes:
    figure, axes = plt.subplots(figsize=(5.2, 3.4))
    axes.bar(range(len(rows)), [row[2] for row in rows], color=BLUE)
    axes.set_xticks(range(len(rows)), [f"{row[0]}\n({row[1]})" for row in rows], fontsize=8)
    axes.set(
        xlabel="events before the request (requests)",
        ylabel="NDCG@10",
        title="Quality by history length",
    )
    return png_of(plt, figure)


def _histogram(plt: Any, histogram: dict[str, list[float]]) -> bytes:
    figure, axes = plt.subplots(figsize=(5.2, 3.4))
    edges = histogram["edges"]
    for name, colour in (("negative", GREY), ("positive", ORANGE)):
        total = max(sum(histogram[name]), 1)
        axes.stairs(
            [value / total for value in histogram[name]],
            edges,
            color=colour,
            label=name,
            linewidth=1.5,
        )
    axes.set(xlabel="probability", ylabel="share of candidates", title="Scores", yscale="log")
    axes.legend(frameon=False)
    return png_of(plt, figure)


def _smooth(values: list[float], weight: float = 0.97) -> list[float]:
    smooth = values[0] if values else 0.0
    out = []
    for value in values:
        smooth = weight * smooth + (1 - weight) * value
        out.append(smooth)
    return out


def _importance(plt: Any, rows: list[dict[str, Any]]) -> bytes:
    figure, axes = plt.subplots(figsize=(5.2, 3.4))
    shown = rows[:12][::-1]
    places = range(len(shown))
    spread = [
        [row["loss"] - row["low"] for row in shown],
        [row["high"] - row["loss"] for row in shown],
    ]
    axes.barh(places, [row["loss"] for row in shown], xerr=spread, color=BLUE, ecolor=GREY)
    axes.set_yticks(places, [row["name"] for row in shown], fontsize=8)
    axes.set(xlabel="NDCG@10 lost when it is another request's", title="What the ranking rests on")
    return png_of(plt, figure)


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in body
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"


def _page(
    title: str,
    about: Sequence[str],
    rows: list[list[str]],
    pictures: dict[str, bytes],
    more: Mapping[str, list[list[str]]],
) -> str:
    paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in about)
    further = "".join(
        f"<h2>{html.escape(name)}</h2>{_table(found)}" for name, found in more.items()
    )
    return _html(title, paragraphs + _table(rows) + further + _images(pictures))


def _images(pictures: Mapping[str, bytes]) -> str:
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in pictures.items()
    )
    return f'<div class="pictures">{images}</div>' if images else ""


def _html(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }}
th, td {{ padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
tr:nth-child(1) td {{ font-weight: 600; }}
table {{ display: block; overflow-x: auto; }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; margin-top: 1.5rem; }}
img {{ width: 100%; }}
</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
</body></html>
"""
