"""The manifest: an ordered table of samples with a digest, the one thing that extraction and probes agree on.

On disk: `<store>/datasets/<name>/<digest8>/manifest.parquet` (the samples) and `source.toml` (where they came from),
and the file `current`, which names the digest that commands use unless told otherwise.
"""

import hashlib
import json
import re
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from featstore import files
from featstore.datasets.contents import MISSING as MISSING
from featstore.datasets.contents import THREADS, Gather, History, settle
from featstore.datasets.source import RESERVED, Source, check_inside, places_of
from featstore.errors import DecodeError, ManifestError, UnknownNameError
from featstore.images.part import parse_part
from featstore.inputs import Inputs
from featstore.objects import Place

if TYPE_CHECKING:
    import pyarrow as pa

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Written by registration, in this order, before the columns of the source.
COLUMNS = ("id", "path", "size", "split", "group", "study", "mask_path", "content", "mtime_ns")
# After those, where a hash is known. In older manifests a column of the source may be called so: the mark tells.
HASH = "hash"
_HIDDEN = "{} samples have the same size and time, other bytes than before; they are computed again"
_PROBED = 256  # files that tell how fast the others will answer
_LOCAL_SECONDS = 5e-5  # network file systems take ten times as long
_HASH_MARK = {b"featstore": b"hash"}


@dataclass(frozen=True)
class Manifest:
    """Samples of one data set in a fixed order.

    `table` has the reserved columns first, then those of the source, verbatim. `meta` holds the adapter, the root,
    label columns, tasks, where splits and groups come from, and notes.
    """

    name: str
    table: "pa.Table"
    digest: str
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def short(self) -> str:
        """First eight hex digits of the digest, as folders and records show it."""
        return self.digest[:8]

    @property
    def root(self) -> Path:
        """Folder that the samples' paths are relative to."""
        return Path(self.meta["root"])

    def place(self, name: str) -> list[Any]:
        """A column that says where in its file, volume or slide a sample lies (`PLACES`); None where none was given."""
        return self.column(name) if name in self.meta.get("places", ()) else [None] * len(self)

    def hashes(self) -> list[str | None]:
        """Hash of each sample's file as it was at registration, where it was taken then (`register --hash`)."""
        return self.column(HASH) if _has_hashes(self.table) else [None] * len(self)

    def column(self, name: str) -> list[Any]:
        """Python values of one column, null as None."""
        if name not in self.table.column_names:
            known = ", ".join(
                column for column in self.table.column_names if column not in ("content", "mtime_ns", HASH)
            )
            raise UnknownNameError(f"data set {self.name!r} has no column {name!r}; its columns: {known}")
        return list(self.table.column(name).to_pylist())


class _Stored(Manifest):
    """A manifest on disk; its table is decoded when it is first asked for, which reading features seldom does."""

    def __init__(
        self,
        name: str,
        table: "pa.Table | None",
        digest: str,
        meta: dict[str, Any],
        stored: tuple[Place, str, int] | None = None,
    ):
        # `dataclasses.replace` comes here with a table.
        self.__dict__.update(name=name, digest=digest, meta=meta, _stored=stored)
        if table is not None:
            self.__dict__["table"] = table

    def __len__(self) -> int:
        stored = self.__dict__["_stored"]
        return int(self.table.num_rows if stored is None else stored[2])

    @cached_property
    def table(self) -> "pa.Table":
        path, seal, _ = self.__dict__["_stored"]
        data = path.read_bytes()
        if files.digest(data) != seal:
            raise ManifestError(f"{path}: was changed while it was in use; open the store again")
        return files.read_parquet(data)

    def __reduce__(self) -> tuple[Any, ...]:
        return Manifest, (self.name, self.table, self.digest, self.meta)


def _has_hashes(table: "pa.Table") -> bool:
    return HASH in table.column_names and (table.schema.field(HASH).metadata or {}).items() >= _HASH_MARK.items()


