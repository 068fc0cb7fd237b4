"""Few-shot curves: heads on n shots, many repeats in one batch, scored on test features that are read once.

`probes.shots` says what a shot is. A head sees its shots alone; `--select val` also sees validation labels, which the
record states as label budget, and its curves stand in tables of their own.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from featstore.errors import ConfigError, TaskError
from featstore.objects import Place
from featstore.store.catalog import Store
from probes.configs import TaskConfig
from probes.costs import HeadClock
from probes.curves import Values, class_metrics, label_metrics, macro_over_common, points, repeats_table
from probes.described import set_facts
from probes.evaluation import (
    choose_features,
    complete_sets,
    load_records_at,
    times_opened,
    with_token_mean,
)
from probes.fewshot_config import FewShotConfig, FewShotData
from probes.fewshot_heads import MAX_ROWS, Heads, Space, fit_heads, neighbour_scores
from probes.records import save_record
from probes.selection import check_two_classes
from probes.shots import (
    Budget,
    Shots,
    ShotTable,
    first_patients,
    percentage,
    pools,
    shared,
    systematic,
)
from probes.tasks import Samples, Task, choose_task, make_task
from probes.workers import worker_threads

CHUNK_BYTES = 1 << 28  # of shots, their products and scores, per worker


@dataclass(frozen=True)
class Curve:
    """Metrics of every budget B, repeat R and label L; NaN where a label has too few samples for a budget.

    `facts` say of each budget its name, the mean number of training rows of a head, the labels that are skipped and
    why, and the strengths chosen. `common` are the labels that the macro is over.
    """

    budgets: list[Budget]
    labels: tuple[str, ...]
    per_label: Values
    macro: Values
    facts: list[dict[str, Any]]
    common: tuple[str, ...]
    notes: tuple[str, ...]
    num_parameters: int


@dataclass
class _Tally:
    """What the heads of one budget tell of themselves."""

    strengths: list[float] = field(default_factory=list)
    at_edge: int = 0
    unconverged: int = 0
    without_choice: int = 0

    def add(self, heads: Heads) -> None:
        self.strengths += heads.strength[~np.isnan(heads.strength)].tolist()
        self.at_edge += int(heads.at_edge.sum())
        self.unconverged += int((~heads.converged).sum())
        self.without_choice += heads.without_choice

    def facts(self) -> dict[str, Any]:
        if not self.strengths:
            return {}
        low, middle, high = np.percentile(self.strengths, (0, 50, 100))
        return {
            "strength": {"min": low, "median": middle, "max": high, "at_edge": self.at_edge},
            "unconverged": self.unconverged,
            "without_choice": self.without_choice,
        }


def fit_fewshot(task: Task, features: str, config: FewShotConfig, *, seed: int = 0) -> Curve:
    """The curve of one head on one set and feature.

    Raises:
        TaskError: numbers instead of classes, or no label that has enough samples for any budget.
        ConfigError: more neighbours than shots.
    """
    if task.kind not in ("multilabel", "multiclass"):
        raise TaskError(f"few-shot curves are of labels and classes; task {task.name!r} holds {task.kind} values")
    X, y, mask, groups, _ = task.arrays("train", features)
    check_two_classes(task, "train", y, mask)
    space = Space.of(X, config.space)
    queries = space.of_all(task.arrays("test", features)[0])
    validation = space.of_all(task.arrays("val", features)[0]) if config.select == "val" else None
    run = _Run(task, config, X, space, queries, validation)
    names = list(task.labels)
    columns = names[1:] if task.kind == "multiclass" and len(names) == 2 else names
    draws = list(_draws(config, y, mask, groups, task, seed))
    shape = (len(draws), config.num_repeats, len(columns))
    per_label = {name: np.full(shape, np.nan) for name in ("auroc", "auprc", "balanced_accuracy")}
    macro = {name: np.full(shape[:2], np.nan) for name in ("auroc", "auprc", "accuracy", "balanced_accuracy")}
    facts = []
    if task.kind == "multiclass":
        del per_label["balanced_accuracy"]
    for number, (budget, shots, skipped) in enumerate(draws):
        tally = run.fill(shots, {n: v[number] for n, v in per_label.items()}, {n: v[number] for n, v in macro.items()})
        facts.append(
            {
                "name": budget.name,
                "shots": budget.shots,
                "percent": budget.percent,
                "mean_rows": float(shots.valid.sum(1).mean()) if len(shots.rows) else 0.0,
                "skipped": skipped,
                **tally.facts(),
            }
        )
    common = tuple(columns)
    if task.kind == "multilabel":
        macro, kept = macro_over_common(per_label)
        common = tuple(name for name, keep in zip(names, kept) if keep)
    if all(np.isnan(values).all() for values in per_label.values()):
        raise TaskError(f"task {task.name!r}: {_nothing(facts, config)}")
    notes = (*_budget_notes(config, len(task.index("val"))), *_notes(facts, common, columns, config))
    parameters = 0 if config.head == "knn" else len(columns) * (X.shape[1] + 1)
    return Curve([budget for budget, _, _ in draws], tuple(columns), per_label, macro, facts, common, notes, parameters)


def _draws(
    config: FewShotConfig, y: np.ndarray, mask: np.ndarray, groups: np.ndarray, task: Task, seed: int
) -> Iterator[tuple[Budget, Shots, dict[str, str]]]:
    """(budget, draws, why labels are skipped) of every budget asked for."""
    multiclass = task.kind == "multiclass"
    names = [task.spec.labels[0]] if multiclass else list(task.labels)
    num_classes = len(task.labels)
    labelled = np.flatnonzero(mask if multiclass else mask.any(1))
    if config.sampling == "random" and config.counts:
        found = pools(y, mask, groups, config.by, num_classes=num_classes)
        table = ShotTable.drawn(found, names, config.counts[-1], repeats=config.num_repeats, seed=seed)
        for count in config.counts:
            reasons = {
                name: f"{have} {config.by}s of its rarest class, {count} asked for"
                for name, have in zip(names, table.available.tolist())
                if have < count
            }
            yield Budget(_plural(count), shots=count), table.at(count), reasons
    elif config.counts:
        for count in config.counts:
            drawn = (
                first_patients(y, mask, groups, count, num_classes=num_classes)
                if config.sampling == "first"
                else systematic(labelled, count)
            )
            yield Budget(_plural(count), shots=count), *_with_both(shared([drawn], y, mask), names, num_classes, config)
    for percent in config.percents:
        drawn_all = percentage(labelled, groups, config.by, percent, repeats=config.num_repeats, seed=seed)
        yield (
            Budget(f"{percent:g} %", percent=percent),
            *_with_both(shared(drawn_all, y, mask), names, num_classes if multiclass else 2, config),
        )


def _plural(count: int) -> str:
    return f"{count} shot" if count == 1 else f"{count} shots"


def _with_both(shots: Shots, names: list[str], num_classes: int, config: FewShotConfig) -> tuple[Shots, dict[str, str]]:
    """Draws of the labels that have all their classes in every repeat, and why the others are left out."""
    classes = num_classes if len(names) == 1 and num_classes > 2 else 2
    complete = np.all([((shots.y == number) & shots.valid).any(1) for number in range(classes)], axis=0)
    missing = np.bincount(shots.label[~complete], minlength=len(names))
    reasons = {
        name: f"a class is missing in {count} of {config.num_repeats} draws"
        for name, count in zip(names, missing.tolist())
        if count
    }
    return shots.take(np.flatnonzero(missing[shots.label] == 0)), reasons


class _Run:
    """Everything that stays the same over budgets: features in memory once, truth, options."""

    def __init__(
        self,
        task: Task,
        config: FewShotConfig,
        X: Float[np.ndarray, "N D"],
        space: Space,
        queries: Tensor,
        validation: Tensor | None,
    ) -> None:
        self.task, self.config, self.space = task, config, space
        self.X, self.queries, self.validation = torch.from_numpy(X), queries, validation
        self.truth, self.val_truth = task.truth("test"), task.truth("val")
        self.num_classes = len(task.labels) if task.kind == "multiclass" else None

    def fill(self, shots: Shots, per_label: Values, macro: Values) -> _Tally:
        """Fit, score and measure all draws of a budget into arrays (R, L) and (R,)."""
        tally = _Tally()
        # A large problem brings its own threads; the others share them, a chunk of problems each.
        parts = self._chunks(shots)
        large = [part for part in parts if part.rows.shape[1] > MAX_ROWS]
        small = [part for part in parts if part.rows.shape[1] <= MAX_ROWS]
        for part in large:
            self._keep(part, self._measured(part), per_label, macro, tally)
        with worker_threads() as workers:
            for part, found in zip(small, workers.map(self._measured, small)):
                self._keep(part, found, per_label, macro, tally)
        return tally

    def _chunks(self, shots: Shots) -> list[Shots]:
        """Draws of one label and bounded size: draws of similar length together, so that little is filled up."""
        parts = []
        columns = self.num_classes or 1
        for label in np.unique(shots.label):
            of_label = np.flatnonzero(shots.label == label)
            lengths = shots.valid[of_label].sum(1)
            order = of_label[np.argsort(lengths, kind="stable")]
            length = max(1, int(lengths.max()))
            grid = 45 if self.config.select != "fixed" else 1
            each = 8 * (2 * length * self.X.shape[1] + 6 * length * length + 2 * grid * length * columns)
            scores = 8 * len(self.queries) * columns * 2
            if self.config.head == "knn":
                scores = 0  # queries go in blocks
            even = (
                len(order) if columns == 1 else -(-len(order) // (2 * torch.get_num_threads()))
            )  # work for every thread
            size = max(1, min(even, CHUNK_BYTES // (each + scores)))
            parts += [shots.take(order[first : first + size]) for first in range(0, len(order), size)]
        return parts

    def _keep(self, part: Shots, found: Any, per_label: Values, macro: Values, tally: _Tally) -> None:
        values, of_macro, heads = found
        for name, target in per_label.items():
            if self.task.kind == "multiclass":
                target[part.repeat] = values[name]
            else:
                target[part.repeat, part.label[0]] = values[name]
        for name, column in of_macro.items():
            macro[name][part.repeat] = column
        if heads is not None:
            tally.add(heads)

    def _measured(self, part: Shots) -> tuple[Values, Values, Heads | None]:
        """Metrics on test of the heads of some draws of one label."""
        if self.config.head == "knn":
            scores = neighbour_scores(
                self.X, self.space, self.queries, part, k=self.config.k, temperature=self.config.temperature or 0.07,
                num_classes=self.num_classes,
            )  # fmt: skip
            heads = None
        else:
            quality = self._val_quality(int(part.label[0])) if self.validation is not None else None
            heads = fit_heads(self.X, self.space, part, self.config, num_classes=self.num_classes, quality=quality)
            scores = heads.scores(self.queries)
        values, of_macro = self._metrics("test", scores, int(part.label[0]), self.truth)
        return values, of_macro, heads

    def _val_quality(self, label: int) -> Any:
        """Function from heads to their (macro) AUROC on validation."""
        assert self.validation is not None
        queries = self.validation

        def quality(heads: Heads) -> Float[np.ndarray, " E"]:
            values, of_macro = self._metrics("val", heads.scores(queries), label, self.val_truth)
            return np.asarray(of_macro["auroc"] if of_macro else values["auroc"])

        return quality

    def _metrics(self, split: str, scores: Tensor, label: int, truth: Samples) -> tuple[Values, Values]:
        """Metrics of scores (n, E) of a label, or (E, n, K) of classes; images of one unit are pooled first."""
        if self.task.kind == "multiclass":
            probabilities = scores.softmax(2) if self.config.head in ("logistic", "ncm") else scores
            pooled = self.task.pool(split, probabilities.numpy())
            per_class, macro = class_metrics(truth.y[truth.mask], pooled[:, truth.mask])
            return dict(per_class), dict(macro)
        threshold = 0.5 if self.config.head == "knn" else 0.0
        if self.task.unit_ids is not None and self.config.head != "knn":
            scores, threshold = torch.sigmoid(scores.double()), 0.5  # a mean of logits is no mean of probabilities
        pooled = self.task.pool(split, scores.numpy())
        rows = truth.mask[:, label]
        return dict(label_metrics(truth.y[rows, label] == 1, pooled[rows], threshold=threshold)), {}


def _budget_notes(config: FewShotConfig, num_val: int) -> list[str]:
    """What a shot is and what else the heads saw."""
    if config.sampling == "first":
        drawn = "shots: of each class the first n patients in order of name, with all their rows; no repeats"
    elif config.sampling == "systematic":
        drawn = "shots: n training samples in all at equal steps; no repeats"
    else:
        unit = "samples" if config.by == "sample" else "patients (with all their rows of that class)"
        drawn = (
            f"n shots: n positive and n negative {unit} of each label, or n of each class; masked samples are not "
            f"drawn; nested, {config.num_repeats} repeats; bands are 2.5 to 97.5 % over repeats"
        )
    notes = [drawn]
    if config.percents:
        notes.append(f"n %: share of the training {config.by}s, one draw for all labels")
    if config.space in ("standardize", "centred"):
        notes.append("features are scaled by all training features, without labels")
    if config.select == "val":
        notes.append(
            f"label budget: the strength was chosen on {num_val} labelled validation samples besides the shots"
        )
    return notes


def _notes(
    facts: list[dict[str, Any]], common: tuple[str, ...], columns: list[str], config: FewShotConfig
) -> list[str]:
    notes = [
        f"{point['name']}: skipped {', '.join(f'{label} ({why})' for label, why in point['skipped'].items())}"
        for point in facts
        if point["skipped"]
    ]
    if len(common) < len(columns):
        notes.append(_macro_note(common, columns))
    short = sum(point.get("unconverged", 0) for point in facts)
    if short:
        notes.append(f"not converged: {short} heads")
    for point in facts:
        if point.get("without_choice"):
            notes.append(
                f"{point['name']}: {point['without_choice']} heads have no second shot to hold out and take "
                f"{'C' if config.head == 'logistic' else 'alpha'}=1"
            )
    return notes


def _nothing(facts: list[dict[str, Any]], config: FewShotConfig) -> str:
    """Why no label has a point at any budget, and what to do."""
    found = []
    # n of each class are asked of the samples there are; other draws take what comes, which may lack a class.
    asked = [point["name"] for point in facts if point["shots"] is not None and config.sampling == "random"]
    taken = [point for point in facts if point["name"] not in asked]
    if any(point["skipped"] for point in facts if point["name"] in asked):
        found.append(f"no label has the samples that any of the budgets {', '.join(asked)} asks for; lower --shots")
    if any(point["skipped"] for point in taken):
        flag = "--percent" if config.sampling == "random" else "--shots"
        label, why = next(item for point in taken[::-1] for item in point["skipped"].items())
        found.append(
            f"no label has all its classes in the draws of {', '.join(point['name'] for point in taken)} ({label}: "
            f"{why}); raise {flag}"
        )
    return "; ".join(found) or "no label has both classes in test; choose other labels or splits"


def _macro_note(common: tuple[str, ...], columns: list[str]) -> str:
    """Which labels the macro is over, where it is not all."""
    which = "every budget that any label has, and both classes in test"
    left = ", ".join(name for name in columns if name not in common)
    if not common:
        return f"no macro: no label has {which}; ask for fewer budgets"
    return f"macro over {', '.join(common)}: the labels that have {which}; not {left}"


def evaluate_fewshot(
    store: Store,
    data: FewShotData,
    config: FewShotConfig,
    *,
    reading: TaskConfig | None = None,
    progress: Callable[[int], AbstractContextManager[Callable[[int], None]]] | None = None,
) -> list[dict[str, Any]]:
    """The curve of every chosen set and feature; returns the records, which are also on disk.

    Raises:
        UnknownNameError: no such data set, set, task, policy or label. IncompleteError: no chosen set is complete.
        TaskError: the task cannot be read or has too few samples. ConfigError: an option that curves do not have.
    """
    reading = reading or TaskConfig()
    if reading.policies or reading.test_dataset:
        flag = "--policies" if reading.policies else "--test-dataset"
        raise ConfigError(f"{flag} belongs to `probes linear` and `probes knn`; few-shot curves are of one task")
    manifest = store.manifest(data.dataset, data.manifest)
    labels = tuple(name.strip() for name in data.labels.split(",") if name.strip())
    spec = choose_task(manifest, task=data.task, labels=labels, where=data.where, reading=reading)
    sets = with_token_mean(complete_sets(store, data), data.features)
    tasks = [make_task(found, spec, allow_leak=data.allow_leak) for found in sets]
    jobs = [(task, features) for task in tasks for features in choose_features(task.features, data.features)]
    folder = data.results or store.path / "results"
    opened = times_opened(folder)
    records = []
    with progress(len(jobs)) if progress else nullcontext(lambda _: None) as advance:
        for task, features in jobs:
            opened[task.test_key] += 1
            times = opened[task.test_key] + opened[task.digest]
            records.append(record_curve(task, features, data, config, reading=reading, folder=folder, opened=times))
            advance(1)
    return records


def record_curve(
    task: Task,
    features: str,
    data: FewShotData,
    config: FewShotConfig,
    *,
    reading: TaskConfig,
    folder: Place,
    opened: int,
) -> dict[str, Any]:
    """Fit one curve and keep its record; its table holds the metrics of every head instead of predictions."""
    clock = HeadClock()
    curve = fit_fewshot(task, features, config, seed=data.seed)
    names = [budget.name for budget in curve.budgets]
    record = {
        "probe": "fewshot",
        "dataset": data.dataset,
        **set_facts(task),
        "features": features,
        "config": {"evaluation": asdict(data), "task": asdict(reading), "head": asdict(config)},
        "label_budget": {
            "unit": config.by,
            "selection": config.select,
            "validation_samples": len(task.index("val")) if config.select == "val" else 0,
        },
        "choices": {"scaling": config.space, "strength": "alpha" if config.head == "ridge" else "C"},
        "curve": points(curve.facts, curve.labels, curve.per_label, curve.macro),
        "macro_labels": list(curve.common),
        "test_opened": opened,
        "test_key": task.test_key,
        "seed": data.seed,
        "cost": clock.cost(curve.num_parameters),
        "deviations": list(task.spec.deviations),
        "notes": list(curve.notes),
    }
    table = repeats_table(names, curve.labels, curve.per_label, curve.macro)
    return load_records_at(save_record(folder, record, table))
