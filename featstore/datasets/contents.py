"""Content hashes of a manifest's files: when they are taken, which a digest covers, and what taking all would cost.

A file is taken for the same while path, size and time stay. Once one changes, only the bytes can tell whether it was
edited or merely touched or copied, and they are read if anything is known of what they were: the hash that an earlier
manifest holds, or one that was taken while the sample's rows were computed or a network was trained on it. Equal bytes
change nothing. Other bytes are stated in the column `content`, from then on in every later manifest: a digest without
it, or a size that came back, would name rows and runs of other bytes. Hashing all files compares also those
that seem unchanged.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from featstore import files
from featstore.errors import DecodeError, ManifestError
from featstore.inputs import Inputs

if TYPE_CHECKING:
    import pyarrow as pa

    from featstore.datasets.manifest import Manifest

MISSING = -1  # size of a file that was absent at registration
THREADS = 8  # network file systems answer many at once
SAMPLE_SECONDS = 0.25
SAMPLE_BYTES = 2 * 2**20
OPEN_BYTES = 2**16  # opening a file takes about as long as hashing so much


@dataclass(slots=True)
class History:
    """What is known of the samples of one data set from before, by id.

    `hashes`: of all bytes that they are known to have had. `stated`: those whose content must be stated, since an
    earlier manifest does, or since there may be rows of bytes that nobody knows. `parts`: the parts of their files that
    earlier manifests with rows in a set mean.
    """

    hashes: dict[str, set[str]] = field(default_factory=dict)
    stated: set[str] = field(default_factory=set)
    parts: dict[str, set[str | None]] = field(default_factory=dict)


Gather = Callable[["pa.Array"], History]  # of the ids that may not be what they were


@dataclass(frozen=True, slots=True)
class Settled:
    """Columns `content` and `hash`, and how many samples have other bytes at the same size and time as before."""

    content: "pa.Array"
    hashes: "pa.Array"
    num_hidden: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What hashing the files without a hash would take; `seconds` is extrapolated from some of them."""

    files: int
    bytes: int
    seconds: float


def settle(
    root: Path,
    table: "pa.Table",
    before: "Manifest | None",
    gather: Gather | None,
    *,
    every: bool,
    advance: Callable[[int, int], None] | None,
) -> Settled:
    """Columns `content` and `hash` of a manifest to be, whose `id`, `path`, `size`, `mtime_ns` (and `part`) are given.

    `every`: hash every file, also those whose size and time are as before. `advance` is told how many files were just
    hashed, and of how many.

    Raises:
        ManifestError: files change while they are read, or a sample that has rows in a set now is another part.
    """
    import pyarrow as pa

    same, content, hashes = _unchanged(table, before)
    present = table.column("size").to_numpy() != MISSING
    doubtful = np.flatnonzero(~same & present)
    asked = np.flatnonzero(present) if every else doubtful
    known = History()
    if gather is not None and len(asked):
        known = gather(_one_array(table.column("id").take(asked)))
    ids = dict(zip(doubtful.tolist(), table.column("id").take(doubtful).to_pylist()))
    _check_parts(table, ids, known)
    compared = [row for row, sample in ids.items() if sample in known.stated or known.hashes.get(sample)]
    found = _hash_rows(root, table, asked.tolist() if every else compared, advance)
    hidden = _other_bytes(table, found, np.flatnonzero(same).tolist(), (content, hashes), known)
    for row, value in found.items():
        hashes[row] = value
    for row in compared:
        sample = ids[row]
        if sample in known.stated or known.hashes.get(sample, set()) - {hashes[row]}:
            content[row] = hashes[row]
    for row in hidden:
        content[row] = hashes[row]
    return Settled(pa.array(content, pa.string()), pa.array(hashes, pa.string()), len(hidden))


def _other_bytes(
    table: "pa.Table",
    found: dict[int, str],
    same: list[int],
    before: tuple[list[str | None], list[str | None]],
    known: History,
) -> list[int]:
    """Those of the rows whose size and time are as before though their bytes, read again, are not.

    `before`: their contents and hashes. A stated content is what rows of sets were chosen by; else all bytes count.
    """
    contents, hashes = before
    rows = [row for row in same if row in found]
    ids = table.column("id").take(rows).to_pylist() if rows else []
    return [
        row
        for row, sample in zip(rows, ids)
        if ({contents[row]} if contents[row] else {hashes[row], *known.hashes.get(sample, ())}) - {found[row], None}
    ]


