"""What every head asks of its arrays before it computes."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from featstore.errors import ConfigError, TaskError

Kind = Literal["multilabel", "multiclass"]
CHUNK = 8192  # rows looked at in one go


def check_finite(X: Float[np.ndarray, "N D"]) -> None:
    """Every feature is a finite number.

    Raises:
        TaskError: names the first row that holds another.
    """
    for start in range(0, len(X), CHUNK):
        finite = np.isfinite(X[start : start + CHUNK]).all(1)
        if not finite.all():
            row = start + int(finite.argmin())
            raise TaskError(
                f"features must be finite; row {row} holds NaN or infinity; leave failed rows out with the mask"
            )


def check_width(X: Float[np.ndarray, "N D"], width: int) -> None:
    """Features are as wide as those fitted on.

    Raises:
        TaskError: otherwise.
    """
    if X.shape[1] != width:
        raise TaskError(
            f"features have {X.shape[1]} columns, the probe was fitted on {width}; use the same set and pooling"
        )


def check_kind(kind: str) -> None:
    """The kind of a task is known.

    Raises:
        ConfigError: otherwise.
    """
    if kind not in ("multilabel", "multiclass"):
        raise ConfigError(f"kind is 'multilabel' or 'multiclass', got {kind!r}")


def check_labels(
    X: Float[np.ndarray, "N D"],
    y: np.ndarray,
    mask: Bool[np.ndarray, "..."] | None,
    kind: Kind,
    num_classes: int | None = None,
) -> Bool[np.ndarray, "N ..."]:
    """The mask, all true where None, once rows, labels and mask fit together.

    Raises:
        TaskError: shapes that differ, or a valid label outside 0/1 or the classes. ConfigError: fewer than two classes.
    """
    dimensions = 2 if kind == "multilabel" else 1
    if y.ndim != dimensions or len(y) != len(X):
        raise TaskError(f"{kind} labels of {len(X)} rows have {dimensions} axes and {len(X)} rows, got shape {y.shape}")
    if mask is None:
        mask = np.ones(y.shape, dtype=bool)
    if mask.shape != y.shape:
        raise TaskError(f"the mask has the shape of the labels, {y.shape}; got {mask.shape}")
    valid = y[mask]
    if kind == "multilabel":
        if not np.isin(valid, (0, 1)).all():
            raise TaskError(
                f"labels must be 0 or 1, found {np.unique(valid)[:5].tolist()}; apply the label policy first"
            )
    elif num_classes is not None and num_classes < 2:
        raise ConfigError(f"a categorical label has at least two classes, got num_classes={num_classes}")
    elif len(valid) and (valid.min() < 0 or (num_classes is not None and valid.max() >= num_classes)):
        limit = "" if num_classes is None else f" to {num_classes - 1}"
        raise TaskError(f"classes must be numbers from 0{limit}, found {valid.min()} to {valid.max()}")
    return mask
