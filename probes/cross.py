"""Tests on another data set: fitted and chosen on one, tested on the other, by the labels that both have.

Labels meet through the words of `TaskSpec.names` and `probes.words`; the two sets must be the same backbone, weights,
geometry, intensity and dtype, so that only the patients differ, and no image or patient may be on both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Real

from featstore import files
from featstore.datasets.manifest import Manifest
from featstore.errors import IncompleteError, TaskError, UnknownNameError
from featstore.request import command_of
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from featstore.store.layout import differences, set_name
from probes.configs import TaskConfig
from probes.crossing import shared_rows
from probes.known import TASKS
from probes.learned import learned_rows
from probes.repeats import judge_repeats, repeated_features
from probes.tasks import Samples, Task, choose_task, missing_columns, read_as
from probes.taskspec import TaskSpec
from probes.unfitted import masked_labels, unfitted_labels
from probes.units import Units
from probes.words import word_of


@dataclass(frozen=True, kw_only=True)
class CrossTask(Task):
    """A task whose training and validation rows are its own and whose test rows are those of `target`."""

    target: Task

    @cached_property
    def digest(self) -> str:
        """Changes with either task and with the labels they share."""
        source = Task(**{name: getattr(self, name) for name in Task.__dataclass_fields__})
        return files.digest([source.digest, self.target.digest, list(self.labels)])

    def index(self, split: str) -> Int[np.ndarray, " n"]:
        """Manifest rows of a split; test rows are those of the other manifest."""
        return self.target.index(split) if split == "test" else super().index(split)

    def samples(self, split: str, policy: Literal["train", "eval"]) -> Samples:
        """What a head sees of a split."""
        return self.target.samples(split, policy) if split == "test" else super().samples(split, policy)

    def truth(self, split: str) -> Samples:
        """What is scored of a split."""
        return self.target.truth(split) if split == "test" else super().truth(split)

    def units(self, split: str) -> Units:
        """The rows of a split gathered by unit."""
        return self.target.units(split) if split == "test" else super().units(split)

    def pool(self, split: str, scores: Float[np.ndarray, "... n L"]) -> Float[np.ndarray, "... U L"]:
        """Scores of what a head sees as scores of what is counted."""
        return self.target.pool(split, scores) if split == "test" else super().pool(split, scores)

    def arrays(
        self, split: str, features: str = "cls+mean_patch"
    ) -> tuple[Float[np.ndarray, "n D"], Real[np.ndarray, "n ..."], Bool[np.ndarray, "n ..."], np.ndarray, list[str]]:
        """(X float32, y, mask, groups, ids) of one split."""
        if split != "test":
            return super().arrays(split, features)
        self._check_shared(features)
        return self.target.arrays(split, features)

    def _check_shared(self, features: str) -> None:
        """Once for each: no test row has features equal in every bit to those of a row that is fitted or chosen on."""
        key = f"{features} of both data sets"
        if key in self.repeats:
            return
        seen = np.union1d(self.index("train"), self.index("val"))
        test = self.target.index("test")
        values = np.concatenate([self._load(features)[seen], self.target._load(features)[test]])
        role = np.array(["train"] * len(seen) + ["test"] * len(test))
        ids = [*self.features.manifest.column("id"), *self.target.features.manifest.column("id")]
        ids = [ids[row] for row in [*seen, *(test + len(self.features.manifest))]]
        groups = np.concatenate([self.groups[seen], self.target.groups[test]])
        found = repeated_features(values, role, np.arange(len(values)))
        notes = judge_repeats(found, f"images with equal {features}", ids, role, groups, self.allow_leak)
        self.repeats[key] = "; ".join(notes)


def word_in(spec: TaskSpec, label: str) -> str:
    """The word by which a label of a task meets those of another data set; that of a class is its own name."""
    word = dict(spec.names).get(label, label)
    return word if label not in spec.labels else word_of(word)


def words_of(task: Task) -> dict[str, str]:
    """Common word -> label of a task; a label without one stands for itself.

    Raises:
        TaskError: two labels mean the same word.
    """
    words: dict[str, str] = {}
    for label in task.labels:
        word = word_in(task.spec, label)
        if word in words:
            raise TaskError(
                f"task {task.name!r}: the labels {words[word]!r} and {label!r} both mean {word!r}, so neither can be "
                "tested on another data set; merge them in a task of their own"
            )
        words[word] = label
    return words


def best_task(source: Task, manifest: Manifest, reading: TaskConfig) -> tuple[TaskSpec, str]:
    """The task of another data set that shares most labels with `source`, and what to say of the choice.

    Of several the default one, else the one with fewest other labels, else the first.

    Raises:
        TaskError: the data set has neither labels nor a default task.
    """
    default = read_as(choose_task(manifest), reading)
    offered = [name for name in manifest.meta["tasks"] if name in TASKS and not missing_columns(manifest, TASKS[name])]
    specs = [default, *(read_as(TASKS[name], reading) for name in offered if name != default.name)]
    ours = {word_in(source.spec, label) for label in source.labels}

    def rank(spec: TaskSpec) -> tuple[int, bool, int]:
        theirs = {word_in(spec, label) for label in (spec.classes if source.kind == "multiclass" else spec.labels)}
        alike = spec.kind in ("auto", source.kind) and (spec.unit, spec.pool) == (source.spec.unit, source.spec.pool)
        return -len(ours & theirs) * alike, spec is not default, len(theirs)

    best = min(specs, key=rank)
    chosen = "which shares most labels" if len(specs) > 1 else "its default"
    return best, f"{manifest.name}: task {best.name}, {chosen}; --test-task names another"


def cross_task(
    source: Task, target: Task, *, store: Store | None = None, allow_leak: bool = False, chosen: str = ""
) -> CrossTask:
    """A task that trains and selects on `source` and tests on `target`, on the labels that both have.

    With `store` byte-identical images are sought by every hash that it knows. `chosen` becomes a note.

    Raises:
        TaskError: tasks of two kinds or units, no label in common, or classes that differ.
        LeakError: an image or a patient of the test rows is trained or chosen on.
    """
    where = f"task {source.name!r} cannot be tested on {target.name!r} of {target.features.manifest.name!r}"
    if source.kind != target.kind:
        raise TaskError(f"{where}: one is {source.kind}, the other {target.kind}; choose another --test-task")
    if (source.spec.unit, source.spec.pool) != (target.spec.unit, target.spec.pool):
        raise TaskError(
            f"{where}: they count {source.spec.unit} ({source.spec.pool}) and {target.spec.unit} ({target.spec.pool}); "
            "set both with --unit and --pool"
        )
    ours, theirs = words_of(source), words_of(target)
    shared = [word for word in ours if word in theirs]
    if source.kind == "multiclass" and set(ours) != set(theirs):
        raise TaskError(f"{where}: classes must be the same; got {', '.join(ours)} and {', '.join(theirs)}")
    if source.kind == "ordinal" and source.spec.classes != target.spec.classes:
        raise TaskError(f"{where}: ordered classes must be the same; name them with --classes")
    if not shared:
        raise TaskError(
            f"{where}: no label in common; one has {', '.join(ours)}, the other {', '.join(theirs)}; give the tasks "
            "`names`, or choose another --test-task"
        )
    source, target = _narrowed(source, ours, shared), _narrowed(target, theirs, shared)
    target = masked_labels(target, unfitted_labels(source))
    notes = [f"tested on {target.features.manifest.name}, task {target.name}: {len(shared)} shared labels"]
    notes += [chosen] if chosen else []
    for task, words in ((source, ours), (target, theirs)):
        alone = [word for word in words if word not in shared]
        if alone:
            notes.append(f"labels of {task.features.manifest.name} alone, left out: {', '.join(alone)}")
    notes += shared_rows(source, target, store, allow_leak=allow_leak)
    notes += learned_rows(target.features, np.where(target.role == "test", "test", ""), allow_leak=allow_leak)[1:]
    if "imported" in source.features.spec["identity"]:
        notes.append("imported features: that both sets come from one network is taken from their name")
    values = {name: getattr(source, name) for name in Task.__dataclass_fields__}
    # What the target says of rows to train and select on is about rows that are not used.
    unused = ("train: ", "val: ", "leak allowed: ", "training policy: ", "network: ")
    kept = [note for note in target.notes if not note.startswith(unused)]
    test_notes = [f"{target.features.manifest.name}: {note}" for note in kept]
    notes = [*source.notes, *test_notes, *notes]
    values |= {"notes": tuple(notes), "test_key": target.test_key, "allow_leak": allow_leak}
    return CrossTask(**values, target=target)


def _narrowed(task: Task, words: dict[str, str], shared: Sequence[str]) -> Task:
    """The task on the shared labels, in their order and by their common words."""
    columns = [task.labels.index(words[word]) for word in shared]
    arrays: dict[str, Any] = {}
    for name in ("y", "y_train", "mask", "mask_train"):
        values = getattr(task, name)
        if task.kind != "multiclass":
            arrays[name] = values[:, columns]
        elif name.startswith("y"):
            arrays[name] = np.argsort(columns)[values]  # class numbers in the order of the words
    return replace(task, labels=tuple(shared), **arrays)


def matching_set(store: Store, source: FeatureSet, dataset: str) -> FeatureSet:
    """The complete set of another data set that was made exactly as `source`.

    Raises:
        UnknownNameError: none of that name. TaskError: made otherwise; what differs is listed.
        IncompleteError: rows are missing.
    """
    wanted = _facts(source.spec)
    entries = store.find(dataset, set_name(source.spec))
    line = command_of({**source.spec, "dataset": dataset}, source.arrays)
    if not entries:
        store.manifest(dataset)  # an unknown data set has its own message
        raise UnknownNameError(f"data set {dataset!r} has no set like {source.name}; run\n  {line}")
    equal = [entry for entry in entries if _facts(entry.spec) == wanted]
    if not equal:
        keys = [key for key, _, _ in differences(wanted, _facts(entries[0].spec))]
        raise TaskError(
            f"{source.name} and {entries[0].full_name} must be made alike to be compared, but differ in "
            f"{', '.join(keys)}; run\n  {line}"
        )
    found = store.open(equal[0])
    try:
        pending = bool(found.pending().any())
    except IncompleteError:
        pending = True
    if pending:
        raise IncompleteError(f"{found.name} lacks rows of its manifest; run\n  {command_of(found.spec, found.arrays)}")
    return found


def _facts(spec: dict[str, Any]) -> dict[str, Any]:
    """What must be equal; the weights of imported features are those of their rows, which always differ."""
    identity = dict(spec["identity"])
    if identity.get("imported"):
        del identity["weights"]
    return {"random_weights": spec["random_weights"], **identity}
