"""Tasks on sets: the arrays that a head is fitted on and scored with.

Labels stay verbatim in the manifest; a task reads them under two policies, one for training and one for evaluation
(`probes.labels`), gives every sample one role (`probes.roles`) and gathers images into units (`probes.units`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Real, Shaped

from featstore import files
from featstore.datasets.manifest import COLUMNS, Manifest
from featstore.errors import LeakError, TaskError, UnknownNameError
from featstore.store.features import FeatureSet
from probes.cells import column_cells
from probes.configs import TaskConfig
from probes.folds import fold_roles
from probes.known import TASKS
from probes.labels import TargetKind, Targets, blank_rows, check_spec, label_columns, read_targets, without_effect
from probes.noise import add_noise
from probes.policies import named_policy
from probes.repeats import judge_repeats, repeated_features, repeated_files
from probes.roles import SPLITS, assign_roles, crossing_groups, drop_rows, group_of, kept_rows, parse_where, split_of
from probes.taskspec import Noise, TaskSpec
from probes.units import Units, unit_ids

ROWS = 8192  # converted at a time


class Samples(NamedTuple):
    """Labels, masks, patients and names of images or units, in one order."""

    y: np.ndarray
    mask: np.ndarray
    groups: np.ndarray
    ids: list[str]


def choose_task(
    manifest: Manifest,
    *,
    task: str | None = None,
    labels: Sequence[str] = (),
    where: str = "",
    reading: TaskConfig | None = None,
) -> TaskSpec:
    """The task asked for by name, the one made of `labels`, or the data set's default, read as `reading` says.

    Raises:
        UnknownNameError: no such task or policy. TaskError: the data set has neither labels nor a default task, or a
            pool is asked for without a unit of several images.
    """
    filters = parse_where(where) if where else ()
    if labels:
        spec = TaskSpec(name="labels:" + "+".join(labels), labels=tuple(labels))
    else:
        name = task or manifest.meta["default_task"]
        if name:
            if name not in TASKS:
                fitting = [known for known in TASKS if fits(manifest, known)]
                known = ", ".join([*fitting, *(other for other in TASKS if other not in fitting)])
                raise UnknownNameError(f"unknown task {name!r}; known: {known}; or name columns with --labels")
            spec = TASKS[name]
        elif manifest.meta["label_columns"]:
            columns = tuple(manifest.meta["label_columns"])
            spec = TaskSpec(name="labels:" + "+".join(columns), labels=columns)
        else:
            raise TaskError(f"data set {manifest.name!r} has no default task; name label columns with --labels")
    if filters:
        spec = replace(spec, where=(*spec.where, *filters))
    if reading is None:
        return spec
    spec = read_as(spec, reading)
    if reading.pool == "mean" and spec.unit == "image":  # of another pool the task itself says so
        raise TaskError(
            f"task {spec.name!r}: --pool mean needs a unit of several images; give --unit too, or leave it out"
        )
    return spec


def read_as(spec: TaskSpec, reading: TaskConfig) -> TaskSpec:
    """The task with the policies, unit, pool, kind and classes that are asked for in place of its own.

    Raises:
        UnknownNameError: no such policy.
    """
    changes: dict[str, Any] = {}
    for name in ("train_policy", "eval_policy"):
        asked = getattr(reading, name)
        if asked is not None:
            changes[name] = named_policy(asked)
    for name in ("unit", "pool", "kind"):
        if getattr(reading, name) is not None:
            changes[name] = getattr(reading, name)
    if reading.unit == "image" and reading.pool is None:
        changes["pool"] = "mean"  # a pool belongs to units of several images
    if reading.label_noise:
        changes["noise"] = Noise(ratio=reading.label_noise, seed=reading.noise_seed)
    if reading.classes:
        changes["classes"] = tuple(name.strip() for name in reading.classes.split(","))
    return replace(spec, **changes) if changes else spec


def fits(manifest: Manifest, name: str) -> bool:
    """Whether a data set offers a task, or has all of its columns."""
    spec = TASKS[name]
    return name in manifest.meta["tasks"] or not missing_columns(manifest, spec)


def missing_columns(manifest: Manifest, spec: TaskSpec) -> list[str]:
    """Columns that a task reads and the data set lacks."""
    split = spec.split_column if spec.fold is None else spec.fold.column or spec.split_column
    names = (*label_columns(spec), *(column for column, _ in spec.where), split)
    return [name for name in dict.fromkeys(names) if name not in manifest.table.column_names]


@dataclass(frozen=True)
class Task:
    """A task on one set.

    `y` and `mask` are (N, L) for multilabel, regression and ordinal, (N,) class numbers and validity for multiclass;
    `role` is the split of every image as the task uses it ('' for unused); `unit_ids` says what images belong
    together, None where each is its own. `test_key` names the test split, whatever is read of it.
    """

    spec: TaskSpec
    features: FeatureSet
    kind: TargetKind
    labels: tuple[str, ...]
    y_train: Real[np.ndarray, "N ..."]
    mask_train: Bool[np.ndarray, "N ..."]
    y: Real[np.ndarray, "N ..."]
    mask: Bool[np.ndarray, "N ..."]
    role: np.ndarray
    groups: np.ndarray
    notes: tuple[str, ...] = field(default=())
    unit_ids: Shaped[np.ndarray, " N"] | None = field(default=None)
    test_key: str = field(default="")
    allow_leak: bool = field(default=False)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pools_features(self) -> bool:
        """Whether a head sees units rather than images."""
        return self.unit_ids is not None and self.spec.pool == "features"

    @cached_property
    def digest(self) -> str:
        """Changes with labels, policies, filters, splits or the manifest; only records with equal ones are ranked."""
        return task_digest(self.spec, self.features.manifest, self.role)

    def index(self, split: str) -> Int[np.ndarray, " n"]:
        """Manifest rows of a split that have features and a label.

        A unit with a label is scored (and with "features" also trained) with all of its images, labelled or not.
        """
        if split not in SPLITS:
            raise TaskError(f"a split is one of {', '.join(SPLITS)}, got {split!r}")
        mask = self.mask_train if split == "train" else self.mask
        labelled = mask.any(1) if mask.ndim == 2 else mask
        usable = (self.role == split) & self.features.ok
        if self.unit_ids is None or (split == "train" and not self.pools_features):
            return np.flatnonzero(usable & labelled)
        return np.flatnonzero(usable & np.isin(self.unit_ids, np.unique(self.unit_ids[usable & labelled])))

    def samples(self, split: str, policy: Literal["train", "eval"]) -> Samples:
        """What a head sees of a split, in the order of `arrays`, its labels read under a policy."""
        return self._gathered(split, policy, self.pools_features)

    def truth(self, split: str) -> Samples:
        """What is scored of a split, images or units, its labels read under the evaluation policy."""
        return self._gathered(split, "eval", self.unit_ids is not None)

    def _gathered(self, split: str, policy: Literal["train", "eval"], gather: bool) -> Samples:
        rows = self.index(split)
        y, mask = (self.y_train, self.mask_train) if policy == "train" else (self.y, self.mask)
        y, mask = y[rows], mask[rows]
        if not gather:
            ids = self.features.manifest.column("id")
            return Samples(y, mask, self.groups[rows], [ids[row] for row in rows])
        units = self.units(split)
        y, mask = units.labels(y, mask, self.kind, self.spec.unit)
        return Samples(y, mask, self.groups[rows][units.first], list(units.ids))

    def units(self, split: str) -> Units:
        """The rows of `index(split)` gathered by unit."""
        rows = self.index(split)
        ids = np.array(self.features.manifest.column("id"))[rows] if self.unit_ids is None else self.unit_ids[rows]
        return Units.of(ids)

    def pool(self, split: str, scores: Float[np.ndarray, "... n L"]) -> Float[np.ndarray, "... U L"]:
        """Scores of what a head sees as scores of what is counted: pooled per unit by mean or maximum."""
        if self.unit_ids is None or self.spec.pool == "features":
            return scores
        return self.units(split).pool(scores, self.spec.pool)

    def arrays(
        self, split: str, features: str = "cls+mean_patch"
    ) -> tuple[Float[np.ndarray, "n D"], Real[np.ndarray, "n ..."], Bool[np.ndarray, "n ..."], np.ndarray, list[str]]:
        """(X float32, y, mask, groups, ids) of one split as a head sees it; training rows under the training policy.

        Rows are images, or units where their features are pooled.
        """
        loaded, rows = self._load(features), self.index(split)
        if self.pools_features:
            values = self.units(split).mean(loaded[rows]).astype(np.float32, copy=False)
        else:
            values = np.empty((len(rows), loaded.shape[1]), np.float32)
            for start in range(0, len(rows), ROWS):  # in pieces: no copy of all rows in the stored type
                values[start : start + ROWS] = loaded[rows[start : start + ROWS]]
        y, mask, groups, ids = self.samples(split, "train" if split == "train" else "eval")
        return values, y, mask, groups, ids

    def _load(self, features: str) -> np.ndarray:
        cache = self.__dict__.setdefault("_loaded", {})
        if features not in cache:
            cache.clear()  # one feature matrix at a time is enough
            values = self.features.load(features)
            if values.ndim != 2:
                raise TaskError(
                    f"features {features!r} are {values.shape[1:]} a sample; a probe takes vectors: cls, mean_patch, "
                    "cls+mean_patch, mean_all or layers/K/cls"
                )
            cache[features] = values
        loaded: np.ndarray = cache[features]
        self._check_repeats(features, loaded)
        return loaded

    def _check_repeats(self, features: str, values: np.ndarray) -> None:
        """Once for each: rows of two splits must not have features that are equal in every bit."""
        if features in self.repeats:
            return
        rows = np.flatnonzero((self.role != "") & self.features.ok)
        found = repeated_features(values, self.role, rows)
        ids = self.features.manifest.column("id")
        what = f"images with equal {features}"
        notes = judge_repeats(found, what, ids, self.role, self.groups, self.allow_leak)
        self.repeats[features] = "; ".join(notes)

    def check_images(self, features: str) -> None:
        """Look for images of two splits by vectors that a head does not itself read at once, as bags and patches.

        Raises:
            LeakError: there are some, and that is not allowed.
        """
        self._load(features)
        self.forget_loaded()

    @cached_property
    def repeats(self) -> dict[str, str]:
        """Features read so far -> a note on images that two splits share by them, or nothing."""
        return {}

    def share_loaded(self, other: "Task") -> None:
        """Read features together with another task of the same set, as folds do: one matrix serves all."""
        self.__dict__["_loaded"] = other.__dict__.setdefault("_loaded", {})

    def forget_loaded(self) -> None:
        """Free the features that were read."""
        self.__dict__.get("_loaded", {}).clear()

    def evaluate(
        self, scores: Float[np.ndarray, "n L"], split: str = "test", *, resamples: int = 1000, seed: int = 0
    ) -> dict[str, Any]:
        """Metrics with patient-clustered bootstrap intervals of scores for the rows of `arrays(split)`.

        Raises:
            TaskError: the scores do not have one row per sample and one column per label or class.
        """
        from probes.scoring import score

        count = len(self.samples(split, "eval").ids)
        if scores.shape != (count, len(self.labels)):
            raise TaskError(
                f"{split} has {count} samples and {len(self.labels)} labels or classes; "
                f"got scores of shape {scores.shape}"
            )
        return score(self, split, self.pool(split, scores), resamples=resamples, seed=seed)


class _Bound(NamedTuple):
    """Labels and roles of a manifest's rows under a task; `role` is '' for rows that it does not use."""

    targets: Targets
    role: np.ndarray
    groups: np.ndarray
    test_key: str
    notes: tuple[str, ...]


