"""From sets and a task to records: fit, choose on validation, score the test split once, keep everything."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pkgutil import resolve_name
from typing import Any

from featstore import files
from featstore.errors import ConfigError, CorruptError
from featstore.objects import Place
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes import BASELINES, PROBES
from probes.configs import EvalConfig, SplitConfig, TaskConfig
from probes.costs import HeadClock
from probes.cross import CrossTask, best_task, cross_task, matching_set
from probes.crossval import with_summaries
from probes.described import set_facts
from probes.folds import fold_specs
from probes.nested import Nested, nested_intervals
from probes.operating import operating
from probes.records import load_records_at, prediction_columns, save_record
from probes.scoring import HEADLINE, score
from probes.selection import Fitted
from probes.sensitivity import PolicyComparison, policy_specs
from probes.sets import choose_features, complete_sets, feature_candidates, with_patches, with_token_mean
from probes.tasks import Task, choose_task, make_task
from probes.taskspec import TaskSpec

__all__ = [
    "choose_features",
    "complete_sets",
    "evaluate_one",
    "evaluate_sets",
    "load_records_at",
    "with_token_mean",
]

Compare = Callable[[Task, Fitted], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Job:
    """One record to make; `compare` adds what a sensitivity table needs.

    Of `candidates`, where there are any, the features that are best on validation take the place of `features`.
    """

    task: Task
    features: str
    compare: Compare | None = None
    candidates: tuple[str, ...] = ()
    splits: SplitConfig = field(default_factory=SplitConfig)


def evaluate_sets(
    store: Store,
    probe: str,
    config: EvalConfig,
    head: Any,
    *,
    reading: TaskConfig | None = None,
    splits: SplitConfig | None = None,
    progress: Callable[[int], AbstractContextManager[Callable[[int], None]]] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate one probe on every chosen set and feature; returns the records, which are also on disk.

    `reading` changes how the task is read, asks for one record per training policy, or names other data sets to test
    on. `splits` asks for folds: one record each, then one over all of them. `progress(total)` opens a context whose
    value is told of every record made.

    Raises:
        UnknownNameError: no such data set, set, task, policy or label. IncompleteError: no chosen set is complete.
        TaskError: the task cannot be read, fitted or scored, or not tested on the other data set.
        ConfigError: options that exclude each other.
    """
    reading, splits = reading or TaskConfig(), splits or SplitConfig()
    check_together(config, reading, splits)
    manifest = store.manifest(config.dataset, config.manifest)
    labels = tuple(name.strip() for name in config.labels.split(",") if name.strip())
    spec = choose_task(manifest, task=config.task, labels=labels, where=config.where, reading=reading)
    sets = with_token_mean(complete_sets(store, config), config.features)
    sets = with_patches(sets, config.features, head)
    if reading.policies:
        jobs = _policy_jobs(sets, spec, config, reading, splits, head)
    else:
        specs = fold_specs(manifest, spec, splits)
        jobs = []
        for found in sets:
            made = [make_task(found, item, allow_leak=config.allow_leak) for item in specs]
            for task in made[1:]:
                task.share_loaded(made[0])
            if reading.tests:
                made = [
                    task
                    for name, other in reading.tests
                    for task in _tested_on(store, made, (name, other), config, reading)
                ]
            jobs += _jobs(found, made, config, splits, head)
    records = []
    folder = config.results or store.path / "results"
    opened = times_opened(folder)
    with progress(len(jobs)) if progress else nullcontext(lambda _: None) as advance:
        for number, job in enumerate(jobs):
            opened[job.task.test_key] += 1
            # Records from before test splits had a key are counted by their task.
            times = opened[job.task.test_key] + opened[job.task.digest]
            records.append(evaluate_one(probe, job, config, head, reading=reading, folder=folder, opened=times))
            if number + 1 == len(jobs) or jobs[number + 1].task.features is not job.task.features:
                job.task.forget_loaded()
            advance(1)
    return records if not splits.crossed else with_summaries(records, folder, opened)


def check_together(config: EvalConfig, reading: TaskConfig, splits: SplitConfig) -> None:
    """Options of different groups that cannot be meant together.

    Raises:
        ConfigError: there are some.
    """
    folds = "--fold-column" if splits.fold_column else "--folds"
    for flag, given, other, taken in (
        (folds, splits.crossed, "--policies", bool(reading.policies)),
        (folds, splits.crossed, "--test-dataset", bool(reading.test_dataset)),
        ("--choose-features", config.choose_features, "--policies", bool(reading.policies)),
        # A patient trains some folds and tests another, so heads of all folds would have to be drawn together.
        (folds, splits.crossed, "--train-resamples", splits.train_resamples is not None),
    ):
        if given and taken:
            raise ConfigError(f"{flag} and {other} exclude each other; give one")
    if config.dataset in reading.test_datasets:
        raise ConfigError(
            f"--test-dataset {config.dataset} is the data set itself, whose own test split is scored without that; "
            "name another data set, or leave it out"
        )
    if splits.train_resamples is not None and splits.train_resamples > config.resamples:
        raise ConfigError(
            f"--train-resamples {splits.train_resamples} needs as many --resamples, got {config.resamples}: every head "
            "is scored on resamples of its own"
        )


