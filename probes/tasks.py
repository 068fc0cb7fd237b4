"""Tasks: which columns are labels, what blank and uncertain mean, which rows train, select and test.

Labels stay verbatim in the manifest; a task reads them under two policies, one for training and one for evaluation.
No split ever has two roles.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from featstore import files
from featstore.datasets.manifest import Manifest
from featstore.datasets.splits import carve
from featstore.errors import LeakError, TaskError, UnknownNameError
from featstore.store.features import FeatureSet
from probes.known import TASKS
from probes.policies import Policy
from probes.taskspec import TaskSpec

Kind = Literal["multilabel", "multiclass"]
SPLITS = ("train", "val", "test")
MAX_CLASSES = 1000


def parse_where(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`source=nih,view=AP|PA` as ((column, values), ...).

    Raises:
        TaskError: a part without '=' or without a column.
    """
    parts = []
    for part in text.split(","):
        column, equals, values = part.partition("=")
        if not equals or not column.strip():
            raise TaskError(f"--where takes COLUMN=VALUE or COLUMN=VALUE|VALUE, comma-separated; got {part!r}")
        parts.append((column.strip(), tuple(value.strip() for value in values.split("|"))))
    return tuple(parts)


def choose_task(
    manifest: Manifest, *, task: str | None = None, labels: Sequence[str] = (), where: str = ""
) -> TaskSpec:
    """The task asked for by name, the one made of `labels`, or the data set's default.

    Raises:
        UnknownNameError: no such task. TaskError: the data set has neither labels nor a default task.
    """
    filters = parse_where(where) if where else ()
    if labels:
        spec = TaskSpec(name="labels:" + "+".join(labels), labels=tuple(labels))
    else:
        name = task or manifest.meta["default_task"]
        if name:
            if name not in TASKS:
                raise UnknownNameError(
                    f"unknown task {name!r}; known: {', '.join(TASKS)}; or name columns with --labels"
                )
            spec = TASKS[name]
        elif manifest.meta["label_columns"]:
            columns = tuple(manifest.meta["label_columns"])
            spec = TaskSpec(name="labels:" + "+".join(columns), labels=columns)
        else:
            raise TaskError(f"data set {manifest.name!r} has no default task; name label columns with --labels")
    if not filters:
        return spec
    return TaskSpec(
        **{**{key: getattr(spec, key) for key in TaskSpec.__dataclass_fields__}, "where": (*spec.where, *filters)}
    )


NUMBERS = {"1": 1, "0": 0, "-1": -1}


def _number(value: Any) -> int | None:
    """1, 0 or -1 for `1`, `1.0`, `"-1.0"`, True ...; None for anything else."""
    text = str(int(value)) if isinstance(value, bool) else str(value).strip()
    return NUMBERS.get(text.removesuffix(".0"))


