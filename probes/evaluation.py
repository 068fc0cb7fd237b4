"""From sets and a task to records: fit, choose on validation, score the test split once, keep everything."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pkgutil import resolve_name
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from featstore import files
from featstore.errors import CorruptError, IncompleteError, UnknownNameError
from featstore.objects import Place
from featstore.records import peak_memory_bytes
from featstore.request import command_of
from featstore.store.catalog import Entry, Store
from featstore.store.features import FeatureSet
from probes import PROBES
from probes.configs import EvalConfig
from probes.metrics import evaluate
from probes.records import prediction_columns, save_record
from probes.selection import Fitted
from probes.statistics import bootstrap
from probes.tasks import Task, choose_task, make_task

DEFAULT_FEATURES = ("cls+mean_patch", "cls")


def score(
    task: Task, rows: Int[np.ndarray, " n"], scores: Float[np.ndarray, "n L"], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Metrics of probabilities for manifest rows under the evaluation policy; intervals where `resamples` > 0."""
    mask = task.mask[rows]
    result: dict[str, Any] = dict(evaluate(task.y[rows], scores, mask, kind=task.kind, labels=task.labels))
    if resamples:
        result["intervals"] = bootstrap(
            task.y[rows],
            scores,
            mask,
            task.groups[rows],
            kind=task.kind,
            num_resamples=resamples,
            seed=seed,
            labels=task.labels,
        )
    return result


