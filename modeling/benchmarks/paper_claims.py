"""The five papers' claims, each with its figure, seeds and verdict, on one page: quality by `compare`'s runs, costs and made
data by the benchmarks that measure both ways in one run.

Runs and figures are kept below MEMOIR_HOME and not repeated, unless their code changed: stop it, and the same command goes
on.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from feature_repo.benchmarks import commit, hardware, parser, report
from feature_repo.home.code import code_digest
from feature_repo.settings import Settings
from modeling.benchmarks import compare
from modeling.benchmarks.published import HYDRAREC, MARGIN, PAPERS, Paper
from modeling.benchmarks.published_costs import COSTS, Cost, Judged
from modeling.claims import PAIRED, Difference, pair_name
from modeling.console import console
from modeling.evaluation.report import Section, write_sections
from modeling.registry import NAMES, module_of

NOT_RUN = "not run"


@dataclass(frozen=True)
class Line:
    """A claim on the page.

    Args:
        measured_by: the dataset and its seeds, or the benchmark.
    """

    paper: str
    says: str
    measured_by: str
    figure: str
    verdict: str


def main() -> None:
    """Run."""
    flags = parser("modeling.benchmarks.paper_claims", __doc__)
    flags.add_argument("--datasets", nargs="+", default=["online_retail"])
    flags.add_argument("--seeds", type=int, default=5, help="of each recipe (default 5)")
    flags.add_argument("--epochs", type=int, default=1, help="of rankers (default 1)")
    flags.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    flags.add_argument("--next_item", help="the dataset on which HydraRec predicts next items")
    flags.add_argument("--part", choices=("costs", "quality", "all"), default="all")
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    settings = Settings.from_env()
    lines: list[Line] = []
    if arguments.part != "quality":
        lines += cost_lines(settings, COSTS, quick=arguments.quick)
    if arguments.part != "costs":
        lines += quality_lines(settings, arguments)
    page = write(settings, lines, arguments.seeds)
    console.print(f"paper claims: {page}", highlight=False, soft_wrap=True)
    config = {"datasets": arguments.datasets, "seeds": arguments.seeds, "epochs": arguments.epochs}
    report("paper_claims", config, [vars(line) for line in lines], arguments.json)


def cost_lines(settings: Settings, costs: Sequence[Cost], *, quick: bool) -> list[Line]:
    """Run what is not kept of the benchmarks, and judge."""
    lines = []
    for cost in costs:
        rows = _rows_of(settings, cost.benchmark, quick=quick)
        try:
            judged = cost.judged(rows)
        except (IndexError, ValueError):
            # Smaller sizes lack the row that a claim is read from.
            if not quick:
                raise
            judged = Judged("–", holds=False)
        verdict = "replicated" if judged.holds else "not replicated"
        verdict = NOT_RUN if judged.figure == "–" else verdict
        lines.append(
            Line(cost.paper, cost.says, f"python -m {cost.benchmark}", judged.figure, verdict)
        )
    return lines


def _rows_of(settings: Settings, benchmark: str, *, quick: bool) -> list[dict[str, Any]]:
    """The rows of a benchmark, kept for as long as its code stays the same."""
    module, *given = shlex.split(benchmark)
    name = "-".join([module.rpartition(".")[2], *given, *(["quick"] if quick else [])])
    # Models are found by name, which the digest of a module's imports does not see.
    code = code_digest(module, *(module_of(model) for model in NAMES))
    file = Path(settings.root) / "costs" / f"{name}-{code[:12]}.json"
    if not file.exists():
        console.print(f"paper claims: {benchmark}", highlight=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".draft")
        flags = [*given, *(["--quick"] if quick else []), "--json", str(draft)]
        subprocess.run(  # our own modules
            [sys.executable, "-m", module, *flags], check=True, stdout=subprocess.DEVNULL
        )
        draft.replace(file)
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows


def quality_lines(settings: Settings, arguments: Any) -> list[Line]:
    """A line for each claim and dataset."""
    found = []
    named = [name for paper in PAPERS for name in paper.recipes]
    quick = arguments.quick
    names = list(compare.BESIDE) if quick else list(dict.fromkeys(named))
    for dataset in arguments.datasets:
        every = compare.QUICK if quick else compare.THINNED.get(dataset, (1, 1))
        asked = compare.Asked(compare.of_dataset(settings, dataset), every, arguments.epochs)
        found.append(
            compare.one_dataset(
                asked,
                names,
                1 if quick else arguments.seeds,
                arguments.workers,
                curve=False,
                next_item=dataset == arguments.next_item,
            )
        )
    lines = [
        line
        for one in found
        for paper in PAPERS
        for line in _lines(paper, one.name, one.claims, PAIRED)
    ]
    for one in found:
        if one.next_item:
            lines += _lines(HYDRAREC, one.name, one.next_item, ("ndcg@10", "hr@10"))
    return lines


def _lines(
    paper: Paper, dataset: str, claims: Sequence[Difference], metrics: Sequence[str]
) -> list[Line]:
    lines = []
    for claim in paper.claims:
        name = pair_name(claim.ours, claim.theirs)
        of = {one.metric: one for one in claims if one.name == name}
        if not of:
            lines.append(Line(paper.title, claim.says, dataset, "–", NOT_RUN))
            continue
        figure = "; ".join(
            f"{metric} {of[metric].value:+.4f} [{of[metric].low:+.4f}, {of[metric].high:+.4f}]"
            for metric in metrics
        )
        verdicts = [f"{compare.verdict(claim, of[metric])} by {metric}" for metric in metrics]
        said = {verdict.rpartition(" by ")[0] for verdict in verdicts}
        verdict = said.pop() if len(said) == 1 else "; ".join(verdicts)
        lines.append(Line(paper.title, claim.says, f"{dataset}: {name}", figure, verdict))
    return lines


def write(settings: Settings, lines: Sequence[Line], seeds: int) -> Path:
    """Write the page; returns its path."""
    sections = []
    for title in dict.fromkeys(line.paper for line in lines):
        setting = next((p.about for p in (*PAPERS, HYDRAREC) if p.title == title), "")
        rows = [["claim", "measured by", "figure", "verdict"]]
        # One claim's data stand together.
        own = sorted(
            (line for line in lines if line.paper == title),
            key=lambda line: [one.says for one in lines].index(line.says),
        )
        rows += [[line.says, line.measured_by, line.figure, line.verdict] for line in own]
        sections.append(Section(title, setting, rows))
    about = [
        f"Commit {commit()}, {hardware()}. Quality: {seeds} seeds, differences paired over users and seeds, 95 % intervals, decided after "
        f"Holm's correction over all claims of a dataset; “no worse” where the interval, uncorrected, excludes a loss of {MARGIN}. "
        "Costs: medians of interleaved runs. The papers speak of industrial logs, this page of public ones and of widths of 32 to 128.",
    ]
    folder = Path(settings.root) / "claims"
    return write_sections(
        folder,
        "paper_claims",
        "The five papers' claims, and what of them holds here",
        about,
        sections,
    )


if __name__ == "__main__":
    main()