def _bind(manifest: Manifest, spec: TaskSpec, splits: Sequence[str] = SPLITS) -> _Bound:
    _check_columns(manifest, spec)
    check_spec(spec)
    keep, notes = kept_rows(manifest, spec)
    groups = group_of(manifest)
    if spec.fold is not None:
        targets = _read(manifest, spec, keep, splits)
        role, how = fold_roles(manifest, spec, groups, keep, targets)
        # A column of folds may leave rows out, which then make no class.
        targets = targets if (role != "").sum() == keep.sum() else _read(manifest, spec, role != "", splits)
    else:
        split, more = split_of(manifest, spec)
        role, assigned = assign_roles(split, groups, spec, keep, splits)
        targets, how = _read(manifest, spec, role != "", splits), (*more, *assigned)
    test_key = _test_key(manifest, role)
    labelled, unlabelled = _labelled(manifest, spec, role != "")
    known = labelled.reshape(labelled.shape + (1,) * (targets.mask.ndim - 1))
    targets = replace(targets, mask_train=targets.mask_train & known, mask=targets.mask & known)
    role, dropped = drop_rows(role, targets.dropped_train, targets.dropped)
    notes = (*notes, *how, *targets.notes, *without_effect(spec), *unlabelled, *dropped)
    return _Bound(targets, role.astype("U5"), groups, test_key, notes)


