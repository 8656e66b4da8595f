"""Variables that hold a secret, or say where one is kept: a file, or an object of a store that Arrow reads."""

from __future__ import annotations

import os

from feature_repo.errors import SettingsError
from feature_repo.settings import is_reference


def secret(name: str) -> str | None:
    """The secret of a variable; None where it is not set.

    Raises:
        SettingsError: there is nothing to read where it is kept.
    """
    text = os.environ.get(name)
    return revealed(text, name) if text else None


def revealed(text: str, name: str) -> str:
    """A secret, or what is kept where it says.

    Args:
        name: of the variable, for an error.

    Raises:
        SettingsError: there is nothing to read.
    """
    if not is_reference(text):
        return text
    from pyarrow.fs import FileSystem

    try:
        filesystem, path = FileSystem.from_uri(text)
        with filesystem.open_input_stream(path) as stream:
            return str(stream.read().decode().strip())
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{name} says that it is kept in {text}, which cannot be read: {error}"
        ) from error
