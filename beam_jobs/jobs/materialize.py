"""Job `materialize`: the online store holds the newest row of each key of every view, and nothing
of keys that are gone; and of users also what was acknowledged since (`user_records.py`).

`feast materialize` does the first half for small repos and is the oracle: a test compares the two,
value for value. The second half is for corrections: a key that an earlier run sent online and that
the tables no longer have gets a row of nulls. Which keys were sent is written down before they are,
so that a killed run's keys are known too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from beam_jobs.engine.bundles import TrainedBundle, bundle_at
from beam_jobs.engine.job import Job
from beam_jobs.engine.options import OnlineOptions
from beam_jobs.engine.partition import to_ipc
from beam_jobs.engine.parts import Built, write_built
from beam_jobs.engine.plan import RunPlan, Unit
from beam_jobs.engine.steps import Each
from beam_jobs.jobs.user_records import (
    RECORDS,
    WriteOnline,
    record_schema,
    records_of,
    tombstones,
    users_by_http,
)
from feature_repo import datasets
from feature_repo.contract.arrow import arrow_schema, micros
from feature_repo.contract.counts import Counts
from feature_repo.contract.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP
from feature_repo.history.history import newest_rows
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.erased import erased_of
from feature_repo.home.known_users import KEYS, KNOWN_USERS, codes_file
from feature_repo.home.sent import note_sent
from feature_repo.home.tables import parquet_bytes
from feature_repo.settings import Settings
from feature_repo.store.online_rows import write_rows
from feature_repo.store.online_users import HISTORY, STATS
from feature_repo.store.received import Received
from feature_repo.store.store import id_of_store, note_columns, note_epoch, open_store

ViewRows = tuple[str, bytes]  # view, Arrow IPC


@dataclass
class Materialize(beam.PTransform):
    """Parts of view tables → keys written down → rows online; then the keys that are gone."""

    plan: RunPlan

    def expand(self, units: beam.PCollection) -> beam.PCollection:
        """Keys that are gone wait for all that is here to be written down."""
        plan = self.plan
        # 1. Send the newest row of each key.
        present = (
            units
            | "Spread parts" >> beam.Reshuffle()
            | "Newest of each key"
            >> beam.ParDo(Each(plan, newest_of_part)).with_output_types(ViewRows)
            | "Write online" >> beam.ParDo(WriteOnline(plan)).with_output_types(tuple[str, int])
        )
        # The sum is there only once every row is written, so that the next stage waits for it.
        written = present | "Count by view" >> beam.CombinePerKey(sum)
        # 2. Send rows of nulls for the keys that are gone.
        gone = (
            written
            | "Keys that are gone" >> beam.ParDo(Each(plan, gone_rows)).with_output_types(ViewRows)
            | "Write nothing for them"
            >> beam.ParDo(WriteOnline(plan)).with_output_types(tuple[str, int])
        )
        # 3. Note how many rows of each view were sent.
        notes = (
            written | "Note rows" >> beam.ParDo(Each(plan, note_online)).with_output_types(str),
            gone | "Note gone" >> beam.ParDo(Each(plan, note_gone)).with_output_types(str),
        )
        return notes | beam.Flatten()


def newest_of_part(plan: RunPlan, unit: Unit) -> Iterator[ViewRows]:
    """Newest row of each key in one part; parts are partitioned by key, so these are the newest of
    all.

    The keys are written down first: from then on they count as online, whatever becomes of this
    run.
    """
    table = plan.contract.table(unit.table)
    newest = _newest(plan, unit.table, plan.read_unit(unit))
    # Before the rows: were the run killed between the two, the next one would not know what is
    # online.
    keys = newest.select(list(table.join_keys))
    write_built(
        plan,
        Built(KEYS, f"{unit.table}-{unit.number:05d}.parquet", parquet_bytes(keys), keys.num_rows),
    )
    if unit.table != STATS:
        yield unit.table, to_ipc(newest)
        return
    codes = codes_file(keys[table.join_keys[0]])
    write_built(plan, Built(KNOWN_USERS, f"{unit.number:05d}.arrow", codes, keys.num_rows))
    histories = plan.input_folder("user_history").read_path(_beside(plan, unit))
    records = records_of(plan.contract, newest, _newest(plan, HISTORY, histories))
    yield RECORDS, to_ipc(records)


def _newest(plan: RunPlan, view: str, rows: pa.Table) -> pa.Table:
    """The newest row of each key that the run may know."""
    entity = plan.contract.table(view).entity
    assert entity is not None
    if plan.as_of is not None:
        known = np.maximum(micros(rows[EVENT_TIMESTAMP]), micros(rows[CREATED_TIMESTAMP]))
        rows = rows.filter(pa.array(known <= plan.as_of))
    return newest_rows(rows, entity.join_key) if rows.num_rows else rows


def _beside(plan: RunPlan, unit: Unit) -> str:
    """The part of packed histories that holds the users of a part of statistics."""
    name = unit.source.part.path.rpartition("/")[2]
    parts = plan.pinned["user_history"].tables[HISTORY]
    (found,) = (part for part in parts if part.path.rpartition("/")[2] == name)
    return plan.input_folder("user_history").verified(found)


def gone_rows(plan: RunPlan, written: tuple[str, int]) -> Iterator[ViewRows]:
    """Rows of nulls for the keys of a view that some earlier run sent online and this one does
    not.

    Args:
        written: the view, and how many rows of it are online by now.
    """
    view, _ = written
    # A record's views go together.
    if view == HISTORY:
        return
    table = plan.contract.table(view)
    root = plan.folder.root
    key = table.join_keys[0]
    # 1. Read the keys that runs wrote down, those of this run apart.
    sent: dict[bool, list[pa.Table]] = {True: [], False: []}
    for info in plan.folder.filesystem.get_file_info(
        pafs.FileSelector(root, recursive=True, allow_not_found=True)
    ):
        _, _, below = info.path.rpartition(f"{root.strip('/')}/")
        run_id, _, rest = below.partition("/")
        if rest.startswith(f"{KEYS}/{view}-") and info.path.endswith(".parquet"):
            sent[run_id == plan.run_id].append(plan.folder.read_path(info.path))
    if not sent[False] and view != STATS:
        return
    # 2. Find the keys that only earlier runs sent.
    schema = arrow_schema(table)
    earlier = pc.unique(_keys(sent[False], schema.field(key)))
    here = _keys(sent[True], schema.field(key)).combine_chunks()
    if view == STATS:
        # Users of whom nothing is known but what came since have a record as well.
        earlier = pc.unique(pa.concat_arrays([earlier, users_by_http(plan)]))
    gone = earlier.filter(pc.invert(pc.is_in(earlier, here)))
    if not len(gone):
        return
    # 3. Give each a row of nulls, stamped with this run's time; users also what came since.
    is_record = view == STATS
    columns = record_schema(plan.contract) if is_record else schema
    rows = tombstones(columns, key, gone, plan.as_of or 0)
    yield (RECORDS if is_record else view), to_ipc(rows)


def _keys(sent: Sequence[pa.Table], field: pa.Field) -> pa.ChunkedArray:
    """Keys that runs wrote down."""
    return pa.chunked_array(
        [chunk for keys in sent for chunk in keys[field.name].cast(field.type).chunks], field.type
    )


def note_online(plan: RunPlan, written: tuple[str, int]) -> Iterator[str]:
    """Write down how many rows of a view went online."""
    yield _note(plan, *written, "online")


def note_gone(plan: RunPlan, written: tuple[str, int]) -> Iterator[str]:
    """Write down how many keys of a view lost their values online."""
    yield _note(plan, *written, "gone")


def _note(plan: RunPlan, view: str, rows: int, what: str) -> str:
    data = f'{{"rows": {rows}}}'.encode()
    counts = Counts({f"{what}_{view}": rows})
    return write_built(plan, Built("materialized", f"{view}-{what}.json", data, rows, counts))


def refuse_to_break_the_live_bundle(plan: RunPlan, settings: Settings) -> None:
    """Refuse to replace what servers read with rows that lack some of it, or mean something else.

    Raises:
        BreaksLiveError: the live bundle was trained on features that the contract in force does not
            have, or on columns that are declared otherwise by now and whose values moved.
    """
    assert isinstance(plan.options, OnlineOptions)
    live = live_bundle(plan, settings)
    if live is not None and not plan.options.break_live:
        live.refuse_lacking(plan.contract)
        live.refuse_other_meaning(plan.pinned["events"].columns)


def live_bundle(plan: RunPlan, settings: Settings) -> TrainedBundle | None:
    """The live bundle of a run's dataset; None where no server could load a bundle."""
    live = Catalogue(settings.catalogue_url).live_or_none(plan.dataset)
    if live is None:
        return None
    return bundle_at(settings.path(live.path), f"{live.recipe}@{live.digest[:12]}")


