"""Fit on train, choose on validation, score test: what a head does between a task and a record.

Nothing here sees a test label, and no validation row is scored by a head that was fitted on it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from featstore.datasets.splits import seeded_rank
from featstore.errors import TaskError
from probes.configs import KnnConfig, LinearConfig
from probes.knn import KNNProbe
from probes.logistic import DEFAULT_C, LogisticProbe, choose
from probes.metrics import evaluate
from probes.tasks import Task

NUM_FOLDS = 5
MIN_POSITIVES = 10  # a label with fewer takes the pooled choice


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a probe hands to evaluation: probabilities for validation and test rows, and how they came about.

    `val_metrics` are given where more than the validation rows were scored, as after a refit.
    """

    val_scores: Float[np.ndarray, "V L"]
    test_scores: Float[np.ndarray, "T L"]
    choices: dict[str, Any]
    num_parameters: int
    notes: tuple[str, ...] = ()
    val_metrics: dict[str, Any] | None = None


def check_two_classes(task: Task, split: str, y: np.ndarray, mask: np.ndarray) -> None:
    """At least one label must have both classes in a split, or nothing can be fitted, chosen or scored there.

    Raises:
        TaskError: none has; the message says what there is.
    """
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
        parts[split] = (X, y, mask, groups)
    return parts


def macro_auroc(task: Task, y: np.ndarray, scores: Float[np.ndarray, "n L"], mask: np.ndarray) -> float:
    return float(evaluate(y, scores, mask, kind=task.kind, labels=task.labels)["macro"]["auroc"])


def fit_knn(task: Task, features: str, config: KnnConfig) -> Fitted:
    """k nearest neighbours with the DINO vote; one k for all labels, by macro AUROC on validation."""
    parts = load(task, features)
    X, y, mask, _ = parts["train"]
    head = (
        KNNProbe(temperature=config.temperature)
        if config.counts is None
        else KNNProbe(k=config.counts, temperature=config.temperature)
    )
    head.fit(X, y, mask, num_classes=len(task.labels) if task.kind == "multiclass" else None)
    X, y, mask, _ = parts["val"]
    val = head.scores(X)
    quality = {k: macro_auroc(task, y, scores, mask) for k, scores in val.items()}
    best = max(quality, key=lambda k: (quality[k], -k))
    test = head.scores(parts["test"][0])[best]
    edge = len(quality) > 1 and best in (min(quality), max(quality))
    choices: dict[str, Any] = {
        "k": best,
        "val_auroc": {str(k): value for k, value in quality.items()},
        "at_edge": edge,
        "dropped": list(head.dropped_k_),
        "backend": head.backend_,
        "without_labelled_neighbour": head.unlabelled_[best].tolist(),  # test rows a label, scored by prevalence
    }
    notes = (
        [f"k {', '.join(map(str, head.dropped_k_))} left out: more than the {len(parts['train'][0])} training rows"]
        if head.dropped_k_
        else []
    )
    return Fitted(val[best], test, choices, 0, tuple(notes))


def fit_linear(task: Task, features: str, config: LinearConfig) -> Fitted:
    """Logistic regression; C per label (one for a categorical label) by AUROC on validation, out of fold with refit."""
    parts = load(task, features)
    grid = config.grid or DEFAULT_C
    if config.refit:
        return _fit_refit(task, parts, config, grid)
    head = _head(config, grid).fit(*parts["train"][:3], **_kind(task))
    X, y, mask, _ = parts["val"]
    per_C = probabilities_per_C(task, head, X)
    index, pooled, edge = choose_C(task, per_C, y, mask)
    choices = describe(task, head, index, pooled, edge)
    return Fitted(
        head.probabilities(X, index),
        head.probabilities(parts["test"][0], index),
        choices,
        head.coef_[0].size + head.coef_.shape[2],
        flags(choices),
    )


