"""The identity of summary tokens, which a bundle names, an envelope carries, and the server
matches.
"""

from __future__ import annotations

import hashlib
import json

from feature_repo.history import envelope
from feature_repo.history.transforms import VERSION as TRANSFORMS_VERSION
from modeling.inputs.encoder import Encoder
from modeling.models.base import Ranker

# Raised when the same weights would give other tokens
VERSION = 1


def _window(encoder: Encoder) -> int | tuple[int, int]:
    """Which events of a longer history are read."""
    window = encoder.window
    return window.length if window.block == 1 else (window.length, window.block)


def token_fingerprint(model: Ranker, encoder: Encoder) -> str | None:
    """32 hexadecimal digits over all that summary tokens depend on; None for a model that makes
    none.

    Weights, configuration and item vocabulary of stage 1, the events it reads, the contract, and
    the code's versions: a bundle that differs in stage 2 alone accepts the same tokens.
    """
    maker = model.token_maker
    if maker is None or maker.stage_1 is None:
        return None
    stage_1 = maker.stage_1
    identity = {
        "versions": [VERSION, TRANSFORMS_VERSION, envelope.LAYOUT],
        "contract": encoder.contract.fingerprint,
        "config": stage_1.token_config,
        "history_length": None if stage_1.streams else _window(encoder),
        "items": encoder.items.plain(),
        "events": {name: index.plain() for name, index in encoder.event.indices.items()},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name, weight in sorted(stage_1.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