def roles_of(manifest: Manifest, spec: TaskSpec) -> Shaped[np.ndarray, " N"]:
    """train, val, test or '' of every row, as the task has them on any set of this manifest.

    Raises:
        UnknownNameError, TaskError: as `make_task`.
    """
    return _bind(manifest, spec).role


def task_digest(spec: TaskSpec, manifest: Manifest, role: Shaped[np.ndarray, " N"]) -> str:
    """Changes with labels, policies, filters, splits or the manifest."""
    return files.digest([spec.as_dict(), manifest.digest, files.digest(",".join(role).encode())])


def make_task(
    features: FeatureSet, spec: TaskSpec, *, allow_leak: bool = False, splits: Sequence[str] = SPLITS
) -> Task:
    """Bind a task to a set: read labels, assign roles, check groups.

    `splits` are those that may not be empty: a data set that another task is tested on needs no others than `test`.

    Raises:
        UnknownNameError: a label or filter column is absent.
        TaskError: a label column is unusable, or a split has nothing to fit or score.
        LeakError: a group, a unit or an image crosses splits.
    """
    manifest = features.manifest
    targets, role, groups, test_key, notes = _bind(manifest, spec, splits)
    targets, noisy = _with_noise(manifest, spec, targets, role == "train")
    units = unit_ids(manifest, spec, role != "")
    notes = (*notes, *noisy, *_leaks(role, groups, units, spec.unit, allow_leak))
    notes = (*notes, *_repeated(features, role, allow_leak), *_learned(features, role, allow_leak))
    task = Task(
        spec,
        features,
        targets.kind,
        targets.labels,
        targets.y_train,
        targets.mask_train,
        targets.y,
        targets.mask,
        role,
        groups,
        notes,
        units,
        test_key,
        allow_leak,
    )
    for name in splits:
        if len(task.index(name)) == 0:
            raise TaskError(
                f"task {spec.name!r}: none of the {(role == name).sum()} {name} samples has a label and features; "
                f"check the labels and `featstore info {features.name}`"
            )
    if "train" not in splits:  # another task's heads are tested on it
        return task
    from probes.unfitted import without_unfitted  # which knows what a task is

    return without_unfitted(task)


