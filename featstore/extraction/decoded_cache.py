"""The decoded cache: images as preprocessing leaves them, kept as a set of their own, so that nothing is decoded twice.

`<dataset>/decoded@<pixels>` holds `pixels` (C, H, W) in uint8, before mean and std, which models of one size may have
different. C is 1 as long as every image is grey; the first one in colour starts a set of three channels, which takes
over what the grey one holds. Rows, commits, checksums, failed rows and content hashes are those of any set.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from featstore.configs import RunConfig
from featstore.datasets.manifest import Manifest
from featstore.errors import ConfigError, FeatstoreError, StoreError
from featstore.extraction.blocks import Blocks, Writing, check_failures, progress_of, tally_of
from featstore.extraction.claims import CLAIMS, Claims
from featstore.extraction.loader import (
    AHEAD,
    END,
    GONE,
    NO_CONTENT,
    Batch,
    Images,
    Job,
    Work,
    check_files,
    open_loader,
)
from featstore.extraction.plan import Plan, committed_contents, existing_spec, missing_rows
from featstore.extraction.prepare import prepare_set
from featstore.extraction.sharing import Sharing
from featstore.extraction.stopping import Stop
from featstore.images import PreprocessSpec
from featstore.objects import Place
from featstore.store import commits, ledger
from featstore.store.catalog import Store
from featstore.store.commits import Commit, RowState
from featstore.store.decisions import marker_path
from featstore.store.layout import DECODED, LEFT, ArraySpec, block_rows, make_spec, set_folder
from featstore.store.locks import writer_lock
from featstore.store.reader import ShardedArray

ARRAY = "pixels"
BATCH = 64  # images written at once
MAX_BLOCK = 4096  # rows of a block: what a kill costs is some minutes of decoding
BACK_SECONDS = 60.0  # for which a block that another process has taken back, to decode it again, is waited for
LOOK = 0.05  # seconds between two looks whether it is there again
_NORMALISATION = ("image_mean", "image_std")  # of a processor: not in the pixels that are kept


@dataclass(frozen=True)
class Cache:
    """The decoded set of a data set for one kind of pixels, on disk or still to be made."""

    manifest: Manifest
    preprocess: PreprocessSpec
    channels: int
    spec: dict[str, Any]
    folder: Place

    @property
    def name(self) -> str:
        """`dataset/decoded@pixels`."""
        return f"{self.manifest.name}/{self.spec['model']}@{self.spec['resolution']}"

    @property
    def array(self) -> ArraySpec:
        return ArraySpec(
            name=ARRAY, row_shape=(self.channels, self.preprocess.height, self.preprocess.width), dtype="uint8"
        )

    @property
    def exists(self) -> bool:
        return (self.folder / "spec.json").is_file()

    @property
    def is_mapped(self) -> bool:
        """Whether it has written down where every sample of the manifest stands in it."""
        return ledger.rows_path(self.folder, self.manifest.short).is_file()

    def row_index(self) -> Int64[np.ndarray, " N"]:
        """Its row of every sample of the manifest, -1 where it has none; written down or not."""
        if self.is_mapped:
            return ledger.read_rows(self.folder, self.manifest.short)
        return ledger.preview_rows(self.folder, self.manifest, lambda: committed_contents(self.folder))

    def missing(self, *, retry_failed: bool) -> Int64[np.ndarray, " M"]:
        """Manifest rows that are not decoded yet."""
        return missing_rows(self.folder, self.manifest, [self.array], self.spec, retry_failed=retry_failed)[ARRAY]

    def new_bytes(self, *, retry_failed: bool) -> int:
        """Bytes that the missing rows will take; at most, where there is no cache yet: images may be in colour."""
        channels = self.channels if self.exists else 3
        size = channels * self.preprocess.height * self.preprocess.width
        return len(self.missing(retry_failed=retry_failed)) * size

    def prepare(self) -> None:
        """Create it on disk, with rows for the manifest; of one that knows all samples only the mapping is written."""
        prepare_set(self.folder, self.spec, [self.array], self.manifest)

    def contents(self) -> set[tuple[str, str]]:
        """(sample, content hash) of every image that is committed, whatever manifest it belongs to."""
        held = committed_contents(self.folder)
        found: set[tuple[str, str]] = set()
        for path in sorted((self.folder / "rows").glob("*.parquet")):
            samples, _, rows = ledger.read_mapping(path)
            found.update((sample, held[row]) for sample, row in zip(samples, rows.tolist()) if row in held)
        return {item for item in found if item[1] != NO_CONTENT}


def find_cache(root: Place, manifest: Manifest, preprocess: PreprocessSpec) -> Cache:
    """The cache for these pixels: of three channels where one was begun, else of one.

    Raises:
        ConfigError: the preprocessing does not end in 8 bits, or makes augmented copies.
    """
    if preprocess.augment is not None:
        raise ConfigError(
            "--decoded-cache keeps images as the plain set has them, and augmented views are made of the source, all "
            "in one pass that decodes it once; leave --decoded-cache out"
        )
    if preprocess.quantise != "uint8":
        raise ConfigError(
            "--decoded-cache keeps 8-bit images, and this checkpoint's processor resizes floats; leave it out, or take "
            "another --geometry than hf"
        )
    colour = _cache(root, manifest, preprocess, 3)
    return colour if colour.exists else _cache(root, manifest, preprocess, 1)


def pixels_of(preprocess: PreprocessSpec) -> dict[str, Any]:
    """What of a preprocessing makes the pixels before mean and std, which are applied on the device."""
    pixels = {name: value for name, value in preprocess.as_dict().items() if name not in ("mean", "std")}
    if pixels["processor"] is not None:
        pixels["processor"] = {name: value for name, value in pixels["processor"].items() if name not in _NORMALISATION}
    return pixels


def _cache(root: Place, manifest: Manifest, preprocess: PreprocessSpec, channels: int) -> Cache:
    pixels = pixels_of(preprocess)
    height, width = preprocess.height, preprocess.width
    spec = make_spec(
        dataset=manifest.name,
        model=DECODED,
        resolution=f"{height}" if height == width else f"{height}x{width}",
        identity={"preprocess": pixels, "channels": channels, "stored_dtype": "uint8"},
        rows_per_block=min(MAX_BLOCK, block_rows(0.0, channels * height * width)),
        weights={"kind": DECODED},
        random=False,
    )
    folder = set_folder(root, spec)
    return Cache(manifest, preprocess, channels, existing_spec(folder, spec, None), folder)


class _Coloured(Exception):
    """An image in colour came to a cache of one channel."""


def fill_cache(
    plan: Plan,
    run: RunConfig,
    *,
    advance: Callable[[int, int], None] = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
    stop: Stop | None = None,
) -> tuple[Cache, list[str]]:
    """Decode what the cache lacks of a plan's data set, needed by the plan or not; returns it with lines to print.

    `advance(images, failed)` is called after each batch, `say(line)` before anything is decoded. Several processes
    share the work, whatever `run.take_over` says, and none returns before the cache is complete: each reads all kinds
    of blocks from it. With `run.retry_failed` every block with failed images has been decoded again since the call.

    Raises:
        ConfigError: the preprocessing does not end in 8 bits.
        FeatstoreError: too many failures, or files that changed.
    """
    root = plan.folder.parents[2]
    with writer_lock(root) as lock:

        def alive(images: int, failed: int) -> None:
            lock.renew()
            advance(images, failed)

        cache, retry = find_cache(root, plan.manifest, plan.preprocess), run.retry_failed
        gray = _cache(root, plan.manifest, plan.preprocess, 1)
        fillings: list[_Filling] = []
        while stop is None or not stop.asked:
            uses_gray = cache.channels == 1 or gray.exists
            try:
                lacking = cache.missing(retry_failed=retry)
                if not len(lacking):
                    break
                say(f"{plan.name}: decoding {len(lacking)} images")
                check_files(plan.manifest, lacking)
                fillings.append(_Filling(cache, gray, replace(run, retry_failed=retry)))
                fillings[-1].fill(lacking, alive, stop)
                # Others may have taken blocks back since, or begun a cache in colour.
                cache, retry = find_cache(root, plan.manifest, plan.preprocess), False
            except _Coloured:
                cache = _cache(root, plan.manifest, plan.preprocess, 3)
            except OSError:
                found = find_cache(root, plan.manifest, plan.preprocess)
                if not uses_gray or gray.exists or found.channels == 1:
                    raise
                cache = found  # complete, so that another process took the grey one away that this one was at
            commits.sweep_attempts(cache.folder, older_than=commits.STALE_SECONDS)
        if cache.exists and not cache.is_mapped:  # a manifest with nothing new
            cache.prepare()
        notes = dict.fromkeys(note for filling in fillings for note in filling.notes)
        decoded = sum(filling.decoded for filling in fillings)
        lines = [*notes, *_drop_gray(root, cache, gray, run.patience)]
    if decoded or len(plan.todo):
        lines.insert(
            0, f"{decoded} images decoded into {cache.name}{', from which all are read' * bool(len(plan.todo))}"
        )
    return cache, lines


def _drop_gray(root: Place, cache: Cache, gray: Cache, patience: float) -> list[str]:
    """Remove the grey cache once the coloured one has all that it holds; returns lines to print.

    Where others are still at one of the two it stays for now: the last of them removes it.
    """
    if cache.channels == 1 or not gray.exists or any(_is_claimed(folder, patience) for folder in (cache, gray)):
        return []
    name = f"{gray.name}-{gray.spec['fingerprint'][:8]}"
    try:
        if not gray.contents() <= cache.contents():
            return [
                f"{name}: this grey cache stays, as it holds images that the one in colour lacks; "
                f"`featstore rm {name}` removes it"
            ]
        Store(root).remove(name)
    except (OSError, FeatstoreError):
        if gray.exists:
            raise
    return []  # gone; if that failed, then because another process was faster


def _is_claimed(cache: Cache, patience: float) -> bool:
    """Whether a living process is at a block of a cache."""
    claims = Claims(cache.folder / CLAIMS, patience=patience)
    now = claims.now()
    return any(not claim.is_over(now, patience) for held in claims.survey().values() for claim in held)


class _Again:
    """The blocks that are to be decoded again although they are committed: which have been since, by whomever.

    That is told by another marker in the place of the one that was there. A block whose images fail again keeps its
    marker: then every process decodes it for itself.
    """

    def __init__(self, folder: Place, units: dict[int, tuple[str, ...]]):
        self._folder, self._units = folder, units
        self._before = {block: self._markers(block) for block in units}
        self._own: set[int] = set()

    def add(self, block: int) -> None:
        """This process has committed one."""
        self._own.add(block)

    def __contains__(self, block: int) -> bool:
        return block in self._own or all(
            now not in (None, before) for now, before in zip(self._markers(block), self._before[block])
        )

    def _markers(self, block: int) -> list[tuple[Any, ...] | None]:
        found: list[tuple[Any, ...] | None] = []
        for group in self._units[block]:
            try:
                facts: Any = marker_path(self._folder, group, block).stat()
                found.append((facts.st_mtime, *(getattr(facts, name, None) for name in ("st_ino", "e_tag"))))
            except FileNotFoundError:
                found.append(None)
        return found


class _Filling:
    """One pass that fills a cache, shared with other processes."""

    def __init__(self, cache: Cache, gray: Cache, run: RunConfig):
        self.cache, self.run = cache, run
        self.decoded = 0
        self.notes: list[str] = []
        self.gray = gray if cache.channels == 3 else None
        cache.prepare()
        self.blocks = Blocks(cache.folder, cache.manifest, [ARRAY], retry_failed=run.retry_failed)

    def fill(self, lacking: Int64[np.ndarray, " K"], advance: Callable[[int, int], None], stop: Stop | None) -> None:
        wanted = set((self.blocks.row_index[lacking] // self.blocks.rows_per_block).tolist())
        units = {block: groups for block, groups in self.blocks.lacking().items() if block in wanted}
        tally = tally_of(self.blocks, units, self.run)
        again = _Again(self.cache.folder, units) if self.run.retry_failed else None

        def jobs(block: int) -> list[Job]:
            if again is not None and block in again:
                return []
            still = self.blocks.still_lacking(block, units[block])
            return self.blocks.cut(block, still, BATCH) if still else []

        def left() -> list[int]:
            if again is not None:
                return [block for block in units if block not in again]
            done = self.blocks.committed()
            return [block for block, groups in units.items() if any(block not in done[group] for group in groups)]

        def committed(block: int) -> None:
            if again is not None:
                again.add(block)
            sharing.committed(block)

        # Every process needs all of it: none may end while blocks are left, and `again` knows which were tried again.
        shared = replace(self.run, take_over=True, retry_failed=False)
        with (
            Sharing(self.cache.folder, list(units), left, jobs, shared, stop) as sharing,
            Writing(self.blocks, committed=committed) as writing,
            closing(self._batches(sharing)) as batches,
        ):
            for batch in batches:
                if stop is not None and stop.asked:
                    break
                writing.add(batch, self._rows(batch))
                tally.add(batch)
                advance(*progress_of(batch))
        if not left():
            check_failures(self.blocks, tally)

    def _rows(self, batch: Batch) -> dict[str, np.ndarray]:
        rows = batch.pixels
        if rows.shape[1] > self.cache.channels:
            raise _Coloured
        return {ARRAY: np.ascontiguousarray(np.broadcast_to(rows, (len(rows), *self.cache.array.row_shape)))}

    def _batches(self, work: Iterable[list[Job] | None]) -> Generator[Batch]:
        """From a grey cache where that has all of a batch, else decoded; in the order of the jobs."""
        held: set[int] = set()
        if self.gray is not None and self.gray.exists and not self.run.retry_failed:
            held = {*range(len(self.cache.manifest)), GONE} - set(self.gray.missing(retry_failed=False).tolist())
        given: deque[Job | None] = deque()  # those of the grey cache, None for one that is decoded

        def through_loader() -> Iterator[Work | Job]:
            for jobs in work:
                for job in jobs or ():
                    is_held = held.issuperset(job.rows) and any(row != GONE for row in job.rows)
                    given.append(job if is_held else None)
                    # Its place among the others is kept by a row that is not decoded, so that nothing is held back.
                    yield replace(job, rows=(GONE,)) if is_held else job
                yield None  # give out what there is before more is asked for

        with ExitStack() as stack:
            gray = CachedImages([self.gray], ()) if self.gray is not None and held else None
            if gray is not None:
                stack.enter_context(gray)
            loader = stack.enter_context(
                open_loader(self.cache.manifest, self.cache.preprocess, through_loader(), self.run)
            )
            try:
                for batch in loader:
                    job = given.popleft()
                    if job is not None and gray is not None:
                        yield gray.read(job)
                    else:
                        self.decoded += progress_of(batch)[0]
                        yield batch
            finally:
                self.notes += loader.notes


class CachedImages(Images):
    """Batches of `work` as `Loader` gives them, read from caches that are complete for them, one a preprocessing.

    Checksums are verified.
    """

    def __init__(self, caches: Sequence[Cache], work: Iterable[Work | Job]):
        self._work = work
        self._cached = [_Cached(cache) for cache in caches]
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="decoded")

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for cached in self._cached:
            cached.stored.close()

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[Future[Batch]] = deque()
        upcoming = self._upcoming()
        ended = False
        while not ended or waiting:
            flush = ended
            while not flush and len(waiting) <= AHEAD:
                found: Any = next(upcoming, END)
                ended = found is END
                flush = ended or found is None
                if not flush:
                    waiting.append(self._pool.submit(self.read, found))
            for _ in range(len(waiting) if flush else 1):
                yield waiting.popleft().result()

    def _upcoming(self) -> Iterator[Job | None]:
        for given in self._work:
            if given is None or isinstance(given, Job):
                yield given
            else:
                yield from given

    def read(self, job: Job) -> Batch:
        """One batch."""
        cached = self._cached[job.kind]
        states = [cached.state(row) for row in job.rows]
        good = [slot for slot, state in enumerate(states) if state.reason is None]
        pixels: UInt8[np.ndarray, "B C H W"] = np.zeros((len(states), *cached.cache.array.row_shape), np.uint8)
        if good:
            rows = cached.row_index[[job.rows[slot] for slot in good]]
            if len(good) == len(states):
                cached.stored.gather(rows, out=pixels, verify=True)
            else:
                pixels[good] = cached.stored.gather(rows, verify=True)
        return Batch(job, pixels, states)


class _Cached:
    """A cache that is read; markers are read when a block is first wanted."""

    def __init__(self, cache: Cache):
        self.cache = cache
        self.row_index = cache.row_index()  # a grey one that is taken over need not have been told of the manifest
        self.stored = ShardedArray(cache.folder / "data.zarr" / ARRAY)
        self._size = int(cache.spec["layout"]["block_rows"])
        self._group = ledger.read_ledger(cache.folder).group_of(ARRAY)
        self._commits: dict[int, Commit] = {}

    def state(self, row: int) -> RowState:
        """What became of a row of the manifest."""
        if row == GONE:
            return RowState(NO_CONTENT, LEFT)
        held = int(self.row_index[row])
        block = held // self._size
        if block not in self._commits:
            self._commits[block] = self._read(block)
        commit = self._commits[block]
        return RowState(commit.content(held), commit.failed.get(held))

    def _read(self, block: int) -> Commit:
        """Its marker, which is away for a moment where another process tries failed images again."""
        end = time.monotonic() + BACK_SECONDS
        while True:
            try:
                return commits.read_commit(self.cache.folder, self._group, block)
            except FileNotFoundError as error:
                if not self.cache.exists:
                    raise StoreError(
                        f"{self.cache.folder}: removed while it was read; run the same command again"
                    ) from error
                if time.monotonic() >= end:
                    raise StoreError(
                        f"{self.cache.name}: block {block} was taken back, to be decoded again, and is not there after "
                        f"{BACK_SECONDS:g} s; run the same command again"
                    ) from error
            time.sleep(LOOK)
