"""Messages on the wire: RankRequest, RankResponse, and the decoder that says what is wrong with
a body.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from feature_repo.contract.contract import EVENT_ID, Contract
from feature_repo.contract.schema import MAX_ID_BYTES, MAX_TEXT_BYTES, Column, DType
from serving.api.degraded import Degraded
from serving.api.errors import BadRequestError, InvalidRequestError
from serving.api.slow import SlowResponse

MAX_CANDIDATES = 5_000
# Events of one user at a time
MAX_EVENTS = 1_000
MAX_BATCH = 64  # requests
MAX_EXPLAINED = 50  # events
MAX_ADDED_EVENTS = 50  # events
JSON = "application/json"
MSGPACK = "application/msgpack"
MAX_BODY_BYTES = 1 << 20
# Values of a bag in a request's context
MAX_LIST = 1_000
# Messages that callers write
ASKED = frozenset(
    {
        "Event",
        "EventsRequest",
        "ExplainRequest",
        "HistoryRequest",
        "PrepareRequest",
        "RankBatch",
        "RankContext",
        "RankRequest",
        "WhatIf",
    }
)
BEYOND_DOUBLES = "Beyond 2^53 a client that reads numbers as doubles, as JavaScript does, changes an id: let the dataset declare such ids as text"
INT64 = range(-(2**63), 2**63)
EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
LATEST = datetime(2262, 1, 1, tzinfo=UTC)

Id = int | Annotated[str, Meta(min_length=1, max_length=MAX_ID_BYTES)]


# What an answer can be asked to do without, for a look at what it would be worth then.
Simulated = Literal[
    "store_unavailable", "no_history", "no_sketch", "no_tokens", "no_scores", "deadline"
]


class RankContext(Struct, forbid_unknown_fields=True):
    """Circumstances of a request; a dataset's own context features stand beside the time."""

    # When the user asks; the server's clock unless given
    request_timestamp: (
        Annotated[datetime, Meta(extra_json_schema={"format": "date-time"})] | None
    ) = None


class WhatIf(Struct, forbid_unknown_fields=True):
    """A past that is not the user's, for this answer alone: nothing is stored.

    Ranked from the newest events then, without stored tokens, which no event can be taken out of;
    statistics and the sketch keep an event that is left out.
    """

    without: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=MAX_EVENTS)] = []
    # Places of events that never were, 0 for the newest.


class RankRequest(Struct, forbid_unknown_fields=True):
    """Rank these candidates for this user.

    `bundle`, `simulate` and `what_if` are for looking into the ranker; where callers have API keys they need
    the scope `explain`.
    """

    user_id: Id
    candidates: Annotated[list[Id], Meta(min_length=1, max_length=MAX_CANDIDATES)]
    # How many of the best to return; all unless given
    k: Annotated[int, Meta(ge=1)] | None = None
    context: RankContext | None = None
    # Whether to name each task's own score
    task_scores: bool = False
    # Milliseconds from arrival; at most the server's own
    deadline_ms: Annotated[float, Meta(gt=0)] | None = None
    # One of the loaded bundles; the live one unless given
    bundle: str | None = None
    # Answer as if this were so
    simulate: Simulated | None = None
    what_if: WhatIf | None = None


class RankBatch(Struct, forbid_unknown_fields=True):
    """Several requests at once, answered one after the other within the time of one."""

    requests: Annotated[list[RankRequest], Meta(min_length=1, max_length=MAX_BATCH)]


class Timings(Struct):
    """Milliseconds of each stage."""

    queue: float = 0.0
    user_read: float = 0.0
    # Waiting for the model's thread
    model_wait: float = 0.0
    item_read: float = 0.0
    features: float = 0.0
    encode_user: float = 0.0
    score: float = 0.0
    sort: float = 0.0


class RankResponse(Struct):
    """Candidates, best first. `scores` are what they are ranked by: the mean of the tasks' scores under
    the dataset's weights; `task_scores` are each task's, where asked for. A score is between 0 and 1:
    the model's probability of the label among candidates such as it was trained on. Where negatives are
    drawn (`Examples.ACTIONS`) that is not the label's probability in the world: order by it, do not
    multiply by it. The report's line "Calibration" says how far it can be trusted.

    `degraded` names what the answer had to do without, and is empty when nothing was missing. With
    `no_scores` or `deadline` among it candidates are in the request's order, and `scores` is empty.
    """

    item_ids: list[int | str]
    scores: list[float]
    bundle: str
    # Version of the stored summary tokens that were ranked with
    tokens: str | None
    degraded: list[Degraded]
    unknown_items: list[int | str]
    timings_ms: Timings
    # Left out unless asked for
    task_scores: dict[str, list[float]] | UnsetType = UNSET
    # The id of an answer that was logged: events under it are its labels
    request_id: str | UnsetType = UNSET


