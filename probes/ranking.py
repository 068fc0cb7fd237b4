"""Rows of a label in order of score: AUROC and average precision for any weights of the rows."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Integer

Binary = Integer[np.ndarray, " N"] | Bool[np.ndarray, " N"]
Weights = Float[np.ndarray, "B N"] | Integer[np.ndarray, "B N"]


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
        """(AUROC, average precision) under B sets of row weights; NaN where a class has no weight.

        AUROC is the weight of pairs in the right order, ties one half. Average precision is the mean over positives
        of the precision at their score, tied rows included.
        """
        exact = np.int64 if np.issubdtype(weights.dtype, np.integer) else np.float64
        positive = weights[:, self.positives].astype(exact)  # (B, P)
        negatives_before = _running_sum(weights[:, self.negatives], exact)  # (B, M + 1)
        positives_before = _running_sum(positive, exact)  # (B, P + 1)
        num_positive, num_negative = positives_before[:, -1], negatives_before[:, -1]
        below = negatives_before[:, self.below]
        won = (positive * (below + negatives_before[:, self.up_to])).sum(1)
        hits = num_positive[:, None] - positives_before[:, self.first_tied]
        selected = hits + (num_negative[:, None] - below)
        # A positive of weight zero can stand above every row that has weight: nothing is selected there.
        precision = np.where(selected > 0, hits, 0) / np.where(selected > 0, selected, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            auroc = won / (2.0 * num_positive * num_negative)
            auprc = (positive * precision).sum(1) / num_positive
        defined = (num_positive > 0) & (num_negative > 0)
        return np.where(defined, auroc, np.nan), np.where(defined, auprc, np.nan)


def _running_sum(values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    total = np.zeros((values.shape[0], values.shape[1] + 1), dtype)
    np.cumsum(values, axis=1, dtype=dtype, out=total[:, 1:])
    return total
