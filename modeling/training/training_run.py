"""A ranking recipe on the tables in force: one identity, one folder, one way to train it.

`train`, `evaluate` and `export` work on one run, `compare` on many. What a comparison trained is
therefore evaluated and exported like any other run:

```
open_run ─► train ─► run.json, best.safetensors ─┬─► measured   test metrics, for comparisons (`measured.py`)
                                                 └─► evaluate ─► export   (`command.py`)
```
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from feature_repo import datasets
from feature_repo.atomic import atomic_write
from feature_repo.home.catalogue import Catalogue, TokenSpec
from feature_repo.home.code import code_digest
from feature_repo.home.tables import JobFolder, digest_of
from feature_repo.settings import Settings
from modeling import models
from modeling.console import console
from modeling.errors import NotTrainedError, RunError
from modeling.inputs.augment import encoder_of, training_sample
from modeling.inputs.batch import Batch
from modeling.inputs.encoder import Encoded, Encoder
from modeling.inputs.relations import RELATIONS, read_relations, write_relations
from modeling.layers.memory import keep_freed_memory
from modeling.models.base import Ranker
from modeling.recipes import Recipe
from modeling.registry import training_code
from modeling.training.changes import Changes, changed
from modeling.training.trainer import (
    NETWORK,
    Trainer,
    forget_run,
    locked_run,
    read_metrics,
    write_metrics,
)
from modeling.training.trees import fit_blend, fit_trees
from modeling.training.weights import WEIGHTS, read_texts, save_model
from modeling.training_set.sample import WHOLE, Sample
from modeling.trees.blend import build_ranker

if TYPE_CHECKING:
    from modeling.training_set.encodings import Encodings

TABLES = ("events", "user_history", "item_stats", "training_examples")
# A file beside a recipe's runs: what the last training was asked for
NEWEST = "newest.json"
RESULT = "run.json"
BEST = WEIGHTS
# The model that is fitted by LightGBM and not by steps
FOREST_MODEL = "trees"


@dataclass(frozen=True)
class TrainingRun:
    """A recipe on the tables in force.

    Runs of a recipe stand side by side, each in a folder named by its identity: recipe with all its
    fields, tables, contract, the code that trains, and how much of the data is read.

    Args:
        tokens: version and shape of the stored tokens that it reads.
        sample: which requests are read, and how much of their past.
    """

    settings: Settings
    recipe: Recipe
    identity: str
    folder: Path
    tokens: TokenSpec | None = None
    sample: Sample = WHOLE

    @property
    def state(self) -> dict[str, Any]:
        """The content of `run.json`; empty before training."""
        path = self.folder / RESULT
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def is_trained(self) -> bool:
        """True if it was trained to its end."""
        return self.state.get("identity") == self.identity and (self.folder / BEST).exists()

    @property
    def evaluation_identity(self) -> str:
        """The run, and the code that evaluates it."""
        code = code_digest("modeling.evaluation.evaluate", "modeling.evaluation.trained_baselines")
        return digest_of([self.identity, code])

    def encodings(self) -> Encodings:
        """The training sets of this run alone."""
        # Late: a run that is up to date is found without them, and without what they import.
        from modeling.training_set.encodings import Encodings

        return Encodings(self.settings, self.recipe.service, self.tokens, self.sample)


def open_run(settings: Settings, recipe: Recipe, sample: Sample = WHOLE) -> TrainingRun:
    """Name the run of a recipe on the tables in force. Reads manifests alone.

    Raises:
        TableNotBuiltError: a Beam job has not run.
        StaleTableError: one ran under a different contract.
    """
    contract = datasets.load_contract(settings.dataset)
    ids = {job: JobFolder(settings.home, job).require(contract).run_id for job in TABLES}
    dataset = datasets.load(settings.dataset)
    if dataset.spec.views:
        ids["views"] = dataset.views_digest(settings.data)
    tokens = None
    if recipe.tokens is not None:
        tokens = Catalogue(settings.catalogue_url).tokens_of_recipe(settings.dataset, recipe.tokens)
        ids["summary_tokens"] = JobFolder(settings.home, "summary_tokens").require(contract).run_id
    code = training_code(recipe, settings.dataset)
    identity = digest_of(
        [asdict(recipe), ids, tokens and asdict(tokens), contract.fingerprint, code, asdict(sample)]
    )
    folder = Path(settings.path("runs", recipe.name, identity))
    return TrainingRun(settings, recipe, identity, folder, tokens, sample)


def refuse_if_rebuilt(run: TrainingRun) -> None:
    """Refuse to go on with tables that a Beam job replaced while they were read.

    Raises:
        RunError: the tables have changed since the run was opened.
    """
    if open_run(run.settings, run.recipe, run.sample).identity != run.identity:
        raise RunError("tables were rebuilt while they were read: run the same command again")


def trained_run(settings: Settings, recipe: Recipe, changes: Changes) -> TrainingRun:
    """Return the finished run of these changes; without changes, of those that the last training was
    asked for.

    Raises:
        NotTrainedError: there is no such run on the tables in force.
    """
    newest = settings.path("runs", recipe.name, NEWEST)
    if changes == Changes() and newest.exists():
        stored = json.loads(newest.read_text())
        changes = Changes(stored["seed"], stored["epochs"], tuple(stored["assignments"]))
    return refuse_untrained(open_run(settings, changed(recipe, changes)))


def note_newest(run: TrainingRun, changes: Changes) -> None:
    """Let `evaluate` and `export` without changes take this run of the recipe."""
    with atomic_write(run.folder.parent / NEWEST) as draft:
        draft.write_text(json.dumps(asdict(changes)))


def refuse_untrained(run: TrainingRun) -> TrainingRun:
    """Return the run, if it was trained to its end.

    Raises:
        NotTrainedError: it was not.
    """
    if run.is_trained:
        return run
    name = run.recipe.name
    others = [f for f in run.folder.parent.glob(f"*/{RESULT}") if f.parent != run.folder]
    why = (
        " on these tables, with this code and these settings, though it was on others"
        if others
        else ""
    )
    raise NotTrainedError(
        f"{name} is not trained{why}: run `python -m modeling train {name}` first"
    )


def train(
    run: TrainingRun,
    encodings: Encodings,
    catalogue: Catalogue,
    device: str = "cpu",
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint; with `force` from the beginning.

    Returns:
        The content of `run.json`: recipe, seed, settings, parameters with and without embeddings (OneTrans's
        count its last layer's S weights, which nothing reads), summary of the training.

    Raises:
        RunError: another process trains this very run, or tables were rebuilt meanwhile.
    """
    name = run.recipe.name
    with locked_run(run.folder):
        if force:
            forget_run(run.folder)
        if run.is_trained:
            console.print(f"train {name}: up to date (run {run.identity})", highlight=False)
            return run.state
        with catalogue.stage(run.settings.dataset, f"train {name}", run.identity) as stage:
            state = _train(run, encodings, device)
            stage.details = state["summary"]
    summary = state["summary"]
    console.print(
        f"train {name}: best validation NDCG@10 {summary['best_validation_ndcg@10']:.4f} after {learned_by(run)}",
        highlight=False,
    )
    return state


