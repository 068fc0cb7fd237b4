"""Decision thresholds by Youden's index, found on one part of the data and applied to another.

A threshold remembers the samples and groups it was found on and refuses rows of them. The published variant that finds
it on the test rows themselves has a function of its own, whose results say `optimistic`.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from featstore.errors import LeakError, TaskError
from probes.draws import Draws
from probes.metrics import MetricName, Metrics, auroc, decide, evaluate
from probes.ranking import Ranking, Standing, best_youden, fits_lanes, pack, resample_steps
from probes.statistics import interval, resample_decisions

# What a decision has; a ranking has none of it.
DECISIONS: tuple[MetricName, ...] = (
    "sensitivity", "specificity", "f1", "balanced_accuracy", "accuracy", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """Scored samples of one part of a multi-label task: what a threshold or temperature is found on or applied to.

    `ids` name the samples, `groups` their patients; both tell parts of the data apart. Scores of two heads, or of one
    head for train and validation, are two of these.
    """

    y: np.ndarray
    scores: Float[np.ndarray, "N L"]
    mask: Bool[np.ndarray, "N L"]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.groups) == len(self.y) == len(self.scores) == len(self.mask):
            raise TaskError(
                f"labels, scores, mask, ids and groups have one entry a row; got {len(self.y)}, {len(self.scores)}, "
                f"{len(self.mask)}, {len(self.ids)} and {len(self.groups)}"
            )
        if self.scores.shape[1] != len(self.labels):
            raise TaskError(f"{len(self.labels)} label names for {self.scores.shape[1]} columns of scores")


@dataclass(frozen=True)
class FittedOn:
    """The samples that something was found on."""

    ids: frozenset[str]
    groups: frozenset[str]

    @classmethod
    def of(cls, scored: Scored) -> "FittedOn":
        return cls(frozenset(scored.ids), frozenset(scored.groups))

    def check_apart(self, scored: Scored, what: str) -> None:
        """None of these samples, and no other sample of their groups, is among those it is applied to.

        Raises:
            LeakError: some are.
        """
        for names, own, text in ((scored.ids, self.ids, "samples"), (scored.groups, self.groups, "groups (patients)")):
            shared = own.intersection(names)
            if shared:
                raise LeakError(
                    f"{what} must not be applied to what it was found on: {len(shared)} {text} are in both, such as "
                    f"{min(shared)!r}; find it on validation rows"
                )


@dataclass(frozen=True)
class Thresholds:
    """One threshold a label (decide positive at or above), and what it was found on.

    `pooled` marks labels without both classes there: they take the median of the others.
    """

    values: Float[np.ndarray, " L"]
    labels: tuple[str, ...]
    pooled: tuple[bool, ...]
    fitted_on: FittedOn = field(repr=False)

    def evaluate(self, scored: Scored) -> Metrics:
        """Metrics of other samples at these thresholds.

        Raises:
            LeakError: a sample or group was used to find them. TaskError: other labels.
        """
        self.check(scored)
        return evaluate(
            scored.y, scored.scores, scored.mask, kind="multilabel", labels=self.labels, threshold=self.values
        )

    def intervals(self, scored: Scored, draws: Draws, *, level: float = 0.95) -> dict[str, Any]:
        """Percentile intervals of the metrics of decisions, macro and per label, on a table of resamples of patients.

        The thresholds stay as they are: the intervals hold the chance of the test rows alone.

        Raises:
            LeakError: a sample or group was used to find them. TaskError: other labels.
        """
        self.check(scored)
        decisions = decide(
            scored.y, scored.scores, scored.mask, kind="multilabel", labels=self.labels, threshold=self.values
        )
        values = resample_decisions(decisions, np.array(scored.groups), draws, metrics=DECISIONS)
        return {
            "level": level,
            "draws": draws.digest,
            "macro": {name: interval(values.macro[name], level) for name in DECISIONS},
            "per_label": [
                {"label": label, **{name: interval(values.per_label[name][:, column], level) for name in DECISIONS}}
                for column, label in enumerate(self.labels)
            ],
        }

    def check(self, scored: Scored) -> None:
        """Labels are the same and no sample or group was used to find the thresholds.

        Raises:
            LeakError, TaskError: otherwise.
        """
        if scored.labels != self.labels:
            raise TaskError(f"thresholds of {', '.join(self.labels)} do not fit scores of {', '.join(scored.labels)}")
        self.fitted_on.check_apart(scored, "a threshold")


def youden_threshold(y: np.ndarray, scores: Float[np.ndarray, " N"]) -> float:
    """The score at or above which sensitivity + specificity is largest; of equal ones the highest.

    Infinite (nothing is positive) where no cut is better than that; NaN with one class. Source: Youden 1950.
    """
    if auroc(y, scores) != auroc(y, scores):
        return float("nan")
    ranking = Ranking.of(y, scores)
    hits = len(ranking.positives) - ranking.first_tied
    gain = hits * len(ranking.negatives) + ranking.below * len(ranking.positives)
    best = len(gain) - 1 - int(gain[::-1].argmax())
    if gain[best] <= len(ranking.positives) * len(ranking.negatives):
        return float("inf")
    return float(scores[ranking.positives[best]])


def fit_thresholds(validation: Scored) -> Thresholds:
    """Youden's threshold of every label on rows that the head was not fitted on.

    Raises:
        TaskError: no label has both classes.
    """
    found = np.array(
        [
            youden_threshold(validation.y[rows, column], validation.scores[rows, column])
            for column, rows in enumerate(validation.mask.T)
        ]
    )
    pooled = np.isnan(found)
    if pooled.all():
        raise TaskError("no label has both classes among the validation rows, so no threshold can be found")
    found[pooled] = np.median(found[~pooled])
    return Thresholds(found, validation.labels, tuple(pooled.tolist()), FittedOn.of(validation))


def optimistic_youden(test: Scored, draws: Draws | None = None, *, level: float = 0.95) -> dict[str, Any]:
    """The metrics of decisions at the threshold that is best on the test rows themselves, as some papers print.

    These numbers are too good: they say what the scores could do, not what a decision does. `{"optimistic": True,
    "macro", "per_label": [{"label", "threshold", metric, ...}]}`; labels with a single class are left out. With `draws`
    also `intervals` (of every label too), in which each resample has its own threshold, found on its own rows; a macro
    value is NaN in a resample that lacks a class of a label.
    """
    found: list[dict[str, Any]] = []
    every = []
    for number, label in enumerate(test.labels):
        rows = np.flatnonzero(test.mask[:, number])
        y, scores = test.y[rows, number], test.scores[rows, number]
        threshold = youden_threshold(y, scores)
        if threshold != threshold:
            continue
        ranking = Ranking.of(y, scores)
        own = _decided(ranking.standing(np.ones((1, len(rows)), np.uint8)))[0].tolist()
        found.append({"label": label, "threshold": threshold, **dict(zip(DECISIONS, own))})
        if draws is not None:
            every.append(_resampled(test, rows, ranking, draws))
            found[-1]["intervals"] = _intervals(every[-1], level)
    nan = float("nan")
    macro = {name: float(np.mean([entry[name] for entry in found])) if found else nan for name in DECISIONS}
    result: dict[str, Any] = {"optimistic": True, "macro": macro, "per_label": found}
    if draws is not None:
        mean = np.mean(every, axis=0) if every else np.full((len(draws.counts), len(DECISIONS)), nan)
        result["intervals"] = {"level": level, "draws": draws.digest, "macro": _intervals(mean, level)}
    return result


def _intervals(values: Float[np.ndarray, "B M"], level: float) -> dict[str, Any]:
    return {name: interval(values[:, place], level) for place, name in enumerate(DECISIONS)}


def _resampled(test: Scored, rows: Int[np.ndarray, " n"], ranking: Ranking, draws: Draws) -> Float[np.ndarray, "B M"]:
    """`DECISIONS` of one label on every resample; `rows` are those that have the label, in the order of `ranking`."""
    columns = draws.columns(np.array(test.groups)[rows])
    renumbered = ranking.renumbered(columns)
    packable = fits_lanes([columns], draws.counts)
    values = np.full((len(draws.counts), len(DECISIONS)), np.nan)
    for block in resample_steps(len(rows), len(draws.counts)):
        counts = draws.counts[block]
        at = renumbered.packed_standing(pack(counts)) if packable else renumbered.standing(counts)
        values[block] = _decided(at)[: len(counts)]
    return values


def _decided(at: Standing) -> Float[np.ndarray, "B M"]:
    """`DECISIONS` of every resample at its own best cut; NaN where a class has no weight."""
    sensitivity, specificity = best_youden(at).T
    with np.errstate(invalid="ignore", divide="ignore"):
        hits, false = sensitivity * at.num_positive, (1 - specificity) * at.num_negative
        right = hits + specificity * at.num_negative
        columns = [
            sensitivity,
            specificity,
            2 * hits / (hits + false + at.num_positive),
            (sensitivity + specificity) / 2,
            right / (at.num_positive + at.num_negative),
            np.where(hits + false == 0, 0 * hits, hits / (hits + false)),
        ]
    return np.stack(columns, 1)
