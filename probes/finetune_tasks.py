"""Tasks whose validation rows are trained on too, once they have chosen (`--refit`)."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from featstore import files
from featstore.store.features import FeatureSet
from probes.cross import CrossTask
from probes.tasks import Task


@dataclass(frozen=True)
class RefitTask(Task):
    """A task with validation rows among those that train; validation is as before, and says nothing any more."""

    @cached_property
    def digest(self) -> str:
        """Another one than the task's own."""
        return files.digest([Task(**_values(self)).digest, "train and val"])

    def index(self, split: str) -> Int[np.ndarray, " n"]:
        """Manifest rows of a split."""
        found = super().index(split)
        return np.union1d(found, super().index("val")) if split == "train" else found


@dataclass(frozen=True, kw_only=True)
class RefitCrossTask(CrossTask):
    """The same of a task that is tested on another data set."""

    @cached_property
    def digest(self) -> str:
        """Another one than the task's own."""
        return files.digest([CrossTask(**_values(self), target=self.target).digest, "train and val"])

    def index(self, split: str) -> Int[np.ndarray, " n"]:
        """Manifest rows of a split."""
        found = super().index(split)
        return np.union1d(found, super().index("val")) if split == "train" else found


def _values(task: Task) -> dict[str, Any]:
    return {item.name: getattr(task, item.name) for item in fields(Task)}


def refit_task(task: Task) -> Task:
    """The task to train the choice on again."""
    if isinstance(task, CrossTask):
        return RefitCrossTask(**_values(task), target=task.target)
    return RefitTask(**_values(task))


def trained_task(task: Task) -> Task:
    """The task whose rows train: the task itself, without the test rows of another data set."""
    if isinstance(task, RefitCrossTask):
        return RefitTask(**_values(task))
    return Task(**_values(task)) if isinstance(task, CrossTask) else task


def training_digest(task: Task) -> str:
    """Changes with everything of a task on images that training sees: rows that can be decoded and their labels.

    Also with the bytes of those images; not with what it is tested on.
    """
    used = np.flatnonzero(np.isin(task.role, ("train", "val")))
    failed = sorted(set(task.features.failures) & set(used.tolist()))
    return files.digest([trained_task(task).digest, list(task.labels), failed, contents_digest(task.features, used)])


def contents_digest(images: FeatureSet, rows: Int[np.ndarray, " n"]) -> str:
    """Changes with the bytes of these samples' files, as far as they were looked at.

    Usually the manifest's digest says so too; not where a store that could not be written is told of no training.
    """
    failures = images.failures
    contents = images.manifest.table.column("content").take(rows).to_pylist()
    return files.digest([None if row in failures else value for row, value in zip(rows.tolist(), contents)])
