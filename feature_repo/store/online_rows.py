"""Rows into the online store, as they are: through Feast's value types and its store, but not
through pandas.

`FeatureStore.write_to_online_store` goes by way of pandas, and its Arrow converter by way of NumPy:
an int64 column with one null becomes float64 there, and values beyond 2⁵³ change. It also drops
whatever lies beyond the first Arrow chunk, and skips a batch of nothing but nulls, which is what
tombstones are, without an error.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from feature_repo.contract.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

MAX_ROWS = 10_000  # of one write


def write_rows(
    store: FeatureStore, view: str, rows: pa.Table, definition: FeatureView | None = None
) -> int:
    """Write rows of one view; returns how many there were.

    Args:
        rows: join keys, features, and both timestamps of the view; nulls are stored as "no value".
        definition: of the view; default: the registry is asked, which takes milliseconds, or for ever
            where it is away.
    """
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.type_map import python_values_to_proto_values

    definition = store.get_feature_view(view) if definition is None else definition
    # Types come from the view, since a column of nulls tells no type.
    keys = {column.name: column.dtype.to_value_type() for column in definition.entity_columns}
    kinds = {feature.name: feature.dtype.to_value_type() for feature in definition.features}
    for start in range(0, rows.num_rows, MAX_ROWS):
        piece = rows.slice(start, MAX_ROWS)
        values = {
            name: python_values_to_proto_values(_with_gaps(piece[name].to_pylist(), kind), kind)
            for name, kind in {**keys, **kinds}.items()
        }
        stamps, created = (piece[name].to_pylist() for name in (EVENT_TIMESTAMP, CREATED_TIMESTAMP))
        converted = [
            (
                EntityKey(join_keys=list(keys), entity_values=[values[name][row] for name in keys]),
                {name: values[name][row] for name in kinds},
                stamps[row],
                created[row],
            )
            for row in range(piece.num_rows)
        ]
        # `write_to_online_store` is passed by, since it goes by way of pandas.
        store._get_provider().online_write_batch(store.config, definition, converted, None)
    return rows.num_rows


def _with_gaps(values: list[Any], kind: Any) -> list[Any]:
    """Values whose lists of floats have NaN for a null, which Feast would write as 0."""
    if kind.name not in ("FLOAT_LIST", "DOUBLE_LIST"):
        return values
    return [
        None if value is None else [math.nan if number is None else number for number in value]
        for value in values
    ]
