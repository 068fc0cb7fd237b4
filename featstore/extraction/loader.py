"""Files to batches: threads or processes read, hash, decode and resize ahead of the device, in a fixed order."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from featstore import records
from featstore.configs import RunConfig, WorkerType
from featstore.datasets.manifest import MISSING, Manifest, check_unchanged
from featstore.errors import DecodeError, ManifestError
from featstore.files import retry
from featstore.images import PreprocessSpec, preprocess, stack
from featstore.images.decoded import Opened
from featstore.images.opening import OpenFiles, open_bytes, open_path
from featstore.images.part import parse_part
from featstore.inputs import HASH_HEX, Inputs
from featstore.store.commits import RowState
from featstore.store.layout import LEFT

if TYPE_CHECKING:
    from featstore.extraction.workers import WorkerPool

Loaded = tuple[np.ndarray | None, RowState]  # an image (C, H, W), or None and why

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


def load_image(inputs: Inputs, opened: OpenFiles, sample: Sample, spec: PreprocessSpec) -> Loaded:
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
    try:
        return _open_checked(inputs, opened, sample)
    except DecodeError as error:  # a member of an archive that is damaged or cannot be used: no bytes to hash
        return NO_CONTENT, error


def _open_checked(inputs: Inputs, opened: OpenFiles, sample: Sample) -> tuple[str, Opened | DecodeError]:
    if sample.part:
        size, mtime = inputs.stat(sample.path)
        _check_size(inputs, sample, size)
        part = parse_part(sample.part)
        return opened.get(sample.path, (size, mtime), lambda: open_path(inputs, sample.path, part))
    data = inputs.read(sample.path)
    _check_size(inputs, sample, inputs.size_of(sample.path, data))
    content = inputs.hash_of(sample.path, data)
    try:
        return content, open_bytes(data, inputs.beside(sample.path))
    except DecodeError as error:
        return content, error


def _check_size(inputs: Inputs, sample: Sample, size: int) -> None:
    if size != sample.size:
        raise ManifestError(
            f"{inputs.root / sample.path}: {size} bytes, {sample.size} at registration; register the data set again"
        )


def check_files(manifest: Manifest, rows: Int64[np.ndarray, " K"]) -> None:
    """Make sure that the files of these rows are those that were registered; one missing then is not looked for.

    Raises:
        ManifestError: one has another size or time, or is gone.
    """
    sizes = manifest.table.column("size").to_numpy()
    check_unchanged(manifest, rows[sizes[rows] != MISSING])


def samples_of(manifest: Manifest) -> list[Sample]:
    """Where every row of a manifest lies."""
    columns = manifest.column("path"), manifest.place("part"), manifest.column("size")
    return [Sample(*place) for place in zip(*columns)]


class Images(ABC):
    """A context in which batches are iterated over, in the order of their jobs."""

    def __enter__(self) -> "Images":
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Cancel what is not wanted any more."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """The batches; once."""

    @property
    def notes(self) -> list[str]:
        """What there is to say about how files were read."""
        return []


class Loader(Images):
    """Iterates over the batches of `jobs` in order while later ones are being decoded.

    Memory is bounded by `AHEAD` + 1 batches. `stage`: files are copied to that folder and read from there.
    """

    def __init__(
        self,
        manifest: Manifest,
        spec: PreprocessSpec,
        jobs: list[Job],
        *,
        workers: int,
        worker_type: WorkerType = "thread",
        stage: Path | None = None,
    ):
        self.spec = spec
        self.jobs = jobs
        self._inputs = Inputs(manifest.root, stage=stage)
        self._opened = OpenFiles()
        self._samples = samples_of(manifest)
        self._threads: ThreadPoolExecutor | None = None
        self._processes: "WorkerPool | None" = None
        if worker_type == "process":
            from featstore.extraction import workers as processes  # which imports this module

            self._processes = processes.WorkerPool(
                self._inputs, spec, workers=min(workers, sum(len(job.rows) for job in jobs))
            )
        else:
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def __exit__(self, *_: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        if self._processes is not None:
            self._processes.__exit__()
        self._opened.close()

    @property
    def notes(self) -> list[str]:
        own = self._inputs.staging_note()
        return [*([own] if own else []), *(self._processes.notes if self._processes is not None else [])]

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[tuple[Job, list[Future[Loaded]]]] = deque()
        upcoming = iter(self.jobs)
        while True:
            while len(waiting) <= AHEAD and (job := next(upcoming, None)) is not None:
                waiting.append((job, [self._submit(row) for row in job.rows]))
            if not waiting:
                return
            job, futures = waiting.popleft()
            results = [future.result() for future in futures]
            yield Batch(job, stack([image for image, _ in results], self.spec), [state for _, state in results])

    def _submit(self, row: int) -> "Future[Loaded]":
        if row == GONE:
            done: Future[Loaded] = Future()
            done.set_result((None, RowState(NO_CONTENT, LEFT)))
            return done
        if self._processes is not None:
            return self._processes.submit(self._samples[row])
        assert self._threads is not None
        return self._threads.submit(load_image, self._inputs, self._opened, self._samples[row], self.spec)


def open_loader(
    manifest: Manifest, spec: PreprocessSpec, jobs: list[Job], run: RunConfig, *, workers: int | None = None
) -> Loader:
    """A loader that reads and decodes as a run is told to, by `workers` where that is given, else one per core."""
    count = workers or run.workers or int(records.machine()["cores"] or 1)
    return Loader(manifest, spec, jobs, workers=count, worker_type=run.worker_type, stage=run.stage)
