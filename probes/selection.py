"""What every probe shares between a task and a record: checked arrays, what a choice maximises, folds, a result.

Nothing here sees a test label, and no validation row is scored by a head that was fitted on it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from featstore.datasets.splits import seeded_rank
from featstore.errors import TaskError
from probes.metrics import evaluate
from probes.regression import evaluate_numbers
from probes.tasks import Samples, Task

NUM_FOLDS = 5
REFIT_NOTE = f"refit on train and val; chosen by {NUM_FOLDS} group-wise folds; val shows their out-of-fold scores"


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a probe hands to evaluation: scores of what is counted in validation and test, and how they came about.

    Scores are probabilities, or predicted numbers; images of one unit are pooled already. `val_metrics` are given
    where more than the validation rows were scored, as after a refit.
    """

    val_scores: Float[np.ndarray, "V L"]
    test_scores: Float[np.ndarray, "T L"]
    choices: dict[str, Any]
    num_parameters: int
    notes: tuple[str, ...] = ()
    val_metrics: dict[str, Any] | None = None


def check_two_classes(task: Task, split: str, y: np.ndarray, mask: np.ndarray) -> None:
    """At least one label must have both classes (a target two values) in a split, or nothing can be fitted or scored.

    Raises:
        TaskError: none has; the message says what there is.
    """
    if task.kind in ("regression", "ordinal"):
        if max(len(np.unique(y[mask[:, column], column])) for column in range(y.shape[1])) < 2:
            raise TaskError(
                f"task {task.name!r}: no target has two different values in {split} ({len(y)} samples); choose other "
                "labels or splits"
            )
        return
    if task.kind == "multiclass":
        found = [len(np.unique(y[mask]))]
        counts = ", ".join(
            f"{task.labels[number]} {count}"
            for number, count in enumerate(np.bincount(y[mask], minlength=len(task.labels)))
        )
    else:
        positives = ((y == 1) & mask).sum(0)
        negatives = ((y == 0) & mask).sum(0)
        found = [1 + (min(pair) > 0) for pair in zip(positives, negatives)]
        counts = ", ".join(
            f"{label} {p} positive {n} negative" for label, p, n in zip(task.labels, positives, negatives)
        )
    if max(found, default=0) < 2:
        raise TaskError(
            f"task {task.name!r}: no label has both classes in {split} ({counts}); choose other labels or splits"
        )


def load(task: Task, features: str) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(X, y, mask, groups) of each split, checked.

    Raises:
        TaskError: a split without both classes of any label.
    """
    parts = {}
    for split in ("train", "val", "test"):
        X, y, mask, groups, _ = task.arrays(split, features)
        check_two_classes(task, split, y, mask)
        if split != "train":
            truth = task.truth(split)
            check_two_classes(task, split, truth.y, truth.mask)
        parts[split] = (X, y, mask, groups)
    return parts


def macro_quality(task: Task, scores: Float[np.ndarray, "U L"], truth: Samples) -> float:
    """What a choice for all labels maximises: macro AUROC, or R2 (the least squared error) of numbers and ranks."""
    if task.kind == "multilabel" or task.kind == "multiclass":
        found = evaluate(truth.y, scores, truth.mask, kind=task.kind, labels=task.labels)
        return float(found["macro"]["auroc"])
    values = target_quality(scores, truth)
    return float(np.nanmean(values))


def target_quality(scores: Float[np.ndarray, "U T"], truth: Samples) -> Float[np.ndarray, " T"]:
    """R2 of each target; NaN where its truth is constant."""
    count = scores.shape[1]
    labels = [str(number) for number in range(count)]
    found = evaluate_numbers(truth.y, scores, truth.mask, kind="regression", labels=labels)["per_label"]
    return np.array([entry["r2"] for entry in found])


def picked(per_C: Float[np.ndarray, "C n L"], index: Int[np.ndarray, " K"]) -> Float[np.ndarray, "n L"]:
    """Scores at the chosen strength, one for all columns or one for each."""
    return np.asarray(per_C[index, :, np.arange(per_C.shape[2])].T if len(index) > 1 else per_C[index[0]])


@dataclass(frozen=True, slots=True)
class Both:
    """Train and validation together, as a refit needs them: what a head is fitted on, and what is scored of it."""

    X: Float[np.ndarray, "n D"]
    fitted: Samples
    truth: Samples
    num_train: int
    num_scored: int

    @classmethod
    def of(cls, task: Task, parts: dict[str, Any]) -> "Both":
        """Fitted under the training policy; out-of-fold scores stand in for validation and are read under the other."""
        pairs = [(task.samples(split, "train"), task.truth(split)) for split in ("train", "val")]
        X = np.concatenate([parts["train"][0], parts["val"][0]])
        fitted, truth = (_joined(pairs[0][part], pairs[1][part]) for part in (0, 1))
        return cls(X, fitted, truth, len(parts["train"][0]), len(pairs[0][1].ids))

    def pool(self, task: Task, scores: Float[np.ndarray, "... n L"]) -> Float[np.ndarray, "... U L"]:
        """Scores per unit; none has images in both splits."""
        train = task.pool("train", scores[..., : self.num_train, :])
        return np.concatenate([train, task.pool("val", scores[..., self.num_train :, :])], axis=-2)


def _joined(a: Samples, b: Samples) -> Samples:
    y, mask, groups = (np.concatenate([a[part], b[part]]) for part in range(3))
    return Samples(y, mask, groups, [*a.ids, *b.ids])


def folds(groups: np.ndarray, *, seed: int = 0) -> Iterator[np.ndarray]:
    """Masks of the held-out rows of each fold; a group is held out as a whole.

    Raises:
        TaskError: fewer groups than folds.
    """
    names = sorted(set(groups.tolist()), key=lambda group: (seeded_rank(group, seed), group))
    if len(names) < NUM_FOLDS:
        raise TaskError(f"--refit needs at least {NUM_FOLDS} groups (patients) in train and val, got {len(names)}")
    fold = {name: number % NUM_FOLDS for number, name in enumerate(names)}
    numbers = np.array([fold[group] for group in groups.tolist()])
    for number in range(NUM_FOLDS):
        yield numbers == number
