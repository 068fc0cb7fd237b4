"""Between a task and the training loop: targets of each split, the choice between heads, what a record keeps of it."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64

from featstore.errors import ConfigError, IncompleteError, TaskError
from featstore.request import command_of
from featstore.store.features import FeatureSet
from probes.checks import Kind, check_kind, check_labels
from probes.cross import CrossTask
from probes.roles import SPLITS
from probes.selection import Fitted, check_two_classes, macro_quality
from probes.tasks import Task
from probes.trained_config import TrainingConfig
from probes.training import (
    Make,
    Recipe,
    Source,
    Targets,
    Trained,
    Validation,
    balance,
    facts,
    num_parameters,
    outputs,
    probabilities,
    train,
)

MOMENT_ROWS = 8192  # rows of a set read at once for their mean and deviation


def recipe_of(config: TrainingConfig, *, drop_last: bool = False) -> Recipe:
    """The recipe that a configuration stands for."""
    names = ("epochs", "batch", "optimizer", "weight_decay", "schedule", "warmup", "keep")
    return Recipe(
        lr=config.rates,
        patience=config.patience,
        drop_last=drop_last,
        seed=config.train_seed,
        device=config.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        **{name: config.settled(name) for name in names},
    )


def check_labels_or_classes(task: Task, probe: str) -> Kind:
    """The task's kind, which a trained head has a loss for.

    Raises:
        TaskError: numbers or ranks.
    """
    if task.kind == "multilabel" or task.kind == "multiclass":
        return task.kind
    raise TaskError(
        f"task {task.name!r} is {task.kind}, and `probes {probe}` trains heads of labels and classes; use `probes "
        "linear` (ridge regression) or `probes knn`"
    )


def owner_of(task: Task, split: str) -> Task:
    """The task whose set holds the rows of a split: the other data set's for the test of a cross-data-set task."""
    return task.target if isinstance(task, CrossTask) and split == "test" else task


def require_arrays(fs: FeatureSet, features: str) -> None:
    """The set holds what features are made of.

    Raises:
        IncompleteError: it lacks an array; the message has the line that adds it.
    """
    missing = [name for name in fs.parts(features) if name not in fs.arrays]
    if missing:
        raise IncompleteError(
            f"{fs.name} has no {' and no '.join(missing)}, which {features} is made of; run\n"
            f"  {command_of(fs.spec, {*fs.arrays, *missing})}"
        )


def fit_heads(
    task: Task, config: TrainingConfig, recipe: Recipe, make: Make, sources: dict[str, Source]
) -> tuple[Fitted, Trained]:
    """Train a head for each learning rate, choose one on validation, score the test split once.

    `sources` hold what a head sees of each split, in the order of `task.samples`.

    Raises:
        TaskError: a split without both classes of any label, or every learning rate diverged.
    """
    kind: Kind = "multiclass" if task.kind == "multiclass" else "multilabel"
    targets: dict[str, Targets] = {}
    weight = None
    for split in SPLITS:
        y, mask, _, _ = task.samples(split, "train" if split == "train" else "eval")
        check_two_classes(task, split, y, mask)
        if split == "train" and config.settled("class_weight") == "balanced":
            weight = balance(kind, y, mask, len(task.labels))
        if split != "test":  # what the test rows say reaches nothing here
            targets[split] = Targets.of(kind, y, mask, recipe.device, weight)
    for split in ("val", "test"):
        scored = task.truth(split)
        check_two_classes(task, split, scored.y, scored.mask)
    truth = task.truth("val")

    def quality(scores: Float64[np.ndarray, "V L"]) -> float:
        return macro_quality(task, task.pool("val", scores), truth)

    validation = Validation(sources["val"], targets["val"], quality)
    heads = train(make, sources["train"], targets["train"], recipe, validation)
    val = [
        probabilities(logits, kind) for logits in outputs([item.head for item in heads], sources["val"], recipe.batch)
    ]
    best = choose(heads)
    test = probabilities(outputs([heads[best].head], sources["test"], recipe.batch)[0], kind)
    auroc = {f"{item.lr:g}": quality(scores) for item, scores in zip(heads, val) if item.epoch}
    choices, notes = describe(heads, best, recipe)
    fitted = Fitted(
        task.pool("val", val[best]),
        task.pool("test", test),
        choices | {"val_auroc": auroc},
        num_parameters(heads[best].head),
        notes,
    )
    return fitted, heads[best]


def choose(heads: list[Trained]) -> int:
    """Number of the head that validation prefers, the smallest learning rate of equals."""
    return max(range(len(heads)), key=lambda number: (heads[number].best, -heads[number].lr))


