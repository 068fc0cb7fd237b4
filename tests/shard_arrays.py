"""Small arrays on disk for the reader's tests, written as the package writes them, and their truth."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from featstore.store.reader import ShardedArray
from featstore.store.shards import ShardWriter, array_metadata, shard_key

CHUNK_ROWS, SHARD_ROWS = 4, 16


def values(num_rows: int, row_shape: tuple[int, ...] = (6,), dtype: Any = np.float16) -> np.ndarray:
    """Every row holds its own number (mod 256), so that a row in a wrong place differs."""
    size = int(np.prod(row_shape))
    numbers = np.arange(num_rows)[:, None] % 256 + np.arange(size) / max(size, 2)
    return numbers.reshape(num_rows, *row_shape).astype(dtype)


def store(
    path: Path,
    rows: np.ndarray,
    *,
    num_rows: int | None = None,
    chunk_rows: int = CHUNK_ROWS,
    shard_rows: int = SHARD_ROWS,
) -> ShardedArray:
    """Write rows as the package does: metadata, then shard after shard."""
    layout: dict[str, Any] = {
        "row_shape": rows.shape[1:],
        "dtype": rows.dtype.name,
        "chunk_rows": chunk_rows,
        "shard_rows": shard_rows,
    }
    path.mkdir(parents=True, exist_ok=True)
    metadata = array_metadata(num_rows=len(rows) if num_rows is None else num_rows, attributes={"a": 1}, **layout)
    (path / "zarr.json").write_text(json.dumps(metadata))
    for first in range(0, len(rows), shard_rows):
        with ShardWriter(path / shard_key(first // shard_rows, rows.ndim), **layout) as writer:
            writer.append(rows[first : first + shard_rows])
    return ShardedArray(path)


def same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


def damage(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
