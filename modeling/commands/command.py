"""`python -m modeling` once its options are read. Each stage knows whether it is up to
date and says so.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from feature_repo import datasets
from feature_repo.home.catalogue import COVERAGE_TO_GO_LIVE, Catalogue
from feature_repo.home.tables import JobFolder
from feature_repo.raw.sources import sha256_of
from feature_repo.settings import Settings
from modeling import recipes
from modeling.console import console, print_table
from modeling.errors import DataError, NotTrainedError, RecipeError
from modeling.recipes import NextItemRecipe, Recipe
from modeling.training.changes import Changes, Comparison, changed

if TYPE_CHECKING:
    from modeling.evaluation.evaluate import Evaluation
    from modeling.training.training_run import TrainingRun
    from modeling.training_set.encodings import Encodings


def run_train(
    name: str,
    data: Path | None,
    changes: Changes,
    device: str,
    force: bool = False,
    threads: int = 1,
) -> None:
    """Train a recipe to its end; with `force` from the beginning, trained or not."""
    from modeling.training.training_run import note_newest, open_run, train
    from modeling.training_set.encodings import Encodings

    _use_threads(threads)
    settings = Settings.from_env()
    recipe = changed(recipes.load(name), changes)
    if isinstance(recipe, NextItemRecipe):
        train_next_item(settings, recipe, data, changes, device, force)
        return
    _refuse_data(recipe, data, settings)
    run = open_run(settings, recipe)
    train(run, Encodings.of_run(run), Catalogue(settings.catalogue_url), device, force=force)
    note_newest(run, changes)


def _use_threads(number: int) -> None:
    """So many threads for torch and, by them, for scikit-learn. One by default: two that wait for each
    other beside other load are a tenth as fast as one, and results do not depend on the machine.
    """
    import torch

    torch.set_num_threads(number)


def run_evaluate(
    name: str, data: Path | None, changes: Changes, force: bool = False, threads: int = 1
) -> None:
    """Metrics of a trained recipe."""
    from modeling.training.training_run import trained_run

    _use_threads(threads)
    settings = Settings.from_env()
    recipe = recipes.load(name)
    if isinstance(recipe, NextItemRecipe):
        show_next_item(settings, changed(recipe, changes), data, changes)
        return
    _refuse_data(recipe, data, settings)
    run = trained_run(settings, recipe, changes)
    evaluate(run, Catalogue(settings.catalogue_url), force=force)


def run_export(name: str, changes: Changes, live: bool | None, force: bool = False) -> None:
    """Write the bundle of an evaluated run; a next-item recipe has no bundle, which is said."""
    from modeling.training.training_run import trained_run

    _use_threads(1)
    settings = Settings.from_env()
    recipe = recipes.load(name)
    if isinstance(recipe, NextItemRecipe):
        console.print(f"nothing to export: {recipes.about(recipe)}", highlight=False)
        return
    run = trained_run(settings, recipe, changes)
    export(run, Catalogue(settings.catalogue_url), live=live, force=force)


def run_bundles(promote: str | None, rollback: bool) -> None:
    """List bundles; make one live."""
    settings = Settings.from_env()
    catalogue = Catalogue(settings.catalogue_url)
    dataset = settings.dataset
    if promote is not None:
        catalogue.set_live(dataset, catalogue.bundle(dataset, promote).digest)
    if rollback:
        left = catalogue.live_bundle(dataset).digest
        catalogue.set_live(dataset, catalogue.live_before(dataset).digest)
        # So that its own tokens, once they are built, do not make it live again.
        catalogue.hold_back(left, "it was rolled back")
    live = catalogue.live_or_none(dataset)
    rows = [["bundle", "state", "ndcg@10", "gauc", "exported"]]
    for row in catalogue.bundles(dataset):
        held = catalogue.held_back(dataset, row.digest)
        if live is not None and row.digest == live.digest:
            state = "live"
        else:
            state = f"held back: {held}" if held else "recorded"
        figures = [
            f"{row.metrics[name]['value']:.4f}" if row.metrics.get(name) else "–"
            for name in ("ndcg@10", "gauc")
        ]
        rows.append(
            [f"{row.recipe}@{row.digest[:12]}", state, *figures, f"{row.created_at:%Y-%m-%d %H:%M}"]
        )
    if len(rows) == 1:
        console.print(
            f"no bundle of {dataset!r} yet: run `python -m modeling train`, `evaluate` and `export`"
        )
        return
    print_table(rows)


def run_compare(asked: Comparison) -> None:
    """Recipes × seeds side by side.

    Raises:
        RecipeError: recipes of two kinds, or options of the other kind.
    """
    settings = Settings.from_env()
    if {type(recipes.load(name)) for name in asked.recipes} == {Recipe}:
        if asked.data is not None:
            raise RecipeError(
                f"--data is for next-item recipes; ranking reads the tables of dataset {settings.dataset}"
            )
        if asked.split != "leave_one_out":
            raise RecipeError("--split is for next-item recipes; ranking is split by time as it is")
        from modeling.comparison.ranking import compare
    else:
        from modeling.comparison.comparison import compare
    compare(settings, asked)


def _refuse_data(recipe: Recipe, data: Path | None, settings: Settings) -> None:
    if data is not None:
        raise RecipeError(
            f"--data is for next-item recipes; {recipe.name} ranks from the tables of dataset {settings.dataset}"
        )


def train_next_item(
    settings: Settings,
    recipe: NextItemRecipe,
    data: Path | None,
    changes: Changes,
    device: str,
    force: bool = False,
) -> None:
    """Train a next-item recipe, or say that it was, and show its test metrics."""
    from modeling.comparison.comparison import metric_lines
    from modeling.next_item.next_item import finished, named, open_source, train_and_evaluate

    source = open_source(settings, data)
    recipe = named(recipe, changes.epochs)
    result = None if force else finished(source, recipe)
    console.print(recipes.about(recipe), highlight=False)
    console.print(
        f"train {recipe.name}: {'up to date' if result else source.describe()}", highlight=False
    )
    result = result or train_and_evaluate(source, recipe, device, force=force)
    console.print(
        f"{recipe.name}, seed {result['seed']}, test targets of {source.title}", highlight=False
    )
    print_table(metric_lines(result))


def show_next_item(
    settings: Settings, recipe: NextItemRecipe, data: Path | None, changes: Changes
) -> None:
    """Test metrics of a finished next-item run.

    Raises:
        NotTrainedError: it is not finished.
    """
    from modeling.comparison.comparison import metric_lines
    from modeling.next_item.next_item import finished, named, open_source

    source = open_source(settings, data)
    recipe = named(recipe, changes.epochs)
    result = finished(source, recipe)
    if result is None:
        seed = recipe.training.seed
        raise NotTrainedError(
            f"{recipe.name} with seed {seed} is not trained to its end on {source.title}: train it first"
        )
    console.print(
        f"{recipe.name}, seed {result['seed']}, test targets of {source.title}", highlight=False
    )
    print_table(metric_lines(result))


def evaluate(run: TrainingRun, catalogue: Catalogue, *, force: bool = False) -> None:
    """Metrics on the test period, baselines, report."""
    from modeling.evaluation.evaluate import (
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
        from modeling.training_set.encodings import Encodings

        with catalogue.stage(
            run.settings.dataset, f"evaluate {run.recipe.name}", identity
        ) as stage:
            _tell("evaluate: opening the test period")
            encodings = Encodings.of_run(run)
            found = _evaluated(run, encodings)
            write(run.folder, identity, found)
            evaluation = read(run.folder)
            title = f"{run.recipe.name} on {contract.spec.title}"
            about = [
                contract_line(contract, evaluation["counts"]),
                *_told(run),
                evaluation["beside_trees"],
                f"Calibration: {calibration_line(evaluation)}.",
            ]
            _tell("evaluate: writing the report")
            write_report(run.folder, title, about, evaluation)
            stage.details = {name: evaluation[name] for name in ("metrics", "counts")} | {
                "report": str(report)
            }
    else:
        console.print(
            f"evaluate {run.recipe.name}: up to date (run {run.identity})", highlight=False
        )
        evaluation = read(run.folder)
    # 2. Show it.
    console.print(contract_line(contract, evaluation["counts"]), highlight=False)
    print_table(metric_rows(evaluation["metrics"]))
    console.print(unknown_line(evaluation["unknown"]), highlight=False)
    console.print(degraded_line(evaluation), highlight=False)
    for task, rows in evaluation["tasks"].items():
        if task != evaluation["primary"]:
            console.print(f"task {task}", highlight=False)
            print_table(metric_rows(rows))
        if note := undefined(rows):
            console.print(f"  {task}: {note}", style="yellow", highlight=False)
    console.print(f"calibration: {calibration_line(evaluation)}", highlight=False)
    if told := evaluation["beside_trees"]:
        better = told.startswith("the model ranks better")
        console.print(told, style="" if better else "yellow", highlight=False)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _tell(text: str) -> None:
    console.print(text, highlight=False)


def _evaluated(run: TrainingRun, encodings: Encodings) -> Evaluation:
    """The evaluation of a run, with trees on the same numbers beside it."""
    from modeling.claims import difference
    from modeling.evaluation.evaluate import (
        beside_trees,
        estimates,
        evaluate_run,
        primary_number,
        sampling_shift,
        without_ranking,
    )
    from modeling.evaluation.trained_baselines import quick_trees, sums_by_user
    from modeling.training.trainer import predict
    from modeling.training.training_run import load_trained, refuse_if_rebuilt
    from modeling.training_set.dataset import refuse_nothing_positive
    from modeling.training_set.simple_baselines import TREES

    # 1. The periods as they were trained on: shards on disk.
    model, encoder = load_trained(run)
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
    found = evaluate_run(model, encoder, test, sampling_shift(spec, *labels), _tell)
    _tell("evaluate: trees on the same numbers")
    trees = quick_trees(run.settings, encodings, run.recipe)
    number = primary_number(spec)
    scores = predict(model, encoder, test.encoded)[:, number]
    ours = sums_by_user(test, scores, number)["ndcg@10"]
    paired = difference("model − trees", "ndcg@10", ours, trees.sums["ndcg@10"])
    rows = found.metrics | {TREES: estimates(trees.test[0])}
    if found.nothing_to_rank:
        rows[TREES] = without_ranking(rows[TREES])
    return replace(
        found,
        tasks={**found.tasks, found.primary: rows},
        beside_trees="" if found.nothing_to_rank else beside_trees(paired),
    )


def _told(run: TrainingRun) -> list[str]:
    """Describe a run for its report: recipe, parameters, epochs, data, date."""
    recipe = run.recipe
    summary = run.state["summary"]
    data = JobFolder(run.settings.home, "events").require()
    return [
        f"Recipe {recipe.name}: model {recipe.model}, {run.state['parameters']:,} parameters, {recipe.history_length} events of each user, seed "
        f"{recipe.training.seed}; {summary['epochs']} of at most {recipe.training.epochs} epochs, {summary['steps']:,} steps.",
        f"Data {run.settings.dataset}, contract {data.fingerprint}: {data.counts['rows_events']:,} events known before "
        f"{data.as_of}. Run {run.identity}, evaluated {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
    ]


def export(
    run: TrainingRun, catalogue: Catalogue, *, live: bool | None, force: bool = False
) -> None:
    """Write the bundle and record it; make it live.

    Args:
        live: True: whatever the comparison says; False: not at all; None: where it is no worse than
            the live bundle and the baselines (`promotion.py`).

    Raises:
        NotTrainedError: the run was not evaluated.
        DataError: it reads more events than are kept online.
    """
    from modeling.bundle import promotion
    from modeling.evaluation.evaluate import read

    if run.recipe.ablated:
        raise RecipeError(
            f"{run.recipe.name} is for comparisons: {', '.join(run.recipe.ablated)} are withheld from it, and a server would show them"
        )
    evaluation = read(run.folder)
    if evaluation["identity"] != run.evaluation_identity:
        raise NotTrainedError(
            f"{run.recipe.name} was evaluated by other code: run `python -m modeling evaluate {run.recipe.name}` again"
        )
    refuse_longer_than_kept(run)
    dataset = run.settings.dataset
    name = run.recipe.name
    test = promotion.test_key(run.settings)
    row = None if force else _exported(run, catalogue)
    if row is None:
        with catalogue.stage(dataset, f"export {name}", run.identity) as stage:
            _tell(f"export {name}: writing the bundle")
            stage.details = row = _write_bundle(run, catalogue, evaluation)
    else:
        console.print(f"export {name}: up to date ({name}@{row['digest'][:12]})", highlight=False)
    digest = row["digest"]
    reasons = promotion.reasons_against(
        evaluation, catalogue.live_or_none(dataset), catalogue, digest, test
    )
    held = list(reasons.hold) if live is None else []
    if live is False and not _is_live(catalogue, dataset, digest):
        # Else its tokens, once they are built, would make it live all the same.
        held = ["it was exported with --not_live", *reasons.hold]
    catalogue.note_comparison(digest, test, "; ".join(held))
    for reason in reasons.warn:
        console.print(f"  {reason}", style="yellow", highlight=False)
    state = _go_live(run, catalogue, digest, live, reasons.hold)
    path = run.settings.path(row["path"])
    console.print(
        f"export {name}: {name}@{digest[:12]} is {state} ({path})", highlight=False, soft_wrap=True
    )


def _go_live(
    run: TrainingRun, catalogue: Catalogue, digest: str, live: bool | None, held: list[str]
) -> str:
    """Make a bundle live unless something speaks against it. Returns the state that it is in."""
    dataset = run.settings.dataset
    name = run.recipe.name
    if _is_live(catalogue, dataset, digest):
        return "live"
    if live is False:
        return "; ".join(["recorded, not live", *held])
    if live is None and held:
        return f"recorded, not live: {'; '.join(held)}. `python -m modeling bundles --promote {name}` makes it live all the same"
    if not _waits(catalogue, dataset, digest):
        catalogue.set_live(dataset, digest)
        return "live"
    if run.tokens is None:
        return f"live once its summary tokens are there: python -m beam_jobs summary_tokens --bundle {name}"
    return "recorded, not live: too few users have the summary tokens that it reads"


def refuse_longer_than_kept(run: TrainingRun) -> None:
    """Refuse a ranker that would be served shorter histories than it was trained on.

    Raises:
        DataError: its recipe reads more events than are kept online.
    """
    from modeling import models
    from modeling.models.base import TokenMaker

    kept = datasets.load_contract(run.settings.dataset).spec.num_history_online
    read = run.recipe.history_length
    if read > kept:
        model = models.model_class(run.recipe.model)
        config = models.config_class(run.recipe.model)(**run.recipe.config)
        if issubclass(model, TokenMaker) and model.streams_with(config):
            # It is served the tokens of all events
            return
        raise DataError(
            f"{run.recipe.name} reads {read:,} events of a history, online are kept {kept:,}: it would rank from less than it "
            f"was trained on. Set num_history_online={read} in feature_repo/datasets/{run.settings.dataset}.py and build again, "
            "or choose a shorter history_length"
        )


def _exported(run: TrainingRun, catalogue: Catalogue) -> dict[str, Any] | None:
    """Digest and path of the run's bundle, where there is one already."""
    last = catalogue.last_run(run.settings.dataset, f"export {run.recipe.name}")
    if last is None or last.inputs != run.identity or last.details.get("weights") != _weights(run):
        return None
    there = (run.settings.path(last.details["path"]) / "bundle.json").exists()
    return dict(last.details) if there else None


