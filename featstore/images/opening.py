"""From a file and a part of it to pixels: the kind is told by content, files that hold many samples are parsed once."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

from featstore.errors import DecodeError
from featstore.images.content import MAGIC, recognise
from featstore.images.decoded import Decoded, DecodeOptions, Opened
from featstore.images.part import WHOLE, Part
from featstore.images.raster import decode
from featstore.inputs import Inputs

# kind -> function(data, path) -> Opened; `path` is None where the bytes come from no file of their own
BY_BYTES = {
    "DICOM": "featstore.images.dicom:open_dicom",
    "HDF5": "featstore.images.arrays:open_hdf5",
    "MATLAB": "featstore.images.arrays:open_matlab",
    "MetaImage": "featstore.images.nifti:open_metaimage",
    "NIfTI": "featstore.images.nifti:open_nifti",
    "NPY": "featstore.images.arrays:open_npy",
    "NPZ": "featstore.images.arrays:open_npz",
}
# kind -> function(path) -> Opened, for files too large to be held
BY_PATH = {"slide": "featstore.images.slide:open_slide", "video": "featstore.images.video:open_video"}
# kind -> function(path) -> the parts that `--frames all` makes of a file; a kind that is not here is one picture
PARTS = {
    "DICOM": "featstore.images.dicom:list_parts",
    "GIF": "featstore.images.raster:list_parts",
    "HDF5": "featstore.images.arrays:list_parts",
    "MATLAB": "featstore.images.arrays:list_parts",
    "MetaImage": "featstore.images.nifti:list_parts",
    "NIfTI": "featstore.images.nifti:list_parts",
    "NPY": "featstore.images.arrays:list_parts",
    "NPZ": "featstore.images.arrays:list_parts",
    "TIFF": "featstore.images.raster:list_parts",
    "video": "featstore.images.video:list_parts",
}
VOLUMES = ("HDF5", "MATLAB", "MetaImage", "NIfTI", "NPY", "NPZ", "video")  # one sample a file makes little sense
HEAD = 1024  # bytes that tell the kind
MAX_OPEN_BYTES = 2 * 2**30
MAX_OPEN_FILES = 256
Measured = TypeVar("Measured")
RECOUNTED = 16  # files used last whose memory may still grow: some keep what was read of them


class RasterFile:
    """A TIFF, GIF or other picture file, kept as its bytes."""

    def __init__(self, data: bytes):
        self._data = data

    @property
    def num_bytes(self) -> int:
        return len(self._data)

    def pixels(self, part: Part, options: DecodeOptions) -> Decoded:
        return Decoded(decode(self._data, frame=part.frame or 0, options=options))

    def close(self) -> None:
        self._data = b""


def open_bytes(data: bytes, path: Path | None = None) -> Opened:
    """Parse a file of a kind that is read as a whole.

    Raises:
        DecodeError: no known kind, a video, or damaged.
    """
    kind = recognise(data)
    if kind in MAGIC:
        return RasterFile(data)
    if kind in BY_PATH:
        raise DecodeError(f"a {kind} is read from a file of its own, not from inside an archive")
    opened: Opened = resolve_name(BY_BYTES[kind])(data, path)
    return opened


def decode_bytes(data: bytes, options: DecodeOptions, path: Path | None = None) -> Decoded:
    """The one picture of a file, or the first of several."""
    return open_bytes(data, path).pixels(WHOLE, options)


def kind_of_file(path: Path) -> str:
    """The kind of a file from its first bytes.

    Raises:
        DecodeError: no known kind. OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return recognise(file.read(HEAD))


def list_parts(path: Path) -> list[Part]:
    """Every picture of a file, in order; `[WHOLE]` for a kind that holds one.

    Raises:
        DecodeError: no known kind, or damaged.
    """
    kind = kind_of_file(path)
    return list(resolve_name(PARTS[kind])(path)) if kind in PARTS else [WHOLE]


