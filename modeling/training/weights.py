"""Weights on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from feature_repo.atomic import atomic_write
from modeling.models.base import Ranker

WEIGHTS = "best.safetensors"


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights as safetensors, with the permissions of the files beside them: the library's
    writer keeps them from everybody else.
    """
    path.write_bytes(save({name: tensor.cpu().contiguous() for name, tensor in weights.items()}))


def save_model(model: Ranker, folder: Path) -> None:
    """Write what a model is made of: texts, and last its weights, with which a run counts as trained."""
    for name, text in model.texts.items():
        with atomic_write(folder / name) as draft:
            draft.write_text(text)
    with atomic_write(folder / WEIGHTS) as draft:
        save_weights(model.state_dict(), draft)


def read_texts(model: Ranker, folder: Path) -> dict[str, str]:
    """Read the texts that a model is made of beside its weights.

    Raises:
        OSError: one cannot be read.
    """
    return {name: (folder / name).read_text() for name in model.text_names}
