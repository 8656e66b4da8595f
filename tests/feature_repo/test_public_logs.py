"""Declared public logs: rows made in their published schemas walk the road up to training examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feature_repo.datasets import vk_lsvd
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from tests.conftest import run_jobs, settings_in

USERS = 12
ITEMS = 40
EVENTS = 30
DAY = 86_400


def examples_of(settings: Settings) -> pa.Table:
    run_jobs(settings, "events", "item_stats", "training_examples", num_partitions=2)
    return JobFolder(settings.home, "training_examples").read("training_examples")


def write_yambda(folder: Path) -> None:
    """`listens.parquet` of the flat version: times in steps of five seconds, of 301 days."""
    rng = np.random.default_rng(0)
    days = np.concatenate([rng.uniform(0, 299, EVENTS - 10), 299 + rng.uniform(0, 2, 10)])
    rows = [
        (user, int(day * DAY) // 5 * 5, item, int(rng.integers(2)), int(rng.integers(0, 101)), 200)
        for user in range(USERS)
        for day, item in zip(np.sort(days), rng.integers(0, ITEMS, EVENTS), strict=True)
    ]
    names = [
        "uid",
        "timestamp",
        "item_id",
        "is_organic",
        "played_ratio_pct",
        "track_length_seconds",
    ]
    kinds = [pa.uint32(), pa.uint32(), pa.uint32(), pa.uint8(), pa.uint16(), pa.uint32()]
    columns = [pa.array(c, k) for c, k in zip(zip(*rows, strict=True), kinds, strict=True)]
    (folder / "flat" / "50m").mkdir(parents=True)
    pq.write_table(pa.table(columns, names), folder / "flat" / "50m" / "listens.parquet")


def write_kuairand(folder: Path) -> None:
    """Both standard logs and the features of users and videos, with columns that nobody declares."""
    rng = np.random.default_rng(1)
    data = folder / "data"
    data.mkdir()
    begins = {"4_08_to_4_21": "2022-04-08", "4_22_to_5_08": "2022-04-22"}
    for name, first in begins.items():
        start = int(pd.Timestamp(first, tz="Asia/Shanghai").timestamp() * 1000)
        span = (14 if name.startswith("4_08") else 17) * DAY * 1000
        rows = []
        for user in range(USERS):
            for at in np.sort(rng.integers(start, start + span, EVENTS)):
                click = int(rng.random() < 0.5)
                liked = int(click and rng.random() < 0.3)
                rows.append((user, int(rng.integers(ITEMS)), 20220408, 1200, at, click, liked, 0, 0, 0, 0, click, 9000, 12000, 0, 0, 0, 0, 1))  # fmt: skip
        head = "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
        frame = pd.DataFrame(rows, columns=head.split(","))
        frame.to_csv(data / f"log_standard_{name}_1k.csv", index=False)
    users = pd.DataFrame(
        {
            "user_id": range(USERS),
            "user_active_degree": "high_active",
            "is_live_streamer": 0,
            "follow_user_num_range": "(0,10]",
            "fans_user_num_range": "[1,10)",
            "register_days_range": "31-60",
            "onehot_feat0": 1,
        }
    )
    users.to_csv(data / "user_features_1k.csv", index=False)
    videos = pd.DataFrame(
        {
            "video_id": range(ITEMS),
            "author_id": np.arange(ITEMS) % 7,
            "video_type": "NORMAL",
            "upload_dt": "2022-04-01",
            "upload_type": "LongImport",
            "video_duration": [None, *[12000.0] * (ITEMS - 1)],
            "music_id": np.arange(ITEMS) % 5,
            "tag": ["12,65", *["39"] * (ITEMS - 1)],
        }
    )
    videos.to_csv(data / "video_features_basic_1k.csv", index=False)


def write_vk_lsvd(folder: Path) -> None:
    """Week files as published, then the copy that has times."""
    rng = np.random.default_rng(2)
    published = folder / "published"
    shown = {user: rng.permutation(200) for user in range(USERS)}
    for week in (0, 1, 25, 26):
        rows = []
        for number in range(EVENTS * USERS):
            user = number % USERS
            item = int(shown[user][(week % 5) * EVENTS + number // USERS])
            rows.append((user, item, 0, 1, 1, 30, bool(rng.random() < 0.3), False, False, False, False, False))  # fmt: skip
        names = [
            "user_id",
            "item_id",
            "place",
            "platform",
            "agent",
            "timespent",
            "like",
            "dislike",
            "share",
            "bookmark",
            "click_on_author",
            "open_comments",
        ]
        kinds = [pa.uint32(), pa.uint32(), *[pa.uint8()] * 4, *[pa.bool_()] * 6]
        columns = [pa.array(c, k) for c, k in zip(zip(*rows, strict=True), kinds, strict=True)]
        split = {25: "validation", 26: "test"}.get(week, "train")
        (published / split).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns, names), published / split / f"week_{week:02d}.parquet")
    assert vk_lsvd.with_times(published, folder / "interactions") == 4
    users = {
        "user_id": range(USERS),
        "age": [30] * USERS,
        "gender": [1] * USERS,
        "geo": [5] * USERS,
    }
    items = {
        "item_id": range(200),
        "author_id": [i % 9 for i in range(200)],
        "duration": [40] * 200,
    }
    pq.write_table(pa.table(users), folder / "users_metadata.parquet")
    pq.write_table(pa.table(items), folder / "items_metadata.parquet")


@pytest.mark.parametrize(
    ("name", "write"),
    [("yambda_50m", write_yambda), ("kuairand_1k", write_kuairand), ("vk_lsvd", write_vk_lsvd)],
)
def test_a_public_log_becomes_examples_of_its_periods(
    name: str, write: Any, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data)
    settings = settings_in(tmp_path / "home", name, data)
    examples = examples_of(settings)
    found = JobFolder(settings.home, "events").require().counts
    assert found["rows_dead_letters"] == 0
    periods = set(examples["split"].to_pylist())
    assert periods == {"train", "validation", "test"}
    labels = [column for column in examples.column_names if column.startswith("label_")]
    for column in labels:
        share = pc.mean(examples[column].cast(pa.float64())).as_py()
        assert 0 < share < 1, column


def test_weeks_without_times_keep_their_order(tmp_path: Path) -> None:
    write_vk_lsvd(tmp_path)
    before = pq.read_table(tmp_path / "published" / "test" / "week_26.parquet")
    after = pq.read_table(tmp_path / "interactions" / "week_26.parquet")
    assert after.drop_columns("timestamp").equals(before)
    times = after["timestamp"].cast(pa.int64()).to_numpy()
    assert (np.diff(times) > 0).all()
    week = vk_lsvd.BEGINNING_US + 26 * vk_lsvd.WEEK_US
    assert times[0] == week
    assert times[-1] < week + vk_lsvd.WEEK_US
    with pytest.raises(ValueError, match="no file week_NN"):
        vk_lsvd.with_times(tmp_path / "nowhere", tmp_path / "x")
