"""`export`: a set's features as one file that other programs read, written in pieces and renamed when it is whole.

npy, safetensors and FAISS files hold numbers only: the ids stand, in the same order, in `FILE.rows.parquet` beside
them. npz and parquet files hold both.
"""

import contextlib
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int64

from featstore import files
from featstore.datasets.manifest import COLUMNS, Manifest
from featstore.errors import ConfigError, IncompleteError, StoreError, UnknownNameError
from featstore.store.features import FeatureSet

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".npy", ".npz", ".parquet", ".safetensors", ".faiss")
PIECE_BYTES = 64 * 2**20
NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # of dtypes, in safetensors
MIN_SALT = 16  # bytes; a shorter salt could be found by trying
PSEUDONYM_HEX = 24  # 96 bits: no two of a million ids meet
# A column with more texts or whole numbers than this is a name, a date or a report rather than a label.
MAX_LABEL_TEXTS = 64
MIN_DIGITS = 4  # of a part of a name that is no chance
LONG_DIGITS = 6  # of a date or a record's number, which no class has
MIN_TELLING = 2  # a column of no more values than these is binary


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: rows, features a row, numpy dtype, how many failed rows were left out, and the files."""

    rows: int
    dim: int
    dtype: str
    left_out: int
    files: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """What goes into the file. `salt` makes pseudonyms of ids, groups and studies; None leaves them as they are."""

    features: str = "cls+mean_patch"
    split: str | None = None
    labels: tuple[str, ...] = ()
    failed: Literal["drop", "nan"] = "drop"
    salt: bytes | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.salt is not None and len(self.salt) < MIN_SALT:
            raise ConfigError(
                f"a salt needs at least {MIN_SALT} bytes, got {len(self.salt)}; `head -c 32 /dev/urandom > FILE` makes "
                "one, or leave --salt out for one that nobody knows"
            )


def new_salt() -> bytes:
    """A salt that nobody knows."""
    return secrets.token_bytes(32)


def export_features(
    features: FeatureSet, file: Path, config: ExportConfig, *, advance: Callable[[int], None] = lambda _: None
) -> Exported:
    """Write the features of a set to `file`, whose ending says the format.

    Rows stand in the order of the manifest; with a salt, in that of their pseudonyms, since the order of a published
    table would name them. bfloat16 becomes float32 but in safetensors. FAISS gets an inner-product index of the rows
    at unit length. `advance` is told the number of rows written.

    Raises:
        ConfigError: an ending that is not known, a file that exists, NaN rows in an index, or a label column that
            names people.
        UnknownNameError: no such split or label column.
        IncompleteError: rows are not extracted yet.
        StoreError: FAISS is not installed, or the disk refuses.
    """
    kind = file.suffix.lower()
    if kind not in SUFFIXES:
        raise ConfigError(f"{file}: the ending says the format and must be one of {', '.join(SUFFIXES)}")
    if kind == ".faiss" and config.failed == "nan":
        raise ConfigError("an index cannot hold NaN rows; leave --failed nan out")
    sidecar = None if kind in (".npz", ".parquet") else file.with_name(f"{file.name}.rows.parquet")
    targets = [path for path in (sidecar, file) if path is not None]
    for path in targets:
        if path.exists() and not config.force:
            raise ConfigError(f"{path} exists; --force replaces it, or name another file")
    rows, left_out = _pick(features, config)
    table = _rows_table(features, rows, config)
    if config.salt is not None:
        order = np.argsort(np.array(table.column("id").to_pylist(), dtype=np.str_), kind="stable")
        rows, table = rows[order], table.take(order)
    source = _Source(features, config.features, rows, exact=kind == ".safetensors", advance=advance)
    facts = {"set": features.name, "fingerprint": features.fingerprint, "features": config.features}
    if config.salt is None:
        facts["manifest"] = features.manifest.digest  # over the ids: with a list of them it could be recognised
    if sidecar is not None:
        with _published(sidecar, force=config.force) as out:
            _write_rows(out, table, facts)
    with _published(file, force=config.force) as out:
        WRITERS[kind](out, source, table, facts)
    return Exported(len(rows), source.dim, source.dtype.name, left_out, tuple(targets))


def _pick(features: FeatureSet, config: ExportConfig) -> tuple[Int64[np.ndarray, " K"], int]:
    """(manifest rows to write, number of failed rows left out)."""
    manifest = features.manifest
    rows = np.arange(len(manifest))
    if config.split is not None:
        splits = np.array(manifest.column("split"), dtype=object)
        rows = np.flatnonzero(splits == config.split)
        if not len(rows):
            known = ", ".join(sorted({str(split) for split in splits if split}))
            raise UnknownNameError(f"data set {manifest.name!r} has no split {config.split!r}; its splits: {known}")
    unknown = [name for name in config.labels if name not in manifest.table.column_names]
    if unknown:
        manifest.column(unknown[0])
    arrays = [features.array(name) for name in features.parts(config.features)]
    pending = np.any([array.pending[rows] for array in arrays], axis=0)
    if pending.any():
        raise IncompleteError(
            f"{features.name}: {int(pending.sum())} of {len(rows)} rows are not extracted yet; run the same `featstore "
            "extract` again before the export"
        )
    failed = np.isin(rows, np.fromiter(features.failures, np.int64))
    if config.failed == "nan":
        return rows, 0
    if failed.all():
        raise ConfigError(f"{features.name}: all {len(rows)} rows failed, nothing is left to export; see --failed nan")
    return rows[~failed], int(failed.sum())


def pseudonym(value: str, column: str, salt: bytes) -> str:
    """A prefix of HMAC-SHA-256 of the value, one for each column, so that equal texts in two columns do not show."""
    return hmac.new(salt, f"{column}\0{value}".encode(), hashlib.sha256).hexdigest()[:PSEUDONYM_HEX]


def _rows_table(features: FeatureSet, rows: Int64[np.ndarray, " K"], config: ExportConfig) -> "pa.Table":
    """id, split, group and study (where there are any), and the labels."""
    import pyarrow as pa

    picked = features.manifest.table.take(rows)
    columns: dict[str, Any] = {}
    for name in ("id", "split", "group", "study"):
        column = picked.column(name)
        if name in ("group", "study") and column.null_count == len(column):
            continue
        if config.salt is not None and name != "split":
            salt = config.salt
            texts = [None if value is None else pseudonym(str(value), name, salt) for value in column.to_pylist()]
            column = pa.array(texts, pa.string())
        columns[name] = column
    for name in config.labels:
        if config.salt is not None:
            _check_label(features.manifest, name)
        if name not in columns:
            columns[name] = picked.column(name)
    return pa.table(columns)


def _check_label(manifest: Manifest, name: str) -> None:
    """Refuse a column that names samples or people, over the whole data set: a split may show too little of it."""
    if name == "split":
        return
    rows = [(row, _plain(value)) for row, value in enumerate(manifest.column(name)) if value is not None]
    own = {key: manifest.column(key) for key in ("id", "path", "group", "study")}
    different = {text for _, text in rows if not _is_fraction(text)}
    people = {group or sample for group, sample in zip(own["group"], own["id"])}
    # Classes have many people each; a class may well be the name of a folder and so a part of the path.
    telling = len(different) > MIN_TELLING and 2 * len(different) > len(people)
    pairs = {
        key: [(text, str(names[row])) for row, text in rows if names[row] is not None] for key, names in own.items()
    }
    copied = [
        key
        for key, found in pairs.items()
        if any(_is_part(text, other, telling) for text, other in found)
        or (telling and found and all(_same_number(text, other) for text, other in found))
    ]
    long = {text for text in different if len(_digits(text)) >= (MIN_DIGITS if telling else LONG_DIGITS)}
    if name in COLUMNS:
        why = "it is no label"
    elif copied:
        why = f"it repeats the column {copied[0]!r}"
    elif len(different) > MAX_LABEL_TEXTS:
        why = f"it holds {len(different)} different texts or whole numbers, more than {MAX_LABEL_TEXTS}"
    elif len(long) > MIN_TELLING:
        why = f"it holds {len(long)} different long numbers, like those of records, or dates"
    else:
        return
    raise ConfigError(f"--deidentify: column {name!r} may name people ({why}); leave it out of --labels")


def _plain(value: Any) -> str:
    """A value as text, whole numbers without the `.0` of a column of floats."""
    return re.sub(r"^([+-]?\d+)\.0*$", r"\1", str(value).strip())


def _is_fraction(text: str) -> bool:
    """A measurement such as 0.25: many different ones say nothing. NaN and infinity are none either."""
    try:
        number = float(text)
    except ValueError:
        return False
    return not math.isfinite(number) or not number.is_integer()


def _digits(text: str) -> str:
    return "".join(re.findall(r"\d", text))


def _is_part(text: str, other: str, telling: bool) -> bool:
    """Does a label hold a name of its own row, or a part of one: four digits, or any four characters if `telling`?"""
    if len(other) >= MIN_DIGITS and other in text:
        return True
    if len(text) < MIN_DIGITS or _is_fraction(text):
        return False
    digits = _digits(text)
    if len(digits) >= MIN_DIGITS and (text in other or digits in other or digits in _digits(other)):
        return True
    return telling and text in other


def _same_number(text: str, other: str) -> bool:
    """A whole number that also stands in a name, zeros before it or not."""
    return text.isdecimal() and text.lstrip("0") in (run.lstrip("0") for run in re.findall(r"\d+", other))


class _Source:
    """The feature rows to write, piece by piece."""

    def __init__(
        self,
        features: FeatureSet,
        name: str,
        rows: Int64[np.ndarray, " K"],
        *,
        exact: bool,
        advance: Callable[[int], None],
    ):
        self.rows, self.advance = rows, advance
        # The mean over all tokens is as small as cls, and is made where the weights of pooled cells are known.
        self.mean = features.load(name) if name == "mean_all" else None
        self.arrays = [] if self.mean is not None else [features.array(part) for part in features.parts(name)]
        widths = [math.prod(array.shape[1:]) for array in self.arrays]
        self.dim = sum(widths) if self.mean is None else self.mean.shape[1]
        found = np.dtype(np.float32) if self.mean is not None else np.result_type(*(a.dtype for a in self.arrays))
        # Few programs know bfloat16, and float32 holds it exactly.
        self.dtype = np.dtype(np.float32) if found.name == "bfloat16" and not exact else found

    def __len__(self) -> int:
        return len(self.rows)

    def pieces(self) -> Iterator[np.ndarray]:
        """Consecutive rows (B, D), C-contiguous, little-endian."""
        step = max(1, PIECE_BYTES // (4 * self.dim))
        for first in range(0, len(self.rows), step):
            rows = self.rows[first : first + step]
            if self.mean is not None:
                values = self.mean[rows]
            else:
                values = np.concatenate([array[rows].reshape(len(rows), -1) for array in self.arrays], axis=1)
            yield np.ascontiguousarray(values, self.dtype)
            self.advance(len(rows))


@contextlib.contextmanager
def _published(final: Path, *, force: bool) -> Iterator[Path]:
    """A temporary name beside `final` that becomes it when all went well.

    Raises:
        ConfigError: the name was taken meanwhile.
        StoreError: it cannot be written.
    """
    temporary = final.with_name(f".{final.name}.{files.own_name()}.partial")
    with files.writing(final):
        files.make_folder(final.parent)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            if not force and final.exists():
                raise ConfigError(f"{final} was written by somebody else meanwhile; name another file")
            os.replace(temporary, final)
            files.sync_folder(final.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _npy_header(file: Any, dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)


def _write_npy(path: Path, source: _Source, table: "pa.Table", facts: dict[str, str]) -> None:
    with open(path, "xb") as file:
        _npy_header(file, source.dtype, (len(source), source.dim))
        for piece in source.pieces():
            file.write(piece.data)


def _write_npz(path: Path, source: _Source, table: "pa.Table", facts: dict[str, str]) -> None:
    def member(name: str) -> zipfile.ZipInfo:
        return zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that equal content gives equal bytes

    with zipfile.ZipFile(path, "x") as archive:
        with archive.open(member("features"), "w", force_zip64=True) as file:
            _npy_header(file, source.dtype, (len(source), source.dim))
            for piece in source.pieces():
                file.write(piece.data)
        for name in table.column_names:
            texts = ["" if value is None else str(value) for value in table.column(name).to_pylist()]
            # The names under which `featstore import` looks for them.
            with archive.open(member({"group": "patient_id"}.get(name, name)), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.array(texts, dtype=np.str_), allow_pickle=False)


def _write_rows(path: Path, table: "pa.Table", facts: dict[str, str]) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table.replace_schema_metadata({"featstore": json.dumps(facts)}), path, compression="zstd")


def _write_parquet(path: Path, source: _Source, table: "pa.Table", facts: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.from_numpy_dtype(source.dtype)
    schema = table.schema.append(pa.field("features", pa.list_(kind, source.dim)))
    compression = dict.fromkeys(table.column_names, "zstd") | {"features.list.element": "NONE"}
    first = 0
    with pq.ParquetWriter(
        path,
        schema.with_metadata({"featstore": json.dumps(facts)}),
        compression=compression,
        use_dictionary=table.column_names,
        write_page_checksum=True,
    ) as writer:
        for piece in source.pieces():
            rows = pa.FixedSizeListArray.from_arrays(pa.array(piece.reshape(-1)), source.dim)
            part = table.slice(first, len(piece))
            writer.write_table(part.append_column(schema.field("features"), rows).cast(schema))
            first += len(piece)


def _write_safetensors(path: Path, source: _Source, table: "pa.Table", facts: dict[str, str]) -> None:
    num_bytes = len(source) * source.dim * source.dtype.itemsize
    tensor = {"dtype": NAMES[source.dtype.name], "shape": [len(source), source.dim], "data_offsets": [0, num_bytes]}
    header = json.dumps({"__metadata__": facts, "features": tensor}).encode()
    header += b" " * (-len(header) % 8)  # readers map the data, which must begin at a multiple of 8
    with open(path, "xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for piece in source.pieces():
            file.write(piece.view(np.uint8).data)


def _write_faiss(path: Path, source: _Source, table: "pa.Table", facts: dict[str, str]) -> None:
    try:
        import faiss
    except ImportError as error:
        raise StoreError("a FAISS index needs the package faiss: pip install 'featstore[cpu]'") from error
    index = faiss.IndexFlatIP(source.dim)
    for piece in source.pieces():
        rows = piece.astype(np.float32)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(norms > 0, norms, np.float32(1))
        index.add(rows)
    faiss.write_index(index, str(path))


WRITERS: dict[str, Callable[[Path, _Source, "pa.Table", dict[str, str]], None]] = {
    ".npy": _write_npy,
    ".npz": _write_npz,
    ".parquet": _write_parquet,
    ".safetensors": _write_safetensors,
    ".faiss": _write_faiss,
}
