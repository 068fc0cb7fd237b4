"""Labels that a head cannot learn: those with one class (targets with one value) among the training rows.

Whatever a head says of such a label comes from its start or from a tie, not from the data: an AUROC of 0.5 of a
constant, anything of an untrained output. No probe chooses by them or scores them: their entries are masked in
validation and test, so that they count among the skipped labels, as those with one class in test.
"""

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from probes.tasks import Task

MOST_NAMES = 20  # in a note


def unfitted_labels(task: Task) -> dict[str, str]:
    """Label -> what train has of it, for labels without positives or negatives there and targets of one value.

    Empty where no label can be fitted, which probes refuse with the counts of all of them; and for classes, where rows
    of a class that train lacks say something of the others.
    """
    if task.kind == "multiclass":
        return {}
    y, mask, _, _ = task.samples("train", "train")
    found = {}
    for column, label in enumerate(task.labels):
        values = y[mask[:, column], column]
        if len(np.unique(values)) > 1:
            continue
        if task.kind == "multilabel":
            found[label] = f"{int((values == 1).sum())} positive, {int((values == 0).sum())} negative"
        else:
            found[label] = f"{len(values)} equal values" if len(values) else "no value"
    return found if len(found) < len(task.labels) else {}


def without_unfitted(task: Task) -> Task:
    """The task with the labels masked that its training rows cannot teach, and notes on them."""
    if task.kind == "multiclass":
        absent = _absent_classes(task)
        return replace(task, notes=(*task.notes, *absent)) if absent else task
    found = unfitted_labels(task)
    if not found:
        return task
    what = "class" if task.kind == "multilabel" else "value"
    notes = [f"{label}: one {what} in train ({counts}), not fitted" for label, counts in found.items()]
    if len(notes) > MOST_NAMES:
        notes = [f"one {what} in train, not fitted: {', '.join(found)}"]
    return replace(masked_labels(task, found), notes=(*task.notes, *notes))


def masked_labels(task: Task, names: Collection[str]) -> Task:
    """The task with every entry of some labels masked in evaluation; training rows stay as they are."""
    if not names:
        return task
    mask = task.mask.copy()
    mask[:, [task.labels.index(name) for name in names]] = False
    return replace(task, mask=mask)


def _absent_classes(task: Task) -> list[str]:
    """A note on classes that test has and train has not: never predicted, and their rows count as wrong."""
    y, mask, _, _ = task.samples("train", "train")
    there = np.bincount(y[mask], minlength=len(task.labels)) > 0
    absent = [label for label, trained in zip(task.labels, there) if not trained]
    return [f"no row of {', '.join(absent)} in train: never predicted, rows of it count as wrong"] if absent else []
