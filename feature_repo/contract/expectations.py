"""Great Expectations suites, derived from the contract, and the gate that stops a run before
anything is published.

Three gates: raw tables, built tables, training set. Each sees whole batches of rows, never single
rows in a hot path, writes Data Docs, and raises `GateError` when more than the allowed fraction of
rows is bad. Of a table of many millions a gate sees a sample of pieces from all over it: every row
is checked by `limits.py` as it is read, which is quick, and the docs are for people.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from feature_repo.atomic import atomic_write
from feature_repo.contract.schema import Column, Table
from feature_repo.errors import ExpectedError

BATCH_ROWS = 1_000_000
BATCH_BYTES = 1 << 28
# Rows of a larger table that are checked; a million take Great Expectations about five seconds
SAMPLED_ROWS = 200_000
# Great Expectations' pages fetch style, scripts and a logo from other hosts.
REMOTE = re.compile(
    r'<script[^>]*src="https?://[^>]*>\s*</script>|<link[^>]*href="https?://[^>]*>|<img[^>]*src="https?://[^>]*>'
)
STYLE = (
    "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}"
    ".d-none,.modal,svg{display:none}</style>"
)
Piece = TypeVar("Piece")
NUM_EXAMPLES = 3


class GateError(ExpectedError, ValueError):
    """Too many rows of a table are bad; nothing was published."""


@dataclass(frozen=True)
class ExpectationResult:
    """The outcome of one expectation over all batches of a table."""

    column: str
    expectation: str
    bad: int
    observed: list[Any]
    rows: list[dict[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class Verdict:
    """The outcome of a gate: rows seen, rows with at least one failure, findings, and where the
    Data Docs are.
    """

    suite: str
    rows: int
    bad_rows: int
    findings: list[ExpectationResult]
    docs: str

    @property
    def bad_fraction(self) -> float:
        """Share of rows with at least one failure."""
        return self.bad_rows / self.rows if self.rows else 0.0


def check(
    table: Table, batches: Iterable[pa.Table], docs_folder: str | Path, *, suite: str | None = None
) -> Verdict:
    """Validate a table, batch by batch, and write Data Docs.

    Args:
        table: the contract's table; every limit of every column becomes an expectation.
        batches: the rows; each batch is validated as a whole.
        docs_folder: folder of the Great Expectations project that collects the Data Docs.
        suite: name of the suite; the table's name unless given.
    """
    Path(docs_folder).mkdir(parents=True, exist_ok=True)
    with open(Path(docs_folder, ".lock"), "w") as file:
        # A project is files; a run that comes meanwhile waits for its turn
        fcntl.flock(file, fcntl.LOCK_EX)
        return _check(table, batches, docs_folder, suite or table.name)


def _check(
    table: Table, batches: Iterable[pa.Table], docs_folder: str | Path, name: str
) -> Verdict:
    site = Path(docs_folder, "gx", "uncommitted", "data_docs", "local_site")
    draft = Path(docs_folder, ".draft")
    # What a killed check left
    shutil.rmtree(draft, ignore_errors=True)
    gx, context = _context(draft)
    expectations = expectations_of(table)
    context.suites.add_or_update(
        gx.ExpectationSuite(name=name, expectations=[e for e, _ in expectations])
    )
    definition = _definition(gx, context, name)

    merged: dict[tuple[str, str], ExpectationResult] = {}
    rows = bad_rows = 0
    for batch in batches:
        frame = _frame(batch)
        # A mask counts a row once, however many expectations the row breaks.
        bad = np.zeros(len(frame), bool)
        result = definition.run(
            batch_parameters={"dataframe": frame},
            result_format={"result_format": "COMPLETE", "partial_unexpected_count": NUM_EXAMPLES},
        )
        for outcome in result.results:
            if outcome.success:
                continue
            index = np.asarray(outcome.result.get("unexpected_index_list") or [], dtype=np.int64)
            # It failed without naming a row: it could not run
            if not len(index):
                config = outcome.expectation_config
                raise GateError(
                    f"suite {name!r}: {config.type} on {config.kwargs} could not run: {_exceptions(outcome)}. Nothing was published"
                )
            bad[index] = True
            _merge(merged, outcome, frame, index)
        rows += len(frame)
        bad_rows += int(bad.sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context.build_data_docs()
    docs = _published(draft, site)
    return Verdict(name, rows, bad_rows, list(merged.values()), str(docs))


def _published(draft: Path, site: Path) -> Path:
    """Move the pages of one check to those of others, each whole: without what they fetch from elsewhere,
    in a style of their own. Returns an index that needs no script.
    """
    for page in sorted(draft.rglob("*.html")):
        # Its index knows this check alone
        if page.parent == draft:
            continue
        text = REMOTE.sub("", page.read_text()).replace("</head>", f"{STYLE}</head>", 1)
        page.write_text(text)
        there = site / page.relative_to(draft)
        there.parent.mkdir(parents=True, exist_ok=True)
        page.replace(there)
    shutil.rmtree(draft, ignore_errors=True)
    return _index_of(site)


def _index_of(site: Path) -> Path:
    """An index of all suites and their validations."""
    lines = []
    for suite in sorted(site.glob("expectations/*.html")):
        runs = sorted(site.glob(f"validations/{suite.stem}/**/*.html"), reverse=True)
        links = "".join(
            f'<li><a href="{run.relative_to(site)}">{run.parent.name}</a></li>' for run in runs[:20]
        )
        lines.append(
            f'<h2>{suite.stem}</h2><p><a href="{suite.relative_to(site)}">what is expected</a>; validations, newest first:</p>'
            f"<ul>{links}</ul>"
        )
    site.mkdir(parents=True, exist_ok=True)
    index = site / "index.html"
    with atomic_write(index) as draft:
        draft.write_text(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Data Docs</title>{STYLE}</head>'
            f"<body><h1>Data Docs</h1>{''.join(lines)}</body></html>"
        )
    return index


def gate(
    table: Table,
    batches: Iterable[pa.Table],
    docs_folder: str | Path,
    max_bad_fraction: float,
    *,
    suite: str | None = None,
) -> Verdict:
    """`check`, and stop when too many rows are bad.

    Raises:
        GateError: names suite, column, expectation, observed value and three offending rows; also
            where an expectation cannot run, as on a column that is missing.
    """
    verdict = check(table, batches, docs_folder, suite=suite)
    if verdict.bad_fraction > max_bad_fraction:
        lines = [
            f"suite {verdict.suite!r}: {verdict.bad_rows:,} of {verdict.rows:,} rows are bad ({verdict.bad_fraction:.1%}); "
            f"--max_bad_fraction allows {max_bad_fraction:.1%}. Nothing was published. Data Docs: {verdict.docs}"
        ]
        for finding in sorted(verdict.findings, key=lambda f: -f.bad):
            lines.append(
                f"  column {finding.column!r}, {finding.expectation}: {finding.bad:,} bad, observed {finding.observed}; rows:"
            )
            lines += [f"    {row}" for row in finding.rows]
        raise GateError("\n".join(lines))
    return verdict


def expectations_of(table: Table) -> list[tuple[Any, Column | None]]:
    """The expectations that a table's columns imply."""
    # The library is slow to import, and most commands run no gate.
    import great_expectations.expectations as gxe

    found: list[tuple[Any, Column | None]] = []
    for column in table.all_columns:
        name = column.name
        if not column.nullable:
            found.append((gxe.ExpectColumnValuesToNotBeNull(column=name), column))
        if column.minimum is not None or column.maximum is not None:
            bounds = {"min_value": column.minimum, "max_value": column.maximum}
            found.append((gxe.ExpectColumnValuesToBeBetween(column=name, **bounds), column))
        if column.values is not None:
            found.append(
                (
                    gxe.ExpectColumnValuesToBeInSet(column=name, value_set=list(column.values)),
                    column,
                )
            )
        if column.pattern is not None:
            found.append(
                (gxe.ExpectColumnValuesToMatchRegex(column=name, regex=column.pattern), column)
            )
    # Rows with a null in one of these columns are compared as well.
    if table.unique:
        unique = {"column_list": list(table.unique), "ignore_row_if": "never"}
        found.append((gxe.ExpectCompoundColumnsToBeUnique(**unique), None))
    return found


