"""From sets and a task to records: fit, choose on validation, score the test split once, keep everything."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pkgutil import resolve_name
from typing import Any

import numpy as np

from featstore import files
from featstore.errors import CorruptError, IncompleteError, UnknownNameError
from featstore.objects import Place
from featstore.pretraining import overlap_of_set
from featstore.records import peak_memory_bytes
from featstore.request import command_of
from featstore.store.catalog import Entry, Store
from featstore.store.features import FeatureSet
from probes import PROBES
from probes.configs import EvalConfig, TaskConfig
from probes.cross import CrossTask, best_task, cross_task, matching_set
from probes.records import prediction_columns, save_record
from probes.roles import SPLITS
from probes.scoring import score
from probes.selection import Fitted
from probes.sensitivity import PolicyComparison, policy_specs
from probes.tasks import Task, choose_task, make_task

DEFAULT_FEATURES = ("cls+mean_patch", "cls")
TOKEN_MEAN = "mean_all"


Compare = Callable[[Task, Fitted, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Job:
    """One record to make; `compare` adds what a sensitivity table needs."""

    task: Task
    features: str
    compare: Compare | None = None


def evaluate_sets(
    store: Store,
    probe: str,
    config: EvalConfig,
    head: Any,
    *,
    reading: TaskConfig | None = None,
    progress: Callable[[int], AbstractContextManager[Callable[[int], None]]] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate one probe on every chosen set and feature; returns the records, which are also on disk.

    `reading` changes how the task is read, asks for one record per training policy, or names other data sets to test
    on. `progress(total)` opens a context whose value is told of every record made.

    Raises:
        UnknownNameError: no such data set, set, task, policy or label. IncompleteError: no chosen set is complete.
        TaskError: the task cannot be read, fitted or scored, or not tested on the other data set.
    """
    reading = reading or TaskConfig()
    manifest = store.manifest(config.dataset, config.manifest)
    labels = tuple(name.strip() for name in config.labels.split(",") if name.strip())
    spec = choose_task(manifest, task=config.task, labels=labels, where=config.where, reading=reading)
    sets = with_token_mean(complete_sets(store, config), config.features)
    if reading.policies:
        specs = policy_specs(spec, reading.policies)
        by_set = [[make_task(found, item, allow_leak=config.allow_leak) for item in specs.values()] for found in sets]
        jobs = []
        for tasks in by_set:
            for features in choose_features(tasks[0].features, config.features):
                compare = PolicyComparison(list(specs), resamples=config.resamples, seed=config.seed)
                jobs += [Job(task, features, compare) for task in tasks]
    else:
        made = [make_task(found, spec, allow_leak=config.allow_leak) for found in sets]
        if reading.tests:
            made = [
                task
                for name, other in reading.tests
                for task in _tested_on(store, made, (name, other), config, reading)
            ]
        jobs = [Job(task, features) for task in made for features in choose_features(task.features, config.features)]
    records = []
    folder = config.results or store.path / "results"
    opened = times_opened(folder)
    with progress(len(jobs)) if progress else nullcontext(lambda _: None) as advance:
        for job in jobs:
            opened[job.task.test_key] += 1
            # Records from before test splits had a key are counted by their task.
            times = opened[job.task.test_key] + opened[job.task.digest]
            records.append(evaluate_one(probe, job, config, head, reading=reading, folder=folder, opened=times))
            advance(1)
    return records


def _tested_on(
    store: Store, tasks: list[Task], other: tuple[str, str | None], config: EvalConfig, reading: TaskConfig
) -> list[CrossTask]:
    """The tasks with the test rows of another data set, under the task that is named, or the one that fits best."""
    dataset, name = other
    manifest, reading = store.manifest(dataset), replace(reading, train_policy=None)
    crossed = []
    for task in tasks:
        if name is None:
            spec, chosen = best_task(task, manifest, reading)
        else:
            spec, chosen = choose_task(manifest, task=name, reading=reading), ""
        target = make_task(matching_set(store, task.features, dataset), spec, allow_leak=config.allow_leak)
        crossed.append(cross_task(task, target, store=store, allow_leak=config.allow_leak, chosen=chosen))
    return crossed


def times_opened(folder: Place) -> Counter[str]:
    """Key of a test split -> number of records that saw it, whatever their task, also as another data set's test.

    Records from before there was a key count by the digest of their task; damaged ones are told and passed over.
    """
    found: Counter[str] = Counter()
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            record = files.unseal(path.read_bytes(), path)
        except CorruptError as error:
            logging.getLogger(__name__).warning("not counted: %s", error)
            continue
        found[record.get("test_key") or record["task"]["digest"]] += 1
    return found


