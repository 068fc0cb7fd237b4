"""A set as a reader sees it: the rows of one manifest, in its order, whatever the order of computation was."""

import html
import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64

from featstore.datasets.manifest import Manifest
from featstore.errors import ConfigError, IncompleteError, UnknownNameError
from featstore.objects import Place
from featstore.request import command_of
from featstore.store import commits, compact, ledger, reductions
from featstore.store.layout import LEFT, read_spec, set_name
from featstore.store.packed import archived
from featstore.store.reader import ShardedArray, split_key
from featstore.store.reductions import Reduction

if TYPE_CHECKING:
    import pyarrow as pa

OK, FAILED, PENDING = "ok", "failed", "pending"
PARTS = ("cls", "mean_patch", "registers", "patches")
POOL_BYTES = 256 * 2**20  # tokens held in memory while they are averaged
LAST = re.compile(r"last([1-9][0-9]*)")  # CLS tokens of the last blocks


@dataclass(frozen=True)
class RowArray:
    """One array of a set, indexed by manifest row; reads only what is asked for.

    Arrays of integers (`--reduce int8`) come back as floats; `failed` are their rows that hold no numbers.
    """

    array: ShardedArray
    rows: Int64[np.ndarray, " N"]
    pending: Bool[np.ndarray, " N"]
    name: str
    reduction: Reduction | None = None
    failed: Bool[np.ndarray, " N"] | None = None

    @property
    def stored(self) -> ShardedArray:
        """The array as it is on disk: rows in the order in which they were computed, integers as integers."""
        return self.array

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.array.shape[1:])

    @property
    def dtype(self) -> Any:
        if self.reduction is not None and self.reduction.is_int8:
            return np.dtype(self.reduction.dtype)
        return self.array.dtype

    def restore(self, values: Float[np.ndarray, "... C"]) -> Float32[np.ndarray, "... D"]:
        """Values of this array at the network's width, in float32: principal components mapped back to tokens.

        A pooled grid stays pooled, and what was not reduced by `pca` keeps its numbers.
        """
        if self.reduction is None:
            return np.asarray(values, dtype=np.float32)
        return self.reduction.restore(values)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """numpy's indexing: rows by integer, slice, list (any order, duplicates, negative) or mask, then the rest.

        Raises:
            IncompleteError: a row asked for is not extracted yet.
            IndexError: as numpy, and for new axes.
        """
        first, rest = split_key(index, len(self.shape))
        if np.ndim(first) == 1 and not len(first):
            first = np.zeros(0, np.int64)  # numpy makes an empty list a list of floats
        positions = np.arange(len(self))[first]
        self._check(self.pending[positions])
        block = self.decode(self.array.gather(self.rows[positions.ravel()]), positions.ravel())
        if not rest:
            return block.reshape(positions.shape + self.shape[1:])
        # What numpy still has to do, on the rows read: integers and lists broadcast with the lists in `rest`.
        inside = slice(None) if isinstance(first, slice) else np.arange(positions.size).reshape(positions.shape)
        return block[(inside if np.ndim(positions) else 0, *rest)]

    def load(self, *, verify: bool = False) -> np.ndarray:
        """All rows in manifest order; `verify` checks every chunk's checksum on the way."""
        self._check(self.pending)
        count = len(self.rows)
        if count and np.array_equal(self.rows, np.arange(self.rows[0], self.rows[0] + count)):
            values = self.array.read(int(self.rows[0]), int(self.rows[0]) + count, verify=verify)
        else:
            values = self.array.gather(self.rows, verify=verify)
        return self.decode(values, np.arange(count))

    def decode(self, values: np.ndarray, positions: Int64[np.ndarray, " K"]) -> np.ndarray:
        """Stored rows of these manifest positions as they are returned: integers as floats, failed rows as NaN."""
        if self.reduction is None or not self.reduction.is_int8:
            return values
        decoded = self.reduction.decode(values)
        if self.failed is not None:
            decoded[self.failed[positions]] = np.nan
        return decoded

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on disk is always copied into memory; drop copy=False")
        values = self.load()
        return values if dtype is None else values.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"<{self.name} {self.shape} {self.dtype}>"

    def _check(self, pending: Any) -> None:
        missing = int(np.count_nonzero(pending))
        if missing:
            raise IncompleteError(
                f"{self.name}: {missing} of the rows asked for are not extracted yet; run the same `featstore extract` "
                "again, or pick rows with `fs.ok`"
            )