def learned_by(run: TrainingRun) -> str:
    """Say what a trained run took: epochs and steps of a network, and trees."""
    summary = run.state["summary"]
    of_network = (
        f"{summary['epochs']} of at most {run.recipe.training.epochs} epochs, "
        f"{summary['steps']:,} steps"
    )
    if "trees" not in summary:
        return of_network
    trees = f"{summary['trees']:,} trees"
    return trees if run.recipe.model == FOREST_MODEL else f"{of_network} and {trees}"


def _train(run: TrainingRun, encodings: Encodings, device: str) -> dict[str, Any]:
    from modeling.inputs.vocabularies import write_vocabularies

    recipe = run.recipe
    # 1. Features as of each request, as numbers on disk.
    console.print(f"train {recipe.name}: joining features point-in-time", highlight=False)
    encoder = encodings.encoder_of(recipe)
    refuse_if_rebuilt(run)
    # 2. What this recipe reads of them.
    train = encodings.period(recipe, "train").encoded
    validation = encodings.period(recipe, "validation").encoded
    console.print(
        f"train {recipe.name}: {len(train):,} requests, {len(train.candidate_item):,} samples",
        highlight=False,
    )
    # 3. The run, then what says that it is finished.
    keep_freed_memory()
    learned = _learned(run, encoder, train, validation, device)
    best = learned.model
    write_vocabularies(encoder, run.folder / "vocabularies.json")
    write_relations(encoder.relations, run.folder / RELATIONS)
    return write_result(
        run,
        {
            "identity": run.identity,
            "recipe": recipe.name,
            "seed": recipe.training.seed,
            "settings": asdict(recipe),
            "parameters": sum(p.numel() for p in best.parameters()),
            "dense_parameters": dense_parameters(best),
            "history_parameters": history_parameters(best, _longest(encoder, train).to(device)),
            "summary": learned.summary,
        },
    )


@dataclass(frozen=True)
class _Learned:
    """A trained ranker, saved in its run's folder, and what its training came to."""

    model: Ranker
    summary: dict[str, Any]