def _read(manifest: Manifest, spec: TaskSpec, used: Bool[np.ndarray, " N"], splits: Sequence[str]) -> Targets:
    """Labels of the rows that are used: what others say neither makes a class nor is an error.

    Classes of a known task, or of one that another is tested on, may have no row here; classes that were named must.
    """
    named = spec.name not in TASKS or spec.classes != TASKS[spec.name].classes
    columns = {name: column_cells(manifest.table.column(name), used) for name in label_columns(spec)}
    return read_targets(columns, spec, every_class=named and "train" in splits)


def _with_noise(
    manifest: Manifest, spec: TaskSpec, targets: Targets, train: Bool[np.ndarray, " N"]
) -> tuple[Targets, tuple[str, ...]]:
    """Labels with the noise that the task asks for on its training rows, and a note that counts it.

    Raises:
        TaskError: a task of classes or numbers.
    """
    if spec.noise is None:
        return targets, ()
    if targets.kind != "multilabel":
        raise TaskError(
            f"task {spec.name!r} is {targets.kind}: label noise, as published, flips labels that are present or not; "
            "leave --label-noise out"
        )
    ids = [sample for sample, trained in zip(manifest.column("id"), train) if trained]
    pairs = [(y[train], mask[train]) for y, mask in ((targets.y_train, targets.mask_train), (targets.y, targets.mask))]
    y_train, y = targets.y_train.copy(), targets.y.copy()
    y_train[train], y[train], note = add_noise(spec.noise, targets.labels, ids, *pairs)
    return replace(targets, y_train=y_train, y=y), (note,)


