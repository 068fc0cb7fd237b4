"""L2-regularised logistic regression at scikit-learn's objective, for all labels and all strengths in one solve.

    0.5 * ||w||^2 + C * sum_i s_i * logloss_i,   intercept not penalised,

binary per label, softmax for more than two classes. Solved in the features' eigenbasis (`probes.eigenbasis`) by
batched L-BFGS (`probes.lbfgs`), what is left over with full Hessians along the path of C (`probes.polish`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer

from featstore.errors import ConfigError, TaskError
from probes.checks import CHUNK, Kind, check_finite, check_kind, check_labels, check_width
from probes.eigenbasis import scaled
from probes.estimator import (
    Estimator,
    classes_or_labels,
    features_of,
    numbered,
    row_weights,
    targets_of,
    weighted_moments,
)
from probes.solver import Fitted, solve_binary, solve_softmax
from probes.workers import Workers, worker_threads

# The grid of DINOv2's and DINOv3's logistic regression evaluation.
DEFAULT_C = tuple(float(value) for value in 10 ** np.linspace(-6, 5, 45))
ClassWeight = Literal["balanced", "positives"] | Mapping[Any, float] | None


class LogisticProbe(Estimator):
    """Logistic regression on frozen features, as a scikit-learn classifier of classes (N,) or labels (N, L).

    After `fit`, with L labels (or K > 2 classes; one column for two classes; F = 1 for a softmax, else L):

    - `classes_` the classes (0 and 1 for labels), `n_features_in_` D.
    - `C_` (num_C,); `coef_` (num_C, D, L) and `intercept_` (num_C, L) for the features (x - mean_) / scale_;
      without `standardize` mean_ is 0 and scale_ 1.
    - `C_index_` number of the C per label (one entry for classes) that `predict` and its kin use: the only one, or what
      `choose` found; None before that.
    - `objective_` (num_C, F) scikit-learn's objective at the solution; `converged_` (num_C, F); `status_` (num_C, F)
      says "converged", "iteration limit" or "one class".
    - `one_class_` (L,) labels without positives or without negatives (classes without rows). Such a label has
      coefficients 0, the intercept log((positives + 1/2) / (negatives + 1/2)) and objective NaN; such a class gets
      the intercept -1e4, so that it is never predicted.
    """

    _estimator_kind = "classifier"
    _centre: Float[np.ndarray, " D"]
    _centred_intercept: Float[np.ndarray, "C L"]

    def __init__(
        self,
        *,
        C: float | Sequence[float] | Float[np.ndarray, " C"] = 1.0,
        standardize: bool = True,
        class_weight: ClassWeight = None,
    ) -> None:
        """C: inverse strength(s) of the penalty, > 0, ascending; `DEFAULT_C` is the grid of published evaluations.

        class_weight: "balanced" is n / (K n_class) per row; "positives" the number of negatives by that of positives on
        positive rows (torch's pos_weight), of labels and of two classes; or the weight of each class, 1 where none is
        given (of labels 0 and 1, the same for all).
        """
        self.C, self.standardize, self.class_weight = C, standardize, class_weight

    def fit(
        self,
        X: Any,
        y: Any,
        mask: Any = None,
        *,
        kind: Kind | None = None,
        num_classes: int | None = None,
        sample_weight: Any = None,
    ) -> "LogisticProbe":
        """Fit every label at every C.

        `y` (N, L) of 0/1 are labels, `y` (N,) classes of any type. multilabel: `mask` (N, L); a masked entry has weight
        zero for its label. multiclass: `mask` (N,). With `kind="multiclass"` or `num_classes`, classes are numbers
        below `num_classes` (default: the largest + 1), also those that no row has. Rows without any valid label are
        left out altogether, also of mean and deviation; they may hold NaN. So are rows of `sample_weight` zero; a row
        of weight 2 counts as two, also in mean and deviation and in balanced weights.

        While it runs, torch uses one thread per operation in the whole process.

        Raises:
            ConfigError: strengths that are not positive and ascending, or a class weight that is not there.
            TaskError: arrays that do not fit together, features that are not finite, no labelled row.
        """
        X = features_of(self, X, reset=True)
        y = targets_of(y, "a class or labels") if kind == "multilabel" else classes_or_labels(y, mask)
        self._check_options()
        numbers_given = kind is not None or num_classes is not None
        kind = kind or ("multilabel" if y.ndim == 2 else "multiclass")
        check_kind(kind)
        mask = None if mask is None else np.asarray(mask, dtype=bool)
        numbers = y if numbers_given or kind == "multilabel" else np.zeros(y.shape, np.int64)
        mask = check_labels(X, numbers, mask, kind, num_classes)
        weights = row_weights(sample_weight, len(X))
        if weights is not None:
            mask = mask & (weights > 0).reshape(-1, *[1] * (mask.ndim - 1))
        used = mask.any(1) if mask.ndim == 2 else mask
        if not used.any():
            raise TaskError(f"no labelled row to fit on among {len(X)}; check the masks and the training split")
        self.kind_ = kind
        self.classes_ = np.arange(2)
        if kind == "multiclass" and not numbers_given:
            self.classes_, y = numbered(y, used)
        if not used.all():
            X, y, mask = X[used], y[used], mask[used]
            weights = None if weights is None else weights[used]
        if kind == "multiclass" and numbers_given:
            self.classes_ = np.arange(num_classes or max(2, int(y.max()) + 1))
        y = np.asarray(y == 1) if kind == "multilabel" else y.astype(np.int64)
        self.num_classes_ = len(self.classes_)
        binary = kind == "multilabel" or self.num_classes_ == 2
        if self.class_weight == "positives" and not binary:
            raise ConfigError(
                f"class_weight 'positives' is of labels and of two classes; y has {self.num_classes_}: use 'balanced'"
            )
        X, given = self._weighed(X, weights)
        with worker_threads() as workers:
            if binary:
                self._fit_binary(
                    X, workers, y if y.ndim == 2 else y[:, None], mask if mask.ndim == 2 else mask[:, None], weights
                )
            else:
                self._fit_softmax(X, workers, y, weights)
        if given is not None:
            self._restore(*given)
        self.C_index_ = np.zeros(self._num_choices, np.int64) if len(self.C_) == 1 else None
        return self

    def _check_options(self) -> None:
        try:
            self.C_ = np.atleast_1d(np.asarray(self.C, dtype=np.float64))
        except (TypeError, ValueError):
            raise ConfigError(f"C must be positive and ascending, got {self.C!r}") from None
        if self.C_.ndim != 1 or not len(self.C_) or not (self.C_ > 0).all() or not (np.diff(self.C_) > 0).all():
            raise ConfigError(f"C must be positive and ascending, got {self.C}")
        weight = self.class_weight
        if isinstance(weight, Mapping):
            numbers = [value for value in weight.values() if isinstance(value, int | float | np.number)]
            if len(numbers) < len(weight) or not all(0 < value < np.inf for value in numbers):
                raise ConfigError(f"class_weight maps classes to numbers above 0, got {dict(weight)}")
        elif weight is not None and weight not in ("balanced", "positives"):
            raise ConfigError(
                f"class_weight is None, 'balanced', 'positives' or a weight of each class, got {weight!r}"
            )

    def _weighed(
        self, X: Float[np.ndarray, "N D"], weights: Float[np.ndarray, " N"] | None
    ) -> tuple[Float[np.ndarray, "N D"], tuple[np.ndarray, np.ndarray] | None]:
        """(features, None), or features scaled by the moments of weighted rows, and these moments."""
        self._scaling = self.standardize and weights is None
        if weights is None or not self.standardize:
            return X, None
        check_finite(X)
        mean, scale = weighted_moments(X, weights)
        return scaled(X, mean, scale), (mean, scale)

    def _restore(self, mean: Float[np.ndarray, " D"], scale: Float[np.ndarray, " D"]) -> None:
        """Say the solution on scaled features, whose plain mean is not zero, for the features as they came."""
        self.intercept_ = self._centred_intercept - self._centre @ self.coef_
        self._centre = mean + scale * self._centre
        self.mean_, self.scale_ = mean, scale

    @property
    def _num_choices(self) -> int:
        return 1 if self.kind_ == "multiclass" else len(self.one_class_)

    def _weight_of(self, value: Any) -> float:
        """Weight of a class by its name in a dict."""
        assert isinstance(self.class_weight, Mapping)
        return float(self.class_weight.get(value, 1.0))

    def _fit_binary(
        self,
        X: Float[np.ndarray, "N D"],
        workers: Workers,
        y: Integer[np.ndarray, "N L"] | Bool[np.ndarray, "N L"],
        mask: Bool[np.ndarray, "N L"],
        rows: Float[np.ndarray, " N"] | None,
    ) -> None:
        positive, valid = ((y == 1) & mask).T, mask.T  # (L, N)
        weights = valid.astype(np.float64) if rows is None else valid * rows
        total = np.stack([(weights * ~positive).sum(1), (weights * positive).sum(1)])  # (2, L)
        self.one_class_ = np.asarray(total.min(0) == 0)
        some = np.where(total > 0, total, 1.0)
        if self.class_weight == "balanced":
            weights *= np.where(positive, *(total.sum(0) / (2.0 * some))[::-1, :, None])
        elif self.class_weight == "positives":
            weights *= np.where(positive, (total[0] / some[1])[:, None], 1.0)
        elif self.class_weight is not None:
            weights *= np.where(positive, self._weight_of(self.classes_[1]), self._weight_of(self.classes_[0]))
        kept = np.flatnonzero(~self.one_class_)
        found = solve_binary(
            X,
            torch.from_numpy(positive[kept].astype(np.float64)),
            torch.from_numpy(weights[kept]),
            torch.from_numpy(self.C_),
            workers,
            standardize=self._scaling,
        )
        constant = np.log((total[1] + 0.5) / (total[0] + 0.5))
        self._keep(found, kept, constant)
        self.objective_, self.converged_ = (
            np.full((len(self.C_), len(positive)), np.nan),
            np.zeros((len(self.C_), len(positive)), dtype=bool),
        )
        self.objective_[:, kept], self.converged_[:, kept] = found.objective, found.converged
        self._name(self.one_class_)

    def _fit_softmax(
        self,
        X: Float[np.ndarray, "N D"],
        workers: Workers,
        y: Integer[np.ndarray, " N"],
        rows: Float[np.ndarray, " N"] | None,
    ) -> None:
        counts = np.bincount(y, minlength=self.num_classes_)
        self.one_class_ = counts == 0
        kept = np.flatnonzero(counts)
        weights = np.ones(len(y)) if rows is None else rows.copy()
        if self.class_weight == "balanced":
            total = np.bincount(y, weights, minlength=self.num_classes_)
            weights *= (total.sum() / (len(kept) * np.where(counts, total, 1.0)))[y]
        elif self.class_weight is not None:
            weights *= np.array([self._weight_of(name) for name in self.classes_])[y]
        found = solve_softmax(
            X,
            torch.from_numpy(np.searchsorted(kept, y)),
            torch.from_numpy(weights),
            torch.from_numpy(self.C_),
            workers,
            standardize=self._scaling,
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
        self.mean_ = found.mean if self._scaling else np.zeros_like(found.mean)
        self.intercept_ = self._centred_intercept - (0.0 if self._scaling else found.mean @ self.coef_)

    def _name(self, one_class: Bool[np.ndarray, " F"]) -> None:
        self.status_ = np.where(one_class, "one class", np.where(self.converged_, "converged", "iteration limit"))

    def choose(self, X: Any, y: Any, mask: Any = None) -> "LogisticProbe":
        """Let `predict` and its kin use the C with the best AUROC on these rows, which `fit` has not seen.

        Per label, or macro of classes; a label with fewer than ten positives takes the pooled choice (see the function
        of this name). `y` and `mask` as in `fit`.

        Raises:
            TaskError: not fitted, arrays that do not fit, or no label with both classes.
        """
        self._check_fitted()
        y = targets_of(y, "a class or labels")
        X = features_of(self, X, reset=False)
        if self.kind_ == "multiclass":
            y = y.ravel() if y.shape[1:] == (1,) else y
            missing = ~np.isin(y if mask is None else y[np.asarray(mask, dtype=bool)], self.classes_)
            if missing.any():
                raise TaskError(f"a class to choose by was not there to fit on; classes: {self.classes_.tolist()}")
            y = np.searchsorted(self.classes_, np.where(np.isin(y, self.classes_), y, self.classes_[0]))
        mask = check_labels(X, y, None if mask is None else np.asarray(mask, dtype=bool), self.kind_)
        scores = [self.probabilities(X, number) for number in range(len(self.C_))]
        if len(self.C_) > 1:
            self.C_index_ = choose(*_quality(y, scores, mask, self.kind_)).index
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Class with the largest probability (Q,), or labels with one of at least one half (Q, L), at `C_index_`."""
        logits = self._chosen(X)
        if self.kind_ == "multilabel":
            return (logits >= 0).astype(np.int64)
        return np.asarray(self.classes_[(logits[:, 0] > 0).astype(int) if logits.shape[1] == 1 else logits.argmax(1)])

    def predict_proba(self, X: Any) -> Float[np.ndarray, "Q L"]:
        """Probabilities at `C_index_`: (Q, K) of classes, (Q, L) of labels; errors as in `decision_function`."""
        index = self._index()
        return self.probabilities(features_of(self, X, reset=False), index)

    def decision_function(self, X: Any) -> Float[np.ndarray, "Q ..."]:
        """Logits at `C_index_`: (Q,) of two classes, else (Q, K) or (Q, L).

        Raises:
            TaskError: not fitted, several C of which none is chosen, another width, or features that are not finite.
        """
        logits = self._chosen(X)
        return logits[:, 0] if self.kind_ == "multiclass" and logits.shape[1] == 1 else logits

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Share of rows that `predict` gets right (of labels: all of them), as scikit-learn's classifiers."""
        found = self.predict(X)
        right = found == targets_of(y, "a class or labels").reshape(found.shape)
        right = right.all(1) if right.ndim == 2 else right
        return float(np.average(right, weights=sample_weight))

    def _index(self) -> Integer[np.ndarray, " L"]:
        self._check_fitted()
        if self.C_index_ is None:
            raise TaskError(
                f"{len(self.C_)} values of C were fitted and none is chosen; call choose(X_val, y_val), or give one C"
            )
        return np.asarray(self.C_index_)

    def _chosen(self, X: Any) -> Float[np.ndarray, "Q L"]:
        index = self._index()
        X = features_of(self, X, reset=False)
        check_finite(X)
        return self._at(X, index)

    def _at(self, X: Float[np.ndarray, "N D"], index: Integer[np.ndarray, " l"]) -> Float[np.ndarray, "N L"]:
        columns = np.arange(self.coef_.shape[2])
        index = np.broadcast_to(index, len(columns))
        coef, intercept = self.coef_[index, :, columns].T[None], self._centred_intercept[index, columns][None]
        return np.asarray(self._logits(X, coef, intercept)[0])

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
        logits = self._at(X, index)
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
        self._check_fitted()
        check_width(X, self.coef_.shape[1])
        check_finite(X)


def _quality(
    y: np.ndarray, scores: Sequence[np.ndarray], mask: np.ndarray, kind: Kind
) -> tuple[Float[np.ndarray, "C L"], Integer[np.ndarray, " L"]]:
    """(AUROC of each label at each C, positives), or (macro of classes, the fewest that count as enough)."""
    from probes.metrics import evaluate

    found = [evaluate(y, values, mask, kind=kind, labels=[str(n) for n in range(values.shape[1])]) for values in scores]
    if kind == "multiclass":
        return np.array([[item["macro"]["auroc"]] for item in found]), np.array([10])
    per_label = [[entry["auroc"] for entry in item["per_label"]] for item in found]
    return np.array(per_label), ((y == 1) & mask).sum(0)


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
