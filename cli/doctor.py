"""`featstore doctor`: can a store live here?"""

from collections.abc import Callable

COMMANDS: dict[str, Callable[..., None]] = {}
