"""Settings of the database driver, for every engine of the process, Feast's too.

psycopg prepares a statement once it was sent five times. Behind a pooler that gives each transaction another
connection (PgBouncer, `pool_mode = transaction`) the statement is then not where it is asked for, and one of the same
name already is. Nothing here is asked often enough to gain by it.

In a URL everything is text; what psycopg takes as a number or as a truth value is turned into one:
`…/registry?prepare_threshold=5`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from feature_repo.errors import SettingsError

# Seconds in which a database must take a connection; libpq waits for minutes
CONNECT_S = 5
TRUTH = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}


def typed_parameters(given: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a connection with psycopg's own ones as their types.

    Raises:
        SettingsError: one has a value that it cannot have.

    Example:
        >>> typed_parameters({"host": "db", "prepare_threshold": "5"})
        {'prepare_threshold': 5, 'connect_timeout': 5, 'host': 'db'}
    """
    typed = {"prepare_threshold": None, "connect_timeout": CONNECT_S, **given}
    threshold, autocommit = typed["prepare_threshold"], typed.get("autocommit")
    if isinstance(threshold, str):
        if threshold.lower() != "none" and not threshold.isdecimal():
            raise SettingsError(
                f"prepare_threshold={threshold!r} in a database URL; expected a number, or none"
            )
        typed["prepare_threshold"] = None if threshold.lower() == "none" else int(threshold)
    if isinstance(autocommit, str):
        if autocommit.lower() not in TRUTH:
            raise SettingsError(
                f"autocommit={autocommit!r} in a database URL; expected one of {', '.join(TRUTH)}"
            )
        typed["autocommit"] = TRUTH[autocommit.lower()]
    return typed


@event.listens_for(Engine, "do_connect")
def _use_typed(dialect: Any, record: Any, args: Any, parameters: dict[str, Any]) -> None:
    """Give each new connection its parameters; SQLAlchemy calls this for any engine."""
    if dialect.driver == "psycopg":
        parameters.update(typed_parameters(parameters))
