"""Miniature data sets: the exact layout, file formats, column names and traps of the originals, with phantom images.

`WRITERS` of every module here, by adapter: a function that writes into an empty folder and says what to expect.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Miniature:
    """A miniature on disk: `root` is what is registered, with `config` as fields of `RegisterConfig`.

    `samples` rows are expected. `tasks` are evaluated in the conformance test (all rows but a few must be usable);
    `labels` are given as `--labels` where there is no named task; `masks`: a mask is read for samples that name one.
    """

    root: Path
    samples: int
    config: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    labels: str = ""
    masks: bool = False


WRITERS: dict[str, Callable[[Path], Miniature]] = {}
for _module in sorted(module.name for module in iter_modules(__path__)):
    WRITERS.update(import_module(f"{__name__}.{_module}").WRITERS)
