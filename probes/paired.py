"""Two sets of scores for the same samples: how much they differ, how surely, and whether by less than a margin.

All of it is paired: the same patients are resampled for both, and DeLong's covariance is that of both AUROCs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from featstore.errors import ConfigError
from probes.checks import Kind
from probes.delong import normal_p, placements
from probes.draws import Draws
from probes.metrics import Decisions, MetricName, decide
from probes.multiplicity import benjamini_hochberg, holm
from probes.statistics import interval, resample_decisions

FEW = 20  # below so many positives, negatives or patients an interval is not to be trusted


@dataclass(frozen=True)
class Pair:
    """Samples that both models scored, with one truth: arrays as `probes.metrics.evaluate` takes them."""

    ids: tuple[str, ...]
    groups: Shaped[np.ndarray, " N"]
    labels: tuple[str, ...]
    kind: Kind
    y: np.ndarray
    mask: Bool[np.ndarray, "N ..."]
    a: Float[np.ndarray, "N L"]
    b: Float[np.ndarray, "N L"]

    def part(self, rows: Bool[np.ndarray, " N"]) -> "Pair":
        """Some of the samples."""
        return replace(
            self,
            ids=tuple(name for name, keep in zip(self.ids, rows) if keep),
            groups=self.groups[rows],
            y=self.y[rows],
            mask=self.mask[rows],
            a=self.a[rows],
            b=self.b[rows],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Criteria:
    """What is asked of a pair. `margin` is the largest loss that does not matter, in units of the metric."""

    metric: MetricName = "auroc"
    margin: float | None = None
    level: float = 0.95
    num_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.margin is not None and not 0 < self.margin < 1:
            raise ConfigError(f"a margin lies between 0 and 1, got {self.margin}")
        if not 0 < self.level < 1:
            raise ConfigError(f"level must lie between 0 and 1, got {self.level}")


Thresholds = float | Float[np.ndarray, " L"]


def compare_pair(pair: Pair, test: Criteria, thresholds: tuple[Thresholds, Thresholds] = (0.5, 0.5)) -> dict[str, Any]:
    """A - B of one metric, macro and per label, with intervals and p-values; plain values.

    `{"metric", "level", "margin", "num_resamples", "seed", "draws", "num_groups", "macro": entry, "per_label":
    [entry], "few": [str]}`. An entry holds `a`, `b` and `delta`, each with a percentile interval; two-sided `p` by
    bootstrap and, for AUROC, by DeLong; with a margin the p-values of non-inferiority (A is not worse than B by the
    margin) and equivalence, and whether they hold; of labels also n, positives, patients and the p-values adjusted
    over the family of all labels, by Holm and by Benjamini and Hochberg.
    Labels with a single class have no AUROC and are left out of the macro and of the family.
    """
    parts = [
        decide(pair.y, scores, pair.mask, kind=pair.kind, labels=pair.labels, threshold=threshold)
        for scores, threshold in zip((pair.a, pair.b), thresholds)
    ]
    valid = parts[0].valid
    draws = Draws.of(pair.groups[np.asarray(valid.any(1))], num_resamples=test.num_resamples, seed=test.seed)
    points = [_once(decisions, test.metric) for decisions in parts]
    resamples = [resample_decisions(decisions, pair.groups, draws, metrics=(test.metric,)) for decisions in parts]
    variances, macro_variance = _variances(parts, pair.groups, draws) if test.metric == "auroc" else (None, None)
    per_label = []
    for column, label in enumerate(parts[0].labels):
        rows = np.flatnonzero(valid[:, column])
        values = [found.per_label[test.metric][:, column] for found in resamples]
        variance = None if variances is None else float(variances[column])
        counts: dict[str, Any] = {
            "label": label,
            "n": len(rows),
            "positives": int(parts[0].y[rows, column].sum()),
            "patients": len(np.unique(pair.groups[rows])),
        }
        per_label.append(counts | _entry([point[0][column] for point in points], values, variance, test))
    _adjust(per_label)
    macro = _entry(
        [point[1] for point in points], [found.macro[test.metric] for found in resamples], macro_variance, test
    )
    return {
        "metric": test.metric,
        "level": test.level,
        "margin": test.margin,
        "num_resamples": test.num_resamples,
        "seed": test.seed,
        "draws": draws.digest,
        "num_groups": len(draws.groups),
        "num_labels": sum(bool(0 < entry["positives"] < entry["n"]) for entry in per_label),
        "macro": macro,
        "per_label": per_label,
        "few": _few(per_label, len(draws.groups)),
    }


def _once(decisions: Decisions, metric: MetricName) -> tuple[Float[np.ndarray, " L"], float]:
    """(per label, macro) on the samples themselves: a resample that draws every row once."""
    rows = np.arange(len(decisions.y))
    found = resample_decisions(decisions, rows, Draws(rows, np.ones((1, len(rows)), np.uint8), 0), metrics=(metric,))
    return found.per_label[metric][0], float(found.macro[metric][0])


def _variances(parts: Sequence[Decisions], groups: np.ndarray, draws: Draws) -> tuple[Float[np.ndarray, " L"], float]:
    """DeLong's variance of the difference of AUROCs, per label and of the mean over labels with both classes.

    That of the mean adds up what each group moves it by over labels, as labels share patients.
    """
    y, valid = parts[0].y, parts[0].valid
    variances = np.full(y.shape[1], np.nan)
    moved, count = np.zeros(len(draws.groups)), 0
    for column in range(y.shape[1]):
        rows = np.flatnonzero(valid[:, column])
        if not 0 < y[rows, column].sum() < len(rows):
            continue
        scores = np.stack([decisions.scores[rows, column] for decisions in parts], axis=1).astype(np.float64)
        placed = placements(y[rows, column], scores, groups[rows])
        covariance = placed.covariance()
        variances[column] = max(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1], 0.0)
        influence = placed.influence()
        moved[np.searchsorted(draws.groups, placed.groups)] += influence[0] - influence[1]
        count += 1
    return variances, float(np.square(moved / count).sum()) if count else float("nan")


def _entry(
    points: list[float], values: list[Float[np.ndarray, " B"]], variance: float | None, test: Criteria
) -> dict[str, Any]:
    delta = float(points[0] - points[1])
    differences = values[0] - values[1]
    entry: dict[str, Any] = {
        "a": {"value": float(points[0]), **interval(values[0], test.level)},
        "b": {"value": float(points[1]), **interval(values[1], test.level)},
        "delta": {"value": delta, **interval(differences, test.level)},
        "p": {"bootstrap": bootstrap_p(differences)},
    }
    error = None if variance is None else float(np.sqrt(variance))
    if error is not None:
        entry["delta"]["standard_error"] = error
        entry["p"]["delong"] = 2 * _normal(abs(delta), error)
    if test.margin is not None:
        entry |= _margins(differences, delta, error, test.margin, test.level)
    return entry


def bootstrap_p(differences: Float[np.ndarray, " B"]) -> float:
    """Two-sided p of no difference: twice the smaller share of resamples on either side of zero.

    At most a where the percentile interval of level 1 - a leaves zero out. Resamples at zero count on both sides, and
    the sample itself counts as one of them, so p is never 0; NaN where no resample is defined.
    """
    smaller = min(_share(differences <= 0, differences), _share(differences >= 0, differences))
    return 2 * smaller if not smaller > 0.5 else 1.0


def _share(beyond: Bool[np.ndarray, " B"], differences: Float[np.ndarray, " B"]) -> float:
    count = int((~np.isnan(differences)).sum())
    return (int(beyond.sum()) + 1) / (count + 1) if count else float("nan")


def _margins(
    differences: Float[np.ndarray, " B"], delta: float, error: float | None, margin: float, level: float
) -> dict[str, Any]:
    """Non-inferiority at (1 - level) / 2, one-sided, so that the two-sided interval decides it; equivalence by two
    one-sided tests at 1 - level each (Schuirmann 1987)."""
    lower, upper = _share(differences <= -margin, differences), _share(differences >= margin, differences)
    found: dict[str, dict[str, Any]] = {
        "noninferiority": {"p": {"bootstrap": lower}},
        "equivalence": {"p": {"bootstrap": float(np.max([lower, upper]))}},
    }
    if error is not None:
        low, high = _normal(delta + margin, error), _normal(margin - delta, error)
        found["noninferiority"]["p"]["delong"] = low
        found["equivalence"]["p"]["delong"] = float(np.max([low, high]))
    limits = {"noninferiority": (1 - level) / 2, "equivalence": 1 - level}
    for name, item in found.items():
        item["holds"] = {way: bool(p <= limits[name]) for way, p in item["p"].items()}
    return found


def _normal(distance: float, error: float) -> float:
    """Upper tail of a normal deviate; without spread all or nothing, NaN without an error."""
    if error != error or distance != distance:
        return float("nan")
    if error == 0:
        return 0.5 if distance == 0 else float(distance < 0)
    return normal_p(distance / error)


def _adjust(per_label: list[dict[str, Any]]) -> None:
    """Add the p-values adjusted over all labels; labels with a single class are not tested."""
    for name, adjust in (("p_holm", holm), ("p_bh", benjamini_hochberg)):
        for way in per_label[0]["p"] if per_label else ():
            values = adjust(np.array([entry["p"][way] for entry in per_label]))
            for entry, value in zip(per_label, values.tolist()):
                entry.setdefault(name, {})[way] = value


def _few(per_label: list[dict[str, Any]], num_groups: int) -> list[str]:
    """Warnings where there is too little to judge by."""
    found = []
    if num_groups < FEW:
        found.append(f"only {num_groups} patients: fewer than {FEW}, intervals and p-values are unreliable")
    for entry in per_label:
        numbers = {
            "positives": entry["positives"],
            "negatives": entry["n"] - entry["positives"],
            "patients": entry["patients"],
        }
        scarce = [f"{count} {name}" for name, count in numbers.items() if count < FEW]
        if scarce:
            found.append(f"{entry['label']}: {', '.join(scarce)} (fewer than {FEW}); do not rely on its interval")
    return found
