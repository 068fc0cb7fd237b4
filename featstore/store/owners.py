"""A set as `merge` sees it: row by row, for all manifests at once."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int64

from featstore.errors import CorruptError
from featstore.objects import Place
from featstore.store import commits, ledger
from featstore.store.commits import Commit, RowState
from featstore.store.layout import ArraySpec, read_spec
from featstore.store.reader import ShardedArray
from featstore.store.reductions import Reduction, read_reduction
from featstore.store.shards import read_summary, shard_key


@dataclass
class OwnedSet:
    """A set by its rows: whose they are, what became of them, and their values with checksums verified."""

    folder: Place

    @cached_property
    def book(self) -> ledger.Ledger:
        return ledger.read_ledger(self.folder)

    @cached_property
    def spec(self) -> dict[str, Any]:
        return read_spec(self.folder)

    @property
    def block_rows(self) -> int:
        return int(self.spec["layout"]["block_rows"])

    def reduction(self, array: str) -> Reduction | None:
        return read_reduction(self.folder, self.spec, array)

    @cached_property
    def owners(self) -> dict[int, tuple[str, int]]:
        """Row -> (sample id, file size)."""
        found: dict[int, tuple[str, int]] = {}
        for path in sorted((self.folder / "rows").glob("*.parquet")):
            samples, sizes, rows = ledger.read_mapping(path)
            found.update(zip(rows.tolist(), zip(samples, sizes)))
        return found

    @cached_property
    def rows_of(self) -> dict[tuple[str, int], list[int]]:
        """(sample id, file size) -> rows, in order; more than one where a file was rewritten in place."""
        found: dict[tuple[str, int], list[int]] = {}
        for row, owner in sorted(self.owners.items()):
            found.setdefault(owner, []).append(row)
        return found

    @cached_property
    def _commits(self) -> dict[tuple[str, int], Commit | None]:
        return {}

    def commit(self, group: str, block: int) -> Commit | None:
        """The marker of a block, None where it has none; read once."""
        if (group, block) not in self._commits:
            try:
                self._commits[group, block] = commits.read_commit(self.folder, group, block)
            except FileNotFoundError:
                self._commits[group, block] = None
        return self._commits[group, block]

    def forget(self, group: str, block: int) -> None:
        """Read the marker again when it is asked for next."""
        self._commits.pop((group, block), None)

    def state(self, group: str, row: int) -> RowState | None:
        """What became of a row, None while its block is not committed."""
        commit = self.commit(group, row // self.block_rows)
        if commit is None or not commit.start <= row < commit.stop:
            return None
        return RowState(commit.content(row), commit.failed.get(row))

    def read(self, array: str, rows: Int64[np.ndarray, " K"]) -> np.ndarray:
        """Rows with every chunk verified, and every shard touched compared with its marker."""
        held = self.book.arrays[array]
        reader = ShardedArray(self.folder / "data.zarr" / array)
        if reader.is_mapped and reader.shard_rows == held.shard_rows:
            for shard in np.unique(rows // held.shard_rows).tolist():
                self._check_shard(held, shard)
        start, stop = int(rows[0]), int(rows[-1]) + 1
        if np.array_equal(rows, np.arange(start, stop)):
            return reader.read(start, stop, verify=reader.is_mapped)
        return reader.gather(rows, verify=reader.is_mapped)

    @cached_property
    def _checked(self) -> set[tuple[str, int]]:
        return set()

    def _check_shard(self, array: ArraySpec, shard: int) -> None:
        if (array.name, shard) in self._checked:
            return
        commit = self.commit(self.book.group_of(array.name), shard * array.shard_rows // self.block_rows)
        path = self.folder / "data.zarr" / array.name / shard_key(shard, 1 + len(array.row_shape))
        found = read_summary(
            path,
            row_shape=array.row_shape,
            dtype=array.dtype,
            chunk_rows=array.chunk_rows,
            shard_rows=array.shard_rows,
            deep=False,
        )
        if commit is None or commit.shards[array.name][str(shard)] != [found.size, found.index_crc, found.data_crc]:
            raise CorruptError(
                f"{path}: size or checksum differs from what was committed; nothing of it is merged; run `featstore "
                "verify --deep --repair` on that store"
            )
        self._checked.add((array.name, shard))
