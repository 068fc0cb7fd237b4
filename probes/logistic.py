"""L2-regularised logistic regression at scikit-learn's objective, for all labels and all strengths in one solve.

    0.5 * ||w||^2 + C * sum_i s_i * logloss_i,   intercept not penalised,

binary per label, softmax for more than two classes. Solved in the features' eigenbasis (`probes.eigenbasis`) by
batched L-BFGS (`probes.lbfgs`), what is left over with full Hessians along the path of C (`probes.polish`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer

from featstore.errors import ConfigError, TaskError
from probes.checks import CHUNK, Kind, check_finite, check_kind, check_labels, check_width
from probes.eigenbasis import scaled
from probes.solver import Fitted, solve_binary, solve_softmax
from probes.workers import Workers, worker_threads

# The grid of DINOv2's and DINOv3's logistic regression evaluation.
DEFAULT_C = tuple(float(value) for value in 10 ** np.linspace(-6, 5, 45))


class LogisticProbe:
    """Logistic regression on frozen features, scikit-learn style.

    After `fit`, with L labels (or K > 2 classes; one column for two classes; F = 1 for a softmax, else L):

    - `C_` (num_C,); `coef_` (num_C, D, L) and `intercept_` (num_C, L) for the features (x - mean_) / scale_;
      without `standardize` mean_ is 0 and scale_ 1.
    - `objective_` (num_C, F) scikit-learn's objective at the solution; `converged_` (num_C, F); `status_` (num_C, F)
      says "converged", "iteration limit" or "one class".
    - `one_class_` (L,) labels without positives or without negatives (classes without rows). Such a label has
      coefficients 0, the intercept log((positives + 1/2) / (negatives + 1/2)) and objective NaN; such a class gets
      the intercept -1e4, so that it is never predicted.
    """

    def __init__(
        self,
        *,
        C: float | Sequence[float] | Float[np.ndarray, " C"] = DEFAULT_C,
        standardize: bool = True,
        class_weight: Literal["balanced"] | None = None,
    ) -> None:
        """C: inverse strength(s) of the penalty, > 0, ascending. class_weight: "balanced" is n / (K n_class) per row.

        Raises:
            ConfigError: strengths that are not positive and ascending, or another class weight.
        """
        self.C, self.standardize, self.class_weight = C, standardize, class_weight
        self.C_ = np.atleast_1d(np.asarray(C, dtype=np.float64))
        if not len(self.C_) or not (self.C_ > 0).all() or not (np.diff(self.C_) > 0).all():
            raise ConfigError(f"C must be positive and ascending, got {C}")
        if class_weight not in (None, "balanced"):
            raise ConfigError(f"class_weight is None or 'balanced', got {class_weight!r}")

    def fit(
        self,
        X: Float[np.ndarray, "N D"],
        y: np.ndarray,
        mask: Bool[np.ndarray, "..."] | None = None,
        *,
        kind: Kind,
        num_classes: int | None = None,
    ) -> "LogisticProbe":
        """Fit every label at every C.

        multilabel: `y` and `mask` (N, L), y 0/1; a masked entry has weight zero for its label. multiclass: `y` (N,)
        class numbers below `num_classes` (default: the largest + 1), `mask` (N,). Rows without any valid label are
        left out altogether, also of mean and deviation; they may hold NaN.

        While it runs, torch uses one thread per operation in the whole process.

        Raises:
            TaskError: arrays that do not fit together, features that are not finite, no labelled row.
        """
        check_kind(kind)
        mask = check_labels(X, y, mask, kind, num_classes)
        used = mask.any(1) if mask.ndim == 2 else mask
        if not used.any():
            raise TaskError(f"no labelled row to fit on among {len(X)}; check the masks and the training split")
        if not used.all():
            X, y, mask = X[used], y[used], mask[used]
        self.kind_ = kind
        self.num_classes_ = (num_classes or max(2, int(y.max()) + 1)) if kind == "multiclass" else 2
        binary = kind == "multilabel" or self.num_classes_ == 2
        with worker_threads() as workers:
            if binary:
                self._fit_binary(
                    X, workers, y if y.ndim == 2 else y[:, None], mask if mask.ndim == 2 else mask[:, None]
                )
            else:
                self._fit_softmax(X, workers, y)
        return self

    def _fit_binary(
        self,
        X: Float[np.ndarray, "N D"],
        workers: Workers,
        y: Integer[np.ndarray, "N L"] | Bool[np.ndarray, "N L"],
        mask: Bool[np.ndarray, "N L"],
    ) -> None:
        positive, valid = ((y == 1) & mask).T, mask.T  # (L, N)
        counts = np.stack([valid.sum(1) - positive.sum(1), positive.sum(1)])  # (2, L)
        weights = valid.astype(np.float64)
        if self.class_weight == "balanced":
            weights *= np.where(positive, *(counts.sum(0) / (2.0 * np.maximum(counts, 1)))[::-1, :, None])
        self.one_class_ = counts.min(0) == 0
        kept = np.flatnonzero(~self.one_class_)
        found = solve_binary(
            X,
            torch.from_numpy(positive[kept].astype(np.float64)),
            torch.from_numpy(weights[kept]),
            torch.from_numpy(self.C_),
            workers,
            standardize=self.standardize,
        )
        constant = np.log((counts[1] + 0.5) / (counts[0] + 0.5))
        self._keep(found, kept, constant)
        self.objective_, self.converged_ = (
            np.full((len(self.C_), len(positive)), np.nan),
            np.zeros((len(self.C_), len(positive)), dtype=bool),
        )
        self.objective_[:, kept], self.converged_[:, kept] = found.objective, found.converged
        self._name(self.one_class_)

    def _fit_softmax(self, X: Float[np.ndarray, "N D"], workers: Workers, y: Integer[np.ndarray, " N"]) -> None:
        counts = np.bincount(y, minlength=self.num_classes_)
        self.one_class_ = counts == 0
        kept = np.flatnonzero(counts)
        weights = np.ones(len(y))
        if self.class_weight == "balanced":
            weights = (len(y) / (len(kept) * np.maximum(counts, 1.0)))[y]
        found = solve_softmax(
            X,
            torch.from_numpy(np.searchsorted(kept, y)),
            torch.from_numpy(weights),
            torch.from_numpy(self.C_),
            workers,
            standardize=self.standardize,
        )
        self._keep(found, kept, np.full(self.num_classes_, -1e4))
        self.objective_, self.converged_ = found.objective, found.converged
        self._name(np.array([len(kept) == 1]))

    def _keep(self, found: Fitted, kept: Integer[np.ndarray, " k"], constant: Float[np.ndarray, " L"]) -> None:
        """Set weights and intercepts; columns that were not fitted have weights 0 and a constant."""
        num_C, num_columns, width = len(self.C_), len(constant), len(found.mean)
        self.coef_ = np.zeros((num_C, width, num_columns))
        self._centre, self._centred_intercept = found.mean, np.tile(constant, (num_C, 1))
        self.coef_[:, :, kept], self._centred_intercept[:, kept] = found.coef, found.intercept
        self.scale_ = found.scale
        self.mean_ = found.mean if self.standardize else np.zeros_like(found.mean)
        self.intercept_ = self._centred_intercept - (0.0 if self.standardize else found.mean @ self.coef_)

    def _name(self, one_class: Bool[np.ndarray, " F"]) -> None:
        self.status_ = np.where(one_class, "one class", np.where(self.converged_, "converged", "iteration limit"))

    def decision(self, X: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "C N L"]:
        """Logits at every C, (num_C, N, L); float64 for float64 features, else float32.

        Raises:
            TaskError: another width than in `fit`, or features that are not finite.
        """
        self._check_features(X)
        return self._logits(X, self.coef_, self._centred_intercept)

    def probabilities(
        self, X: Float[np.ndarray, "N D"], choice: int | Integer[np.ndarray, " choices"]
    ) -> Float[np.ndarray, "N L"]:
        """Probabilities at the chosen C: a number in the grid, or one per label (multilabel).

        (N, L) for labels, (N, K) for classes (also K = 2), rows of classes sum to one.

        Raises:
            TaskError: see `decision`. ConfigError: a choice outside the grid, or several for one categorical label.
        """
        self._check_features(X)
        num_columns = self.coef_.shape[2]
        index = np.asarray(choice).reshape(-1)
        allowed = (1,) if self.kind_ == "multiclass" else (1, num_columns)
        if len(index) not in allowed:
            raise ConfigError(
                f"choose one C, or for labels one each; got {len(index)} choices for {num_columns} columns"
            )
        if index.min() < 0 or index.max() >= len(self.C_):
            raise ConfigError(f"a choice is a number from 0 to {len(self.C_) - 1}, got {index.tolist()}")
        index = np.broadcast_to(index, num_columns)
        columns = np.arange(num_columns)
        logits = self._logits(X, self.coef_[index, :, columns].T[None], self._centred_intercept[index, columns][None])[
            0
        ]
        if num_columns > 1 and self.kind_ == "multiclass":
            return np.asarray(torch.softmax(torch.from_numpy(logits), 1))
        positive = np.asarray(torch.sigmoid(torch.from_numpy(logits)))
        return np.hstack([1 - positive, positive]) if self.kind_ == "multiclass" else positive

    def _logits(
        self, X: Float[np.ndarray, "N D"], coef: Float[np.ndarray, "C D L"], intercept: Float[np.ndarray, "C L"]
    ) -> Float[np.ndarray, "C N L"]:
        dtype = np.float64 if X.dtype == np.float64 else np.float32
        num_C, width, num_labels = coef.shape
        flat = coef.transpose(1, 0, 2).reshape(width, -1).astype(dtype)
        result = np.empty((num_C, len(X), num_labels), dtype)
        for start in range(0, len(X), CHUNK):
            part: np.ndarray = scaled(X[start : start + CHUNK], self._centre, self.scale_).astype(dtype)
            part = part @ flat
            result[:, start : start + CHUNK] = part.reshape(-1, num_C, num_labels).transpose(1, 0, 2)
        result += intercept.astype(dtype)[:, None]
        return result

    def _check_features(self, X: Float[np.ndarray, "N D"]) -> None:
        if not hasattr(self, "coef_"):
            raise TaskError("this probe is not fitted yet; call fit first")
        check_width(X, self.coef_.shape[1])
        check_finite(X)


@dataclass(frozen=True)
class Choice:
    """Grid number per label; which labels took the pooled one, and which stand at an edge of the grid."""

    index: Integer[np.ndarray, " L"]
    pooled: Bool[np.ndarray, " L"]
    edge: Bool[np.ndarray, " L"]


def choose(
    scores: Float[np.ndarray, "C L"], positives: Integer[np.ndarray, " L"], *, min_positives: int = 10
) -> Choice:
    """Best strength per label by a validation score (larger is better, NaN where undefined); ties take the smallest C.

    A label with fewer than `min_positives` positives is too noisy to choose by: it takes the pooled choice, the best
    mean over the labels that have enough, or over all defined ones where none has.

    Raises:
        TaskError: the score is undefined for every label.
    """
    defined = ~np.isnan(scores).any(0)
    if not defined.any():
        raise TaskError("no label has both classes among the validation rows, so no C can be chosen; pass a single C")
    own = defined & (positives >= min_positives)
    pool = own if own.any() else defined
    index = np.where(own, np.where(own, scores, 0).argmax(0), scores[:, pool].mean(1).argmax())
    last = len(scores) - 1
    return Choice(index, ~own, (last > 0) & ((index == 0) | (index == last)))
