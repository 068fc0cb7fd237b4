"""Multiple-instance learning: the images of one volume, study or patient are a bag with one label.

Heads: gated attention (ABMIL) after a learned linear projection, and mean or maximum over instances. Padding is
masked: a bag gets the same score alone as beside larger ones.
Sources: Ilse et al. 2018, arXiv 1802.04712 (gated attention); arXiv 2509.06467 v3 (projection, bag-level loss; its
optimizer, rate and epochs are not stated: the defaults are ours).
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped
from torch import Tensor, nn

from featstore.errors import TaskError
from featstore.store.features import FeatureSet
from featstore.store.training import FeatureDataset
from probes.checks import Kind, check_finite, check_width
from probes.cross import CrossTask
from probes.report import task_name
from probes.roles import SPLITS
from probes.selection import Fitted
from probes.tasks import Task
from probes.trained import (
    MOMENT_ROWS,
    HeadProbe,
    Moments,
    check_labels_or_classes,
    fit_heads,
    labelled,
    moments,
    owner_of,
    recipe_of,
    require_arrays,
    unscaled,
)
from probes.trained_config import MilConfig
from probes.training import Dropout, Part, Recipe, Source, Validation, Watch, linear
from probes.units import PLURALS, Units

PADDED_BYTES = 1 << 28  # of padded bags that pass the heads at once


class MilHead(nn.Module):
    """Logits (B, L) of padded bags (B, M, D), of which `real` (B, M) are instances."""

    def __init__(self, width: int, outputs: int, config: MilConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.pooling = config.pooling
        project: int = config.settled("project")
        self.project = linear(width, project, generator) if project else nn.Identity()
        self.dropout = Dropout(config.settled("dropout") if project else 0.0, generator)
        size = project or width
        if config.pooling == "abmil":
            attention: int = config.settled("attention")
            self.tanh, self.gate = linear(size, attention, generator), linear(size, attention, generator)
            # A bias here would add the same to every instance and cancel in the softmax.
            self.score = linear(attention, 1, generator, bias=False)
        self.classify = linear(size, outputs, generator)

    def instances(self, bags: Float[Tensor, "B M D"]) -> Float[Tensor, "B M P"]:
        """Projected instances."""
        return torch.as_tensor(self.dropout(self.project(bags)))

    def attention(self, h: Float[Tensor, "B M P"], real: Bool[Tensor, "B M"]) -> Float[Tensor, "B M"]:
        """Share of each instance in its bag; 0 for padding."""
        scores = self.score(torch.tanh(self.tanh(h)) * torch.sigmoid(self.gate(h)))[..., 0]
        return torch.as_tensor(scores.masked_fill(~real, -torch.inf).softmax(1))

    def shares(self, h: Float[Tensor, "B M P"], real: Bool[Tensor, "B M"]) -> Float[Tensor, "B M"]:
        """What each instance weighs in the bag's vector: by attention, or equally."""
        if self.pooling == "abmil":
            return self.attention(h, real)
        return real / real.sum(1, keepdim=True)

    def forward(self, bags: Float[Tensor, "B M D"], real: Bool[Tensor, "B M"]) -> Float[Tensor, "B L"]:
        h = self.instances(bags)
        if self.pooling == "max":
            pooled = h.masked_fill(~real[..., None], -torch.inf).amax(1)
        else:
            pooled = (self.shares(h, real)[:, None] @ h)[:, 0]
        return torch.as_tensor(self.classify(pooled))