class RankBatchResponse(Struct):
    """The requests' answers, in their order."""

    answers: list[RankResponse]


class PrepareResponse(Struct):
    """The outcome of encoding a user ahead.

    A ranking finds it by the same user, bundle and context, its time among it: send `request_timestamp` as its
    `context.request_timestamp`, and the other features of the context alike. `state` is
    `encoded`, `extended` or `known` where it is kept now, and `not_kept` where nothing is: the user has no history, or the time
    was up (`degraded` says so), or the server keeps none.
    """

    bundle: str
    request_timestamp: datetime
    state: Literal["encoded", "extended", "known", "not_kept"]
    degraded: list[Degraded]


class EventEffect(Struct):
    """One event of the history, and by how much the logit would be lower without it."""

    item_id: int | str
    event_timestamp: datetime
    action: str
    effect: float


class ColumnEffect(Struct):
    """One column that trees read, and what it adds to the candidate's logit (`pred_contrib`)."""

    name: str
    # Null where it is missing
    value: float | None
    effect: float


class ScoreParts(Struct):
    """The parts of a logit, as it is ranked.

    `item` is the logit of the same candidate for a user of whom nothing is known. The others are by how much the
    logit would be lower with summary tokens of zeros, without the counts of the whole past, and without the newest
    events; what only several of them say together is in none.
    """

    item: float
    tokens: float
    counts: float
    events: float


class ExplainResponse(Struct):
    """Why a candidate is where it is.

    `score` is the one that a ranking gives. `events` are effects on the logit of the newest events that the store holds; where
    a bundle's own summary tokens stand for these, without them, since no event can be taken out of a token. `features` are the numbers that the model was given of the candidate, null where one is
    missing. `tokens` are the effects of the stored summary tokens: by how much the logit that is ranked
    with all of them would be lower without each. `columns` are what each column adds to the logit by the
    bundle's trees, the largest effects first; with the effect of `(all alike)`, what every candidate starts from,
    they sum to the trees' part of the logit.
    """

    score: float
    features: dict[str, float | None]
    events: list[EventEffect]  # newest first
    # Empty where none are stored
    tokens: list[float]
    # Empty where the bundle has no trees
    columns: list[ColumnEffect]
    parts: ScoreParts
    bundle: str
    degraded: list[Degraded]


class PastEvent(Struct):
    """One event that the online store holds of a user."""

    item_id: int | str
    event_timestamp: datetime
    action: str
    # Values by event feature
    values: dict[str, Any]


class HistoryResponse(Struct):
    """A user's newest events in the online store, and how many they stand for."""

    events: list[PastEvent]  # newest first
    # Events of the whole past
    num_events: int
    # Version of the stored summary tokens
    tokens: str | None
    num_tokens: int
    # Events that the tokens have not seen
    events_behind: int
    # Time of the newest event in them
    tokens_as_of: datetime | None
    # Titles of the events' items and of those asked for, where the tables hold some
    titles: dict[str, str]
    degraded: list[Degraded]


class EventsResponse(Struct):
    """The outcome of a user's events."""

    added: int
    # Events that were there already: the same item, action and time
    known: int
    # Events older than all that is stored of a longer past: the next batch knows them
    waiting: int = 0


class KnownUser(Struct):
    """A user to look at."""

    user_id: int | str
    num_events: int


class KnownItem(Struct):
    """An item to rank."""

    item_id: int | str
    title: str | None


class ReportRow(Struct):
    """One ranker of the last report, with its 95 % intervals."""

    name: str
    # Value, low, high
    ndcg: tuple[float, float, float]
    gauc: tuple[float, float, float]


