"""Metrics of a trained run, measured once and kept in its `run.json`."""

from __future__ import annotations

from typing import Any

from feature_repo.home.code import code_digest
from modeling.claims import PAIRED, Sums, read_sums, write_sums
from modeling.evaluation.evaluate import measure, plain_metrics
from modeling.evaluation.trained_baselines import sums_by_user
from modeling.inputs.tasks import primary_number, primary_task
from modeling.summaries.as_served import as_served
from modeling.training.trainer import PER_USER, locked_run, predict
from modeling.training.training_run import TrainingRun, load_trained, write_result
from modeling.training_set.encodings import Encodings


def measured(run: TrainingRun, encodings: Encodings, device: str = "cpu") -> dict[str, Any]:
    """Measure a trained run on the test period as it would be served, once, for comparisons: `run.json` then holds the
    metrics of the primary task as `test` and of each as `tasks`, and `sums_of` reads them by user.

    `evaluate` measures more: baselines, calibration, degraded answers.

    Raises:
        RunError: another process works on this very run.
    """
    state = run.state
    code = code_digest("modeling.metrics", "modeling.summaries.as_served")
    if state.get("tested_by") == code and (run.folder / PER_USER).exists():
        return state
    with locked_run(run.folder):
        return _measured(run, encodings, device, state, code)


def _measured(
    run: TrainingRun, encodings: Encodings, device: str, state: dict[str, Any], code: str
) -> dict[str, Any]:
    model, encoder = load_trained(run)
    period = encodings.period(run.recipe, "test")
    model = model.to(device)
    logits = predict(model, encoder, as_served(model, encoder, period.encoded))
    spec = encoder.contract.spec
    by_task = {
        task.name: plain_metrics(measure(period.encoded, period.users, logits[:, number], number))
        for number, task in enumerate(spec.tasks)
    }
    primary = primary_number(spec)
    write_sums(run.folder / PER_USER, sums_by_user(period, logits[:, primary], primary))
    found = {"tested_by": code, "test": by_task[primary_task(spec)], "tasks": by_task}
    return write_result(run, state | found)


def validated(run: TrainingRun, encodings: Encodings, device: str = "cpu") -> dict[str, float]:
    """The claimed metrics of a trained run on the validation period, measured once: trials are chosen by them.

    Raises:
        RunError: another process works on this very run.
    """
    state = run.state
    code = code_digest("modeling.metrics")
    if state.get("validated_by") != code:
        with locked_run(run.folder):
            model, encoder = load_trained(run)
            period = encodings.period(run.recipe, "validation")
            number = primary_number(encoder.contract.spec)
            scores = predict(model.to(device), encoder, period.encoded)[:, number]
            sums = sums_by_user(period, scores, number)
            found = {metric: sums[metric].value for metric in PAIRED}
            state = write_result(run, state | {"validated_by": code, "validation": found})
    kept: dict[str, float] = state["validation"]
    return kept


def sums_of(run: TrainingRun) -> Sums:
    """The paired metrics of a measured run, by user.

    Raises:
        ShardError: they are damaged or gone.
    """
    return read_sums(run.folder / PER_USER)