def write_own_views(plan: RunPlan, settings: Settings) -> None:
    """The newest row of each key of custom feature views → online store; nothing of keys that an earlier
    run sent and the file no longer has, unless somebody pushed a newer row meanwhile.
    """
    dataset = datasets.load(plan.dataset)
    for view in dataset.spec.views:
        schema = arrow_schema(plan.contract.table(view.name))
        read = pq.read_table(dataset.path_of(view, settings.data))
        # Theirs may have one time where ours have two.
        ours = {EVENT_TIMESTAMP: view.timestamp, CREATED_TIMESTAMP: view.created or view.timestamp}
        columns = [read[ours.get(f.name, f.name)].cast(f.type) for f in schema]
        rows = pa.table(columns, schema=schema)
        # A row is known once it has happened and was created, whichever is later.
        if plan.as_of is not None:
            known = np.maximum(micros(rows[EVENT_TIMESTAMP]), micros(rows[CREATED_TIMESTAMP]))
            rows = rows.filter(pa.array(known <= plan.as_of))
        key = plan.contract.table(view.name).join_keys[0]
        newest = newest_rows(rows, key) if rows.num_rows else rows
        earlier = _sent_before(plan, view.name, schema)
        # An erased user gets no row, not even one of nulls: the key itself must stay away.
        if key == plan.contract.user.join_key:
            erased = erased_of(plan.home)
            newest = erased.without(newest, key)
            earlier = erased.without(earlier, key)
        gone = earlier.filter(pc.invert(pc.is_in(earlier[key], newest[key].combine_chunks())))
        # Before the rows: were this run killed between the two, the next one would not know.
        _note_sent(plan, view.name, pa.concat_tables([newest, gone]), key)
        written = pa.concat_tables([gone, newest])
        if written.num_rows:
            write_rows(open_store(settings), view.name, written)
        _note_sent(plan, view.name, newest, key)


