"""Intervals that hold the chance of the training patients too: heads fitted again on resampled ones.

Every head keeps the strength (C or k) that was chosen, and is scored on test resamples of its own. What the choice
itself would have been on other patients is not in the interval.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from featstore.errors import ConfigError, TaskError
from probes.draws import Draws
from probes.metrics import METRICS, decide
from probes.selection import Both, Fitted, load
from probes.statistics import interval, resample_decisions
from probes.tasks import Samples, Task

Refit = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Nested:
    """`train` resamples of the training patients; the `test` resamples of test patients are shared out among them."""

    train: int
    test: int
    seed: int


def nested_intervals(
    probe: str, task: Task, features: str, head: Any, fitted: Fitted, config: Nested
) -> dict[str, Any]:
    """`{"level", "train_resamples", "num_resamples", "draws", "macro", "per_label"}`: intervals as of `bootstrap`.

    Patients of the rows that the tested head was fitted on are drawn with replacement (train; train and val after a
    refit), each with all its rows.

    Raises:
        ConfigError: a probe whose heads cannot be fitted again at a fixed strength. TaskError: numbers or ranks.
    """
    if task.kind not in ("multilabel", "multiclass"):
        raise TaskError(f"--train-resamples is of labels and classes; task {task.name!r} holds {task.kind} values")
    refit = _refit(probe, task, head, fitted)
    X, samples, queries = _fitted_rows(task, features, head)
    y_test, mask_test, groups_test, _ = task.truth("test")
    valid = mask_test if mask_test.ndim == 1 else mask_test.any(1)
    draws = Draws.of(groups_test[valid], num_resamples=config.test, seed=config.seed)
    # A seed of its own: equal counts for training and test patients would move both together.
    train = Draws.of(samples.groups, num_resamples=config.train, seed=config.seed + 1)
    columns = train.columns(samples.groups)
    macro: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    per_label: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
    names: tuple[str, ...] = ()
    for number, counts in enumerate(train.counts):
        rows: Int[np.ndarray, " n"] = np.repeat(np.arange(len(X)), counts[columns])
        scores = task.pool("test", refit(X[rows], samples.y[rows], samples.mask[rows], queries))
        decisions = decide(y_test, scores, mask_test, kind=task.kind, labels=task.labels)
        own = Draws(draws.groups, draws.counts[number :: config.train], draws.seed)
        values = resample_decisions(decisions, groups_test, own)
        names = values.labels
        for name in METRICS:
            macro[name].append(values.macro[name])
            per_label[name].append(values.per_label[name])
    return {
        "level": 0.95,
        "train_resamples": config.train,
        "num_resamples": config.test,
        "draws": draws.digest,
        "train_draws": train.digest,
        "macro": {name: interval(np.concatenate(macro[name])) for name in METRICS},
        "per_label": [
            {"label": label, **{name: interval(np.concatenate(per_label[name])[:, place]) for name in METRICS}}
            for place, label in enumerate(names)
        ],
    }


def _fitted_rows(task: Task, features: str, head: Any) -> tuple[Float[np.ndarray, "n D"], Samples, np.ndarray]:
    """(features and samples that the tested head was fitted on, test features)."""
    parts = load(task, features)
    if head.refit or getattr(head, "protocol", None) == "radiology":  # which fits on train and val
        both = Both.of(task, parts)
        return both.X, both.fitted, parts["test"][0]
    X, y, mask, groups = parts["train"]
    return X, Samples(y, mask, groups, []), parts["test"][0]


def _refit(probe: str, task: Task, head: Any, fitted: Fitted) -> Refit:
    """(X, y, mask, queries) -> probabilities of a head like the one that was chosen.

    Raises:
        ConfigError: a probe whose heads cannot be fitted again at a fixed strength.
    """
    classes = {"num_classes": len(task.labels)} if task.kind == "multiclass" else {}
    if probe == "knn":
        from probes.knn_protocols import Plan

        plan, k = Plan.of(head), int(fitted.choices["k"])

        def neighbours(X: np.ndarray, y: np.ndarray, mask: np.ndarray, queries: np.ndarray) -> np.ndarray:
            count = min(k, int((mask if mask.ndim == 1 else mask.any(1)).sum()))  # k may have been the whole library
            made = plan.make(task.kind).set_params(k=count).fit(X, y, mask, **classes)
            return np.asarray(made.scores(queries)[count])

        return neighbours
    if probe == "linear" and "C" in fitted.choices and getattr(head, "protocol", None) is None:
        from probes.linear import kind_of, logistic_head

        by_label = fitted.choices["C"]
        names = list(by_label) if task.kind == "multiclass" else task.labels
        chosen = np.array([by_label.get(name, min(by_label.values())) for name in names])  # any of a label not fitted
        grid, index = np.unique(chosen, return_inverse=True)

        def logistic(X: np.ndarray, y: np.ndarray, mask: np.ndarray, queries: np.ndarray) -> np.ndarray:
            made = logistic_head(head, tuple(grid.tolist())).fit(X, y, mask, **kind_of(task))
            return np.asarray(made.probabilities(queries, index))

        return logistic
    what = f"probes {probe}" + (f" --protocol {head.protocol}" if getattr(head, "protocol", None) else "")
    raise ConfigError(
        f"--train-resamples fits heads again at a fixed strength, which {what} cannot; leave it out, or use probes knn "
        "or probes linear without --protocol"
    )
