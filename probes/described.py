"""What a record states of its set, task and splits: facts, before anything is fitted."""

from typing import Any

import numpy as np

from featstore.pretraining import overlap_of_set
from probes.cross import CrossTask
from probes.roles import SPLITS
from probes.tasks import Task
from probes.unfitted import unfitted_labels


def tested_set(task: Task) -> Any:
    """The set whose rows are tested: the task's own, or that of another data set."""
    return task.target.features if isinstance(task, CrossTask) else task.features


def set_facts(task: Task) -> dict[str, Any]:
    """The set and the task of a record, and where its test rows come from if it is another data set."""
    source, tested = task.features, tested_set(task)
    known = source.manifest.meta["groups_known"] and tested.manifest.meta["groups_known"]
    return {
        "set": source.name,
        "fingerprint": source.fingerprint,
        "weights": source.spec["weights"],
        "random_weights": source.random,
        "preprocess": source.spec["identity"].get("preprocess"),
        "compute_dtype": source.spec["identity"].get("compute_dtype"),
        "manifest": source.manifest.digest,
        "groups": "known" if known else "unknown",
        "task": task_facts(task, known),
        **({"test": test_facts(task.target)} if isinstance(task, CrossTask) else {}),
        **({"fold": fold_facts(task)} if task.spec.fold is not None else {}),
        "num_failed": len(source.failures) + (len(tested.failures) if tested is not source else 0),
        "num_masked": masked_rows(task),
        "pretraining_overlap": overlap_of_set(
            source.spec["weights"],
            [item.manifest.meta["adapter"] for item in (source, tested)],
            random=source.random,
            datasets=[item.manifest.name for item in (source, tested)],
        ),
    }


def fold_facts(task: Task) -> dict[str, Any]:
    """Which fold this is, counted from 1."""
    fold = task.spec.fold
    assert fold is not None
    return {"number": fold.number + 1, "of": fold.of, "column": fold.column or None, "seed": fold.seed}


def task_facts(task: Task, groups_known: bool) -> dict[str, Any]:
    """The task as a record states it; `splits` count units, `images` the images behind them."""
    splits = {split: task.units(split) for split in SPLITS}
    patients = {split: _groups(task, split) for split in SPLITS}
    return {
        "name": task.name,
        "digest": task.digest,
        "kind": task.kind,
        "labels": list(task.labels),
        "not_fitted": list(unfitted_labels(task)),
        "spec": task.spec.as_dict(),
        "unit": task.spec.unit,
        "pool": task.spec.pool if task.spec.unit != "image" else None,
        "splits": {split: len(units.ids) for split, units in splits.items()},
        "images": {split: len(units.number) for split, units in splits.items()},
        "patients": {split: len(set(groups.tolist())) for split, groups in patients.items()},
        "groups_known": groups_known,
        "split_origin": task.features.manifest.meta["split_origin"],
        "notes": list(task.notes),
    }


def _groups(task: Task, split: str) -> np.ndarray:
    owner = task.target if isinstance(task, CrossTask) and split == "test" else task
    return np.asarray(owner.groups[owner.index(split)])


def test_facts(target: Task) -> dict[str, Any]:
    """Where the test rows of a cross-data-set test come from."""
    return {
        "dataset": target.features.manifest.name,
        "set": target.features.name,
        "fingerprint": target.features.fingerprint,
        "manifest": target.features.manifest.digest,
        "groups_known": target.features.manifest.meta["groups_known"],
        "split_origin": target.features.manifest.meta["split_origin"],
        "task": {"name": target.name, "digest": target.digest, "spec": target.spec.as_dict()},
    }


def masked_rows(task: Task) -> dict[str, int]:
    """Label entries that a split leaves out (blank or uncertain under its policy), of what a head sees."""
    return {split: int((~task.samples(split, "train" if split == "train" else "eval").mask).sum()) for split in SPLITS}
