"""Compressed shards: chunks of any length behind an index, decoded one at a time, and how their `zarr.json` reads.

Only the inner codecs and the names of the files differ from a raw shard (`shards.py`), so zarr-python opens these
arrays too, and tensorstore those of codec `zstd`.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from jaxtyping import UInt8

from featstore import files
from featstore.errors import ConfigError, CorruptError, StoreError
from featstore.objects import Place
from featstore.store.layout import ITEMSIZE, ArraySpec
from featstore.store.shards import ABSENT, CRC_BYTES, INDEX_ENTRY_BYTES, ShardLayout, crc32c, numpy_dtype, shard_key

# In the folder of a set: from the first step of archiving to the last of unarchiving, and while compressed shards are
# complete.
BEGUN, SEALED = "archiving.json", "archive.json"
ATTRIBUTE = "featstore_archive"  # in the attributes of a compressed array
Advance = Callable[[int], None]
Sums = list[int]  # [size, index crc, data crc] of a shard file


def _blosc(level: int, itemsize: int) -> Any:
    from numcodecs import Blosc

    return Blosc(cname="zstd", clevel=level, shuffle=Blosc.SHUFFLE, typesize=itemsize)


def _pcodec(level: int, _: int) -> Any:
    try:
        from numcodecs.pcodec import PCodec
    except ImportError as error:
        raise StoreError("the codec pcodec needs the package pcodec: pip install pcodec") from error
    return PCodec(level=level)


# Name -> (default level, highest level, what makes the coder).
CODECS: dict[str, tuple[int, int, Callable[[int, int], Any]]] = {"zstd": (5, 9, _blosc), "pcodec": (8, 12, _pcodec)}


@dataclass(frozen=True, slots=True)
class Codec:
    """How chunks are compressed: `zstd` behind a byte shuffle (zarr's `blosc`), or `pcodec`."""

    name: str
    level: int

    @staticmethod
    def choose(name: str, level: int | None) -> "Codec":
        """By name, at the codec's default level if none is given.

        Raises:
            ConfigError: an unknown codec or a level that it does not have.
        """
        if name not in CODECS:
            raise ConfigError(f"unknown codec {name!r}; known: {', '.join(CODECS)}")
        default, highest, _ = CODECS[name]
        if level is not None and not 1 <= level <= highest:
            raise ConfigError(f"--level of {name} is 1 to {highest}, got {level}")
        return Codec(name, level or default)

    def check(self, array: ArraySpec) -> None:
        if self.name == "pcodec" and array.dtype == "int8":
            raise ConfigError(f"pcodec does not compress int8 (array {array.name}); use --codec zstd")

    def coder(self, dtype: str) -> Any:
        return CODECS[self.name][2](self.level, ITEMSIZE[dtype])

    def metadata(self, raw: dict[str, Any], dtype: str) -> dict[str, Any]:
        """The `zarr.json` of the compressed array, from that of the raw one."""
        made: dict[str, Any] = json.loads(json.dumps(raw))
        sharding = made["codecs"][0]["configuration"]
        crc = {"name": "crc32c"}
        if self.name == "pcodec":
            sharding["codecs"] = [{"name": "numcodecs.pcodec", "configuration": {"level": self.level}}, crc]
            if dtype == "bfloat16":  # which pcodec does not know: its bit patterns, and NaN's is the fill value
                made["data_type"], made["fill_value"] = "uint16", 0x7FC0
        else:
            blosc: dict[str, Any] = {"typesize": ITEMSIZE[dtype], "cname": "zstd", "clevel": self.level}
            blosc |= {"shuffle": "shuffle", "blocksize": 0}
            sharding["codecs"] = [sharding["codecs"][0], {"name": "blosc", "configuration": blosc}, crc]
        made["chunk_key_encoding"]["configuration"]["separator"] = "."
        made["attributes"][ATTRIBUTE] = {"codec": self.name, "level": self.level, "dtype": dtype}
        return made


def archived(folder: Place) -> dict[str, Any] | None:
    """What `archive.json` says: codec, level, bytes, raw_bytes, and the checksums of every compressed shard."""
    path = folder / SEALED
    return files.unseal(path.read_bytes(), path) if path.is_file() else None


def check_not_archived(folder: Place) -> None:
    """Refuse to write into a set that is archived, or about to be.

    Raises:
        StoreError: saying how to go back.
    """
    if (folder / BEGUN).is_file() or (folder / SEALED).is_file():
        raise StoreError(
            f"{folder}: this set is archived (compressed, for reading only); run `featstore unarchive` on it first, "
            "then the same command again"
        )


def packed_key(shard: int, ndim: int) -> str:
    """Name of a compressed shard in its array's folder: `c.3.0` for shard 3 of a 2-d array."""
    return shard_key(shard, ndim).replace("/", ".")


class PackedShard:
    """A compressed shard, read chunk by chunk; a chunk is its compressed bytes and their crc32c.

    Raises:
        FileNotFoundError: no such file.
        CorruptError: the index does not match its checksum or the file.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        self.path = path
        index_bytes = capacity * INDEX_ENTRY_BYTES + CRC_BYTES
        self._file: BinaryIO = open(path, "rb")  # noqa: SIM115 - closed by close() or with the object
        self.size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, self.size - index_bytes))
        tail = self._file.read()
        self.index_crc = int.from_bytes(tail[-CRC_BYTES:], "little")
        if len(tail) != index_bytes or crc32c(tail[:-CRC_BYTES]) != self.index_crc:
            self.close()
            raise CorruptError(f"{path}: the index of this compressed shard is damaged; restore it from a copy")
        entries = np.frombuffer(tail[:-CRC_BYTES], "<u8").reshape(-1, 2)
        self._places: list[tuple[int, int]] = [(int(a), int(b)) for a, b in entries if a != ABSENT]

    def __len__(self) -> int:
        """Chunks held."""
        return len(self._places)

    def close(self) -> None:
        self._file.close()

    def chunk(self, number: int) -> bytes:
        """Compressed bytes of one chunk, checked."""
        offset, length = self._places[number]
        data = os.pread(self._file.fileno(), length, offset)
        if len(data) != length or crc32c(data[:-CRC_BYTES]) != int.from_bytes(data[-CRC_BYTES:], "little"):
            raise CorruptError(f"{self.path}: chunk {number} is damaged; restore it from a copy")
        return data[:-CRC_BYTES]

    def decode(self, number: int, coder: Any, num_bytes: int) -> UInt8[np.ndarray, " n"]:
        """The raw bytes of one chunk.

        Raises:
            CorruptError: it is damaged or decodes to another size.
        """
        try:
            raw = np.frombuffer(coder.decode(self.chunk(number)), np.uint8)
        except (RuntimeError, ValueError) as error:
            raise CorruptError(f"{self.path}: chunk {number} cannot be decoded ({error}); restore it") from error
        if len(raw) != num_bytes:
            raise CorruptError(f"{self.path}: chunk {number} decodes to {len(raw)} bytes, not {num_bytes}; restore it")
        return raw

    def summary(self) -> Sums:
        """[size, index crc, crc32c over the chunks' checksums]."""
        words = [os.pread(self._file.fileno(), CRC_BYTES, at + length - CRC_BYTES) for at, length in self._places]
        return [self.size, self.index_crc, crc32c(b"".join(words))]

    def raw_summary(self, layout: ShardLayout, coder: Any, advance: Advance) -> Sums:
        """What `read_summary` would say of the raw shard, by decoding every chunk."""
        crc = 0
        for number in range(len(self)):
            word = crc32c(self.decode(number, coder, layout.stride - CRC_BYTES)).to_bytes(CRC_BYTES, "little")
            crc = int(google_crc32c.extend(crc, word))
            advance(layout.stride)
        index = layout.index(len(self))
        return [len(self) * layout.stride + len(index), int.from_bytes(index[-CRC_BYTES:], "little"), crc]


class ArchivedRows:
    """Rows of a compressed array; row numbers come checked. Memory is a chunk, and checksums are always checked."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path = path
        facts, sharding = metadata["attributes"][ATTRIBUTE], metadata["codecs"][0]["configuration"]
        self.dtype: np.dtype[Any] = numpy_dtype(facts["dtype"])
        self.shard_rows = int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0])
        self.chunk_rows = int(sharding["chunk_shape"][0])
        self._row_shape = tuple(metadata["shape"][1:])
        self._coder: Any = Codec(facts["codec"], facts["level"]).coder(facts["dtype"])

    def close(self) -> None:
        self._coder = None

    def read(self, start: int, stop: int, out: np.ndarray, verify: bool) -> None:
        self.gather(np.arange(start, stop), out, verify)

    def gather(self, rows: np.ndarray, out: np.ndarray | None, verify: bool) -> np.ndarray:
        """Every chunk touched is decoded once. `verify` asks for nothing more than is done in any case."""
        if self._coder is None:
            raise StoreError(f"array {self.path} is closed; open it again")
        if out is None:
            out = np.empty((len(rows), *self._row_shape), self.dtype)
        chunk_of = rows // self.chunk_rows
        order = np.argsort(chunk_of, kind="stable")
        shard: tuple[int, PackedShard] | None = None
        try:
            for positions in np.split(order, np.flatnonzero(np.diff(chunk_of[order])) + 1):
                number, chunk = divmod(int(chunk_of[positions[0]]), self.shard_rows // self.chunk_rows)
                if shard is None or shard[0] != number:
                    if shard is not None:
                        shard[1].close()
                    shard = number, self._open(number)
                block = self._decoded(shard[1], chunk)
                out[positions] = block[rows[positions] % self.chunk_rows]
        finally:
            if shard is not None:
                shard[1].close()
        return out

    def _decoded(self, shard: PackedShard, chunk: int) -> np.ndarray:
        shape = (self.chunk_rows, *self._row_shape)
        if chunk >= len(shard):
            raise CorruptError(f"{shard.path} holds {len(shard)} chunks only, chunk {chunk} was asked for")
        return shard.decode(chunk, self._coder, math.prod(shape) * self.dtype.itemsize).view(self.dtype).reshape(shape)

    def _open(self, number: int) -> PackedShard:
        path = self.path / packed_key(number, 1 + len(self._row_shape))
        try:
            return PackedShard(path, self.shard_rows // self.chunk_rows)
        except FileNotFoundError as error:
            raise CorruptError(
                f"{path} is missing; open the set again if it was unarchived just now, else restore it from a copy"
            ) from error
