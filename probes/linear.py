"""Logistic and ridge regression from a task to scores: fit on train, choose on validation, score test.

Nothing here sees a test label, and no validation row is scored by a head that was fitted on it.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from featstore.errors import TaskError
from probes.configs import LinearConfig
from probes.logistic import DEFAULT_C, LogisticProbe, choose
from probes.metrics import evaluate
from probes.ridge import DEFAULT_ALPHA, RidgeProbe
from probes.scoring import measure
from probes.selection import NUM_FOLDS, REFIT_NOTE, Both, Fitted, folds, load, picked, target_quality
from probes.tasks import Samples, Task
from probes.unfitted import unfitted_labels

MIN_POSITIVES = 10  # a label with fewer takes the pooled choice


def fit_linear(task: Task, features: str, config: LinearConfig) -> Fitted:
    """Logistic regression (ridge for numbers and ranks); C per label (one for a categorical label) by AUROC on
    validation, alpha per target by R2, out of fold with refit. With a protocol the heads that it trains."""
    if config.protocol is not None:
        from probes.sgd_fit import fit_protocol

        return fit_protocol(task, features, config)
    if task.kind == "regression" or task.kind == "ordinal":
        return fit_ridge(task, features, config)
    if config.alpha is not None:
        raise TaskError(f"task {task.name!r}: --alpha is the penalty of ridge regression; labels and classes take --C")
    if config.class_weight == "positives" and task.kind == "multiclass":
        raise TaskError(
            f"task {task.name!r} is of classes, which have no positives to weigh; use --class-weight balanced"
        )
    parts = load(task, features)
    grid = config.grid or DEFAULT_C
    if config.refit:
        return _fit_refit(task, parts, config, grid)
    head = logistic_head(config, grid).fit(*parts["train"][:3], **kind_of(task))
    truth = task.truth("val")
    per_C = task.pool("val", probabilities_per_C(task, head, parts["val"][0]))
    index, pooled, edge = choose_C(task, per_C, truth.y, truth.mask)
    choices = describe(task, head, index, pooled, edge)
    return Fitted(
        task.pool("val", head.probabilities(parts["val"][0], index)),
        task.pool("test", head.probabilities(parts["test"][0], index)),
        choices,
        head.coef_[0].size + head.coef_.shape[2],
        flags(choices),
    )


def _fit_refit(task: Task, parts: dict[str, Any], config: LinearConfig, grid: tuple[float, ...]) -> Fitted:
    """Choose by scores of group-wise folds over train and val, then fit on both."""
    both = Both.of(task, parts)
    y, mask, groups, _ = both.fitted
    per_C = np.full((len(grid), len(both.X), len(task.labels)), np.nan)
    for held in folds(groups):
        fold = logistic_head(config, grid).fit(both.X[~held], y[~held], mask[~held], **kind_of(task))
        per_C[:, held] = probabilities_per_C(task, fold, both.X[held])
    per_C = both.pool(task, per_C)
    truth = both.truth
    index, pooled, edge = choose_C(task, per_C, truth.y, truth.mask)
    head = logistic_head(config, grid).fit(both.X, y, mask, **kind_of(task))
    choices = describe(task, head, index, pooled, edge)
    choices["folds"] = NUM_FOLDS
    chosen = picked(per_C, index)
    metrics = dict(evaluate(truth.y, chosen, truth.mask, kind=task.kind, labels=task.labels))  # type: ignore[arg-type]
    metrics["scored"] = "train and val, out of fold"
    return Fitted(
        chosen[both.num_scored :],
        task.pool("test", head.probabilities(parts["test"][0], index)),
        choices,
        head.coef_[0].size + head.coef_.shape[2],
        (REFIT_NOTE, *flags(choices)),
        metrics,
    )


def fit_ridge(task: Task, features: str, config: LinearConfig) -> Fitted:
    """Ridge regression on numbers or ranks; alpha per target by R2 on validation, out of fold with refit.

    Raises:
        TaskError: an option that has no meaning for numbers.
    """
    for flag, given in (("--C", config.C is not None), ("--class-weight", config.class_weight != "none")):
        if given:
            raise TaskError(f"task {task.name!r} is fitted by ridge regression, which takes --alpha, not {flag}")
    parts = load(task, features)
    grid = config.alphas or DEFAULT_ALPHA
    notes: tuple[str, ...] = ()
    metrics = None
    if config.refit:
        both = Both.of(task, parts)
        X, (y, mask, groups, _) = both.X, both.fitted
        per_alpha = np.full((len(grid), len(X), len(task.labels)), np.nan)
        for held in folds(groups):
            fold = RidgeProbe(alpha=grid, standardize=bool(config.standardize)).fit(X[~held], y[~held], mask[~held])
            per_alpha[:, held] = fold.predictions(X[held])
        per_alpha, truth, skip = both.pool(task, per_alpha), both.truth, both.num_scored
        head = RidgeProbe(alpha=grid, standardize=bool(config.standardize)).fit(X, y, mask)
        notes = (REFIT_NOTE,)
    else:
        head = RidgeProbe(alpha=grid, standardize=bool(config.standardize)).fit(*parts["train"][:3])
        per_alpha, truth, skip = task.pool("val", head.predictions(parts["val"][0])), task.truth("val"), 0
    index = choose_alpha(per_alpha, truth)
    chosen = picked(per_alpha, index)
    if config.refit:
        metrics = measure(task, truth.y, chosen, truth.mask) | {"scored": "train and val, out of fold"}
    test = picked(head.predictions(parts["test"][0]), index)
    edge = (len(grid) > 1) & ((index == 0) | (index == len(grid) - 1))
    columns = fitted_columns(task)
    choices = {
        "alpha": {task.labels[column]: float(head.alpha_[index[column]]) for column in columns},
        "at_edge": {task.labels[column]: bool(edge[column]) for column in columns},
        **({"folds": NUM_FOLDS} if config.refit else {}),
    }
    parameters = head.coef_[0].size + head.coef_.shape[2]
    return Fitted(chosen[skip:], task.pool("test", test), choices, parameters, notes, metrics)


def choose_alpha(per_alpha: Float[np.ndarray, "A n T"], truth: Samples) -> Int[np.ndarray, " T"]:
    """Grid number per target by R2; ties take the largest alpha, and a constant target the choice of the others."""
    quality = np.array([target_quality(scores, truth) for scores in per_alpha])
    defined = ~np.isnan(quality).any(0)
    if not defined.any():
        raise TaskError("no target varies among the validation rows, so no alpha can be chosen; pass a single --alpha")
    last = len(quality) - 1
    mean = last - int(quality[::-1, defined].mean(1).argmax())
    return np.where(defined, last - np.where(defined, quality, 0)[::-1].argmax(0), mean)


def fitted_columns(task: Task) -> Int[np.ndarray, " k"]:
    """Numbers of the labels that train can teach."""
    left_out = unfitted_labels(task)
    return np.array([number for number, label in enumerate(task.labels) if label not in left_out], np.int64)


def logistic_head(config: LinearConfig, grid: tuple[float, ...]) -> LogisticProbe:
    weight = None if config.class_weight == "none" else config.class_weight
    return LogisticProbe(C=grid, standardize=bool(config.standardize), class_weight=weight)


def kind_of(task: Task) -> dict[str, Any]:
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
        quality = np.array(
            [[evaluate(y, scores, mask, kind="multiclass", labels=task.labels)["macro"]["auroc"]] for scores in per_C]
        )
        positives = np.array([MIN_POSITIVES])
    else:
        metrics = [evaluate(y, scores, mask, kind="multilabel", labels=task.labels)["per_label"] for scores in per_C]
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
    Nothing is said of labels that were not fitted, see `probes.unfitted`.
    """
    names = np.array([task.spec.labels[0]] if task.kind == "multiclass" else task.labels, dtype=np.object_)
    columns = fitted_columns(task) if len(names) > 1 else np.arange(1)
    names, index, pooled, edge = names[columns], index[columns], pooled[columns], edge[columns]
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