def _learned(
    run: TrainingRun, encoder: Encoder, train: Encoded, validation: Encoded, device: str
) -> _Learned:
    """Train what the recipe asks for: a network, trees, or both and their blend."""
    recipe = run.recipe
    periods = (train, validation)
    # 1. Trees alone.
    if recipe.model == FOREST_MODEL:
        fitted = fit_trees(recipe.config, encoder, recipe.training, *periods)
        write_metrics(run.folder, fitted.metrics)
        save_model(fitted.trees, run.folder)
        return _Learned(fitted.trees, fitted.summary)
    # 2. A network, whose checkpoints a blend must not overwrite.
    folder = run.folder if recipe.trees is None else run.folder / NETWORK
    network = build_model(recipe, encoder, train)
    trainer = Trainer(network, encoder, recipe.training, folder, run.identity, device)
    summary = trainer.fit(*periods)
    best = cast(Ranker, trainer.load_best())
    if recipe.trees is None:
        return _Learned(best, summary)
    # 3. Trees beside it, and the weights of both.
    both = fit_blend(best, summary, recipe.trees, encoder, recipe.training, *periods)
    write_metrics(run.folder, [*read_metrics(folder), *both.metrics])
    save_model(both.blend, run.folder)
    return _Learned(both.blend, both.summary)


def load_trained(run: TrainingRun) -> tuple[Ranker, Encoder]:
    """Load the best weights of a run, and the encoder that goes with them.

    Raises:
        RunError: they are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from modeling.inputs.vocabularies import read_vocabularies

    contract = datasets.load_contract(run.settings.dataset)
    vocabularies = read_vocabularies(contract, run.folder / "vocabularies.json")
    encoder = encoder_of(
        contract,
        vocabularies,
        run.recipe.history_length,
        run.tokens.shape if run.tokens else (0, 0),
        read_relations(run.folder / RELATIONS),
        run.recipe.ablated,
        run.recipe.history_block,
    )
    recipe = run.recipe
    model = build_ranker(recipe.model, recipe.config, encoder.sizes, recipe.trees)
    weights = run.folder / BEST
    try:
        model.load_state_dict(load_file(weights))
        model.take_texts(read_texts(model, run.folder))
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise RunError(
            f"{weights} is damaged ({error}): remove {run.folder} and train again"
        ) from error
    return model.eval(), encoder


def build_model(recipe: Recipe, encoder: Encoder, train: Encoded) -> Ranker:
    """A fresh model of the recipe; its seed decides the weights."""
    torch.manual_seed(recipe.training.seed)
    model = models.build(recipe.model, recipe.config, encoder.sizes)
    model.fit_statistics(training_sample(encoder, train))
    return model


def dense_parameters(model: torch.nn.Module) -> int:
    """Parameters beside embedding tables."""
    tables = {
        id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()
    }
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)


def history_parameters(model: Ranker, batch: Batch) -> int:
    """Parameters beside embedding tables that read histories and nothing else: the ones with a
    gradient only if requests have histories, and all of stage 1 where summary tokens are made.

    Parameters that events share with candidates or features, such as an appended candidate's layers,
    are not counted.
    """
    if not any(p.requires_grad for p in model.parameters()):
        return 0
    without = replace(batch.user, mask_BL=torch.zeros_like(batch.user.mask_BL))
    reading = _with_gradient(model, batch) - _with_gradient(model, replace(batch, user=without))
    maker = model.token_maker
    if maker is not None and maker.stage_1 is not None:
        reading |= {id(p) for p in maker.stage_1.parameters()}
    tables = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    return sum(p.numel() for p in model.parameters() if id(p) in reading - tables)


def _with_gradient(model: Ranker, batch: Batch) -> set[int]:
    """Which parameters the scores of a batch depend on, by identity."""
    model.zero_grad(set_to_none=True)
    scores = model(batch)[batch.candidates.mask_BC]
    # Squares, so that no two candidates' gradients cancel.
    scores.square().sum().backward()
    found = {
        id(p) for p in model.parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)
    }
    model.zero_grad(set_to_none=True)
    return found


def _longest(encoder: Encoder, encoded: Encoded, number: int = 8) -> Batch:
    """Some of the requests with the longest histories."""
    return encoder.collate(encoded, np.argsort(encoder.events_read(encoded))[-number:])


def write_result(run: TrainingRun, state: dict[str, Any]) -> dict[str, Any]:
    """Write `run.json` and return it."""
    with atomic_write(run.folder / RESULT) as draft:
        draft.write_text(json.dumps(state, indent=1))
    return state
