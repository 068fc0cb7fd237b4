"""Variance of AUROCs and of their differences without resampling: DeLong 1988, for patients in Obuchowski's form.

Every positive is placed among the negatives (the share of them below it, ties one half) and every negative among the
positives. AUROC is the mean of either; how placements spread over patients is its variance. Sorting finds all
placements in N log N.

Sources: DeLong, DeLong and Clarke-Pearson 1988 (Biometrics 44); Obuchowski 1997 (Biometrics 53), clustered data; Sun
and Xu 2014 for the sorting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from featstore.errors import TaskError
from probes.metrics import check_binary
from probes.ranking import Binary


@dataclass(frozen=True)
class Placements:
    """AUROCs of K scores of one label and how far each group (patient) moves them.

    `positive[g]` sums, over the positives of group g, how far their placement lies from the AUROC, divided by the
    number of positives; `negative` the same of negatives. Both sum to zero over `groups` (their ids, sorted).
    `num_groups` counts groups with a positive, with a negative, with either.
    """

    groups: Shaped[np.ndarray, " G"]

    auroc: Float[np.ndarray, " K"]
    positive: Float[np.ndarray, "K G"]
    negative: Float[np.ndarray, "K G"]
    num_groups: tuple[int, int, int]

    def covariance(self) -> Float[np.ndarray, "K K"]:
        """Covariance of the K AUROCs, in Obuchowski's form; DeLong's own where every row is a group.

        NaN with fewer than two groups that have a positive, or a negative.
        """
        with_positive, with_negative, either = self.num_groups
        if min(with_positive, with_negative) < 2:
            return np.full((len(self.auroc), len(self.auroc)), np.nan)
        mixed = self.positive @ self.negative.T
        return np.asarray(
            with_positive / (with_positive - 1) * self.positive @ self.positive.T
            + with_negative / (with_negative - 1) * self.negative @ self.negative.T
            + either / (either - 1) * (mixed + mixed.T)
        )

    def influence(self) -> Float[np.ndarray, "K G"]:
        """Share of each group in the AUROCs' error, with the same small-sample factors.

        Sums of its products are covariances, also between labels. They equal `covariance` where no group has both
        classes; the mixed term has the mean of both classes' factors there.
        """
        with_positive, with_negative, _ = self.num_groups
        if min(with_positive, with_negative) < 2:
            return np.full(self.positive.shape, np.nan)
        return np.asarray(
            np.sqrt(with_positive / (with_positive - 1)) * self.positive
            + np.sqrt(with_negative / (with_negative - 1)) * self.negative
        )


def placements(
    y: Binary,
    scores: Float[np.ndarray, "N K"],
    groups: Shaped[np.ndarray, " N"] | None = None,
) -> Placements:
    """Place the rows of one label under each of K scores.

    `y` are 0 or 1; rows with equal `groups` belong to one patient, without `groups` every row is its own.

    Raises:
        TaskError: only one class, labels or scores that are no numbers, or one group per row is missing.
    """
    if groups is not None and len(groups) != len(y):
        raise TaskError(f"one group per row is needed: {len(y)} rows, {len(groups)} groups")
    for column in scores.T:
        check_binary(y, column)
    names, inverse = np.unique(np.arange(len(y)) if groups is None else groups, return_inverse=True)
    index: Int[np.ndarray, " N"] = inverse.reshape(-1)
    is_positive = y == 1
    num_positive, num_negative = int(is_positive.sum()), int((~is_positive).sum())
    if not num_positive or not num_negative:
        raise TaskError(f"an AUROC needs both classes; got {num_positive} positives and {num_negative} negatives")
    num_groups = len(names)
    shape = (scores.shape[1], num_groups)
    auroc, moved = np.zeros(shape[0]), (np.zeros(shape), np.zeros(shape))
    for number, column in enumerate(scores.T):
        high, low = column[is_positive], column[~is_positive]
        above, below = np.sort(high), np.sort(low)
        place_high = (np.searchsorted(below, high, "left") + np.searchsorted(below, high, "right")) / (2 * num_negative)
        place_low = 1 - (np.searchsorted(above, low, "left") + np.searchsorted(above, low, "right")) / (
            2 * num_positive
        )
        auroc[number] = place_high.mean()
        for sums, places, rows in ((moved[0], place_high, is_positive), (moved[1], place_low, ~is_positive)):
            sums[number] = np.bincount(index[rows], places - auroc[number], num_groups) / len(places)
    seen = [len(np.unique(index[rows])) for rows in (is_positive, ~is_positive)]
    return Placements(names, auroc, moved[0], moved[1], (seen[0], seen[1], num_groups))


def normal_p(z: float) -> float:
    """Upper tail of the standard normal distribution."""
    from math import erfc, sqrt

    return 0.5 * erfc(z / sqrt(2))


def delong_interval(auroc: float, variance: float, level: float = 0.95) -> tuple[float, float]:
    """Normal interval of an AUROC, on the logit scale so that it stays inside 0 and 1.

    NaN without a variance; the AUROC itself where nothing varies or it is 0 or 1.
    """
    from statistics import NormalDist

    if variance != variance:
        return float("nan"), float("nan")
    if variance <= 0 or not 0 < auroc < 1:
        return auroc, auroc
    logit = np.log(auroc / (1 - auroc))
    half = NormalDist().inv_cdf(0.5 + level / 2) * np.sqrt(variance) / (auroc * (1 - auroc))
    return float(1 / (1 + np.exp(half - logit))), float(1 / (1 + np.exp(-half - logit)))


def auroc_intervals(
    y: np.ndarray,
    scores: Float[np.ndarray, "N L"],
    mask: Bool[np.ndarray, "N L"],
    groups: Shaped[np.ndarray, " N"],
    *,
    labels: Sequence[str],
) -> list[dict[str, float | str]]:
    """AUROC, its standard error and interval (95 %) of every label without resampling, clustered by `groups`.

    `[{"label", "auroc", "standard_error", "low", "high"}]`; NaN for labels with a single class.
    """
    found: list[dict[str, float | str]] = []
    for column, label in enumerate(labels):
        rows = np.flatnonzero(mask[:, column])
        auroc = variance = float("nan")
        if 0 < (y[rows, column] == 1).sum() < len(rows):
            placed = placements(y[rows, column], scores[rows, column : column + 1], groups[rows])
            auroc, variance = float(placed.auroc[0]), float(placed.covariance()[0, 0])
        low, high = delong_interval(auroc, variance)
        error = float(np.sqrt(max(variance, 0.0))) if variance == variance else variance
        found.append({"label": label, "auroc": auroc, "standard_error": error, "low": low, "high": high})
    return found
