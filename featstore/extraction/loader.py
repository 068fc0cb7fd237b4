"""Files to batches: threads or processes read, hash, decode and resize ahead of the device, in a fixed order."""

import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from featstore.configs import RunConfig, WorkerType
from featstore.datasets.manifest import MISSING, Manifest, check_unchanged
from featstore.errors import DecodeError, ManifestError
from featstore.extraction.distributed import find_ranks
from featstore.extraction.memory import (
    PEEK,
    Admission,
    Gate,
    Turn,
    decode_limit,
    need_of_bytes,
    need_of_file,
    need_of_part,
)
from featstore.extraction.stages import Stage
from featstore.files import retry
from featstore.images import PreprocessSpec, stack
from featstore.images.decoded import DecodeOptions, Opened
from featstore.images.opening import OpenFiles, open_bytes, open_path
from featstore.images.part import parse_part
from featstore.images.preprocess import preprocess_each
from featstore.inputs import HASH_HEX, Inputs
from featstore.store.commits import RowState
from featstore.store.layout import LEFT

if TYPE_CHECKING:
    from featstore.extraction.workers import WorkerPool

Loaded = tuple[np.ndarray | None, RowState]  # an image (C, H, W), or None and why
Several = tuple[list[np.ndarray], RowState]  # an image in every preprocessing asked for; empty where it failed

NO_CONTENT = "0" * HASH_HEX
GONE = -1  # a row of an older manifest that was never extracted and has left the data set
END: Any = object()
AHEAD = 3  # batches decoded before they are asked for: enough to hide one slow file, little enough memory


@dataclass(frozen=True, slots=True)
class Job:
    """One batch to be: manifest rows `rows` of block `block`, for the array groups `groups` of set `lane` of a pass.

    `kind` is the number of the preprocessing that the set wants.
    """

    block: int
    rows: tuple[int, ...]
    lane: int = 0
    kind: int = 0
    groups: tuple[str, ...] = ()


