"""Embeddings for torch: a whole set as one tensor, a data set for its DataLoader, a loader that reads ahead.

Rows go from the page cache into the tensor's memory with nothing in between. Needs torch, so nothing light imports it.
"""

import copy
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch.utils.data import Dataset

from featstore.errors import ConfigError, DeviceError, IncompleteError
from featstore.store.features import FeatureSet, RowArray, token_mean

DEFAULT_FEATURES = "cls+mean_patch"
TOKEN_MEAN = "mean_all"
PIECE_BYTES = 16 * 2**20  # held beside the result of a load whose rows are scattered or joined of several arrays

Shuffle = Literal[True, False, "block"]
Rows = np.ndarray | Sequence[int] | Sequence[bool]


def as_numpy(
    source: FeatureSet | RowArray, features: str | None = None, *, verify: bool = False
) -> Shaped[np.ndarray, "N ..."]:
    """All rows in manifest order, as `FeatureSet.load`, with at most 16 MiB beside the result; failed rows are NaN.

    Args:
        features: of a set: array names joined by '+', or `mean_all`; default `cls+mean_patch`.

    Raises:
        IncompleteError: rows are not extracted yet.
        ConfigError: features asked of a single array.
    """
    if _name(source, features) == TOKEN_MEAN:
        assert isinstance(source, FeatureSet)
        return source.load(TOKEN_MEAN, verify=verify)
    parts = _parts(source, features)
    out = np.empty((len(parts[0]), *_joined_shape(parts)), _joined_dtype(parts))
    _fill(parts, out, verify)
    return out


def as_torch(
    source: FeatureSet | RowArray,
    features: str | None = None,
    *,
    device: torch.device | str | None = None,
    pin: bool = False,
    verify: bool = False,
) -> torch.Tensor:
    """All rows as one tensor, read straight into its memory; arguments and errors as in `as_numpy`.

    Args:
        device: where the tensor goes; host memory holds it once on the way.
        pin: page-locked host memory, from which copies to a GPU run beside other work.

    Raises:
        DeviceError: `pin` without a CUDA device.
    """
    if pin and not torch.cuda.is_available():
        raise DeviceError("page-locked memory needs a CUDA device and there is none; drop pin=True")
    if _name(source, features) == TOKEN_MEAN:
        tensor = _tensor(as_numpy(source, features, verify=verify))
        tensor = tensor.pin_memory() if pin else tensor
    else:
        parts = _parts(source, features)
        shape = (len(parts[0]), *_joined_shape(parts))
        tensor = torch.empty(shape, dtype=_torch_dtype(_joined_dtype(parts)), pin_memory=pin)
        _fill(parts, _numpy(tensor, _joined_dtype(parts)), verify)
    return tensor if device is None else tensor.to(device, non_blocking=pin)


def _name(source: FeatureSet | RowArray, features: str | None) -> str:
    if isinstance(source, RowArray):
        if features is not None:
            raise ConfigError(
                f"features are chosen of a set, and {source.name} is one array; drop features={features!r}"
            )
        return source.name
    return features or DEFAULT_FEATURES


def _parts(source: FeatureSet | RowArray, features: str | None) -> list[RowArray]:
    """The arrays behind the features, all rows committed."""
    name = _name(source, features)
    parts = [source] if isinstance(source, RowArray) else [source.array(part) for part in source.parts(name)]
    for part in parts:
        _require_committed(part.name, part.pending)
    return parts


def _require_committed(name: str, pending: np.ndarray) -> None:
    missing = int(np.count_nonzero(pending))
    if missing:
        raise IncompleteError(
            f"{name}: {missing} of the rows asked for are not extracted yet; run the same `featstore extract` again, "
            "or pick rows with `fs.ok`"
        )


def _joined_shape(parts: Sequence[RowArray]) -> tuple[int, ...]:
    """Shape of a row: the array's own, or the flattened arrays one behind the other."""
    shapes = [part.shape[1:] for part in parts]
    return shapes[0] if len(shapes) == 1 else (sum(int(np.prod(shape)) for shape in shapes),)


def _joined_dtype(parts: Sequence[RowArray]) -> np.dtype[Any]:
    return np.result_type(*(part.dtype for part in parts))


