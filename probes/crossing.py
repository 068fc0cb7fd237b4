"""What the training rows of one data set and the test rows of another share: images, patients, files.

Byte-identical files prove a leak wherever hashes are known. Ids and patients are compared where one release numbers
them for both data sets; where that cannot be known, a note says so.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from featstore.datasets.manifest import Manifest
from featstore.errors import LeakError
from featstore.store.catalog import Store
from featstore.store.hashes import equal_rows, file_hashes
from probes.leaks import ANONYMOUS, FAMILIES
from probes.tasks import Task


def shared_rows(source: Task, target: Task, store: Store | None, *, allow_leak: bool) -> tuple[str, ...]:
    """Notes on what training and validation rows of `source` share with the test rows of `target`.

    Hashes are those of `store`, or without one those that the manifests hold.

    Raises:
        LeakError: they share images or patients, and that is not allowed.
    """
    ours, theirs = source.features.manifest, target.features.manifest
    train, test = np.union1d(source.index("train"), source.index("val")), target.index("test")
    found, hashed = common_rows(ours, train, theirs, test, store)
    notes = []
    if found:
        text = f"training on {ours.name} and testing on {theirs.name} share {'; '.join(found)}"
        if not allow_leak:
            raise LeakError(f"{text}; test on rows that were not trained on, or pass --allow-leak to mark the record")
        notes.append(f"leak allowed: {text}")
    if not _one_numbering(ours, theirs):
        notes.append("patients of the two data sets are not compared: unknown in one, or not of one numbering")
    total = len(train) + len(test)
    if hashed < total:
        notes.append(f"byte-identical images: sought among the {hashed} of {total} whose file has a known hash")
    return tuple(notes)


def common_rows(
    ours: Manifest,
    train: Int[np.ndarray, " n"],
    theirs: Manifest,
    test: Int[np.ndarray, " m"],
    store: Store | None,
) -> tuple[list[str], int]:
    """(what rows of one manifest share with rows of another, in words; rows whose file has a known hash)."""
    found = []
    for what, column in (("images (by id)", "id"), ("groups (patients)", "group")):
        if not (one_release(ours, theirs) if column == "id" else _one_numbering(ours, theirs)):
            continue
        seen = {value for value in _taken(ours.column(column), train) if value not in (None, "")}
        both = seen.intersection(_taken(theirs.column(column), test))
        if both:
            found.append(f"{len(both)} {what}, such as {min(both)!r}")
    same, hashed = _identical(ours, train, theirs, test, store)
    if same:
        found.append(f"{same} byte-identical images")
    return found, hashed


def _taken(values: Sequence[str | None], rows: np.ndarray) -> list[str | None]:
    return [values[row] for row in rows]


def _identical(
    ours: Manifest, train: np.ndarray, theirs: Manifest, test: np.ndarray, store: Store | None
) -> tuple[int, int]:
    """(test rows that are a training row byte by byte, rows with a known hash)."""
    hashes: list[str | None] = []
    parts: list[str | None] = []
    for manifest, rows in ((ours, train), (theirs, test)):
        held = file_hashes(store, manifest) if store is not None else _stated(manifest)
        hashes += _taken(held, rows)
        parts += _taken(manifest.place("part"), rows)
    alike = [rows for rows in equal_rows(hashes, parts) if rows[0] < len(train) <= rows[-1]]
    return sum(row >= len(train) for rows in alike for row in rows), sum(value is not None for value in hashes)


def _stated(manifest: Manifest) -> list[str | None]:
    return [taken or stated for taken, stated in zip(manifest.hashes(), manifest.column("content"))]


def _adapter(manifest: Manifest) -> str:
    adapter = str(manifest.meta.get("adapter", ""))
    return "" if adapter in ANONYMOUS else adapter


def one_release(ours: Manifest, theirs: Manifest) -> bool:
    """Whether an id names the same image in both."""
    return ours.name == theirs.name or (_adapter(ours) != "" and _adapter(ours) == _adapter(theirs))


def _one_numbering(ours: Manifest, theirs: Manifest) -> bool:
    """Whether a group is the same patient in both."""
    known = all(manifest.meta.get("groups_known") for manifest in (ours, theirs))
    families = [FAMILIES.get(_adapter(manifest), _adapter(manifest)) for manifest in (ours, theirs)]
    return known and (ours.name == theirs.name or (families[0] != "" and families[0] == families[1]))
