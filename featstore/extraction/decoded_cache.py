"""The decoded cache: images as preprocessing leaves them, kept as a set of their own, so that nothing is decoded twice.

`<dataset>/decoded@<pixels>` holds `pixels` (C, H, W) in uint8, before mean and std, which models of one size may have
different. C is 1 as long as every image is grey; the first one in colour starts a set of three channels, which takes
over what the grey one holds. Rows, commits, checksums, failed rows and content hashes are those of any set.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from featstore.configs import RunConfig
from featstore.datasets.manifest import Manifest
from featstore.errors import ConfigError
from featstore.extraction.blocks import Blocks, progress_of, tally_of
from featstore.extraction.loader import AHEAD, GONE, NO_CONTENT, Batch, Images, Job, check_files, open_loader
from featstore.extraction.plan import Plan, committed_contents, existing_spec, missing_rows
from featstore.extraction.prepare import prepare_set
from featstore.images import PreprocessSpec
from featstore.objects import Place
from featstore.store import commits, ledger
from featstore.store.catalog import Store
from featstore.store.commits import Commit, RowState
from featstore.store.layout import DECODED, LEFT, ArraySpec, block_rows, make_spec, set_folder
from featstore.store.locks import writer_lock
from featstore.store.reader import ShardedArray

ARRAY = "pixels"
BATCH = 64  # images written at once
MAX_BLOCK = 4096  # rows of a block: what a kill costs is some minutes of decoding
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
        ConfigError: the preprocessing does not end in 8 bits.
    """
    if preprocess.quantise != "uint8":
        raise ConfigError(
            "--decoded-cache keeps 8-bit images, and this checkpoint's processor resizes floats; leave it out, or take "
            "another --geometry than hf"
        )
    colour = _cache(root, manifest, preprocess, 3)
    return colour if colour.exists else _cache(root, manifest, preprocess, 1)


def _cache(root: Place, manifest: Manifest, preprocess: PreprocessSpec, channels: int) -> Cache:
    pixels = {name: value for name, value in preprocess.as_dict().items() if name not in ("mean", "std")}
    if pixels["processor"] is not None:
        pixels["processor"] = {name: value for name, value in pixels["processor"].items() if name not in _NORMALISATION}
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
) -> tuple[Cache, list[str]]:
    """Decode what the cache lacks of a plan's data set, needed by the plan or not; returns it with lines to print.

    `advance(images, failed)` is called after each batch, `say(line)` before anything is decoded.

    Raises:
        ConfigError: the preprocessing does not end in 8 bits.
        FeatstoreError: too many failures, or files that changed.
    """
    root = plan.folder.parents[2]
    with writer_lock(root) as lock:

        def alive(images: int, failed: int) -> None:
            lock.renew()
            advance(images, failed)

        cache, decoded = find_cache(root, plan.manifest, plan.preprocess), 0
        notes: dict[str, None] = {}
        while len(lacking := cache.missing(retry_failed=run.retry_failed)):
            say(f"{plan.name}: decoding {len(lacking)} images")
            check_files(plan.manifest, lacking)
            filling = _Filling(root, cache, run)
            try:
                filling.fill(lacking, alive)
            except _Coloured:
                cache = _cache(root, plan.manifest, plan.preprocess, 3)
            decoded += filling.decoded
            notes.update(dict.fromkeys(filling.notes))
            commits.sweep_attempts(cache.folder, older_than=commits.STALE_SECONDS)
            if not filling.stopped:
                break
        if cache.exists and not cache.is_mapped:  # a manifest with nothing new
            cache.prepare()
        lines = [*notes, *_drop_gray(root, cache)]
    if decoded or len(plan.todo):
        lines.insert(
            0, f"{decoded} images decoded into {cache.name}{', from which all are read' * bool(len(plan.todo))}"
        )
    return cache, lines


def _drop_gray(root: Place, cache: Cache) -> list[str]:
    """Remove the grey cache once the coloured one has all that it holds; returns lines to print."""
    if cache.channels == 1 or not (gray := _cache(root, cache.manifest, cache.preprocess, 1)).exists:
        return []
    name = f"{gray.name}-{gray.spec['fingerprint'][:8]}"
    if not gray.contents() <= cache.contents():
        return [
            f"{name}: this grey cache stays, as it holds images that the one in colour lacks; "
            f"`featstore rm {name}` removes it"
        ]
    Store(root).remove(name)
    return []


