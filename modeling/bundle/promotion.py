"""Promotion: a bundle may go live unasked, but not where it ranks worse than the live one, or than a
baseline without a model.

A bundle is compared with the live one on the test period of the same examples; where those are
others, the figures say nothing about each other, and only the baselines are asked. Where nothing is
live yet, a poor model is better than none: what speaks against it is said, and it goes live. A
model that ranks unknown items first never does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from feature_repo.home.catalogue import BundleRow, Catalogue
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from modeling.evaluation.evaluate import AS_RANKED, MODEL, untrained
from modeling.metrics import Estimate
from modeling.training_set.simple_baselines import TREES

METRICS = ("ndcg@10", "gauc")


@dataclass(frozen=True)
class Reasons:
    """Against going live: what holds the bundle back, and what is only said."""

    hold: list[str] = field(default_factory=list)
    warn: list[str] = field(default_factory=list)


def test_key(settings: Settings) -> str:
    """Return a key of the test requests: figures on other requests cannot be compared."""
    return JobFolder(settings.home, "training_examples").require().run_id


def reasons_against(
    evaluation: dict[str, Any], live: BundleRow | None, catalogue: Catalogue, digest: str, test: str
) -> Reasons:
    """Return the reasons against a bundle going live.

    Args:
        evaluation: of its run.
        live: the live bundle, if any.
        digest: of the bundle.
        test: key of its test requests.
    """
    metrics = evaluation["metrics"]
    # What requests are ranked by
    ours = metrics.get(AS_RANKED, metrics[MODEL])
    model = {name: Estimate(**ours[name]) for name in METRICS if ours.get(name)}
    below = [
        f"{baseline} is better on {name} ({metrics[baseline][name]['value']:.4f} against {estimate.value:.4f})"
        for baseline in untrained(metrics)
        for name, estimate in model.items()
        if metrics[baseline].get(name) and metrics[baseline][name]["value"] > estimate.value
    ]
    hold, warn = ([], below) if live is None else (below, [])
    same_test = live is not None and catalogue.test_of(live.digest) == test
    for name, paired in evaluation["against_trees"].items():
        # What may be chance is no reason.
        if paired["high"] >= 0:
            continue
        trees = metrics[TREES][name]["value"]
        reason = f"trees on the same numbers are better on {name} ({trees:.4f} against {model[name].value:.4f})"
        now = live.metrics.get(name) if live is not None and same_test else None
        # A live one that is below trees itself is no reason to wait.
        (hold if now and now["value"] >= trees else warn).append(reason)
    if not model.get("ndcg@10"):
        undefined = "how well it ranks is not known: its NDCG@10 is undefined"
        (warn if live is None else hold).append(undefined)
    unknown = evaluation["unknown"]
    if unknown["first"] > unknown["most"]:
        hold.append(
            f"an item that nobody knows comes first in {unknown['first']:.1%} of requests; by chance it would in {unknown['chance']:.1%}"
        )
    if live is not None and live.digest != digest and same_test:
        for name, estimate in model.items():
            now = live.metrics.get(name)
            if now and estimate.value < now["low"]:
                hold.append(
                    f"the live {live.recipe}@{live.digest[:12]} is better on {name} ({now['value']:.4f} against {estimate.value:.4f})"
                )
    return Reasons(hold, warn)
