"""Files shaped like strangers' own: `new` takes each column for what it is, or marks that it is not sure;
`check` names whatever would make a ranking wrong. Each row is a kind that was once silently wrong.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import io
import json
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_repo import cli, datasets
from feature_repo.__main__ import app
from feature_repo.contract.arrow import iso_micros
from feature_repo.contract.schema import Source
from feature_repo.datasets import Dataset
from feature_repo.errors import DeclarationError, RawDataError, SettingsError
from feature_repo.raw import raw, sources
from feature_repo.scaffold import names as names_of_columns
from feature_repo.scaffold import shapes, sniff
from feature_repo.scaffold.preview import Preview, preview
from feature_repo.settings import Settings

FIRST = datetime(2024, 1, 1, tzinfo=UTC)
Visit = tuple[int, int, datetime]


def visits(number: int = 900, users: int = 40, items: int = 60, days: int = 120) -> list[Visit]:
    """User, item and time, in the order of time: habits of forty people."""
    rng = np.random.default_rng(7)
    tastes = [rng.permutation(items)[:9] for _ in range(users)]
    at = np.sort(rng.integers(0, days * 86_400, number))
    owners = rng.integers(0, users, number)
    return [
        (int(u), int(rng.choice(tastes[u])), FIRST + timedelta(seconds=int(s)))
        for u, s in zip(owners, at, strict=True)
    ]


LOG = visits()
USERS = len({user for user, _, _ in LOG})


def minute(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S")


def iso(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def text_of(names: Sequence[str] | None, rows: Sequence[Sequence[Any]], sign: str = ",") -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=sign, lineterminator="\n")
    if names:
        writer.writerow(names)
    writer.writerows(rows)
    return out.getvalue()


@dataclass(frozen=True)
class Told:
    """What `new` wrote and said, and what `check` found."""

    code: int
    said: str
    text: str
    dataset: Dataset | None
    found: Preview | None

    @property
    def spec(self) -> Any:
        assert self.dataset is not None
        return self.dataset.spec

    @property
    def preview(self) -> Preview:
        assert self.found is not None
        return self.found

    @property
    def users(self) -> int:
        return len(set(self.preview.events["user_id"].to_pylist()))

    @property
    def problems(self) -> str:
        return "\n".join(self.preview.problems())


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Told]]:
    """`new` and `check` on files of a folder."""
    modules, raw_folder = tmp_path / "modules", tmp_path / "raw"
    modules.mkdir()
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(modules)])

    def run(
        files: dict[str, str | bytes], *flags: str, events: str = "", check: bool = True
    ) -> Told:
        for name, content in files.items():
            path = raw_folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        out = io.StringIO()
        words = [
            "new",
            "stranger",
            "--force",
            "--events",
            f"{raw_folder}/{events or next(iter(files))}",
        ]
        with redirect_stdout(out), redirect_stderr(out):
            code = cli.run(
                lambda: app([*words, *(f.replace("RAW", str(raw_folder)) for f in flags)])
            )
        module = modules / "stranger.py"
        text = module.read_text() if module.exists() else ""
        if code or not check:
            return Told(code, out.getvalue(), text, None, None)
        importlib.invalidate_caches()
        sys.modules.pop("feature_repo.datasets.stranger", None)
        datasets.load.cache_clear()
        dataset = datasets.load("stranger")
        return Told(code, out.getvalue(), text, dataset, preview(dataset, str(raw_folder)))

    yield run
    sys.modules.pop("feature_repo.datasets.stranger", None)
    datasets.load.cache_clear()
    datasets.load_contract.cache_clear()


# --- headers and dialects

PLAIN = [(500 + i, 9000 + u, minute(t)) for u, i, t in LOG]
SLUGS = [
    (f"mug-{i:03d}-{'abcdefgh'[i % 8]}", str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{u}")), iso(t))
    for u, i, t in LOG
]
HEADED = ["product", "customer", "at"]


@pytest.mark.parametrize(
    ("what", "content", "user"),
    [
        ("words above words", text_of(HEADED, SLUGS), "customer"),
        ("an unnamed index", text_of(["", *HEADED], [(n, *r) for n, r in enumerate(PLAIN)]), "customer"),
        ("names before an index, as R writes", text_of(HEADED, [(n, *r) for n, r in enumerate(PLAIN)]), "customer"),
        ("a name twice", text_of(["item_id", "name", "user_id", "name", "at"], [(r[0], "x", r[1], "y", r[2]) for r in PLAIN]), "user_id"),
        ("Chinese", text_of(["商品", "用户", "时间"], PLAIN), "用户"),
        ("Russian", text_of(["товар", "покупатель", "время"], PLAIN), "покупатель"),
        ("German", text_of(["Artikel", "Kunde", "Datum"], PLAIN), "Kunde"),
        ("a sign at each line's end", text_of([*HEADED, ""], [(*r, "") for r in PLAIN]), "customer"),
        ("the same, not in the header", text_of(HEADED, [(*r, "") for r in PLAIN]), "customer"),
        ("sep=;", "sep=;\n" + text_of(HEADED, PLAIN, ";"), "customer"),
        ("a comment above", "# of a tool\n# 2024\n" + text_of(HEADED, PLAIN), "customer"),
        ("UTF-16 with tabs", text_of(HEADED, PLAIN, "\t").replace("\n", "\r\n").encode("utf-16"), "customer"),
        ("UTF-16 without a mark", text_of(HEADED, PLAIN, "\t").encode("utf-16-le"), "customer"),
        ("::", "product::customer::at\n" + "".join(f"{a}::{b}::{c}\n" for a, b, c in PLAIN), "customer"),
        ("Latin-1", text_of(HEADED, [(f"Café {a}", b, c) for a, b, c in PLAIN]).encode("latin-1"), "customer"),
    ],
)  # fmt: skip
def test_columns_are_known_by_their_names(
    tell: Callable[..., Told], what: str, content: str | bytes, user: str
) -> None:
    told = tell({"log.csv": content})
    assert told.spec.events.columns.get("user_id", "user_id") == user, what
    assert (told.users, told.preview.rows) == (USERS, len(LOG))
    assert told.problems == "" or "nothing_to_rank" in told.problems


def test_without_a_header_places_are_a_guess_that_is_marked(tell: Callable[..., Told]) -> None:
    kinds = ("pv", "pv", "cart", "fav", "buy")
    rows = [
        (100 + u, 2_268_000 + i, 2_520_000 + i % 9, kinds[n % 5], int(t.timestamp()))
        for n, (u, i, t) in enumerate(LOG)
    ]
    told = tell({"taobao.csv": text_of(None, rows)})
    columns = told.spec.events.columns
    assert (columns["user_id"], columns["item_id"]) == ("event_1", "event_2")
    assert (columns["event_timestamp"], told.spec.events.time_unit) == ("event_5", "seconds")
    assert told.text.count("# ?") >= 3
    assert "no line names the columns" in told.said


def test_who_knows_better_says_so(tell: Callable[..., Told]) -> None:
    content = text_of(["a", "b", "c", "d"], [(*row, "buy") for row in PLAIN])
    refused = tell({"log.csv": content}, check=False)
    assert refused.code == 1
    assert "--user COLUMN" in refused.said
    assert '"user_id": "?"' in refused.text  # a draft is there all the same
    told = tell({"log.csv": content}, "--user", "b", "--item", "a", "--time", "c", "--action", "d")
    assert told.users == USERS
    assert told.spec.actions == ("buy",)
    wrong = tell({"log.csv": content}, "--user", "bb", check=False)
    assert wrong.code == 2
    assert "there are ['a', 'b', 'c', 'd']" in wrong.said


def test_quotes_may_be_text(tell: Callable[..., Told]) -> None:
    lines = [f'{i}" pipe\t{u}\t{minute(t)}' for u, i, t in LOG]
    told = tell({"log.tsv": "\n".join(["product\tcustomer\tat", *lines]) + "\n"})
    assert told.spec.events.quote == ""
    assert set(told.preview.events["item_id"].to_pylist()) == {f'{i}" pipe' for _, i, _ in LOG}
    assert told.dataset is not None
    usual = replace(
        told.dataset, spec=replace(told.spec, events=replace(told.spec.events, quote='"'))
    )
    assert 'quote=""' in "\n".join(
        preview(
            usual, str(Path(sources.files_of(told.spec.events, None or str(_raw(told)))[0]).parent)
        ).problems()
    )


def _raw(told: Told) -> Path:
    """The folder of the files, by what `new` printed."""
    return Path(told.said.split("MEMOIR_DATA=")[1].split()[0])


def test_backslashes_may_escape_quotes_and_lines_may_end_inside_of_them(
    tell: Callable[..., Told],
) -> None:
    lines = [f'"say \\"{i}\\", sir",{u},{minute(t)}' for u, i, t in LOG]
    told = tell({"a.csv": "\n".join(["product,customer,at", *lines]) + "\n"})
    assert told.spec.events.escape == "\\"
    assert set(told.preview.events["item_id"].to_pylist()) == {f'say "{i}", sir' for _, i, _ in LOG}
    rows = [(i, u, minute(t), "two\nlines") for u, i, t in LOG]
    told = tell({"b.csv": text_of([*HEADED, "note"], rows)}, events="b.csv")
    assert told.spec.events.quoted_newlines
    assert told.preview.rows == len(LOG)


# --- times

WRITTEN = {
    "%d.%m.%Y %H:%M:%S": "%d.%m.%Y %H:%M:%S",
    "%m/%d/%Y %I:%M %p": "%m/%d/%Y %I:%M %p",
    "%d/%b/%Y:%H:%M:%S +0000": "%d/%b/%Y:%H:%M:%S %z",
    "%a %b %d %H:%M:%S +0000 %Y": "%a %b %d %H:%M:%S %z %Y",
    "%Y-%m-%d %H:%M:%S UTC": "",
    "%Y-%m-%d %H:%M:%S CET": "",
    "%Y-%m-%dT%H:%M:%S+01:00[Europe/Berlin]": "",
    "%Y%m%d": "%Y%m%d",
    "%d.%m.%Y %H:%M:%S CET": "%d.%m.%Y %H:%M:%S",
}
AHEAD = {"CET": 3_600_000_000, "[Europe/Berlin]": 3_600_000_000}  # local time before UTC


@pytest.mark.parametrize(("written", "time_format"), WRITTEN.items())
def test_likely_formats_of_times_are_known(
    tell: Callable[..., Told], written: str, time_format: str
) -> None:
    rows = [(500 + i, 9000 + u, t.strftime(written)) for u, i, t in LOG]
    told = tell({"log.csv": text_of(HEADED, rows)})
    assert told.spec.events.time_format == time_format
    ahead = next((n for sign, n in AHEAD.items() if written.endswith(sign)), 0)
    seconds = 86_400 if written == "%Y%m%d" else 60 if "%S" not in written else 1
    expected = {(int(t.timestamp()) // seconds * seconds) * 1_000_000 - ahead for _, _, t in LOG}
    found = told.preview.events["event_timestamp"].cast(pa.int64()).to_pylist()
    assert set(found) == expected


def test_a_format_reads_all_that_python_reads_and_nothing_else() -> None:
    texts = pa.array(["03.02.2024 01:02:03", "3.2.2024 1:02:03", "32.01.2024 00:00:00", "x", None])
    read = raw.times(texts, time_format="%d.%m.%Y %H:%M:%S").cast(pa.int64()).to_pylist()
    at = iso_micros("2024-02-03T01:02:03+00:00")
    assert read == [at, at, None, None, None]


def test_each_row_may_name_its_zone(tell: Callable[..., Told]) -> None:
    zones = ("Europe/London", "America/New_York", "+05:30")
    rows = [(500 + i, 9000 + u, minute(t), zones[n % 3]) for n, (u, i, t) in enumerate(LOG)]
    told = tell({"log.csv": text_of([*HEADED, "timezone"], rows)})
    assert told.spec.events.zone_column == "timezone"
    ahead = (0, -5 * 3600, 19_800)  # in winter; London's summer begins on March 31
    winter = {
        (9000 + u, int(t.timestamp()) - ahead[n % 3])
        for n, (u, _, t) in enumerate(LOG)
        if t < datetime(2024, 3, 1, tzinfo=UTC)
    }
    events = told.preview.events
    seconds = (np.array(events["event_timestamp"].cast(pa.int64())) // 1_000_000).tolist()
    assert winter <= set(zip(events["user_id"].to_pylist(), seconds, strict=True))


def test_an_id_is_no_time_however_likely_its_size(tell: Callable[..., Told]) -> None:
    names = ["order_ref_id", "post_id", "product", "customer", "ts"]
    rows = [
        (
            541_312_000 + n // 3,
            1_180_000_000_000_000_000 + n,
            f"p{i}",
            f"u{u}",
            f"{t.timestamp():.2f}",
        )
        for n, (u, i, t) in enumerate(LOG)
    ]
    told = tell({"log.csv": text_of(names, rows)})
    assert told.spec.events.columns["event_timestamp"] == "ts"
    assert told.spec.events.time_unit == "seconds"


def test_day_and_month_that_nothing_tells_apart_are_asked_about(tell: Callable[..., Told]) -> None:
    rows = [(i, u, t.replace(day=1 + t.day % 12).strftime("%m/%d/%Y %H:%M")) for u, i, t in LOG]
    told = tell({"log.csv": text_of(HEADED, rows)})
    assert "day and month cannot be told apart" in told.text
    assert "day_and_month" in told.problems


# --- numbers and nothing


def test_each_column_has_its_own_decimal_sign(tell: Callable[..., Told]) -> None:
    names = [*HEADED, "views", "price", "paid", "weight"]
    rows = [
        (
            i,
            u,
            minute(t),
            f"{12_034 + n:,}",
            f"{i + 0.5:.2f}",
            f"{i},99 EUR",
            f"1.{100 + n % 900},5",
        )
        for n, (u, i, t) in enumerate(LOG)
    ]
    told = tell({"log.csv": text_of(names, rows)})
    rows_by_time = told.preview.events.sort_by("event_timestamp").to_pylist()
    u, i, _ = LOG[0]
    first = {**rows_by_time[0]}
    items = {c.name: c for c in told.spec.item_features}
    assert first["views"] == 12_034
    assert first["weight"] == pytest.approx(1100.5)
    assert (first["user_id"], first["item_id"]) == (u, i)
    assert {"price", "paid"} <= items.keys()  # an item decides them
    assert items["paid"].unit == "EUR"
    assert "values that could not be read" not in "\n".join(told.preview.lines())


def test_what_is_no_number_is_null_and_counted(tell: Callable[..., Told]) -> None:
    rows = [
        (i, u, minute(t), "free" if n % 90 == 0 else f"{n / 7:.3f}")
        for n, (u, i, t) in enumerate(LOG)
    ]
    told = tell({"log.csv": text_of([*HEADED, "price"], rows)})
    assert told.preview.counts.lost == {"price": 10}
    assert "10  values of price that could not be read" in "\n".join(told.preview.lines())
    assert "10 of 900 values are none such" in told.text


@pytest.mark.parametrize(
    ("text", "decimal", "number"),
    [
        ("1,234.5", ".", 1234.5),
        ("1.234,5", ",", 1234.5),
        ("3.50", ",", None),
        ("3,5", ".", None),
        ("12,34,567", ".", None),
        ("1 234,5", ",", 1234.5),
        ("1\u202f234\u00a0567,5", ",", 1234567.5),
        ("1'234.50", ".", 1234.5),
        ("-1.000", ",", -1000.0),
    ],
)
def test_the_other_sign_stands_between_thousands_or_it_is_no_number(
    text: str, decimal: str, number: float | None
) -> None:
    assert raw.numbers(pa.array([text]), decimal).to_pylist() == [number]


def test_a_currency_is_read_where_it_is_the_declared_one() -> None:
    given = pa.array(["12,99 EUR", "€ 3,00", "4,5", "1,00 USD"])
    assert raw.numbers(given, ",", "EUR").to_pylist() == [12.99, 3.0, 4.5, None]
    assert raw.unit_of(pa.array(["$1", "$2.50", "3 USD"])) == "USD"
    assert raw.unit_of(pa.array(["$1", "€2"])) == ""


@pytest.mark.parametrize(
    "mark", ["NULL", "\\N", "NA", "<NA>", "N/A", "(null)", "-", "undefined", "(not set)"]
)
def test_a_mark_of_nothing_is_nobody(tell: Callable[..., Told], mark: str) -> None:
    rows = [
        (500 + i, mark if n % 8 == 3 else 9000 + u, minute(t), mark if n % 11 == 0 else n / 4)
        for n, (u, i, t) in enumerate(LOG)
    ]
    told = tell({"log.csv": text_of([*HEADED, "price"], rows)})
    assert told.users == len({u for n, (u, _, _) in enumerate(LOG) if n % 8 != 3})
    assert told.preview.events["price"].null_count > 0
    assert told.preview.dead == {"customer: is missing": sum(n % 8 == 3 for n in range(len(LOG)))}


def test_one_who_has_an_eighth_of_the_log_is_asked_about(tell: Callable[..., Told]) -> None:
    rows = [
        (500 + i, "guest" if n % 8 == 3 else f"c{u}", minute(t)) for n, (u, i, t) in enumerate(LOG)
    ]
    told = tell({"log.csv": text_of(HEADED, rows)})
    assert "one user, 'guest', has 12.6% of the events" in told.problems
    assert told.dataset is not None
    known = replace(told.spec, accept=("large_share", "nothing_to_rank"))
    assert preview(replace(told.dataset, spec=known), str(_raw(told))).problems() == []


@pytest.mark.parametrize(("stars", "share"), [("0", 2), ("-1", 4)])
def test_a_rating_that_was_never_given_is_none(
    tell: Callable[..., Told], stars: str, share: int
) -> None:
    rng = np.random.default_rng(3)
    given = [stars if n % share == 0 else int(rng.integers(1, 11)) for n in range(len(LOG))]
    rows = [(i, u, s, int(t.timestamp())) for (u, i, t), s in zip(LOG, given, strict=True)]
    told = tell({"log.csv": text_of(["book_id", "user_id", "rating", "timestamp"], rows)})
    assert told.spec.events.missing_in == {"rating": (stars,)}
    low = sum(action == 1 for action in told.preview.events["action"].to_pylist())
    assert low == sum(int(s) in range(1, 8) for s in given)
    assert "dead letters" not in told.problems  # as declared: nothing against the data


def test_ids_that_are_not_spelt_as_their_number_stay_apart(tell: Callable[..., Told]) -> None:
    rows = [(("007", "7")[n % 2] if i == 7 else i, u, minute(t)) for n, (u, i, t) in enumerate(LOG)]
    told = tell({"log.csv": text_of(HEADED, rows)})
    assert told.spec.item_id.value == "string"
    assert {"007", "7"} <= set(told.preview.events["item_id"].to_pylist())
    assert raw.id_numbers(pa.array(["7", "007", "+7", "-7", "7.0", "0", "00", "٧"])).to_pylist() == [
        7, None, None, -7, 7, 0, None, None,
    ]  # fmt: skip


# --- several files, and files inside of others


def test_a_part_of_the_path_is_a_column(tell: Callable[..., Told]) -> None:
    kinds = ("view", "cart", "purchase")
    files = {
        f"log/event={kind}/part-{n}.csv": text_of(HEADED, PLAIN[n + 3 * k :: 9])
        for k, kind in enumerate(kinds)
        for n in range(3)
    }
    told = tell(dict(files), events="log")
    assert told.spec.events.action == "event"
    assert set(told.spec.actions) == set(kinds)
    counted = np.bincount(told.preview.events["action"].to_numpy())
    assert counted.tolist() == [300, 300, 300]


def test_a_column_of_later_files_is_seen(tell: Callable[..., Told]) -> None:
    old = text_of(HEADED, PLAIN[:500])
    new = text_of(
        [*HEADED, "device"], [(*r, ("phone", "desk")[n % 2]) for n, r in enumerate(PLAIN[500:])]
    )
    told = tell({"log/a.csv": old, "log/b.csv": new}, events="log")
    assert "in 1 of 2 files" in told.text
    device = told.preview.events["device"]
    assert (device.null_count, len(device)) == (500, 900)
    assert "column 'device' is not in 1 of 2 files" in told.problems


def test_a_field_that_no_line_has_is_refused_as_everywhere(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n' * 2000 + '{"a": 2, "late": 3}\n')
    source = Source("log.jsonl")
    assert sources.units_of(source, str(tmp_path), "events", ["a", "late"])
    with pytest.raises(RawDataError, match=r"columns \['never'\] are missing"):
        sources.units_of(source, str(tmp_path), "events", ["a", "never"])


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
    "lz4": lambda data: bytes(pa.compress(data, "lz4", asbytes=True)),
}


@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_file_is_read_to_its_end_or_refused_by_byte(
    tell: Callable[..., Told], kind: str
) -> None:
    pack, text = PACKED[kind], text_of(HEADED, PLAIN).encode()
    half = len(text) // 2
    told = tell({f"log.csv.{kind}": pack(text[:half]) + pack(text[half:])})
    assert (told.code, told.preview.rows) == (0, len(LOG))
    for damaged in (pack(text)[: len(pack(text)) // 2], pack(text) + b"\0" * 512):
        refused = tell({f"log.csv.{kind}": damaged}, check=False)
        assert refused.code == 1
        assert f"log.csv.{kind} cannot be unpacked around byte" in refused.said.replace("\n", " ")


def test_check_reads_a_packed_file_to_its_end(
    tell: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = [(i, u, minute(t), f"{rng.random():.12f}") for u, i, t in visits(60_000)]
    text = text_of([*HEADED, "noise"], rows).encode()
    told = tell({"log.csv.gz": gzip.compress(text)})
    monkeypatch.setattr("feature_repo.scaffold.preview.ROWS", 100)
    monkeypatch.setattr("feature_repo.raw.sources.UNIT_BYTES", 1 << 12)
    (_raw(told) / "log.csv.gz").write_bytes(gzip.compress(text)[:-100])
    assert told.dataset is not None
    with pytest.raises(RawDataError, match="cannot be unpacked"):
        preview(told.dataset, str(_raw(told)))


def test_nested_columns_are_read_by_their_fields_or_left_out(tell: Callable[..., Told]) -> None:
    lines = [
        {
            "user": {"id": 9000 + u, "browser": f"b{n % 3}"},
            "item": {"id": 500 + i},
            "at": iso(t),
            "tags": [{"a": 1}],
        }
        for n, (u, i, t) in enumerate(LOG)
    ]
    told = tell({"log.jsonl": "".join(json.dumps(line) + "\n" for line in lines)})
    assert told.spec.events.columns["user_id"] == "user.id"
    assert told.users == USERS
    assert "tags: left out" in told.said


def test_parquets_types_are_read_or_left_out(tell: Callable[..., Told]) -> None:
    n = len(LOG)
    key = [uuid.uuid5(uuid.NAMESPACE_DNS, f"p{u}") for u, _, _ in LOG]
    table = pa.table(
        {
            "user_id": pa.array([k.bytes for k in key], pa.uuid()),
            "item_id": pa.array([f"i{i}" for _, i, _ in LOG], pa.string_view()),
            "at": pa.array([t for *_, t in LOG], pa.timestamp("us", "UTC")),
            "device": pa.array([{"os": f"x{k % 5}", "v": [{"a": k}]} for k in range(n)]),
            "tags": pa.array([[("a", k)] for k in range(n)], pa.map_(pa.string(), pa.int64())),
            "watched": pa.array([k * 1000 for k in range(n)], pa.duration("ms")),
            "clock": pa.array([k % 86_400 for k in range(n)], pa.time32("s")),
            "amount": pa.array([k / 4 for k in range(n)]).cast(pa.decimal128(12, 2)),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    told = tell({"log.parquet": sink.getvalue()})
    assert set(told.preview.events["user_id"].to_pylist()) == {str(k) for k in key}
    assert told.spec.events.columns["device_os"] == "device.os"
    for name in ("device.v", "tags"):
        assert f"{name}: left out" in told.said


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ('[{"user_id": 1}]', "is a JSON array"),
        ("[\n{}\n]", "is a JSON array"),
        ("{'user': 'it is'}\n", "expected a JSON object in each line"),
    ],
)
def test_json_that_is_no_object_in_a_line_is_refused(
    tell: Callable[..., Told], content: str, hint: str
) -> None:
    refused = tell({"log.json": content}, check=False)
    assert refused.code == 1
    assert hint in refused.said


def test_an_item_table_of_several_rows_an_item_is_said(tell: Callable[..., Told]) -> None:
    rows = [(500 + i, f"name {n}", n) for n in range(3) for i in range(60)]
    files: dict[str, str | bytes] = {"log.csv": text_of(HEADED, PLAIN)}
    files["items.csv"] = text_of(["product", "name", "size"], rows)
    told = tell(files, "--items", "RAW/items.csv")
    assert "180 rows of 60 items" in told.problems
    (_raw(told) / "items.csv").write_text("")
    assert told.dataset is not None
    with pytest.raises(RawDataError, match="is empty: 0 bytes"):
        preview(told.dataset, str(_raw(told)))


# --- requests, periods, actions


def test_periods_lie_where_the_events_are(tell: Callable[..., Told]) -> None:
    rows = [(500 + i, 9000 + u, int(t.timestamp())) for u, i, t in LOG]
    odd = [(500, 9000, s) for s in (1_328_000_000, 1_328_000_500, 1_328_100_000)]
    told = tell({"log.csv": text_of(HEADED, odd + rows)})
    line = next(line for line in told.preview.lines() if "requests (" in line)
    assert "90 validation, 91 test" in line
    assert "3 events lie far from all others" in told.problems


def test_events_that_are_yet_to_come_stop_the_job_and_check_says_so(
    tell: Callable[..., Told],
) -> None:
    rows = [(500 + i, 9000 + u, int(t.timestamp())) for u, i, t in LOG]
    told = tell({"log.csv": text_of(HEADED, [*rows, (500, 9000, 2_122_867_355)])})
    assert "1 events are yet to come" in told.problems


def test_an_impression_a_request_ranks_nothing(tell: Callable[..., Told]) -> None:
    rows = [(i, u, int(t.timestamp() * 1000), int(n % 3 == 0)) for n, (u, i, t) in enumerate(LOG)]
    told = tell({"log.csv": text_of(["video_id", "user_id", "time_ms", "is_click"], rows)})
    assert "a random order reaches an NDCG@10 of 1.00" in told.problems


def test_a_session_that_lasts_is_asked_about_and_learns_nothing_of_later_periods(
    tell: Callable[..., Told],
) -> None:
    rows = [
        (f"c{u}", f"u{u}", f"i{i}", minute(t), int(n % 4 == 0)) for n, (u, i, t) in enumerate(LOG)
    ]
    told = tell({"log.csv": text_of(["session_id", "user_id", "item_id", "at", "clicked"], rows)})
    assert "of the requests last longer than a day" in told.problems
    found = told.preview
    at = found.events["event_timestamp"].cast(pa.int64()).to_numpy()
    cuts = [
        iso_micros(told.spec.requests.validation_from),
        iso_micros(told.spec.requests.test_from),
    ]
    period = np.searchsorted(cuts, at, side="right")
    owner = period[found.requests.first_event]
    assert (period[found.requests.event] == owner[found.requests.request]).all()


def test_a_stray_action_is_no_task(tell: Callable[..., Told]) -> None:
    log = visits(4000)
    rows = [
        (i, u, minute(t), "purchase" if n == 7 else ("view", "click")[n % 2])
        for n, (u, i, t) in enumerate(log)
    ]
    told = tell({"log.csv": text_of([*HEADED, "event_type"], rows)})
    assert [task.action for task in told.spec.tasks] == ["click"]
    assert "purchase has 1 of 4,000 rows" in told.text


def test_repeats_and_rare_labels_are_said(tell: Callable[..., Told]) -> None:
    told = tell({"log.csv": text_of(HEADED, [*PLAIN, *PLAIN[:20]])})
    assert "20 events are the same as another" in told.problems


def test_ids_of_events_that_are_a_users_own_are_said(tell: Callable[..., Told]) -> None:
    """Each customer numbers from 0: by the number alone one's events would take the others'."""
    numbers: Counter[int] = Counter()
    rows = []
    for user, item, at in LOG:
        rows.append((numbers[user], 9000 + user, 500 + item, int(at.timestamp())))
        numbers[user] += 1
    told = tell({"log.csv": text_of(["event_id", "customer", "product", "at"], rows)})
    text = told.text
    assert told.dataset is not None
    spec = replace(
        told.spec,
        event_identity=("event_id",),
        events=replace(
            told.spec.events, columns=told.spec.events.columns | {"event_id": "event_id"}
        ),
    )
    found = preview(replace(told.dataset, spec=spec), str(_raw(told)))
    assert any("are named by lines of several users" in line for line in found.problems()), text
    own = replace(spec, event_identity=("user_id", "event_id"))
    found = preview(replace(told.dataset, spec=own), str(_raw(told)))
    assert not any("several users" in line for line in found.problems())


# --- what nothing tells apart is marked


def log_with(names: Sequence[str], made: Callable[[int, Visit], Sequence[Any]]) -> str:
    """A log of which each row is made of a visit and its number."""
    return text_of(names, [made(number, visit) for number, visit in enumerate(LOG)])


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (["order_item_id", "product_id", "customer_id", "at"], ("customer_id", "product_id")),
        (["user_age", "product_id", "client_code", "at"], ("client_code", "product_id")),
        (["customer_gender", "product_id", "buyer", "at"], ("buyer", "product_id")),
        (["product_category_id", "product_id", "user_id", "at"], ("user_id", "product_id")),
        (["place", "item_title", "member_number", "at"], ("member_number", "item_title")),
    ],
)
def test_what_is_about_a_user_or_an_item_names_neither(
    tell: Callable[..., Told], names: list[str], roles: tuple[str, str]
) -> None:
    rows = log_with(names, lambda n, v: (n % 3 + 1, f"p{v[1]}", f"c{v[0]}", minute(v[2])))
    columns = tell({"log.csv": rows}).spec.events.columns
    assert tuple(columns.get(ours, ours) for ours in ("user_id", "item_id")) == roles


def test_columns_that_are_named_alike_are_a_doubt(tell: Callable[..., Told]) -> None:
    names = ["seller_user_id", "buyer_user_id", "item_id", "ship_date", "order_date"]
    rows = log_with(
        names, lambda n, v: (n % 9, v[0], v[1], minute(v[2] + timedelta(days=3)), minute(v[2]))
    )
    told = tell({"log.csv": rows})
    assert told.spec.events.columns["user_id"] == "buyer_user_id"  # a buyer is a user twice
    assert "# ? it may be 'order_date'" in told.said
    names = ["birth_date", "user_id", "item_id", "order_date"]
    rows = log_with(names, lambda n, v: (f"19{60 + v[0]}-01-10", v[0], v[1], minute(v[2])))
    assert tell({"log.csv": rows}).spec.events.columns["event_timestamp"] == "order_date"


@pytest.mark.parametrize(
    ("values", "asked"),
    [
        (("like", "dislike"), "label_like"),
        (("order", "cancel_order"), "label_order"),
        (("purchase", "review"), "label_purchase"),
    ],
)
def test_an_action_that_says_the_opposite_is_not_the_one_to_rank_by(
    tell: Callable[..., Told], values: tuple[str, str], asked: str
) -> None:
    names = ["user_id", "item_id", "at", "event"]
    rows = log_with(names, lambda n, v: (v[0], v[1], minute(v[2]), values[n % 2]))
    assert tell({"log.csv": rows}).spec.tasks[0].name == asked


@pytest.mark.parametrize(
    ("action", "place"),
    [
        ("purchases", 0),
        ("Viewed", 1),
        ("pageview", 1),
        ("view_item", 1),
        ("addtocart", 2),
        ("add_to_cart", 2),
        ("clickout item", 3),
        ("shopping", None),
        ("page", None),
        ("add_to_wishlist", None),
        ("preview", None),
        ("unlike", None),
        ("removed_from_cart", None),
    ],
)
def test_an_action_means_what_its_words_say(action: str, place: int | None) -> None:
    assert names_of_columns.means(action, ("purchase", "view", "cart", "click", "like")) == place


def test_a_review_is_no_view_and_a_display_no_play(tell: Callable[..., Told]) -> None:
    names = ["session", "user_id", "item_id", "at", "event"]
    words = ("view", "review", "purchase")
    rows = log_with(names, lambda n, v: (f"{v[0]}-{v[2]:%m}", *v[:2], minute(v[2]), words[n % 3]))
    assert tell({"log.csv": rows}).spec.shown == "view"
    names = ["user_id", "item_id", "at", "channel"]
    rows = log_with(names, lambda n, v: (v[0], v[1], minute(v[2]), ("bread", "corporate")[n % 2]))
    assert tell({"log.csv": rows}).spec.events.action == ""


def test_flags_mean_the_same_however_they_are_spelt(tell: Callable[..., Told]) -> None:
    names = ["session_id", "user_id", "item_id", "at", "clicked", "liked"]

    def row(no: str, yes: str) -> str:
        return log_with(
            names,
            lambda n, v: (
                f"s{n // 3}",
                v[0],
                v[1],
                minute(v[2]),
                (no, yes)[n % 4 == 0],
                (no, yes)[n % 5 == 0],
            ),
        )

    by_words, by_digits = (
        tell({"log.csv": row(*spelt)}).spec for spelt in (("no", "yes"), ("0", "1"))
    )
    assert by_words.tasks == by_digits.tasks
    assert {task.given for task in by_words.tasks} == {""}


def test_what_was_not_taken_for_what_its_name_says_is_a_doubt(tell: Callable[..., Told]) -> None:
    names = ["user_id", "item_id", "date", "time", "rating", "label", "click"]
    rows = log_with(
        names,
        lambda n, v: (
            *v[:2],
            *minute(v[2]).split(),
            f"{n % 5 + 1} stars",
            n % 2,
            "1" if n % 3 else "",
        ),
    )
    said = tell({"log.csv": rows}, check=False).said
    for doubt in ("times of day", "its name says rating", "its name says label", "written as 1 or"):
        assert doubt in said


@pytest.mark.parametrize(
    ("prices", "doubt"),
    [
        (("950", "1.250", "12.000"), "its point may stand between thousands"),
        (("950", "1,250", "12,000"), "its comma may stand before a fraction"),
        (("0.950", "1.250", "12.000"), ""),
        (("3,50", "12,50", "7,25"), ""),
        (("1 250,50", "12,50", "7,25"), ""),
    ],
)
def test_three_digits_behind_a_sign_tell_nothing(prices: tuple[str, ...], doubt: str) -> None:
    texts = pa.array(prices)
    found = shapes.unsure_sign(texts)
    assert bool(found) == bool(doubt)
    assert found == ("" if not doubt else "." if "point" in doubt else ",")


def test_digits_alone_are_a_time_of_one_width(tell: Callable[..., Told]) -> None:
    names = ["user_id", "item_id", "timestamp"]
    rows = log_with(names, lambda n, v: (v[0], v[1], v[2].strftime("%Y%m%d%H%M")))
    told = tell({"log.csv": rows})
    assert told.spec.events.time_format == "%Y%m%d%H%M"
    first = min(told.preview.events["event_timestamp"].to_pylist())
    assert first == min(at for _, _, at in LOG).replace(second=0)


def test_spaces_around_ids_are_asked_about(tell: Callable[..., Told]) -> None:
    names = ["user", "item", "at"]
    rows = log_with(names, lambda n, v: (f"u{v[0]}" + "   " * (n % 2), f" p{v[1]}", minute(v[2])))
    problems = tell({"log.csv": rows}).problems
    assert "ids of users have spaces around them, and 40 are another's" in problems
    assert "ids of items have spaces around them, and 0 are another's" in problems


def test_a_table_that_knows_few_is_asked_about_and_its_key_is_an_id(
    tell: Callable[..., Told],
) -> None:
    items = text_of(["rank", "id", "name"], [(60 - i, i, f"thing {i}") for i in range(60)])
    rows = log_with(["user_id", "item_id", "at"], lambda n, v: (v[0], v[1], minute(v[2])))
    told = tell({"log.csv": rows, "items.csv": items}, "--items", "RAW/items.csv")
    assert told.spec.items.columns["item_id"] == "id"
    few = text_of(["id", "name"], [(i, f"thing {i}") for i in range(5)])
    told = tell({"log.csv": rows, "items.csv": few}, "--items", "RAW/items.csv")
    assert "of the events' items: are all ids spelt the same?" in told.problems


@pytest.mark.parametrize(
    "content",
    ["user_id,item_id,at\n", "user_id,item_id,at", "table without rows"],
)
def test_a_file_without_a_row_is_a_line(tell: Callable[..., Told], content: str) -> None:
    made: str | bytes = content
    name = "log.csv"
    if content == "table without rows":
        out = io.BytesIO()
        pq.write_table(
            pa.table({"user_id": pa.array([], pa.int64()), "at": pa.array([], pa.string())}), out
        )
        made, name = out.getvalue(), "log.parquet"
    told = tell({name: made}, check=False)
    assert told.code == 2 or told.code == 1
    assert "no row" in told.said
    assert "Traceback" not in told.said


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\x03\x04" + b"x" * 400, "zip archive"),
        (gzip.compress(b"user_id,item_id,at\n1,2,2024-01-01\n"), "gzip under another name"),
        (
            b"log.csv".ljust(257, b"\0") + b"ustar" + b"user_id,item_id,at\n1,2,2024-01-01\n",
            "tar archive",
        ),
        (b"<!DOCTYPE html><html>\n<body>403</body></html>\n", "web page"),
        (b"<?xml version='1.0'?>\n<rows>\n</rows>\n", "XML document"),
        (b"-- MySQL dump 10.13\nINSERT INTO log VALUES (1,2);\n", "statements of SQL"),
        (b"--\n-- PostgreSQL database dump\n--\nCOPY log FROM stdin;\n", "statements of SQL"),
        (b"PAR1\x15\x04\x15" + b"x" * 90 + b"PAR1", "Parquet file under another name"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "Git LFS"),
    ],
)
def test_a_file_that_is_no_text_is_called_what_it_is(
    tell: Callable[..., Told], content: bytes, kind: str
) -> None:
    told = tell({"log.csv": content}, check=False)
    assert told.code != 0
    assert kind in told.said
    assert not told.text


def test_a_log_that_lost_its_rows_is_said_by_check(tell: Callable[..., Told]) -> None:
    told = tell({"log.csv": text_of(HEADED, PLAIN)})
    (_raw(told) / "log.csv").write_text("product,customer,at\n")
    assert told.dataset is not None
    assert "not one row is an event" in preview(told.dataset, str(_raw(told))).problems()


def test_a_text_beyond_its_bound_and_lists_in_the_wrong_place_are_lines(
    tell: Callable[..., Told],
) -> None:
    names = ["user_id", "item_id", "at", "description"]
    rows = log_with(
        names, lambda n, v: (v[0], v[1], minute(v[2]), "y" * 40_000 if n == 3 else f"text {n}")
    )
    assert tell({"log.csv": rows}).code == 0
    out = io.BytesIO()
    made = {
        "user_id": [u for u, _, _ in LOG],
        "item_id": [i for _, i, _ in LOG],
        "at": [minute(t) for _, _, t in LOG],
        "tags": pa.array([["a", "bc"[i % 2]] for _, i, _ in LOG], pa.large_list(pa.string())),
    }
    pq.write_table(pa.table(made), out)
    told = tell({"log.parquet": out.getvalue()})
    assert told.code == 0
    assert told.dataset is not None
    told.spec.events.columns["item_id"] = "tags"
    with pytest.raises(RawDataError, match="column 'tags' holds lists"):
        preview(told.dataset, str(_raw(told)))


def test_formats_are_tried_on_both_ends_of_a_column() -> None:
    texts = pa.array([f"{d:02d}/01/2024" for d in (1, 2, 3)] * 50 + ["25/01/2024"])
    assert shapes.formats_of(texts) == ["%d/%m/%Y"]
    assert sniff.ENCODINGS[0] == "utf-8"


# --- what tools of other kinds write


@pytest.mark.parametrize(
    ("written", "doubt"),
    [
        (lambda at: str(int((at - datetime(1, 1, 1, tzinfo=UTC)).total_seconds()) * 10**7), "ticks of .NET"),
        (lambda at: str(int((at - datetime(2001, 1, 1, tzinfo=UTC)).total_seconds())), "seconds since 2001"),
        (lambda at: f"{at.timestamp() * 1000:.5E}", "its last digits are lost"),
    ],
)  # fmt: skip
def test_numbers_that_count_from_another_year_are_asked_about(
    tell: Callable[..., Told], written: Callable[[datetime], str], doubt: str
) -> None:
    for name in ("created", "event_timestamp"):
        rows = log_with(["user", "item", name], lambda n, v: (v[0], v[1], written(v[2])))
        told = tell({"log.csv": rows}, check=False)
        assert f"{name}: time" in told.said
        (line,) = (
            line for line in told.text.splitlines() if line.strip().startswith('"event_timestamp"')
        )
        assert "# ?" in line
        assert doubt in line


def test_a_fraction_of_a_second_may_stand_behind_a_comma(tell: Callable[..., Told]) -> None:
    names = ["user", "item", "at", "price"]
    rows = text_of(
        names,
        [(u, i, f"{t.timestamp() + 0.25:.2f}".replace(".", ","), f"{i},99") for u, i, t in LOG],
        ";",
    )
    told = tell({"log.csv": rows})
    first = min(told.preview.events["event_timestamp"].to_pylist())
    assert first == LOG[0][2] + timedelta(seconds=0.25)
    points = text_of(names, [(u, i, t.timestamp() + 0.25, f"{i},99") for u, i, t in LOG], ";")
    assert tell({"log.csv": points}).preview.events["event_timestamp"].to_pylist()[0].microsecond


@pytest.mark.parametrize("written", ["%y.%m.%d %H:%M:%S", "%d.%m.%y %H:%M:%S"])
def test_a_year_of_two_digits_may_stand_first(tell: Callable[..., Told], written: str) -> None:
    rows = log_with(["user", "item", "at"], lambda n, v: (*v[:2], v[2].strftime(written)))
    told = tell({"log.csv": rows})
    assert told.spec.events.time_format == written
    assert "cannot be told apart" not in told.text


def test_a_clock_of_twelve_hours_is_asked_about(tell: Callable[..., Told]) -> None:
    rows = log_with(["user", "item", "at"], lambda n, v: (*v[:2], f"{v[2]:%Y-%m-%d %I:%M:%S}"))
    assert "AM or PM" in tell({"log.csv": rows}).problems
    assert "AM or PM" not in tell({"log.csv": text_of(HEADED, PLAIN)}).problems


@pytest.mark.parametrize(
    "prices",
    [("12.50", "(7.25)"), ("12.50", "7.25-"), ("$12.50", "-$7.25"), ("12.50 EUR", "7.25 USD"), ("12.50", "7,25")],
)  # fmt: skip
def test_numbers_that_are_written_in_several_ways_are_a_doubt(
    tell: Callable[..., Told], prices: tuple[str, str]
) -> None:
    names = ["user", "item", "at", "price"]
    rows = log_with(names, lambda n, v: (*v[:2], minute(v[2]), f"{prices[n % 3 == 0]}"))
    told = tell({"log.csv": rows}, check=False)
    assert "written in several ways" in told.text


def test_ids_in_two_spellings_are_asked_about(tell: Callable[..., Told]) -> None:
    names = ["user", "item", "at"]
    rows = log_with(
        names, lambda n, v: (f"{v[0]}" + ".0" * (n % 2), f"{'mM'[n % 2]}ug {v[1]}", minute(v[2]))
    )
    problems = tell({"log.csv": rows + "user,item,at\n"}).problems
    assert f"{USERS:,} of {2 * USERS:,} ids of users come with and without '.0'" in problems
    assert "ids of items come in small and in large letters" in problems


@pytest.mark.parametrize("encoding", ["shift_jis", "cp1251"])
def test_letters_of_another_encoding_are_asked_about(
    tell: Callable[..., Told], encoding: str
) -> None:
    shop = {"shift_jis": "マグ", "cp1251": "Кружка"}[encoding]
    rows = log_with(["user", "item", "at", "shop"], lambda n, v: (*v[:2], minute(v[2]), shop))
    told = tell({"log.csv": rows.encode(encoding)}, check=False)
    (line,) = (line for line in told.text.splitlines() if "encodings=" in line)
    assert "# ? no UTF-8" in line


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_ids_beyond_an_int64_are_texts(tell: Callable[..., Told], kind: str) -> None:
    ids = [2**63 + 10**6 * u for u, _, _ in LOG]
    content: str | bytes = text_of(
        ["user", "item", "at"], [(x, *r[1:2], minute(r[2])) for x, r in zip(ids, LOG, strict=True)]
    )
    if kind == "parquet":
        out = io.BytesIO()
        times = [minute(t) for _, _, t in LOG]
        table = {"user": pa.array(ids, pa.uint64()), "item": [i for _, i, _ in LOG], "at": times}
        pq.write_table(pa.table(table), out)
        content = out.getvalue()
    told = tell({f"log.{kind}": content})
    assert told.users == USERS
    assert str(ids[0]) in told.preview.events["user_id"].to_pylist()


def test_one_row_and_one_moment_are_called_so(tell: Callable[..., Told]) -> None:
    one = tell({"log.csv": text_of(HEADED, PLAIN[:1])}, check=False).said
    assert "only one row has a time" in one
    same = text_of(["user", "item", "at"], [(u, i, "2024-01-05") for u, i, _ in LOG])
    assert "all 900 rows have one and the same time" in tell({"log.csv": same}, check=False).said


def test_a_line_of_json_may_be_long(tell: Callable[..., Told]) -> None:
    rows = [
        {"user": u, "item": i, "at": minute(t), "note": "x" * (1_200_000 if n == 0 else 3)}
        for n, (u, i, t) in enumerate(LOG)
    ]
    told = tell({"log.jsonl": "\n".join(map(json.dumps, rows))})
    assert told.users == USERS


def test_an_action_that_is_true_or_false_happened_where_it_is_true(
    tell: Callable[..., Told],
) -> None:
    names = ["session_id", "user", "item", "at", "action"]
    words = ("false", "true", "false")
    rows = log_with(names, lambda n, v: (f"s{n // 3}", *v[:2], minute(v[2]), words[n % 3]))
    told = tell({"log.csv": rows})
    assert (told.spec.actions, told.spec.tasks[0].action) == (("action", "impression"), "action")
    assert "name what happened where it is true" in told.text


def test_blanks_among_flags_are_asked_about(tell: Callable[..., Told]) -> None:
    names = ["session_id", "user", "item", "at", "click"]
    rows = log_with(names, lambda n, v: (f"s{n // 3}", *v[:2], minute(v[2]), ("0", "1", "")[n % 3]))
    assert "33% of the rows are blank, and count as 0" in tell({"log.csv": rows}).text


# --- the declaration itself


DECLARED = """
from feature_repo.raw.parse import Derived
from feature_repo.contract.schema import Column, DatasetSpec, DType, Examples, Requests, Source, Task

