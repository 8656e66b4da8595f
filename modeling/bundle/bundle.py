"""Bundle: all that serving reads of a run, in one folder, named by its digest.

`weights.safetensors`, `vocabularies.json`, `relations.arrow` (`inputs/relations.py`), `trees-0.txt` and so on where there are trees, in LightGBM's text format,
and `bundle.json`, which holds the config, the feature services, the contract that it was trained under, the metrics and the sha256 of every file. A bundle
is served under its own contract, for as long as the one in force has all that it reads. The
bundle's digest is the sha256 of `bundle.json`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from feature_repo.contract import contract as contracts
from feature_repo.contract import meaning
from feature_repo.contract.contract import Contract
from feature_repo.contract.declarations import lacks, plain, spec_of
from feature_repo.contract.meaning import Meaning
from feature_repo.errors import ExpectedError
from feature_repo.history.transforms import VERSION as TRANSFORMS_VERSION
from modeling.inputs.encoder import Encoder
from modeling.inputs.relations import RELATIONS, Relations, read_relations, write_relations
from modeling.inputs.vocabularies import read_vocabularies, write_vocabularies
from modeling.models.base import Ranker
from modeling.recipes import SERVICE_WITH_TOKENS, Recipe
from modeling.summaries.token_identity import token_fingerprint
from modeling.training.weights import read_texts, save_weights
from modeling.trees.blend import build_ranker

LAYOUT = 6
ENTRIES = (
    "dataset",
    "contract",
    "fingerprint",
    "recipe",
    "model",
    "config",
    "history_length",
    "online_service",
    "data_as_of",
    "dense_features",
    "tokens",
    "transforms",
    "trees",
    "files",
)
FILES = ("weights.safetensors", "vocabularies.json", RELATIONS)


class BundleError(ExpectedError, ValueError):
    """A bundle that must not be served; the message says why."""


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle: the model in evaluation mode and the encoder that feeds it."""

    digest: str
    path: Path
    manifest: dict[str, Any]
    model: Ranker
    encoder: Encoder

    @property
    def name(self) -> str:
        """Recipe and the first digits of the digest, as answers show it."""
        return f"{self.manifest['recipe']}@{self.digest[:12]}"

    @property
    def tokens(self) -> str | None:
        """The one token version that it accepts; None where it reads no summary tokens."""
        tokens = self.manifest["tokens"]
        return None if tokens is None else str(tokens["version"])

    @property
    def token_shape(self) -> tuple[int, int]:
        """S, D of those tokens; zeros without any."""
        tokens = self.manifest["tokens"]
        return (0, 0) if tokens is None else tuple(tokens["shape"])

    @property
    def makes_tokens(self) -> bool:
        """True if its own stage 1 makes the tokens that it accepts."""
        return self.model.token_shape is not None

    @property
    def learned(self) -> dict[str, Meaning]:
        """Meanings of the columns that it learned from; empty of a bundle that was exported before these were kept."""
        return meaning.from_json(self.manifest.get("columns", {}))

    def on(self, device: torch.device) -> Bundle:
        """The same bundle, its model moved to a device."""
        return replace(self, model=self.model.to(device))