class OverviewResponse(Struct):
    """The overview that the page shows first."""

    dataset: str
    # The time of requests without one; the clock unless given
    as_of: datetime | None
    # Loaded bundles, the live one first
    bundles: list[str]
    # Some, with long and with short histories
    users: list[KnownUser]
    # Some, the most frequent of late first
    items: list[KnownItem]
    # Up to when each job's tables know events
    built: dict[str, datetime]
    # Share of users with summary tokens of the live bundle
    coverage: float | None
    # The live bundle's; empty where none is here
    report: list[ReportRow]
    # What its answers are worth without something, by reason
    degraded: list[ReportRow]
    # What an answer can be asked to do without, and what that means
    simulated: dict[str, str]


class ErrorBody(Struct):
    """Why a request was refused."""

    error: str
    message: str


@cache
def request_type(
    fields: tuple[Column, ...], event: type[Struct] | None = None
) -> type[RankRequest]:
    """`RankRequest` with the context features and the events of a dataset.

    Args:
        fields: the context features.
        event: `event_type` of the dataset; default: a what-if history adds no event.
    """
    own: list[tuple[str, Any, Any]] = []
    if fields:
        named = [(column.name, _wire_type(column) | None, None) for column in fields]
        context = msgspec.defstruct(
            "RankContext", named, bases=(RankContext,), forbid_unknown_fields=True
        )
        # The schema of a message takes its description from the class's docstring.
        context.__doc__ = RankContext.__doc__
        own.append(("context", context | None, None))
    if event is not None:
        some = Annotated[list[event], Meta(max_length=MAX_ADDED_EVENTS)]  # type: ignore[valid-type]
        what_if = msgspec.defstruct(
            "WhatIf", [("events", some, [])], bases=(WhatIf,), forbid_unknown_fields=True
        )
        what_if.__doc__ = WhatIf.__doc__
        own.append(("what_if", what_if | None, None))
    if not own:
        return RankRequest
    made: Any = msgspec.defstruct(
        "RankRequest", own, bases=(RankRequest,), forbid_unknown_fields=True
    )
    made.__doc__ = RankRequest.__doc__
    return cast(type[RankRequest], made)


def request_of(contract: Contract) -> type[RankRequest]:
    """`request_type` of a contract."""
    return request_type(contract.spec.context_features, event_of(contract))


@cache
def batch_type(request: type[RankRequest]) -> type[RankBatch]:
    """`RankBatch` of such requests."""
    some = Annotated[list[request], Meta(min_length=1, max_length=MAX_BATCH)]  # type: ignore[valid-type]
    made: Any = msgspec.defstruct(
        "RankBatch", [("requests", some)], bases=(RankBatch,), forbid_unknown_fields=True
    )
    made.__doc__ = RankBatch.__doc__
    return cast(type[RankBatch], made)


@cache
def prepare_type(request: type[RankRequest]) -> type[Struct]:
    """`PrepareRequest` with the context of such requests."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(request)}
    own = ("context", "deadline_ms", "bundle")
    made = msgspec.defstruct(
        "PrepareRequest",
        [("user_id", Id), *((name, kinds[name], None) for name in own)],
        forbid_unknown_fields=True,
    )
    made.__doc__ = "Encode a user ahead of a ranking whose candidates are not known yet."
    return made


def decode_prepare(body: bytes, contract: Contract, media: str = JSON) -> RankRequest:
    """The request to be prepared for, without candidates.

    Raises:
        BadRequestError, InvalidRequestError: as of `decode_request`.
    """
    kind = request_of(contract)
    asked: Any = _decoded(prepare_type(kind), body, media)
    request = kind(
        asked.user_id,
        [],
        context=asked.context,
        deadline_ms=asked.deadline_ms,
        bundle=asked.bundle,
    )
    _check_request(request, contract)
    return request


@cache
def explain_type(request: type[RankRequest]) -> type[Struct]:
    """`ExplainRequest` with the context and the what-if history of such requests."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(request)}
    made = msgspec.defstruct(
        "ExplainRequest",
        [
            ("user_id", Id),
            ("candidate", Id),
            ("context", kinds["context"], None),
            ("num_events", Annotated[int, Meta(ge=0, le=MAX_EXPLAINED)], 20),
            ("bundle", str | None, None),
            ("what_if", kinds["what_if"], None),
        ],
        forbid_unknown_fields=True,
    )
    made.__doc__ = "Explain one candidate for a user, by so many of the newest events."
    return made


