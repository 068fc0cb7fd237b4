"""Where the members of an archive lie: made by one pass over it, kept for the next process if that took long."""

import io
import logging
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int8, Int64

from featstore import files
from featstore.errors import DecodeError, FeatstoreError, ManifestError

KEPT_FROM = 4000  # members: below, an index is made again in less time than it takes to notice
MAX_MEMBER = 4 * 2**30
STORED, DEFLATED, ENCRYPTED, METHOD, LINK, SPARSE, TWICE, LARGE, UNEVEN, NO_BYTES = range(10)
REFUSED = {
    ENCRYPTED: "is encrypted; decrypt the archive first",
    METHOD: "is compressed by another method than deflate; repack the archive",
    LINK: "is a link or device, which are not followed; repack the archive with the files themselves",
    SPARSE: "is a sparse file; repack the archive without --sparse",
    TWICE: "stands in the archive more than once; repack it so that every name is unique",
    LARGE: f"says it is larger than {MAX_MEMBER >> 30} GiB; keep it as a file of its own",
    UNEVEN: "is stored, with two different sizes; copy or download the archive again",
    NO_BYTES: "is null",
}
_VERSION = 2  # of what an index holds; 1 may lack the members of tars behind the first
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Index:
    """One entry a member: `offset` and `packed` bytes in the archive, `size` of the member, `state`: how it is held.

    `checked`: the archive has checksums of its members (zip), and `offset` is that of a member's own header.
    """

    names: list[str]
    offset: Int64[np.ndarray, " N"]
    packed: Int64[np.ndarray, " N"]
    size: Int64[np.ndarray, " N"]
    crc: Int64[np.ndarray, " N"]
    state: Int8[np.ndarray, " N"]
    checked: bool

    @classmethod
    def make(
        cls,
        names: Sequence[str],
        *,
        sizes: Sequence[int],
        states: Sequence[int],
        offsets: Sequence[int] | None = None,
        packed: Sequence[int] | None = None,
        crcs: Sequence[int] | None = None,
    ) -> "Index":
        """Names that occur twice become one that is refused."""
        nothing = np.zeros(len(names), np.int64)
        columns = [nothing if item is None else np.array(item, np.int64) for item in (offsets, packed, sizes, crcs)]
        state = np.array(states, np.int8)
        state[(state <= DEFLATED) & (columns[2] > MAX_MEMBER)] = LARGE
        kept = list(names)
        if len(set(kept)) < len(kept):
            counts = Counter(kept)
            state[[row for row, name in enumerate(kept) if counts[name] > 1]] = TWICE
            rows = sorted({name: row for row, name in enumerate(kept)}.values())
            columns, state, kept = [item[rows] for item in columns], state[rows], [kept[row] for row in rows]
        return cls(kept, columns[0], columns[1], columns[2], columns[3], state, crcs is not None)

    @cached_property
    def rows(self) -> dict[str, int]:
        return dict(zip(self.names, range(len(self.names))))

    def row(self, name: str) -> int:
        """Number of a member that can be read.

        Raises:
            FileNotFoundError: no such member. DecodeError: it cannot be read, and why.
        """
        row = self.rows.get(name)
        if row is None:
            raise FileNotFoundError(f"the archive has no member {name!r}")
        state = int(self.state[row])
        if state in REFUSED:
            raise DecodeError(f"archive member {REFUSED[state]}")
        return row


def is_zip(path: Path, head: bytes) -> bool:
    """Whether a file is a zip, given its first 512 bytes; those that unpack themselves start with a program."""
    if head[:2] == b"PK":
        return True
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return zipfile.is_zipfile(path)
    return False  # though its last member may be a zip