class FeatureSet:
    """Embeddings of one data set by one backbone under one preprocessing.

    Attributes:
        spec: the identity, as in `spec.json`.
        manifest: the samples, in order; row i of every array is sample i.
    """

    def __init__(self, folder: Place, manifest: Manifest):
        self.folder = folder
        self.spec = read_spec(folder)
        self.manifest = manifest

    @property
    def name(self) -> str:
        """`dataset/model@res`."""
        return f"{self.spec['dataset']}/{set_name(self.spec)}"

    @property
    def fingerprint(self) -> str:
        return str(self.spec["fingerprint"])

    @property
    def random(self) -> bool:
        """True if the weights are random; every listing says so."""
        return bool(self.spec["random_weights"])

    @cached_property
    def ledger(self) -> ledger.Ledger:
        return ledger.read_ledger(self.folder)

    @cached_property
    def row_index(self) -> Int64[np.ndarray, " N"]:
        """Row of the set's arrays that holds each sample."""
        return ledger.read_rows(self.folder, self.manifest.short)

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays, `cls` first."""
        order = {name: position for position, name in enumerate(PARTS)}
        return sorted(self.ledger.arrays, key=lambda name: (order.get(name, len(order)), name))

    def __len__(self) -> int:
        return len(self.manifest)

    def array(self, name: str) -> RowArray:
        """One array by name, such as `cls` or `layers/3/cls`.

        Raises:
            UnknownNameError: the set has no such array; the message says what it has and how to add it.
        """
        if name not in self.ledger.arrays:
            have = ", ".join(self.arrays) or "none"
            raise UnknownNameError(
                f"{self.name} has no {name!r}; it has {have}; `featstore extract ... --tokens` or `--layers` adds more"
            )
        folder = self.folder / "data.zarr" / name
        if not (folder / "zarr.json").is_file():
            raise IncompleteError(f"{self.name}:{name} has no zarr.json yet; run the same `featstore extract` again")
        group = self.ledger.group_of(name)
        pending = self.pending(group)
        reduction = self.reduction(name)
        failed = None
        if reduction is not None and reduction.is_int8:  # what integers cannot say, the markers do
            failed = np.zeros(len(self), bool)
            failed[list(self._failures_of(group))] = True
        needed = int(self.row_index[~pending].max(initial=-1)) + 1
        reader = compact.open_compact(self.folder, name, needed)
        if reader is None:
            reader = ShardedArray(folder)
        return RowArray(reader, self.row_index, pending, f"{self.name}:{name}", reduction, failed)

    def reduction(self, array: str) -> Reduction | None:
        """What was done to an array before it was stored, and the loss that was measured; None if nothing was."""
        return reductions.read_reduction(self.folder, self.spec, array)

    def __getattr__(self, name: str) -> RowArray:
        if name in PARTS:
            return self.array(name)
        raise AttributeError(f"a feature set has no attribute {name!r}; arrays: {', '.join(PARTS)}")

    def pending(self, group: str | None = None) -> Bool[np.ndarray, " N"]:
        """Samples whose block is not committed yet (in any group, or in one)."""
        size = int(self.spec["layout"]["block_rows"])
        blocks = self.row_index // size
        result = np.full(len(blocks), not self.ledger.groups)
        for name in [group] if group else self.ledger.groups:
            done = np.fromiter(commits.committed_blocks(self.folder, name), np.int64)
            result |= ~np.isin(blocks, done)
        return result

    @cached_property
    def _failed(self) -> dict[tuple[str, int], dict[int, str]]:
        """Failed rows of each marker read so far; a marker never changes."""
        return {}

    @property
    def failures(self) -> dict[int, str]:
        """Manifest row -> reason, for images that could not be decoded."""
        groups = [self._failures_of(group) for group in self.ledger.groups]
        found = {row: why for group in groups for row, why in group.items() if why != LEFT}
        # A sample that left before one array was added still has the others.
        left = [row for row in (groups[0] if groups else ()) if all(row in group for group in groups)]
        return {**{row: groups[0][row] for row in left}, **found}

    def _failures_of(self, group: str) -> dict[int, str]:
        size = int(self.spec["layout"]["block_rows"])
        held = commits.committed_blocks(self.folder, group) & set(np.unique(self.row_index // size).tolist())
        unread = {block for block in held if (group, block) not in self._failed}
        for block, commit in commits.read_commits(self.folder, group, unread).items() if unread else ():
            self._failed[group, block] = commit.failed
        reasons = {row: why for block in sorted(held) for row, why in self._failed.get((group, block), {}).items()}
        positions = np.flatnonzero(np.isin(self.row_index, np.fromiter(reasons, np.int64, len(reasons))))
        return {int(position): reasons[int(self.row_index[position])] for position in positions}

    def _states(self) -> tuple[np.ndarray, dict[int, str]]:
        """(state of each sample, reasons of those that failed)."""
        # In this order: a block committed in between then counts as pending or failed, never as whole.
        states = np.where(self.pending(), PENDING, OK).astype(object)
        failures = self.failures
        states[list(failures)] = FAILED
        return states, failures

    @property
    def ok(self) -> Bool[np.ndarray, " N"]:
        """Samples that have embeddings: committed in every array and not failed."""
        return np.asarray(self._states()[0] == OK, dtype=bool)

    @property
    def rows(self) -> "pa.Table":
        """The manifest with the columns `state` (ok, failed, pending) and `reason`."""
        import pyarrow as pa

        states, failures = self._states()
        table = self.manifest.table.append_column("state", pa.array(states.tolist(), pa.string()))
        return table.append_column("reason", pa.array([failures.get(row) for row in range(len(self))], pa.string()))

    def parts(self, features: str) -> list[str]:
        """Arrays behind a feature name: array names joined by '+', such as `cls+mean_patch`, or `mean_all`.

        `lastN` stands for the CLS tokens of the last N blocks in order of depth, each after the final norm, as in
        `last4+mean_patch`; the last of them is `cls`.

        Raises:
            ConfigError: `mean_all` of a network without a CLS token; `lastN` of one without so many blocks.
            UnknownNameError: a block of `lastN` is not there; the message says how to add it.
        """
        if features != "mean_all":
            lasts = [(name, LAST.fullmatch(name)) for name in features.split("+")]
            return [part for name, last in lasts for part in (self._last_blocks(int(last[1])) if last else [name])]
        facts = self.spec["identity"].get("architecture", {})
        if facts.get("summary") == "pool":
            raise ConfigError(
                f"{self.name}: mean_all is the mean over CLS, registers and patches, and this network has no CLS "
                "token: its cls is what it pools from the patches; use cls or mean_patch"
            )
        has_registers = facts.get("num_registers", 0) > 0
        return ["cls", "registers", "patches"] if has_registers else ["cls", "patches"]

    def _last_blocks(self, count: int) -> list[str]:
        """Arrays of the CLS tokens of the last `count` blocks."""
        depth = int(self.spec["identity"].get("architecture", {}).get("depth") or 0)
        if not depth:
            raise ConfigError(
                f"{self.name}: last{count} is the CLS tokens of the last {count} blocks, and no blocks of tokens are "
                "known of this network; use cls"
            )
        if count > depth:
            raise ConfigError(f"{self.name}: last{count} asks for {count} blocks and the network has {depth}")
        names = [*(f"layers/{block}/cls" for block in range(depth - count + 1, depth)), "cls"]
        missing = [name for name in names if name not in self.ledger.arrays]
        if missing:
            raise UnknownNameError(
                f"{self.name} has no {', '.join(missing)}, which last{count} needs; run\n"
                f"  {command_of(self.spec, names)}"
            )
        return names

    def load(self, features: str = "cls+mean_patch", *, verify: bool = False) -> np.ndarray:
        """Features of every sample, shape (N, D), in manifest order; rows that failed are NaN.

        `mean_all` is the float32 mean over all tokens (CLS, registers, patches); it needs them in the set.

        Raises:
            ConfigError: `mean_all` of patches that are kept as principal components.
        """
        arrays = [self.array(name) for name in self.parts(features)]
        if features == "mean_all":
            return token_mean(arrays, verify)
        loaded = [array.load(verify=verify) for array in arrays]
        if len(loaded) == 1:
            return loaded[0]
        return np.concatenate([part.reshape(len(part), -1) for part in loaded], axis=1)

    def summary(self) -> dict[str, Any]:
        """Counts and facts for listings."""
        states = self._states()[0]
        identity = self.spec["identity"]
        preprocess = identity.get("preprocess", {})
        return {
            "set": self.name,
            "fingerprint": self.fingerprint,
            "manifest": self.manifest.short,
            "samples": len(self),
            **{state: int((states == state).sum()) for state in (OK, FAILED, PENDING)},
            "arrays": {name: [*self.ledger.arrays[name].row_shape] for name in self.arrays},
            "dtype": identity["stored_dtype"],
            "compute_dtype": identity.get("compute_dtype"),
            **({"weight_dtype": identity["weight_dtype"]} if "weight_dtype" in identity else {}),
            "weights": "random" if self.random else self.spec["weights"]["kind"],
            "pixels": [preprocess["height"], preprocess["width"]] if preprocess else None,
            "geometry": preprocess.get("geometry"),
            **({"augment": preprocess["augment"]} if preprocess.get("augment") else {}),
            "archived": sealed["codec"] if (sealed := archived(self.folder)) is not None else None,
            **({"reduction": self._losses()} if reductions.steps_of(self.spec) else {}),
            "bytes": sum(array.row_bytes for array in self.ledger.arrays.values()) * len(self)
            if sealed is None
            else sealed["bytes"],
        }

    def _losses(self) -> dict[str, Any]:
        """Steps, and what they cost each array."""
        found = {name: self.reduction(name) for name in self.arrays}
        losses = {name: dict(reduction.loss) for name, reduction in found.items() if reduction is not None}
        return {"steps": list(reductions.steps_of(self.spec)), **losses}

    def __repr__(self) -> str:
        weights = ", RANDOM WEIGHTS" if self.random else ""
        return f"<FeatureSet {self.name} {len(self)} samples: {', '.join(self.arrays)}{weights}>"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>"
            for key, value in self.summary().items()
        )
        return f"<table><caption>{html.escape(self.name)}</caption>{cells}</table>"


def token_mean(arrays: list[RowArray], verify: bool) -> Float32[np.ndarray, "N D"]:
    """Mean over the tokens of all arrays, taken in float32, in pieces of rows."""
    count = len(arrays[0])
    weights = [_patches_behind(array) for array in arrays]
    num_tokens = sum(float(of_array.sum()) for of_array in weights)
    result = np.empty((count, arrays[0].shape[-1]), np.float32)
    held = sum(len(of_array) for of_array in weights)
    step = max(1, POOL_BYTES // (4 * held * result.shape[1]))
    for first in range(0, count, step):
        total = np.zeros_like(result[first : first + step])
        for array, of_array in zip(arrays, weights):
            of_rows = None if array.failed is None else array.failed[first : first + step]
            piece = replace(
                array,
                rows=array.rows[first : first + step],
                pending=array.pending[first : first + step],
                failed=of_rows,
            )
            values = piece.load(verify=verify).astype(np.float32)
            values = values.reshape(len(values), -1, values.shape[-1])
            if (of_array != 1).any():
                values *= of_array.astype(np.float32)[:, None]
            total += values.sum(1)
        result[first : first + step] = total / num_tokens
    return result


def _patches_behind(array: RowArray) -> Float64[np.ndarray, " T"]:
    """How many tokens of the network each token of an array stands for: a pooled cell is the mean of its patches."""
    if array.reduction is None:
        return np.ones(int(np.prod(array.shape[1:-1])))
    if array.reduction.components is not None:
        raise ConfigError(
            f"mean_all needs every token, and {array.name} keeps {array.reduction.components} principal components; "
            "use cls+mean_patch, or extract without pca (--name gives that set another name)"
        )
    return array.reduction.cell_sizes