class Bags(ABC):
    """Bags of rows; `values` reads rows of the split by position, `units` says which belong together."""

    def __init__(self, units: Units, device: str) -> None:
        order = np.argsort(units.number, kind="stable")
        self.members = np.split(order, np.cumsum(units.sizes)[:-1]) if len(units.first) else []
        self.device = device
        self.mean: np.ndarray | None = None
        self.scale: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.members)

    @abstractmethod
    def values(self, rows: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n D"]:
        """Features of instances."""

    def standardize(self, mean: Float[np.ndarray, " D"], scale: Float[np.ndarray, " D"]) -> None:
        """Scale instances as they are read from now on."""
        self.mean, self.scale = mean.astype(np.float32), scale.astype(np.float32)

    def batch(self, positions: Int64[np.ndarray, " B"]) -> list[Part]:
        """These bags, padded, largest first, in parts that fit the budget."""
        sizes = np.array([len(self.members[bag]) for bag in positions])
        order = np.argsort(-sizes, kind="stable")
        rows = np.concatenate([self.members[bag] for bag in positions[order]])
        flat = self.values(rows)
        if self.mean is not None:
            flat = flat - self.mean
            flat /= self.scale
        parts, first, begin = [], 0, 0
        while first < len(order):
            largest = int(sizes[order[first]])
            count = max(1, PADDED_BYTES // (4 * largest * max(1, flat.shape[1])))
            chosen = order[first : first + count]
            end = begin + int(sizes[chosen].sum())
            parts.append(self._padded(flat[begin:end], sizes[chosen], positions[chosen]))
            first, begin = first + count, end
        return parts

    def _padded(
        self, flat: Float[np.ndarray, "n D"], sizes: Int64[np.ndarray, " B"], positions: Int64[np.ndarray, " B"]
    ) -> Part:
        real = torch.arange(int(sizes.max()))[None] < torch.from_numpy(sizes)[:, None]
        bags = torch.zeros(*real.shape, flat.shape[1])
        bags[real] = torch.from_numpy(flat)
        return Part((bags.to(self.device), real.to(self.device)), positions)


class ArrayBags(Bags):
    """Bags of rows in memory."""

    slow = False

    def __init__(self, X: Float[np.ndarray, "n D"], units: Units, device: str) -> None:
        super().__init__(units, device)
        self.X = X

    def values(self, rows: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n D"]:
        return np.asarray(self.X[rows], np.float32)


class StoredBags(Bags):
    """Bags of rows of a set, read when they are asked for."""

    slow = True

    def __init__(
        self, fs: FeatureSet, features: str, index: Int64[np.ndarray, " n"], units: Units, device: str
    ) -> None:
        super().__init__(units, device)
        self.data = FeatureDataset(fs, features, index)
        if len(self.data.row_shape) != 1:
            raise TaskError(
                f"features {features!r} are {tuple(self.data.row_shape)} an image; instances of a bag are vectors: "
                "cls, mean_patch, cls+mean_patch, mean_all or layers/K/cls"
            )
        self.width = int(self.data.row_shape[0])

    def values(self, rows: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n D"]:
        return np.asarray(self.data.batch(rows)[0].float().numpy())

    def moments(self) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
        """(mean, deviation) of each column over all instances."""
        found = Moments(self.width)
        watch = Watch("mean and deviation of instances", 1, len(self.data))
        for first in range(0, len(self.data), MOMENT_ROWS):
            rows = np.arange(first, min(first + MOMENT_ROWS, len(self.data)))
            found.add(self.values(rows))
            watch.advance(0, len(rows))
        return found.finish()


class MILProbe(HeadProbe):
    """A head on bags in memory, scikit-learn style; see `HeadProbe` for what a fit leaves.

    `bags` names the bag of every row of X; labels and scores have one row a bag, in order of each bag's first row.
    """

    def __init__(self, recipe: Recipe, config: MilConfig | None = None) -> None:
        """`config`: pooling, project, attention, dropout, scaling and class_weight are read of it."""
        self.config = config or MilConfig()
        super().__init__(recipe, "balanced" if self.config.settled("class_weight") == "balanced" else None)

    def fit(
        self,
        X: Float[np.ndarray, "n D"],
        bags: Shaped[np.ndarray, " n"],
        y: np.ndarray,
        mask: Bool[np.ndarray, "..."] | None = None,
        *,
        kind: Kind,
        num_classes: int | None = None,
        validation: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None,
    ) -> "MILProbe":
        """Train on labels (U, L) or classes (U,) of bags; `validation` is (X, bags, y, mask).

        Bags without a valid label are left out and may hold NaN.

        Raises:
            TaskError: arrays that do not fit together, features that are not finite, no labelled bag. ConfigError:
                several learning rates and no validation.
        """
        units = Units.of(bags)
        mask = self._labels(X[units.first], y, mask, kind, num_classes)
        kept = labelled(mask)
        if not kept.all():
            rows = kept[units.number]
            X, units, y, mask = X[rows], Units.of(bags[rows]), y[kept], mask[kept]
        check_finite(X)
        scale = self.config.settled("scaling") == "standardize"
        self.mean_, self.scale_ = moments(X) if scale else unscaled(X.shape[1])
        check = None
        if validation is not None:
            source = self._source(validation[0], Units.of(validation[1]))
            check = Validation(source, self._targets(*validation[2:]), lambda _: 0.0)

        def make(generator: torch.Generator) -> nn.Module:
            return MilHead(X.shape[1], self.num_outputs_, self.config, generator)

        self._fit(make, self._source(X, units), self._targets(y, mask), check)
        return self

    def predict_proba(self, X: Float[np.ndarray, "n D"], bags: Shaped[np.ndarray, " n"]) -> Float64[np.ndarray, "U L"]:
        """Probability of each label or class of each bag.

        Raises:
            TaskError: not fitted, another width than in `fit`, or features that are not finite.
        """
        self._check_fitted()
        return self._scores(self._source(X, Units.of(bags)))

    def attention(self, X: Float[np.ndarray, "n D"], bags: Shaped[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """Share of every instance in its bag's vector; sums to one in a bag.

        Raises:
            TaskError: of a maximum, which takes columns from different instances; and as `predict_proba`.
        """
        self._check_fitted()
        return attention_of(self.head_, self._source(X, Units.of(bags)))

    def _source(self, X: Float[np.ndarray, "n D"], units: Units) -> ArrayBags:
        check_width(X, len(self.mean_))
        check_finite(X)
        source = ArrayBags(X, units, self.recipe.device)
        source.standardize(self.mean_, self.scale_)
        return source


@torch.no_grad()
def attention_of(head: nn.Module, source: "ArrayBags | StoredBags") -> Float64[np.ndarray, " n"]:
    """Share of every instance of a source in its bag's vector, in the order of its rows.

    Raises:
        TaskError: of a maximum.
    """
    assert isinstance(head, MilHead)
    if head.pooling == "max":
        raise TaskError(
            "a maximum takes each column from another instance and has no weight of an instance; use --pooling abmil"
        )
    head.eval()
    result = np.zeros(sum(len(rows) for rows in source.members))
    for bag, rows in enumerate(source.members):
        for part in source.batch(np.array([bag])):
            values, real = part.inputs
            result[rows] = head.shares(head.instances(values), real)[0].double().cpu().numpy()
    return result


def fit_mil(task: Task, features: str, config: MilConfig) -> Fitted:
    """Train at each learning rate on the bags of the task's units; epoch and rate by validation.

    Raises:
        TaskError: numbers or ranks; a task of images; features that are no vectors; a split without both classes.
        IncompleteError: the set lacks the features.
    """
    check_labels_or_classes(task, "mil")
    bags = of_bags(task)
    recipe = recipe_of(config)
    read: dict[str, StoredBags] = {}
    for split in SPLITS:
        owner = owner_of(bags, split)
        require_arrays(owner.features, features)
        owner.check_images(features)
        read[split] = StoredBags(owner.features, features, owner.index(split), bags.units(split), recipe.device)
    if config.settled("scaling") == "standardize":
        found = read["train"].moments()
        for source in read.values():
            source.standardize(*found)
    width, outputs = read["train"].width, len(task.labels)

    def make(generator: torch.Generator) -> nn.Module:
        return MilHead(width, outputs, config, generator)

    sources: dict[str, Source] = dict(read)
    fitted, _ = fit_heads(bags, config, recipe, make, sources)
    failed = {split: failed_instances(bags, split) for split in SPLITS}
    fitted.choices.update(bag_facts(config, read, failed))
    notes = list(fitted.notes)
    if any(failed.values()):
        counts = ", ".join(f"{split} {count}" for split, count in failed.items() if count)
        notes.append(f"instances that failed and are left out of their bags: {counts}")
    return replace(fitted, notes=tuple(notes))


def of_bags(task: Task) -> Task:
    """The task as a head of bags sees it: one label a unit, a unit with a label trained with all of its images.

    Raises:
        TaskError: its unit is the image.
    """
    if task.unit_ids is None:
        name = task_name({"name": task.name, "spec": task.spec.as_dict()})
        raise TaskError(
            f"task {name!r} counts images, and a bag is the images of one volume, study or patient; pass --unit "
            "volume, --unit study or --unit patient"
        )
    whole = replace(task, spec=replace(task.spec, pool="features"))
    if isinstance(whole, CrossTask):
        whole = replace(whole, target=of_bags(whole.target))
    return whole


def failed_instances(task: Task, split: str) -> int:
    """Images of the bags of a split that could not be decoded."""
    owner = owner_of(task, split)
    assert owner.unit_ids is not None
    lost = (owner.role == split) & ~owner.features.ok
    return int((lost & np.isin(owner.unit_ids, owner.unit_ids[owner.index(split)])).sum())


def bag_facts(config: MilConfig, read: dict[str, StoredBags], failed: dict[str, int]) -> dict[str, Any]:
    """What a record says of the bags."""
    sizes = {split: np.array([len(rows) for rows in source.members]) for split, source in read.items()}
    return {
        "pooling": config.pooling,
        "project": config.settled("project"),
        "scaling": config.settled("scaling"),
        "bags": {
            split: {
                "bags": len(count),
                "instances": int(count.sum()),
                "smallest": int(count.min()),
                "largest": int(count.max()),
                "failed_instances": failed[split],
            }
            for split, count in sizes.items()
        },
        "bag_of": f"all images of a unit; {PLURALS['image']} without a label of their own count in too",
    }