def table_digest(table: "pa.Table") -> str:
    """SHA-256 over names, types and values of every column but `mtime_ns` and our `hash`; null is not empty text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    total = hashlib.sha256()
    for name in table.column_names:
        if name == "mtime_ns" or (name == HASH and _has_hashes(table)):
            continue
        column = table.column(name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        mask = np.packbits(np.asarray(column.is_null().to_numpy(zero_copy_only=False), dtype=bool))
        kind = column.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            values = np.ascontiguousarray(column.fill_null(0).to_numpy(zero_copy_only=False)).view(np.uint8).data
            lengths = b""
        else:
            if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
                kind = pa.string()  # how text is held in memory says nothing about the data
            elif pa.types.is_nested(kind) or any(test(kind) for test in binary):
                column = pa.array([None if value is None else repr(value) for value in column.to_pylist()], pa.string())
            text = column.cast(pa.large_string()).fill_null("")
            lengths = np.asarray(pc.binary_length(text), dtype="<i8").tobytes()
            _, offsets, data = text.buffers()
            ends = np.frombuffer(offsets, "<i8")[[text.offset, text.offset + len(text)]] if len(text) else (0, 0)
            values = memoryview(b"" if data is None else data)[ends[0] : ends[1]]
        total.update(files.canonical_json([name, str(kind), len(column)]))
        for part in (mask.tobytes(), lengths, values):
            total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def check_name(name: str) -> None:
    """Names become folders of the store, so they hold nothing that could leave it."""
    if not NAME.fullmatch(name):
        raise ManifestError(
            f"a data set name is letters, digits, '.', '_' and '-', and starts with a letter or digit; got {name!r}"
        )


def check_ids(ids: Sequence[str | None]) -> None:
    """Every id present and unique, or a ManifestError that names some that are not."""
    if any(value is None or value == "" for value in ids):
        row = next(row for row, value in enumerate(ids) if value is None or value == "")
        raise ManifestError(f"every sample needs an id; row {row + 1} has none")
    if len(set(ids)) != len(ids):
        twice = sorted(str(value) for value, count in Counter(ids).items() if count > 1)
        raise ManifestError(
            f"ids must be unique; {len(twice)} occur more than once, such as {', '.join(twice[:3])}; "
            "name a unique column with --id-column"
        )


def stat_files(root: Path, paths: Sequence[str]) -> tuple[list[int], list[int]]:
    """Size in bytes and mtime in ns of each file; MISSING and 0 where there is none (a folder is none).

    Raises:
        ManifestError: an archive, or a member of one, that cannot be used.
    """
    inputs = Inputs(root)

    def some(names: list[str]) -> list[tuple[int, int]]:
        return [_stat(inputs, name) for name in names]

    names = list(dict.fromkeys(paths))  # the slices of a volume share one file
    started = time.perf_counter()
    found = some(names[:_PROBED])
    if (
        time.perf_counter() - started
    ) / _PROBED < _LOCAL_SECONDS:  # a local disk answers faster than threads take turns
        found += some(names[_PROBED:])
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            rest = [names[i : i + 512] for i in range(_PROBED, len(names), 512)]
            found += [fact for facts in pool.map(some, rest) for fact in facts]
    if len(names) < len(paths):
        facts = dict(zip(names, found))
        found = [facts[path] for path in paths]
    return [size for size, _ in found], [mtime for _, mtime in found]


def _stat(inputs: Inputs, name: str) -> tuple[int, int]:
    try:
        return inputs.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        return MISSING, 0
    except DecodeError as error:
        raise ManifestError(f"{inputs.root / name}: {error}") from error


def _check_places(table: "pa.Table") -> None:
    """Parts must parse, and masks have as many parts as paths, where they have any."""
    places = places_of(table)
    for column in ("part", "mask_part"):
        if column in places:
            for text in set(table.column(column).to_pylist()) - {None}:
                for piece in text.split("|") if column == "mask_part" else [text]:
                    parse_part(piece)
    if "mask_part" not in places:
        return
    for masks, parts in zip(table.column("mask_path").to_pylist(), table.column("mask_part").to_pylist()):
        if parts is not None and (masks or "").count("|") != parts.count("|"):
            raise ManifestError(f"mask_path and mask_part must name equally many masks, got {masks!r} and {parts!r}")


def build(
    name: str,
    source: Source,
    *,
    allow_missing: bool = False,
    before: Manifest | None = None,
    gather: Gather | None = None,
    hash_all: bool = False,
    advance: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Check a source and freeze it as a manifest.

    `before` is the manifest that this one follows; `gather` tells what is known of earlier bytes, and is asked only for
    samples whose file is not as `before` has it (see `contents`), or is read. `hash_all` reads every file now, and
    notes how many have other bytes though size and time are the same; `advance` is told how many files were just read,
    and of how many. A source's column named like one of `COLUMNS` or `hash` becomes `source_<name>`.

    Raises:
        ManifestError: bad name, no rows, missing or duplicate ids, an image or mask path outside the root, two columns
            of one name, missing files (unless `allow_missing`, which keeps their rows and lets extraction mark them
            failed), an archive or member that cannot be used; see also `contents.settle`.
    """
    import pyarrow as pa

    check_name(name)
    if source.table.num_rows == 0:
        raise ManifestError(f"{source.root}: no samples found; check the folder and the adapter ({source.adapter})")
    ids, paths = (source.table.column(column).to_pylist() for column in ("id", "path"))
    check_ids(ids)
    if not source.root.is_dir():
        raise ManifestError(f"{source.root}: the root folder of data set {name!r} does not exist")
    masks = {path for text in set(source.table.column("mask_path").to_pylist()) - {None} for path in text.split("|")}
    for path in {*paths, *masks}:
        check_inside(source.root, path)
    _check_places(source.table)
    sizes, mtimes = stat_files(source.root, paths)
    absent = [path for path, size in zip(paths, sizes) if size == MISSING]
    if absent and not allow_missing:
        raise ManifestError(
            f"{len(absent)} of {len(paths)} files are missing under {source.root}, such as {', '.join(absent[:3])}; "
            "check the root and the path column, or pass --allow-missing to keep their rows as failed"
        )
    table = pa.table(
        {
            **{column: source.table.column(column) for column in RESERVED},
            "size": pa.array(sizes, pa.int64()),
            "mtime_ns": pa.array(mtimes, pa.int64()),
        }
    )
    places = places_of(source.table)
    for column in places:
        table = table.append_column(column, source.table.column(column))
    settled = settle(source.root, table, before, gather, every=hash_all, advance=advance)
    table = table.append_column("content", settled.content).select([*COLUMNS, *places])
    if settled.hashes.null_count < len(table):
        table = table.append_column(pa.field(HASH, pa.string(), metadata=_HASH_MARK), settled.hashes)
    renamed = {}
    for column in source.table.column_names:
        if column not in (*RESERVED, *places):
            renamed[column] = f"source_{column}" if column in (*COLUMNS, HASH) else column
            if renamed[column] in table.column_names:
                raise ManifestError(
                    f"columns must have different names, but {renamed[column]!r} would appear twice; rename it"
                )
            table = table.append_column(renamed[column], source.table.column(column))
    meta = {
        "adapter": source.adapter,
        "root": str(source.root.resolve()),
        "default_task": source.default_task or "",
        "tasks": list(source.tasks),
        "label_columns": [renamed.get(column, column) for column in source.label_columns],
        "split_origin": source.split_origin,
        "groups_known": source.groups_known,
        "notes": [*source.notes, *([_HIDDEN.format(settled.num_hidden)] if settled.num_hidden else [])],
        "missing": len(absent),
        **({"places": places} if places else {}),
        **({"mask_classes": list(source.mask_classes)} if source.mask_classes else {}),
    }
    return Manifest(name=name, table=table.combine_chunks(), digest=table_digest(table), meta=meta)


