"""How far results hang on the reading of uncertain labels: one head per training policy, all on the same test rows."""

from dataclasses import replace
from typing import Any

import numpy as np

from featstore.errors import TaskError
from probes.policies import POLICIES, SENSITIVITY, named_policy, policy_name
from probes.selection import Fitted
from probes.statistics import interval, resample
from probes.tasks import Task
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
        self._own: tuple[str, list[str], np.ndarray, float] | None = None
        self._next = 0

    def __call__(self, task: Task, fitted: Fitted, test: dict[str, Any]) -> dict[str, Any]:
        """`{"policy", "reference", "reference_task", "difference": {"auroc", "low", "high", ...}}`.

        Raises:
            TaskError: a task that no policy speaks of, or other test rows than before.
        """
        if task.kind != "multilabel":
            raise TaskError(
                f"task {task.name!r} is {task.kind}: label policies read columns of 1, 0, -1 and blank; leave "
                "--policies out"
            )
        y, mask, groups, ids = task.truth("test")
        values = resample(
            y,
            fitted.test_scores,
            mask,
            groups,
            kind="multilabel",
            num_resamples=self.resamples,
            seed=self.seed,
            labels=task.labels,
        ).macro["auroc"]
        name = self.names[self._next]
        self._next += 1
        macro = float(test["macro"]["auroc"])
        if self._own is None:
            self._own = (task.digest, ids, values, macro)
        reference, own_ids, own_values, own_macro = self._own
        if ids != own_ids:
            raise TaskError(
                f"policy {name!r} leaves other test rows than {self.names[0]!r}; differences are not paired"
            )
        difference = {"auroc": macro - own_macro, **interval(values - own_values)}
        return {"policy": name, "reference": self.names[0], "reference_task": reference, "difference": difference}
