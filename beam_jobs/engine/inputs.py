"""The reasons why a run is stale: raw files that changed, output that is gone. Imports no Beam, so
that a skip costs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from beam_jobs.engine.plan import job_code
from feature_repo import datasets
from feature_repo.datasets import Dataset
from feature_repo.home.erased import erased_of
from feature_repo.home.tables import JobFolder, Manifest, digest_of
from feature_repo.raw.sources import sha256_of
from feature_repo.settings import Settings
from feature_repo.store.received import Received
from feature_repo.store.store import held_epoch, store_digest


def current_inputs(module: str, names: Iterable[str], settings: Settings) -> dict[str, str]:
    """Digest of each input as it is now.

    Args:
        module: of the job.
        names: "code", "store", "raw", "received", "views", "erased" or the name of a job; a job that
            has not run has no digest.
    """
    found = {}
    for name in names:
        if name == "code":
            found[name] = job_code(module, settings.dataset)
        elif name == "store":
            found[name] = store_digest(settings)
        elif name == "raw":
            found[name] = raw_digest(datasets.load(settings.dataset), settings.data)
        elif name == "received":
            contract = datasets.load_contract(settings.dataset)
            found[name] = Received(settings.home, contract).digest()
        elif name == "views":
            found[name] = datasets.load(settings.dataset).views_digest(settings.data)
        elif name == "erased":
            found[name] = erased_of(settings.home).digest
        elif manifest := JobFolder(settings.home, name).manifest():
            found[name] = manifest.digest
    return found


# What it means that the digest of an input changed
CHANGED = {
    "code": "the code changed",
    "raw": "raw files changed",
    "received": "events came by HTTP",
    "views": "files of custom views changed",
    "erased": "users were erased or allowed",
    "store": "the online store is another one",
}


def why_anew(published: Manifest, fingerprint: str, inputs: Mapping[str, str]) -> list[str]:
    """The reasons for which a job's published run is not the one that is asked for; none where only
    its options differ, or its output is gone.

    Args:
        fingerprint: of the contract in force.
        inputs: digests of the run that is asked for.
    """
    reasons = []
    if published.fingerprint != fingerprint:
        reasons.append(
            f"the declaration changed (contract {published.fingerprint} → {fingerprint})"
        )
    differ = [name for name in inputs if inputs[name] != published.inputs.get(name)]
    return [*reasons, *(CHANGED.get(name, f"{name} has run since") for name in differ)]


def raw_digest(dataset: Dataset, data: str | None) -> str:
    """Digest of the names and contents of all raw files, and of when they were written where rows
    arrive then.

    Raises:
        RawDataError: two files hold the same bytes, and nothing says which events are the same: a
            delivery that came twice, whose events would count twice.
    """
    digests = {file: sha256_of(file) for file in sorted(dataset.files(data))}
    first: dict[str, str] = {}
    for file, digest in digests.items():
        empty = digest == hashlib.sha256().hexdigest()
        if digest in first and not empty and not dataset.spec.event_identity:
            raise datasets.RawDataError(
                f"{file} holds the same bytes as {first[digest]}: one of them was delivered twice, and "
                "its events would count twice. Remove it, or say by SPEC.event_identity which events "
                "are the same"
            )
        first[digest] = file
    content = [[Path(file).name, digest] for file, digest in digests.items()]
    written = [[Path(file).name, at] for file, at in dataset.written(data).items()]
    return digest_of([*content, *written])


def output_is_there(job: str, settings: Settings) -> bool:
    """Return whether the online store still holds what the published run of a job wrote there; the
    store itself is asked.
    """
    manifest = JobFolder(settings.home, job).manifest()
    if manifest is None:
        return False
    return "store" not in manifest.inputs or held_epoch(settings, job) == manifest.run_id
