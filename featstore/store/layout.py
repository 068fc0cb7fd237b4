"""Where things stand in a store, what a set is called, and how its rows are cut into blocks.

Everything here follows from the spec alone: never from the number of rows, the world size or the machine.
"""

import contextlib
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from featstore import files
from featstore.errors import ConfigError, CorruptError, SchemaError, StoreError
from featstore.objects import Place, as_object, parse_place
from featstore.store.bucket import enter
from featstore.store.shards import chunk_rows_for, shard_rows_for

SCHEMA = 2
READABLE = (1, SCHEMA)  # what stores of an older schema hold is read, never written
HOME = "FEATSTORE_HOME"
MIN_BLOCK, MAX_BLOCK = 256, 16384
BLOCK_GFLOP, BLOCK_BYTES = 1e5, 4 * 2**30  # what a kill may cost: some minutes of a GPU, one transfer
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1, "uint8": 1}
DECODED = "decoded"  # model of the sets that keep decoded images, and their kind of weights
LEFT = "the sample left the data set before it was extracted"  # reason of rows that nothing can compute any more
AXES = {
    "registers": ("row", "register", "dim"),
    "patches": ("row", "patch", "dim"),
    "pixels": ("row", "channel", "y", "x"),
}


def store_path(explicit: Place | str | None = None) -> Place:
    """The store: the argument (a folder or `s3://BUCKET/PREFIX`), else FEATSTORE_HOME, else the user cache folder."""
    chosen = explicit or os.environ.get(HOME)
    if chosen:
        return parse_place(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("featstore"))


def _check_schema(data: bytes, what: str) -> int:
    """The schema is looked for before the file is parsed: a later one may be sealed in another way."""
    found = re.search(rb'"schema":\s*(\d+)', data)
    if found and int(found[1]) not in READABLE:
        raise SchemaError(
            f"{what} has schema {int(found[1])}, this version of featstore reads schemas {READABLE[0]} to {SCHEMA} and "
            f"writes {SCHEMA}; use the version that wrote it, or another --store"
        )
    return int(found[1]) if found else SCHEMA


def check_current(schema: int, what: str) -> None:
    """Refuse to write into what an older version made.

    Raises:
        SchemaError: saying how to upgrade.
    """
    if schema != SCHEMA:
        raise SchemaError(
            f"{what} has schema {schema} and is open for reading only; `featstore upgrade` brings the store to schema "
            f"{SCHEMA} (nothing is recomputed), or write to another --store"
        )


def check_store(root: Place, *, create: bool = False) -> None:
    """Refuse a folder that is another schema's store; `create` asks for one that can be written and marks it as ours.

    Raises:
        SchemaError: the store was written by another schema version.
        CorruptError: its mark is damaged.
        StoreError: the path is no folder, or cannot be written when it must be.
    """
    mark = root / "store.json"
    if as_object(root) is None and root.exists() and not root.is_dir():
        raise StoreError(f"{root}: a store is a folder, this is a file; pass another --store or set {HOME}")
    if create:
        enter(root)
    data: bytes | None = None
    with contextlib.suppress(FileNotFoundError):
        data = mark.read_bytes()  # where a bucket is missing or closed, this says so
    if data is not None:
        schema = _check_schema(data, f"{root}: this store")
        files.unseal(data, mark)
        if create:
            check_current(schema, f"{root}: this store")
    elif create:
        files.create_exclusive(mark, files.sealed({"schema": SCHEMA, "format": "featstore"}))


def block_rows(gflop_per_image: float, bytes_per_row: int) -> int:
    """Rows of one block: the largest power of two within the cost and size bounds, in [256, 16384]."""
    limit = min(BLOCK_GFLOP / max(gflop_per_image, 1e-9), BLOCK_BYTES / max(bytes_per_row, 1))
    return int(min(MAX_BLOCK, max(MIN_BLOCK, 2 ** int(np.floor(np.log2(max(limit, 1)))))))