SPEC = DatasetSpec(
    name="elsewhere",
    title="a declaration in a package",
    user_id=DType.INT64,
    item_id=DType.INT64,
    actions=("buy",),
    tasks=(Task("label_buy", "bought", action="buy"),),
    requests=Requests(
        Examples.ACTIONS,
        validation_from="2024-04-01T00:00:00+00:00",
        test_from="2024-04-15T00:00:00+00:00",
        train_negatives_per_positive=2,
        eval_negatives=20,
    ),
    events=Source(
        "log.csv",
        columns={"user_id": "customer", "item_id": "product", "event_timestamp": "at"},
    ),
)


def derive(kind, read, given):
    for value in read["item_id"].to_pylist():
        1 / (value - 507)
    return Derived()
"""


@pytest.mark.parametrize("way", ["module", "file"])
def test_a_declaration_may_lie_elsewhere_and_a_slip_of_its_code_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    package = tmp_path / "our_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "elsewhere.py").write_text(DECLARED)
    (tmp_path / "log.csv").write_text(text_of(HEADED, PLAIN))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(datasets, "__path__", list(datasets.__path__))
    named = "our_package.elsewhere" if way == "module" else str(package / "elsewhere.py")
    monkeypatch.setenv("MEMOIR_DATASET", named)
    settings = Settings.from_env()
    assert (settings.dataset, settings.home.rsplit("/", 1)[1]) == ("elsewhere", "elsewhere")
    datasets.load.cache_clear()
    sys.modules.pop("feature_repo.datasets.elsewhere", None)
    dataset = datasets.load(settings.dataset)
    first = next(n for n, (_, i, _) in enumerate(LOG) if i == 7)
    slip = rf"elsewhere.py:28, derive: ZeroDivisionError: .* 900 rows of events .* fails on row {first}$"
    with pytest.raises(DeclarationError, match=slip):
        preview(dataset, str(tmp_path))
    sys.modules.pop("feature_repo.datasets.elsewhere", None)
    datasets.load.cache_clear()


def test_a_declaration_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMOIR_DATASET", "no_package.no_module")
    with pytest.raises(SettingsError, match="cannot be imported"):
        Settings.from_env()
    monkeypatch.setenv("MEMOIR_DATASET", "/nowhere/shop.py")
    with pytest.raises(SettingsError, match="is not there"):
        Settings.from_env()


def test_variables_of_kubernetes_are_let_through_and_others_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (
        ("MEMOIR_SERVICE_HOST", "10.0.0.7"),
        ("MEMOIR_SERVICE_PORT_HTTP", "80"),
        ("MEMOIR_PORT", "tcp://10.0.0.7:80"),
        ("MEMOIR_PORT_80_TCP_ADDR", "10.0.0.7"),
        ("MEMOIR_SHOP_PORT_80_TCP", "tcp://10.0.0.7:80"),
    ):
        monkeypatch.setenv(name, value)
    Settings.from_env()
    monkeypatch.setenv("MEMOIR_HOMME", "x")
    monkeypatch.setenv("MEMOIR_PORT_OF_CALL", "x")
    with pytest.raises(
        SettingsError, match=r"MEMOIR_HOMME; did you mean MEMOIR_HOME\? MEMOIR_PORT_OF_CALL"
    ):
        Settings.from_env()