def decode_explain(body: bytes, contract: Contract, media: str = JSON) -> tuple[RankRequest, int]:
    """The request to be explained, of one candidate, and by how many events.

    Raises:
        BadRequestError, InvalidRequestError: as of `decode_request`.
    """
    kind = request_of(contract)
    asked: Any = _decoded(explain_type(kind), body, media)
    request = kind(
        asked.user_id,
        [asked.candidate],
        context=asked.context,
        bundle=asked.bundle,
        what_if=asked.what_if,
    )
    _check_request(request, contract)
    return request, asked.num_events


class HistoryRequest(Struct, forbid_unknown_fields=True):
    """Tell what is known of a user, and what a person reads of some items."""

    user_id: Id
    # Items to be named among `titles`
    items: Annotated[list[Id], Meta(max_length=MAX_CANDIDATES)] = []


def decode_history(body: bytes, contract: Contract, media: str = JSON) -> HistoryRequest:
    """Whose history is asked for.

    Raises:
        BadRequestError, InvalidRequestError: as of `decode_request`.
    """
    asked: HistoryRequest = _decoded(HistoryRequest, body, media)
    check_id("user_id", asked.user_id, contract.user.dtype)
    check_ids("items", asked.items, contract.item.dtype)
    return asked


@cache
def event_type(
    item: str, actions: tuple[str, ...], features: tuple[Column, ...], *, named: bool = False
) -> type[Struct]:
    """One event with the columns of a dataset's histories; a column that an event may lack is left out
    or null.

    Args:
        item: join key of items.
        features: event features.
        named: whether the source names its events, so that a line of a file may correct this one.
    """
    action: Any = Literal[actions]
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = [
        (item, Id),
        ("event_timestamp", Annotated[datetime, Meta(tz=True)]),
        ("action", action, actions[0]),
    ]
    if named:
        name = Annotated[str, Meta(min_length=1, max_length=MAX_ID_BYTES)]
        fields.append((EVENT_ID.name, name | None, None))
    for column in features:
        kind = _wire_type(column)
        fields.append((column.name, kind | None, None) if column.nullable else (column.name, kind))
    # Those that must be there first
    fields.sort(key=len)
    event = msgspec.defstruct("Event", fields, forbid_unknown_fields=True)
    event.__doc__ = "One event of a user."
    return event


def event_of(contract: Contract) -> type[Struct]:
    """`event_type` of a contract."""
    spec = contract.spec
    # What a user was shown is in no history.
    actions = tuple(name for name in spec.actions if name != spec.shown)
    return event_type(
        contract.item.join_key,
        actions,
        tuple(spec.event_features),
        named=EVENT_ID.name in spec.event_identity,
    )


@cache
def events_type(event: type[Struct]) -> type[Struct]:
    """A user's new events: `EventsRequest`."""
    made = msgspec.defstruct(
        "EventsRequest",
        [
            ("user_id", Id),
            ("events", Annotated[list[event], Meta(min_length=1, max_length=MAX_EVENTS)]),  # type: ignore[valid-type]
        ],
        forbid_unknown_fields=True,
    )
    made.__doc__ = "New events of one user, in any order."
    return made


def decode_events(
    body: bytes, contract: Contract, media: str = JSON
) -> tuple[Id, list[dict[str, Any]]]:
    """A user and their new events, oldest first, as histories hold them.

    Raises:
        BadRequestError, InvalidRequestError: as of `decode_request`.
    """
    asked: Any = _decoded(events_type(event_of(contract)), body, media)
    check_id("user_id", asked.user_id, contract.user.dtype)
    return asked.user_id, events_in_order(asked.events, contract)


def events_in_order(
    events: Sequence[Any], contract: Contract, where: str = ""
) -> list[dict[str, Any]]:
    """Events as histories hold them, oldest first.

    Raises:
        InvalidRequestError: an id or a time that cannot be.
    """
    number = {name: at for at, name in enumerate(contract.spec.actions)}
    found = []
    for position, event in enumerate(events):
        name = f"{where}events[{position}]"
        item = getattr(event, contract.item.join_key)
        check_id(f"{name}.{contract.item.join_key}", item, contract.item.dtype)
        if not EARLIEST <= event.event_timestamp <= LATEST:
            raise InvalidRequestError(
                f"{name}.event_timestamp must lie between {EARLIEST.date()} and {LATEST.date()}"
            )
        found.append(msgspec.structs.asdict(event) | {"action": number[event.action]})
    return sorted(found, key=lambda event: event["event_timestamp"])