def _fill(parts: list[RowArray], out: np.ndarray, verify: bool) -> None:
    """All rows of the parts, side by side; whole where the array lies on disk as it is asked for, else in pieces."""
    count = len(out)
    rows = parts[0].rows
    # Rows of a set that never grew stand in manifest order.
    in_order = count > 0 and np.array_equal(rows, np.arange(rows[0], rows[0] + count))
    if len(parts) == 1 and in_order and _is_as_stored(parts[0]):
        parts[0].array.read(int(rows[0]), int(rows[0]) + count, out, verify)
        return
    step = max(1, PIECE_BYTES // max(1, out[:1].nbytes))
    for first in range(0, count, step):
        _gather(parts, np.arange(first, min(first + step, count)), out[first : first + step], verify)


def _gather(
    parts: Sequence[RowArray], positions: Int64[np.ndarray, " B"], out: np.ndarray | None = None, verify: bool = False
) -> np.ndarray:
    """Rows of the parts, side by side; into `out` if it is given."""
    if len(parts) == 1 and _is_as_stored(parts[0]):
        return parts[0].array.gather(parts[0].rows[positions], out, verify)
    if out is None:
        out = np.empty((len(positions), *_joined_shape(parts)), _joined_dtype(parts))
    flat = out.reshape(len(positions), int(np.prod(out.shape[1:])))
    column = 0
    for part in parts:
        values = part.decode(part.array.gather(part.rows[positions], verify=verify), positions)
        width = int(np.prod(part.shape[1:]))
        flat[:, column : column + width] = values.reshape(len(positions), width)
        column += width
    return out


def _is_as_stored(part: RowArray) -> bool:
    """Whether rows are used as they lie on disk, not decoded from integers."""
    return bool(part.dtype == part.array.dtype)


def _take(part: RowArray, positions: Int64[np.ndarray, " B"]) -> RowArray:
    """The same array for some of its rows."""
    failed = None if part.failed is None else part.failed[positions]
    return replace(part, rows=part.rows[positions], pending=part.pending[positions], failed=failed)


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.bfloat16 if dtype.name == "bfloat16" else torch.from_numpy(np.empty(0, dtype)).dtype


def _tensor(values: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor; torch and numpy's bfloat16 know each other by their bits only."""
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _numpy(tensor: torch.Tensor, dtype: np.dtype[Any]) -> np.ndarray:
    """The same memory as a numpy array of `dtype`."""
    return tensor.view(torch.int16).numpy().view(dtype) if tensor.dtype == torch.bfloat16 else tensor.numpy()


class Samples(list[Any]):
    """Samples of one batch, as views of the tensors in `batch`, which `collate` takes as they are."""

    batch: tuple[torch.Tensor, ...]


def collate(samples: list[Any]) -> tuple[torch.Tensor, ...]:
    """For `DataLoader(collate_fn=collate)`: the batch as it was gathered; torch's own collation copies every row."""
    if isinstance(samples, Samples):
        return samples.batch
    return tuple(torch.stack(values) for values in zip(*samples, strict=True))


class FeatureDataset(Dataset[tuple[torch.Tensor, ...]]):
    """Rows of a set for torch: sample i is (features, index) or, with labels, (features, label, index).

    `index` is the manifest row. Features have shape (sum of D,), or the array's own row shape if there is one array.
    A batch is one gather, from disk, so sets may be larger than memory. Pickled or forked, every process opens the
    files anew.

    Args:
        fs: the set.
        features: array names joined by '+', such as `cls+mean_patch` or `patches`, or `mean_all`.
        rows: manifest rows (any order, duplicates, negative) or a mask over the manifest; default: those that are ok.
        labels: (N,) or (N, L) numbers aligned to the manifest.

    Raises:
        IncompleteError: rows given are not extracted yet.
        ConfigError: rows given failed, or labels do not fit.
        IndexError: rows given are out of range.
        UnknownNameError: the set lacks an array.
    """

    def __init__(
        self,
        fs: FeatureSet,
        features: str = DEFAULT_FEATURES,
        rows: Rows | None = None,
        labels: np.ndarray | torch.Tensor | Sequence[Any] | None = None,
    ) -> None:
        parts = [fs.array(name) for name in fs.parts(features)]
        self.name, self.features = fs.name, features
        self.index: Int64[np.ndarray, " N"] = np.flatnonzero(fs.ok) if rows is None else _manifest_rows(rows, len(fs))
        for part in parts:
            _require_committed(part.name, part.pending[self.index])
        failed = np.isin(self.index, list(fs.failures)) if rows is not None else np.zeros(1, bool)
        if failed.any():
            raise ConfigError(
                f"{fs.name}: {int(failed.sum())} of the rows asked for failed and hold no features, the first is row "
                f"{int(self.index[failed][0])}; leave them out with `fs.ok`"
            )
        self.stored: Int64[np.ndarray, " N"] = parts[0].rows[self.index]
        self.labels = None if labels is None else _aligned(labels, len(fs))[torch.from_numpy(self.index)]
        self._parts = [replace(_take(part, self.index), rows=self.stored) for part in parts]  # one copy of the rows
        self._process = os.getpid()
        is_mean = features == TOKEN_MEAN
        self.row_shape = parts[0].shape[-1:] if is_mean else _joined_shape(parts)
        self._numpy_dtype = np.dtype(np.float32) if is_mean else _joined_dtype(parts)
        self.dtype = _torch_dtype(self._numpy_dtype)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, ...]:
        if not -len(self) <= position < len(self):
            raise IndexError(f"sample {position} is out of range for {len(self)} samples of {self.name}")
        return tuple(values[0] for values in self.batch(np.array([position % len(self)])))

    def __getitems__(self, positions: Sequence[int]) -> Samples:
        """What torch's DataLoader asks for: the samples of a batch, by one gather."""
        batch = self.batch(np.asarray(positions, np.int64))
        samples = Samples(zip(*(values.unbind() for values in batch), strict=True))
        samples.batch = batch
        return samples

    def batch(self, positions: Int64[np.ndarray, " B"], *, pin: bool = False) -> tuple[torch.Tensor, ...]:
        """Samples by position in [0, len), as one tensor each; `pin` puts them into page-locked memory."""
        features = self._features(positions, pin)
        index = torch.from_numpy(self.index[positions])
        chosen = [index] if self.labels is None else [self.labels[torch.from_numpy(positions)], index]
        return (features, *(values.pin_memory() if pin else values for values in chosen))

    def prefetch(self, positions: Int64[np.ndarray, " B"]) -> None:
        """Ask the system to read these samples, without waiting; nothing happens where rows are not mapped."""
        for part in self._opened():
            part.array.prefetch(part.rows[positions])

    def _features(self, positions: Int64[np.ndarray, " B"], pin: bool) -> torch.Tensor:
        parts = self._opened()
        if self.features == TOKEN_MEAN:
            tensor = _tensor(token_mean([_take(part, positions) for part in parts], False))
            return tensor.pin_memory() if pin else tensor
        if not pin:
            return _tensor(_gather(parts, positions))
        tensor = torch.empty((len(positions), *self.row_shape), dtype=self.dtype, pin_memory=True)
        _gather(parts, positions, _numpy(tensor, self._numpy_dtype))
        return tensor

    def _opened(self) -> list[RowArray]:
        """The arrays, opened in this process: a fork may have taken a lock along that another thread held."""
        if self._process != os.getpid():
            self._parts = [replace(part, array=copy.copy(part.array)) for part in self._parts]
            self._process = os.getpid()
        return self._parts


def _manifest_rows(rows: Rows, count: int) -> Int64[np.ndarray, " N"]:
    array = np.asarray(rows)
    if array.dtype == np.bool_ and array.shape == (count,):
        return np.flatnonzero(array)
    if not array.size:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConfigError(
            f"rows are a list of manifest rows or a mask of shape ({count},), got {array.dtype} of shape {array.shape}"
        )
    numbers = array.astype(np.int64)
    wrong = (numbers < -count) | (numbers >= count)
    if wrong.any():
        raise IndexError(f"row {int(numbers[wrong][0])} is out of range for a manifest of {count} samples")
    return np.where(numbers < 0, numbers + count, numbers)


def _aligned(labels: np.ndarray | torch.Tensor | Sequence[Any], count: int) -> torch.Tensor:
    values = labels if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if values.ndim < 1 or len(values) != count:
        raise ConfigError(f"labels have one entry for each of the {count} samples of the manifest, got {values.shape}")
    if isinstance(values, torch.Tensor):
        return values.cpu()
    if values.dtype.kind not in "biuf":
        raise ConfigError(f"labels are numbers, got {values.dtype}; encode them first, for example with np.unique")
    return torch.from_numpy(np.ascontiguousarray(values))


class FeatureLoader:
    """Batches of a `FeatureDataset`, gathered ahead by one thread: (features, index) or (features, labels, index).

    Every sample comes once an epoch, in an order that depends on seed and epoch only. With `world` processes each
    gets len // world samples and none gets another's; up to world - 1 samples are left out of an epoch.

    Args:
        shuffle: True draws from all samples; "block" from a pool of `buffer` blocks of `block` stored rows each, so
            that a block is read at once, which pays on disks and networks that seek slowly; False keeps the order.
        buffer: below 64 blocks, rows that are stored class by class give batches of few classes.
        prefetch: batches held ready, 1 or more.
        device: where batches go; to a GPU they travel through page-locked memory while it works.

    Raises:
        ConfigError: an argument cannot be used.
    """

    def __init__(
        self,
        dataset: FeatureDataset,
        batch_size: int,
        *,
        shuffle: Shuffle = True,
        block: int = 16,
        buffer: int = 64,
        seed: int = 0,
        drop_last: bool = False,
        prefetch: int = 2,
        device: torch.device | str | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        least = {"batch_size": (batch_size, 1), "block": (block, 1), "buffer": (buffer, 1), "prefetch": (prefetch, 1)}
        for name, (given, low) in {**least, "seed": (seed, 0), "world": (world, 1)}.items():
            if given < low:
                raise ConfigError(f"{name} must be at least {low}, got {given}")
        _check_shuffle(shuffle)
        if not 0 <= rank < world:
            raise ConfigError(f"rank must be from 0 to world - 1 = {world - 1}, got {rank}")
        if world > max(1, len(dataset)):
            raise ConfigError(f"{len(dataset)} samples cannot be shared by {world} processes; lower world")
        self.dataset, self.batch_size, self.drop_last = dataset, batch_size, drop_last
        self.shuffle, self.block, self.buffer, self.seed = shuffle, block, buffer, seed
        self.prefetch, self.rank, self.world = prefetch, rank, world
        self.device = None if device is None else torch.device(device)
        self._pin = self.device is not None and self.device.type == "cuda"
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass; without it passes count from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        share = len(self.dataset) // self.world
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        order = self.order(self._epoch)
        self._epoch += 1
        return self._run([order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)])

    def order(self, epoch: int) -> Int64[np.ndarray, " M"]:
        """Positions in the data set that this rank visits in an epoch, in order."""
        count, share = len(self.dataset), len(self.dataset) // self.world
        generator = np.random.default_rng([self.seed, epoch])
        if self.shuffle == "block":
            # The permuted blocks are cut into one stretch for each rank.
            blocks = generator.permutation(-(-count // self.block))
            rows = (blocks[:, None] * self.block + np.arange(self.block)).ravel()
            mine = rows[rows < count][self.rank * share : (self.rank + 1) * share]
            drawn = _draw(share, self.block, self.buffer, np.random.default_rng([self.seed, epoch, self.rank]))
            by_place: Int64[np.ndarray, " N"] = np.argsort(self.dataset.stored, kind="stable")
            return np.asarray(by_place[mine[drawn]])
        order: Int64[np.ndarray, " N"] = generator.permutation(count) if self.shuffle else np.arange(count)
        return np.asarray(order[: share * self.world][self.rank :: self.world])

    def _run(self, batches: list[np.ndarray]) -> Iterator[tuple[torch.Tensor, ...]]:
        batches = batches[: len(self)]
        ahead = [*self._read_ahead(batches), np.zeros(0, np.int64)]
        ready: deque[Future[tuple[torch.Tensor, ...]]] = deque()
        with ThreadPoolExecutor(1, "featstore-loader") as thread:
            try:
                if batches:
                    thread.submit(self.dataset.prefetch, ahead[0])
                for number, positions in enumerate(batches):
                    ready.append(thread.submit(self._fetch, positions, ahead[number + 1]))
                    if len(ready) > self.prefetch:
                        yield ready.popleft().result()
                while ready:
                    yield ready.popleft().result()
            finally:
                thread.shutdown(cancel_futures=True)

    def _fetch(
        self, positions: Int64[np.ndarray, " B"], following: Int64[np.ndarray, " A"]
    ) -> tuple[torch.Tensor, ...]:
        if len(following):
            self.dataset.prefetch(following)
        batch = self.dataset.batch(positions, pin=self._pin)
        return batch if self.device is None else tuple(part.to(self.device, non_blocking=self._pin) for part in batch)

    def _read_ahead(self, batches: list[np.ndarray]) -> list[np.ndarray]:
        """What to ask the disk for before each batch: its rows, or with blocks all rows of those that it begins."""
        if self.shuffle != "block" or not batches:
            return batches
        by_place = np.argsort(self.dataset.stored, kind="stable")
        block_of = np.empty(len(by_place), np.int64)
        block_of[by_place] = np.arange(len(by_place)) // self.block
        blocks, first = np.unique(block_of[np.concatenate(batches)], return_index=True)
        blocks = blocks[np.argsort(first)]
        starts = np.searchsorted(np.sort(first), np.arange(1, len(batches)) * self.batch_size)
        rows = np.arange(self.block)
        return [
            by_place[((begun * self.block)[:, None] + rows).ravel().clip(max=len(by_place) - 1)]
            for begun in np.split(blocks, starts)
        ]


def _check_shuffle(shuffle: object) -> None:
    if shuffle not in (True, False, "block"):
        raise ConfigError(f"shuffle is True, False or 'block', got {shuffle!r}")


def _draw(count: int, block: int, buffer: int, generator: np.random.Generator) -> Int64[np.ndarray, " N"]:
    """Random order of rows that arrive in blocks: at any time one of those of the last `buffer` blocks comes next.

    Each row waits for a time that is uniform over the passing of `buffer` blocks. The epoch is a ring: those that
    would come after its end come at its beginning, so that first and last batches are as mixed as all others.
    """
    if block * buffer >= count:
        return generator.permutation(count)
    arrival = np.arange(count) // block * block
    times = (arrival + generator.random(count) * (block * buffer)) % count
    return np.asarray(np.argsort(times), dtype=np.int64)
