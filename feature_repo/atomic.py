"""Files that appear whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a draft beside `path`, which takes its place once the block ends without an error.

    Example:
        >>> with atomic_write(folder / "run.json") as draft:
        ...     draft.write_text("{}")
    """
    # A name for each writer: two that shared a draft would move each other's half.
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.draft")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
