"""Rows of a label in order of score: AUROC and average precision for any weights of the rows."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64, Integer

Binary = Integer[np.ndarray, " N"] | Bool[np.ndarray, " N"]
Weights = Float[np.ndarray, "B N"] | Integer[np.ndarray, "B N"]

# Three resamples share one 64-bit integer: running sums are bound by their chain of additions, so three for one.
LANES, LANE_BITS = 3, 21
LANE_LIMIT = 1 << (LANE_BITS - 1)  # twice the total weight of a resample must fit into a lane


def pack(counts: Integer[np.ndarray, "B G"]) -> Int64[np.ndarray, "K G"]:
    """Counts of three resamples in a row: resample 3k + j stands in bits 21j to 21j + 20 of row k."""
    rows = -(-len(counts) // LANES)
    packed = np.zeros((rows, counts.shape[1]), np.int64)
    for lane in range(LANES):
        part = counts[lane::LANES].astype(np.int64)
        packed[: len(part)] |= part << (lane * LANE_BITS)
    return packed


def resample_steps(num_rows: int, num_resamples: int) -> list[slice]:
    """Blocks of resamples whose running sums together stay in a core's cache, whole packed rows each."""
    step = LANES * max(1, min(64, 2**17 // max(num_rows, 1)))
    return [slice(start, min(start + step, num_resamples)) for start in range(0, num_resamples, step)]


def fits_lanes(rows: list[np.ndarray], counts: Integer[np.ndarray, "B G"]) -> bool:
    """Whether no resample weighs too much for `pack`; `rows` are, for every label, the group of each of its rows."""
    num_groups = counts.shape[1]
    sizes = [np.bincount(index, minlength=num_groups) for index in rows]
    if all(int(size.max(initial=0)) * num_groups < LANE_LIMIT for size in sizes):
        return True  # even the largest group drawn every time
    blocks = (counts[start : start + 64].astype(np.float64) for start in range(0, len(counts), 64))
    return all(float((block @ np.stack(sizes, 1)).max()) < LANE_LIMIT for block in blocks)


class Standing(NamedTuple):
    """What B resamples say of every positive, in ascending order of score.

    `weight` of the positive, weight of negatives `below` it and up to it (`up_to`, ties included), weight of positives
    at or above its score (`hits`); `num_positive` and `num_negative` are the totals of each resample.
    """

    weight: Float[np.ndarray, "B P"]
    below: Float[np.ndarray, "B P"]
    up_to: Float[np.ndarray, "B P"]
    hits: Float[np.ndarray, "B P"]
    num_positive: Float[np.ndarray, " B"]
    num_negative: Float[np.ndarray, " B"]

    @property
    def defined(self) -> Bool[np.ndarray, " B"]:
        """Whether both classes have weight."""
        return np.asarray((self.num_positive > 0) & (self.num_negative > 0))


@dataclass(frozen=True)
class Ranking:
    """Rows of one label sorted once, so that any weights of the rows give AUROC and average precision in one pass.

    `positives` and `negatives` are row numbers in ascending order of score. For every positive, `below` and `up_to`
    count the negatives with a smaller, and with a smaller or equal score; `first_tied` is the position of the first
    positive with the same score.
    """

    positives: Integer[np.ndarray, " P"]
    negatives: Integer[np.ndarray, " M"]
    below: Integer[np.ndarray, " P"]
    up_to: Integer[np.ndarray, " P"]
    first_tied: Integer[np.ndarray, " P"]

    @classmethod
    def of(cls, y: Binary, scores: Float[np.ndarray, " N"]) -> "Ranking":
        """Sort the rows of one label."""
        positives, negatives = np.flatnonzero(y), np.flatnonzero(y == 0)
        positives = positives[np.argsort(scores[positives], kind="stable")]
        negatives = negatives[np.argsort(scores[negatives], kind="stable")]
        high, low = scores[positives], scores[negatives]
        return cls(
            positives,
            negatives,
            np.searchsorted(low, high, "left"),
            np.searchsorted(low, high, "right"),
            np.searchsorted(high, high, "left"),
        )

    def renumbered(self, numbers: Integer[np.ndarray, " N"]) -> "Ranking":
        """The same order with row `i` called `numbers[i]`: the column of `weights` that holds its weight."""
        return replace(self, positives=numbers[self.positives], negatives=numbers[self.negatives])

    def weighted(self, weights: Weights) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
        """(AUROC, average precision) under B sets of row weights; NaN where a class has no weight."""
        at = self.standing(weights)
        return area_under_roc(at), area_under_pr(at)

    def standing(self, weights: Weights) -> Standing:
        """Under any weights; `packed_standing` finds three resamples in the time of one."""
        weight = weights[:, self.positives].astype(np.float64)
        total, ahead = _running_sum(weights[:, self.negatives], np.float64), _running_sum(weight, np.float64)
        return Standing(
            weight,
            total[:, self.below],
            total[:, self.up_to],
            ahead[:, -1:] - ahead[:, self.first_tied],
            ahead[:, -1],
            total[:, -1],
        )

    def packed_standing(self, packed: Int64[np.ndarray, "K G"]) -> Standing:
        """Of the 3 K resamples of `pack`, those that fill its last row up included (of no weight)."""
        # "clip" spares numpy the copy that keeps its output whole when an index is wrong; ours are not.
        weight = packed.take(self.positives, axis=1, mode="clip")
        total = _running_sum(packed.take(self.negatives, axis=1, mode="clip"), np.int64)
        ahead = _running_sum(weight, np.int64)
        num_positive = _lanes(ahead[:, -1:])
        return Standing(
            _lanes(weight),
            _lanes(total.take(self.below, axis=1, mode="clip")),
            _lanes(total.take(self.up_to, axis=1, mode="clip")),
            num_positive - _lanes(ahead.take(self.first_tied, axis=1, mode="clip")),
            num_positive[:, 0],
            _lanes(total[:, -1:])[:, 0],
        )


def area_under_roc(at: Standing) -> Float[np.ndarray, " B"]:
    """Weight of pairs in the right order, ties one half; NaN where a class has no weight.

    Exact for whole numbers: every product and partial sum is one below 2**53.
    """
    won = np.einsum("bp,bp->b", at.weight, at.below) + np.einsum("bp,bp->b", at.weight, at.up_to)
    pairs = np.where(at.defined, 2 * at.num_positive * at.num_negative, np.nan)
    return np.asarray(won / pairs)


def area_under_pr(at: Standing) -> Float[np.ndarray, " B"]:
    """Mean over positives of the precision at their score, tied rows included; NaN where a class has no weight."""
    selected = at.hits + (at.num_negative[:, None] - at.below)
    # A positive of weight zero can stand above every row that has weight: nothing is selected there.
    precision = np.divide(at.hits, selected, out=np.zeros_like(selected), where=selected > 0)
    return np.asarray(np.einsum("bp,bp->b", at.weight, precision) / np.where(at.defined, at.num_positive, np.nan))


def best_youden(at: Standing) -> Float[np.ndarray, "B 2"]:
    """(sensitivity, specificity) at the cut with the largest sum of both; of equal ones the highest cut.

    NaN where a class has no weight. Cutting at a positive's score is enough: any other cut has a cut at the next
    higher positive that selects the same positives and no more negatives.
    """
    num_positive, num_negative = at.num_positive[:, None], at.num_negative[:, None]
    # Whole numbers, so that equal sums are equal: hits * M + below * P.
    gain = at.hits * num_negative + at.below * num_positive
    best = gain.shape[1] - 1 - gain[:, ::-1].argmax(1)
    rows = np.arange(len(best))
    better = gain[rows, best] > at.num_positive * at.num_negative  # than to select nothing
    found = np.full((len(best), 2), np.nan)
    ok = at.defined
    found[ok, 0] = np.where(better[ok], at.hits[rows, best][ok] / at.num_positive[ok], 0.0)
    found[ok, 1] = np.where(better[ok], at.below[rows, best][ok] / at.num_negative[ok], 1.0)
    return found


def _lanes(packed: Int64[np.ndarray, "K n"]) -> Float[np.ndarray, "B n"]:
    """Resamples of a packed table, row by row and lane by lane."""
    found = np.empty((len(packed), LANES, packed.shape[1]))
    for lane in range(LANES):
        found[:, lane] = (packed >> (lane * LANE_BITS)) & ((1 << LANE_BITS) - 1)
    return found.reshape(len(packed) * LANES, packed.shape[1])


def _running_sum(values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    total = np.zeros((values.shape[0], values.shape[1] + 1), dtype)
    np.cumsum(values, axis=1, dtype=dtype, out=total[:, 1:])
    return total
