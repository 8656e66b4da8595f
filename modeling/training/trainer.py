"""The training loops: grouped batches, both steps of the model in a row, resume to the bit (on a
CPU).

A run's folder holds `metrics.jsonl` (a line for each step and epoch), `checkpoint.pt` (the newest
state, read with weights_only) and `best.safetensors`. Interrupt it anywhere: the next start
continues from the newest checkpoint and writes the same lines as a run that was never stopped.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from feature_repo.atomic import atomic_write
from feature_repo.contract.schema import DatasetSpec
from feature_repo.errors import ExpectedError
from feature_repo.home.tables import locked
from modeling.console import ProgressLines, console
from modeling.errors import RunError
from modeling.inputs.augment import forget, hide
from modeling.inputs.batch import Batch
from modeling.inputs.encoder import Encoded, Encoder
from modeling.inputs.tasks import sigmoid, weighted
from modeling.layers.host import device_of
from modeling.metrics import defined, log_loss, mean_ndcg
from modeling.models.base import Ranker
from modeling.recipes import Fit, Training
from modeling.training.accelerator import autocast, recompute_layers, use_products
from modeling.training.optimizers import clip_gradients, optimizer_of
from modeling.training.weights import save_weights

# What torch.load raises
UnpicklingError: type[Exception] = vars(torch.serialization)["pickle"].UnpicklingError
# Candidates that an epoch makes unknown: at least so many, and at most this share.
MIN_HIDDEN = 200
MAX_HIDDEN = 0.2
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
# The paired metrics of a finished run, by user
PER_USER = "per_user.arrow"
LOADED_AHEAD = 2  # batches
# Folder of the network whose scores are blended with trees
NETWORK = "network"
OWN_FILES = (
    CHECKPOINT,
    METRICS,
    "best.safetensors",
    "run.json",
    "evaluation.json",
    "result.json",
    "report.html",
    PER_USER,
)


class LossError(ExpectedError, ArithmeticError):
    """The loss is no finite number."""


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder.

    Raises:
        RunError: one is in it.
    """
    try:
        with locked(folder):
            yield
    except BlockingIOError as error:
        raise RunError(
            f"another process trains the run in {folder}: wait for it, or stop it"
        ) from error


def forget_run(folder: Path) -> None:
    """Drop all that a run has left in its folder."""
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    for text in folder.glob("trees-*.txt"):
        text.unlink()
    # The network of a blend has a folder within
    shutil.rmtree(folder / NETWORK, ignore_errors=True)


