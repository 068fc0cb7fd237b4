"""Data set families: folder layout -> manifest. A new family is one file here and one line in DATASETS."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from featstore.datasets.source import Source
from featstore.errors import ManifestError, UnknownNameError

# name -> function(root, **options) -> Source
DATASETS = {
    "chexpert": "featstore.datasets.chexpert:read",
    "digits": "featstore.datasets.digits:read",
    "folder": "featstore.datasets.folder:read",
    "nih": "featstore.datasets.nih:read",
    "phantom": "featstore.datasets.phantom:read",
    "table": "featstore.datasets.table:read",
}
# These write their own images, so `register NAME` needs no root.
GENERATED = ("digits", "phantom")


def choose_adapter(name: str, adapter: str | None, table: Path | None) -> str:
    """The adapter asked for; else `table` with a table, the family named like the data set, or `folder`.

    Raises:
        UnknownNameError: no such adapter.
    """
    if adapter is None:
        adapter = "table" if table is not None else name if name in DATASETS else "folder"
    if adapter not in DATASETS:
        raise UnknownNameError(f"unknown adapter {adapter!r}; known: {', '.join(sorted(DATASETS))}")
    return adapter


def read_source(adapter: str, root: Path, **options: Any) -> Source:
    """Run an adapter on a folder.

    Raises:
        ManifestError: the folder does not exist or has another layout.
    """
    if adapter not in GENERATED and not root.is_dir():
        raise ManifestError(f"{root}: no such folder; ROOT is the folder that holds the data set's images")
    source: Source = resolve_name(DATASETS[adapter])(root, **options)
    return source