def _check_columns(manifest: Manifest, spec: TaskSpec) -> None:
    missing = missing_columns(manifest, spec)
    names = manifest.table.column_names
    shadowed = [name for name in label_columns(spec) if name in COLUMNS and f"source_{name}" in names]
    if shadowed:
        raise TaskError(
            f"label {shadowed[0]!r} is the manifest's own column, and that of the table stands in "
            f"'source_{shadowed[0]}'; name it by that"
        )
    if not missing:
        return
    if spec.name in TASKS:
        offered = ", ".join(name for name in TASKS if fits(manifest, name)) or "none"
        raise UnknownNameError(
            f"task {spec.name!r} reads columns that data set {manifest.name!r} lacks: {', '.join(missing)}; tasks that "
            f"fit it: {offered}; or name its columns with --labels"
        )
    known = ", ".join(column for column in manifest.table.column_names if column not in ("content", "mtime_ns"))
    raise UnknownNameError(f"data set {manifest.name!r} has no column {missing[0]!r}; its columns: {known}")


def _test_key(manifest: Manifest, role: np.ndarray) -> str:
    """Digest of the test rows, before any policy leaves some out."""
    ids = manifest.table.column("id").filter(role == "test").to_pylist()
    return files.digest([manifest.name, files.digest(ids)])  # whatever its labels say by now


def _labelled(
    manifest: Manifest, spec: TaskSpec, used: Bool[np.ndarray, " N"]
) -> tuple[Bool[np.ndarray, " N"], tuple[str, ...]]:
    """Rows that somebody labelled, as far as the task asks for that, and a note on the others."""
    if spec.unlabelled == "blank":
        return np.ones(len(used), dtype=bool), ()
    names = [name for name in manifest.meta["label_columns"] if name in manifest.table.column_names]
    blank = blank_rows({name: column_cells(manifest.table.column(name), used) for name in names or label_columns(spec)})
    count = int((blank & used).sum())
    return ~blank, (f"masked: {count} rows that nobody labelled, blank in every label column",) if count else ()


def _leaks(
    role: np.ndarray, groups: np.ndarray, units: np.ndarray | None, unit: str, allow_leak: bool
) -> tuple[str, ...]:
    """Notes on leaks that are allowed.

    Raises:
        LeakError: they are not.
    """
    notes = []
    for what, ids in (("groups (patients)", groups), (f"units ({unit})", units)):
        crossing = crossing_groups(role, ids) if ids is not None else []
        if crossing:
            text = f"{len(crossing)} {what} stand in more than one split, such as {crossing[0]!r}"
            if not allow_leak:
                raise LeakError(
                    f"{text}; fix --split-column or --group-column, or pass --allow-leak to mark the record"
                )
            notes.append(f"leak allowed: {text}")
    return tuple(notes)


def _repeated(features: FeatureSet, role: np.ndarray, allow_leak: bool) -> tuple[str, ...]:
    """A note on byte-identical images in two splits, where that is allowed.

    Raises:
        LeakError: it is not.
    """
    return judge_repeats(
        repeated_files(features, role),
        "byte-identical images",
        features.manifest.column("id"),
        role,
        group_of(features.manifest),
        allow_leak,
    )


def _learned(features: FeatureSet, role: np.ndarray, allow_leak: bool) -> tuple[str, ...]:
    """Notes on rows that a fine-tuned network was trained or chosen on.

    Raises:
        LeakError: test rows are among them, and that is not allowed.
    """
    if not features.spec["weights"].get("trained_on"):
        return ()
    from probes.learned import learned_rows  # which asks for the roles of other tasks

    return learned_rows(features, role, allow_leak=allow_leak)
