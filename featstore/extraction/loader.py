"""Files to batches: threads read, hash, decode and resize ahead of the device, in a fixed order."""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from featstore.datasets.manifest import MISSING, Manifest
from featstore.errors import DecodeError, ManifestError
from featstore.files import retry
from featstore.images import PreprocessSpec, preprocess, stack
from featstore.images.decoded import Opened
from featstore.images.opening import OpenFiles, open_bytes, open_path
from featstore.images.part import parse_part
from featstore.inputs import HASH_HEX, Inputs
from featstore.store.commits import RowState
from featstore.store.layout import LEFT

NO_CONTENT = "0" * HASH_HEX
GONE = -1  # a row of an older manifest that was never extracted and has left the data set
AHEAD = 3  # batches decoded before they are asked for: enough to hide one slow file, little enough memory


@dataclass(frozen=True, slots=True)
class Job:
    """One batch to be: manifest rows `rows` of block `block`."""

    block: int
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Images of one job, `pixels` (B, C, H, W); a failed image keeps its slot, filled with zeros."""

    job: Job
    pixels: np.ndarray
    states: list[RowState]


@dataclass(frozen=True, slots=True)
class Sample:
    """Where one sample lies: file below the root, part of it, and the file's size in bytes at registration."""

    path: str
    part: str | None
    size: int


def load_image(
    inputs: Inputs, opened: OpenFiles, sample: Sample, spec: PreprocessSpec
) -> tuple[np.ndarray | None, RowState]:
    """Read, hash, decode and preprocess one sample of a manifest.

    Transient I/O errors are retried three times. What cannot be decoded comes back as None with its reason.

    Raises:
        ManifestError: the file is gone or has another size than at registration.
        OSError: it cannot be read at all.
    """
    if sample.size == MISSING:
        return None, RowState(NO_CONTENT, "the file was missing at registration")
    try:
        content, found = retry(lambda: _open(inputs, opened, sample))
    except FileNotFoundError as error:
        raise ManifestError(f"{inputs.root / sample.path}: gone since registration; register the data set again") from (
            error
        )
    try:
        if isinstance(found, DecodeError):
            raise found
        return preprocess(found.pixels(parse_part(sample.part), spec.decoding), spec), RowState(content)
    except DecodeError as error:
        return None, RowState(content, str(error))


def _open(inputs: Inputs, opened: OpenFiles, sample: Sample) -> tuple[str, Opened | DecodeError]:
    """(content hash, the file or why it cannot be opened)."""
    if sample.part:
        size, mtime = inputs.stat(sample.path)
        _check_size(inputs, sample, size)
        part = parse_part(sample.part)
        return opened.get(sample.path, (size, mtime), lambda: open_path(inputs, sample.path, part))
    data = inputs.read(sample.path)
    _check_size(inputs, sample, len(data))
    content = hashlib.sha256(data).hexdigest()[:HASH_HEX]
    try:
        return content, open_bytes(data, inputs.beside(sample.path))
    except DecodeError as error:
        return content, error


def _check_size(inputs: Inputs, sample: Sample, size: int) -> None:
    if size != sample.size:
        raise ManifestError(
            f"{inputs.root / sample.path}: {size} bytes, {sample.size} at registration; register the data set again"
        )


def samples_of(manifest: Manifest) -> list[Sample]:
    """Where every row of a manifest lies."""
    columns = manifest.column("path"), manifest.place("part"), manifest.column("size")
    return [Sample(*place) for place in zip(*columns)]


class Loader:
    """Iterates over the batches of `jobs` in order while later ones are being decoded.

    Memory is bounded by `AHEAD` + 1 batches. Leaving the context cancels what is not wanted any more.
    """

    def __init__(self, manifest: Manifest, spec: PreprocessSpec, jobs: list[Job], *, workers: int):
        self.spec = spec
        self.jobs = jobs
        self._inputs = Inputs(manifest.root)
        self._opened = OpenFiles()
        self._samples = samples_of(manifest)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._opened.close()

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[tuple[Job, list[Future[tuple[np.ndarray | None, RowState]]]]] = deque()
        upcoming = iter(self.jobs)
        while True:
            while len(waiting) <= AHEAD and (job := next(upcoming, None)) is not None:
                waiting.append((job, [self._submit(row) for row in job.rows]))
            if not waiting:
                return
            job, futures = waiting.popleft()
            results = [future.result() for future in futures]
            yield Batch(job, stack([image for image, _ in results], self.spec), [state for _, state in results])

    def _submit(self, row: int) -> "Future[tuple[np.ndarray | None, RowState]]":
        if row == GONE:
            done: Future[tuple[np.ndarray | None, RowState]] = Future()
            done.set_result((None, RowState(NO_CONTENT, LEFT)))
            return done
        return self._pool.submit(load_image, self._inputs, self._opened, self._samples[row], self.spec)
