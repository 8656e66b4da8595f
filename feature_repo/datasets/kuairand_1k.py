"""KuaiRand-1K (Gao et al., CIKM 2022): videos shown to a thousand users of a short-video service, read from a folder
that a person gives; it is never shipped, and was not run here.

The folder holds `log_standard_*_1k.csv`, `user_features_1k.csv` and `video_features_basic_1k.csv`, as published below
`data/`. Each row of the log is one video shown at one time, with what the user did: clicked, liked, watched for long.
What is ranked is the click, given which the others are counted; a time has few videos, so GAUC says more than NDCG.
"""

from __future__ import annotations

from feature_repo.contract.schema import (
    BAG,
    CATEGORY,
    NUMBER,
    Column,
    DatasetSpec,
    DType,
    Examples,
    Requests,
    Source,
    Task,
)


def category(name: str, doc: str) -> Column:
    """A text column that rankers read and some rows lack."""
    return Column(name, DType.STRING, doc, kind=CATEGORY, nullable=True)


SPEC = DatasetSpec(
    name="kuairand_1k",
    title="KuaiRand-1K",
    user_id=DType.INT64,
    item_id=DType.INT64,
    actions=("click", "like", "long_view", "shown"),
    shown="shown",
    tasks=(
        Task("label_click", "clicked when shown", action="click"),
        Task("label_like", "liked when shown", action="like"),
        Task("label_long_view", "watched for long when shown", action="long_view"),
    ),
    requests=Requests(
        Examples.IMPRESSIONS,
        validation_from="2022-05-04T00:00:00+08:00",
        test_from="2022-05-06T00:00:00+08:00",
    ),
    events=Source(
        ("data/log_standard_*_1k.csv", "log_standard_*_1k.csv"),
        columns={"item_id": "video_id", "event_timestamp": "time_ms"},
        time_unit="milliseconds",
        flags={"click": "is_click", "like": "is_like", "long_view": "long_view"},
    ),
    users=Source(("data/user_features_1k.csv", "user_features_1k.csv")),
    items=Source(
        ("data/video_features_basic_1k.csv", "video_features_basic_1k.csv"),
        columns={"item_id": "video_id"},
        list_separator=",",
    ),
    event_features=(
        Column("play_time_ms", DType.FLOAT32, "watched, milliseconds", kind=NUMBER, minimum=0),
    ),
    context_features=(category("tab", "place in the app that asks"),),
    user_features=(
        category("user_active_degree", "how active the user is"),
        category("follow_user_num_range", "users that they follow, a band"),
        category("fans_user_num_range", "users that follow them, a band"),
        category("register_days_range", "days since they registered, a band"),
    ),
    item_features=(
        category("author_id", "who made the video"),
        category("video_type", "normal or advertisement"),
        category("upload_type", "how it was uploaded"),
        category("music_id", "its music"),
        Column(
            "video_duration", DType.FLOAT32, "milliseconds", kind=NUMBER, minimum=0, nullable=True
        ),
        Column("tag", DType.STRING_LIST, "topics", kind=BAG, nullable=True),
    ),
    items_repeat=False,
)