def read_labels(values: list[Any], policy: Policy, label: str) -> tuple[Int[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """(0/1, mask) of a 0/1/-1/blank column under a policy.

    Raises:
        TaskError: another value.
    """
    uncertain = dict(policy.overrides).get(label, policy.uncertain)
    y, mask = np.zeros(len(values), np.int8), np.zeros(len(values), dtype=bool)
    for row, value in enumerate(values):
        if value is None or value == "" or value != value:
            mask[row] = policy.blank == "zero"
            continue
        number = _number(value)
        if number is None:
            raise TaskError(
                f"label {label!r}: row {row + 1} says {value!r}; several labels together must be 0, 1, -1 or blank"
            )
        mask[row] = number >= 0 or uncertain != "mask"
        y[row] = number == 1 or (number == -1 and uncertain == "one")
    return y, mask


@dataclass(frozen=True)
class Task:
    """A task on one set: the arrays that a head is fitted on and scored with.

    `y` and `mask` are (N, L) for multilabel, (N,) class numbers and validity for multiclass; `role` is the split of
    every sample as the task uses it ('' for unused).
    """

    spec: TaskSpec
    features: FeatureSet
    kind: Kind
    labels: tuple[str, ...]
    y_train: Int[np.ndarray, "N ..."]
    mask_train: Bool[np.ndarray, "N ..."]
    y: Int[np.ndarray, "N ..."]
    mask: Bool[np.ndarray, "N ..."]
    role: np.ndarray
    groups: np.ndarray
    notes: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return self.spec.name

    @cached_property
    def digest(self) -> str:
        """Changes with labels, policies, filters, splits or the manifest; only records with equal ones are ranked."""
        return files.digest(
            [self.spec.as_dict(), self.features.manifest.digest, files.digest(",".join(self.role).encode())]
        )

    def index(self, split: str) -> Int[np.ndarray, " n"]:
        """Manifest rows of a split that have features and at least one label."""
        if split not in SPLITS:
            raise TaskError(f"a split is one of {', '.join(SPLITS)}, got {split!r}")
        mask = self.mask_train if split == "train" else self.mask
        labelled = mask.any(1) if mask.ndim == 2 else mask
        return np.flatnonzero((self.role == split) & labelled & self.features.ok)

    def arrays(
        self, split: str, features: str = "cls+mean_patch"
    ) -> tuple[Float[np.ndarray, "n D"], Int[np.ndarray, "n ..."], Bool[np.ndarray, "n ..."], np.ndarray, list[str]]:
        """(X float32, y, mask, groups, ids) of one split; training rows under the training policy."""
        rows = self.index(split)
        y, mask = (self.y_train, self.mask_train) if split == "train" else (self.y, self.mask)
        ids = self.features.manifest.column("id")
        values = self._load(features)[rows].astype(np.float32)
        return values, y[rows], mask[rows], self.groups[rows], [ids[row] for row in rows]

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
        return loaded

    def evaluate(
        self, scores: Float[np.ndarray, "n L"], split: str = "test", *, resamples: int = 1000, seed: int = 0
    ) -> dict[str, Any]:
        """Metrics with patient-clustered bootstrap intervals of scores for the rows of `arrays(split)`.

        Raises:
            TaskError: the scores do not have one row per sample and one column per label or class.
        """
        from probes.evaluation import score

        rows = self.index(split)
        if scores.shape != (len(rows), len(self.labels)):
            raise TaskError(
                f"{split} has {len(rows)} samples and {len(self.labels)} labels or classes; "
                f"got scores of shape {scores.shape}"
            )
        return score(self, rows, scores, resamples=resamples, seed=seed)


def make_task(features: FeatureSet, spec: TaskSpec, *, allow_leak: bool = False) -> Task:
    """Bind a task to a set: read labels, assign roles, check groups.

    Raises:
        UnknownNameError: a label or filter column is absent.
        TaskError: a label column is unusable, or a split has nothing to fit or score.
        LeakError: a group crosses splits.
    """
    manifest = features.manifest
    for name in (*spec.labels, *(column for column, _ in spec.where)):
        if name not in manifest.table.column_names:
            known = ", ".join(column for column in manifest.table.column_names if column not in ("content", "mtime_ns"))
            raise UnknownNameError(f"data set {manifest.name!r} has no column {name!r}; its columns: {known}")
    keep = np.ones(len(manifest), dtype=bool)
    for column, values in spec.where:
        texts = ("" if value is None else str(value) for value in manifest.column(column))
        keep &= np.array([text in values for text in texts], dtype=bool)
    if not keep.any():
        raise TaskError(
            f"no sample passes the filter {spec.where}; check the column's values with `featstore info {manifest.name}`"
        )
    groups = np.array(
        [
            group if group is not None else f"id:{sample}"
            for group, sample in zip(manifest.column("group"), manifest.column("id"))
        ]
    )
    role, notes = assign_roles(np.array(manifest.column("split"), dtype=object), groups, spec, keep)
    crossing = crossing_groups(role, groups)
    if crossing:
        text = f"{len(crossing)} groups (patients) stand in more than one split, such as {crossing[0]!r}"
        if not allow_leak:
            raise LeakError(f"{text}; fix --split-column or --group-column, or pass --allow-leak to mark the record")
        notes = (*notes, f"leak allowed: {text}")
    kind, labels, train, evaluation = _read(manifest, spec, role != "")
    task = Task(
        spec, features, kind, labels, train[0], train[1], evaluation[0], evaluation[1], role.astype("U5"), groups, notes
    )
    for split in SPLITS:
        if len(task.index(split)) == 0:
            raise TaskError(
                f"task {spec.name!r}: none of the {(role == split).sum()} {split} samples has a label and features; "
                f"check the labels and `featstore info {features.name}`"
            )
    return task


Labels = tuple[np.ndarray, np.ndarray]


def _read(
    manifest: Manifest, spec: TaskSpec, used: Bool[np.ndarray, " N"]
) -> tuple[Kind, tuple[str, ...], Labels, Labels]:
    # What other rows say neither makes a class nor is an error.
    columns = [[value if keep else None for value, keep in zip(manifest.column(name), used)] for name in spec.labels]
    if len(columns) == 1:
        present = {value for value in columns[0] if value is not None and value != "" and value == value}
        if any(_number(value) is None for value in present):
            return _read_classes(columns[0], spec.labels[0])
    both = []
    for policy in (spec.train_policy, spec.eval_policy):
        pairs = [read_labels(values, policy, name) for name, values in zip(spec.labels, columns)]
        both.append((np.stack([y for y, _ in pairs], 1), np.stack([mask for _, mask in pairs], 1)))
    return "multilabel", spec.labels, both[0], both[1]


def _read_classes(values: list[Any], column: str) -> tuple[Kind, tuple[str, ...], Labels, Labels]:
    """One categorical column: classes in sorted order, blank rows masked."""
    texts = ["" if value is None or value != value else str(value) for value in values]
    classes = tuple(sorted(set(texts) - {""}))
    if len(classes) > MAX_CLASSES:
        raise TaskError(
            f"label {column!r} has {len(classes)} different values; a categorical label has at most {MAX_CLASSES}"
        )
    number = {name: index for index, name in enumerate(classes)}
    y = np.array([number.get(text, 0) for text in texts], dtype=np.int64)
    pair = (y, np.array([text != "" for text in texts], dtype=bool))
    return "multiclass", classes, pair, pair


def assign_roles(
    split: np.ndarray, groups: np.ndarray, spec: TaskSpec, keep: Bool[np.ndarray, " N"]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Roles train, val, test from the splits of the manifest, and notes on how they came about; '' where not `keep`.

    Without a test split the validation split is the test split; without a validation split (left), a tenth of the
    training groups, drawn by seed, is. Which splits there are is asked of the whole manifest: a filter that empties
    one never changes what another is for.

    Raises:
        TaskError: no rows to train on, to select with or to test on.
    """
    role = np.where(keep, split, "")
    notes: list[str] = []
    has_test, has_val = (split == "test").any(), (split == "val").any()
    if not has_test:
        role[role == "val"] = "test"
        notes.append("test: the validation split, as there is no test split")
    elif spec.selection == "carve":
        role[role == "val"] = ""
    if not has_test or not has_val or spec.selection == "carve":
        train = np.flatnonzero(role == "train")
        role[train[carve(groups[train].tolist(), fraction=0.1, seed=spec.seed)]] = "val"
        notes.append(f"val: 10% of the training groups, seed {spec.seed}")
    counts = {name: int((role == name).sum()) for name in SPLITS}
    if min(counts.values()) == 0:
        raise TaskError(
            f"task {spec.name!r} needs samples to train, select and test on; it has "
            + ", ".join(f"{name} {count}" for name, count in counts.items())
            + "; check the split column and --where"
        )
    return role, tuple(notes)


def crossing_groups(role: np.ndarray, groups: np.ndarray) -> list[str]:
    """Groups with samples in more than one of train, val and test."""
    used = role != ""
    pairs = set(zip(groups[used].tolist(), role[used].tolist()))
    seen: dict[str, int] = {}
    for group, _ in pairs:
        seen[group] = seen.get(group, 0) + 1
    return sorted(group for group, count in seen.items() if count > 1)
