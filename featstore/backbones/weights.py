"""Weights on disk without torch: which files a folder holds, whether they are whole, their SHA-256, what they say.

Identity needs the digest of every byte, and a file of the 7B network takes minutes to read from a shared disk. Two
shortcuts keep a second run fast: the hub's cache names each large file by its SHA-256, and digests of other files are
remembered by (path, size, modification time, inode).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.errors import MissingWeightsError, WeightsError
from featstore.files import canonical_json, write_atomic

HUB_BLOB = re.compile(r"[0-9a-f]{64}")
HEADER_LENGTH_BYTES = 8  # of a safetensors file, before the JSON header
LONGEST_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFiles:
    """The safetensors files of one network, one or several shards, and the folder's two JSON files if it has them."""

    files: tuple[Path, ...]
    config: dict[str, Any] | None
    processor: dict[str, Any] | None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file beside weights.

    Raises:
        WeightsError: the text is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON file ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} must hold a JSON object, it holds {type(value).__name__}; fetch it again")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder in the hub's format.

    Raises:
        MissingWeightsError: the folder has none.
        WeightsError: it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise MissingWeightsError(
            f"{folder} has no config.json; give a folder as the hub has it (config.json and *.safetensors) "
            "or, with a model's name, one .safetensors file"
        )
    return read_json(path)


def read_processor(folder: Path) -> dict[str, Any] | None:
    """`preprocessor_config.json` of a folder, None where there is none."""
    path = folder / "preprocessor_config.json"
    return read_json(path) if path.is_file() else None


def find_files(path: Path) -> WeightFiles:
    """Weights at `path`: a folder in the hub's format or one `.safetensors` file.

    Raises:
        MissingWeightsError: nothing is there, or the folder lacks a file that it should have.
        WeightsError: a file is no whole safetensors file.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise WeightsError(f"{path} is not a .safetensors file; other formats are not read")
        found = WeightFiles(files=(path,), config=None, processor=None)
    elif path.is_dir():
        config = read_config(path)
        found = WeightFiles(files=_files_in(path), config=config, processor=read_processor(path))
    else:
        raise MissingWeightsError(f"{path} does not exist; give a folder with config.json and *.safetensors")
    for file in found.files:
        check_whole(file)
    return found


def _files_in(folder: Path) -> tuple[Path, ...]:
    # The order in which transformers looks, so that what is digested is what is loaded.
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return (single,)
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent or not names:
            raise MissingWeightsError(
                f"{folder}: {len(absent)} of {len(names)} files that model.safetensors.index.json names are missing"
                f"{' (' + ', '.join(absent[:3]) + ')' if absent else ''}; fetch the folder again"
            )
        return tuple(folder / name for name in names)
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return (others[0],)
    if others:
        raise WeightsError(
            f"{folder} has {len(others)} .safetensors files and no model.safetensors.index.json; "
            "give the one file to use"
        )
    raise MissingWeightsError(f"{folder} has no .safetensors file; weights in other formats are not read")


def check_whole(path: Path) -> None:
    """Compare a safetensors file's size with what its header promises.

    Raises:
        WeightsError: the file is cut short, too long or of another format.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
            if not 2 <= length <= min(LONGEST_HEADER, size - HEADER_LENGTH_BYTES):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightsError(
            f"{path} is no safetensors file ({error}); a Git LFS pointer or a download cut short? fetch it again"
        ) from error
    expected = HEADER_LENGTH_BYTES + length + max(ends, default=0)
    if size != expected:
        raise WeightsError(f"{path} has {size} bytes but its header promises {expected}; fetch it again")


def digest_files(files: Sequence[Path], cache: Path | None = None) -> str:
    """SHA-256 of one file's bytes; of several shards, the SHA-256 over their sorted names and digests."""
    remembered = _DigestCache(cache)
    digests = {file.name: blob_digest(file) or remembered.digest(file) for file in files}
    remembered.save()
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def blob_digest(path: Path) -> str | None:
    """The SHA-256 that the hub's cache gives a file as its name, None for any other file.

    A snapshot's files are links into `blobs`, where a large file is named by the SHA-256 of its bytes.
    """
    if not path.is_symlink():
        return None
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and HUB_BLOB.fullmatch(blob.name) else None


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _DigestCache:
    """Digests of files that have not changed since; a cache that cannot be read or written only costs time."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        self.changed = False
        if path is not None:
            try:
                entries = json.loads(path.read_bytes())
            except (OSError, ValueError):
                entries = {}
            self.entries = entries if isinstance(entries, dict) else {}

    def digest(self, file: Path) -> str:
        status = file.stat()
        key = str(file.resolve())
        state = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
        known = self.entries.get(key)
        if isinstance(known, dict) and known == {**state, "sha256": known.get("sha256")}:
            return str(known["sha256"])
        self.entries[key] = {**state, "sha256": sha256(file)}
        self.changed = True
        return str(self.entries[key]["sha256"])

    def save(self) -> None:
        if self.path is None or not self.changed:
            return
        try:
            write_atomic(self.path, canonical_json(self.entries))
        except OSError:
            # A read-only store: the digest is right, it will be computed again.
            return
