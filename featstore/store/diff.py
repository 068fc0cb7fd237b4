"""`diff`: are two sets the same numbers? Rows are matched by sample id and read in pieces."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float64, Int64

from featstore.errors import IncompleteError
from featstore.store.features import FeatureSet, RowArray
from featstore.store.reductions import Reduction

# Largest difference, relative to the row's own norm, that another machine, kernel or batch size may cause.
PARITY = {"float32": 5e-3, "bfloat16": 5e-2, "float16": 2e-2}
PIECE_BYTES = 32 * 2**20  # of one side's rows, as stored
EXAMPLES = 3

Verdict = Literal["equal", "within parity", "different"]


def parity_of(spec: dict[str, Any]) -> float:
    """The tolerance of a set, from the dtype it was computed in; imported sets count as float32."""
    return PARITY[spec["identity"].get("compute_dtype") or "float32"]


def as_tokens(values: np.ndarray, reduction: Reduction | None) -> Float[np.ndarray, "..."]:
    """Stored rows as floats and, where they were reduced, at the network's width: what is compared for parity."""
    return values.astype(np.float32) if reduction is None else reduction.restore(reduction.decode(values))


def parity_limit(limit: float, tokens: Float[np.ndarray, "N ..."], reduction: Reduction | None) -> float:
    """The tolerance for these rows (as `as_tokens` gives them).

    A difference d far below a step s of int8 moves a share d / s of the numbers by one step, that is sqrt(d s) in all.
    """
    if reduction is None or not reduction.is_int8:
        return limit
    norms = np.linalg.norm(tokens.reshape(len(tokens), -1).astype(np.float64), axis=1)
    step = np.linalg.norm(reduction.parameters["scale"].astype(np.float64)) * np.sqrt(reduction.row_shape[0])
    return float(np.sqrt(limit**2 + limit * step / max(norms.min(initial=np.inf), 1e-12)))


def row_differences(held: np.ndarray, fresh: np.ndarray) -> Float64[np.ndarray, " N"]:
    """|held - fresh| / |held| in the 2-norm, row by row; both (N, ...) of the same shape, any float type.

    Infinite where a row is not finite on one side.
    """
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (held, fresh))
    with np.errstate(invalid="ignore"):
        relative = np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(a, axis=1), 1e-12)
    return np.where(np.isnan(relative), np.inf, relative)


def row_cosines(held: np.ndarray, fresh: np.ndarray) -> Float64[np.ndarray, " N"]:
    """Cosine of each pair of rows; 1 where both are zero."""
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (held, fresh))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    zero = ~a.any(1) & ~b.any(1)
    return np.where(zero, 1.0, (a * b).sum(1) / np.maximum(norms, 1e-300))


@dataclass(slots=True)
class ArrayDiff:
    """One array on both sides. Differences are relative to the first set's row; `worst` is the id of the largest."""

    name: str
    tolerance: float
    rows: int = 0
    identical: int = 0
    max_relative: float = 0.0
    mean_relative: float = 0.0
    min_cosine: float = 1.0
    mean_cosine: float = 1.0
    worst: str | None = None
    problem: str | None = None
    verdict: Verdict = "equal"


@dataclass(slots=True)
class SetDiff:
    """What two sets differ in. `only_first` and `only_second` are ids of samples, at most three of each."""

    first: str
    second: str
    tolerance: float
    common: int
    num_only_first: int
    num_only_second: int
    only_first: list[str]
    only_second: list[str]
    failed_in_one: int = 0
    pending_in_one: int = 0
    arrays: list[ArrayDiff] = field(default_factory=list)
    verdict: Verdict = "equal"