def _sent_before(plan: RunPlan, view: str, schema: pa.Schema) -> pa.Table:
    """Keys that earlier runs sent of a custom view, as rows of nulls at the time that each was sent with:
    a row that is newer stays.
    """
    data = plan.folder.read_bytes(_sent_file(plan, view))
    if data is None:
        return schema.empty_table()
    sent = pq.read_table(pa.BufferReader(data))
    columns = [
        sent[f.name].cast(f.type) if f.name in sent.column_names else pa.nulls(len(sent), f.type)
        for f in schema
    ]
    return pa.table(columns, schema=schema)


def _note_sent(plan: RunPlan, view: str, rows: pa.Table, key: str) -> None:
    sent = rows.select([key, EVENT_TIMESTAMP, CREATED_TIMESTAMP])
    plan.folder.write_bytes(_sent_file(plan, view), parquet_bytes(sent))


def _sent_file(plan: RunPlan, view: str) -> str:
    """Beside the runs, since it is of all of them."""
    return f"{plan.folder.root}/sent-{view}.parquet"


def _drift(live: TrainedBundle | None, columns: Mapping[str, Any]) -> list[str]:
    """A line on the columns whose values moved since a bundle learned from them; no line where nothing moved."""
    since = [] if live is None else [str(m) for m in live.moved(columns) if m.worth_saying]
    return [f"since {live.name} learned: {'; '.join(since)}"] if live and since else []


class MaterializeJob(Job):
    """Newest rows → online store; every view is written."""

    name = "materialize"
    doc = "newest row of each key → online store"
    reads: ClassVar = {
        "events": ("user_profile", "item_profile"),
        # A record's row of statistics; its packed history is read beside it.
        "user_history": (STATS,),
        "item_stats": ("item_stats",),
    }
    options = OnlineOptions
    also_depends_on = ("views", "erased")
    writes_online = True

    def gate(self, plan: RunPlan, units: Sequence[Unit], settings: Settings) -> str | None:
        """Refuse to replace what servers read with rows that lack some of it."""
        refuse_to_break_the_live_bundle(plan, settings)
        return None

    def steps(self, plan: RunPlan) -> beam.PTransform:
        """Parts of views → rows online."""
        return Materialize(plan)

    def held(self, plan: RunPlan) -> AbstractContextManager[None]:
        """Keep acknowledged events in the log while records are merged with them."""
        return Received(plan.home, plan.contract).merging()

    def num_parts(self, plan: RunPlan, units: int) -> int:
        """Keys of each unit, twice of users, and a note of each view."""
        return 2 * units + 1 + sum(len(tables) for tables in self.reads.values())

    def account(self, plan: RunPlan, units: Sequence[Unit], counts: Counts) -> None:
        """Check that every view was written."""
        missing = {unit.table for unit in units} - {
            name.removeprefix("online_") for name in counts.numbers
        }
        assert not missing, f"no rows of {sorted(missing)} were written"

    def finish(self, plan: RunPlan, counts: Counts | None, settings: Settings) -> list[str]:
        """Write custom views, and leave the run's id in the store."""
        if counts is None:
            return []
        write_own_views(plan, settings)
        columns = plan.pinned["events"].columns
        note_columns(plan.settings, columns)
        # Elsewhere too: a store that comes back from an older copy says nothing of it.
        catalogue = Catalogue(plan.catalogue_url)
        store = id_of_store(plan.settings)
        note_sent(catalogue, plan.dataset, store, self.name, plan.run_id)
        note_epoch(plan.settings, self.name, plan.run_id)
        gone = sum(rows for name, rows in counts.numbers.items() if name.startswith("gone_"))
        lost = f"{gone:,} keys that the tables no longer have lost their values online"
        return [*([lost] if gone else []), *_drift(live_bundle(plan, settings), columns)]


JOB = MaterializeJob()
