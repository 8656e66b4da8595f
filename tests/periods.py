"""Periods of a training set as a whole, before they are numbers: what tests look at, and no ranker reads."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from feature_repo.contract.arrow import arrow_schema
from feature_repo.contract.contract import Contract
from feature_repo.home.catalogue import TokenSpec
from modeling.inputs.columns import Index
from modeling.training_set.dataset import Fitting, JoinedRequests, Warehouse

ROWS_AT_A_TIME = 1 << 18


def examples_of(warehouse: Warehouse, period: str) -> pa.Table:
    """Training examples of one period, candidates of a request together."""
    nothing = arrow_schema(warehouse.contract.table("training_examples")).empty_table()
    own = [rows for name, rows in warehouse.pieces(ROWS_AT_A_TIME) if name == period]
    return pa.concat_tables([nothing, *own]).combine_chunks()


def joined_period(
    warehouse: Warehouse, store: Any, service: str, period: str, tokens: TokenSpec | None = None
) -> JoinedRequests:
    """One period, joined and ready to encode."""
    joined = warehouse.join(store, service, period, examples_of(warehouse, period), tokens)
    warehouse.gate([joined], period)
    return warehouse.assemble(joined.drop_columns("request_id"), joined["request_id"], tokens)


def vocabularies(
    contract: Contract, train: JoinedRequests, min_item_count: int
) -> dict[str, Index]:
    """Vocabularies of a training period that is at hand as a whole."""
    fitting = Fitting(contract, min_item_count)
    fitting.add(train.requests)
    return fitting.found()
