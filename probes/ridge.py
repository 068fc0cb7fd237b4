"""Ridge regression, exact, for all targets and all strengths from one eigendecomposition in float64.

    sum_i (y_i - x_i w - b)^2 + alpha * ||w||^2,   intercept not penalised,

as scikit-learn's `Ridge`. With the axes V and squares s of the centred rows, w = V (V'X'y / (s + alpha)); with fewer
rows than columns the products of rows are decomposed instead.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer

from featstore.errors import ConfigError, TaskError
from probes.checks import CHUNK, check_finite
from probes.estimator import Estimator, features_of, row_weights, targets_of, weighted_moments
from probes.workers import Workers, worker_threads

DEFAULT_ALPHA = tuple(float(value) for value in 10 ** np.linspace(-2, 8, 41))


BLOCK = 2048  # rows whose products are taken by one thread
STRIP = 1 << 16  # numbers at a time that stay in a core's own cache


def column_moments(X: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """(mean, standard deviation) of the columns in float64; the deviation of constant columns is 1.

    Columns that hold NaN or infinity have such a mean.
    """
    step = max(1, STRIP // X.shape[1])
    chunks = [slice(start, start + step) for start in range(0, len(X), step)]
    mean, variance = np.zeros(X.shape[1]), np.zeros(X.shape[1])
    with np.errstate(invalid="ignore", over="ignore"):
        for rows in chunks:
            mean += X[rows].astype(np.float64).sum(0)
        mean /= len(X)
        for rows in chunks:
            apart = X[rows] - mean
            variance += np.einsum("ij,ij->j", apart, apart)
    variance /= len(X)
    # Rounding of the mean alone, as scikit-learn's StandardScaler bounds it.
    eps = np.finfo(np.float64).eps
    constant = variance <= len(X) * eps * variance + np.square(len(X) * mean * eps)
    return mean, np.where(constant, 1.0, np.sqrt(variance))


class RidgeProbe(Estimator):
    """Ridge regression on frozen features, as a scikit-learn regressor of numbers (N,) or (N, T).

    After `fit`, with A strengths and T targets: `alpha_` (A,); `coef_` (A, D, T) and `intercept_` (A, T) for the
    features (x - mean_) / scale_; without `standardize` scale_ is 1. `alpha_index_` (T,) number of the strength per
    target that `predict` uses: the only one, or what `choose` found; None before that.
    """

    _estimator_kind = "regressor"

    def __init__(
        self, *, alpha: float | Sequence[float] | Float[np.ndarray, " A"] = 1.0, standardize: bool = True
    ) -> None:
        """alpha: strength(s) of the penalty, > 0, ascending; `DEFAULT_ALPHA` is a grid of them."""
        self.alpha, self.standardize = alpha, standardize

    def fit(self, X: Any, y: Any, mask: Any = None, *, sample_weight: Any = None) -> "RidgeProbe":
        """Fit every target of `y` (N, T) or (N,) at every alpha on the rows where its mask (same shape) is true.

        Rows without any valid target are left out altogether, also of mean and deviation; they may hold NaN. So are
        rows of `sample_weight` zero; a row of weight 2 counts as two.

        Raises:
            ConfigError: strengths that are not positive and ascending.
            TaskError: arrays that do not fit together, values that are not finite, a target without any row.
        """
        X = features_of(self, X, reset=True)
        self._check_options()
        y = np.asarray(targets_of(y, "numbers"), dtype=np.float64)
        mask = np.ones(y.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        if y.ndim not in (1, 2) or y.shape != mask.shape or len(y) != len(X):
            raise TaskError(f"targets and mask of {len(X)} rows differ in shape; got {y.shape} and {mask.shape}")
        self._flat = y.ndim == 1
        y, mask = y.reshape(len(y), -1 if y.size else 1), mask.reshape(len(y), -1 if y.size else 1)
        weights = row_weights(sample_weight, len(X))
        if weights is not None:
            mask = mask & (weights > 0)[:, None]
        if not mask.any(0).all():
            raise TaskError(f"a target has no row to fit on among {len(X)}; check the masks and the training split")
        if not np.isfinite(y[mask]).all():
            raise TaskError("targets must be finite numbers, not NaN or infinity; mask other rows out")
        used = mask.any(1)
        if not used.all():
            X, y, mask = X[used], y[used], mask[used]
            weights = None if weights is None else weights[used]
        if weights is not None:
            check_finite(X)
        self.mean_, deviation = _moments(X, weights)
        if not np.isfinite(self.mean_).all():
            check_finite(X)
        self.scale_ = deviation if self.standardize else np.ones_like(deviation)
        self._num_rows = len(X)
        num_alpha, width, num_targets = len(self.alpha_), X.shape[1], y.shape[1]
        self.coef_ = np.zeros((num_alpha, width, num_targets))
        self.intercept_ = np.zeros((num_alpha, num_targets))
        # A BLAS that shares every call among threads waits for the slowest in each of eigh's many small products.
        with worker_threads() as workers, _blas().limit(limits=1, user_api="blas"):
            for rows, columns in _patterns(mask):  # targets that are known for the same rows share one decomposition
                if rows.all():
                    self._solve(X, y[:, columns], columns, weights, workers)
                else:
                    chosen = None if weights is None else weights[rows]
                    self._solve(X[rows], y[rows][:, columns], columns, chosen, workers)
        self.alpha_index_ = np.zeros(num_targets, np.int64) if num_alpha == 1 else None
        return self

    def _check_options(self) -> None:
        try:
            self.alpha_ = np.atleast_1d(np.asarray(self.alpha, dtype=np.float64))
        except (TypeError, ValueError):
            raise ConfigError(f"alpha must be positive and ascending, got {self.alpha!r}") from None
        grid = self.alpha_
        if grid.ndim != 1 or not len(grid) or not (grid > 0).all() or not (np.diff(grid) > 0).all():
            raise ConfigError(f"alpha must be positive and ascending, got {self.alpha}")

    def _solve(
        self,
        X: Float[np.ndarray, "N D"],
        y: Float64[np.ndarray, "N t"],
        columns: Integer[np.ndarray, " t"],
        weights: Float64[np.ndarray, " N"] | None,
        workers: Workers,
    ) -> None:
        level = np.average(y, axis=0, weights=weights)
        every = len(X) == self._num_rows
        mean = self.mean_ if every else _moments(X, weights)[0]
        root = None if weights is None else np.sqrt(weights)[:, None]
        few = len(X) <= X.shape[1]
        plain = bool((self.scale_ == 1).all())

        def part(rows: slice) -> tuple[Float64[np.ndarray, "n D"], Float64[np.ndarray, "n t"]]:
            values, target = np.subtract(X[rows], mean, dtype=np.float64), y[rows] - level
            if not plain:
                values /= self.scale_
            if root is not None:
                values *= root[rows]
                target *= root[rows]
            return values, target

        def square(rows: slice) -> tuple[Float64[np.ndarray, "D D"], Float64[np.ndarray, "D t"]]:
            values, target = part(rows)
            return values.T @ values, values.T @ target

        if few:
            scaled, right = part(slice(None))
            gram = scaled @ scaled.T
        else:
            gram, right = np.zeros((X.shape[1], X.shape[1])), np.zeros((X.shape[1], y.shape[1]))
            for products, answers in workers.map_blocks(square, len(X), BLOCK):
                gram += products
                right += answers
        squares, axes = np.linalg.eigh(gram)
        turned = axes.T @ right
        solution = axes @ (turned / (np.maximum(squares, 0)[:, None] + self.alpha_[:, None, None]))  # (A, ., t)
        self.coef_[:, :, columns] = scaled.T @ solution if few else solution
        centre = (mean - self.mean_) / self.scale_
        self.intercept_[:, columns] = level - centre @ self.coef_[:, :, columns]

    def predictions(self, X: Any) -> Float64[np.ndarray, "A N T"]:
        """Predictions at every alpha, float64.

        Raises:
            TaskError: not fitted, another width than in `fit`, or features that are not finite.
        """
        self._check_fitted()
        return self._at(features_of(self, X, reset=False), self.coef_, self.intercept_)

    def choose(self, X: Any, y: Any, mask: Any = None) -> "RidgeProbe":
        """Let `predict` use the alpha with the least squared error per target on these rows; ties take the largest.

        Raises:
            TaskError: not fitted, arrays that do not fit, or a target without any row.
        """
        found = self.predictions(X)
        y = np.asarray(targets_of(y, "numbers"), dtype=np.float64)
        mask = np.ones(y.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        y, mask = y.reshape(len(y), -1), mask.reshape(len(mask), -1)
        if y.shape != found.shape[1:] or mask.shape != y.shape:
            raise TaskError(f"targets to choose by have shape {found.shape[1:]}; got {y.shape}, mask {mask.shape}")
        if not mask.any(0).all():
            raise TaskError("a target has no row to choose alpha by; pass a single alpha")
        error = np.where(mask, np.square(found - np.where(mask, y, 0.0)), 0.0).sum(1)  # (A, T)
        self.alpha_index_ = len(error) - 1 - error[::-1].argmin(0)
        return self

    def predict(self, X: Any) -> Float64[np.ndarray, "N ..."]:
        """Predictions at `alpha_index_`, (N, T), or (N,) if the targets were; float64.

        Raises:
            TaskError: several alpha of which none is chosen; else as in `predictions`.
        """
        self._check_fitted()
        if self.alpha_index_ is None:
            raise TaskError(
                f"{len(self.alpha_)} values of alpha were fitted and none is chosen; call choose(X_val, y_val), or "
                "give one alpha"
            )
        columns = np.arange(self.coef_.shape[2])
        coef = self.coef_[self.alpha_index_, :, columns].T[None]
        found = self._at(features_of(self, X, reset=False), coef, self.intercept_[self.alpha_index_, columns][None])[0]
        return np.asarray(found[:, 0] if self._flat else found)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R2 of `predict`, the mean over targets, as scikit-learn's regressors."""
        from sklearn.metrics import r2_score

        return float(r2_score(targets_of(y, "numbers"), self.predict(X), sample_weight=sample_weight))

    def _at(
        self, X: Float[np.ndarray, "N D"], coef: Float64[np.ndarray, "A D T"], intercept: Float64[np.ndarray, "A T"]
    ) -> Float64[np.ndarray, "A N T"]:
        check_finite(X)
        num_alpha, width, num_targets = coef.shape
        flat = coef.transpose(1, 0, 2).reshape(width, -1)
        result = np.empty((num_alpha, len(X), num_targets))
        for start in range(0, len(X), CHUNK):
            part = ((X[start : start + CHUNK] - self.mean_) / self.scale_) @ flat
            result[:, start : start + CHUNK] = part.reshape(-1, num_alpha, num_targets).transpose(1, 0, 2)
        return np.asarray(result + intercept[:, None])


def _moments(
    X: Float[np.ndarray, "N D"], weights: Float64[np.ndarray, " N"] | None
) -> tuple[Float64[np.ndarray, " D"], Float64[np.ndarray, " D"]]:
    return column_moments(X) if weights is None else weighted_moments(X, weights)


def _patterns(mask: Bool[np.ndarray, "N T"]) -> Iterator[tuple[Bool[np.ndarray, " N"], Integer[np.ndarray, " t"]]]:
    """(rows, numbers of the targets that are known for exactly these), in order of the first such target."""
    found: dict[bytes, list[int]] = {}
    for number, column in enumerate(np.packbits(mask, axis=0).T):
        found.setdefault(column.tobytes(), []).append(number)
    for columns in found.values():
        yield mask[:, columns[0]], np.array(columns)


@cache
def _blas() -> Any:
    """Handle on the threads of the BLAS libraries loaded by now, numpy's among them; looking for them takes a while."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