def masked_bce(
    logits_BCT: Tensor, labels_BCT: Tensor, mask_BC: Tensor, weights_T: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy summed over the tasks that a candidate defines, averaged over real
    candidates and tasks: the same as one row for each candidate.

    A label that is undefined (NaN) adds nothing, so that the sum is the logarithm of what was seen:
    clicks of all, purchases of what was clicked.

    Args:
        weights_T: of the tasks; default: all alike.
    """
    defined = ~labels_BCT.isnan() & mask_BC[..., None]
    loss = binary_cross_entropy_with_logits(
        logits_BCT, labels_BCT.nan_to_num(0.0), reduction="none"
    )
    weights = loss.new_ones(loss.shape[-1]) if weights_T is None else weights_T
    return (loss * defined * weights).sum() / (mask_BC.sum() * weights.sum())


def batches(
    num_candidates: np.ndarray,
    training: Training,
    epoch: int,
    num_events: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Request numbers of every batch of an epoch: shuffled, then grouped by size so that little is
    padding.

    Args:
        num_events: that the model reads of each request's history; default: too few to matter.
    """
    events = np.zeros(len(num_candidates), np.int64) if num_events is None else num_events
    rng = np.random.default_rng([training.seed, epoch])
    order = rng.permutation(len(num_candidates))
    window = training.max_requests * 16
    groups: list[np.ndarray] = []
    for start in range(0, len(order), window):
        chosen = order[start : start + window]
        chosen = chosen[np.argsort(num_candidates[chosen], kind="stable")]
        most = Most(training.max_requests, training.max_candidates, training.max_events)
        groups += grouped(chosen, num_candidates, events, most)
    return [groups[i] for i in rng.permutation(len(groups))]


class Most(NamedTuple):
    """Limits of a batch, padding counted."""

    requests: int
    candidates: int
    events: int


def grouped(
    order: np.ndarray, num_candidates: np.ndarray, num_events: np.ndarray, most: Most
) -> Iterator[np.ndarray]:
    """Requests in groups that fit into a batch, or one that does not fit alone.

    Args:
        order: the requests, in ascending order of their candidates, so that the last one of a group
            says how wide it is.
    """
    first = 0
    longest = 0
    for last, request in enumerate(order.tolist()):
        number = last - first + 1
        longest = max(longest, int(num_events[request]))
        wide = number * num_candidates[request]
        long = number * longest
        fits = number <= most.requests and wide <= most.candidates and long <= most.events
        if last > first and not fits:
            yield order[first:last]
            first = last
            longest = int(num_events[request])
    if len(order):
        yield order[first:]


def ahead(
    load: Callable[[np.ndarray], Any], plan: Sequence[np.ndarray], loaders: int = 1
) -> Iterator[Any]:
    """Yield what `load` makes of each batch of a plan, in order; the next ones are made meanwhile, by so many threads.

    Nothing random may happen in `load`: how far it is ahead differs from run to run.
    """
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(loaders, "load") as threads:
        for chosen in plan:
            waiting.append(threads.submit(load, chosen))
            if len(waiting) > LOADED_AHEAD * loaders:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


PREDICTED = Most(requests=64, candidates=16_384, events=1 << 16)


def predict(
    model: Ranker,
    encoder: Encoder,
    encoded: Encoded,
    *,
    most: Most = PREDICTED,
) -> np.ndarray:
    """Logits of every candidate and task, N × T, in the order of `encoded`."""
    logits = np.zeros((len(encoded.candidate_item), model.sizes.tasks), np.float32)
    sizes = encoded.num_candidates
    offsets = encoded.candidate_offsets
    order = np.argsort(sizes, kind="stable")
    device = device_of(model)
    model.eval()
    plan = list(grouped(order, sizes, encoder.events_read(encoded), most))
    with torch.inference_mode():
        loaded = ahead(lambda chosen: encoder.collate(encoded, chosen), plan)
        for chosen, batch in zip(plan, loaded, strict=True):
            batch = batch.to(device)
            scored = model(batch)[batch.candidates.mask_BC].cpu().numpy()
            at = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in chosen])
            logits[at] = scored
    return logits


def quality(spec: DatasetSpec, encoded: Encoded, logits_NT: np.ndarray) -> dict[str, float]:
    """Log loss and NDCG@10 of a period: of each task where there are several, and over all of them under the
    weights that requests are ranked by.
    """
    found: dict[str, float] = {}
    losses = []
    rankings = []
    labels_NT = np.asarray(encoded.labels)
    for number, task in enumerate(spec.tasks):
        scored = defined(labels_NT[:, number], encoded.candidate_offsets)
        labels = scored.labels
        own = logits_NT[scored.rows, number]
        losses.append(log_loss(labels, sigmoid(own)) if len(labels) else math.nan)
        rankings.append(mean_ndcg(labels, own, scored.offsets))
        if len(spec.tasks) > 1:
            found |= {f"loss {task.name}": losses[-1], f"ndcg@10 {task.name}": rankings[-1]}
    return {"loss": weighted(spec, losses), "ndcg@10": weighted(spec, rankings), **found}


def share_hidden(training: Training, train: Encoded) -> float:
    """Share of candidates that training makes unknown: of few samples a larger one, so that the unknown is seen
    often enough to have a score of its own.
    """
    few = min(MIN_HIDDEN / max(len(train.candidate_item), 1), MAX_HIDDEN)
    return max(training.hidden, few) if training.hidden else 0.0


class _Untold(NamedTuple):
    """A step that was taken, its loss where it was computed."""

    step: int
    epoch: int
    loss: Tensor
    samples: int


