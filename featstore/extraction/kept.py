"""Rows whose images are not there to be read again: a block that is made anew keeps those of the one it replaces."""

import contextlib
from dataclasses import dataclass

import numpy as np

from featstore.extraction.loader import GONE
from featstore.objects import Place
from featstore.store import commits
from featstore.store.commits import Commit, RowState
from featstore.store.decisions import marker_path, read_marker
from featstore.store.layout import ArraySpec
from featstore.store.reader import ShardedArray


@dataclass(frozen=True, slots=True)
class Kept:
    """One array group of one block as it is committed by now, by the bytes `marker`; both are None where it is not."""

    folder: Place
    arrays: list[ArraySpec]
    commit: Commit | None
    marker: bytes | None

    def fill(
        self, first: int, job_rows: tuple[int, ...], rows: dict[str, np.ndarray], states: list[RowState]
    ) -> tuple[dict[str, np.ndarray], list[RowState]]:
        """A batch whose samples that left the data set have what is committed of them; `first` is its first row.

        Raises:
            CorruptError: what is committed cannot be read.
        """
        gone = np.flatnonzero(np.array(job_rows) == GONE)
        if self.commit is None or not len(gone):
            return rows, states
        filled, held_states = dict(rows), list(states)
        for array in self.arrays:
            held = ShardedArray(self.folder / "data.zarr" / array.name).gather(first + gone, verify=True)
            filled[array.name] = rows[array.name].copy()
            filled[array.name][gone] = held.view(rows[array.name].dtype)  # bfloat16 travels as its bits
        for position in gone.tolist():
            row = first + position
            held_states[position] = RowState(self.commit.content(row), self.commit.failed.get(row))
        return filled, held_states


def read_kept(folder: Place, group: str, arrays: list[ArraySpec], block: int) -> Kept:
    """What is committed of a block."""
    found = marker = None
    with contextlib.suppress(FileNotFoundError):
        marker = read_marker(folder, group, block)
        found = commits.parse_commit(marker, marker_path(folder, group, block))
    return Kept(folder, arrays, found, marker)
