"""Discrimination and decision metrics, per label and macro, with masks. Ties count exactly one half.

Values equal scikit-learn's `roc_auc_score`, `average_precision_score`, `accuracy_score`, `balanced_accuracy_score`,
`f1_score`, `recall_score` and `precision_score` (0 where nothing is decided positive); labels with a single class have
no AUROC and are counted rather than guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from jaxtyping import Bool, Float

from featstore.errors import TaskError
from probes.checks import Kind, check_kind
from probes.ranking import Binary, Ranking

MetricName = Literal[
    "auroc", "auprc", "accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity", "precision"
]  # fmt: skip
METRICS: tuple[MetricName, ...] = (
    "auroc", "auprc", "accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity", "precision",
)  # fmt: skip


class Scores(TypedDict):
    """The metrics; NaN where one is not defined."""

    auroc: float
    auprc: float
    accuracy: float
    balanced_accuracy: float
    f1: float
    sensitivity: float
    specificity: float
    precision: float


class LabelScores(Scores):
    """Metrics of one label (or of one class against the rest) over its `n` valid rows."""

    label: str
    n: int
    positives: int


class Metrics(TypedDict):
    """What `evaluate` returns; plain values, ready for JSON but for NaN."""

    n: int
    macro: Scores
    per_label: list[LabelScores]
    skipped: int


def auroc(y: Binary, scores: Float[np.ndarray, " N"], weights: Float[np.ndarray, " N"] | None = None) -> float:
    """Area under the ROC curve of 0/1 labels; NaN when only one class is there.

    Raises:
        TaskError: labels other than 0 and 1, or NaN scores.
    """
    check_binary(y, scores)
    if weights is not None:
        return float(Ranking.of(y, scores).weighted(weights[None])[0][0])
    positive = y.astype(bool)
    high, low = np.sort(scores[positive]), np.sort(scores[~positive])
    if not len(high) or not len(low):
        return float("nan")
    won = int(np.searchsorted(low, high, "left").sum()) + int(np.searchsorted(low, high, "right").sum())
    return won / (2 * len(high) * len(low))


def average_precision(
    y: Binary, scores: Float[np.ndarray, " N"], weights: Float[np.ndarray, " N"] | None = None
) -> float:
    """Area under the precision-recall curve as a step function (no interpolation); NaN when only one class is there.

    Raises:
        TaskError: labels other than 0 and 1, or NaN scores.
    """
    check_binary(y, scores)
    rows = np.ones(len(y), np.int64) if weights is None else weights
    return float(Ranking.of(y, scores).weighted(rows[None])[1][0])


def check_binary(y: Binary, scores: Float[np.ndarray, " N"]) -> None:
    """Labels are 0 or 1, scores are numbers.

    Raises:
        TaskError: otherwise.
    """
    if np.isnan(scores).any():
        raise TaskError(
            f"scores must be numbers; row {int(np.flatnonzero(np.isnan(scores))[0])} is NaN; mask such rows out"
        )
    if len(y) and not np.isin(y, (0, 1)).all():
        raise TaskError(f"labels must be 0 or 1, found {np.unique(y)[:5].tolist()}; apply the label policy first")


@dataclass(frozen=True)
class Decisions:
    """One column per label: truth, ranking score, decision and validity of every row; what all metrics work from.

    `argmax` marks categorical labels, whose overall accuracy counts rows rather than labels.
    """

    y: Bool[np.ndarray, "N L"]
    scores: Float[np.ndarray, "N L"]
    decided: Bool[np.ndarray, "N L"]
    valid: Bool[np.ndarray, "N L"]
    labels: tuple[str, ...]
    argmax: bool


def decide(
    y: np.ndarray,
    scores: Float[np.ndarray, "N C"],
    mask: Bool[np.ndarray, "..."] | None = None,
    *,
    kind: Kind,
    labels: Sequence[str] | None = None,
    threshold: float | Float[np.ndarray, " C"] = 0.5,
) -> Decisions:
    """Bring both kinds of task into one form; arguments as in `evaluate`.

    Raises:
        TaskError: shapes, labels or scores that do not fit together. ConfigError: an unknown kind.
    """
    num_rows, num_columns = scores.shape
    names = tuple(labels) if labels is not None else tuple(str(column) for column in range(num_columns))
    if len(names) != num_columns:
        raise TaskError(f"{len(names)} label names given for {num_columns} columns of scores; give one name per column")
    check_kind(kind)
    shape = (num_rows, num_columns) if kind == "multilabel" else (num_rows,)
    valid = np.ones(shape, dtype=bool) if mask is None else mask
    if y.shape != shape or valid.shape != shape:
        raise TaskError(
            f"{kind} scores {scores.shape} need labels and mask of shape {shape}; got {y.shape} and {valid.shape}"
        )
    if kind == "multilabel":
        for column in range(num_columns):
            check_binary(y[valid[:, column], column], scores[valid[:, column], column])
        return Decisions((y == 1) & valid, scores, scores >= threshold, valid, names, argmax=False)
    if num_columns < 2:
        raise TaskError(f"a categorical label has at least two classes, got {num_columns} column of scores")
    if np.isnan(scores[valid]).any():
        raise TaskError("scores must be numbers; some are NaN; mask such rows out")
    if valid.any() and not 0 <= y[valid].min() <= y[valid].max() < num_columns:
        raise TaskError(f"classes must be 0 to {num_columns - 1}, found {y[valid].min()} to {y[valid].max()}")
    best = scores.argmax(1)
    valid = valid[:, None]
    if num_columns == 2:
        difference = scores[:, 1:].astype(np.float64) - scores[:, :1]
        return Decisions((y == 1)[:, None] & valid, difference, (best == 1)[:, None], valid, names[1:], argmax=True)
    classes = np.arange(num_columns)
    return Decisions(
        (y[:, None] == classes) & valid,
        scores,
        best[:, None] == classes,
        np.repeat(valid, num_columns, axis=1),
        names,
        argmax=True,
    )


def evaluate(
    y: np.ndarray,
    scores: Float[np.ndarray, "N C"],
    mask: Bool[np.ndarray, "..."] | None = None,
    *,
    kind: Kind,
    labels: Sequence[str] | None = None,
    threshold: float | Float[np.ndarray, " C"] = 0.5,
) -> Metrics:
    """All of `METRICS`, per label and macro.

    multilabel: `y` (N, L) of 0/1, `mask` (N, L); a label is decided positive where its score is at or above
    `threshold` (0.5 suits probabilities, 0 suits logits). multiclass: `y` (N,) class numbers, `mask` (N,); the class
    of the largest score is decided, `per_label` is each class against the rest; two classes give one entry, that of
    class 1, ranked by the difference of the two scores.

    Macro values are means over the labels with both classes; labels with fewer are NaN where a metric needs both, and
    counted in `skipped`. Of a categorical label the macro accuracy is the share of right rows, the balanced accuracy
    the mean recall of the classes that occur; the others of two classes are those of class 1.

    Raises:
        TaskError: shapes, labels or scores that do not fit together. ConfigError: an unknown kind.
    """
    decisions = decide(y, scores, mask, kind=kind, labels=labels, threshold=threshold)
    per_label = [_label_scores(decisions, column) for column in range(len(decisions.labels))]
    defined = [entry for entry in per_label if 0 < entry["positives"] < entry["n"]]
    macro: Scores = {name: _mean([entry[name] for entry in defined]) for name in METRICS}  # type: ignore[assignment]
    if decisions.argmax:
        macro["accuracy"], macro["balanced_accuracy"] = _categorical(decisions)
    return Metrics(
        n=int(decisions.valid.any(1).sum()), macro=macro, per_label=per_label, skipped=len(per_label) - len(defined)
    )


def _label_scores(decisions: Decisions, column: int) -> LabelScores:
    rows = decisions.valid[:, column]
    y, decided, scores = decisions.y[rows, column], decisions.decided[rows, column], decisions.scores[rows, column]
    one_class = y.all() or not y.any()
    nan = float("nan")
    sensitivity, specificity = (nan, nan) if one_class else (_mean(decided[y]), _mean(~decided[~y]))
    return LabelScores(
        label=decisions.labels[column],
        n=len(y),
        positives=int(y.sum()),
        auroc=auroc(y, scores),
        auprc=average_precision(y, scores),
        accuracy=_mean(y == decided),
        balanced_accuracy=(sensitivity + specificity) / 2,
        f1=nan if one_class else 2 * int((y & decided).sum()) / (int(y.sum()) + int(decided.sum())),
        sensitivity=sensitivity,
        specificity=specificity,
        precision=nan if one_class else int((y & decided).sum()) / max(1, int(decided.sum())),
    )


def _categorical(decisions: Decisions) -> tuple[float, float]:
    """(share of right rows, mean recall of the classes that occur)."""
    rows = decisions.valid[:, 0]
    y, decided = decisions.y[rows], decisions.decided[rows]
    if y.shape[1] == 1:  # two classes: add the column of class 0
        y, decided = np.hstack([y, ~y]), np.hstack([decided, ~decided])
    recalls = [_mean(decided[y[:, column], column]) for column in range(y.shape[1]) if y[:, column].any()]
    return _mean((y & decided).any(1)), _mean(recalls)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