def _jobs(found: FeatureSet, tasks: Sequence[Task], config: EvalConfig, splits: SplitConfig, head: Any) -> list[Job]:
    """A job per task and feature of a set, feature by feature; one per task where features are chosen."""
    if config.choose_features:
        names = feature_candidates(found, config.features)
        return [Job(task, names[0], candidates=names, splits=splits) for task in tasks]
    asked = choose_features(found, config.features, head)
    if splits.crossed:  # all folds on one matrix
        return [Job(task, name, splits=splits) for name in asked for task in tasks]
    return [Job(task, name, splits=splits) for task in tasks for name in asked]


def _policy_jobs(
    sets: list[FeatureSet], spec: TaskSpec, config: EvalConfig, reading: TaskConfig, splits: SplitConfig, head: Any
) -> list[Job]:
    specs = policy_specs(spec, reading.policies)
    by_set = [[make_task(found, item, allow_leak=config.allow_leak) for item in specs.values()] for found in sets]
    jobs = []
    for tasks in by_set:
        for features in choose_features(tasks[0].features, config.features, head):
            compare = PolicyComparison(list(specs), resamples=config.resamples, seed=config.seed)
            jobs += [Job(task, features, compare, splits=splits) for task in tasks]
    return jobs


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
        # What its own training rows share with its test rows does not matter: they are not used.
        target = make_task(matching_set(store, task.features, dataset), spec, allow_leak=True, splits=("test",))
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


def evaluate_one(
    probe: str, job: Job, config: EvalConfig, head: Any, *, reading: TaskConfig, folder: Place, opened: int
) -> dict[str, Any]:
    """Fit one probe on one set and feature, and keep its record, the `opened`-th that sees this test split."""
    clock = HeadClock()
    task = job.task
    features, fitted, val, compared = _fit(probe, job, config, head)
    nested = {}
    if job.splits.train_resamples is not None:
        draws = Nested(job.splits.train_resamples, config.resamples, config.seed)
        nested = {"intervals_nested": nested_intervals(probe, task, features, head, fitted, draws)}
    return keep_record(
        probe,
        replace(job, features=features),
        fitted,
        {"evaluation": config, "task": reading, "splits": job.splits, "head": head},
        metrics={"val": val, "test": nested},
        choices=compared,
        cost=lambda: clock.cost(fitted.num_parameters),
        folder=folder,
        opened=opened,
    )


def keep_record(
    probe: str,
    job: Job,
    fitted: Fitted,
    config: dict[str, Any],
    *,
    metrics: dict[str, dict[str, Any]],
    cost: Callable[[], dict[str, Any]],
    folder: Place,
    opened: int,
    choices: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Score the test split, and keep the record of what was fitted, the `opened`-th that sees it.

    `config` holds the options by group; `evaluation` has `dataset`, `resamples` and `seed`. `metrics` holds those of
    validation and what is to stand beside the test's own; `cost` is asked when all is scored.
    """
    task, asked = job.task, config["evaluation"]
    test = score(task, "test", fitted.test_scores, resamples=asked.resamples, seed=asked.seed)
    decided, warnings = operating(
        task, fitted, resamples=asked.resamples, seed=asked.seed, test_youden=job.splits.test_youden
    )
    test |= metrics["test"]
    record = {
        "probe": probe,
        "dataset": asked.dataset,
        **set_facts(task),
        **({"sensitivity": job.compare(task, fitted)} if job.compare is not None else {}),
        "features": job.features,
        "config": {name: value if isinstance(value, dict) else asdict(value) for name, value in config.items()},
        "choices": fitted.choices | (choices or {}),
        "metrics": {"val": metrics["val"], "test": test | decided},
        "test_opened": opened,
        "test_key": task.test_key,
        "seed": asked.seed,
        "cost": cost(),
        "deviations": [*task.spec.deviations, *fitted.choices.get("protocol_deviations", [])],
        "notes": [*fitted.notes, *filter(None, task.repeats.values()), *warnings],
    }
    predictions = prediction_columns(task, {"val": fitted.val_scores, "test": fitted.test_scores})
    return load_records_at(save_record(folder, record, predictions))


def _fit(probe: str, job: Job, config: EvalConfig, head: Any) -> tuple[str, Fitted, dict[str, Any], dict[str, Any]]:
    """(features, what was fitted on them, its metrics on validation, what a choice of features adds to the choices).

    Of several candidates the first with the best validation quality; no test label is looked at.
    """
    fit = resolve_name((PROBES | BASELINES)[probe])
    name = HEADLINE[job.task.kind]
    best: tuple[str, Fitted, dict[str, Any]] | None = None
    qualities: dict[str, float] = {}
    for features in job.candidates or (job.features,):
        fitted: Fitted = fit(job.task, features, head)
        val = fitted.val_metrics or score(job.task, "val", fitted.val_scores, resamples=0, seed=config.seed)
        qualities[features] = float(val["macro"][name])
        if best is None or qualities[features] > qualities[best[0]]:
            best = features, fitted, val
    assert best is not None
    return *best, {"features": {"chosen": best[0], f"val_{name}": qualities}} if job.candidates else {}
