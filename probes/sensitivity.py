"""How far results hang on the reading of uncertain labels: one head per training policy, all on the same test rows."""

from dataclasses import replace
from typing import Any

import numpy as np

from featstore.errors import TaskError
from probes.metrics import evaluate
from probes.policies import POLICIES, SENSITIVITY, named_policy, policy_name
from probes.selection import Fitted
from probes.statistics import interval, resample
from probes.tasks import Samples, Task
from probes.taskspec import TaskSpec

WITHOUT_CLASS = "compared without the label Uncertain, which only one training policy has; uncertain is scored as 0"


def policy_specs(spec: TaskSpec, asked: str) -> dict[str, TaskSpec]:
    """Name -> task under one training policy each; the task's own comes first and is what the others differ from.

    `asked` is `all` or names of `POLICIES`, comma-separated. All are scored on the same labels: an evaluation policy
    that adds the label `Uncertain`, which other training policies lack, reads uncertain values as 0 without it.

    Raises:
        UnknownNameError: no such policy.
    """
    names = SENSITIVITY if asked.strip() == "all" else [name.strip() for name in asked.split(",") if name.strip()]
    if spec.eval_policy.uncertain == "class":
        scored = replace(spec.eval_policy, uncertain="zero")
        spec = replace(spec, eval_policy=scored, deviations=(*spec.deviations, WITHOUT_CLASS))
    own = policy_name(spec.train_policy)
    specs = {own: spec}
    for name in names:
        if named_policy(name) != spec.train_policy:
            specs[name] = replace(spec, train_policy=POLICIES[name])
    return specs


class PolicyComparison:
    """Called with each task and what was fitted for it, the task's own policy first; gives that record's entry.

    Differences are paired: the same resamples of the same patients stand behind every policy.
    """

    def __init__(self, names: list[str], *, resamples: int, seed: int) -> None:
        self.names, self.resamples, self.seed = names, resamples, seed
        self._own: tuple[Task, Samples, np.ndarray] | None = None
        self._next = 0

    def __call__(self, task: Task, fitted: Fitted) -> dict[str, Any]:
        """`{"policy", "reference", "reference_task", "labels", "difference": {"auroc", "low", "high", ...}}`.

        The difference is over `labels`, those that could be fitted under both policies.

        Raises:
            TaskError: a task that no policy speaks of, or other test rows than before.
        """
        if task.kind != "multilabel":
            raise TaskError(
                f"task {task.name!r} is {task.kind}: label policies read columns of 1, 0, -1 and blank; leave "
                "--policies out"
            )
        truth, scores = task.truth("test"), fitted.test_scores
        name = self.names[self._next]
        self._next += 1
        if self._own is None:
            self._own = (task, truth, scores)
        reference, own, own_scores = self._own
        known = [set(np.array(part.labels)[found.mask.any(0)]) for part, found in ((task, truth), (reference, own))]
        labels = [name for name in task.labels if name in known[0] & known[1]]
        parts = [_part(truth, task, labels), _part(own, reference, labels)]
        ids = [[found.ids[row] for row in rows[:, 0]] for found, (rows, _) in zip((truth, own), parts)]
        if ids[0] != ids[1]:
            raise TaskError(
                f"policy {name!r} leaves other test rows than {self.names[0]!r}; differences are not paired"
            )
        macro, values = self._resampled(truth, scores, parts[0], labels)
        own_macro, own_values = self._resampled(own, own_scores, parts[1], labels)
        difference = {"auroc": macro - own_macro, **interval(values - own_values)}
        return {
            "policy": name,
            "reference": self.names[0],
            "reference_task": reference.digest,
            "labels": labels,
            "difference": difference,
        }

    def _resampled(
        self, truth: Samples, scores: np.ndarray, part: tuple[np.ndarray, ...], labels: list[str]
    ) -> tuple[float, np.ndarray]:
        """Macro AUROC of some rows and labels, and on resamples of their patients."""
        y, scores, mask = truth.y[part], scores[part], truth.mask[part]
        once = evaluate(y, scores, mask, kind="multilabel", labels=labels)["macro"]["auroc"]
        resampled = resample(
            y,
            scores,
            mask,
            truth.groups[part[0][:, 0]],
            kind="multilabel",
            num_resamples=self.resamples,
            seed=self.seed,
            labels=labels,
        )
        return once, resampled.macro["auroc"]


def _part(truth: Samples, task: Task, labels: list[str]) -> tuple[np.ndarray, ...]:
    """Rows that have one of these labels, and the columns of the labels, to index with."""
    columns = np.array([task.labels.index(name) for name in labels], np.int64)
    return np.ix_(np.flatnonzero(truth.mask[:, columns].any(1)), columns)