class Loop(ABC):
    """One run of one model, whatever it is trained on: schedule, checkpoints, early stopping, progress.

    Args:
        model: fresh; its weights are set from the checkpoint where the folder has one.
        folder: the run's folder.
        identity: what the run depends on; a checkpoint with a different identity is not resumed.
        device: where to train; checkpoints and `best.safetensors` load anywhere.
    """

    def __init__(
        self, model: nn.Module, training: Fit, folder: Path, identity: str, device: str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.training = training
        self.folder = folder
        self.identity = identity
        folder.mkdir(parents=True, exist_ok=True)
        self.optimizer = optimizer_of(model, training)
        self.averaged = (
            copy.deepcopy(self.model).requires_grad_(False) if training.averaging else None
        )
        if training.recompute:
            recompute_layers(self.model)
        self.step = self.epoch = self.next_batch = 0
        self.best = -math.inf
        self.epochs_since_best = 0
        # CPU seconds of training steps, over all resumptions; validation is not counted
        self.cpu_seconds = 0.0
        # CPU seconds and NDCG@10, at each validation
        self.curve: list[list[float]] = []
        self.stopped = False
        # Steps that were taken and are not logged yet
        self._untold: deque[_Untold] = deque()

    @abstractmethod
    def plan(self, epoch: int) -> list[np.ndarray]:
        """Batches of an epoch, in order; the same for every call."""

    def load(self, chosen: np.ndarray) -> Any:
        """Load what `losses` takes of a batch, from memory or disk; called ahead of it, on one of several
        threads.
        """
        return chosen

    @abstractmethod
    def losses(self, loaded: Any) -> Iterator[tuple[Tensor, int]]:
        """Parts of a batch, each with its graph and its number of samples; their losses sum to the
        batch's.

        A part's graph is freed before the next is made, so more parts take less memory for the same
        gradient.
        """

    @abstractmethod
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Figures on the validation data; `ndcg@10` chooses the best epoch."""

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is validated and kept: the averaged one where there is one."""
        return self.model if self.averaged is None else self.averaged

    def run(self, stop_after: int | None = None) -> dict[str, Any]:
        """Train to the end, or stop after so many further steps (as an interruption would).

        Returns:
            Summary of the run: steps, epochs, best validation NDCG@10, CPU seconds of the steps.

        Raises:
            LossError: the loss became NaN or infinite.
        """
        use_products(self.training.precision)
        # Seed first: a checkpoint's random state replaces the seeded one.
        torch.manual_seed(self.training.seed)
        self._resume()
        budget = stop_after
        total = len(self.plan(0)) * self.training.epochs
        with _progress(total) as advance:
            advance(self.step, "")
            while self.epoch < self.training.epochs and not self.stopped:
                # `plan` gives an epoch the same batches again, so a resumed one skips those done.
                left = self.plan(self.epoch)[self.next_batch :]
                for loaded in ahead(self.load, left, self.training.loaders):
                    if budget is not None and budget <= 0:
                        self._tell(advance)
                        return self._summary()
                    started = time.process_time()
                    loss, samples = self._train_step(loaded, total)
                    self.cpu_seconds += time.process_time() - started
                    self.next_batch += 1
                    self.step += 1
                    self._untold.append(_Untold(self.step, self.epoch, loss, samples))
                    # An accelerator works on this step while that before it is told.
                    self._tell(advance, all_but=0 if self.device.type == "cpu" else 1)
                    budget = None if budget is None else budget - 1
                    if self.step % self.training.checkpoint_steps == 0:
                        # A checkpoint must not be ahead of the log, nor hold weights behind a loss that is no number.
                        self._tell(advance)
                        self._save()
                self._tell(advance)
                # Validate, then save, so that a resumed run does not validate the epoch again.
                self._end_epoch()
                self._save()
        return self._summary()

    def load_best(self) -> nn.Module:
        """The model with the weights of the best epoch."""
        self.model.load_state_dict(load_file(self.folder / "best.safetensors"))
        return self.model

    def _tell(self, advance: Callable[..., None], all_but: int = 0) -> None:
        """Log steps that were taken, oldest first, but for the newest so many.

        Raises:
            LossError: the loss of one is no finite number.
        """
        while len(self._untold) > all_but:
            told = self._untold.popleft()
            loss = float(told.loss)
            self._refuse_no_number(loss, told.step - 1, told.epoch)
            self._log(
                {
                    "kind": "step",
                    "step": told.step,
                    "epoch": told.epoch,
                    "loss": loss,
                    "samples": told.samples,
                }
            )
            advance(told.step, f"loss {loss:.4f}", told.samples)

    def _refuse_no_number(self, loss: float, step: int, epoch: int) -> None:
        if not math.isfinite(loss):
            raise LossError(
                f"loss is {loss} at step {step} (epoch {epoch}): lower learning_rate (now {self.training.learning_rate}) "
                f"or clip_norm (now {self.training.clip_norm}); the newest checkpoint is {self.folder / 'checkpoint.pt'}"
            )

    def _train_step(self, loaded: Any, total: int) -> tuple[Tensor, int]:
        self.model.train()
        self.optimizer.set_rate(
            _schedule(
                self.step, total, self.training.warmup_steps, self.training.final_learning_rate
            )
        )
        self.optimizer.zero_grad()
        # 1. The gradients of all parts add up to the batch's.
        loss = torch.zeros((), device=self.device)
        samples = 0
        for part, number in self.losses(loaded):
            part.backward()
            loss = loss + part.detach()
            samples = samples + number
        # 2. Refuse before the optimizer's step, while the weights are still finite, where nobody has to wait for that;
        # elsewhere when the step is told.
        if self.device.type == "cpu":
            self._refuse_no_number(float(loss), self.step, self.epoch)
        # 3. Step, then move the averaged weights.
        clip_gradients(self.model, self.training.clip_norm)
        self.optimizer.step()
        if self.averaged is not None:
            # A short memory at first, so that the average forgets the initial weights.
            decay = min(self.training.averaging, (self.step + 1) / (self.step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self.averaged.parameters()), list(self.model.parameters()), 1 - decay
                )
        return loss, samples

    def _end_epoch(self) -> None:
        # The last epoch is always validated, so that there are best weights to load.
        last = self.epoch + 1 == self.training.epochs
        if last or (self.epoch + 1) % self.training.validate_epochs == 0:
            figures = self.validate(self.evaluated_model)
            ndcg = figures["ndcg@10"]
            self._log(
                {"kind": "epoch", "epoch": self.epoch, "step": self.step}
                | {
                    f"validation_{name}": None if math.isnan(value) else value
                    for name, value in figures.items()
                }
            )
            self.curve.append([self.cpu_seconds, ndcg])
            shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            console.print(f"epoch {self.epoch}: validation {shown}", highlight=False)
            if ndcg > self.best:
                self.best = ndcg
                self.epochs_since_best = 0
                with atomic_write(self.folder / "best.safetensors") as draft:
                    save_weights(self.evaluated_model.state_dict(), draft)
            else:
                self.epochs_since_best += 1
                self.stopped = self.epochs_since_best >= self.training.patience
        self.epoch = self.epoch + 1
        self.next_batch = 0

    def _save(self) -> None:
        state = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.optimizer.state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "place": [
                self.step,
                self.epoch,
                self.next_batch,
                self.epochs_since_best,
                int(self.stopped),
            ],
            "best": self.best,
            "cpu_seconds": self.cpu_seconds,
            "curve": self.curve,
        }
        with atomic_write(self.folder / CHECKPOINT) as draft:
            torch.save(state, draft)

    def _resume(self) -> None:
        """Go on from the newest checkpoint; without a whole one of this run, begin anew, and say
        why.
        """
        # 1. Find a checkpoint of this run, with the log that belongs to it.
        log = self.folder / METRICS
        state = self._checkpoint()
        if state is not None and not log.exists():
            console.print(
                f"{log} is gone, so {CHECKPOINT} cannot be gone on from: training begins anew",
                style="yellow",
            )
            state = None
        if state is None:
            # Nothing of another run may be taken for this one's
            forget_run(self.folder)
            log.write_text("")
            return
        # 2. Restore all that the next step depends on, random states included.
        self.model.load_state_dict(state["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.restore(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.step, self.epoch, self.next_batch, self.epochs_since_best, stopped = state["place"]
        self.best = state["best"]
        self.stopped = bool(stopped)
        self.cpu_seconds = state["cpu_seconds"]
        self.curve = state["curve"]
        # 3. Cut the log back to the checkpoint: later steps are taken, and logged, again.
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        # An epoch's line counts only if the checkpoint was saved after the epoch's end.
        kept = [
            line
            for line in lines
            if line["step"] <= self.step and (line["kind"] == "step" or line["epoch"] < self.epoch)
        ]
        log.write_text("".join(json.dumps(line) + "\n" for line in kept))
        console.print(f"resumed at step {self.step} (epoch {self.epoch})", highlight=False)

    def _checkpoint(self) -> dict[str, Any] | None:
        """The newest checkpoint of this run; None without one that is whole."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
            return state if state["identity"] == self.identity else None
        except (
            RuntimeError,
            EOFError,
            OSError,
            KeyError,
            TypeError,
            ValueError,
            UnpicklingError,
        ) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            console.print(
                f"{path} is damaged ({reason}): training begins anew",
                style="yellow",
                highlight=False,
            )
            return None

    def _log(self, line: dict[str, Any]) -> None:
        with open(self.folder / METRICS, "a") as log:
            log.write(json.dumps(line) + "\n")

    def _summary(self) -> dict[str, Any]:
        return {
            "steps": self.step,
            "epochs": self.epoch,
            "best_validation_ndcg@10": self.best if math.isfinite(self.best) else None,
            "cpu_seconds": self.cpu_seconds,
            "curve": self.curve,
            "training": asdict(self.training),
        }


class Trainer(Loop):
    """A ranking run: grouped batches of requests, labels for every candidate."""

    training: Training

    def __init__(
        self,
        model: Ranker,
        encoder: Encoder,
        training: Training,
        folder: Path,
        identity: str,
        device: str = "cpu",
    ) -> None:
        super().__init__(model, training, folder, identity, device)
        self.encoder = encoder
        weights = [task.weight for task in encoder.contract.spec.tasks]
        self._weights_T = torch.tensor(weights).to(self.device)

    def fit(
        self, train: Encoded, validation: Encoded, stop_after: int | None = None
    ) -> dict[str, Any]:
        self.train = train
        self.validation = validation
        self.hidden = share_hidden(self.training, train)
        return self.run(stop_after)

    def plan(self, epoch: int) -> list[np.ndarray]:
        events = self.encoder.events_read(self.train)
        return batches(self.train.num_candidates, self.training, epoch, events)

    def load(self, chosen: np.ndarray) -> Batch:
        return self.encoder.collate(self.train, chosen)

    def losses(self, loaded: Batch) -> Iterator[tuple[Tensor, int]]:
        """Binary cross-entropy over the candidates of a batch, in one part."""
        # 1. On the host: what is hidden, of the step, so that a resumed run draws alike.
        batch = loaded
        rng = np.random.default_rng([self.training.seed, self.step])
        if self.hidden:
            batch = hide(self.encoder, batch, self.hidden, rng)
        batch = forget(self.encoder, batch, rng)
        samples = int(batch.candidates.mask_BC.sum())
        # 2. On the device, in one move.
        batch = batch.to(self.device)
        with autocast(self.device, self.training.precision):
            logits, further = cast(Ranker, self.model).training_forward(batch)
        loss = masked_bce(
            logits.float(), batch.labels_BCT, batch.candidates.mask_BC, self._weights_T
        )
        loss = loss if further is None else loss + further.float()
        yield loss, samples

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Log loss and NDCG@10 of the validation period: of each task where there are several, and
        over all of them under the weights that requests are ranked by.
        """
        logits = predict(cast(Ranker, model), self.encoder, self.validation)
        return quality(self.encoder.contract.spec, self.validation, logits)


def _schedule(step: int, total: int, warmup: int, final: float) -> float:
    """Linear warm-up, then a cosine to the share `final`."""
    if step < warmup:
        return (step + 1) / warmup
    cosine = 1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1.0))
    return final + (1 - final) / 2 * cosine


class _progress:
    """A bar with samples/s on a terminal; a line every ten seconds otherwise."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.samples = 0
        self.started = time.monotonic()
        self.reporter = ProgressLines()
        self.bar = (
            Progress(
                TextColumn("train"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Callable[..., None]:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("train", total=self.total, note="")
        return self._advance

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def _advance(self, step: int, note: str, samples: int = 0) -> None:
        self.samples += samples
        rate = f"{self.samples / max(time.monotonic() - self.started, 1e-9):,.0f} samples/s"
        if self.bar:
            self.bar.update(self.task, completed=step, note=f"{note}, {rate}")
        elif samples:
            self.reporter(f"train: step {step} of {self.total}, {note}, {rate}")


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Lines of a run's `metrics.jsonl`."""
    with open(folder / METRICS) as log:
        yield from (json.loads(line) for line in log)


def write_metrics(folder: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a whole `metrics.jsonl`."""
    with atomic_write(folder / METRICS) as draft:
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines))
