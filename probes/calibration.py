"""Whether probabilities mean what they say: calibration error, Brier score, and a temperature to mend them.

A temperature divides logits; it never changes a ranking of one label's rows. It is found on validation rows and, like a
threshold, refuses the rows it was found on. Source: Guo et al. 2017.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from featstore.errors import ConfigError, TaskError
from probes.thresholds import FittedOn, Scored

# 1 / temperature is sought between these; a bound that is reached is flagged.
SHARPNESS = (1e-3, 1e3)
CLIP = 1e-7  # probabilities of 0 and 1 (of a vote, say) have no logit
NUM_BINS = 15  # Guo et al. 2017


def logits_of(probabilities: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Log odds of probabilities, clipped to 1e-7 from 0 and 1.

    Raises:
        TaskError: values outside [0, 1].
    """
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise TaskError(
            f"calibration takes probabilities from 0 to 1, got {np.nanmin(probabilities):.4g} to "
            f"{np.nanmax(probabilities):.4g}; pass logits through a sigmoid first"
        )
    clipped = np.clip(probabilities.astype(np.float64), CLIP, 1 - CLIP)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))


@dataclass(frozen=True)
class Temperature:
    """Divisor of the logits of every label; `at_bound` marks those that reached the end of what is sought.

    A label without both classes among the rows it was found on keeps 1 where each label has its own. `softmax` marks
    the one temperature of a categorical label: it divides the logarithms of its probabilities, which then add up to 1.
    """

    values: Float[np.ndarray, " L"]
    labels: tuple[str, ...]
    at_bound: tuple[bool, ...]
    shared: bool
    fitted_on: FittedOn = field(repr=False)
    softmax: bool = False

    def apply(self, scored: Scored) -> Float[np.ndarray, "N L"]:
        """Calibrated probabilities of other samples.

        Raises:
            LeakError: a sample or group was used to find the temperature. TaskError: other labels, no probabilities.
        """
        if scored.labels != self.labels:
            raise TaskError(f"temperatures of {', '.join(self.labels)} do not fit scores of {', '.join(scored.labels)}")
        self.fitted_on.check_apart(scored, "a temperature")
        if self.softmax:
            return np.where(scored.mask, _softmax(_log(scored.scores) / self.values), scored.scores)
        valid = np.where(scored.mask, scored.scores, 0.5)
        return np.where(scored.mask, _sigmoid(logits_of(valid) / self.values), scored.scores)


def fit_temperature(validation: Scored, *, shared: bool = False) -> Temperature:
    """The temperature that minimises the log loss of validation rows, one for each label or one `shared` by all.

    The loss is convex in 1 / T, so the root of its slope is found by Newton's method inside a shrinking bracket.

    Raises:
        TaskError: no label has both classes, or scores that are no probabilities.
    """
    pairs = [
        (logits_of(validation.scores[rows, column]), validation.y[rows, column].astype(np.float64))
        for column, rows in enumerate(validation.mask.T)
    ]
    usable = [0 < y.sum() < len(y) for _, y in pairs]
    if not any(usable):
        raise TaskError("no label has both classes among the validation rows, so no temperature can be found")
    if shared:
        kept = [pair for pair, keep in zip(pairs, usable) if keep]
        sharpness = np.full(
            len(pairs), _sharpness(np.concatenate([z for z, _ in kept]), np.concatenate([y for _, y in kept]))
        )
    else:
        sharpness = np.array([_sharpness(z, y) if keep else 1.0 for (z, y), keep in zip(pairs, usable)])
    bound = np.isin(sharpness, SHARPNESS)
    return Temperature(1 / sharpness, validation.labels, tuple(bound.tolist()), shared, FittedOn.of(validation))


def fit_class_temperature(validation: Scored) -> Temperature:
    """The temperature of a categorical label: `validation` has a column for each class, 1 for the class of a row.

    The log loss of softmax(log(p) / T) is convex in 1 / T as well.

    Raises:
        TaskError: rows of one class alone, or scores that are no probabilities.
    """
    rows = validation.mask.all(1)
    number = validation.y[rows].argmax(1)
    if len(np.unique(number)) < 2:
        raise TaskError("the validation rows are of one class, so no temperature can be found")
    z = _log(validation.scores[rows])
    own = z[np.arange(len(z)), number].sum()

    def slopes(b: float) -> tuple[float, float]:
        p = _softmax(z * b)
        mean = (p * z).sum(1)
        return float(mean.sum() - own), float(((p * z * z).sum(1) - mean**2).sum())

    sharpness = _root(slopes)
    count = len(validation.labels)
    bound = (sharpness in SHARPNESS,) * count
    fitted_on = FittedOn.of(validation)
    return Temperature(np.full(count, 1 / sharpness), validation.labels, bound, True, fitted_on, softmax=True)


