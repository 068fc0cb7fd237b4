"""Shards of a decided attempt on their way to their zarr keys, read back there."""

from collections.abc import Callable
from dataclasses import dataclass

from featstore import files
from featstore.errors import CorruptError, StoreError
from featstore.objects import Place, ReplacedError
from featstore.store.layout import ArraySpec
from featstore.store.shards import read_summary, shard_key

MISSING = "is not there"


def attempt_file(array: str, shard: int) -> str:
    """Name of a shard in its attempt's folder."""
    return f"{array.replace('/', '.')}.{shard}"


@dataclass(frozen=True, slots=True)
class Finisher:
    """Publishes shards of the decided attempt in `home`; `stands` tells whether that decision still does."""

    folder: Place
    array: ArraySpec
    home: Place
    rows_per_block: int
    stands: Callable[[], bool]

    def publish(self, shard: int, checksums: list[int]) -> None:
        """Link one shard under its zarr key and read it back.

        Raises:
            FileNotFoundError: its file is gone.
            StoreError: nothing stays under the key; the decision stands.
            CorruptError: what stands under the key is not what the attempt's marker names.
        """
        source = self.home / attempt_file(self.array.name, shard)
        final = self.folder / "data.zarr" / self.array.name / shard_key(shard, 1 + len(self.array.row_shape))
        files.make_folder(final.parent)
        for last_try in (False, True):
            files.link_kept(source, final)
            seen = files.version(final)
            what = self.fault(final, checksums)
            if not what:
                return
            if last_try:
                break
            if not self.stands():
                raise FileNotFoundError(2, "this attempt is not the block any more", str(self.home))
            # No marker names this file, so nobody counts on it.
            files.replace_kept(source, final, seen)
        kind = StoreError if what == MISSING else CorruptError
        raise kind(f"{final}: the shard just published {what}; not committed; check the disk, then run again")

    def fault(self, final: Place, checksums: list[int]) -> str:
        """What is wrong with a shard file that is to have these checksums, every chunk read; '' where nothing is."""
        shard_rows, chunk_rows = self.array.layout(self.rows_per_block)
        try:
            found = read_summary(
                final,
                row_shape=self.array.row_shape,
                dtype=self.array.dtype,
                chunk_rows=chunk_rows,
                shard_rows=shard_rows,
                deep=True,
            )
        except CorruptError as error:
            return f"is damaged ({error})"
        except FileNotFoundError:
            return MISSING
        except ReplacedError:
            return "was replaced meanwhile"
        same = [found.size, found.index_crc, found.data_crc] == checksums
        return "" if same else "holds other content than its marker names"
