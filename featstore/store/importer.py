"""`import`: embeddings made elsewhere become a set, so that every probe runs on them."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore import files
from featstore.datasets import manifest as manifests
from featstore.datasets.source import Source
from featstore.datasets.splits import split_by_group
from featstore.datasets.table import normal_splits, with_reserved
from featstore.errors import ConfigError, ManifestError, UnknownNameError
from featstore.objects import Place
from featstore.store import commits, ledger
from featstore.store.catalog import Store
from featstore.store.commits import HASH_HEX, BlockWriter, RowState, committed_blocks
from featstore.store.import_formats import read_arrays
from featstore.store.kinds import check_kind, check_random_name
from featstore.store.layout import ArraySpec, block_rows, check_store, make_spec, read_spec, set_folder

if TYPE_CHECKING:
    from featstore.datasets.manifest import Manifest

NO_CONTENT = "0" * HASH_HEX
NOT_IN_FILE = "not in the imported file"
GROUP_KEYS, SPLIT_KEYS = ("patient_id", "group"), ("split",)
PIECE_BYTES = 32 * 2**20  # features are looked at in pieces, since they may lie on disk


def _texts(values: np.ndarray) -> list[str]:
    """Values of a one-dimensional array as text; bytes are UTF-8."""
    return [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values.tolist()]


def pick_arrays(
    path: Path, arrays: dict[str, np.ndarray], features_key: str, ids_key: str | None
) -> tuple[np.ndarray, list[str], str]:
    """(features (N, D) as they came, ids, name of the id array).

    Raises:
        ManifestError: an array is absent, has another shape or type, a row is not finite, or ids repeat.
    """
    keys = [ids_key] if ids_key else ["id", "ids", "path", "paths"]
    found = next((key for key in keys if key in arrays), None)
    if features_key not in arrays or found is None:
        raise ManifestError(
            f"{path}: needs an array {features_key!r} (--features-key) and one of {', '.join(keys)} (--ids-key); "
            f"it has {', '.join(sorted(arrays)) or 'none'}"
        )
    features, names = arrays[features_key], arrays[found]
    if names.ndim != 1 or names.dtype.kind not in "OUSiu":
        raise ManifestError(f"{path}: {found!r} must be one text or integer a row; got {names.dtype} {names.shape}")
    is_float = features.dtype.kind == "f" or features.dtype.name == "bfloat16"
    if features.ndim != 2 or 0 in features.shape or not is_float or len(features) != len(names):
        raise ManifestError(
            f"{path}: features must be floats of shape (N, D) with one id a row; got {features.dtype} {features.shape} "
            f"and {len(names)} ids"
        )
    ids = _texts(names)
    manifests.check_ids(ids)
    stored = stored_dtype(features)
    bad = np.concatenate(
        [first + np.flatnonzero(~np.isfinite(piece).all(1)) for first, piece in _pieces(features, stored, None)]
    )
    if len(bad):
        raise ManifestError(
            f"{path}: {len(bad)} rows hold NaN, infinity or a number beyond {stored}, such as row {bad[0] + 1} "
            f"({ids[bad[0]]!r}); leave samples without features out, they are then marked failed"
        )
    return features, ids, found


def stored_dtype(features: np.ndarray) -> "np.dtype[Any]":
    """What features are stored as: float16 and bfloat16 stay, everything else becomes float32."""
    if features.dtype.name == "bfloat16":
        return features.dtype
    return np.dtype(np.float16 if features.dtype.itemsize == 2 else np.float32)


def _pieces(features: np.ndarray, dtype: "np.dtype[Any]", order: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows of type `dtype`) throughout, in the order of the file or in another one."""
    step = max(1, PIECE_BYTES // (features.shape[1] * features.dtype.itemsize))
    for first in range(0, len(features), step):
        rows = slice(first, first + step) if order is None else order[first : first + step]
        with np.errstate(over="ignore"):  # too large for float32: infinite, and told
            yield first, np.asarray(features[rows]).astype(dtype)


def import_features(
    store_path: Place,
    file: Path,
    *,
    dataset: str,
    model: str,
    features_key: str = "features",
    ids_key: str | None = None,
    ids_file: Path | None = None,
) -> tuple[Store, Place, int]:
    """Write the features of `file` as the array `cls` of the set `dataset/model`.

    Rows are matched to the data set's samples by id, or by path where the ids array is called `path`. A data set that
    is not registered is made from the file: ids, and `split` and `patient_id` where the file has them. Samples that
    the file lacks are marked failed. Which set it is follows from the ids and features alone: the same file again adds
    nothing, other features make another set. Returns (store, folder of the set, samples that the file has).

    Raises:
        ConfigError: `model` cannot be part of a set's name, or sets of a network have this name.
        ManifestError: see `read_arrays` and `pick_arrays`, or ids of the file are unknown to the data set.
    """
    if not manifests.NAME.fullmatch(model):
        raise ConfigError(f"--model is letters, digits, '.', '_' and '-' for imported features, got {model!r}")
    check_random_name(model)
    arrays = read_arrays(file, features_key, ids_file)
    features, ids, key = pick_arrays(file, arrays, features_key, ids_key)
    store = Store(store_path)
    check_store(store.path, create=True)
    check_kind(store, dataset, model, "imported")
    try:
        manifest = store.manifest(dataset)
    except UnknownNameError:
        manifest = _manifest_from_file(dataset, file, arrays, ids, features_key)
        manifests.save(store.datasets_folder, manifest)
    order = _match(manifest, ids, by_path=key in ("path", "paths"), file=file)
    dtype = stored_dtype(features)
    array = ArraySpec(name="cls", row_shape=(features.shape[1],), dtype=dtype.name)
    rows = hashlib.sha256()
    for _, piece in _pieces(features, dtype, np.array(sorted(range(len(ids)), key=ids.__getitem__))):
        rows.update(np.ascontiguousarray(piece).view(np.uint8).data)
    identity = {
        "weights": files.digest(
            {
                "ids": sorted(ids),
                "shape": list(features.shape),
                "rows": rows.hexdigest(),
            }
        ),
        "imported": True,
        "stored_dtype": array.dtype,
        "reductions": {},
    }
    spec = make_spec(
        dataset=dataset,
        model=model,
        resolution="",
        identity=identity,
        rows_per_block=block_rows(1.0, array.row_bytes),
        weights={"kind": "imported", "digest": identity["weights"]},
        random=False,
    )
    folder = set_folder(store.path, spec)
    _write(folder, spec, manifest, array, features, order)
    return store, folder, int((order >= 0).sum())


def _manifest_from_file(
    dataset: str, file: Path, arrays: dict[str, np.ndarray], ids: list[str], features_key: str
) -> "Manifest":
    """A data set without images: its samples are the rows of the file."""
    import pyarrow as pa

    def column(keys: tuple[str, ...]) -> list[str | None] | None:
        key = next((key for key in keys if key in arrays and arrays[key].shape == (len(ids),)), None)
        return None if key is None else [value or None for value in _texts(arrays[key])]

    groups, splits = column(GROUP_KEYS), column(SPLIT_KEYS)
    extra: dict[str, Any] = {
        name: pa.array(_texts(values))
        for name, values in arrays.items()
        if name != features_key and values.ndim == 1 and len(values) == len(ids)
    }
    named = [group or f"id:{sample}" for group, sample in zip(groups or ids, ids)]
    reserved: dict[str, list[str | None]] = {
        "id": list(ids),
        "path": list(ids),
        "group": groups or [None] * len(ids),
        "study": [None] * len(ids),
        "split": list(normal_splits(splits, "split") if splits else split_by_group(named)),
        "mask_path": [None] * len(ids),
    }
    source = Source(
        table=with_reserved(pa.table(extra), reserved),
        root=file.resolve().parent,
        adapter="import",
        default_task=None,
        tasks=(),
        label_columns=(),
        split_origin="imported file" if splits else "seeded by group, 70/10/20, seed 0",
        groups_known=groups is not None,
        notes=("made from imported features; register it with a table to add labels and images",),
    )
    return manifests.build(dataset, source, allow_missing=True)


def _match(manifest: "Manifest", ids: list[str], *, by_path: bool, file: Path) -> np.ndarray:
    """Row of the file for every sample of the manifest, -1 where it has none."""
    position = {sample: row for row, sample in enumerate(ids)}
    wanted = manifest.column("path" if by_path else "id")
    if by_path and not any(sample in position for sample in wanted):
        wanted = manifest.column("id")
    unknown = sorted({*ids} - {*wanted})
    if unknown:
        raise ManifestError(
            f"{file}: {len(unknown)} of its {len(ids)} ids are no samples of {manifest.name!r}: {unknown[0]!r} is not, "
            f"{wanted[0]!r} would be; check --ids-key, or import a file of this data set"
        )
    return np.array([position.get(sample, -1) for sample in wanted], dtype=np.int64)


def _write(
    folder: Place, spec: dict[str, Any], manifest: "Manifest", array: ArraySpec, features: np.ndarray, order: np.ndarray
) -> None:
    files.create_exclusive(folder / "spec.json", files.sealed(spec))
    spec = read_spec(folder)
    ledger.add_arrays(folder, [array])
    rows = ledger.add_rows(folder, manifest, dict)
    book = ledger.read_ledger(folder)
    ledger.write_metadata(folder, spec, book)
    size = int(spec["layout"]["block_rows"])
    commits.finish_intents(folder, book, size)
    commits.sweep_attempts(folder, older_than=commits.STALE_SECONDS)
    group = book.group_of("cls")
    position = {int(row): sample for sample, row in enumerate(rows)}
    done = committed_blocks(folder, group)
    for block, start, stop in book.blocks(size):
        if block in done or not any(row in position for row in range(start, stop)):
            continue
        picked = np.array(
            [order[position[row]] if row in position else -1 for row in range(start, stop)], dtype=np.int64
        )
        values = np.asarray(features[np.maximum(picked, 0)]).astype(stored_dtype(features))
        values[picked < 0] = np.nan
        states = [RowState(NO_CONTENT, None if row >= 0 else NOT_IN_FILE) for row in picked]
        with BlockWriter(folder, group, [array], block, start, stop, size) as writer:
            writer.append({"cls": values}, states)
            writer.commit()