# What a loader is given one after another: batches that share images, or None: nothing for now, so give out what waits.
Work = Sequence[Job] | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Images of one job, `pixels` (B, C, H, W); a failed image keeps its slot, filled with zeros."""

    job: Job
    pixels: np.ndarray
    states: list[RowState]


@dataclass(frozen=True, slots=True)
class Sample:
    """Where one sample lies: file below the root, part of it, and the file's size in bytes at registration.

    `id` is its own, of which augmented copies are drawn; None where nobody asks for such.
    """

    path: str
    part: str | None
    size: int
    id: str | None = None


def load_image(inputs: Inputs, opened: OpenFiles, sample: Sample, spec: PreprocessSpec) -> Loaded:
    """`load_images` for one preprocessing."""
    images, state = load_images(inputs, opened, sample, (spec,))
    return (images[0] if images else None), state


def load_images(
    inputs: Inputs,
    opened: OpenFiles,
    sample: Sample,
    specs: Sequence[PreprocessSpec],
    gate: Admission | None = None,
) -> Several:
    """Read, hash and decode one sample of a manifest, and preprocess it in every way asked for.

    Transient I/O errors are retried three times. What cannot be decoded comes back empty with its reason; it is
    decoded once for all preprocessings that read it alike. Before anything large is read or decoded, `gate` is asked.

    Raises:
        ManifestError: the file is gone or has another size than at registration.
        OSError: it cannot be read at all.
    """
    if sample.size == MISSING:
        return [], RowState(NO_CONTENT, "the file was missing at registration")
    with Turn(gate) as turn:
        return _load(inputs, opened, sample, specs, turn)


def _load(inputs: Inputs, opened: OpenFiles, sample: Sample, specs: Sequence[PreprocessSpec], turn: Turn) -> Several:
    try:
        content, found = retry(lambda: _open(inputs, opened, sample, specs, turn))
    except FileNotFoundError as error:
        raise ManifestError(f"{inputs.root / sample.path}: gone since registration; register the data set again") from (
            error
        )
    try:
        if isinstance(found, DecodeError):
            raise found
        part = parse_part(sample.part)
        alike: dict[DecodeOptions, list[int]] = {}
        for number, spec in enumerate(specs):
            alike.setdefault(spec.decoding, []).append(number)
        images: dict[int, np.ndarray] = {}
        for options, numbers in alike.items():
            made = preprocess_each(found.pixels(part, options), [specs[number] for number in numbers], sample.id)
            images.update(zip(numbers, made))
        return [images[number] for number in range(len(specs))], RowState(content)
    except DecodeError as error:
        return [], RowState(content, str(error))


def _open(
    inputs: Inputs, opened: OpenFiles, sample: Sample, specs: Sequence[PreprocessSpec], turn: Turn
) -> tuple[str, Opened | DecodeError]:
    """(content hash, the file or why it cannot be opened)."""
    try:
        return _open_checked(inputs, opened, sample, specs, turn)
    except DecodeError as error:  # a member of an archive that is damaged or cannot be used: no bytes to hash
        return NO_CONTENT, error


def _open_checked(
    inputs: Inputs, opened: OpenFiles, sample: Sample, specs: Sequence[PreprocessSpec], turn: Turn
) -> tuple[str, Opened | DecodeError]:
    path, size = sample.path, sample.size
    if sample.part:
        found = inputs.stat(path)
        _check_size(inputs, sample, found[0])
        part = parse_part(sample.part)
        if turn.is_open:
            turn.take(need_of_part(inputs, opened, path, size, part, specs))
        return opened.get(path, found, lambda: open_path(inputs, path, part))
    if turn.is_open and size > PEEK:
        turn.take(need_of_file(inputs, path, size, specs))
    data = inputs.read(path)
    _check_size(inputs, sample, inputs.size_of(path, data))
    if turn.is_open:
        turn.take(need_of_bytes(data, size, specs))
    content = inputs.hash_of(path, data)
    try:
        return content, open_bytes(data, inputs.beside(path))
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


def samples_of(manifest: Manifest, specs: Sequence[PreprocessSpec]) -> list[Sample]:
    """Where every row of a manifest lies, with its id where one of the preprocessings wants that."""
    columns = [manifest.column("path"), manifest.place("part"), manifest.column("size")]
    if any(spec.augment is not None for spec in specs):
        columns.append(manifest.column("id"))
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
    """Iterates over the batches of `work` in order while later ones are being decoded.

    `work` is asked for more only when there is room, so that what is done next can be decided late. Batches that are
    given together share what is read: an image is decoded once for all of them. Memory is bounded by `AHEAD` + 1
    batches, and `decode_bytes` for images being decoded (None: `decode_limit`). `stage`: files are copied to that
    folder and read from there.
    """

    def __init__(
        self,
        manifest: Manifest,
        specs: PreprocessSpec | Sequence[PreprocessSpec],
        work: Iterable[Work | Job],
        *,
        workers: int,
        worker_type: WorkerType = "thread",
        stage: Path | None = None,
        clock: Stage | None = None,
        decode_bytes: int | None = None,
    ):
        self.specs = (specs,) if isinstance(specs, PreprocessSpec) else tuple(specs)
        self.clock = clock or Stage("decode")
        self.clock.workers = workers
        self._work = work
        self._inputs = Inputs(manifest.root, stage=stage)
        self._opened = OpenFiles()
        self._samples = samples_of(manifest, self.specs)
        self.gate = Gate(decode_limit() if decode_bytes is None else decode_bytes)
        self._threads: ThreadPoolExecutor | None = None
        self._processes: "WorkerPool | None" = None
        if worker_type == "process":
            from featstore.extraction import workers as processes  # which imports this module

            self._processes = processes.WorkerPool(
                self._inputs, self.specs, workers=workers, clock=self.clock, gate=self.gate
            )
        else:
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def __exit__(self, *_: object) -> None:
        self.gate.close()
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
        waiting: deque[tuple[Job, list[_Image]]] = deque()
        upcoming = self._upcoming()
        ended = False
        while not ended or waiting:
            flush = ended
            while not flush and len(waiting) <= AHEAD:
                found: Any = next(upcoming, END)
                ended = found is END
                flush = ended or found is None  # who gives the work may take its time once all is given out here
                if not flush:
                    waiting.append(found)
            for _ in range(len(waiting) if flush else 1):
                yield self._batch(*waiting.popleft())

    def _upcoming(self) -> "Iterator[tuple[Job, list[_Image]] | None]":
        """Batches with their images on the way, and None where there is nothing for now."""
        for given in self._work:
            if given is None:
                yield None
                continue
            jobs = (given,) if isinstance(given, Job) else given
            kinds: dict[int, set[int]] = {}
            uses: Counter[int] = Counter()
            for job in jobs:
                uses.update(job.rows)
                for row in job.rows:
                    kinds.setdefault(row, set()).add(job.kind)
            images: dict[int, _Image] = {}
            for job in jobs:
                for row in set(job.rows):
                    if row not in images:
                        wanted = tuple(sorted(kinds[row]))
                        images[row] = _Image(self._submit(row, wanted), wanted, uses[row])
                yield job, [images[row] for row in job.rows]

    def _batch(self, job: Job, images: "list[_Image]") -> Batch:
        results = [image.get(job.kind) for image in images]
        return Batch(job, stack([image for image, _ in results], self.specs[job.kind]), [state for _, state in results])

    def _submit(self, row: int, kinds: tuple[int, ...]) -> "Future[Several]":
        if row == GONE:
            done: Future[Several] = Future()
            done.set_result(([], RowState(NO_CONTENT, LEFT)))
            return done
        if self._processes is not None:
            return self._processes.submit(self._samples[row], kinds)
        assert self._threads is not None
        return self._threads.submit(self._load, self._samples[row], kinds)

    def _load(self, sample: Sample, kinds: tuple[int, ...]) -> Several:
        started = time.perf_counter()
        found = load_images(self._inputs, self._opened, sample, [self.specs[kind] for kind in kinds], self.gate)
        self.clock.add(time.perf_counter() - started, 1)
        return found


@dataclass(slots=True)
class _Image:
    """One image on its way in the preprocessings `kinds`, let go when the last of `uses` has taken it."""

    future: "Future[Several] | None"
    kinds: tuple[int, ...]
    uses: int

    def get(self, kind: int) -> Loaded:
        """The image in one preprocessing, when it is there."""
        assert self.future is not None
        images, state = self.future.result()
        self.uses -= 1
        if not self.uses:
            self.future = None
        return (images[self.kinds.index(kind)] if images else None), state


def open_loader(
    manifest: Manifest,
    specs: PreprocessSpec | Sequence[PreprocessSpec],
    work: Iterable[Work | Job],
    run: RunConfig,
    *,
    workers: int | None = None,
    clock: Stage | None = None,
) -> Loader:
    """A loader that reads and decodes as a run is told to, by `workers` where that is given, else one per core."""
    count = workers or run.workers or find_ranks(run.rank, run.world).cores
    return Loader(manifest, specs, work, workers=count, worker_type=run.worker_type, stage=run.stage, clock=clock)
