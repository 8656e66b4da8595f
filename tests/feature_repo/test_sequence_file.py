"""Plain sequence files become history logs; what is no sequence file is refused with its line."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from feature_repo.history.history import HistoryLog
from feature_repo.home.tables import JobFolder
from feature_repo.raw import sequence_file
from feature_repo.raw.sequence_file import SequenceFileError, read, sequence_contract, write_log


def write(tmp_path: Path, text: str, *, packed: bool = False, name: str = "some.txt") -> Path:
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def log_of(folder: JobFolder) -> dict[int, list[int]]:
    log = HistoryLog(sequence_contract(), folder)
    histories = log.gather(np.arange(len(log.users)), log.lengths)
    items = log.items.take(histories.item_keys).to_pylist()
    return {
        user: items[histories.offsets[i] : histories.offsets[i + 1]]
        for i, user in enumerate(log.users.to_pylist())
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "text", ["7 30\n7 10\n2 20\n2 30\n", "7\t30\n7\t10\n2\t20\n2\t30\n", "7 30 10\n2 20 30"]
)
def test_both_forms_make_the_same_log(tmp_path: Path, text: str, packed: bool) -> None:
    """The list form is told from the pair form by its first line."""
    folder = write_log(write(tmp_path, text, packed=packed), str(tmp_path / "home"))
    assert log_of(folder) == {2: [20, 30], 7: [30, 10]}


def test_a_users_lines_may_stand_apart(tmp_path: Path) -> None:
    """Order within a user is the order of lines; how many are torn is counted."""
    path = write(tmp_path, "1 5\n2 6\n1 4\n2 5\n3 9\n")
    assert read(path).counts == {"events": 5, "users": 3, "items": 4, "torn": 2}
    assert log_of(write_log(path, str(tmp_path / "home"))) == {1: [5, 4], 2: [6, 5], 3: [9]}


def test_repeated_lines_are_events(tmp_path: Path) -> None:
    assert log_of(write_log(write(tmp_path, "1 5\n1 5\n"), str(tmp_path / "home"))) == {1: [5, 5]}


def test_the_k_th_event_is_stamped_k_seconds_after_the_epoch(tmp_path: Path) -> None:
    folder = write_log(write(tmp_path, "1 5\n1 6\n1 7\n2 8\n"), str(tmp_path / "home"))
    log = HistoryLog(sequence_contract(), folder)
    assert log.gather(np.arange(2), log.lengths).times.tolist() == [0, 1_000_000, 2_000_000, 0]


def test_a_rerun_leaves_the_same_bytes_and_a_changed_file_another_log(tmp_path: Path) -> None:
    path, home = write(tmp_path, "1 5\n1 6\n"), str(tmp_path / "home")
    folder = write_log(path, home)
    part = Path(folder.paths("history_log")[0])
    before, manifest, stamp = part.read_bytes(), folder.require(), part.stat().st_mtime_ns
    assert write_log(path, home).require() == manifest
    assert part.stat().st_mtime_ns == stamp
    Path(folder.root, "manifest.json").unlink()
    assert write_log(path, home).require() == manifest
    assert part.read_bytes() == before
    write(tmp_path, "1 5\n1 7\n")
    assert log_of(write_log(path, home)) == {1: [5, 7]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("1\n", "line 1: user 1 has no item; expected 'user item'"),
        ("1 2\n1 x\n", "line 2: expected whole numbers of 64 bits .* found '1 x'"),
        ("1 2\n1 3 4\n", "line 2: user 1 already stands on line 1"),
        ("1 2\n1 3.5\n", "line 2"),
        ("1 2\n1 \n", "line 2"),
        ("1 2 3\n2 a b\n", "line 2: expected whole numbers"),
        ("1 2 3\n2\n", "line 2: user 2 has no item"),
        ("1 2 3\n1 4 5\n", "line 2: user 1 already stands on line 1"),
        ("1 2 3\n2 99999999999999999999 1\n", "line 2"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SequenceFileError, match=message):
        write_log(write(tmp_path, text), str(tmp_path / "home"))
    assert JobFolder(str(tmp_path / "home"), sequence_file.JOB).manifest() is None


def test_a_gzip_that_ends_early_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "".join(f"{u} {i}\n" for u in range(50) for i in range(50)), packed=True)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SequenceFileError, match=r"ends early or is damaged.*fetch it again"):
        write_log(path, str(tmp_path / "home"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SequenceFileError, match="is no file"):
        write_log(tmp_path / "none.txt", str(tmp_path / "home"))


PAIRS = [(1, 2), (1, 3), (2, 2)]
LISTS = [(1, 2), (1, 3), (2, 2), (2, 5)]


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"\xef\xbb\xbf1 2\n1 3\n2 2\n", PAIRS),
        (b"\xef\xbb\xbf1 2 3\n2 2 5\n", LISTS),
        (b"1 2 \n1 3 \n2 2 \n", PAIRS),
        (b"1  2\n1  3\n2  2\n", PAIRS),
        (b" 1 2\n 1 3\n 2 2\n", PAIRS),
        (b"1 2\n1 3\n2 2\n \n", PAIRS),
        (b"1\t2\r\n1\t3\r\n2\t2\r\n", PAIRS),
        (b"1 2\n2 3 4 5\n3 5 6\n", [(1, 2), (2, 3), (2, 4), (2, 5), (3, 5), (3, 6)]),
        (b"-1 0\n-1 5\n0 0\n", [(-1, 0), (-1, 5), (0, 0)]),
        (b"5000000000 9007199254740993\n", [(5000000000, 9007199254740993)]),
    ],
)
def test_files_as_people_have_them_are_read(
    tmp_path: Path, data: bytes, events: list[tuple[int, int]]
) -> None:
    (tmp_path / "f.txt").write_bytes(data)
    found = read(tmp_path / "f.txt")
    assert list(zip(found.users.tolist(), found.items.tolist(), strict=True)) == events


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"196 242 3 881250949\n186 302 3 891717742\n", "looks like a time"),
        (b"1 242 881250949\n1 302 891717742\n", "looks like a time"),
        (b"0x10 2\n0x11 3\n", "line 1"),
        (b"1_0 2\n", "line 1"),
        (b"1 2\n18446744073709551615 1\n", "line 2"),
        (b"user_id item_id\n1 2\n", "line 1"),
        ("1 2\n".encode("utf-16"), "line 1"),
        (b"1 2\n1 2-3\n", "line 2"),
    ],
)
def test_what_is_no_sequence_file_is_refused_by_line(
    tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "f.txt").write_bytes(data)
    with pytest.raises(SequenceFileError, match=message):
        read(tmp_path / "f.txt")
