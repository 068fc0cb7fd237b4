"""What takes the space in a store: every file counted once, under the set, array or manifest that it belongs to."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from featstore.errors import UnknownNameError
from featstore.objects import Place

SECTOR = 512  # unit of st_blocks, whatever the file system's own block is
PACKED = re.compile(r"c\.\d")  # how names of compressed shards begin


@dataclass(slots=True)
class Usage:
    """Files of one kind under one owner. `disk` is what the file system uses, in bytes."""

    owner: str
    part: str
    num_files: int = 0
    num_bytes: int = 0
    disk: int = 0


def measure(root: Place, dataset: str | None = None) -> list[Usage]:
    """Every file of a store, or those of one data set and its sets, in the order of their names.

    A file with several hard links counts where it is met first.

    Raises:
        UnknownNameError: the store has nothing of that data set.
    """
    found: dict[tuple[str, str], Usage] = {}
    seen: set[tuple[int, int]] = set()
    for path, facts in _files(root):
        inside = PurePosixPath(path.relative_to(root).as_posix())
        owner, part = _belongs(inside.parts)
        if dataset is not None and dataset not in (owner, owner.split("/")[0]):
            continue
        if getattr(facts, "st_nlink", 1) > 1:
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
        row = found.setdefault((owner, part), Usage(owner, part))
        row.num_files += 1
        row.num_bytes += facts.st_size
        row.disk += facts.st_blocks * SECTOR if hasattr(facts, "st_blocks") else facts.st_size
    if dataset is not None and not found:
        raise UnknownNameError(f"{root} holds nothing of a data set {dataset!r}; `featstore ls` lists what there is")
    return [found[key] for key in sorted(found)]


def _files(root: Place) -> Iterator[tuple[Place, os.stat_result]]:
    for path in sorted(root.rglob("*")):
        try:
            if path.is_file():
                yield path, path.stat()
        except FileNotFoundError:
            continue  # gone just now


def _belongs(parts: tuple[str, ...]) -> tuple[str, str]:
    """(owner, part) of a file by its path in the store."""
    if parts[0] == "datasets" and len(parts) > 2:
        return parts[1], f"manifest {parts[2]}" if len(parts) > 3 else "current"
    if parts[0] == "sets" and len(parts) > 3:
        owner = f"{parts[1]}/{parts[2]}"
        if parts[2].startswith("."):
            return owner, "put away"
        if parts[3] == "data.zarr":
            return owner, _array(parts[4:])
        names = {"commits": "markers", "attempts": "unfinished attempts", "compact.zarr": "compact copies"}
        return owner, names.get(parts[3], parts[3] if len(parts) > 4 else "spec")
    return "store", parts[0] if len(parts) > 1 else "marks"


def _array(parts: tuple[str, ...]) -> str:
    """`array cls` for its shards, raw or compressed; every zarr.json counts as metadata."""
    if PACKED.match(parts[-1]):
        return f"array {'/'.join(parts[:-1])}"
    if parts[-1] == "zarr.json" or "c" not in parts:
        return "array metadata"
    return f"array {'/'.join(parts[: parts.index('c')])}"
