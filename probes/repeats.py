"""Images of one split that another split holds too, under another name or patient.

Files are compared by their hashes wherever these are known. Features that are equal in every bit say the same of files
that were saved again, and of embeddings made elsewhere: two images that a network tells apart have no equal features.
Images that many patients have, such as empty slices, prove nothing.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Shaped

from featstore.errors import IncompleteError, LeakError
from featstore.store import commits
from featstore.store.features import FeatureSet
from featstore.store.hashes import NO_CONTENT, equal_rows

EMPTY_PATIENTS = 4  # an image that so many patients have is no copy of one of them
MIN_WIDTH = 16  # features of fewer numbers can be equal by chance
CHUNK = 8192  # rows at a time


def repeated_files(features: FeatureSet, role: np.ndarray) -> list[list[int]]:
    """Manifest rows of byte-identical images (parts of files) whose roles differ; rows without a role do not count."""
    manifest = features.manifest
    held = [taken or stated for taken, stated in zip(manifest.hashes(), manifest.column("content"))]
    rows = np.flatnonzero(role != "")
    if any(held[row] is None for row in rows):
        held = [value or read for value, read in zip(held, _read_hashes(features))]
    parts = manifest.place("part")
    found = equal_rows([held[row] for row in rows], [parts[row] for row in rows])
    return _across(role, [[int(rows[number]) for number in alike] for alike in found])


def _read_hashes(features: FeatureSet) -> list[str | None]:
    """Hashes of the files that the set was made of, in manifest order; None where their bytes were never read."""
    found: list[str | None] = [None] * len(features)
    try:
        index = features.row_index
    except IncompleteError:
        return found
    held: dict[int, str] = {}
    for commit in commits.read_commits(features.folder, next(iter(features.ledger.groups))).values():
        held.update((row, commit.content(row)) for row in range(commit.start, commit.stop))
    for position, row in enumerate(index.tolist()):
        value = held.get(row, NO_CONTENT)
        found[position] = None if value == NO_CONTENT else value
    return found


def repeated_features(
    values: Shaped[np.ndarray, "N D"], role: np.ndarray, rows: Int[np.ndarray, " n"]
) -> list[list[int]]:
    """Those of `rows` whose features are equal in every bit and whose roles differ; constant rows do not count."""
    if values.shape[1] < MIN_WIDTH or not len(rows):
        return []
    # One number a row tells nearly all apart; what shares it is compared in full. A product may round a row otherwise
    # in another block, so that close numbers count as shared.
    direction = np.random.default_rng(0).standard_normal((values.shape[1], 1)).astype(np.float32)[:, 0]
    parts = [values[rows[start : start + CHUNK]].astype(np.float32) @ direction for start in range(0, len(rows), CHUNK)]
    keys = np.concatenate(parts)
    order = np.argsort(keys, kind="stable")
    close = np.flatnonzero(np.diff(keys[order]) <= 1e-5 * np.maximum(1, np.abs(keys[order][1:])))
    held: dict[bytes, list[int]] = {}
    for position in np.union1d(close, close + 1):
        row = int(rows[order[position]])
        if values[row].min() < values[row].max():
            held.setdefault(values[row].tobytes(), []).append(row)
    return _across(role, [sorted(alike) for alike in held.values() if len(alike) > 1])


def judge_repeats(
    found: Sequence[Sequence[int]],
    what: str,
    ids: Sequence[str | None],
    role: np.ndarray,
    groups: np.ndarray,
    allow_leak: bool,
) -> tuple[str, ...]:
    """Notes on images that stand in more than one split: those that many patients have, those that are allowed.

    Raises:
        LeakError: others, which are not allowed.
    """
    copies = [rows for rows in found if len({str(groups[row]) for row in rows}) < EMPTY_PATIENTS]
    notes = []
    if len(copies) < len(found):
        notes.append(
            f"{len(found) - len(copies)} {what} stand in more than one split and belong to {EMPTY_PATIENTS} patients "
            "or more: taken for empty images"
        )
    if copies:
        example = " = ".join(f"{ids[row]} ({role[row]})" for row in copies[0][:3])
        text = f"{len(copies)} {what} stand in more than one split, such as {example}"
        if not allow_leak:
            raise LeakError(
                f"{text}; keep each image in one split (`probes leaks` lists equal files), or pass --allow-leak to "
                "mark the record"
            )
        notes.append(f"leak allowed: {text}")
    return tuple(notes)


def _across(role: np.ndarray, found: list[list[int]]) -> list[list[int]]:
    return [alike for alike in found if len({str(role[row]) for row in alike}) > 1]
