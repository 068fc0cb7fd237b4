"""One way to measure every kind of task: metrics of scores under the evaluation policy, with clustered intervals."""

from typing import Any

import numpy as np
from jaxtyping import Float

from probes.labels import TargetKind
from probes.metrics import evaluate
from probes.regression import bootstrap_numbers, evaluate_numbers
from probes.statistics import bootstrap
from probes.tasks import Task

# What ranks a table, by validation; larger is better.
HEADLINE: dict[TargetKind, str] = {"multilabel": "auroc", "multiclass": "auroc", "regression": "r2", "ordinal": "qwk"}


def measure(task: Task, y: np.ndarray, scores: Float[np.ndarray, "n L"], mask: np.ndarray) -> dict[str, Any]:
    """Metrics of scores of images or units; see `probes.metrics.evaluate` and `probes.regression.evaluate_numbers`."""
    if task.kind == "regression" or task.kind == "ordinal":
        classes = len(task.spec.classes)
        return evaluate_numbers(y, scores, mask, kind=task.kind, labels=task.labels, num_classes=classes)
    return dict(evaluate(y, scores, mask, kind=task.kind, labels=task.labels))


def score(task: Task, split: str, scores: Float[np.ndarray, "U L"], *, resamples: int, seed: int) -> dict[str, Any]:
    """Metrics of scores for `task.truth(split)`; intervals from resampled patients where `resamples` > 0."""
    y, mask, groups, _ = task.truth(split)
    result = measure(task, y, scores, mask)
    if not resamples:
        return result
    if task.kind == "regression" or task.kind == "ordinal":
        result["intervals"] = bootstrap_numbers(
            y,
            scores,
            mask,
            groups,
            kind=task.kind,
            labels=task.labels,
            num_classes=len(task.spec.classes),
            num_resamples=resamples,
            seed=seed,
        )
    else:
        result["intervals"] = bootstrap(
            y, scores, mask, groups, kind=task.kind, num_resamples=resamples, seed=seed, labels=task.labels
        )
    return result