def diff_sets(first: FeatureSet, second: FeatureSet, *, advance: Callable[[int], None] = lambda _: None) -> SetDiff:
    """Compare two sets, which may belong to different manifests or stores.

    `different` is also what has samples, arrays, failures or extracted rows on one side only. Samples that are pending
    or failed on both sides are left out. `advance` is told the number of rows compared, as they are.

    Raises:
        IncompleteError: the two have samples in common, but none that is extracted in both.
    """
    ids, others = first.manifest.column("id"), second.manifest.column("id")
    position = {sample: row for row, sample in enumerate(others)}
    here = np.array([row for row, sample in enumerate(ids) if sample in position], dtype=np.int64)
    there = np.array([position[ids[row]] for row in here], dtype=np.int64)
    known = set(ids)
    gone = [sample for sample in ids if sample not in position]
    new = [sample for sample in others if sample not in known]
    result = SetDiff(
        first=f"{first.name}-{first.fingerprint[:8]}",
        second=f"{second.name}-{second.fingerprint[:8]}",
        tolerance=max(parity_of(first.spec), parity_of(second.spec)),
        common=len(here),
        num_only_first=len(gone),
        num_only_second=len(new),
        only_first=gone[:EXAMPLES],
        only_second=new[:EXAMPLES],
    )
    failed = [np.isin(rows, np.fromiter(item.failures, np.int64)) for item, rows in ((first, here), (second, there))]
    result.failed_in_one = int((failed[0] != failed[1]).sum())
    compared = 0
    for name in dict.fromkeys([*first.arrays, *second.arrays]):
        found = ArrayDiff(name, result.tolerance)
        result.arrays.append(found)
        if name not in first.arrays or name not in second.arrays:
            found.problem = f"only in the {'first' if name in first.arrays else 'second'} set"
        else:
            a, b = first.array(name), second.array(name)
            pending = a.pending[here], b.pending[there]
            result.pending_in_one = max(result.pending_in_one, int((pending[0] != pending[1]).sum()))
            if a.shape[1:] != b.shape[1:]:
                found.problem = f"rows have shapes {a.shape[1:]} and {b.shape[1:]}"
            else:
                good = ~(failed[0] | failed[1] | pending[0] | pending[1])
                _compare(found, (a, here[good]), (b, there[good]), ids, advance)
                compared += found.rows
        found.verdict = _judge(found)
    if len(here) and not compared and not any(item.problem for item in result.arrays):
        raise IncompleteError(
            f"{result.first} and {result.second} have {len(here)} samples in common, none of them extracted in both; "
            "run the same `featstore extract` again, or merge"
        )
    lopsided = result.num_only_first or result.num_only_second or result.failed_in_one or result.pending_in_one
    verdicts = {item.verdict for item in result.arrays} | ({"different"} if lopsided else set())
    result.verdict = next((kind for kind in ("different", "within parity") if kind in verdicts), "equal")
    return result


def _judge(found: ArrayDiff) -> Verdict:
    if found.problem is not None:
        return "different"
    if found.identical == found.rows:
        return "equal"
    return "within parity" if found.max_relative <= found.tolerance else "different"


def _compare(
    found: ArrayDiff,
    first: tuple[RowArray, Int64[np.ndarray, " K"]],
    second: tuple[RowArray, Int64[np.ndarray, " K"]],
    ids: list[str],
    advance: Callable[[int], None],
) -> None:
    """Fill in what the rows say, in pieces."""
    (a, here), (b, there) = first, second
    row_bytes = max(1, int(np.prod(a.shape[1:], dtype=np.int64)) * max(a.dtype.itemsize, b.dtype.itemsize))
    step = max(1, PIECE_BYTES // row_bytes)
    total = cosines = 0.0
    limits = []
    for start in range(0, len(here), step):
        rows = here[start : start + step]
        held, fresh = a[rows], b[there[start : start + step]]
        # Arrays of integers come as floats already; principal components are compared as tokens.
        tokens = [x.restore(values) if x.reduction else values for x, values in ((a, held), (b, fresh))]
        relative, cosine = row_differences(tokens[0], tokens[1]), row_cosines(tokens[0], tokens[1])
        limits.append(parity_limit(found.tolerance, tokens[0], a.reduction))
        if held.dtype == fresh.dtype:
            equal = (_bytes(held) == _bytes(fresh)).all(1)
        else:
            equal = np.zeros(len(rows), dtype=bool)
        found.identical += int(equal.sum())
        worst = int(relative.argmax())
        if relative[worst] > found.max_relative:
            found.max_relative, found.worst = float(relative[worst]), ids[int(rows[worst])]
        found.min_cosine = min(found.min_cosine, float(cosine.min()))
        total += float(relative.sum())
        cosines += float(cosine.sum())
        advance(len(rows))
    found.rows = len(here)
    if found.rows:
        found.tolerance = min(limits)
        found.mean_relative, found.mean_cosine = total / found.rows, cosines / found.rows


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