def spread(pieces: Sequence[Piece], rows: Sequence[int]) -> list[Piece]:
    """Pieces from all over a table, as many as hold `SAMPLED_ROWS` together: all of a small one.

    Args:
        rows: of each piece; -1 where that is not known.
    """
    total = sum(max(number, 0) for number in rows)
    if total <= SAMPLED_ROWS:
        return list(pieces)
    wanted = max(len(pieces) * SAMPLED_ROWS // total, 1)
    chosen = np.unique(np.linspace(0, len(pieces) - 1, wanted).astype(np.int64))
    return [pieces[at] for at in chosen]


def first_rows(tables: Iterable[pa.Table], rows: int = 2 * BATCH_ROWS) -> Iterable[pa.Table]:
    """Tables until so many rows are seen: a compressed file has no pieces to choose from."""
    for table in tables:
        if rows <= 0:
            return
        yield table.slice(0, rows)
        rows -= table.num_rows


def rebatch(tables: Iterable[pa.Table], rows: int = BATCH_ROWS) -> Iterable[pa.Table]:
    """Join small tables until a batch has at least `rows` rows or many bytes: a run of a suite has
    a fixed cost.
    """
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(t.num_rows for t in held) >= rows or sum(t.nbytes for t in held) >= BATCH_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _context(draft: Path) -> tuple[Any, Any]:
    """Great Expectations without a project of files, which a killed check would leave half-written; its
    Data Docs go to a folder that it does not share, because it removes whatever it does not know there.
    """
    # The library reads the variable when it is imported, so the setting comes before.
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import logging

    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    # Without the docs site of its own, a folder that nobody would remove.
    stores = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
    config = DataContextConfig(store_backend_defaults=stores)
    context = gx.get_context(mode="ephemeral", project_config=config)
    context.add_data_docs_site(
        "local_site",
        {
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {
                "class_name": "TupleFilesystemStoreBackend",
                "base_directory": str(draft),
            },
        },
    )
    # A progress bar for each batch would fill the log of a job.
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    return gx, context


def _definition(gx: Any, context: Any, name: str) -> Any:
    asset = context.data_sources.add_pandas("frames").add_dataframe_asset(name)
    batch = asset.add_batch_definition_whole_dataframe("whole")
    return context.validation_definitions.add(
        gx.ValidationDefinition(name=name, data=batch, suite=context.suites.get(name))
    )


def _frame(batch: pa.Table) -> Any:
    """As pandas, without columns whose values GX cannot count (bytes, lists)."""
    plain = [
        f.name for f in batch.schema if not (pa.types.is_binary(f.type) or pa.types.is_list(f.type))
    ]
    whole = batch.select(plain).to_pandas(integer_object_nulls=True, timestamp_as_object=False)
    for name in set(batch.column_names) - set(plain):
        whole[name] = batch[name].is_valid().to_pandas().map({True: "present", False: None})
    return whole


def _exceptions(outcome: Any) -> str:
    info = outcome.exception_info or {}
    nested = [value for value in info.values() if isinstance(value, dict)] or [info]
    return "; ".join(str(value.get("exception_message")) for value in nested)


def _merge(
    merged: dict[tuple[str, str], ExpectationResult], outcome: Any, frame: Any, index: np.ndarray
) -> None:
    config = outcome.expectation_config
    column = str(config.kwargs.get("column") or config.kwargs.get("column_list"))
    previous = merged.get((column, config.type))
    bad = int(outcome.result.get("unexpected_count") or len(index))
    rows = [
        {str(k): v for k, v in row.items()}
        for row in frame.iloc[index[:NUM_EXAMPLES]].to_dict("records")
    ]
    observed = list(outcome.result.get("partial_unexpected_list") or [])[:NUM_EXAMPLES]
    if previous:
        bad += previous.bad
        rows = (previous.rows + rows)[:NUM_EXAMPLES]
        observed = (previous.observed + observed)[:NUM_EXAMPLES]
    merged[column, config.type] = ExpectationResult(column, config.type, bad, observed, rows)
