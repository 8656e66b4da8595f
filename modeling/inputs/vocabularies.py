"""Vocabularies of an encoder as a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from feature_repo.contract.arrow import arrow_type
from feature_repo.contract.contract import Contract
from modeling.inputs.columns import Index, event_key, index_of, stored_type
from modeling.inputs.encoder import Encoder


def write_vocabularies(encoder: Encoder, path: Path) -> None:
    """Write an encoder's vocabularies as JSON, by column."""
    plain = {name: index.plain() for name, index in encoder.vocabularies.items()}
    path.write_text(json.dumps(plain))


def read_vocabularies(contract: Contract, path: Path) -> dict[str, Index]:
    """Vocabularies that `write_vocabularies` wrote."""
    stored: dict[str, Any] = json.loads(path.read_text())
    types = {contract.item.join_key: arrow_type(contract.item.dtype)}
    columns = (*contract.request_features, *contract.candidate_features)
    types |= {column.name: stored_type(column) for column in columns}
    # Events hold codes of their values (`arrow.value_codes`), whatever the type of those.
    types |= {event_key(column.name): pa.int64() for column in contract.event_features}
    return {name: index_of(values, types[name]) for name, values in stored.items()}
