"""What `python -m modeling` does once its flags are read. Each stage knows whether it is up to date and says so."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_repo import datasets
from feature_repo.catalogue import COVERAGE_TO_GO_LIVE, Catalogue
from feature_repo.settings import Settings
from feature_repo.tables import JobFolder, digest_of
from feature_repo.transforms import VERSION as TRANSFORMS_VERSION
from modeling import recipes
from modeling.console import console, print_table
from modeling.recipes import NextItemRecipe, Recipe

if TYPE_CHECKING:
    from modeling.batch import Encoder
    from modeling.dataset import Split, Warehouse
    from modeling.models.base import Ranker

TABLES = ("events", "user_history", "item_stats", "training_examples")
Tokens = tuple[str, tuple[int, int]]


@dataclass(frozen=True)
class Run:
    """A recipe on the tables in force: where it is kept and what it depends on."""

    settings: Settings
    recipe: Recipe
    identity: str
    folder: Path
    tokens: Tokens | None = None  # version and shape of the stored tokens that it reads

    @property
    def state(self) -> dict[str, Any]:
        """What `train` left: `run.json`, or nothing."""
        path = self.folder / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}


def run_command(arguments: argparse.Namespace) -> int:
    """Run one stage. Returns the exit code: 0 done or up to date, 1 refused with a reason."""
    settings = Settings.from_env()
    try:
        if arguments.command == "compare":
            kinds = {type(recipes.load(name)) for name in arguments.recipe}
            if kinds == {Recipe}:
                if arguments.data is not None:
                    raise ValueError(
                        f"--data is for next-item recipes; ranking reads the tables of dataset {settings.dataset}"
                    )
                from modeling.ranking import compare
            else:
                from modeling.comparison import compare
            compare(settings, arguments)
            return 0
        recipe = recipes.load(arguments.recipe)
        if isinstance(recipe, NextItemRecipe):
            run_next_item(settings, recipe, arguments)
            return 0
        changes = {name: value for name in ("seed", "epochs") if (value := getattr(arguments, name, None)) is not None}
        if getattr(arguments, "data", None) is not None:
            raise ValueError(
                f"--data is for next-item recipes; {recipe.name} ranks from the tables of dataset {settings.dataset}"
            )
        run = open_run(settings, replace(recipe, training=replace(recipe.training, **changes)))
        catalogue = Catalogue(settings.catalogue_url)
        if arguments.command == "train":
            train(run, catalogue, arguments.device)
        elif arguments.command == "evaluate":
            evaluate(trained(run), catalogue)
        else:
            export(trained(run), catalogue, live=not arguments.not_live)
    except (ValueError, LookupError, FileNotFoundError, ArithmeticError, RuntimeError) as error:
        console.print(f"{arguments.command}: {error}", style="red", highlight=False, markup=False)
        return 1
    return 0


def run_next_item(settings: Settings, recipe: NextItemRecipe, arguments: argparse.Namespace) -> None:
    """Train a next-item recipe and show its test metrics, or show those of a finished run.

    Raises:
        ValueError: an export was asked for, or metrics of a run that is not finished.
    """
    from modeling.comparison import metric_lines
    from modeling.next_item import finished, open_source, train_and_evaluate, variant

    if arguments.command == "export":
        raise ValueError(
            f"{recipe.name} is a next-item recipe: its items are those of a log, not of a feature service, so there is nothing to serve"
        )
    source = open_source(settings, arguments.data)
    seed = recipe.training.seed if arguments.seed is None else arguments.seed
    recipe = variant(recipe, seed, arguments.epochs)
    result = finished(source, recipe)
    if arguments.command == "train":
        state = "up to date" if result else source.describe()
        console.print(f"train {recipe.name}: {state}", highlight=False)
        result = result or train_and_evaluate(source, recipe, arguments.device)
    elif result is None:
        raise ValueError(f"{recipe.name} with seed {seed} is not trained to its end on {source.title}: train it first")
    console.print(f"{recipe.name}, seed {result['seed']}, test targets of {source.title}", highlight=False)
    print_table(metric_lines(result))


def open_run(settings: Settings, recipe: Recipe) -> Run:
    """The run of a recipe on the tables in force."""
    ids = {}
    for job in TABLES:
        ids[job] = JobFolder(settings.home, job).require().run_id
    tokens = None
    if recipe.tokens is not None:
        made = Catalogue(settings.catalogue_url).tokens_of_recipe(settings.dataset, recipe.tokens)
        tokens = (made.fingerprint, (made.num_tokens, made.width))
        ids["summary_tokens"] = JobFolder(settings.home, "summary_tokens").require().run_id
    identity = digest_of(
        [asdict(recipe), ids, tokens, datasets.load_contract(settings.dataset).fingerprint, TRANSFORMS_VERSION]
    )
    return Run(settings, recipe, identity, settings.path("runs", recipe.name), tokens)


def trained(run: Run) -> Run:
    """The run as it was trained, seed and epochs included.

    Raises:
        FileNotFoundError: it was not trained to its end on the tables in force.
    """
    if not run.state:
        raise FileNotFoundError(
            f"{run.recipe.name} is not trained: run `python -m modeling train {run.recipe.name}` first"
        )
    as_trained = open_run(run.settings, replace(run.recipe, training=recipes.Training(**run.state["training"])))
    if run.state["identity"] != as_trained.identity:
        raise FileNotFoundError(
            f"{run.recipe.name} was trained on other tables or another recipe: run `python -m modeling train {run.recipe.name}` again"
        )
    return as_trained


def train(run: Run, catalogue: Catalogue, device: str = "cpu") -> None:
    """Train to the end, from the newest checkpoint."""
    settings, recipe = run.settings, run.recipe
    if run.state.get("identity") == run.identity and (run.folder / "best.safetensors").exists():
        console.print(f"train {recipe.name}: up to date (run {run.identity})", highlight=False)
        return
    from modeling.batch import Encoder
    from modeling.bundle import write_vocabularies
    from modeling.dataset import vocabularies
    from modeling.ranking import build_model
    from modeling.trainer import Trainer

    with catalogue.stage(settings.dataset, f"train {recipe.name}", run.identity) as stage:
        console.print(f"train {recipe.name}: joining features point-in-time", highlight=False)
        store, warehouse = _stores(settings)
        split, validation = (
            warehouse.split(store, recipe.service, name, run.tokens) for name in ("train", "validation")
        )
        refuse_unless_trainable(warehouse, split, validation, recipe)
        refuse_if_rebuilt(run)
        encoder = Encoder(
            warehouse.contract,
            vocabularies(warehouse.contract, split, recipe.min_item_count),
            recipe.history_length,
            run.tokens[1] if run.tokens else (0, 0),
        )
        encoded, encoded_validation = encoder.encode(split.requests), encoder.encode(validation.requests)
        console.print(
            f"train {recipe.name}: {len(encoded):,} requests, {len(encoded.candidate_item):,} samples", highlight=False
        )
        model = build_model(recipe, encoder, encoded)
        trainer = Trainer(model, encoder, recipe.training, run.folder, run.identity, device)
        summary = trainer.fit(encoded, encoded_validation)
        write_vocabularies(encoder, run.folder / "vocabularies.json")
        draft = run.folder / ".run.draft"
        draft.write_text(json.dumps({"identity": run.identity, **summary}, indent=1))
        draft.replace(run.folder / "run.json")
        stage.details = summary
    best = summary["best_validation_ndcg@10"]
    console.print(
        f"train {recipe.name}: best validation NDCG@10 {best:.4f} after {summary['epochs']} epochs, {summary['steps']} steps",
        highlight=False,
    )


def refuse_unless_trainable(warehouse: Warehouse, train: Split, validation: Split, recipe: Recipe) -> None:
    """Refuse periods from which nothing can be learned or chosen.

    Raises:
        ValueError: a period has no request with a positive, or there are no epochs.
    """
    from modeling.dataset import refuse_without_positives

    for name, split in (("train", train), ("validation", validation)):
        refuse_without_positives(warehouse.contract, name, split)
    if recipe.training.epochs < 1:
        raise ValueError(f"epochs must be 1 or more, not {recipe.training.epochs}")


def refuse_if_rebuilt(run: Run) -> None:
    """Refuse to go on with tables that a Beam job replaced while they were read.

    Raises:
        RuntimeError: the tables are no longer those that the run was opened on.
    """
    if open_run(run.settings, run.recipe).identity != run.identity:
        raise RuntimeError("tables were rebuilt while they were read: run the same command again")


def evaluate(run: Run, catalogue: Catalogue) -> None:
    """Metrics on the test period, baselines, report."""
    from modeling.evaluate import contract_line, metric_rows, read, unbeaten, write

    report = run.folder / "report.html"
    if not (
        (run.folder / "evaluation.json").exists() and read(run.folder)["identity"] == run.identity and report.exists()
    ):
        from modeling.evaluate import evaluate_run
        from modeling.report import write_report

        with (
            catalogue.stage(run.settings.dataset, f"evaluate {run.recipe.name}", run.identity) as stage,
            console.status("evaluate: joining, scoring, bootstrapping"),
        ):
            store, warehouse = _stores(run.settings)
            model, encoder = _load_trained(run)
            test = warehouse.split(store, run.recipe.service, "test", run.tokens)
            refuse_if_rebuilt(run)
            found, figures = evaluate_run(model, encoder, test)
            counts = {"requests": len(test.requests), "candidates": len(test.requests.candidate_keys)}
            write(run.folder, run.identity, found, figures, counts)
            evaluation = read(run.folder)
            write_report(
                run.folder,
                f"{run.recipe.name} on {warehouse.contract.spec.title}",
                contract_line(warehouse.contract, counts),
                evaluation,
            )
            stage.details = {"metrics": evaluation["metrics"], "counts": counts, "report": str(report)}
    else:
        console.print(f"evaluate {run.recipe.name}: up to date (run {run.identity})", highlight=False)
        evaluation = read(run.folder)
    contract = datasets.load_contract(run.settings.dataset)
    console.print(contract_line(contract, evaluation["counts"]), highlight=False)
    print_table(metric_rows(evaluation["metrics"]))
    for row in unbeaten(evaluation["metrics"]):
        console.print(f"  not beaten with separate intervals: {row}", style="yellow", highlight=False)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


def export(run: Run, catalogue: Catalogue, *, live: bool) -> None:
    """Write the bundle, record it, make it live."""
    from modeling.evaluate import read

    evaluation = read(run.folder)
    if evaluation["identity"] != run.identity:
        raise FileNotFoundError(
            f"{run.recipe.name} was evaluated on another run: run `python -m modeling evaluate {run.recipe.name}` again"
        )
    dataset = run.settings.dataset
    last = catalogue.last_run(dataset, f"export {run.recipe.name}")
    if (
        last
        and last.inputs == run.identity
        and Path(last.details["path"], "bundle.json").exists()
        and (
            not live
            or _is_live(catalogue, dataset, last.details["digest"])
            or _waits(catalogue, dataset, last.details["digest"])
        )
    ):
        console.print(
            f"export {run.recipe.name}: up to date ({run.recipe.name}@{last.details['digest'][:12]})", highlight=False
        )
        return
    from modeling import bundle

    with catalogue.stage(dataset, f"export {run.recipe.name}", run.identity) as stage, console.status("export"):
        model, encoder = _load_trained(run)
        metrics = evaluation["metrics"]["model"]
        as_of = JobFolder(run.settings.home, "user_history").require().as_of
        path, digest = bundle.export(
            run.settings.path("bundles"),
            model=model,
            encoder=encoder,
            recipe=run.recipe,
            metrics=metrics,
            trained_on=run.identity,
            data_as_of=as_of,
            tokens=run.tokens[0] if run.tokens else None,
        )
        loaded = bundle.load(path, encoder.contract, digest)
        catalogue.add_bundle(
            digest=digest,
            dataset=dataset,
            recipe=run.recipe.name,
            fingerprint=encoder.contract.fingerprint,
            path=str(path),
            metrics=metrics,
            tokens=loaded.tokens,
        )
        waiting = _waits(catalogue, dataset, digest)
        if live and not waiting:
            catalogue.set_live(dataset, digest)
        stage.details = {"digest": digest, "path": str(path)}
    state = "live" if live and not waiting else "recorded, not live"
    if waiting and loaded.makes_tokens:
        state = f"live once its summary tokens are there: python -m beam_jobs summary_tokens --bundle {run.recipe.name}"
    console.print(
        f"export {run.recipe.name}: {run.recipe.name}@{digest[:12]} is {state} ({path})",
        highlight=False,
        soft_wrap=True,
    )


def _waits(catalogue: Catalogue, dataset: str, digest: str) -> bool:
    """Whether a bundle accepts tokens that too few users have for it to go live."""
    accepted = catalogue.accepted_tokens(digest)
    built = {row.fingerprint: row.coverage for row in catalogue.token_versions(dataset)}
    return accepted is not None and built.get(accepted, 0.0) < COVERAGE_TO_GO_LIVE


def _is_live(catalogue: Catalogue, dataset: str, digest: str) -> bool:
    try:
        return catalogue.live_bundle(dataset).digest == digest
    except LookupError:
        return False


def _stores(settings: Settings) -> tuple[Any, Warehouse]:
    from feature_repo.store import open_store
    from modeling.dataset import Warehouse

    return open_store(settings), Warehouse(settings)


def _load_trained(run: Run) -> tuple[Ranker, Encoder]:
    from safetensors.torch import load_file

    from modeling import bundle, models
    from modeling.batch import Encoder

    contract = datasets.load_contract(run.settings.dataset)
    vocabularies = bundle.read_vocabularies(contract, run.folder / "vocabularies.json")
    encoder = Encoder(contract, vocabularies, run.recipe.history_length, run.tokens[1] if run.tokens else (0, 0))
    model = models.build(run.recipe.model, run.recipe.config, encoder.sizes)
    model.load_state_dict(load_file(run.folder / "best.safetensors"))
    return model.eval(), encoder
