"""Two sets of scores for the same samples: how much they differ, how surely, and whether by less than a margin.

All of it is paired: the same patients are resampled for both, and DeLong's covariance is that of both AUROCs. Either
side may be several models that differ in their seed; then means over seeds are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Shaped

from featstore.errors import ConfigError
from probes.delong import normal_p, placements
from probes.draws import Draws
from probes.labels import TargetKind
from probes.metrics import METRICS, Decisions, MetricName, decide
from probes.multiplicity import benjamini_hochberg, holm
from probes.regression import NUMBER_METRICS, check_numbers, resample_numbers
from probes.scoring import HEADLINE
from probes.statistics import interval, resample_decisions

FEW = 20  # below so many positives, negatives or patients an interval is not to be trusted
NumberMetric = Literal["mae", "rmse", "r2", "pearson", "spearman", "qwk"]
LOSSES = ("mae", "rmse")  # smaller is better, and in units of the target


@dataclass(frozen=True)
class Pair:
    """Samples that both models scored, with one truth: arrays as `probes.metrics.evaluate` takes them.

    `further` are the scores of more models of A and of B, which differ from the first in their seed; with
    `same_seeds` those of A and B in one place have the same. `num_classes` is of ranks.
    """

    ids: tuple[str, ...]
    groups: Shaped[np.ndarray, " N"]
    labels: tuple[str, ...]
    kind: TargetKind
    y: np.ndarray
    mask: Bool[np.ndarray, "N ..."]
    a: Float[np.ndarray, "N L"]
    b: Float[np.ndarray, "N L"]
    further: tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]] = ((), ())
    same_seeds: bool = False
    num_classes: int = 0

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
            further=(tuple(x[rows] for x in self.further[0]), tuple(x[rows] for x in self.further[1])),
        )

    @property
    def models(self) -> list[np.ndarray]:
        """Scores of every model: those of A, then those of B."""
        return [self.a, *self.further[0], self.b, *self.further[1]]

    @property
    def num_models(self) -> tuple[int, int]:
        """How many models A and B are."""
        return 1 + len(self.further[0]), 1 + len(self.further[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Criteria:
    """What is asked of a pair. `margin` is the largest loss that does not matter, in units of the metric.

    Without a metric it is AUROC, of numbers R2, of ranks quadratic weighted kappa.
    """

    metric: MetricName | NumberMetric | None = None
    margin: float | None = None
    level: float = 0.95
    num_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.metric in LOSSES:
            if self.margin is not None and not 0 < self.margin < float("inf"):
                raise ConfigError(f"a margin of {self.metric} lies above 0, got {self.margin}")
        elif self.margin is not None and not 0 < self.margin < 1:
            raise ConfigError(f"a margin lies between 0 and 1, got {self.margin}")
        if not 0 < self.level < 1:
            raise ConfigError(f"level must lie between 0 and 1, got {self.level}")

    def of(self, kind: TargetKind) -> "Criteria":
        """The same with the metric of a kind of task where none was named.

        Raises:
            ConfigError: the kind has no such metric.
        """
        known = NUMBER_METRICS[kind] if kind in ("regression", "ordinal") else METRICS
        if self.metric is not None and self.metric not in known:
            raise ConfigError(f"{self.metric} is no metric of {kind} tasks; they have {', '.join(known)}")
        return self if self.metric else replace(self, metric=HEADLINE[kind])  # type: ignore[arg-type]


Thresholds = float | Float[np.ndarray, " L"]


@dataclass(frozen=True)
class _Measured:
    """A metric of M models on the samples (`per_label` (M, L), `macro` (M,)) and on every resample.

    `counts` say of each label how many rows, positives and patients it has and whether it is tested. `errors` are
    DeLong's standard errors of A - B, per label and macro, where the metric is AUROC.
    """

    per_label: Float[np.ndarray, "M L"]
    macro: Float[np.ndarray, " M"]
    resampled: Float[np.ndarray, "M B L"]
    resampled_macro: Float[np.ndarray, "M B"]
    labels: tuple[str, ...]
    counts: list[dict[str, Any]]
    errors: tuple[Float[np.ndarray, " L"], float] | None


def compare_pair(
    pair: Pair,
    test: Criteria,
    thresholds: tuple[Thresholds | list[Thresholds], Thresholds | list[Thresholds]] = (0.5, 0.5),
) -> dict[str, Any]:
    """A - B of one metric, macro and per label, with intervals and p-values; plain values.

    `{"metric", "level", "margin", "num_resamples", "seed", "draws", "num_groups", "macro": entry, "per_label":
    [entry], "few": [str]}`. An entry holds `a`, `b` and `delta`, each with a percentile interval; two-sided `p` by
    bootstrap and, for AUROC, by DeLong; with a margin the p-values of non-inferiority (A is not worse than B by the
    margin) and equivalence, and whether they hold; of labels also n, positives, patients and the p-values adjusted
    over the family of all labels, by Holm and by Benjamini and Hochberg. With several seeds also `seeds`, see
    `_seeds`. `thresholds` are of A and of B, a list of those of each seed.
    Labels with a single class (targets with a single value) have no metric and are left out of the macro and of the
    family.

    Raises:
        ConfigError: a metric that the kind of task does not have.
    """
    test = test.of(pair.kind)
    valid = pair.mask if pair.mask.ndim == 1 else pair.mask.any(1)
    draws = Draws.of(pair.groups[np.asarray(valid)], num_resamples=test.num_resamples, seed=test.seed)
    if pair.kind in ("regression", "ordinal"):
        found = _measure_numbers(pair, test, draws)
    else:
        each = [
            limit
            for limits, count in zip(thresholds, pair.num_models)
            for limit in (limits if isinstance(limits, list) else [limits] * count)
        ]
        found = _measure_labels(pair, test, draws, each)
    per_label = []
    for column, label in enumerate(found.labels):
        error = None if found.errors is None else float(found.errors[0][column])
        entry = _entry(pair, found.per_label[:, column], found.resampled[:, :, column], error, test)
        per_label.append({"label": label, **found.counts[column]} | entry)
    _adjust(per_label)
    macro = _entry(pair, found.macro, found.resampled_macro, None if found.errors is None else found.errors[1], test)
    return {
        "metric": test.metric,
        "level": test.level,
        "margin": test.margin,
        "num_resamples": test.num_resamples,
        "seed": test.seed,
        "draws": draws.digest,
        "num_groups": len(draws.groups),
        "num_labels": sum(entry.pop("tested") for entry in per_label),
        "macro": macro,
        "per_label": per_label,
        "few": _few(per_label, len(draws.groups)),
    }


def _measure_labels(pair: Pair, test: Criteria, draws: Draws, thresholds: Sequence[Thresholds]) -> _Measured:
    parts = [
        decide(pair.y, scores, pair.mask, kind=pair.kind, labels=pair.labels, threshold=threshold)  # type: ignore[arg-type]
        for scores, threshold in zip(pair.models, thresholds)
    ]
    metric: MetricName = test.metric  # type: ignore[assignment]
    points = [_once(decisions, metric) for decisions in parts]
    resamples = [resample_decisions(decisions, pair.groups, draws, metrics=(metric,)) for decisions in parts]
    counts = []
    for column in range(len(parts[0].labels)):
        rows = np.flatnonzero(parts[0].valid[:, column])
        positives = int(parts[0].y[rows, column].sum())
        patients = len(np.unique(pair.groups[rows]))
        tested = 0 < positives < len(rows)
        counts.append({"n": len(rows), "positives": positives, "patients": patients, "tested": tested})
    return _Measured(
        np.stack([point[0] for point in points]),
        np.array([point[1] for point in points]),
        np.stack([item.per_label[metric] for item in resamples]),
        np.stack([item.macro[metric] for item in resamples]),
        parts[0].labels,
        counts,
        _errors(parts, pair, draws) if metric == "auroc" else None,
    )


def _measure_numbers(pair: Pair, test: Criteria, draws: Draws) -> _Measured:
    """The sample itself is one more resample, in which every group stands once."""
    metric = str(test.metric)
    rows = draws.columns(pair.groups, np.asarray(pair.mask.any(1)))
    counts = np.concatenate([np.ones((1, len(draws.groups)), np.uint8), draws.counts])
    found = []
    for scores in pair.models:
        check_numbers(np.where(pair.mask, pair.y, 0.0), np.where(pair.mask, scores, 0.0), pair.mask)
        found.append(
            resample_numbers(
                pair.y,
                scores,
                pair.mask,
                rows,
                counts,
                kind="ordinal" if pair.kind == "ordinal" else "regression",
                num_classes=pair.num_classes,
            )
        )
    values = np.stack([per_label[metric] for per_label, _ in found])
    macro = np.stack([item[metric] for _, item in found])
    about = [
        {
            "n": int(known.sum()),
            "patients": len(np.unique(pair.groups[known])),
            "tested": len(np.unique(pair.y[known, column])) > 1,
        }
        for column, known in enumerate(pair.mask.T)
    ]
    for column, entry in enumerate(about):
        if not entry["tested"]:  # an error can be counted there, but no other metric of the macro
            values[:, :, column] = np.nan
    return _Measured(values[:, 0], macro[:, 0], values[:, 1:], macro[:, 1:], pair.labels, about, None)


def _once(decisions: Decisions, metric: MetricName) -> tuple[Float[np.ndarray, " L"], float]:
    """(per label, macro) on the samples themselves: a resample that draws every row once."""
    rows = np.arange(len(decisions.y))
    found = resample_decisions(decisions, rows, Draws(rows, np.ones((1, len(rows)), np.uint8), 0), metrics=(metric,))
    return found.per_label[metric][0], float(found.macro[metric][0])


def _contrast(pair: Pair) -> Float[np.ndarray, " M"]:
    """Weights of the models in A - B, means over seeds."""
    of_a, of_b = pair.num_models
    return np.concatenate([np.full(of_a, 1 / of_a), np.full(of_b, -1 / of_b)])


def _errors(parts: Sequence[Decisions], pair: Pair, draws: Draws) -> tuple[Float[np.ndarray, " L"], float]:
    """DeLong's standard error of the difference of AUROCs, per label and of the mean over labels with both classes.

    The variance of that mean adds up what each group moves it by over labels, as labels share patients.
    """
    y, valid, contrast = parts[0].y, parts[0].valid, _contrast(pair)
    variances = np.full(y.shape[1], np.nan)
    moved, count = np.zeros(len(draws.groups)), 0
    for column in range(y.shape[1]):
        rows = np.flatnonzero(valid[:, column])
        if not 0 < y[rows, column].sum() < len(rows):
            continue
        scores = np.stack([decisions.scores[rows, column] for decisions in parts], axis=1).astype(np.float64)
        placed = placements(y[rows, column], scores, pair.groups[rows])
        variances[column] = max(float(contrast @ placed.covariance() @ contrast), 0.0)
        moved[np.searchsorted(draws.groups, placed.groups)] += contrast @ placed.influence()
        count += 1
    macro = float(np.sqrt(np.square(moved / count).sum())) if count else float("nan")
    return np.sqrt(variances), macro


def _entry(
    pair: Pair,
    points: Float[np.ndarray, " M"],
    values: Float[np.ndarray, "M B"],
    error: float | None,
    test: Criteria,
) -> dict[str, Any]:
    of_a = pair.num_models[0]
    a, b = float(points[:of_a].mean()), float(points[of_a:].mean())
    means = values[:of_a].mean(0), values[of_a:].mean(0)
    delta, differences = a - b, means[0] - means[1]
    entry: dict[str, Any] = {
        "a": {"value": a, **interval(means[0], test.level)},
        "b": {"value": b, **interval(means[1], test.level)},
        "delta": {"value": delta, **interval(differences, test.level)},
        "p": {"bootstrap": bootstrap_p(differences)},
    }
    if error is not None:
        entry["delta"]["standard_error"] = error
        entry["p"]["delong"] = 2 * _normal(abs(delta), error)
    if len(points) > 2:
        entry["seeds"] = seeds_of(points, differences, pair, test.level)
    if test.margin is not None:
        sign = -1 if test.metric in LOSSES else 1  # of a loss, more is worse
        entry |= _margins(sign * differences, sign * delta, error, test.margin, test.level)
    return entry


def seeds_of(
    points: Float[np.ndarray, " M"], differences: Float[np.ndarray, " B"], pair: Pair, level: float
) -> dict[str, Any]:
    """`{"a": values, "b": values, "sd_a", "sd_b", "delta": {"standard_error", "low", "high"}}` of several seeds.

    The interval holds both the chance of the patients (the spread over resamples of means over seeds) and that of the
    seeds (their variance over their number; of the differences seed by seed where A and B have the same ones): the two
    variances add up, and Student's t has Satterthwaite's degrees of freedom. A side of one seed adds nothing for want
    of a spread.
    """
    from scipy.stats import t

    of_a, of_b = pair.num_models
    a, b = points[:of_a], points[of_a:]
    defined = differences[~np.isnan(differences)]
    parts = [
        (float(defined.var(ddof=1)) if len(defined) > 1 else float("nan"), max(len(np.unique(pair.groups)) - 1, 1))
    ]
    sides = [a - b] if pair.same_seeds else [a, b]
    parts += [(float(side.var(ddof=1)) / len(side), len(side) - 1) for side in sides if len(side) > 1]
    variance = sum(part for part, _ in parts)
    error = float(np.sqrt(variance))
    freedom = variance**2 / sum(part**2 / count for part, count in parts) if variance > 0 else float("inf")
    half = float(t.ppf(0.5 + level / 2, freedom)) * error if error == error else float("nan")
    delta = float(a.mean() - b.mean())
    return {
        "a": a.tolist(),
        "b": b.tolist(),
        "sd_a": float(a.std(ddof=1)) if of_a > 1 else None,
        "sd_b": float(b.std(ddof=1)) if of_b > 1 else None,
        "paired": pair.same_seeds,
        "delta": {"value": delta, "standard_error": error, "low": delta - half, "high": delta + half},
    }


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
        if not entry["n"]:  # not fitted, or blank throughout
            continue
        numbers = {"patients": entry["patients"]}
        if "positives" in entry:
            negatives = entry["n"] - entry["positives"]
            numbers = {"positives": entry["positives"], "negatives": negatives, **numbers}
        scarce = [f"{count} {name}" for name, count in numbers.items() if count < FEW]
        if scarce:
            found.append(f"{entry['label']}: {', '.join(scarce)} (fewer than {FEW}); do not rely on its interval")
    return found