def _decoded(kind: Any, body: bytes, media: str) -> Any:
    """A body as what it says.

    Raises:
        InvalidRequestError: it has the wrong shape, or names a field twice.
        BadRequestError: it is no JSON or msgpack.
    """
    try:
        made = _decoder(kind, media).decode(body)
        if media != MSGPACK:
            json.loads(body, object_pairs_hook=_each_once)
        return made
    except msgspec.ValidationError as error:
        raise InvalidRequestError(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = "msgpack" if media == MSGPACK else "JSON"
        raise BadRequestError(f"the body is no {what}: {error}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> None:
    """Refuse a name that an object has twice: readers differ in which one they take.

    Raises:
        InvalidRequestError: see there.
    """
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequestError(f"the body names {twice!r} twice in one object")


@cache
def _decoder(kind: Any, media: str) -> msgspec.json.Decoder[Any] | msgspec.msgpack.Decoder[Any]:
    made = msgspec.msgpack.Decoder if media == MSGPACK else msgspec.json.Decoder
    return made(kind)


def encoded(answer: Any, media: str) -> bytes:
    """An answer as JSON or msgpack."""
    return (msgspec.msgpack if media == MSGPACK else msgspec.json).encode(answer)


def _wire_type(column: Column) -> Any:
    """How JSON writes a column: its type, with the column's limits."""
    doc = Meta(description=column.doc) if column.doc else Meta()
    if column.values is not None:
        return Annotated[Literal[column.values], doc]
    if column.dtype is DType.STRING:
        return Annotated[str, Meta(max_length=MAX_TEXT_BYTES), doc]
    if column.dtype is DType.TIMESTAMP:
        return Annotated[datetime, Meta(tz=True), doc]
    if column.dtype is DType.STRING_LIST:
        return Annotated[list[str], Meta(max_length=MAX_LIST), doc]
    if column.dtype is DType.FLOAT32_LIST:
        length = column.max_length
        return Annotated[list[float], Meta(min_length=length, max_length=length), doc]
    low, high = column.bounds
    kind = float if column.dtype is DType.FLOAT32 else int
    if kind is int:
        bits = {DType.INT8: 8, DType.INT32: 32, DType.INT64: 64}[column.dtype]
        low = max(-(2 ** (bits - 1)), -(2**63) if low is None else int(low))
        high = min(2 ** (bits - 1) - 1, 2**63 - 1 if high is None else int(high))
    return Annotated[kind, Meta(ge=low, le=high), doc]


def decode_request(body: bytes, contract: Contract, media: str = JSON) -> RankRequest:
    """A request from its body.

    Raises:
        BadRequestError: the body is not of its media type.
        InvalidRequestError: unknown fields, wrong types, no or too many candidates, ids of the
            wrong kind, context that its columns do not allow.
    """
    request: RankRequest = _decoded(request_of(contract), body, media)
    _check_request(request, contract)
    return request


def decode_batch(body: bytes, contract: Contract, media: str = JSON) -> list[RankRequest]:
    """The requests of a batch.

    Raises:
        BadRequestError, InvalidRequestError: as of `decode_request`; one of them is enough.
    """
    batch: RankBatch = _decoded(batch_type(request_of(contract)), body, media)
    for position, request in enumerate(batch.requests):
        _check_request(request, contract, f"requests[{position}].")
    return batch.requests


def _check_request(request: RankRequest, contract: Contract, where: str = "") -> None:
    check_id(f"{where}user_id", request.user_id, contract.user.dtype)
    check_ids(f"{where}candidates", request.candidates, contract.item.dtype)
    if request.context and (at := request.context.request_timestamp):
        if at.tzinfo is None:
            raise InvalidRequestError(
                f"{where}context.request_timestamp needs a time zone, such as 2011-12-09T12:00:00Z"
            )
        if not EARLIEST <= at <= LATEST:
            raise InvalidRequestError(
                f"{where}context.request_timestamp must lie between {EARLIEST.date()} and {LATEST.date()}, not {at.isoformat()}"
            )


def check_ids(name: str, values: Sequence[int | str], dtype: DType) -> None:
    """Ids of the contract's type.

    Raises:
        InvalidRequestError: as of `check_id`, of the first that is wrong.
    """
    # All at once where all are plainly well, which they nearly always are: a name for each costs ten times as much.
    kinds = set(map(type, values))
    if dtype is DType.STRING:
        # A character has at most four bytes.
        well = kinds <= {str} and 4 * max(map(len, values), default=0) <= MAX_ID_BYTES  # type: ignore[arg-type]
    else:
        well = kinds <= {int} and (not values or (min(values) in INT64 and max(values) in INT64))
    if well:
        return
    for place, value in enumerate(values):
        check_id(f"{name}[{place}]", value, dtype)


def check_id(name: str, value: int | str, dtype: DType) -> None:
    """An id of the contract's type.

    Raises:
        InvalidRequestError: its type is wrong, or it is out of range.
    """
    if dtype is DType.STRING:
        if not isinstance(value, str):
            raise InvalidRequestError(f"{name} must be a string, not {value!r}")
        # Ids are what the log holds, whatever characters those are; only their length is bounded,
        # there as here.
        if len(value.encode(errors="surrogatepass")) > MAX_ID_BYTES:
            raise InvalidRequestError(
                f"{name} has more than {MAX_ID_BYTES:,} bytes in UTF-8: {value[:40]!r}…"
            )
    elif not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be an integer, not {value!r}")
    elif value not in INT64:
        raise InvalidRequestError(f"{name} is beyond 64 bits: {value}")


def schemas(contract: Contract | None) -> dict[str, Any]:
    """JSON schemas of all messages, for OpenAPI."""
    request = request_type(()) if contract is None else request_of(contract)
    events = () if contract is None else (events_type(event_of(contract)), EventsResponse)
    _, components = msgspec.json.schema_components(
        (
            request,
            RankResponse,
            batch_type(request),
            RankBatchResponse,
            prepare_type(request),
            PrepareResponse,
            explain_type(request),
            ExplainResponse,
            HistoryRequest,
            HistoryResponse,
            OverviewResponse,
            SlowResponse,
            ErrorBody,
            *events,
        ),
        ref_template="#/components/schemas/{name}",
    )
    if contract is not None:
        _ids_of(contract, components)
    _lists_of_tuples(components)
    for name in ASKED & set(components):
        _say_defaults(components[name])
    components["Degraded"]["description"] = "; ".join(
        f"`{reason}`: {reason.meaning}" for reason in Degraded
    )
    return components


def _say_defaults(schema: dict[str, Any]) -> None:
    """Leave out the defaults of what a caller may leave out, and say defaults that are values: generators of clients take a
    field with a default for one that is always there.
    """
    for field in schema["properties"].values():
        default = field.pop("default", None)
        if default is not None:
            # The page begins with it.
            field["x-default"] = default
            said = f"Default: {json.dumps(default)}."
            field["description"] = f"{field.get('description', '')} {said}".strip()


def _lists_of_tuples(schema: Any) -> None:
    """Write tuples of one kind as lists of a fixed length: generators of clients know no `prefixItems`."""
    if isinstance(schema, list):
        for each in schema:
            _lists_of_tuples(each)
    if not isinstance(schema, dict):
        return
    if kinds := schema.pop("prefixItems", None):
        assert all(kind == kinds[0] for kind in kinds), kinds
        schema["items"] = kinds[0]
    for each in schema.values():
        _lists_of_tuples(each)


def _ids_of(contract: Contract, components: dict[str, Any]) -> None:
    """Write the contract's own types of ids in place of "a number or a text"."""
    user, item = (
        {"type": "string", "minLength": 1, "maxLength": MAX_ID_BYTES}
        if entity.dtype is DType.STRING
        else {
            "type": "integer",
            "format": "int64",
            "minimum": INT64.start,
            "maximum": INT64.stop - 1,
            "description": BEYOND_DOUBLES,
        }
        for entity in (contract.user, contract.item)
    )
    asked = ("RankRequest", "PrepareRequest", "EventsRequest", "ExplainRequest", "HistoryRequest")
    for name in asked:
        components[name]["properties"]["user_id"] = user
    components["Event"]["properties"][contract.item.join_key] = item
    components["RankRequest"]["properties"]["candidates"]["items"] = item
    components["HistoryRequest"]["properties"]["items"]["items"] = item
    components["ExplainRequest"]["properties"]["candidate"] = item
    for name in ("item_ids", "unknown_items"):
        kept = ("type", "format", "description")
        components["RankResponse"]["properties"][name]["items"] = {
            key: item[key] for key in kept if key in item
        }
