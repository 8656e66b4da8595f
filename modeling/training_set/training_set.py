"""The training set on disk: periods joined point-in-time, encoded once, and read batch by batch.

```
training examples, part by part ─► join through Feast ─► joined rows ─► vocabularies
                                                            └─► featurise ─► shards, manifest last
```

Memory follows a shard and a batch, not the number of rows. What the shards depend on, tables,
contract, code and options, is in the name of their folder; the next run that asks for the same
reads them as they are.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.atomic import atomic_write
from feature_repo.history.token_log import TokenLog
from feature_repo.home.catalogue import TokenSpec
from feature_repo.home.code import code_digest
from feature_repo.home.tables import JobFolder, digest_of, held, locked
from feature_repo.settings import Settings
from modeling.console import ProgressLines, console
from modeling.errors import DataError, RunError
from modeling.inputs.augment import encoder_of
from modeling.inputs.columns import Index
from modeling.inputs.encoder import Encoded, Encoder
from modeling.inputs.relations import RELATIONS, Relations, read_relations, write_relations
from modeling.inputs.shards import MANIFEST, Rows, open_shards, write_shard
from modeling.inputs.vocabularies import read_vocabularies, write_vocabularies
from modeling.training_set.dataset import (
    SPLITS,
    Fitting,
    JoinedRequests,
    Warehouse,
    late_gather,
    refuse_nothing_positive,
)
from modeling.training_set.item_relations import fit_relations
from modeling.training_set.never_had import Sales, block_examples, never_had_examples
from modeling.training_set.sample import WHOLE, Sample
from modeling.training_set.simple_baselines import GRAPH, baseline_scores, graph_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from feast import FeatureStore

VOCABULARIES = "vocabularies.json"
# Prefix of a baseline's name among the columns of candidates
BASELINE = "baseline:"
# Candidates of a shard, or those of one request
SHARD_ROWS = 1 << 18
# Joined rows of a period that Great Expectations looks at
CHECKED_ROWS = 50_000
# Training sets that stay on disk
KEPT = 3


@dataclass(frozen=True)
class TrainingSetOptions:
    """Options of a training set.

    Args:
        service: feature service that is joined.
        min_item_count: rarer items share one embedding.
        tokens: version and shape of the stored summary tokens that are read.
        sample: which requests, and how much of their past.
    """

    service: str
    min_item_count: int
    tokens: TokenSpec | None = None
    sample: Sample = WHOLE


@dataclass(frozen=True)
class Period:
    """One period, encoded, with what evaluation needs beside the model's inputs.

    Args:
        users: a number for each request's user.
        log_rows: row of each request's user in the history log, -1 for none.
        history_lengths: events known before each request.
        baselines: scores of all candidates that need no training, by name; none of the training
            period.
        relation_rows: row of the relations of each candidate.
    """

    encoded: Encoded
    users: np.ndarray
    log_rows: np.ndarray
    history_lengths: np.ndarray
    baselines: dict[str, np.ndarray]
    relation_rows: Rows


@dataclass(frozen=True)
class TrainingSet:
    """A training set that is there: see `open_training_set`."""

    warehouse: Warehouse
    options: TrainingSetOptions
    identity: str
    folder: Path
    vocabularies: dict[str, Index]
    relations: Relations
    # By period: requests, candidates, shards
    counts: dict[str, dict[str, int]]
    # While this lives, no other process removes the shards
    hold: TextIO = field(repr=False)

    def encoder(
        self,
        history_length: int,
        *,
        tokens: bool = False,
        ablated: tuple[str, ...] = (),
        history_block: int = 1,
    ) -> Encoder:
        """The encoder of a ranker that reads so many events.

        Args:
            tokens: whether it reads stored summary tokens.
            ablated: inputs that are withheld from it.
            history_block: see `Encoder`.
        """
        shape = self.options.tokens.shape if tokens and self.options.tokens else (0, 0)
        contract = self.warehouse.contract
        return encoder_of(
            contract,
            self.vocabularies,
            history_length,
            shape,
            self.relations,
            ablated,
            history_block,
        )

    def period(self, name: str, *, tokens: bool = False) -> Period:
        """A period's requests, memory-mapped.

        Raises:
            DataError: the period has no request.
            ShardError: a shard is damaged or gone.
        """
        if not self.counts[name]["shards"]:
            raise DataError(f"the {name} period has no request")
        parts = range(self.counts[name]["shards"])
        requests, candidates = (
            open_shards([self.folder / f"{name}-{kind}-{part:05d}.arrow" for part in parts])
            for kind in ("requests", "candidates")
        )
        # Small columns are read; features stay on disk until a batch asks for them.
        log = self.warehouse.log
        rows = np.asarray(requests["log_row"])
        ends = np.asarray(requests["history_end"])
        # A user whom the log lacks has row -1 and an empty history.
        lengths = np.where(rows < 0, 0, ends)
        visible = self.options.sample.visible
        encoded = Encoded(
            times=np.asarray(requests["time"]),
            field_BU=requests["field"],
            dense_BG=requests["dense"],
            candidate_offsets=np.r_[0, np.cumsum(np.asarray(requests["candidates"]))],
            candidate_item=candidates["item"],
            candidate_category=candidates["category"],
            candidate_dense=candidates["dense"],
            labels=candidates["labels"],
            # The item vocabulary does not depend on the history length, so any length serves.
            item_of_key=self.encoder(1).items.indices_of(log.items),
            gather=late_gather(log, rows, ends, np.asarray(requests["time"]), visible),
            history_lengths=lengths if visible is None else np.minimum(lengths, visible),
        )
        # Summary tokens are gathered late, like histories.
        if tokens and self.options.tokens is not None:
            spec = self.options.tokens
            home = self.warehouse.settings.home
            token_log = TokenLog(self.warehouse.contract, home, spec.version)
            token_rows = np.asarray(requests["token_row"])
            encoded = replace(
                encoded,
                gather_tokens=lambda chosen: token_log.gather(token_rows[chosen], spec.shape),
            )
        names = [key for key in candidates if key.startswith(BASELINE)]
        baselines = {key.removeprefix(BASELINE): np.asarray(candidates[key]) for key in names}
        users = np.asarray(requests["user"])
        return Period(encoded, users, rows, lengths, baselines, candidates["relation"])

    def describe(self) -> str:
        """The dataset and its counts in a line."""
        counts = [f"{self.counts[name]['requests']:,} {name}" for name in SPLITS]
        return f"{self.warehouse.contract.spec.title}, requests: {', '.join(counts)}"


def open_training_set(
    settings: Settings, store: Callable[[Settings], FeatureStore], options: TrainingSetOptions
) -> TrainingSet:
    """The training set that these options ask for, made where it is not there.

    Args:
        store: opens what features are joined from, where the set must be made: Feast takes seconds to import.

    Raises:
        TableNotBuiltError: a Beam job has not run.
        StaleTableError: tables were built under another contract.
        JoinError: the offline store lost or moved rows.
        GateError: joined features break the contract.
        DataError: the training or validation period has no positive.
        RunError: another process makes this very set.
    """
    # 1. The folder's name says all that the shards depend on.
    warehouse = Warehouse(settings)
    token_run = None
    if options.tokens is not None:
        token_run = JobFolder(settings.home, "summary_tokens").require().digest
    identity = digest_of(
        [
            warehouse.digest,
            warehouse.contract.fingerprint,
            asdict(options),
            token_run,
            code_digest(
                "modeling.training_set.training_set", f"feature_repo.datasets.{settings.dataset}"
            ),
        ]
    )
    # 2. Make it unless it is there; hold it, so that no other process removes it.
    folder = Path(settings.path("training_sets", identity))
    try:
        hold = held(folder)
        if not (folder / MANIFEST).exists():
            # The shared lock of this very process would keep `locked` out as well.
            hold.close()
            with locked(folder):
                _build(warehouse, store(settings), options, folder)
            hold = held(folder)
    except BlockingIOError as error:
        raise RunError(
            f"another process makes the training set in {folder}: wait for it"
        ) from error
    manifest = json.loads((folder / MANIFEST).read_text())
    # Used just now: see `_forget_others`
    (folder / MANIFEST).touch()
    vocabularies = read_vocabularies(warehouse.contract, folder / VOCABULARIES)
    counts = manifest["periods"]
    relations = read_relations(folder / RELATIONS)
    return TrainingSet(warehouse, options, identity, folder, vocabularies, relations, counts, hold)


def _build(
    warehouse: Warehouse, store: FeatureStore, options: TrainingSetOptions, folder: Path
) -> None:
    """Write all shards, then the manifest."""
    for path in folder.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    fitting = Fitting(warehouse.contract, options.min_item_count)
    joined = join_periods(warehouse, store, options, folder / "joined", fitting, SHARD_ROWS)
    relations = relations_of(warehouse)
    encoder = Encoder(warehouse.contract, fitting.found(), 1, relations=relations)
    write_vocabularies(encoder, folder / VOCABULARIES)
    # Who reads the set later asks about its end, and not about its past.
    write_relations(relations.newest(), folder / RELATIONS)
    periods = _encode(warehouse, encoder, options, folder, joined)
    shutil.rmtree(folder / "joined")
    with atomic_write(folder / MANIFEST) as draft:
        draft.write_text(json.dumps({"options": asdict(options), "periods": periods}, indent=1))
    _forget_others(folder)


def join_periods(
    warehouse: Warehouse,
    store: FeatureStore,
    options: TrainingSetOptions,
    folder: Path,
    fitting: Fitting,
    most: int,
) -> dict[str, list[Path]]:
    """Features as of each request, in pieces on disk; and what the training period says of values.

    Args:
        most: rows of a piece, or one request's.

    Raises:
        JoinError: the offline store lost or moved rows.
        GateError: joined features break the contract.
        DataError: the training or validation period has no positive.
    """
    folder.mkdir()
    progress = ProgressLines()
    contract = warehouse.contract
    pieces: dict[str, list[Path]] = {name: [] for name in SPLITS}
    rows: dict[str, list[int]] = {name: [] for name in SPLITS}
    positives = {name: np.zeros(len(contract.labels), np.int64) for name in SPLITS}
    # 1. Join and check piece by piece, so that memory follows a piece, not a period.
    for split, examples in _pieces(warehouse, options, most):
        found = warehouse.join(store, options.service, split, examples, options.tokens)
        warehouse.refuse_broken(found, split)
        path = folder / f"{split}-{len(pieces[split]):05d}.arrow"
        _write_table(path, found)
        pieces[split].append(path)
        rows[split].append(len(found))
        positives[split] += [
            int(pc.sum(pc.equal(found[n], 1)).as_py() or 0) for n in contract.labels
        ]
        # Vocabularies and quantiles of the training period alone: later periods would leak.
        if split == "train":
            fitting.add(assembled(warehouse, found, options).requests)
        progress(f"training set: {sum(map(sum, rows.values())):,} candidates joined")
    # 2. Refuse periods without a positive; evaluation itself refuses the test period.
    for split in ("train", "validation"):
        refuse_nothing_positive(contract, split, positives[split])
    # 3. Great Expectations over rows from all over each period: every row's limits were checked above.
    for split in SPLITS:
        step = -(-sum(rows[split]) // CHECKED_ROWS) or 1
        if pieces[split]:
            warehouse.gate((_each(read_joined(path), step) for path in pieces[split]), split)
    return pieces


def relations_of(warehouse: Warehouse) -> Relations:
    """Relations of items over time, fitted once for all training sets of the same log.

    Raises:
        RunError: another process fits them.
    """
    tables = {job: warehouse.manifests[job].run_id for job in ("events", "user_history")}
    code = code_digest("modeling.training_set.item_relations")
    identity = digest_of([tables, warehouse.contract.fingerprint, code])
    path = Path(warehouse.settings.path("relations", f"{identity}.arrow"))
    try:
        with locked(path.parent):
            if path.exists():
                return read_relations(path)
            console.print("training set: which items go together", highlight=False)
            found = fit_relations(warehouse.contract, warehouse.log, warehouse.profiles())
            with atomic_write(path) as draft:
                write_relations(found, draft)
            for other in path.parent.glob("*.arrow"):
                if other != path:
                    other.unlink()
            return found
    except BlockingIOError as error:
        raise RunError(
            f"another process fits the relations of items in {path.parent}: wait for it"
        ) from error


def _pieces(
    warehouse: Warehouse, options: TrainingSetOptions, most: int
) -> Iterator[tuple[str, pa.Table]]:
    """Examples in pieces, under the protocol that is asked for."""
    protocol = options.sample.protocol
    every = options.sample.every
    pieces = warehouse.pieces(most, every, options.sample.of_user)
    if protocol is None:
        yield from pieces
        return
    contract = warehouse.contract
    if protocol.blocks:
        schema = warehouse.examples_schema()
        pieces = block_examples(contract, warehouse.log, schema, protocol.most, every)
    sales = Sales(contract, warehouse.item_stats(protocol.by), protocol.by)
    for split, examples in pieces:
        number = protocol.train_negatives if split == "train" else protocol.negatives
        yield split, never_had_examples(contract, warehouse.log, sales, protocol, examples, number)


def _encode(
    warehouse: Warehouse,
    encoder: Encoder,
    options: TrainingSetOptions,
    folder: Path,
    joined: dict[str, list[Path]],
) -> dict[str, dict[str, int]]:
    """The joined rows as numbers, a shard for each piece. Returns counts of each period."""
    progress = ProgressLines()
    users = dict[Any, int]()
    periods = {}
    for split, paths in joined.items():
        counts = {"requests": 0, "candidates": 0, "shards": len(paths)}
        for number, path in enumerate(paths):
            asked = assembled(warehouse, read_joined(path), options)
            encoded = encoder.featurise(asked.requests)
            baselines: dict[str, np.ndarray] = {}
            if split != "train":
                graph = graph_scores(encoder, encoded)
                baselines = {**baseline_scores(asked, options.sample.visible), GRAPH: graph}
            names = asked.users.to_pylist()
            _write_encoded(
                folder,
                f"{split}-{{}}-{number:05d}.arrow",
                encoded,
                asked,
                np.array([users.setdefault(name, len(users)) for name in names], np.int64),
                baselines,
                encoder.relations.rows_of(asked.requests.items)[asked.requests.candidate_keys],
            )
            counts["requests"] += len(encoded)
            counts["candidates"] += len(encoded.candidate_item)
            progress(f"training set: {split}, {counts['candidates']:,} candidates encoded")
        periods[split] = counts
    return periods


def _write_encoded(
    folder: Path,
    name: str,
    encoded: Encoded,
    asked: JoinedRequests,
    users: np.ndarray,
    baselines: dict[str, np.ndarray],
    relation_rows: np.ndarray,
) -> None:
    """A shard of requests, and one of their candidates."""
    requests = {
        "time": encoded.times,
        "user": users,
        "log_row": asked.log_rows,
        "history_end": asked.history_ends,
        "candidates": encoded.num_candidates,
        "field": encoded.field_BU,
        "dense": encoded.dense_BG,
    }
    if asked.token_rows is not None:
        requests["token_row"] = asked.token_rows
    candidates = {
        "item": encoded.candidate_item,
        "category": encoded.candidate_category,
        "dense": encoded.candidate_dense,
        "labels": encoded.labels,
        "relation": relation_rows.astype(np.int32),
    }
    candidates |= {f"{BASELINE}{key}": scores for key, scores in baselines.items()}
    write_shard(folder / name.format("requests"), requests)
    write_shard(folder / name.format("candidates"), candidates)


def assembled(
    warehouse: Warehouse, joined: pa.Table, options: TrainingSetOptions
) -> JoinedRequests:
    """Joined rows of whole requests, ready to encode."""
    rows = joined.drop_columns("request_id")
    sample = options.sample
    return warehouse.assemble(
        rows, joined["request_id"], options.tokens, sample.visible, sample.counts
    )


def _each(table: pa.Table, step: int) -> pa.Table:
    """Each so many-th row."""
    return table if step == 1 else table.take(pa.array(np.arange(0, len(table), step)))


def _write_table(path: Path, table: pa.Table) -> None:
    compressed = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, table.schema, options=compressed) as writer,
    ):
        writer.write_table(table)


def read_joined(path: Path) -> pa.Table:
    """A piece that `join_periods` wrote."""
    with pa.OSFile(str(path), "rb") as source:
        return pa.ipc.open_file(source).read_all()


def _forget_others(folder: Path) -> None:
    """Remove the sets that were used longest ago, and what killed runs left; none that somebody
    holds.
    """
    others = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    made = [path for path in others if (path / MANIFEST).exists()]
    made.sort(key=lambda path: (path / MANIFEST).stat().st_mtime)
    left = [path for path in others if path not in made]
    for old in [*left, *made[: len(made) - (KEPT - 1)]]:
        with suppress(BlockingIOError), locked(old):
            (old / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(old)