def _unchanged(table: "pa.Table", before: "Manifest | None") -> tuple[np.ndarray, list[str | None], list[str | None]]:
    """(mask of the rows whose file is as `before` has it, their contents and hashes from there)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    count = table.num_rows
    if before is None:
        return np.zeros(count, bool), [None] * count, [None] * count
    place = pc.index_in(table.column("id"), value_set=_one_array(before.table.column("id")))
    columns = [name for name in ("path", "size", "mtime_ns", "part") if name in table.column_names]
    same = pc.is_valid(place)
    for name in columns:
        new = table.column(name)
        # A data set that had no parts had whole files.
        held = before.place("part") if name == "part" else before.table.column(name)
        old = (pa.chunked_array([pa.array(held, pa.string())]) if isinstance(held, list) else held).take(place)
        equal = pc.fill_null(pc.equal(new, old), False)
        same = pc.and_(same, pc.or_(equal, pc.and_(pc.is_null(new), pc.is_null(old))))
    if "part" not in columns and "part" in before.meta.get("places", ()):
        same = pc.and_(same, pc.is_null(pa.chunked_array([pa.array(before.place("part"), pa.string())]).take(place)))
    content = pc.if_else(same, before.table.column("content").take(place), None)
    stored = pa.chunked_array([pa.array(before.hashes(), pa.string())]).take(place)
    hashes = pc.coalesce(pc.if_else(same, stored, None), content)
    return np.asarray(same.to_numpy(), bool), content.to_pylist(), hashes.to_pylist()


def _one_array(column: "pa.ChunkedArray") -> "pa.Array":
    import pyarrow as pa

    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _check_parts(table: "pa.Table", ids: dict[int, str], known: History) -> None:
    if not known.parts:
        return
    parts = table.column("part").to_pylist() if "part" in table.column_names else [None] * table.num_rows
    moved = [sample for row, sample in ids.items() if known.parts.get(sample, {parts[row]}) != {parts[row]}]
    if moved:
        raise ManifestError(
            f"{len(moved)} samples, such as {moved[0]}, are another part of their file than the one they were "
            "extracted as; register the data set under another name, or give them other ids"
        )


def _hash_rows(
    root: Path, table: "pa.Table", rows: list[int], advance: Callable[[int, int], None] | None
) -> dict[int, str]:
    """Hash of the file of each row; samples of one file share one reading."""
    if not rows:
        return {}
    picked = {name: table.column(name).take(rows).to_pylist() for name in ("path", "size", "mtime_ns")}
    facts = {path: key for path, *key in zip(*picked.values())}
    inputs = Inputs(root)

    def one(path: str) -> str | None:
        try:
            value = files.retry(lambda: inputs.hash(path))
            return value if list(inputs.stat(path)) == facts[path] else None
        except FileNotFoundError:
            return None

    found: dict[str, str | None] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for path, value in zip(facts, pool.map(one, facts)):
            found[path] = value
            if advance is not None:
                advance(1, len(facts))
    changed = [path for path, value in found.items() if value is None]
    if changed:
        raise ManifestError(
            f"{len(changed)} files changed while they were read, such as {changed[0]}; register when nothing writes "
            f"to {root}"
        )
    return {row: value for row, path in zip(rows, picked["path"]) if (value := found[path]) is not None}


def hashing_cost(manifest: "Manifest") -> Cost:
    """What `--hash` would read, and for how long, by reading some of it for a moment."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = {name: manifest.table.column(name) for name in ("path", "size")}
    table = pa.table({**columns, "hash": pa.array(manifest.hashes(), pa.string())})
    table = table.filter(pc.and_(pc.is_null(table.column("hash")), pc.greater_equal(table.column("size"), 0)))
    table = table.group_by("path").aggregate([("size", "max")])
    sizes: Int64[np.ndarray, " M"] = table.column("size_max").to_numpy()
    if len(sizes) == 0:
        return Cost(0, 0, 0.0)
    picked = np.unique(np.linspace(0, len(sizes) - 1, 64).astype(int))
    picked = np.random.default_rng(0).permutation(picked)  # wherever time runs out, the whole set was looked at
    times = _time_hashing(Inputs(manifest.root), table.column("path").take(picked).to_pylist())
    read = np.minimum(sizes[picked[: len(times)]], SAMPLE_BYTES)
    # The median: one file that the disk was slow to find says nothing about the others.
    rate = float(np.median(np.array(times) / (read + OPEN_BYTES)))
    return Cost(len(sizes), int(sizes.sum()), rate * float(sizes.sum() + len(sizes) * OPEN_BYTES))


def _time_hashing(inputs: Inputs, paths: Sequence[str]) -> list[float]:
    """Seconds that each of some files took whose starts are read and hashed until `SAMPLE_SECONDS` are over."""
    times: list[float] = []
    while len(times) < len(paths) and sum(times) < SAMPLE_SECONDS:
        started = time.perf_counter()
        with contextlib.suppress(OSError, DecodeError):  # what cannot be read is for the extraction to tell
            hashlib.sha256(inputs.read(paths[len(times)], first=SAMPLE_BYTES))
        times.append(time.perf_counter() - started)
    return times
