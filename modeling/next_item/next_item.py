"""Next-item training and evaluation: a history log in, a sequence model and its metrics out, one
target a user.

One run is a recipe with a seed on one log, by one state of the code. Its folder resumes to the bit
on a CPU with the same threads, like every run's; runs stand side by side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from feature_repo import datasets
from feature_repo.atomic import atomic_write
from feature_repo.home.code import code_digest
from feature_repo.home.tables import JobFolder, digest_of
from feature_repo.raw import sequence_file
from feature_repo.settings import Settings
from modeling import models
from modeling.claims import Sums, read_sums, write_sums
from modeling.errors import DataError
from modeling.layers.memory import keep_freed_memory
from modeling.models.sequence import PackedEvents, SequenceRanker
from modeling.next_item import leave_one_out, losses
from modeling.next_item.leave_one_out import PROTOCOLS
from modeling.next_item.sequences import (
    Sequences,
    TrainingWindows,
    causal_batch,
    cloze_batch,
    training_windows,
)
from modeling.recipes import NextItemRecipe, SplitName
from modeling.training.accelerator import autocast
from modeling.training.trainer import PER_USER, Loop, forget_run, locked_run

# Rows of a training step on a CPU, which bound its activations
ROWS_AT_ONCE = 10_240
VALIDATION_METRICS = ("ndcg@10", "hr@10")


class NextItemTrainer(Loop):
    """Trains a sequence model on whole sequences: every position of a causal one, masked positions
    of a Cloze one.
    """

    model: SequenceRanker

    def __init__(
        self,
        model: SequenceRanker,
        recipe: NextItemRecipe,
        sequences: Sequences,
        folder: Path,
        identity: str,
        device: str = "cpu",
    ) -> None:
        # Refused before `super().__init__`, which makes the run's folder.
        sequences.refuse_leaks(sequences.training_ends())
        if (recipe.objective == "cloze") == model.config.causal:
            raise DataError(
                f"objective {recipe.objective!r} does not fit causal={model.config.causal}: Cloze needs a bidirectional model, the "
                "others a causal one"
            )
        if (model.config.time_gaps or model.config.time_bias) and sequences.times is None:
            raise DataError(
                "time_gaps and time_bias need times, and a sequence file knows order only: use positions or decayed_hydra, or a log that a Beam job built"
            )
        super().__init__(model, recipe.training, folder, identity, device)
        self.recipe = recipe
        self.sequences = sequences
        self.rows_at_once = ROWS_AT_ONCE if self.device.type == "cpu" else sys.maxsize
        self.windows: TrainingWindows
        # `plan` also sets `self.windows`, which the message counts.
        if not self.plan(0) or recipe.training.epochs < 1:
            raise DataError(
                f"nothing to train: {recipe.training.epochs} epochs, and {len(self.windows.starts)} users with two training events or more"
            )

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Windows of the epoch, shuffled, in batches of so many sequences."""
        rng = np.random.default_rng([self.recipe.training.seed, epoch])
        self.windows = training_windows(
            self.sequences, self.recipe.history_length, self.recipe.windows, rng
        )
        number = len(self.windows.starts)
        size = self.recipe.training.batch_sequences
        order = rng.permutation(number)
        return [order[first : first + size] for first in range(0, number, size)]

    def losses(self, chosen: np.ndarray) -> Iterator[tuple[Tensor, int]]:
        """The recipe's objective, a mean over all targets of the batch, in parts of about
        `rows_at_once` rows.
        """
        recipe = self.recipe
        model = self.model
        # Seeded from torch, whose state a checkpoint keeps, so that a resumed run masks alike.
        rng = (
            np.random.default_rng(int(torch.randint(2**31, ())))
            if recipe.objective == "cloze"
            else None
        )
        # 1. All parts first: the mean is over the targets of the whole batch.
        parts = [self._part(part, rng) for part in self._split(chosen)]
        total = sum(len(targets) for _, _, targets in parts)
        # 2. Negatives, drawn once for all parts.
        drawn = None
        if recipe.objective in ("sampled_softmax", "gbce"):
            drawn = losses.uniform_negatives(
                recipe.num_negatives, self.sequences.num_items, self.device
            )
        # 3. The loss of each part, weighed by its share of the targets.
        for events, at, targets in parts:
            with autocast(self.device, self.training.precision):
                rows = model.encode(events.to(self.device)).float()
            rows = rows if at is None else rows[at.to(self.device)]
            targets = targets.to(self.device)
            if drawn is None:
                loss = losses.softmax(rows, model.catalogue, targets)
            elif recipe.objective == "sampled_softmax":
                loss = losses.sampled_softmax(rows, model.catalogue, targets, *drawn)
            else:
                loss = losses.gbce(rows, model.catalogue, targets, drawn[0], recipe.calibration)
            yield loss * (len(targets) / total), len(targets)

    def _split(self, chosen: np.ndarray) -> list[np.ndarray]:
        """The batch's windows in parts of as many windows each."""
        rows = int((self.windows.stops - self.windows.starts)[chosen].sum())
        return np.array_split(chosen, min(-(-rows // self.rows_at_once), len(chosen)))

    def _part(
        self, chosen: np.ndarray, rng: np.random.Generator | None
    ) -> tuple[PackedEvents, Tensor | None, Tensor]:
        """Inputs of some windows, which rows are asked about (None: all), and their targets."""
        recipe = self.recipe
        if rng is None:
            events, targets = causal_batch(self.sequences, self.windows, chosen)
            return events, None, targets
        return cloze_batch(
            self.sequences,
            self.windows,
            chosen,
            mask_item=self.model.mask_item,
            probability=recipe.mask_probability,
            last_only=recipe.last_only,
            rng=rng,
        )

    def validate(self, model: nn.Module) -> dict[str, float]:
        """NDCG@10 and HR@10 on the validation targets, FULL."""
        found = leave_one_out.evaluate(cast(SequenceRanker, model), self.sequences, "validation")
        return {name: found[name] for name in VALIDATION_METRICS}


@dataclass(frozen=True)
class SequenceSource:
    """A history log and where runs on it are kept."""

    sequences: Sequences
    identity: str
    title: str
    # The folder of the runs
    runs: Path

    def describe(self) -> str:
        """The source and its counts in a line."""
        counts = self.sequences.counts
        line = f"{self.title}, {counts['users']:,} users, {counts['items']:,} items, {counts['events']:,} events"
        if counts["other_actions_dropped"]:
            line += f"; {counts['other_actions_dropped']:,} events of other actions dropped"
        if counts["repeats_dropped"]:
            line += f"; {counts['repeats_dropped']:,} repeats of a (user, item) dropped"
        if counts["users_not_evaluated"]:
            line += f"; {counts['users_not_evaluated']:,} users without a target are not evaluated"
        if "targets" in counts:
            line += (
                f"; global time split, {counts['targets']:,} targets, {counts['targets_of_users_not_trained_on']:,} of users that training did not see, "
                f"{counts['targets_not_trained_on']:,} of items that it did not see"
            )
        return line


def open_source(
    settings: Settings, data: Path | None, split: SplitName = "leave_one_out"
) -> SequenceSource:
    """Sequences of a plain file, or of the log that the Beam job built for the dataset in force.

    Raises:
        DataError: a global time split of a file, which knows order only.
        SequenceFileError: it is no sequence file.
        TableNotBuiltError: no file was given and no job has run.
    """
    if data is None:
        folder = JobFolder(settings.home, "user_history")
        contract = datasets.load_contract(settings.dataset)
        title = settings.dataset
        home = Path(settings.path("next_item"))
    else:
        home = (
            settings.path().parent
            / "sequence_file"
            / f"{data.name.split('.')[0]}-{digest_of(str(data.resolve()))[:8]}"
        )
        folder = sequence_file.write_log(data, str(home))
        contract = sequence_file.contract_of(folder)
        title = data.name
    sequences = Sequences.of(contract, folder, has_times=data is None)
    if split == "global_time":
        sequences = sequences.by_time()
    identity = digest_of([folder.require().run_id, contract.fingerprint, split])
    return SequenceSource(sequences, identity, title, home / "runs")


def build_model(recipe: NextItemRecipe, sequences: Sequences) -> SequenceRanker:
    """A fresh model of the recipe for this catalogue; its seed decides the weights."""
    torch.manual_seed(recipe.training.seed)
    return cast(
        SequenceRanker,
        models.build(recipe.model, recipe.config, sequences.sizes(recipe.history_length)),
    )


def train_and_evaluate(
    source: SequenceSource, recipe: NextItemRecipe, device: str = "cpu", *, force: bool = False
) -> dict[str, Any]:
    """One run to its end: trained, from its newest checkpoint, and evaluated on the test targets.

    A finished run is not repeated unless `force` says so: its `result.json` is read.

    Returns:
        Recipe, seed, summary of the training, and the test metrics of every protocol that the
        catalogue allows.
    """
    if not force and (done := finished(source, recipe)) is not None:
        return done
    keep_freed_memory()
    folder = run_folder(source, recipe)
    with locked_run(folder):
        if force:
            forget_run(folder)
        return _train_and_evaluate(source, recipe, folder, device)


def _train_and_evaluate(
    source: SequenceSource, recipe: NextItemRecipe, folder: Path, device: str
) -> dict[str, Any]:
    identity = _identity(source, recipe)
    model = build_model(recipe, source.sequences)
    trainer = NextItemTrainer(model, recipe, source.sequences, folder, identity, device)
    summary = trainer.run()
    best = cast(SequenceRanker, trainer.load_best())
    protocols = [name for name in PROTOCOLS if leave_one_out.supports(source.sequences, name)]
    ranks = {
        name: leave_one_out.evaluated_ranks(best, source.sequences, "test", name)
        for name in protocols
    }
    # result.json is written last, since it says that the run is finished.
    write_sums(folder / PER_USER, leave_one_out.sums_of_ranks(ranks["FULL"]))
    result = {
        "identity": identity,
        "recipe": recipe.name,
        "seed": recipe.training.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "summary": summary,
        "test": {name: leave_one_out.metrics_of_ranks(found) for name, found in ranks.items()},
    }
    with atomic_write(folder / "result.json") as draft:
        draft.write_text(json.dumps(result, indent=1))
    return result


def finished(source: SequenceSource, recipe: NextItemRecipe) -> dict[str, Any] | None:
    """The result of a run that came to its end, or None."""
    path = run_folder(source, recipe) / "result.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result["identity"] == _identity(source, recipe) else None


def stored_sums(source: SequenceSource, recipe: NextItemRecipe) -> Sums:
    """NDCG@10 and HR@10 (FULL) of a finished run, by user.

    Raises:
        ShardError: they are damaged or gone.
    """
    return read_sums(run_folder(source, recipe) / PER_USER)


def run_folder(source: SequenceSource, recipe: NextItemRecipe) -> Path:
    """Return the folder of a run of this recipe and seed, with these settings and this code."""
    return source.runs / f"{recipe.name}-seed{recipe.training.seed}-{_identity(source, recipe)[:8]}"


def _identity(source: SequenceSource, recipe: NextItemRecipe) -> str:
    code = code_digest("modeling.next_item.next_item", models.module_of(recipe.model))
    return digest_of([asdict(recipe), source.identity, code])


def variant(recipe: NextItemRecipe, seed: int, epochs: int | None = None) -> NextItemRecipe:
    """The recipe under another seed, and with another number of epochs, which its name then tells:
    `sasrec@20`.
    """
    training = replace(
        recipe.training, seed=seed, epochs=recipe.training.epochs if epochs is None else epochs
    )
    return named(replace(recipe, training=training), epochs)


def named(recipe: NextItemRecipe, epochs: int | None) -> NextItemRecipe:
    """The recipe under a name that tells its epochs, where these were asked for."""
    return recipe if epochs is None else replace(recipe, name=f"{recipe.name}@{epochs}")