def export(
    folder: Path,
    *,
    model: Ranker,
    encoder: Encoder,
    recipe: Recipe,
    metrics: dict[str, Any],
    trained_on: str,
    data_as_of: str,
    tokens: str | None = None,
    columns: dict[str, Any] | None = None,
) -> tuple[Path, str]:
    """Write a bundle under `folder/<recipe>-<digest>`; returns its path and digest. The same run
    gives the same digest.

    Args:
        tokens: the token version that the model was trained on, if a different model
            makes them.
        columns: what the columns meant that it learned from, as the tables' manifest says it.
    """
    draft = folder / f".{recipe.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_weights(model.state_dict(), draft / "weights.safetensors")
    write_vocabularies(encoder, draft / "vocabularies.json")
    write_relations(encoder.relations, draft / RELATIONS)
    for name, written in model.texts.items():
        (draft / name).write_text(written)
    # The manifest names and digests everything; the bundle's own digest is the manifest's.
    contract = encoder.contract
    accepted = tokens or token_fingerprint(model, encoder)
    shape = model.token_shape or encoder.tokens
    manifest = {
        "layout": LAYOUT,
        "dataset": contract.spec.name,
        "contract": plain(contract.spec),
        "fingerprint": contract.fingerprint,
        "recipe": recipe.name,
        "model": recipe.model,
        "config": recipe.config,
        "history_length": recipe.history_length,
        "history_block": recipe.history_block,
        "service": recipe.service,
        "online_service": f"{SERVICE_WITH_TOKENS if accepted else recipe.service}_online",
        "tokens": {"version": accepted, "shape": shape, "made_here": tokens is None}
        if accepted
        else None,
        "tasks": list(contract.labels),
        "trained_on": trained_on,
        "data_as_of": data_as_of,
        "columns": columns or {},
        "metrics": metrics,
        "dense_features": list(encoder.dense_names),
        "transforms": TRANSFORMS_VERSION,
        "trees": recipe.trees,
        "files": {name: sha256_of(draft / name) for name in (*FILES, *model.text_names)},
    }
    text = json.dumps(manifest, indent=1, sort_keys=True)
    (draft / "bundle.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    # Visible at once and whole.
    path = folder / f"{recipe.name}-{digest[:12]}"
    shutil.rmtree(path, ignore_errors=True)
    draft.rename(path)
    return path, digest


def load(path: Path, contract: Contract, expected_digest: str | None = None) -> Bundle:
    """Check a bundle and load it.

    Args:
        contract: the one in force; it must have all that the bundle's own has.
        expected_digest: what the catalogue says; a bundle with a different digest is refused.

    Raises:
        BundleError: missing or changed files, the wrong layout, dataset or contract, or weights that
            do not fit.
    """
    # 1. What the bundle says of itself, and whether it may be served here.
    digest, manifest = _manifest_of(path, expected_digest)
    if manifest["dataset"] != contract.spec.name:
        raise BundleError(
            f"{path} is of dataset {manifest['dataset']!r}, this server is of {contract.spec.name!r}"
        )
    own = contract_of(path, manifest)
    if lacking := lacks(own, contract):
        raise BundleError(
            f"{path} was trained under contract {manifest['fingerprint']}; the one in force, {contract.fingerprint}, has no "
            f"{', '.join(lacking)}: train and export again"
        )
    # 2. Its files, untouched; then what they hold.
    _check_files(path, manifest["files"])
    vocabularies = read_vocabularies(own, path / "vocabularies.json")
    tokens = manifest["tokens"] or {"made_here": True, "version": None}
    read = (0, 0) if tokens["made_here"] else tuple(tokens["shape"])
    relations = _relations_of(path)
    encoder = Encoder(
        own,
        vocabularies,
        manifest["history_length"],
        read,
        relations,
        # A bundle of before has none.
        manifest.get("history_block", 1),
    )
    features = {"dense_features": list(encoder.dense_names), "transforms": TRANSFORMS_VERSION}
    if (trained := {name: manifest[name] for name in features}) != features:
        raise BundleError(
            f"{path} was trained on {trained}, this version computes {features}: train and export again"
        )
    model = build_ranker(manifest["model"], manifest["config"], encoder.sizes, manifest["trees"])
    if extra := set(manifest["files"]) ^ {*FILES, *model.text_names}:
        raise BundleError(
            f"{path}: bundle.json lists files {sorted(manifest['files'])}; {sorted(extra)} are missing or none of its model's"
        )
    _load_weights(model, path)
    # 3. Tokens of these weights are known by them.
    made = token_fingerprint(model, encoder)
    if tokens["made_here"] and made != tokens["version"]:
        raise BundleError(
            f"{path} says that it makes tokens of version {tokens['version']}, this code makes {made}: export it again"
        )
    return Bundle(digest, path, manifest, model.eval(), encoder)


def _manifest_of(path: Path, expected_digest: str | None) -> tuple[str, dict[str, Any]]:
    """Digest and content of a bundle's `bundle.json`.

    Raises:
        BundleError: missing, changed, in an unknown layout, or without an entry.
    """
    file = path / "bundle.json"
    if not file.is_file():
        raise BundleError(
            f"{path} holds no bundle.json: it is no bundle, or was not exported to its end"
        )
    text = file.read_text()
    digest = hashlib.sha256(text.encode()).hexdigest()
    if expected_digest is not None and digest != expected_digest:
        raise BundleError(
            f"{path}: bundle.json has digest {digest[:12]}, the catalogue says {expected_digest[:12]}: it was changed after export"
        )
    try:
        manifest: dict[str, Any] = json.loads(text)
        layout = manifest["layout"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{file} is no bundle manifest: {error}") from error
    if layout != LAYOUT:
        raise BundleError(
            f"{path} has bundle layout {layout}; this version reads {LAYOUT}: train and export again"
        )
    if missing := [name for name in ENTRIES if name not in manifest]:
        raise BundleError(f"{file} lacks {missing}: export it again")
    return digest, manifest


def _check_files(path: Path, listed: dict[str, str]) -> None:
    """Refuse a bundle whose files differ from its list, by name and sha256.

    Raises:
        BundleError: it names the file.
    """
    if not set(FILES) <= set(listed):
        raise BundleError(
            f"{path}: bundle.json lists files {sorted(listed)}, a bundle has {sorted(FILES)}"
        )
    for name, expected in listed.items():
        if not (path / name).is_file() or (path / name).is_symlink():
            raise BundleError(f"{path}: file {name!r} is missing")
        if (found := sha256_of(path / name)) != expected:
            raise BundleError(
                f"{path}: {name} has sha256 {found[:12]}…, bundle.json says {expected[:12]}…: damaged or changed"
            )


def _relations_of(path: Path) -> Relations:
    """The relations of items that a bundle carries.

    Raises:
        BundleError: they cannot be read.
    """
    try:
        return read_relations(path / RELATIONS)
    except (ValueError, OSError, KeyError) as error:
        raise BundleError(f"{path}: relations.arrow cannot be read: {error}") from error


def _load_weights(model: Ranker, path: Path) -> None:
    """Set a model's weights from the bundle.

    Raises:
        BundleError: they cannot be read, are not finite, or do not fit.
    """
    try:
        weights = load_file(path / "weights.safetensors")
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path}: weights.safetensors cannot be read: {error}") from error
    if bad := sorted(
        name
        for name, tensor in weights.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ):
        raise BundleError(f"{path}: weights {bad} hold values that are no finite numbers")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise BundleError(
            f"{path}: weights do not fit the model that bundle.json describes: {error}"
        ) from error
    try:
        model.take_texts(read_texts(model, path))
    except (ValueError, OSError) as error:
        raise BundleError(f"{path}: trees cannot be read: {error}") from error


def contract_of(path: Path, manifest: dict[str, Any]) -> Contract:
    """The contract that a bundle was trained under, as it carries it.

    Raises:
        BundleError: it is no contract, or not the one whose fingerprint stands beside it.
    """
    try:
        own = contracts.contract(spec_of(manifest["contract"]))
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(
            f"{path}: bundle.json holds no contract that this version reads: {error}"
        ) from error
    if own.fingerprint != manifest["fingerprint"]:
        raise BundleError(
            f"{path}: bundle.json holds contract {own.fingerprint} and says that it is {manifest['fingerprint']}: changed, or "
            "made by another version; train and export again"
        )
    return own


def read_manifest(path: str | Path) -> dict[str, Any]:
    """`bundle.json` as it stands; `load` is what checks it."""
    found: dict[str, Any] = json.loads(Path(path, "bundle.json").read_text())
    return found


def sha256_of(path: Path) -> str:
    """Digest of a file, hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