def _write_bundle(
    run: TrainingRun, catalogue: Catalogue, evaluation: dict[str, Any]
) -> dict[str, Any]:
    from modeling.bundle import bundle
    from modeling.training.training_run import load_trained

    model, encoder = load_trained(run)
    metrics = evaluation["metrics"]["model"]
    path, digest = bundle.export(
        run.settings.path("bundles"),
        model=model,
        encoder=encoder,
        recipe=run.recipe,
        metrics=metrics,
        trained_on=run.identity,
        data_as_of=JobFolder(run.settings.home, "user_history").require().as_of,
        tokens=run.tokens.version if run.tokens else None,
    )
    loaded = bundle.load(path, encoder.contract, digest)
    # Below the home, so that a home can be moved
    stored = f"bundles/{path.name}"
    catalogue.add_bundle(
        digest=digest,
        dataset=run.settings.dataset,
        recipe=run.recipe.name,
        fingerprint=encoder.contract.fingerprint,
        path=stored,
        metrics=metrics,
        tokens=loaded.tokens,
    )
    return {"digest": digest, "path": stored, "weights": _weights(run)}


def _weights(run: TrainingRun) -> str:
    """Digest of what was trained: the same run may be trained again, to other bits on a GPU."""
    return sha256_of(str(run.folder / "best.safetensors"))


def _waits(catalogue: Catalogue, dataset: str, digest: str) -> bool:
    """Return whether a bundle accepts tokens that too few users have for it to go live."""
    accepted = catalogue.accepted_tokens(digest)
    built = {row.fingerprint: row.coverage for row in catalogue.token_versions(dataset)}
    return accepted is not None and built.get(accepted, 0.0) < COVERAGE_TO_GO_LIVE


def _is_live(catalogue: Catalogue, dataset: str, digest: str) -> bool:
    live = catalogue.live_or_none(dataset)
    return live is not None and live.digest == digest