def index_zip(path: Path) -> Index:
    """The central directory of a zip.

    Raises:
        ManifestError: it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [item for item in archive.infolist() if not item.is_dir()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
        raise ManifestError(f"{path}: damaged zip ({error}); copy or download it again") from error
    states = []
    for item in members:
        kind = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}.get(item.compress_type, METHOD)
        if item.external_attr >> 28 == 0o12:  # the type of a Unix symlink
            kind = LINK
        if kind == STORED and item.file_size != item.compress_size:
            kind = UNEVEN
        states.append(ENCRYPTED if item.flag_bits & 1 else kind)
    return Index.make(
        # As it stands in the file: `filename` has lost what zipfile thinks unfit for this system.
        [item.orig_filename.removeprefix("./") for item in members],
        sizes=[item.file_size for item in members],
        states=states,
        offsets=[item.header_offset for item in members],
        packed=[item.compress_size for item in members],
        crcs=[item.CRC for item in members],
    )


def index_tar(path: Path) -> Index:
    """The headers of a plain tar, one after the other.

    Raises:
        ManifestError: it is none, damaged, or followed by another one.
    """
    names, sizes, states, offsets = [], [], [], []
    try:
        with tarfile.open(path, "r:") as archive:
            while (item := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header it has seen
                if item.isdir():
                    continue
                kind = SPARSE if item.issparse() else STORED if item.isreg() else LINK
                names.append(item.name.removeprefix("./"))
                sizes.append(item.size)
                states.append(kind)
                offsets.append(item.offset_data)
            stopped = int(archive.offset)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise ManifestError(f"{path}: no zip, tar or parquet file that can be read ({error})") from error
    _check_end(path, stopped)
    return Index.make(names, sizes=sizes, states=states, offsets=offsets, packed=sizes)


def _check_end(path: Path, stopped: int) -> None:
    """Where no header was found, the archive must end: nothing but zeros, or what is no archive, follows."""
    with open(path, "rb") as file:
        file.seek(stopped)
        if any(file.read(512)):  # tarfile takes a header it cannot read for the end
            raise ManifestError(f"{path}: damaged tar, no header at byte {stopped}; copy or download it again")
        while block := file.read(512):
            if any(block):
                break
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return
        raise ManifestError(
            f"{path}: concatenated archive, another tar starts at byte {file.tell() - 512}; join tars with `tar -A`, "
            "or unpack it with `tar -xi` and pack it anew"
        )


def _kept_path(path: Path, key: tuple[int, int]) -> Path:
    return files.user_cache() / "indexes" / f"{files.digest([_VERSION, str(path.absolute()), *key])[:32]}.npz"


def kept_index(path: Path, key: tuple[int, int]) -> Index | None:
    """The index of an archive of this size and time that an earlier process kept; None if there is none to trust."""
    place = _kept_path(path, key)
    try:
        with np.load(io.BytesIO(place.read_bytes()), allow_pickle=False) as held:
            text = held["names"].tobytes().decode("utf-8", "surrogateescape")
            names = text.split("\0")[:-1]
            columns = [held[name] for name in ("offset", "packed", "size", "crc", "state")]
            checked = bool(held["checked"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        _log.info("%s: damaged index, made again (%s)", place, type(error).__name__)
        return None
    if any(len(column) != len(names) for column in columns):
        return None
    return Index(names, columns[0], columns[1], columns[2], columns[3], columns[4], checked)


def keep_index(path: Path, key: tuple[int, int], index: Index) -> None:
    """Keep an index for later processes if it is a long one; a cache that cannot be written is no error."""
    if len(index.names) < KEPT_FROM:
        return
    sink = io.BytesIO()
    text = "".join(f"{name}\0" for name in index.names).encode("utf-8", "surrogateescape")
    columns = {name: getattr(index, name) for name in ("offset", "packed", "size", "crc", "state")}
    np.savez(sink, names=np.frombuffer(text, np.uint8), checked=np.array(index.checked), **columns)
    place = _kept_path(path, key)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(place, sink.getvalue())
    except (OSError, FeatstoreError) as error:
        _log.info("%s: the index cannot be kept (%s)", place, type(error).__name__)