def check_block_rows(rows: int) -> int:
    """A block size asked for by hand must be a power of two, so that shards divide it."""
    if rows < 1 or rows & (rows - 1):
        raise ConfigError(f"--block-rows must be a power of two (16, 256, 4096, ...), got {rows}")
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One zarr array of a set: `name` such as `cls` or `layers/3/cls`, row shape and stored dtype.

    `shard_rows` and `chunk_rows` are 0 until the array stands in a ledger, which fixes them.
    """

    name: str
    row_shape: tuple[int, ...]
    dtype: str
    shard_rows: int = 0
    chunk_rows: int = 0

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape, dtype=np.int64)) * ITEMSIZE[self.dtype]

    def layout(self, rows_per_block: int) -> tuple[int, int]:
        """(shard rows, chunk rows): whole shards divide a block."""
        if self.shard_rows:
            return self.shard_rows, self.chunk_rows
        shard = shard_rows_for(self.row_bytes, rows_per_block)
        return shard, chunk_rows_for(self.row_bytes, shard)

    def fixed(self, rows_per_block: int) -> "ArraySpec":
        """The same array with its layout settled."""
        shard, chunk = self.layout(rows_per_block)
        return replace(self, shard_rows=shard, chunk_rows=chunk)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes, as zarr.json states them for xarray."""
        return AXES.get(self.name.rsplit("/", 1)[-1], ("row", "dim"))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "row_shape": list(self.row_shape)}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> "ArraySpec":
        return ArraySpec(**{**value, "row_shape": tuple(value["row_shape"])})


def make_spec(
    *,
    dataset: str,
    model: str,
    resolution: str,
    identity: dict[str, Any],
    rows_per_block: int,
    weights: dict[str, Any],
    random: bool,
) -> dict[str, Any]:
    """The content of `spec.json`. Only `identity` makes the fingerprint; names, origin and layout stand beside it."""
    identity = {**identity, "schema": SCHEMA}
    return {
        "schema": SCHEMA,
        "dataset": dataset,
        "model": model,
        "resolution": resolution,
        "weights": weights,
        "random_weights": random,
        "identity": identity,
        "fingerprint": files.digest(identity),
        "layout": {"block_rows": rows_per_block},
    }


# What may become the name of a folder. Stores travel, and a seal does not say who made it.
_PLAIN_NAME = re.compile(r"[^/\\\0.][^/\\\0]*")


def augment_of(spec: dict[str, Any]) -> dict[str, Any] | None:
    """Of which augmented copies of the images a set is: recipe, view, seed; None for the images themselves."""
    preprocess = spec["identity"].get("preprocess")
    held = preprocess.get("augment") if isinstance(preprocess, dict) else None
    return held if isinstance(held, dict) else None


def without_augment(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity as the plain set has it, equal for all views of one set."""
    preprocess = identity.get("preprocess")
    if not isinstance(preprocess, dict):
        return identity
    return {**identity, "preprocess": {name: value for name, value in preprocess.items() if name != "augment"}}


def set_name(spec: dict[str, Any]) -> str:
    """`model@res`, or `model` alone for features without a known input size; `model@res~dino3` for a view of it.

    A seed of views that is not 0 stands behind: `~dino3s1`.
    """
    name = f"{spec['model']}@{spec['resolution']}" if spec["resolution"] else str(spec["model"])
    augment = augment_of(spec)
    if augment is None:
        return name
    seed = augment.get("seed")
    return f"{name}~{augment.get('recipe')}{augment.get('view')}" + (f"s{seed}" if seed else "")


def network_of(spec: dict[str, Any]) -> str:
    """Equal for sets that one network in memory serves: of one model at several sizes, of views, of other data sets."""
    names = ("weights", "architecture", "pos_interp", "weight_dtype", "window", "compute_dtype")
    return files.digest({name: spec["identity"].get(name) for name in names})


def set_folder(root: Place, spec: dict[str, Any]) -> Place:
    """Folder of a set inside the store."""
    return root / "sets" / str(spec["dataset"]) / f"{set_name(spec)}-{spec['fingerprint'][:8]}"


def read_spec(folder: Place) -> dict[str, Any]:
    """Load and check `spec.json`.

    Raises:
        SchemaError, CorruptError: written by another schema, or damaged.
    """
    path = folder / "spec.json"
    data = path.read_bytes()
    _check_schema(data, f"{path}: this set")
    spec = files.unseal(data, path)
    names = (str(spec["dataset"]), set_name(spec))
    if not all(_PLAIN_NAME.fullmatch(name) for name in names) or not re.fullmatch("[0-9a-f]{64}", spec["fingerprint"]):
        raise CorruptError(f"{path}: {'/'.join(names)!r} is no name of a set; do not use a store from this source")
    return spec


def differences(a: Any, b: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves of two JSON values that differ, as (dotted key, a, b)."""
    if isinstance(a, dict) and isinstance(b, dict):
        result = []
        for key in sorted({*a, *b}):
            result += differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
        return result
    return [] if a == b else [(prefix, a, b)]
