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
from probes.logistic import DEFAULT_C, LogisticProbe, choose
from probes.metrics import evaluate
from probes.regression import evaluate_numbers
from probes.ridge import DEFAULT_ALPHA, RidgeProbe
from probes.scoring import measure
from probes.tasks import Samples, Task

NUM_FOLDS = 5
REFIT_NOTE = f"refit on train and val; chosen by {NUM_FOLDS} group-wise folds; val shows their out-of-fold scores"
MIN_POSITIVES = 10  # a label with fewer takes the pooled choice


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


def fit_knn(task: Task, features: str, config: KnnConfig) -> Fitted:
    """k nearest neighbours by the vote asked for (mean for numbers and ranks); one k for all labels.

    k is chosen on validation, or by leaving each patient out of train; with refit the test sees train and val.
    """
    from probes.knn_protocols import Plan  # imports scikit-learn, which takes a second or two that others need not pay

    plan = Plan.of(config)
    parts = load(task, features)
    X, y, mask, groups = parts["train"]
    more = {"num_classes": len(task.labels)} if task.kind == "multiclass" else {}
    head = plan.make(task.kind).fit(X, y, mask, **more)
    val = {k: task.pool("val", scores) for k, scores in head.scores(parts["val"][0]).items()}
    if config.select == "loo":
        rows = head.bank_rows_
        truth = Samples(y[rows], mask[rows], groups[rows], [])
        quality = {
            k: macro_quality(task, scores, truth) for k, scores in head.leave_one_out(groups[rows]).items() if k in val
        }
    else:
        quality = {k: macro_quality(task, scores, task.truth("val")) for k, scores in val.items()}
    best = max(quality, key=lambda k: (quality[k], -k))
    notes, dropped, num_train = [], head.dropped_k_, len(X)
    if plan.refit:
        both = Both.of(task, parts)
        X, (y, mask, _, _) = both.X, both.fitted
        head = plan.make(task.kind).set_params(k=best).fit(X, y, mask, **more)
        notes.append("tested with train and val as neighbours; k was chosen, and val is scored, with train alone")
    test = task.pool("test", head.scores(parts["test"][0])[best])
    numeric = task.kind in ("regression", "ordinal")
    deviations = plan.deviations(task, features, masked=int((~mask).sum()))
    choices: dict[str, Any] = {
        "k": best,
        "vote": plan.name,
        f"{config.select or 'val'}_{'r2' if numeric else 'auroc'}": {str(k): value for k, value in quality.items()},
        "at_edge": len(quality) > 1 and best in (min(quality), max(quality)),
        "dropped": list(dropped),
        "backend": head.backend_,
        "protocol_deviations": deviations,
    }
    if plan.vote != "mlknn":  # test rows a label, scored by prevalence
        choices["without_labelled_neighbour"] = head.unlabelled_[best].tolist()
    if dropped:
        notes.append(f"k {', '.join(map(str, dropped))} left out: more than the {num_train} training rows")
    notes += [f"deviates from protocol {config.protocol}: {text}" for text in deviations]
    return Fitted(val[best], test, choices, 0, tuple(notes))


def fit_linear(task: Task, features: str, config: LinearConfig) -> Fitted:
    """Logistic regression (ridge for numbers and ranks); C per label (one for a categorical label) by AUROC on
    validation, alpha per target by R2, out of fold with refit."""
    if task.kind == "regression" or task.kind == "ordinal":
        return fit_ridge(task, features, config)
    if config.alpha is not None:
        raise TaskError(f"task {task.name!r}: --alpha is the penalty of ridge regression; labels and classes take --C")
    parts = load(task, features)
    grid = config.grid or DEFAULT_C
    if config.refit:
        return _fit_refit(task, parts, config, grid)
    head = _head(config, grid).fit(*parts["train"][:3], **_kind(task))
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


def _fit_refit(task: Task, parts: dict[str, Any], config: LinearConfig, grid: tuple[float, ...]) -> Fitted:
    """Choose by scores of group-wise folds over train and val, then fit on both."""
    both = Both.of(task, parts)
    y, mask, groups, _ = both.fitted
    per_C = np.full((len(grid), len(both.X), len(task.labels)), np.nan)
    for held in folds(groups):
        fold = _head(config, grid).fit(both.X[~held], y[~held], mask[~held], **_kind(task))
        per_C[:, held] = probabilities_per_C(task, fold, both.X[held])
    per_C = both.pool(task, per_C)
    truth = both.truth
    index, pooled, edge = choose_C(task, per_C, truth.y, truth.mask)
    head = _head(config, grid).fit(both.X, y, mask, **_kind(task))
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
            fold = RidgeProbe(alpha=grid, standardize=config.standardize).fit(X[~held], y[~held], mask[~held])
            per_alpha[:, held] = fold.predict(X[held])
        per_alpha, truth, skip = both.pool(task, per_alpha), both.truth, both.num_scored
        head = RidgeProbe(alpha=grid, standardize=config.standardize).fit(X, y, mask)
        notes = (REFIT_NOTE,)
    else:
        head = RidgeProbe(alpha=grid, standardize=config.standardize).fit(*parts["train"][:3])
        per_alpha, truth, skip = task.pool("val", head.predict(parts["val"][0])), task.truth("val"), 0
    index = choose_alpha(per_alpha, truth)
    chosen = picked(per_alpha, index)
    if config.refit:
        metrics = measure(task, truth.y, chosen, truth.mask) | {"scored": "train and val, out of fold"}
    test = picked(head.predict(parts["test"][0]), index)
    edge = (len(grid) > 1) & ((index == 0) | (index == len(grid) - 1))
    choices = {
        "alpha": {name: float(head.alpha_[number]) for name, number in zip(task.labels, index)},
        "at_edge": {name: bool(value) for name, value in zip(task.labels, edge)},
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
