"""How much memory decoding may take at once: every image passes a gate with what it will need, told by its header."""

import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from featstore.errors import DecodeError, FeatstoreError
from featstore.extraction.distributed import Ranks, find_ranks
from featstore.images.extent import HEAD, Extent, at_most, footprint, measure
from featstore.images.opening import OpenFiles
from featstore.images.part import Part
from featstore.images.preprocess import PreprocessSpec
from featstore.inputs import Inputs

SHARE = 4  # a quarter of what the system has left; the rest is for the network, its batches and what else runs
FREE = 32 * 2**20  # what every worker may take without asking: nothing small waits, and nothing is counted for it
PEEK = 2**20  # larger files are told by their first bytes before they are read; smaller ones are read, then told
_UNTOLD = 4 * 2**30  # of memory, on a system that does not say


@runtime_checkable
class Admission(Protocol):
    """What an image asks before it is decoded."""

    def take(self, need: int) -> None:
        """Wait until so many bytes may be taken."""

    def give(self, need: int) -> None:
        """They are free again."""


class Gate:
    """Lets in images of at most `limit` bytes together, in the order in which they came; a larger one alone.

    What waits holds nothing that another one needs, and nothing overtakes: there is no deadlock, and a large image is
    not starved by small ones. Needs up to `FREE` are not held back and not counted. Beside the limit every thread may
    hold `FREE`, and up to 64 MiB freed that its pool of the C library keeps for the next one (glibc).
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.used = 0
        self.most = 0  # bytes that were let in at once
        self._waiting: deque[object] = deque()
        self._condition = threading.Condition()
        self._closed = False

    def take(self, need: int) -> None:
        """Wait for one's turn.

        Raises:
            FeatstoreError: the gate was closed meanwhile.
        """
        if need <= FREE:
            return
        place = object()
        with self._condition:
            self._waiting.append(place)
            self._condition.wait_for(lambda: self._closed or (self._waiting[0] is place and self._has_room(need)))
            self._waiting.remove(place)
            self._condition.notify_all()  # the next in line may fit beside
            if self._closed:
                raise FeatstoreError("the loader is closed; this image was not decoded any more")
            self.used += need
            self.most = max(self.most, self.used)

    def give(self, need: int) -> None:
        """What was taken is free again."""
        if need <= FREE:
            return
        with self._condition:
            self.used -= need
            self._condition.notify_all()

    def close(self) -> None:
        """Send away what waits."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def _has_room(self, need: int) -> bool:
        return not self.used or self.used + need <= self.limit


class Turn:
    """A context in which one image passes an `Admission`, with the first need that is named."""

    def __init__(self, gate: Admission | None):
        self._gate = gate
        self._need: int | None = None

    def __enter__(self) -> "Turn":
        return self

    def __exit__(self, *_: object) -> None:
        if self._gate is not None and self._need is not None:
            self._gate.give(self._need)

    @property
    def is_open(self) -> bool:
        """Whether somebody wants to know the need, and does not yet."""
        return self._gate is not None and self._need is None

    def take(self, need: int) -> None:
        """Wait until so much may be taken; once: a second try at reading asks no more."""
        if self._gate is not None and self._need is None:
            self._gate.take(need)
            self._need = need


def need_of_bytes(data: bytes, size: int, specs: Sequence[PreprocessSpec]) -> int:
    """Bytes to decode a file that was read; 0 where that is surely below `FREE`."""
    extent = measure(data, size)
    return 0 if at_most(extent) <= FREE else footprint(extent, specs)


def need_of_file(inputs: Inputs, path: str, size: int, specs: Sequence[PreprocessSpec]) -> int:
    """Bytes to read and decode a whole file, from its first ones."""
    return footprint(_measure(inputs, path, size), specs)


def need_of_part(
    inputs: Inputs, opened: OpenFiles, path: str, size: int, part: Part, specs: Sequence[PreprocessSpec]
) -> int:
    """Bytes to decode a part of a file; opening it is counted until it is open."""
    extent, is_open = opened.measured(path, lambda: _measure(inputs, path, size))
    held = 0 if is_open else extent.held
    if not part.is_tile:
        return footprint(Extent(extent.height, extent.width, extent.channels, extent.itemsize, held), specs)
    # A slide is not read as a whole, unless it is one picture; a tile comes from a level at most twice as fine.
    picture = extent.height * extent.width * 7 if extent.kind in ("JPEG", "PNG") and not is_open else 0
    return picture + footprint(Extent(2 * (part.height or 0), 2 * (part.width or 0), 3, 1), specs)


def _measure(inputs: Inputs, path: str, size: int) -> Extent:
    try:
        place = inputs.local(path)
    except DecodeError:  # a member of an archive
        return measure(inputs.read(path, first=HEAD), size)
    with open(place, "rb") as file:
        return measure(file, size)


def available_memory() -> int:
    """Bytes that this process may still take: what the system has left, or its control group if that is less."""
    found = [_left_in(folder) for folder in _control_groups()]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    known = [left for left in found if left is not None]
    if known:
        return max(0, min(known))
    try:
        return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES")) // 2
    except (AttributeError, ValueError, OSError):
        return _UNTOLD


def _control_groups(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """Folders of this process's control groups that count memory, from its own up to the root (versions 1 and 2)."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        folder = top / name.lstrip("/")
        # In a container the name may be the host's, and the group itself stand at the root.
        found += [folder, *(parent for parent in folder.parents if parent == top or top in parent.parents)]
    return found


def _left_in(folder: Path) -> int | None:
    """Bytes left below the limit of a control group; None where it has none."""
    for limit, usage, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            text = (folder / limit).read_text().strip()
            if text == "max" or int(text) >= 2**60:  # version 1 writes a huge number for none
                return None
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return int(text) - used + int(stat.get(inactive, 0))  # cached files give way
        except (OSError, ValueError):
            continue
    return None


def decode_limit(ranks: Ranks | None = None) -> int:
    """Bytes for images being decoded at once by this process: its part of `SHARE` of what is left on its machine."""
    ranks = ranks or find_ranks()
    return available_memory() // SHARE // ranks.local_world