def evaluate_sets(
    store: Store,
    probe: str,
    config: EvalConfig,
    head: Any,
    *,
    progress: Callable[[int], AbstractContextManager[Callable[[int], None]]] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate one probe on every chosen set and feature; returns the records, which are also on disk.

    `progress(total)` opens a context whose value is told of every record made.

    Raises:
        UnknownNameError: no such data set, set, task or label. IncompleteError: no chosen set is complete.
    """
    manifest = store.manifest(config.dataset, config.manifest)
    labels = tuple(name.strip() for name in config.labels.split(",") if name.strip())
    spec = choose_task(manifest, task=config.task, labels=labels, where=config.where)
    tasks = [make_task(found, spec, allow_leak=config.allow_leak) for found in complete_sets(store, config)]
    jobs = [(task, features) for task in tasks for features in choose_features(task.features, config.features)]
    records = []
    folder = config.results or store.path / "results"
    opened = times_opened(folder, config.dataset)
    with progress(len(jobs)) if progress else nullcontext(lambda _: None) as advance:
        for task, features in jobs:
            opened[task.digest] += 1
            records.append(evaluate_one(probe, task, features, config, head, folder=folder, opened=opened[task.digest]))
            advance(1)
    return records


def times_opened(folder: Place, dataset: str) -> Counter[str]:
    """Task digest -> number of records that saw its test split; damaged records are told and passed over."""
    found: Counter[str] = Counter()
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            record = files.unseal(path.read_bytes(), path)
        except CorruptError as error:
            logging.getLogger(__name__).warning("not counted: %s", error)
            continue
        if record["dataset"] == dataset:
            found[record["task"]["digest"]] += 1
    return found


def complete_sets(store: Store, config: EvalConfig) -> list[FeatureSet]:
    """The chosen sets that have every row of the manifest; others are named with the command that completes them."""
    entries = store.find(config.dataset, config.model)
    if not entries:
        model, _, resolution = (config.model or "dinov3-base@512").partition("@")
        line = f"featstore extract --dataset {config.dataset} --model {model}" + (
            f" --res {resolution}" if resolution else ""
        )
        have = ", ".join(entry.name for entry in store.entries(config.dataset)) or "none"
        raise UnknownNameError(
            f"no set of {config.dataset!r} matches {config.model or 'any model'!r}; it has {have}; run\n  {line}"
        )
    complete, lines = [], []
    for entry in entries:
        features_set = _open_complete(store, entry, config.manifest)
        if features_set is None:
            lines.append(f"  {command_of(entry.spec, store.open(entry, manifest=config.manifest).arrays)}")
        else:
            complete.append(features_set)
    if lines:
        text = (
            f"{len(lines)} of {len(entries)} sets of {config.dataset!r} lack rows of this manifest; run\n"
            + "\n".join(lines)
        )
        if not complete or config.model:
            raise IncompleteError(text)
        logging.getLogger(__name__).warning(text)
    return complete


def _open_complete(store: Store, entry: Entry, manifest: str | None) -> FeatureSet | None:
    features_set = store.open(entry, manifest=manifest)
    try:
        return None if features_set.pending().any() else features_set
    except IncompleteError:
        return None


def choose_features(features_set: FeatureSet, asked: str | None) -> list[str]:
    """The features asked for, or the defaults that the set has."""
    if asked is not None:
        return [asked]
    return [name for name in DEFAULT_FEATURES if all(part in features_set.arrays for part in name.split("+"))] or [
        "cls"
    ]


def evaluate_one(
    probe: str, task: Task, features: str, config: EvalConfig, head: Any, *, folder: Place, opened: int
) -> dict[str, Any]:
    """Fit one probe on one set and feature, and keep its record, the `opened`-th that sees this task's test split."""
    started = time.monotonic()
    fitted: Fitted = resolve_name(PROBES[probe])(task, features, head)
    rows = {split: task.index(split) for split in ("train", "val", "test")}
    val = fitted.val_metrics or score(task, rows["val"], fitted.val_scores, resamples=0, seed=config.seed)
    test = score(task, rows["test"], fitted.test_scores, resamples=config.resamples, seed=config.seed)
    source = task.features
    record = {
        "probe": probe,
        "dataset": config.dataset,
        "set": source.name,
        "fingerprint": source.fingerprint,
        "weights": source.spec["weights"],
        "random_weights": source.random,
        "preprocess": source.spec["identity"].get("preprocess"),
        "compute_dtype": source.spec["identity"].get("compute_dtype"),
        "manifest": source.manifest.digest,
        "task": {
            "name": task.name,
            "digest": task.digest,
            "kind": task.kind,
            "labels": list(task.labels),
            "spec": task.spec.as_dict(),
            "unit": "image",
            "splits": {split: len(index) for split, index in rows.items()},
            "patients": {split: len(set(task.groups[index].tolist())) for split, index in rows.items()},
            "groups_known": source.manifest.meta["groups_known"],
            "split_origin": source.manifest.meta["split_origin"],
            "notes": list(task.notes),
        },
        "features": features,
        "config": {"evaluation": asdict(config), "head": asdict(head)},
        "choices": fitted.choices,
        "metrics": {"val": val, "test": test},
        "num_failed": len(source.failures),
        "num_masked": _masked(task, rows),
        "test_opened": opened,
        "seed": config.seed,
        "cost": {
            "seconds": round(time.monotonic() - started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "trainable_parameters": fitted.num_parameters,
            "gpu_seconds": 0.0,
        },
        "deviations": [],
        "pretraining_overlap": "no" if source.random else "unknown",
        "notes": list(fitted.notes),
    }
    path = save_record(
        folder, record, prediction_columns(task, {"val": _val_scores(fitted, rows), "test": fitted.test_scores})
    )
    return load_records_at(path)


def load_records_at(path: Any) -> dict[str, Any]:
    """One record by its file."""
    return {**files.unseal(path.read_bytes(), path), "file": str(path)}


def _val_scores(fitted: Fitted, rows: dict[str, np.ndarray]) -> np.ndarray:
    """Scores of the validation rows only: after a refit the out-of-fold scores of val are the last rows."""
    return fitted.val_scores[-len(rows["val"]) :] if len(rows["val"]) else fitted.val_scores[:0]


def _masked(task: Task, rows: dict[str, np.ndarray]) -> dict[str, int]:
    """Label entries that a split leaves out (blank or uncertain under its policy)."""
    return {
        split: int((~(task.mask_train if split == "train" else task.mask)[index]).sum())
        for split, index in rows.items()
    }
