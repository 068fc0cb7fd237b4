"""Are the values of a shard what values can be? Checksums tell damage, this tells what should not have been written."""

import os
from collections.abc import Collection

import numpy as np

from featstore.store.layout import ArraySpec
from featstore.store.reader import ShardedArray

PIECE_BYTES = 16 * 2**20  # values are looked at in pieces of this size, one for each thread


def check_values(array: ArraySpec, rows: tuple[int, int], failed_rows: Collection[int], reader: ShardedArray) -> str:
    """What is wrong with rows `rows[0]` to `rows[1]`, or "".

    Failed rows are NaN (zero for integers), all others finite and not all zero; pictures may be black.
    """
    step = max(1, PIECE_BYTES // array.row_bytes)
    start, end = rows
    for first in range(start, end, step):
        stop = min(first + step, end)
        # A bucket is read through the local cache, whose damage must not count as the bucket's.
        values = reader.read(first, stop, verify=not isinstance(reader.path, os.PathLike)).reshape(stop - first, -1)
        failed = np.isin(np.arange(first, stop), list(failed_rows))
        zero = ~values.any(1)
        if array.dtype == "uint8":
            wrong, what = failed & ~zero, "has failed and holds numbers"
        elif array.dtype == "int8":
            wrong, what = zero != failed, "is all zero without having failed, or the reverse"
        else:
            wrong, what = np.isfinite(values).all(1) == failed, "is NaN without having failed, or the reverse"
        if wrong.any():
            return f"row {first + int(wrong.argmax())} {what}"
        if array.dtype != "uint8" and (zero & ~failed).any():
            return f"row {first + int((zero & ~failed).argmax())} is all zero"
    return ""
