"""`featstore archive, unarchive, compact, upgrade`: the same rows in another layout."""

from collections.abc import Callable

COMMANDS: dict[str, Callable[..., None]] = {}
