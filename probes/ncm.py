"""Nearest class mean: a row belongs to the class whose mean is nearest, as the few-shot curves' head `ncm`.

Scores are the linear part of -|x - m|^2 / 2, that is x.m - |m|^2 / 2, in the scaled space.
Source: Snell et al. 2017 (prototypes); centring before unit length as in Wang et al. 2019, SimpleShot.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from featstore.errors import ConfigError, TaskError
from probes.checks import Kind, check_finite, check_labels
from probes.estimator import (
    Estimator,
    classes_or_labels,
    features_of,
    numbered,
    row_weights,
    targets_of,
    weighted_moments,
)
from probes.fewshot_config import Scaling

SCALINGS: tuple[Scaling, ...] = ("standardize", "none", "unit", "centred")


class NearestMeanProbe(Estimator):
    """Nearest class mean as a scikit-learn classifier of classes (N,) or labels (N, L).

    After `fit`: `classes_` (0 and 1 for labels); `means_` (K, D), or (L, 2, D) of negatives and positives, in the
    scaled space, which is also that of `coef_` (K, D) and `intercept_` (K,) (of labels: (L, D), (L,), positives against
    negatives).
    """

    _estimator_kind = "classifier"

    def __init__(self, *, scaling: Scaling = "none") -> None:
        """scaling: "none"; "unit" length; "centred": train mean off, then unit length; "standardize" by all rows."""
        self.scaling = scaling

    def fit(self, X: Any, y: Any, mask: Any = None, *, sample_weight: Any = None) -> "NearestMeanProbe":
        """Take the mean of each class of `y` (N,), or of positives and negatives of labels `y` (N, L) of 0/1.

        Rows without any valid label are left out and may hold NaN; rows count `sample_weight` times.

        Raises:
            ConfigError: an unknown scaling. TaskError: arrays that do not fit together, features that are not finite,
                no labelled row, or a label without both classes.
        """
        import torch

        from probes.fewshot_heads import Space

        if self.scaling not in SCALINGS:
            raise ConfigError(f"scaling is one of {', '.join(SCALINGS)}, got {self.scaling!r}")
        X = features_of(self, X, reset=True)
        y = classes_or_labels(y, mask)
        kind: Kind = "multilabel" if y.ndim == 2 else "multiclass"
        mask = None if mask is None else np.asarray(mask, dtype=bool)
        mask = check_labels(X, y if kind == "multilabel" else np.zeros(y.shape, np.int64), mask, kind)
        weights = row_weights(sample_weight, len(X))
        if weights is not None:
            mask = mask & (weights > 0).reshape(-1, *[1] * (mask.ndim - 1))
        used = mask.any(1) if mask.ndim == 2 else mask
        if not used.any():
            raise TaskError(f"no labelled row to fit on among {len(X)}; check the masks and the training split")
        self.kind_, self.classes_ = kind, np.arange(2)
        if kind == "multiclass":
            self.classes_, y = numbered(y, used)
        X, y, mask = X[used], y[used], mask[used]
        rows = np.ones(len(X)) if weights is None else weights[used]
        self._space = Space.of(X, self.scaling)
        if weights is not None and self.scaling in ("standardize", "centred"):
            mean, deviation = (torch.from_numpy(part) for part in weighted_moments(X, rows))
            self._space = Space(
                mean, deviation if self.scaling == "standardize" else self._space.scale, self._space.unit
            )
        scaled = self._scaled(X)
        if kind == "multiclass":
            self.means_ = _means(scaled, y, rows, len(self.classes_))
            self.coef_, self.intercept_ = self.means_, -0.5 * np.square(self.means_).sum(1)
            return self
        for column in range(y.shape[1]):
            if len(np.unique(y[mask[:, column], column])) < 2:
                raise TaskError(f"label {column} has one class among the rows to fit on; a mean of each is needed")
        self.means_ = np.stack([_means(scaled[m], v[m].astype(np.int64), rows[m], 2) for v, m in zip(y.T, mask.T)])
        self.coef_ = self.means_[:, 1] - self.means_[:, 0]
        self.intercept_ = -0.5 * (np.square(self.means_[:, 1]).sum(1) - np.square(self.means_[:, 0]).sum(1))
        return self

    def decision_function(self, X: Any) -> Float64[np.ndarray, "Q ..."]:
        """Scores (Q, K) of classes, (Q,) of two, (Q, L) of labels: above 0 where the mean of positives is nearer.

        Raises:
            TaskError: not fitted, another width than in `fit`, or features that are not finite.
        """
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if self.kind_ == "multiclass" and len(self.classes_) == 2 else scores

    def predict_proba(self, X: Any) -> Float64[np.ndarray, "Q L"]:
        """Softmax of the scores (Q, K), or sigmoid of those of labels (Q, L); not calibrated."""
        scores = self._scores(X)
        if self.kind_ == "multilabel":
            return np.asarray(0.5 * (1 + np.tanh(scores / 2)))  # cannot overflow
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return np.asarray(weights / weights.sum(1, keepdims=True))

    def predict(self, X: Any) -> np.ndarray:
        """Class with the nearest mean (Q,), or labels (Q, L) whose positives' mean is at least as near."""
        scores = self._scores(X)
        if self.kind_ == "multilabel":
            return (scores >= 0).astype(np.int64)
        return np.asarray(self.classes_[scores.argmax(1)])

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Share of rows that `predict` gets right (of labels: all of them), as scikit-learn's classifiers."""
        found = self.predict(X)
        right = found == targets_of(y, "a class or labels").reshape(found.shape)
        return float(np.average(right.all(1) if right.ndim == 2 else right, weights=sample_weight))

    def _scores(self, X: Any) -> Float64[np.ndarray, "Q K"]:
        self._check_fitted()
        X = features_of(self, X, reset=False)
        check_finite(X)
        return np.asarray(self._scaled(X) @ self.coef_.T + self.intercept_)

    def _scaled(self, X: Float[np.ndarray, "N D"]) -> Float64[np.ndarray, "N D"]:
        import torch

        return np.asarray(self._space(torch.from_numpy(np.ascontiguousarray(X).copy())))


def _means(
    X: Float64[np.ndarray, "N D"], y: np.ndarray, weights: Float64[np.ndarray, " N"], num_classes: int
) -> Float64[np.ndarray, "K D"]:
    """Mean of the rows of each class."""
    return np.stack([np.average(X[y == number], axis=0, weights=weights[y == number]) for number in range(num_classes)])
