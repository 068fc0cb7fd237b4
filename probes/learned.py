"""What a fine-tuned network has learned from, against the rows of a task on its features.

The weights of a run state its data set, manifest and task, and from these follows which rows trained it. Test rows
among them are a leak like a patient in two splits: a head on features that know its answers is scored too well.
"""

from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from featstore.datasets.manifest import Manifest
from featstore.errors import FeatstoreError, LeakError
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes.crossing import common_rows, one_release
from probes.roles import group_of
from probes.tasks import roles_of, task_digest
from probes.taskspec import TaskSpec


def learned_rows(features: FeatureSet, role: Shaped[np.ndarray, " N"], *, allow_leak: bool) -> tuple[str, ...]:
    """Notes on the runs behind a set's network and on the rows of a task (`role`) that they saw; the first names them.

    Rows are found by id and patient where one release numbers both, else by the bytes of their files, as far as their
    hashes are known. A run's validation rows count as seen: its epoch and learning rate were chosen on their labels.

    Raises:
        LeakError: test rows are among them, and that is not allowed.
    """
    runs = [run for run in features.spec["weights"].get("trained_on", ()) if run["changed"]]
    if not runs:
        return ()
    notes = ["network: " + "; then ".join(_said(run) for run in runs)]
    ours, store = features.manifest, Store(features.folder.parents[2])
    found, told = [], []
    for run in runs:
        held = _manifest_of(store, ours, run)
        then = None if held is None else _roles_then(held, run)
        if held is None or then is None:
            told.append(
                f"network: which rows of {run['dataset']} trained it cannot be told here, as manifest "
                f"{run['manifest'][:8]} and its task are not in this store; it may have seen rows that are tested"
            )
            continue
        seen = np.flatnonzero(np.isin(then, ["train", "val"]))
        shared, unknown = _shared(held, seen, ours, np.flatnonzero(role == "test"), store)
        told += unknown
        if shared:
            found.append(f"training {_said(run)} and testing on {ours.name} share {'; '.join(shared)}")
        fitted = seen if run["refit"] else np.flatnonzero(then == "train")
        shared, _ = _shared(held, fitted, ours, np.flatnonzero(role == "val"), store)
        if shared:
            told.append(
                f"val: the network was trained on {'; '.join(shared)} of it: what validation chooses is optimistic"
            )
    if found and not allow_leak:
        raise LeakError(
            f"the network of {features.name} has seen test rows: {'; '.join(found)}; test on rows that it was not "
            "trained or chosen on, or pass --allow-leak to mark the record"
        )
    return (*notes, *told, *(f"leak allowed: the network has seen test rows: {text}" for text in found))


def _shared(
    held: Manifest, seen: Int[np.ndarray, " n"], ours: Manifest, rows: Int[np.ndarray, " m"], store: Store
) -> tuple[list[str], list[str]]:
    """(what rows of one manifest share with rows of another, in words; notes on what cannot be told of it)."""
    if not one_release(held, ours):
        shared, hashed = common_rows(held, seen, ours, rows, store)
        total = len(seen) + len(rows)
        if hashed == total or not len(rows):
            return shared, []
        return shared, [
            f"network: rows of {held.name} that trained it were sought by their bytes among the {hashed} of {total} "
            f"images whose file has a known hash; it may have seen others of {ours.name} (an extracted set of "
            f"{held.name} in this store makes its hashes known)"
        ]
    found = []
    ids = set(np.array(held.column("id"))[seen].tolist()) & set(np.array(ours.column("id"))[rows].tolist())
    if ids:
        found.append(f"{len(ids)} images (by id), such as {min(ids)!r}")
    both = set(group_of(held)[seen].tolist()) & set(group_of(ours)[rows].tolist())
    groups = [group for group in both if not group.startswith("id:")]  # which stands for one image
    if groups:
        found.append(f"{len(groups)} groups (patients), such as {min(groups)!r}")
    return found, []


def _said(run: dict[str, Any]) -> str:
    began = " from random weights" if run["started_from"]["random"] else ""
    both = "train and val" if run["refit"] else "train"
    return (
        f"fine-tuned ({run['method']}, seed {run['seed']}){began} on the {both} rows of {run['dataset']}, "
        f"task {run['task']['name']}"
    )


def _manifest_of(store: Store, ours: Manifest, run: dict[str, Any]) -> Manifest | None:
    """The manifest that a run was trained on, where it is at hand."""
    if ours.digest == run["manifest"]:
        return ours
    try:
        return store.manifest(run["dataset"], run["manifest"][:8])
    except FeatstoreError:
        return None


def _roles_then(manifest: Manifest, run: dict[str, Any]) -> Shaped[np.ndarray, " N"] | None:
    """Roles of its rows in a run; None where they do not come out as they were."""
    task = run["task"]
    try:
        spec = TaskSpec.from_dict(task["spec"])
        role = roles_of(manifest, spec)
    except (FeatstoreError, TypeError):  # written by another version
        return None
    return role if task_digest(spec, manifest, role) == task["digest"] else None