def _fit_refit(task: Task, parts: dict[str, Any], config: LinearConfig, grid: tuple[float, ...]) -> Fitted:
    """Choose by scores of group-wise folds over train and val, then fit on both."""
    # Fitted under the training policy; out-of-fold scores stand in for validation and are read under the other.
    X, groups = (np.concatenate([parts["train"][i], parts["val"][i]]) for i in (0, 3))
    rows = np.concatenate([task.index("train"), task.index("val")])
    y, mask = task.y_train[rows], task.mask_train[rows]
    y_eval, mask_eval = task.y[rows], task.mask[rows]
    per_C = np.full((len(grid), len(X), len(task.labels)), np.nan)
    for held in folds(groups):
        fold = _head(config, grid).fit(X[~held], y[~held], mask[~held], **_kind(task))
        per_C[:, held] = probabilities_per_C(task, fold, X[held])
    index, pooled, edge = choose_C(task, per_C, y_eval, mask_eval)
    picked = per_C[index, :, np.arange(len(task.labels))].T if len(index) > 1 else per_C[index[0]]
    head = _head(config, grid).fit(X, y, mask, **_kind(task))
    choices = describe(task, head, index, pooled, edge)
    choices["folds"] = NUM_FOLDS
    metrics = dict(evaluate(y_eval, picked, mask_eval, kind=task.kind, labels=task.labels))
    metrics["scored"] = "train and val, out of fold"
    return Fitted(
        picked[len(parts["train"][0]) :],
        head.probabilities(parts["test"][0], index),
        choices,
        head.coef_[0].size + head.coef_.shape[2],
        (
            f"refit on train and val; chosen by {NUM_FOLDS} group-wise folds; val shows their out-of-fold scores",
            *flags(choices),
        ),
        metrics,
    )


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


def _head(config: LinearConfig, grid: tuple[float, ...]) -> LogisticProbe:
    weight = None if config.class_weight == "none" else "balanced"
    return LogisticProbe(C=grid, standardize=config.standardize, class_weight=weight)  # type: ignore[arg-type]


def _kind(task: Task) -> dict[str, Any]:
    return {"kind": task.kind, "num_classes": len(task.labels) if task.kind == "multiclass" else None}


def probabilities_per_C(task: Task, head: LogisticProbe, X: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "C n L"]:
    """Probabilities at every C."""
    return np.stack([head.probabilities(X, number) for number in range(len(head.C_))])


def choose_C(
    task: Task, per_C: Float[np.ndarray, "C n L"], y: np.ndarray, mask: np.ndarray
) -> tuple[Int[np.ndarray, " K"], np.ndarray, np.ndarray]:
    """(grid number, pooled?, at edge?) per label, or one for a categorical label."""
    if len(per_C) == 1:
        count = 1 if task.kind == "multiclass" else len(task.labels)
        return np.zeros(count, np.int64), np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    if task.kind == "multiclass":
        quality = np.array([[macro_auroc(task, y, scores, mask)] for scores in per_C])
        positives = np.array([MIN_POSITIVES])
    else:
        metrics = [evaluate(y, scores, mask, kind=task.kind, labels=task.labels)["per_label"] for scores in per_C]
        quality = np.array([[item["auroc"] for item in labels] for labels in metrics])
        positives = ((y == 1) & mask).sum(0)
    choice = choose(quality, positives, min_positives=MIN_POSITIVES)
    return choice.index, choice.pooled, choice.edge


def flags(choices: dict[str, Any]) -> tuple[str, ...]:
    """What a reader must know of the choices: labels too rare to choose by, problems short of their optimum."""
    pooled = [name for name, value in choices["pooled"].items() if value]
    short = [name for name, value in choices["converged"].items() if not value]
    notes = []
    if pooled:
        notes.append(f"C pooled over labels for {', '.join(pooled)}: fewer than {MIN_POSITIVES} positives to choose by")
    if short:
        notes.append(f"not converged: {', '.join(short)}")
    return tuple(notes)


def describe(
    task: Task, head: LogisticProbe, index: np.ndarray, pooled: np.ndarray, edge: np.ndarray
) -> dict[str, Any]:
    """Choices for the record, per label (one entry for a categorical label).

    `C_per_sample` is C times the training rows: the weight of the mean loss, which does not depend on their number.
    """
    names = [task.spec.labels[0]] if task.kind == "multiclass" else list(task.labels)
    columns = np.arange(len(names))
    num_rows = {split: len(task.index(split)) for split in ("train", "val")}
    return {
        "C": {name: float(head.C_[number]) for name, number in zip(names, index)},
        "C_per_sample": {name: float(head.C_[number]) * num_rows["train"] for name, number in zip(names, index)},
        "pooled": {name: bool(value) for name, value in zip(names, pooled)},
        "at_edge": {name: bool(value) for name, value in zip(names, edge)},
        "converged": {name: bool(value) for name, value in zip(names, head.converged_[index, columns])},
        "objective": {name: float(value) for name, value in zip(names, head.objective_[index, columns])},
        "solver": {name: str(value) for name, value in zip(names, head.status_[index, columns])},
    }