class _Filling:
    """One pass that fills a cache; `stopped` when a coloured image came to a grey one."""

    def __init__(self, root: Place, cache: Cache, run: RunConfig):
        self.cache, self.run = cache, run
        self.decoded = 0
        self.stopped = False
        self.notes: list[str] = []
        self.gray = _cache(root, cache.manifest, cache.preprocess, 1) if cache.channels == 3 else None
        cache.prepare()
        self.blocks = Blocks(cache.folder, cache.manifest, [ARRAY], retry_failed=run.retry_failed)

    def fill(self, lacking: Int64[np.ndarray, " K"], advance: Callable[[int, int], None]) -> None:
        wanted = set((self.blocks.row_index[lacking] // self.blocks.rows_per_block).tolist())
        for groups, jobs in self.blocks.jobs(BATCH, only=wanted).items():
            tally = tally_of(jobs, self.run)

            def after(batch: Batch, tally: Any = tally) -> None:
                tally.add(batch)
                advance(*progress_of(batch))

            self.blocks.write(groups, self._batches(jobs), self._rows, after)

    def _rows(self, batch: Batch, arrays: list[ArraySpec]) -> dict[str, np.ndarray]:
        rows = batch.pixels
        if rows.shape[1] > self.cache.channels:
            self.stopped = True
            raise _Coloured
        return {ARRAY: np.ascontiguousarray(np.broadcast_to(rows, (len(rows), *self.cache.array.row_shape)))}

    def _batches(self, jobs: list[Job]) -> Iterator[Batch]:
        """From a grey cache where that has all of a batch, else decoded; in the order of the jobs."""
        with ExitStack() as stack:
            held: Images | None = None
            ready: set[int] = set()
            if self.gray is not None and self.gray.exists and not self.run.retry_failed:
                rows = np.array(sorted({row for job in jobs for row in job.rows} - {GONE}), np.int64)
                ready = {*rows.tolist(), GONE} - set(self.gray.missing(retry_failed=False).tolist())
                kept = [job for job in jobs if ready.issuperset(job.rows) and any(row != GONE for row in job.rows)]
                ready = {id(job) for job in kept}
                held = stack.enter_context(CachedImages(self.gray, kept)) if kept else None
            loader = stack.enter_context(
                open_loader(
                    self.cache.manifest,
                    self.cache.preprocess,
                    [job for job in jobs if id(job) not in ready],
                    self.run,
                )
            )
            from_gray, decoded = iter(held or ()), iter(loader)
            try:
                for job in jobs:
                    batch = next(from_gray if id(job) in ready else decoded)
                    if id(job) not in ready:
                        self.decoded += progress_of(batch)[0]
                    yield batch
            finally:
                self.notes += loader.notes


class CachedImages(Images):
    """Batches of `jobs` as `Loader` gives them, read from a cache that is complete for them; checksums are verified."""

    def __init__(self, cache: Cache, jobs: list[Job]):
        self.jobs = jobs
        self._cache = cache
        self._size = int(cache.spec["layout"]["block_rows"])
        self._row_index = cache.row_index()  # a grey one that is taken over need not have been told of the manifest
        rows = np.array(sorted({row for job in jobs for row in job.rows} - {GONE}), np.int64)
        blocks = np.unique(self._row_index[rows] // self._size).tolist()
        group = ledger.read_ledger(cache.folder).group_of(ARRAY)
        self._commits: dict[int, Commit] = commits.read_commits(cache.folder, group, blocks)
        self._stored = ShardedArray(cache.folder / "data.zarr" / ARRAY)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="decoded")

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._stored.close()

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[Future[Batch]] = deque()
        upcoming = iter(self.jobs)
        while True:
            while len(waiting) <= AHEAD and (job := next(upcoming, None)) is not None:
                waiting.append(self._pool.submit(self._read, job))
            if not waiting:
                return
            yield waiting.popleft().result()

    def _read(self, job: Job) -> Batch:
        states = [self._state(row) for row in job.rows]
        good = [slot for slot, state in enumerate(states) if state.reason is None]
        pixels: UInt8[np.ndarray, "B C H W"] = np.zeros((len(states), *self._cache.array.row_shape), np.uint8)
        if good:
            rows = self._row_index[[job.rows[slot] for slot in good]]
            if len(good) == len(states):
                self._stored.gather(rows, out=pixels, verify=True)
            else:
                pixels[good] = self._stored.gather(rows, verify=True)
        return Batch(job, pixels, states)

    def _state(self, row: int) -> RowState:
        if row == GONE:
            return RowState(NO_CONTENT, LEFT)
        held = int(self._row_index[row])
        commit = self._commits[held // self._size]
        return RowState(commit.content(held), commit.failed.get(held))
