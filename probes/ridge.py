"""Ridge regression, exact, for all targets and all strengths from one eigendecomposition in float64.

    sum_i (y_i - x_i w - b)^2 + alpha * ||w||^2,   intercept not penalised,

as scikit-learn's `Ridge`. With the axes V and squares s of the centred rows, w = V (V'X'y / (s + alpha)); with fewer
rows than columns the products of rows are decomposed instead.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer, Real

from featstore.errors import ConfigError, TaskError
from probes.checks import CHUNK, check_finite, check_width

DEFAULT_ALPHA = tuple(float(value) for value in 10 ** np.linspace(-2, 8, 41))


def column_moments(X: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """(mean, standard deviation) of the columns in float64; the deviation of constant columns is 1."""
    chunks = [slice(start, start + CHUNK) for start in range(0, len(X), CHUNK)]
    mean = sum((X[rows].sum(0, dtype=np.float64) for rows in chunks), np.zeros(X.shape[1])) / len(X)
    square = [np.square(X[rows].astype(np.float64) - mean).sum(0) for rows in chunks]
    variance = sum(square, np.zeros(X.shape[1])) / len(X)
    # Rounding of the mean alone, as scikit-learn's StandardScaler bounds it.
    eps = np.finfo(np.float64).eps
    constant = variance <= len(X) * eps * variance + np.square(len(X) * mean * eps)
    return mean, np.where(constant, 1.0, np.sqrt(variance))


class RidgeProbe:
    """Ridge regression on frozen features, scikit-learn style.

    After `fit`, with A strengths and T targets: `alpha_` (A,); `coef_` (A, D, T) and `intercept_` (A, T) for the
    features (x - mean_) / scale_; without `standardize` scale_ is 1.
    """

    def __init__(
        self, *, alpha: float | Sequence[float] | Float[np.ndarray, " A"] = DEFAULT_ALPHA, standardize: bool = True
    ) -> None:
        """alpha: strength(s) of the penalty, > 0, ascending.

        Raises:
            ConfigError: strengths that are not positive and ascending.
        """
        self.alpha, self.standardize = alpha, standardize
        self.alpha_ = np.atleast_1d(np.asarray(alpha, dtype=np.float64))
        if not len(self.alpha_) or not (self.alpha_ > 0).all() or not (np.diff(self.alpha_) > 0).all():
            raise ConfigError(f"alpha must be positive and ascending, got {alpha}")

    def fit(
        self, X: Float[np.ndarray, "N D"], y: Real[np.ndarray, "..."], mask: Bool[np.ndarray, "..."] | None = None
    ) -> "RidgeProbe":
        """Fit every target of `y` (N, T) at every alpha on the rows where its mask (N, T) is true.

        Rows without any valid target are left out altogether, also of mean and deviation; they may hold NaN.

        Raises:
            TaskError: arrays that do not fit together, values that are not finite, a target without any row.
        """
        mask = np.ones(y.shape, dtype=bool) if mask is None else mask
        if y.shape != mask.shape or len(y) != len(X):
            raise TaskError(f"targets and mask of {len(X)} rows differ in shape; got {y.shape} and {mask.shape}")
        if not mask.any(0).all():
            raise TaskError(f"a target has no row to fit on among {len(X)}; check the masks and the training split")
        if not np.isfinite(y[mask]).all():
            raise TaskError("targets must be finite numbers; mask other rows out")
        used = mask.any(1)
        X, y, mask = X[used], y[used].astype(np.float64), mask[used]
        check_finite(X)
        self.mean_, deviation = column_moments(X)
        self.scale_ = deviation if self.standardize else np.ones_like(deviation)
        num_alpha, width, num_targets = len(self.alpha_), X.shape[1], y.shape[1]
        self.coef_ = np.zeros((num_alpha, width, num_targets))
        self.intercept_ = np.zeros((num_alpha, num_targets))
        patterns, pattern = np.unique(mask, axis=1, return_inverse=True)
        for number in range(patterns.shape[1]):  # targets that are known for the same rows share one decomposition
            rows, columns = patterns[:, number], np.flatnonzero(pattern.reshape(-1) == number)
            self._solve(X[rows], y[rows][:, columns], columns)
        return self

    def _solve(
        self, X: Float[np.ndarray, "N D"], y: Float[np.ndarray, "N t"], columns: Integer[np.ndarray, " t"]
    ) -> None:
        level = y.mean(0)
        centre = (column_moments(X)[0] - self.mean_) / self.scale_
        few = len(X) <= X.shape[1]

        def part(rows: slice) -> Float[np.ndarray, "n D"]:
            return np.asarray((X[rows] - self.mean_) / self.scale_ - centre)  # float64

        if few:
            scaled = part(slice(None))
            gram, right = scaled @ scaled.T, y - level
        else:
            gram, right = np.zeros((X.shape[1], X.shape[1])), np.zeros((X.shape[1], y.shape[1]))
            for start in range(0, len(X), CHUNK):
                rows = part(slice(start, start + CHUNK))
                gram += rows.T @ rows
                right += rows.T @ (y[start : start + CHUNK] - level)
        squares, axes = np.linalg.eigh(gram)
        turned = axes.T @ right
        for number, alpha in enumerate(self.alpha_):
            weights = axes @ (turned / (np.maximum(squares, 0) + alpha)[:, None])
            self.coef_[number][:, columns] = scaled.T @ weights if few else weights
        self.intercept_[:, columns] = level - centre @ self.coef_[:, :, columns]

    def predict(self, X: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "A N T"]:
        """Predictions at every alpha, float64.

        Raises:
            TaskError: not fitted, another width than in `fit`, or features that are not finite.
        """
        if not hasattr(self, "coef_"):
            raise TaskError("this probe is not fitted yet; call fit first")
        check_width(X, self.coef_.shape[1])
        check_finite(X)
        num_alpha, width, num_targets = self.coef_.shape
        flat = self.coef_.transpose(1, 0, 2).reshape(width, -1)
        result = np.empty((num_alpha, len(X), num_targets))
        for start in range(0, len(X), CHUNK):
            part = ((X[start : start + CHUNK] - self.mean_) / self.scale_) @ flat
            result[:, start : start + CHUNK] = part.reshape(-1, num_alpha, num_targets).transpose(1, 0, 2)
        return np.asarray(result + self.intercept_[:, None])
