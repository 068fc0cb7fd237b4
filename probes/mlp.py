"""A head with one hidden layer on vectors: LayerNorm, linear, GELU, LayerNorm, dropout, linear.

Source: the head on frozen DINOv3 7B features of Tayebi Arasteh et al. 2025, arXiv 2510.07191, and its code.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from probes.checks import Kind, check_finite, check_width
from probes.selection import Fitted
from probes.tasks import Task
from probes.trained import (
    HeadProbe,
    check_labels_or_classes,
    fit_heads,
    labelled,
    moments,
    owner_of,
    recipe_of,
    require_arrays,
    unscaled,
)
from probes.trained_config import MlpConfig
from probes.training import Dropout, Recipe, Source, Validation, Vectors, linear

PUBLISHED_PRESET = "dinov3-cxr"
PUBLISHED_BACKBONE = "dinov3-7b"


class MlpHead(nn.Module):
    """Logits (B, L) of vectors (B, D)."""

    def __init__(self, width: int, hidden: int, outputs: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width),
            linear(width, hidden, generator),
            nn.GELU(),
            nn.LayerNorm(hidden),
            Dropout(dropout, generator),
            linear(hidden, outputs, generator),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layers(x))


class MLPProbe(HeadProbe):
    """The head on rows in memory, scikit-learn style; see `HeadProbe` for what a fit leaves."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        standardize: bool = True,
        hidden: int = 512,
        dropout: float = 0.3,
        class_weight: str | None = None,
    ) -> None:
        super().__init__(recipe, class_weight)
        self.standardize, self.hidden, self.dropout = standardize, hidden, dropout

    def fit(
        self,
        X: Float[np.ndarray, "N D"],
        y: np.ndarray,
        mask: Bool[np.ndarray, "..."] | None = None,
        *,
        kind: Kind,
        num_classes: int | None = None,
        validation: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    ) -> "MLPProbe":
        """Train on labels (N, L) of 0/1 or class numbers (N,); `validation` (X, y, mask) chooses epoch and rate by
        its loss. Rows without a valid label are left out and may hold NaN.

        Raises:
            TaskError: arrays that do not fit together, features that are not finite, no labelled row. ConfigError:
                several learning rates and no validation.
        """
        mask = self._labels(X, y, mask, kind, num_classes)
        kept = labelled(mask)
        if not kept.all():
            X, y, mask = X[kept], y[kept], mask[kept]
        check_finite(X)
        self.mean_, self.scale_ = moments(X) if self.standardize else unscaled(X.shape[1])
        check = None
        if validation is not None:
            check = Validation(self._source(validation[0]), self._targets(*validation[1:]), lambda _: 0.0)

        def make(generator: torch.Generator) -> nn.Module:
            return MlpHead(X.shape[1], self.hidden, self.num_outputs_, self.dropout, generator)

        self._fit(make, self._source(X), self._targets(y, mask), check)
        return self

    def predict_proba(self, X: Float[np.ndarray, "N D"]) -> Float64[np.ndarray, "N L"]:
        """Probability of each label or class.

        Raises:
            TaskError: not fitted, another width than in `fit`, or features that are not finite.
        """
        self._check_fitted()
        return self._scores(self._source(X))

    def _source(self, X: Float[np.ndarray, "N D"]) -> Source:
        check_width(X, len(self.mean_))
        check_finite(X)
        return Vectors(scaled(X, self.mean_, self.scale_), self.recipe.device)


def scaled(
    X: Float[np.ndarray, "N D"], mean: Float[np.ndarray, " D"], scale: Float[np.ndarray, " D"]
) -> Float[np.ndarray, "N D"]:
    """(X - mean) / scale in float32, in one copy."""
    result = X.astype(np.float32)
    result -= mean.astype(np.float32)
    result /= scale.astype(np.float32)
    return result


def fit_mlp(task: Task, features: str, config: MlpConfig) -> Fitted:
    """Train at each learning rate; epoch and rate by validation.

    Raises:
        TaskError: numbers or ranks; a split without both classes. IncompleteError: the set lacks the features.
    """
    check_labels_or_classes(task, "mlp")
    for split in ("train", "test"):
        require_arrays(owner_of(task, split).features, features)
    X = {split: task.arrays(split, features)[0] for split in ("train", "val", "test")}
    for rows in X.values():
        check_finite(rows)
    width = X["train"].shape[1]
    if config.settled("scaling") == "standardize":
        mean, scale = moments(X["train"])
        X = {split: scaled(rows, mean, scale) for split, rows in X.items()}
    recipe = recipe_of(config, drop_last=config.protocol is not None)
    outputs = len(task.labels)

    def make(generator: torch.Generator) -> nn.Module:
        return MlpHead(width, config.settled("hidden"), outputs, config.settled("dropout"), generator)

    sources: dict[str, Source] = {split: Vectors(rows, recipe.device) for split, rows in X.items()}
    fitted, _ = fit_heads(task, config, recipe, make, sources)
    fitted.choices["scaling"] = config.settled("scaling")
    if config.protocol is None:
        return fitted
    deviations = chest_deviations(task, features, config)
    fitted.choices["protocol_deviations"] = deviations
    notes = [f"deviates from protocol chest: {text}" for text in deviations]
    return Fitted(fitted.val_scores, fitted.test_scores, fitted.choices, fitted.num_parameters, (*fitted.notes, *notes))


def chest_deviations(task: Task, features: str, config: MlpConfig) -> list[str]:
    """Where this evaluation leaves the protocol of the frozen 7B.

    Source: arXiv 2510.07191 and its code (head, optimizer, loss, selection, extraction of features).
    """
    spec = task.features.spec
    identity = spec["identity"]
    found = []
    model = spec["weights"].get("model", spec["model"])
    if model != PUBLISHED_BACKBONE:
        found.append(f"backbone {model} in place of {PUBLISHED_BACKBONE}")
    if features != "mean_all":
        found.append(f"features {features} in place of mean_all, the mean over CLS, registers and patches")
    found.append("images as they are; the published extractor flips and turns each once at random, test images too")
    if spec.get("request", {}).get("published") != PUBLISHED_PRESET:
        found.append(
            f"images not prepared by the preset {PUBLISHED_PRESET} (grey, min-max, equalised, no mean and std)"
        )
    for what, name in (("computed", "compute_dtype"), ("stored", "stored_dtype")):
        if identity.get(name) != "float32":
            found.append(f"features {what} in {identity.get(name, 'an unknown type')} in place of float32")
    for name, given in _options(config).items():
        published = {**MlpConfig.CHEST, "hidden": 512, "dropout": 0.3}[name]
        if given != published:
            found.append(f"{name.replace('_', ' ')} {given} in place of {published}")
    if config.patience is not None:
        found.append(f"training stops after {config.patience} epochs without a better one; published is no such rule")
    found.append("batch 30 is the published code's default; the batch of this arm is not stated")
    if task.kind == "multiclass":
        found.append("cross-entropy of classes in place of binary cross-entropy of labels")
    masked = int((~task.samples("train", "train").mask).sum())
    if masked:
        found.append(f"{masked} masked label entries in training; the protocol has none")
    if task.unit_ids is not None:
        found.append(f"images of one {task.spec.unit} are pooled; the protocol scores images")
    return found


def _options(config: MlpConfig) -> dict[str, Any]:
    """What the protocol settles, as it was settled here; the learning rate in one spelling."""
    names = [*MlpConfig.CHEST, "hidden", "dropout"]
    options = {name: config.settled(name) for name in names}
    if config.rates == (1e-5,):
        options["lr"] = MlpConfig.CHEST["lr"]
    return options
