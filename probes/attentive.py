"""Attention pooling over the patch tokens of a set, then a linear layer: an attentive probe.

Learned queries attend to the layer-normalised tokens by multi-head attention (projections of query, key, value and
output, as in CoCa's attentional pooler); the outputs of several queries are averaged (as AIM's), normalised, and read
by a linear layer. No residual and no hidden layers, which V-JEPA's attentive probe adds.
Sources: Yu et al. 2022, arXiv 2205.01917; El-Nouby et al. 2024, arXiv 2401.08541; Bardes et al. 2024, arXiv 2404.08471.

Tokens are read from the store batch by batch, in every epoch anew: they may be far larger than memory.
"""

import math
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from featstore.errors import TaskError
from featstore.store.features import FeatureSet
from featstore.store.training import FeatureDataset
from probes.checks import Kind, check_finite, check_width
from probes.roles import SPLITS
from probes.selection import Fitted
from probes.tasks import Task
from probes.trained import (
    HeadProbe,
    check_labels_or_classes,
    fit_heads,
    labelled,
    owner_of,
    recipe_of,
    require_arrays,
)
from probes.trained_config import AttentiveConfig
from probes.training import Part, Recipe, Source, Validation, linear

HEAD_WIDTH = 64  # columns of an attention head by default, as in the ViTs themselves
PART_BYTES = 1 << 28  # of float32 tokens that pass the heads at once