def describe(heads: list[Trained], best: int, recipe: Recipe) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(choices, notes) for the record."""
    chosen = heads[best]
    edge = len(heads) > 1 and best in (0, len(heads) - 1)
    notes = []
    if chosen.epoch == recipe.epochs:
        notes.append(f"the best epoch is the last of {recipe.epochs}: more --epochs could be better")
    failed = ", ".join(f"{item.lr:g}" for item in heads if item.diverged)
    if failed:
        notes.append(f"training left the finite numbers at learning rate {failed}")
    choices = {
        "said": f"lr={chosen.lr:g}, epoch {chosen.epoch}" + ("*" if edge else ""),
        "lr": chosen.lr,
        "epoch": chosen.epoch,
        "at_edge": edge,
        "val_loss": {f"{item.lr:g}": item.val_loss[item.epoch - 1] for item in heads if item.epoch},
        "epochs": {f"{item.lr:g}": item.epochs for item in heads},
        "training": facts(recipe),
        "history": {"train_loss": chosen.train_loss, "val_loss": chosen.val_loss},
        "protocol_deviations": [],
    }
    return choices, tuple(notes)


class Moments:
    """Mean and deviation of each column; 0 and 1 where nothing is scaled, deviation 1 where a column is constant."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum, self._square = np.zeros(width), np.zeros(width)
        self._shift: np.ndarray | None = None

    def add(self, X: Float[np.ndarray, "n D"]) -> None:
        """Count rows in; sums are of differences to the first row, so that a large mean costs no digits."""
        if len(X):
            wide = X.astype(np.float64)
            if self._shift is None:
                self._shift = wide[0].copy()
            wide -= self._shift
            self.count += len(wide)
            self._sum += wide.sum(0)
            self._square += np.square(wide).sum(0)

    def finish(self) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
        """(mean, deviation) in float64."""
        assert self._shift is not None
        mean = self._sum / self.count
        variance = np.maximum(self._square / self.count - np.square(mean), 0)
        scale = np.sqrt(variance)
        small = scale <= 1e-7 * np.maximum(np.abs(self._shift + mean), 1e-30)
        return self._shift + mean, np.where(small, 1.0, scale)


def moments(X: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """(mean, deviation) of rows in memory, in pieces."""
    found = Moments(X.shape[1])
    for start in range(0, len(X), MOMENT_ROWS):
        found.add(X[start : start + MOMENT_ROWS])
    return found.finish()


def unscaled(width: int) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """Mean 0 and deviation 1 of every column."""
    return np.zeros(width), np.ones(width)


class HeadProbe:
    """What the estimators share: a head for arrays in memory, one learning rate chosen where there is validation.

    After a fit: `head_` the network with its best weights, `trained_` one entry for each learning rate, `lr_`.
    """

    def __init__(self, recipe: Recipe, class_weight: str | None) -> None:
        if class_weight not in (None, "balanced"):
            raise ConfigError(f"class_weight is None or 'balanced', got {class_weight!r}")
        self.recipe, self.class_weight = recipe, class_weight

    def _fit(self, make: Make, source: Source, targets: Targets, validation: Validation | None) -> None:
        if validation is None and len(self.recipe.lr) > 1:
            raise ConfigError(
                f"of {len(self.recipe.lr)} learning rates validation chooses; give validation rows, or one rate"
            )
        self.trained_ = train(make, source, targets, self.recipe, validation)
        best = self.trained_[choose(self.trained_)]
        if validation is None and best.diverged:
            raise TaskError(f"training left the finite numbers in epoch {best.epochs}; lower the learning rate")
        self.head_, self.lr_ = best.head, best.lr

    def _targets(self, y: np.ndarray, mask: Bool[np.ndarray, "..."]) -> Targets:
        weight = balance(self.kind_, y, mask, self.num_outputs_) if self.class_weight == "balanced" else None
        return Targets.of(self.kind_, y, mask, self.recipe.device, weight)

    def _labels(
        self, X: np.ndarray, y: np.ndarray, mask: np.ndarray | None, kind: Kind, num_classes: int | None
    ) -> Bool[np.ndarray, "..."]:
        """The mask of labels that fit the rows; remembers what they are."""
        check_kind(kind)
        mask = check_labels(X, y, mask, kind, num_classes)
        if not mask.any():
            raise TaskError(f"no labelled row to fit on among {len(X)}; check the masks and the training split")
        self.kind_: Kind = kind
        if kind == "multilabel":
            self.num_outputs_ = y.shape[1]
        else:
            self.num_outputs_ = num_classes or max(2, int(y[mask].max()) + 1)
        return mask

    def _scores(self, source: Source) -> Float64[np.ndarray, "N L"]:
        if not len(source):
            return np.zeros((0, self.num_outputs_))
        return probabilities(outputs([self.head_], source, self.recipe.batch)[0], self.kind_)

    def _check_fitted(self) -> None:
        if not hasattr(self, "head_"):
            raise TaskError(f"{type(self).__name__} is not fitted yet; call fit first")


def labelled(mask: Bool[np.ndarray, "N ..."]) -> Bool[np.ndarray, " N"]:
    """Rows with a valid label."""
    return np.asarray(mask.any(1)) if mask.ndim == 2 else mask