def _log(probabilities: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
    """Logarithms, of 1e-7 at least."""
    logits_of(probabilities)  # refuses what is no probability
    return np.log(np.maximum(probabilities.astype(np.float64), CLIP))


def _softmax(z: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
    powers = np.exp(z - z.max(1, keepdims=True, initial=-np.inf))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def _sharpness(z: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """1 / T where the slope sum(z (sigmoid(z b) - y)) of the convex log loss is zero, or the bound it points to."""

    def slopes(b: float) -> tuple[float, float]:
        p = _sigmoid(z * b)
        return float(z @ (p - y)), float((z * z) @ (p * (1 - p)))

    return _root(slopes)


def _root(slopes: Callable[[float], tuple[float, float]]) -> float:
    """Where a rising slope is zero, by Newton's method in a shrinking bracket; `slopes` gives it and its derivative."""
    low, high = SHARPNESS
    if slopes(low)[0] >= 0:
        return low
    if slopes(high)[0] <= 0:
        return high
    b = 1.0
    for _ in range(200):
        value, curvature = slopes(b)
        low, high = (b, high) if value < 0 else (low, b)
        step = b - value / curvature if curvature > 0 else low
        after = step if low < step < high else (low * high) ** 0.5
        if abs(after - b) <= 1e-12 * b:
            return after
        b = after
    return b


def _sigmoid(z: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * z)))


def brier(
    y: np.ndarray, probabilities: Float[np.ndarray, "N L"], mask: Bool[np.ndarray, "N L"]
) -> Float[np.ndarray, " L"]:
    """Mean squared distance of every label's probability to 0 or 1; NaN without a valid row. Source: Brier 1950."""
    return np.array([_mean(np.square(probabilities[r, c] - y[r, c])) for c, r in enumerate(mask.T)])


def brier_classes(y: np.ndarray, probabilities: Float[np.ndarray, "N C"]) -> float:
    """Brier score of a categorical label: squared distances summed over classes, mean over rows, so from 0 to 2."""
    return _mean(np.square(probabilities - np.eye(probabilities.shape[1])[y]).sum(1))


def expected_calibration_error(
    y: np.ndarray,
    probabilities: Float[np.ndarray, " N"],
    *,
    num_bins: int = NUM_BINS,
    bins: Literal["width", "mass"] = "width",
) -> float:
    """Mean distance of a bin's mean probability to its share of positives, weighted by the rows in it.

    Bins are of equal `width` over [0, 1], a value on a border in the lower one (Guo et al. 2017), or of equal `mass`:
    the rows in order of probability cut into parts whose sizes differ by one at most (Nixon et al. 2019). For a
    categorical label pass the largest probability, and as `y` whether its class is right. NaN without rows.

    Raises:
        ConfigError: fewer than one bin. TaskError: values outside [0, 1].
    """
    if num_bins < 1:
        raise ConfigError(f"num_bins must be at least 1, got {num_bins}")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise TaskError("calibration takes probabilities from 0 to 1; pass logits through a sigmoid first")
    if not len(y):
        return float("nan")
    if bins == "width":
        number = np.clip(np.ceil(probabilities * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    else:
        number = np.zeros(len(y), np.int64)
        number[np.argsort(probabilities, kind="stable")] = np.arange(len(y)) * num_bins // len(y)
    gap = np.bincount(number, probabilities - y, num_bins)
    return float(np.abs(gap).sum() / len(y))


def calibration(scored: Scored, *, num_bins: int = NUM_BINS) -> list[dict[str, float | str]]:
    """ECE (both kinds of bins) and Brier score of every label: `[{"label", "ece", "ece_mass", "brier"}]`."""
    scores = brier(scored.y, scored.scores, scored.mask)
    found: list[dict[str, float | str]] = []
    for column, label in enumerate(scored.labels):
        rows = scored.mask[:, column]
        pair = scored.y[rows, column], scored.scores[rows, column]
        found.append(
            {
                "label": label,
                "ece": expected_calibration_error(*pair, num_bins=num_bins),
                "ece_mass": expected_calibration_error(*pair, num_bins=num_bins, bins="mass"),
                "brier": float(scores[column]),
            }
        )
    return found


def class_calibration(scored: Scored, *, num_bins: int = NUM_BINS) -> dict[str, float]:
    """The same of a categorical label with a column for each class: ECE of the largest probability, Brier over all."""
    rows = scored.mask.all(1)
    y, probabilities = scored.y[rows].argmax(1), scored.scores[rows].astype(np.float64)
    right = (probabilities.argmax(1) == y).astype(np.float64)
    largest = probabilities.max(1, initial=0)
    return {
        "ece": expected_calibration_error(right, largest, num_bins=num_bins),
        "ece_mass": expected_calibration_error(right, largest, num_bins=num_bins, bins="mass"),
        "brier": brier_classes(y, probabilities),
    }


def _mean(values: Float[np.ndarray, " n"]) -> float:
    return float(values.mean()) if len(values) else float("nan")