class AttentiveHead(nn.Module):
    """Logits (B, L) of tokens (B, T, D) that are layer-normalised already, without scale and shift.

    Keys and values of the tokens are never formed. A query attends to token x by q . K(g * x + b), where b and the
    key's bias add the same to every token and cancel, so that one vector g * K'q for each query and head is enough;
    and because weights sum to one, tokens are averaged before the value's projection. The numbers are those of
    multi-head attention, at 1/T of its products.
    """

    def __init__(self, width: int, heads: int, queries: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))  # of the tokens
        # Entries as small as those of a ViT's own learned tokens.
        self.queries = nn.Parameter(torch.empty(queries, width).normal_(0, 0.02, generator=generator))
        self.query = linear(width, width, generator)
        self.key = linear(width, width, generator, bias=False)
        self.value = linear(width, width, generator)
        self.output = linear(width, width, generator)
        self.norm = nn.LayerNorm(width)
        self.classify = linear(width, outputs, generator)

    def weights(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B QH T"]:
        """How much each head of each query takes of every token; sums to one over tokens."""
        width = x.shape[2]
        query = self.query(self.queries).view(-1, self.heads, width // self.heads)  # (Q, H, D/H)
        key = self.key.weight.view(self.heads, width // self.heads, width)
        asked = torch.einsum("qhe,hed->qhd", query, key).reshape(-1, width) * self.scale  # (QH, D)
        return (asked / math.sqrt(width // self.heads) @ x.transpose(1, 2)).softmax(2)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B L"]:
        width = x.shape[2]
        mixed = self.weights(x) @ x * self.scale + self.shift  # (B, QH, D)
        mixed = mixed.view(len(x), -1, self.heads, width).mean(1)  # queries are averaged; all that follows is linear
        value = self.value.weight.view(self.heads, width // self.heads, width)
        pooled = torch.einsum("bhd,hed->bhe", mixed, value).reshape(len(x), width) + self.value.bias
        return torch.as_tensor(self.classify(self.norm(self.output(pooled))))


class Tokens:
    """Tokens (N, T, D) in memory, normalised when they are read."""

    slow = False

    def __init__(self, X: Float[np.ndarray, "N T D"], device: str) -> None:
        self.rows, self.device = X, device

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: Int64[np.ndarray, " B"]) -> list[Part]:
        """These rows, in parts that fit the budget."""
        return [
            Part((normalised(torch.from_numpy(self.rows[part]), self.device),), part)
            for part in cut(positions, 4 * int(np.prod(self.rows.shape[1:])))
        ]


class StoredTokens:
    """Tokens of some rows of a set, read when they are asked for, as they were or reduced (pooled, int8, pca)."""

    slow = True

    def __init__(self, fs: FeatureSet, features: str, rows: Int64[np.ndarray, " N"], device: str) -> None:
        self.data, self.device = FeatureDataset(fs, features, rows), device

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def width(self) -> int:
        """D."""
        return int(self.data.row_shape[-1])

    def batch(self, positions: Int64[np.ndarray, " B"]) -> list[Part]:
        """These rows, in parts that fit the budget."""
        row_bytes = 4 * int(np.prod(self.data.row_shape))
        return [
            Part((normalised(self.data.batch(part)[0].flatten(1, -2), self.device),), part)
            for part in cut(positions, row_bytes)
        ]


def cut(positions: Int64[np.ndarray, " B"], row_bytes: int) -> list[Int64[np.ndarray, " P"]]:
    """The positions in parts of at most PART_BYTES, one row at least."""
    size = max(1, PART_BYTES // row_bytes)
    return [positions[first : first + size] for first in range(0, len(positions), size)]


def normalised(tokens: Tensor, device: str) -> Float[Tensor, "B T D"]:
    """Tokens with mean 0 and deviation 1 each, in float32."""
    values = tokens.to(device).float()
    return layer_norm(values, values.shape[-1:])


class AttentiveProbe(HeadProbe):
    """The head on tokens in memory (N, T, D), scikit-learn style; see `HeadProbe` for what a fit leaves."""

    def __init__(
        self, recipe: Recipe, *, heads: int | None = None, queries: int = 1, class_weight: str | None = None
    ) -> None:
        super().__init__(recipe, class_weight)
        self.heads, self.queries = heads, queries

    def fit(
        self,
        X: Float[np.ndarray, "N T D"],
        y: np.ndarray,
        mask: Bool[np.ndarray, "..."] | None = None,
        *,
        kind: Kind,
        num_classes: int | None = None,
        validation: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    ) -> "AttentiveProbe":
        """Train, as `MLPProbe.fit`.

        Raises:
            TaskError: arrays that do not fit together, features that are not finite, no labelled row, heads that do
                not divide the width. ConfigError: several learning rates and no validation.
        """
        mask = self._labels(X.reshape(len(X), X.shape[1] * X.shape[2]), y, mask, kind, num_classes)
        kept = labelled(mask)
        if not kept.all():
            X, y, mask = X[kept], y[kept], mask[kept]
        self.width_ = X.shape[2]
        heads = attention_heads(self.width_, self.heads)
        check = None
        if validation is not None:
            check = Validation(self._source(validation[0]), self._targets(*validation[1:]), lambda _: 0.0)

        def make(generator: torch.Generator) -> nn.Module:
            return AttentiveHead(self.width_, heads, self.queries, self.num_outputs_, generator)

        self._fit(make, self._source(X), self._targets(y, mask), check)
        return self

    def predict_proba(self, X: Float[np.ndarray, "N T D"]) -> Float64[np.ndarray, "N L"]:
        """Probability of each label or class.

        Raises:
            TaskError: not fitted, another width than in `fit`, or features that are not finite.
        """
        self._check_fitted()
        return self._scores(self._source(X))

    def attention(self, X: Float[np.ndarray, "N T D"]) -> Float[np.ndarray, "N T"]:
        """Share of each token in what the queries pool, averaged over heads and queries; rows sum to one."""
        self._check_fitted()
        assert isinstance(self.head_, AttentiveHead)
        tokens = normalised(torch.from_numpy(self._source(X).rows), self.recipe.device)
        return np.asarray(self.head_.weights(tokens).mean(1).cpu().numpy())

    def _source(self, X: Float[np.ndarray, "N T D"]) -> Tokens:
        check_width(X[:, 0], self.width_)
        check_finite(X.reshape(len(X), X.shape[1] * X.shape[2]))
        return Tokens(X, self.recipe.device)


def attention_heads(width: int, asked: int | None) -> int:
    """The heads asked for, or as many as leave each at least 64 columns.

    Raises:
        TaskError: they do not divide the width.
    """
    if asked is None:
        return (
            max(number for number in range(1, width + 1) if width % number == 0 and width // number >= HEAD_WIDTH)
            if (width >= HEAD_WIDTH)
            else 1
        )
    if width % asked:
        raise TaskError(f"--heads must divide the width of the tokens, {width}, got {asked}")
    return asked


def fit_attentive(task: Task, features: str, config: AttentiveConfig) -> Fitted:
    """Train at each learning rate on the stored patches; epoch and rate by validation.

    Raises:
        TaskError: numbers or ranks; features that are no patches; averaged features; a split without both classes.
        IncompleteError: the set has no patches; the message has the line that adds them.
    """
    check_labels_or_classes(task, "attentive")
    if features.rsplit("/", 1)[-1] != "patches":
        raise TaskError(
            f"attentive pooling reads patch tokens, got features {features!r}; use --features patches, or "
            "layers/K/patches of a set that has them"
        )
    if task.pools_features:
        raise TaskError(
            f"task {task.name!r} averages the features of each {task.spec.unit}, and attentive pooling reads the "
            "patches of an image; use --pool mean or --pool max"
        )
    recipe = recipe_of(config)
    read: dict[str, StoredTokens] = {}
    for split in SPLITS:
        owner = owner_of(task, split)
        require_arrays(owner.features, features)
        for vectors in ("mean_patch", "cls"):  # what tells equal images apart without reading all patches
            if vectors in owner.features.arrays:
                owner.check_images(vectors)
                break
        read[split] = StoredTokens(owner.features, features, owner.index(split), recipe.device)
    width, outputs = read["train"].width, len(task.labels)
    heads = attention_heads(width, config.heads)

    def make(generator: torch.Generator) -> nn.Module:
        return AttentiveHead(width, heads, config.queries, outputs, generator)

    sources: dict[str, Source] = dict(read)
    fitted, _ = fit_heads(task, config, recipe, make, sources)
    fitted.choices.update(heads=heads, queries=config.queries, tokens=int(np.prod(read["train"].data.row_shape[:-1])))
    return fitted
