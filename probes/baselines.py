"""What a probe must beat: a constant score, the most frequent class, and what age, sex and view alone tell.

Baselines are records like others, made on the rows of a real set, so that tables show them and `probes compare` takes
them. A network with random weights is a set of its own and stands in the table among the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from featstore import files
from featstore.datasets.manifest import Manifest
from featstore.errors import TaskError, UnknownNameError
from featstore.store.features import FeatureSet
from probes import PROBES
from probes.configs import LinearConfig
from probes.labels import label_columns
from probes.selection import Fitted
from probes.subgroups import SPELLINGS, age_of, find_column
from probes.tasks import Task

PREFIX = "baseline:"
METADATA = f"{PREFIX}metadata"
NUMERIC_VALUES = 10  # numbers of more different values are a quantity, of fewer they are codes of classes
MOST_CATEGORIES = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineConfig:
    """What a baseline rests on, as its record keeps it."""

    columns: Annotated[tuple[str, ...], "columns of the manifest"] = ()


class BaselineSet(FeatureSet):
    """The rows of a real set with a matrix in place of embeddings; every row that the real set lacks is lacking."""

    def __init__(self, source: FeatureSet, kind: str, columns: Sequence[str] = (), matrix: np.ndarray | None = None):
        self.folder, self.manifest, self.source, self.matrix = source.folder, source.manifest, source, matrix
        self.spec = {
            "dataset": source.spec["dataset"],
            "model": kind,
            "resolution": "",
            "weights": {"kind": "none"},
            "random_weights": False,
            "identity": {},
            "fingerprint": files.digest([PREFIX, kind, list(columns)]),
        }

    @property
    def ok(self) -> Bool[np.ndarray, " N"]:
        return self.source.ok

    @property
    def failures(self) -> dict[int, str]:
        return self.source.failures

    def load(self, features: str = "", *, verify: bool = False) -> np.ndarray:
        """The matrix (N, D).

        Raises:
            TaskError: this baseline has none.
        """
        if self.matrix is None:
            raise TaskError(f"baseline {self.spec['model']!r} is a constant and has no features")
        return self.matrix


def baseline_task(task: Task, probe: str, columns: Sequence[str] = ()) -> Task:
    """The task as a baseline sees it: equal rows and labels, and its own matrix.

    Raises:
        TaskError: no column has a value in training, or one is a label or has too many categories.
    """
    kind = probe.removeprefix(PREFIX)
    matrix = encode(task.features.manifest, columns, task.index("train")) if probe == METADATA else None
    made = replace(task, features=BaselineSet(task.features, kind, columns, matrix))
    made.repeats[", ".join(columns)] = ""  # that two patients are of one age and sex is no leak
    return made


def _constant(task: Task, values: Float[np.ndarray, " L"], said: str) -> Fitted:
    """A head that says the same of every sample."""
    val, test = (np.tile(values, (len(task.truth(split).ids), 1)) for split in ("val", "test"))
    return Fitted(val, test, {"said": said}, 0)


def _train(task: Task) -> tuple[np.ndarray, Bool[np.ndarray, "n ..."]]:
    y, mask, _, _ = task.samples("train", "train")
    return y, mask


def _per_column(task: Task, measure: Any) -> Float[np.ndarray, " L"]:
    y, mask = _train(task)
    return np.array([measure(y[mask[:, c], c]) if mask[:, c].any() else 0.0 for c in range(y.shape[1])], np.float64)


def fit_chance(task: Task, features: str, config: BaselineConfig) -> Fitted:
    """One score for all: AUROC one half, AUPRC the prevalence. Numbers and ranks: the training mean, of R2 about 0.

    It decides nothing, so tables show no accuracy of it.
    """
    if task.kind in ("regression", "ordinal"):
        return _constant(task, _per_column(task, np.mean), "train mean")
    share = 1 / len(task.labels) if task.kind == "multiclass" else 0.5
    return _constant(task, np.full(len(task.labels), share), "one score for all")


def fit_majority(task: Task, features: str, config: BaselineConfig) -> Fitted:
    """The shares of the classes in training: what is most frequent is decided. Numbers and ranks: the train median."""
    if task.kind in ("regression", "ordinal"):
        return _constant(task, _per_column(task, np.median), "train median")
    if task.kind == "multiclass":
        y, mask = _train(task)
        counts = np.bincount(y[mask], minlength=len(task.labels))
        return _constant(task, counts / counts.sum(), f"always {task.labels[int(counts.argmax())]}")
    return _constant(task, _per_column(task, lambda y: (y == 1).mean()), "prevalence in train")


def fit_metadata(task: Task, features: str, config: BaselineConfig) -> Fitted:
    """Logistic regression (ridge for numbers and ranks) on columns of the manifest, chosen on validation as any other.

    Numbers are scaled by `encode` already, categories stay 0 and 1.
    """
    linear: Fitted = resolve_name(PROBES["linear"])(task, features, LinearConfig(standardize=False))
    said = f"metadata only: {', '.join(config.columns)}"
    return replace(linear, choices={**linear.choices, "columns": list(config.columns)}, notes=(said, *linear.notes))


def choose_columns(manifest: Manifest, labels: Sequence[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    """Columns of the metadata baseline: those asked for, else what there is of age, sex and view but for labels.

    Raises:
        UnknownNameError: no such column. TaskError: one is a label of the task.
    """
    names = manifest.table.column_names
    if asked is None:
        found = []
        for name, spellings in SPELLINGS.items():
            if any(label.lower() in spellings for label in labels):  # told by another column of the same meaning
                continue
            try:
                column = find_column(names, name)
            except UnknownNameError:
                continue
            if column not in labels:
                found.append(column)
        return tuple(found)
    chosen = []
    for name in asked:
        try:
            chosen.append(find_column(names, name))
        except UnknownNameError as error:
            known = ", ".join(column for column in names if column not in ("content", "mtime_ns"))
            raise UnknownNameError(
                f"--metadata names no column of {manifest.name!r}: {name!r}; it has {known}"
            ) from error
    wrong = [name for name in chosen if name in labels]
    if wrong:
        raise TaskError(f"--metadata {wrong[0]} is a label of the task, which would predict itself; leave it out")
    return tuple(dict.fromkeys(chosen))


def columns_for(task: Task, asked: Sequence[str] | None) -> tuple[str, ...]:
    """`choose_columns` for a task."""
    return choose_columns(task.features.manifest, list(label_columns(task.spec)), asked)


def encode(manifest: Manifest, columns: Sequence[str], train: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "N D"]:
    """Columns as numbers: quantities by the mean and deviation of the training rows with an indicator of what is
    missing, categories one-hot as training has them (blank is one; a new one is none of them).

    Ages may be spelled as DICOM does. Numbers of at most 10 different values are categories, but for age.

    Raises:
        TaskError: no column varies in training, or one has more than 50 categories.
    """
    parts: list[np.ndarray] = []
    for name in columns:
        cells = manifest.column(name)
        values = _numbers(name, cells)
        parts += _categories(name, cells, train) if values is None else _quantity(values, train)
    if not parts:
        raise TaskError(f"metadata {', '.join(columns)}: no column varies among the training rows; name others")
    return np.stack(parts, 1).astype(np.float32)


def _text(cell: Any) -> str:
    return "" if cell is None or cell != cell else str(cell).strip()


def _numbers(name: str, cells: Sequence[Any]) -> Float[np.ndarray, " N"] | None:
    """The cells as numbers, NaN where blank; None if they are categories."""
    if name.lower() in SPELLINGS["age"]:
        return np.array([age_of(cell) for cell in cells], np.float64)
    distinct = {_text(cell) for cell in cells} - {""}
    try:
        number = {text: float(text) for text in distinct} | {"": np.nan}
    except ValueError:
        return None
    if len(distinct) <= NUMERIC_VALUES:
        return None
    return np.array([number[_text(cell)] for cell in cells], np.float64)


def _quantity(values: Float[np.ndarray, " N"], train: Int[np.ndarray, " n"]) -> list[np.ndarray]:
    there = np.isfinite(values)
    known = values[train][there[train]]
    if not len(known) or (there[train].all() and not known.std()):
        return []
    scale = known.std() or 1.0
    made = [np.where(there, (values - known.mean()) / scale, 0.0)]
    if not there[train].all():
        made.append((~there).astype(np.float64))
    return made


def _categories(name: str, cells: Sequence[Any], train: Int[np.ndarray, " n"]) -> list[np.ndarray]:
    texts = np.array([_text(cell) for cell in cells], dtype=np.str_)
    found = np.unique(texts[train])
    if len(found) > MOST_CATEGORIES:
        raise TaskError(
            f"metadata column {name!r} has {len(found)} different values in training, such as {str(found[0])!r}; a "
            f"baseline takes at most {MOST_CATEGORIES} categories: leave ids and free text out of --metadata"
        )
    return [] if len(found) < 2 else [(texts == value).astype(np.float64) for value in found]