def complete_sets(store: Store, config: EvalConfig) -> list[FeatureSet]:
    """The chosen sets that have every row of the manifest; others are named with the command that completes them."""
    entries = store.find(config.dataset, config.model)
    if not entries:
        model, _, resolution = (config.model or "dinov3-base@512").partition("@")
        line = f"featstore extract --dataset {config.dataset} --model {model}" + (
            f" --res {resolution}" if resolution else ""
        )
        have = ", ".join(entry.name for entry in store.find(config.dataset)) or "none"
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


def with_token_mean(sets: list[FeatureSet], features: str | None) -> list[FeatureSet]:
    """Of several sets those that have the features asked for: networks that pool have no mean over all tokens.

    They are named and passed over, unless nothing else would be left: then the error says why.
    """
    pooled = [
        item.name
        for item in sets
        if features == TOKEN_MEAN and item.spec["identity"].get("architecture", {}).get("summary") == "pool"
    ]
    if not pooled or len(pooled) == len(sets):
        return sets
    logging.getLogger(__name__).warning(
        "skipped, no CLS token to take a mean_all with: %s; --features cls+mean_patch has them", ", ".join(pooled)
    )
    return [item for item in sets if item.name not in pooled]


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
    probe: str, job: Job, config: EvalConfig, head: Any, *, reading: TaskConfig, folder: Place, opened: int
) -> dict[str, Any]:
    """Fit one probe on one set and feature, and keep its record, the `opened`-th that sees this test split."""
    started = time.monotonic()
    task = job.task
    fitted: Fitted = resolve_name(PROBES[probe])(task, job.features, head)
    val = fitted.val_metrics or score(task, "val", fitted.val_scores, resamples=0, seed=config.seed)
    test = score(task, "test", fitted.test_scores, resamples=config.resamples, seed=config.seed)
    source = task.features
    tested = task.target.features if isinstance(task, CrossTask) else source
    known = source.manifest.meta["groups_known"] and tested.manifest.meta["groups_known"]
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
        "groups": "known" if known else "unknown",
        "task": task_facts(task, known),
        **({"test": _test_facts(task.target)} if isinstance(task, CrossTask) else {}),
        **({"sensitivity": job.compare(task, fitted, test)} if job.compare is not None else {}),
        "features": job.features,
        "config": {"evaluation": asdict(config), "task": asdict(reading), "head": asdict(head)},
        "choices": fitted.choices,
        "metrics": {"val": val, "test": test},
        "num_failed": len(source.failures) + (len(tested.failures) if tested is not source else 0),
        "num_masked": masked_rows(task),
        "test_opened": opened,
        "test_key": task.test_key,
        "seed": config.seed,
        "cost": {
            "seconds": round(time.monotonic() - started, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "trainable_parameters": fitted.num_parameters,
            "gpu_seconds": 0.0,
        },
        "deviations": [*task.spec.deviations, *fitted.choices.get("protocol_deviations", [])],
        "pretraining_overlap": overlap_of_set(
            source.spec["weights"],
            [item.manifest.meta["adapter"] for item in (source, tested)],
            random=source.random,
        ),
        "notes": list(fitted.notes),
    }
    predictions = prediction_columns(task, {"val": fitted.val_scores, "test": fitted.test_scores})
    return load_records_at(save_record(folder, record, predictions))


def task_facts(task: Task, groups_known: bool) -> dict[str, Any]:
    """The task as a record states it; `splits` count units, `images` the images behind them."""
    splits = {split: task.units(split) for split in SPLITS}
    patients = {split: _groups(task, split) for split in SPLITS}
    return {
        "name": task.name,
        "digest": task.digest,
        "kind": task.kind,
        "labels": list(task.labels),
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


def _test_facts(target: Task) -> dict[str, Any]:
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


def load_records_at(path: Any) -> dict[str, Any]:
    """One record by its file."""
    return {**files.unseal(path.read_bytes(), path), "file": str(path)}


def masked_rows(task: Task) -> dict[str, int]:
    """Label entries that a split leaves out (blank or uncertain under its policy), of what a head sees."""
    return {split: int((~task.samples(split, "train" if split == "train" else "eval").mask).sum()) for split in SPLITS}