@dataclass(slots=True)
class _Slot:
    lock: threading.Lock
    key: Any = None
    content: str = ""
    found: Opened | DecodeError | None = None
    counted: int = 0  # bytes of it that are in the running total
    measured: Any = None

    @property
    def num_bytes(self) -> int:
        return 0 if self.found is None or isinstance(self.found, DecodeError) else self.found.num_bytes


def _memory_share() -> int:
    """A quarter of the machine's memory, at most `MAX_OPEN_BYTES`; every process of a loader may take as much."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not told on this system
        return MAX_OPEN_BYTES
    return min(MAX_OPEN_BYTES, memory // 4) if memory > 0 else MAX_OPEN_BYTES


class OpenFiles:
    """Files that hold many samples, parsed once and kept while they are in use, the oldest given up first.

    At most `MAX_OPEN_FILES` are kept, and `max_bytes` of memory (`_memory_share()` where None). Threads that ask for
    the same file wait for the one that parses it. A file that fails to parse is remembered too.
    """

    def __init__(self, max_bytes: int | None = None):
        self._max_bytes = _memory_share() if max_bytes is None else max_bytes
        self._lock = threading.Lock()
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._total = 0

    def get(
        self, name: str, key: Any, make: Callable[[], tuple[str, Opened | DecodeError]]
    ) -> tuple[str, Opened | DecodeError]:
        """(content hash, opened file or why it is none) of `name`.

        `make` runs again only when `key` (size, time) has changed, or the file was given up.
        """
        with self._lock:
            slot = self._slots.setdefault(name, _Slot(threading.Lock()))
            self._slots.move_to_end(name)
        with slot.lock:
            if slot.found is None or slot.key != key:
                slot.content, slot.found = make()
                slot.key = key
            content, found = slot.content, slot.found
        self._shrink()
        return content, found

    def measured(self, name: str, make: Callable[[], Measured]) -> tuple[Measured, bool]:
        """(what `make` says of a file, kept as long as the file is; whether that is open)."""
        with self._lock:
            slot = self._slots.get(name)
            if slot is not None and slot.measured is not None:
                return slot.measured, slot.found is not None
        found = make()
        with self._lock:
            slot = self._slots.setdefault(name, _Slot(threading.Lock()))
            slot.measured = found
            return found, slot.found is not None

    def _shrink(self) -> None:
        # What is given up here may still be read by another thread: it goes when that one lets go of it.
        with self._lock:
            for slot in islice(reversed(self._slots.values()), RECOUNTED):
                now = slot.num_bytes
                self._total += now - slot.counted
                slot.counted = now
            while len(self._slots) > 1 and (self._total > self._max_bytes or len(self._slots) > MAX_OPEN_FILES):
                self._total -= self._slots.popitem(last=False)[1].counted

    def close(self) -> None:
        """Forget every file; nothing may be reading any more."""
        with self._lock:
            for slot in self._slots.values():
                if slot.found is not None and not isinstance(slot.found, DecodeError):
                    slot.found.close()
            self._slots.clear()
            self._total = 0


def open_path(inputs: Inputs, path: str, part: Part) -> tuple[str, Opened | DecodeError]:
    """(content hash, opened file or why it cannot be) of one file of a data set.

    Raises:
        OSError: it cannot be read.
    """
    kind = "slide" if part.is_tile else recognise_head(inputs, path)
    if kind in BY_PATH:
        content = inputs.hash(path)
        call = partial(resolve_name(BY_PATH[kind]), inputs.local(path))
    else:
        data = inputs.read(path)
        content = inputs.hash_of(path, data)
        call = partial(open_bytes, data, inputs.beside(path))
    try:
        return content, call()
    except DecodeError as error:
        return content, error


def recognise_head(inputs: Inputs, path: str) -> str:
    """The kind of a file by its first bytes; "" where they do not tell."""
    try:
        return recognise(inputs.read(path, first=HEAD))
    except DecodeError:
        return ""
