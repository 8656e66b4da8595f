"""`python -m modeling export`: the bundle of an evaluated run, and whether it goes live."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from feature_repo import datasets
from feature_repo.home.catalogue import COVERAGE_TO_GO_LIVE, Catalogue
from feature_repo.home.tables import JobFolder
from feature_repo.raw.sources import sha256_of
from feature_repo.settings import Settings
from modeling import recipes
from modeling.commands.options import use_threads
from modeling.console import say
from modeling.errors import DataError, NotTrainedError, RecipeError
from modeling.recipes import NextItemRecipe
from modeling.training.changes import Changes

if TYPE_CHECKING:
    from modeling.training.training_run import TrainingRun


def run_export(name: str, changes: Changes, live: bool | None, force: bool = False) -> None:
    """Write the bundle of an evaluated run; a next-item recipe has no bundle, which is said."""
    from modeling.training.training_run import trained_run

    use_threads(1)
    settings = Settings.from_env()
    recipe = recipes.load(name)
    if isinstance(recipe, NextItemRecipe):
        say(f"nothing to export: {recipes.about(recipe)}")
        return
    run = trained_run(settings, recipe, changes)
    export(run, Catalogue(settings.catalogue_url), live=live, force=force)


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

    # 1. Refuse a run that must not be served, or whose evaluation is out of date.
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
    # 2. Write the bundle, unless one of this very run is there.
    dataset = run.settings.dataset
    name = run.recipe.name
    test = promotion.test_key(run.settings)
    row = None if force else _exported(run, catalogue)
    if row is None:
        with catalogue.stage(dataset, f"export {name}", run.identity) as stage:
            say(f"export {name}: writing the bundle")
            stage.details = row = _write_bundle(run, catalogue, evaluation)
    else:
        say(f"export {name}: up to date ({name}@{row['digest'][:12]})")
    # 3. Compare with the live bundle and the baselines, and note what speaks against this one.
    digest = row["digest"]
    reasons = promotion.reasons_against(
        evaluation, catalogue.live_or_none(dataset), catalogue, digest, test
    )
    held = list(reasons.hold) if live is None else []
    if live is False and not _is_live(catalogue, dataset, digest):
        # Else its tokens, once they are built, would make it live all the same.
        held = ["it was exported with --not_live", *reasons.hold]
    catalogue.note_comparison(digest, test, "; ".join(held))
    # 4. Make the bundle live where nothing speaks against it.
    for reason in reasons.warn:
        say(f"  {reason}", style="yellow")
    state = _go_live(run, catalogue, digest, live, reasons.hold)
    path = run.settings.path(row["path"])
    say(f"export {name}: {name}@{digest[:12]} is {state} ({path})", soft_wrap=True)


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
        # A run is of the tables in force: its name has theirs.
        columns=JobFolder(run.settings.home, "events").require().columns,
    )
    # Loaded as a server would: a bundle that cannot be read is not recorded.
    loaded = bundle.load(path, encoder.contract, digest)
    # Below the home, so that a home can be moved
    stored = f"bundles/{path.name}"
    # Recorded last, so that the catalogue names whole bundles only.
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
