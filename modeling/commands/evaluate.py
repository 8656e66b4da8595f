"""`python -m modeling evaluate`: metrics of a trained recipe on the test period, baselines and trees beside them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from feature_repo import datasets
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from modeling import recipes
from modeling.commands.next_item import show_next_item
from modeling.commands.options import refuse_data, use_threads
from modeling.console import print_table, say
from modeling.recipes import NextItemRecipe
from modeling.training.changes import Changes, changed

if TYPE_CHECKING:
    import torch

    from modeling.claims import Difference
    from modeling.evaluation.evaluate import Evaluation
    from modeling.training.training_run import TrainingRun


def run_evaluate(
    name: str,
    data: Path | None,
    changes: Changes,
    device: str,
    force: bool = False,
    threads: int = 1,
) -> None:
    """Metrics of a trained recipe."""
    from modeling.layers.host import device_named
    from modeling.training.training_run import trained_run

    use_threads(threads)
    device_named(device)
    settings = Settings.from_env()
    recipe = recipes.load(name)
    if isinstance(recipe, NextItemRecipe):
        show_next_item(settings, changed(recipe, changes), data, changes)
        return
    refuse_data(recipe, data, settings)
    run = trained_run(settings, recipe, changes)
    evaluate(run, Catalogue(settings.catalogue_url), device, force=force)


def evaluate(
    run: TrainingRun, catalogue: Catalogue, device: str = "cpu", *, force: bool = False
) -> None:
    """Metrics on the test period, baselines, report.

    Raises:
        DeviceError: there is no such device.
    """
    from modeling.evaluation.evaluate import (
        beside_trees,
        calibration_line,
        contract_line,
        degraded_line,
        metric_rows,
        read,
        undefined,
        unknown_line,
        write,
    )

    contract = datasets.load_contract(run.settings.dataset)
    report = run.folder / "report.html"
    identity = run.evaluation_identity
    done = (
        not force
        and (run.folder / "evaluation.json").exists()
        and read(run.folder)["identity"] == identity
        and report.exists()
    )
    # 1. Evaluate, unless the run and the code that evaluates it are the same.
    if not done:
        from modeling.evaluation.report import write_report
        from modeling.layers.host import device_named

        with catalogue.stage(
            run.settings.dataset, f"evaluate {run.recipe.name}", identity
        ) as stage:
            say("evaluate: opening the test period")
            found = _evaluated(run, device_named(device))
            write(run.folder, identity, found)
            evaluation = read(run.folder)
            title = f"{run.recipe.name} on {contract.spec.title}"
            about = [
                contract_line(contract, evaluation["counts"]),
                *_about(run),
                beside_trees(evaluation),
                f"Calibration: {calibration_line(evaluation)}.",
            ]
            say("evaluate: writing the report")
            write_report(run.folder, title, about, evaluation)
            stage.details = {name: evaluation[name] for name in ("metrics", "counts")} | {
                "report": str(report)
            }
    else:
        say(f"evaluate {run.recipe.name}: up to date (run {run.identity})")
        evaluation = read(run.folder)
    # 2. Show it.
    say(contract_line(contract, evaluation["counts"]))
    print_table(metric_rows(evaluation["metrics"]))
    say(unknown_line(evaluation["unknown"]))
    say(degraded_line(evaluation))
    for task, rows in evaluation["tasks"].items():
        if task != evaluation["primary"]:
            say(f"task {task}")
            print_table(metric_rows(rows))
        if note := undefined(rows):
            say(f"  {task}: {note}", style="yellow")
    say(f"calibration: {calibration_line(evaluation)}")
    if verdict := beside_trees(evaluation):
        better = verdict.startswith("the model ranks better")
        say(verdict, style="" if better else "yellow")
    say(f"report: {report}", soft_wrap=True)


def _evaluated(run: TrainingRun, device: torch.device) -> Evaluation:
    """The evaluation of a run, with trees on the same numbers beside it.

    The training set is open in here alone: it holds its folder, and matplotlib, which draws the report, keeps
    the frames that called it alive until the next garbage collection.
    """
    from modeling.claims import PAIRED, difference
    from modeling.evaluation.evaluate import (
        estimates,
        evaluate_run,
        measure,
        without_ranking,
    )
    from modeling.evaluation.trained_baselines import quick_trees, sums_by_user
    from modeling.inputs.tasks import primary_number, sampling_shift
    from modeling.training.trainer import predict
    from modeling.training.training_run import load_trained, refuse_if_rebuilt
    from modeling.training_set.dataset import refuse_nothing_positive
    from modeling.training_set.simple_baselines import TREES
    from modeling.trees.blend import trees_of

    # 1. The periods as they were trained on: shards on disk.
    encodings = run.encodings()
    model, encoder = load_trained(run)
    model = model.to(device)
    spec = encoder.contract.spec
    labels = [
        np.asarray(encodings.period(run.recipe, name).encoded.labels)
        for name in ("train", "validation")
    ]
    test = encodings.period(run.recipe, "test")
    positives = (np.asarray(test.encoded.labels) == 1).sum(axis=0)
    refuse_nothing_positive(encoder.contract, "test", positives)
    refuse_if_rebuilt(run)
    # 2. The model, then trees, paired over users.
    found = evaluate_run(model, encoder, test, sampling_shift(spec, *labels), say)
    say("evaluate: trees on the same numbers")
    number = primary_number(spec)
    own = trees_of(model)
    if own is None:
        trees = quick_trees(run.settings, encodings, run.recipe)
        rows = found.metrics | {TREES: estimates(trees.test[0])}
        theirs = trees.sums
    else:
        # The trees that the model is, or is blended with.
        of_trees = predict(own, encoder, test.encoded)[:, number]
        rows = found.metrics | {TREES: measure(test.encoded, test.users, of_trees, number)}
        theirs = sums_by_user(test, of_trees, number)
    against: list[Difference] = []
    if found.nothing_to_rank:
        rows[TREES] = without_ranking(rows[TREES])
    elif own is not model:
        ours = sums_by_user(test, found.logits, number)
        against = [difference("model − trees", m, ours[m], theirs[m]) for m in PAIRED]
    return replace(found, tasks={**found.tasks, found.primary: rows}, against_trees=against)


def _about(run: TrainingRun) -> list[str]:
    """Describe a run for its report: recipe, parameters, epochs, data, date."""
    from modeling.training.training_run import learned_by

    recipe = run.recipe
    data = JobFolder(run.settings.home, "events").require()
    return [
        f"Recipe {recipe.name}: model {recipe.model}, {run.state['parameters']:,} parameters, {recipe.history_length} events of each user, seed "
        f"{recipe.training.seed}; {learned_by(run)}.",
        f"Data {run.settings.dataset}, contract {data.fingerprint}: {data.counts['rows_events']:,} events known before "
        f"{data.as_of}. Run {run.identity}, evaluated {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
    ]
