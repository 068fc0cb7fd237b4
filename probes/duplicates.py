"""Images that resemble each other by their embeddings.

The search is exact and bounded in memory: tiles of one product after another, of which only counts, each
row's nearest row and the most similar pairs are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64

from featstore.errors import TaskError
from featstore.store.features import FeatureSet

BANK_BYTES = 1 << 27  # rows of the one side held at once, in float32
QUERY_ROWS = 512
TILE_ROWS = 8192
WITHIN_ROWS = 8192  # rows of patients looked at for the similarity within one
WITHIN_GROUP = 256  # of one patient
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


class Vectors:
    """Unit rows of a set, read when they are asked for."""

    def __init__(self, features: FeatureSet, name: str):
        """name: arrays joined by '+', vectors each.

        Raises:
            UnknownNameError: the set lacks one. TaskError: an array holds more than a vector a sample.
        """
        self._arrays = [features.array(part) for part in name.split("+")]
        if any(len(array.shape) != 2 for array in self._arrays):
            raise TaskError(f"near-duplicates are found by vectors such as cls or mean_patch; got {name!r}")
        self.width = sum(array.shape[1] for array in self._arrays)

    def unit(self, rows: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "n D"]:
        """Rows of length 1; a row of zeros stays so."""
        if not len(rows):
            return np.zeros((0, self.width), np.float32)
        values = np.hstack([np.asarray(array[rows], np.float32) for array in self._arrays])
        length = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64))
        values /= np.where(length > 0, length, 1).astype(np.float32)[:, None]
        return values


@dataclass(frozen=True)
class Side:
    """Rows of one side of a search; `groups` are numbers, equal for one patient, and nowhere equal where unknown.

    `patients` are such numbers too, of pairs that are counted as those of one patient and are findings all the same.
    """

    vectors: Vectors
    rows: Int64[np.ndarray, " n"]
    groups: Int64[np.ndarray, " n"]
    patients: Int64[np.ndarray, " n"] | None = None


@dataclass
class Found:
    """What a search keeps.

    `count`: pairs of different (or unknown) groups at or above the threshold; `within`: pairs there of one group, and
    of one of `Side.patients`.
    `pairs`: (similarity, row, row) of different groups, the most similar first, at most `keep` of them, all at or above
    `floor`. `nearest`: the similarity of each query's nearest row of another group, -inf where there is none.
    """

    threshold: float  # infinite: nothing is counted
    keep: int
    floor: float
    count: int = 0
    within: int = 0
    pairs: list[tuple[float, int, int]] = field(default_factory=list)
    nearest: list[float] = field(default_factory=list)

    def add(self, similarity: Float[np.ndarray, " n"], first: np.ndarray, second: np.ndarray) -> None:
        self.pairs += zip(similarity.tolist(), first.tolist(), second.tolist())
        if len(self.pairs) > 2 * self.keep:
            self.settle()

    def settle(self) -> None:
        """Order the pairs and drop those beyond `keep`."""
        self.pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
        del self.pairs[self.keep :]
        if len(self.pairs) == self.keep:
            self.floor = self.pairs[-1][0]


def search(queries: Side, bank: Side, found: Found, advance: Callable[[int], None]) -> None:
    """Compare every query with every row of the bank; `advance` is told of queries times rows, in thousands."""
    nearest = np.full(len(queries.rows), -np.inf, np.float32)
    held = max(1, BANK_BYTES // (4 * bank.vectors.width))
    for first in range(0, len(bank.rows), held):
        rows, groups = bank.rows[first : first + held], bank.groups[first : first + held]
        values = bank.vectors.unit(rows)
        for start in range(0, len(queries.rows), QUERY_ROWS):
            part = slice(start, start + QUERY_ROWS)
            asked = queries.vectors.unit(queries.rows[part])
            for tile in range(0, len(rows), TILE_ROWS):
                inside = slice(tile, tile + TILE_ROWS)
                scores = asked @ values[inside].T
                if queries.patients is not None and bank.patients is not None:
                    kin = queries.patients[part][:, None] == bank.patients[first : first + held][inside][None, :]
                    found.within += int((scores[kin] >= found.threshold).sum())
                same = queries.groups[part][:, None] == groups[inside][None, :]
                _take(scores, same, queries.rows[part], rows[inside], found)
                nearest[part] = np.maximum(nearest[part], scores.max(1))
            advance(len(asked) * len(rows) // 1000)
    found.settle()
    found.nearest += nearest.tolist()


def _take(
    scores: Float32[np.ndarray, "q b"],
    same: Bool[np.ndarray, "q b"],
    first: Int64[np.ndarray, " q"],
    second: Int64[np.ndarray, " b"],
    found: Found,
) -> None:
    """Count and keep what one tile holds; scores within a group are -inf afterwards."""
    if same.any():
        found.within += int((scores[same] >= found.threshold).sum())
        scores[same] = -np.inf
    found.count += int((scores >= found.threshold).sum())
    above = np.nonzero(scores >= found.floor)
    if len(above[0]) > found.keep:  # of more than can be kept only the best are worth a place
        best = np.argpartition(-scores[above], found.keep - 1)[: found.keep]
        above = above[0][best], above[1][best]
    found.add(scores[above], first[above[0]], second[above[1]])


def nearest_within(
    vectors: Vectors, rows: Int64[np.ndarray, " n"], groups: Int64[np.ndarray, " n"], *, seed: int
) -> list[float]:
    """Similarity of a row to the nearest other row of its group, for the rows of seeded groups that have two or more.

    At most `WITHIN_GROUP` rows of a group and about `WITHIN_ROWS` rows in all.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(groups[order]) != 0]) if len(order) else np.zeros(0, np.int64)
    members = [part[:WITHIN_GROUP] for part in np.split(order, starts[1:]) if len(part) > 1]
    picked: list[np.ndarray] = []
    for number in np.random.default_rng(seed).permutation(len(members)):
        if sum(map(len, picked)) >= WITHIN_ROWS:
            break
        picked.append(members[number])
    found: list[float] = []
    if picked:
        values = vectors.unit(rows[np.concatenate(picked)])
        ends = np.cumsum([len(part) for part in picked])
        for part in np.split(values, ends[:-1]):
            scores = part @ part.T
            np.fill_diagonal(scores, -np.inf)
            found += scores.max(1).tolist()
    return found


def quantiles(values: list[float]) -> dict[str, float] | None:
    """The spread of similarities by quantile; None of nothing."""
    finite = np.array([value for value in values if np.isfinite(value)])
    if not len(finite):
        return None
    return {f"{100 * share:g}%": round(float(np.quantile(finite, share)), 6) for share in QUANTILES}
