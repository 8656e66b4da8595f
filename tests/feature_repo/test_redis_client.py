"""Addresses of a Redis, as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from feature_repo.errors import SettingsError, advice_on
from feature_repo.home.redis_client import (
    RedisAddress,
    client_of,
    slot_of,
    tag_of_slot,
    with_socket_timeout,
)


@pytest.mark.parametrize(
    ("text", "nodes", "options"),
    [
        ("store", [("store", 6379)], {}),
        ("a:1,b:2,db=3,ssl=true", [("a", 1), ("b", 2)], {"db": 3, "ssl": True}),
        # A password is a text, whatever it reads as.
        ("a:1,password=true", [("a", 1)], {"password": "true"}),
        ("a:1,username=7,password=0123", [("a", 1)], {"username": "7", "password": "0123"}),
        ("a:1,password==x=", [("a", 1)], {"password": "=x="}),
        ("redis://a", [("a", 6379)], {}),
        ("redis://a:1,b:2", [("a", 1), ("b", 2)], {}),
        ("redis://me:p%2Cw%40%2F@a:1/5", [("a", 1)], {"username": "me", "password": "p,w@/", "db": 5}),
        ("rediss://:12@[::1]:7?socket_timeout=2", [("::1", 7)], {"ssl": True, "password": "12", "socket_timeout": 2}),
    ],
)  # fmt: skip
def test_what_an_address_says(text: str, nodes: list[Any], options: dict[str, Any]) -> None:
    found = RedisAddress.parse(text)
    assert list(found.nodes) == nodes
    assert found.options == options


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:1,password=first,secret", "neither host:port nor option=value"),
        ("redis://:se/cret@a:1", "names a database that is no number"),
        ("https://a:1", "begins with https://"),
        ("password=secret", "names no host"),
        ("redis://", "neither host:port"),
    ],
)
def test_an_address_that_is_none_is_refused_and_shows_no_secret(text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as raised:
        RedisAddress.parse(text)
    assert "secret" not in str(raised.value)
    assert "cret" not in str(raised.value).replace("secret", "")


def test_sentinels_have_users_of_their_own() -> None:
    found = RedisAddress.parse("rediss://me:one@a:1,b:2?sentinel_password=two&socket_timeout=3")
    assert found.of_data == {
        "ssl": True,
        "username": "me",
        "password": "one",
        "socket_timeout": 3,
    }
    assert found.of_sentinels == {"ssl": True, "password": "two", "socket_timeout": 3}


def test_a_limit_is_added_where_there_is_none() -> None:
    for text in ("a:1", "redis://a:1", "redis://a:1/0?db=2"):
        assert RedisAddress.parse(with_socket_timeout(text, 2.5)).options["socket_timeout"] == 2.5
    assert with_socket_timeout("a:1,socket_timeout=1", 2.5) == "a:1,socket_timeout=1"


def test_an_option_that_nobody_knows_is_named() -> None:
    from feast.infra.online_stores.redis import RedisOnlineStoreConfig

    with pytest.raises(SettingsError, match="no_such"):
        client_of(RedisOnlineStoreConfig(connection_string="a:1,no_such=1"))


def test_tls_that_is_off_is_off() -> None:
    from serving.stores.redis_hashes import ClusterHashes, RedisHashes

    plain = RedisAddress.parse("a:1,ssl=false")
    assert RedisHashes(plain)._shared_tls is None
    assert ClusterHashes(plain)._shared_tls is None
    with pytest.raises(SettingsError, match="no_such"):
        ClusterHashes(RedisAddress.parse("a:1,no_such=1"))


def test_a_cluster_has_one_database() -> None:
    from feast.infra.online_stores.redis import RedisOnlineStoreConfig

    online = RedisOnlineStoreConfig(redis_type="redis_cluster", connection_string="redis://a:1/3")
    with pytest.raises(SettingsError, match="a cluster has none but 0"):
        client_of(online)


def test_a_tag_puts_a_key_into_its_slot() -> None:
    for slot in (0, 1, 5_000, 16_383):
        assert slot_of(f"anything{{{tag_of_slot(slot)}}}else".encode()) == slot


def test_what_is_our_own_fault_keeps_its_traceback() -> None:
    import redis

    away = redis.ConnectionError("Error 111 connecting")
    ours = KeyError("user_id")
    try:
        try:
            raise away
        except redis.ConnectionError:
            raise ours  # noqa: B904  # in a handler, and of no cause
    except KeyError:
        pass
    assert advice_on(ours) is None
    assert advice_on(redis.DataError("Invalid input of type: 'dict'")) is None
    assert advice_on(redis.ResponseError("wrong number of arguments")) is None
    caused = RuntimeError("a step failed")
    caused.__cause__ = away
    assert "Redis did not do it, ConnectionError: Error 111" in (advice_on(caused) or "")