def _toml(meta: dict[str, Any]) -> bytes:
    # JSON strings, numbers, booleans and lists of strings are also TOML, once DEL is escaped and no surrogate is left.
    text = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in meta.items())
    return text.replace("\x7f", "\\u007f").encode()


def save(folder: Place, manifest: Manifest) -> None:
    """Write a manifest under `<store>/datasets` and make it the current one of its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    home = folder / manifest.name / manifest.short
    sink = pa.BufferOutputStream()
    pq.write_table(manifest.table, sink, compression="zstd", write_page_checksum=True)
    data = sink.getvalue().to_pybytes()
    files.write_atomic(home / "manifest.parquet", data)
    meta = _toml({**manifest.meta, "digest": manifest.digest, "sha256": files.digest(data)})
    files.write_atomic(home / "source.toml", meta + _toml({"seal": files.digest(meta)}))
    files.write_atomic(folder / manifest.name / "current", manifest.short.encode() + b"\n")


def _read_source(path: Place) -> dict[str, Any]:
    """`source.toml`, whose last line seals the others (not in stores of schema 1)."""
    data = path.read_bytes()
    head, mark, seal = data.rpartition(b'seal = "')
    if (mark or b'\nsha256 = "' in data) and seal != f'{files.digest(head)}"\n'.encode():
        raise ValueError("its content does not match its seal")
    return tomllib.loads((head if mark else data).decode())


def load(folder: Place, name: str, short: str | None = None) -> Manifest:
    """Read a manifest by data set name; `short` picks an older one by the start of its digest.

    Raises:
        UnknownNameError: no such data set or digest; the message lists what there is.
        ManifestError: the files are damaged.
    """
    import pyarrow as pa

    if not (folder / name / "current").is_file():
        known = ", ".join(names(folder)) or "none"
        raise UnknownNameError(
            f"unknown data set {name!r}; registered: {known}; add it with `featstore register {name} ROOT`"
        )
    wanted = short or (folder / name / "current").read_bytes().decode("ascii", "replace").strip()
    folders = sorted(path for path in (folder / name).iterdir() if path.is_dir())
    matches = [path for path in folders if path.name.startswith(wanted[:8])]
    missing = f"data set {name!r} has no manifest {wanted!r}; it has {', '.join(path.name for path in folders)}"
    if len(matches) != 1:
        raise UnknownNameError(missing)
    try:
        meta, data = _read_source(matches[0] / "source.toml"), (matches[0] / "manifest.parquet").read_bytes()
        digest = str(meta.pop("digest"))
        sealed = meta.pop("sha256", None)
        if sealed not in (None, files.digest(data)):
            raise ValueError("manifest.parquet holds other bytes than were written")
        stored = matches[0] / "manifest.parquet", files.digest(data), files.parquet_rows(data)
        manifest: Manifest = _Stored(name, None, digest, meta, stored)
        if sealed is None:  # in stores of schema 1 only decoding tells whether it is whole
            manifest = Manifest(name, manifest.table, digest, meta)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ManifestError(
            f"{matches[0]}: the manifest is damaged ({type(error).__name__}); register {name!r} again"
        ) from error
    if not digest.startswith(wanted):
        raise UnknownNameError(missing)
    return manifest


def earlier(folder: Place, name: str, ids: "pa.Array", extracted: Collection[str] = ()) -> History:
    """What all manifests of a data set, the current one among them, say of these ids; damaged ones are passed over.

    `extracted` are the short digests of the manifests that have rows in a set: their parts are told too.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    found = History()
    for path in sorted((folder / name).glob("*/manifest.parquet")):
        try:
            table = files.read_parquet(path.read_bytes())
        except (pa.ArrowException, OSError):
            continue
        table = table.filter(pc.is_in(table.column("id"), value_set=ids))
        held = table.column("id").to_pylist()
        for column in ("content", *([HASH] if _has_hashes(table) else [])):
            for sample, value in zip(held, table.column(column).to_pylist()):
                if value is not None:
                    found.hashes.setdefault(sample, set()).add(value)
                    if column == "content":
                        found.stated.add(sample)
        if path.parent.name in extracted:
            try:  # the table says not which of its columns are places
                places = _read_source(path.with_name("source.toml")).get("places", ())
            except (OSError, ValueError):
                continue
            parts = table.column("part").to_pylist() if "part" in places else [None] * len(held)
            for sample, part in zip(held, parts):
                found.parts.setdefault(sample, set()).add(part)
    return found


def names(folder: Place) -> list[str]:
    """Registered data sets in alphabetical order."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if (path / "current").is_file())


def check_unchanged(manifest: Manifest, rows: Int64[np.ndarray, " M"]) -> None:
    """Stop if any of these files changed since registration.

    Raises:
        ManifestError: the root is gone, or a size or time differs.
    """
    if not manifest.root.is_dir():
        raise ManifestError(
            f"data set {manifest.name!r}: its root {manifest.root} is gone; if it moved, run "
            f"`featstore register {manifest.name} NEW_ROOT` with the same options (nothing is recomputed)"
        )
    picked = manifest.table.take(rows)
    paths = picked.column("path").to_pylist()
    sizes, mtimes = stat_files(manifest.root, paths)
    old = zip(picked.column("size").to_pylist(), picked.column("mtime_ns").to_pylist())
    changed = [path for path, size, mtime, was in zip(paths, sizes, mtimes, old) if (size, mtime) != was]
    if changed:
        raise ManifestError(
            f"data set {manifest.name!r}: {len(changed)} files changed since registration, such as {changed[0]}; "
            f"run `featstore register {manifest.name} ...` again, then only what changed is computed"
        )
