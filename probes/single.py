"""One strength, few labels: Newton's method with conjugate gradients, the features read a few dozen times in all.

A factor of the Hessian, or the features' eigenbasis, costs more than a single fit may. Few columns are solved by dense
steps, few rows through their products (`probes.dual`). Otherwise the leading directions of the features (`Leading`, a
random sketch; Halko, Martinsson and Tropp 2011) are found once. In them alone a problem is solved first, by dense
Newton steps; from there the steps of the whole problem are found by conjugate gradients, which the same directions
precondition: exact inside, the mean curvature outside. The gap to the optimum is predicted by Newton's decrement.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.descent import RowLosses, State, Step
from probes.dual import DualProblem
from probes.eigenbasis import CACHED, moments
from probes.workers import Workers

DENSE = 128  # columns up to which dense steps solve the whole problem
ROWS = 448  # rows up to which it is solved through their products
DUAL_PRODUCTS = 200  # with the products of the rows in a fit; half of them, and what each costs beside them
RANK = 64
SAMPLE = 2048  # rows in which the leading directions are looked for
SINGLE_CURVATURE = 1e6  # trace of the Hessian's largest part up to which float32 is enough
EXACT_NUMBERS = 1 << 17  # features up to which float64 costs nothing
HAND_OVER = 1 << 20  # features that are worth waking another thread for
ROUGH = 1e-2  # gap, relative to the loss, at which the whole problem takes over from the leading directions
BEFORE_LAST = 2e-5  # gap before the last step, which squares it
EXACT = 6e-8  # gap that conjugate gradients may leave
PASSES = 40  # of the features in a fit, about
MAX_PRODUCTS = 300
NEGLIGIBLE = 1e-2  # rows whose curvature is below this part of the mean are left out of products with the Hessian
FEW = 0.6  # share of rows below which copying the others pays
SEED = 0


@dataclass(frozen=True)
class Singles:
    """Weights for the features (x - mean) / scale of L labels, what they cost and whether they are the optimum."""

    mean: Float[np.ndarray, " D"]
    scale: Float[np.ndarray, " D"]
    coef: Float[np.ndarray, "D L"]
    intercept: Float[np.ndarray, " L"]
    objective: Float[np.ndarray, " L"]


class Leading:
    """T (N, r) = Z V for orthonormal V (D, r), the leading directions of Z; few columns are all their own."""

    def __init__(self, Z: Tensor) -> None:
        num_rows, width = Z.shape
        self.V: Tensor | None = None
        if width <= DENSE:
            self.T = Z
            return
        random = torch.Generator().manual_seed(SEED)
        part = Z if num_rows <= SAMPLE else Z[torch.randperm(num_rows, generator=random)[:SAMPLE]]
        mixed = torch.rand(RANK, len(part), generator=random, dtype=Z.dtype).sub_(0.5) @ part
        self.V = torch.linalg.qr(part.T @ (part @ torch.linalg.qr(mixed.T).Q)).Q
        self.T = Z @ self.V
        length = torch.linalg.vector_norm(Z, dim=1).square_()
        self.outside = (length - torch.linalg.vector_norm(self.T, dim=1).square_()).clamp_min_(0)


def _few_rows(num_rows: int, width: int) -> bool:
    return num_rows <= ROWS and width > DENSE


def is_cheaper(num_rows: int, width: int, num_labels: int, other: float) -> bool:
    """Whether single fits take fewer multiplications than `other` ways; theirs wait for memory, four times as long."""
    if min(num_rows, width) <= DENSE:
        return True
    if _few_rows(num_rows, width):
        return num_labels * DUAL_PRODUCTS * num_rows**2 <= other
    return num_labels * 4 * PASSES * 2 * num_rows * width <= other


def solve_singles(
    X: Float[np.ndarray, "N D"], y: Tensor, weights: Tensor, C: float, workers: Workers, *, standardize: bool
) -> Singles | None:
    """Every label at one strength; y and weights (L, N) float64, y 0/1 with both classes.

    None where a problem does not reach its optimum this way.

    Raises:
        TaskError: a value is NaN or infinite.
    """
    mean, deviation = moments(X)
    scale = deviation if standardize else np.ones_like(mean)
    scaled_weights = weights * C
    spread = float(np.square(deviation).mean() / np.square(scale).mean())  # mean square of what the problem sees
    few = _few_rows(*X.shape)
    fine = few or X.size <= EXACT_NUMBERS or float(scaled_weights.sum(1).max()) / 4 * spread > SINGLE_CURVATURE
    Z = _centred(X, mean, scale, np.float64 if fine else np.float32)
    problem = DualProblem(Z, workers) if few else _Columns(Z, workers)
    coef, intercept, objective = np.empty((X.shape[1], len(y))), np.empty(len(y)), np.empty(len(y))
    for label in range(len(y)):
        found = problem.solve(y[label], scaled_weights[label])
        if found is None:
            return None
        w, intercept[label], loss = found
        coef[:, label] = w.numpy()
        objective[label] = loss + float(coef[:, label] @ coef[:, label]) / 2
    return Singles(mean, scale, coef, intercept, objective)


def _centred(X: np.ndarray, mean: np.ndarray, scale: np.ndarray, dtype: type[np.floating[Any]]) -> Tensor:
    """(X - mean) / scale; what rounding leaves of a mean, the intercept absorbs."""
    num_rows, width = X.shape
    # In the features' own precision: a subtraction of near numbers has no rounding to speak of.
    working = np.promote_types(X.dtype, dtype)
    result = np.empty(X.shape, dtype)
    shift, factor = mean.astype(working), (1 / scale).astype(result.dtype)
    step = max(1, CACHED // max(1, width))
    for first in range(0, num_rows, step):
        part = result[first : first + step]
        np.subtract(X[first : first + step], shift, out=part, casting="same_kind")
        part *= factor
    return torch.from_numpy(result)


class _Columns:
    """0.5 |w|^2 + the rows' losses, over the rows of Z (N, D)."""

    def __init__(self, Z: Tensor, workers: Workers) -> None:
        self.Z, self.leading, self.workers = Z, Leading(Z), workers

    def solve(self, y: Tensor, weight: Tensor) -> tuple[Tensor, float, float] | None:
        """(weights (D,), intercept, the rows' loss)."""
        T, V = self.leading.T, self.leading.V
        losses = RowLosses(y, weight.to(T.dtype))
        state, reached = losses.descend(
            losses.start(T.shape[1]), lambda now: self._dense_step(T, now), BEFORE_LAST if V is None else ROUGH
        )
        if V is not None:
            inside = replace(state, unknowns=V @ state.unknowns)
            state, reached = losses.descend(inside, self._sparse_step, BEFORE_LAST)
        return (state.unknowns, state.b, state.loss - state.square / 2) if reached else None

    def _dense_step(self, T: Tensor, state: State) -> Step:
        gradient, of_b = state.unknowns + T.T @ state.residual, float(state.residual.sum())
        total = max(float(state.curvature.sum()), 1e-30)
        weighted = T * state.curvature[:, None]
        mean = weighted.sum(0) / total
        # The intercept is eliminated: what is left of the Hessian is that of rows centred by their curvature.
        factor = _inner(T, weighted, mean, total)
        reduced = gradient - mean * of_b
        w = -torch.cholesky_solve(reduced[:, None], factor)[:, 0]
        b = -of_b / total - float(mean @ w)
        slope, decrement = float(gradient @ w) + of_b * b, of_b * of_b / total - float(reduced @ w)
        return Step(w, b, T @ w, float(state.unknowns @ w), float(w @ w), slope, decrement)

    def _sparse_step(self, state: State) -> Step:
        """Conjugate gradients on the rows that have curvature."""
        Z, T, outside, s = self.Z, self.leading.T, self.leading.outside, state.curvature
        V = self.leading.V
        assert V is not None
        gradient, of_b = state.unknowns + self._sum(Z, state.residual), float(state.residual.sum())
        active = (s > NEGLIGIBLE * s.mean()).nonzero()[:, 0]
        if len(active) < FEW * len(s):
            Z, T, outside, s = (part.index_select(0, active) for part in (Z, T, outside, s))
        total = max(float(s.sum()), 1e-30)
        mean = self._sum(Z, s) / total
        weighted = T * s[:, None]
        factor = _inner(T, weighted, weighted.sum(0) / total, total)
        around = 1 + float(s @ outside) / max(1, min(Z.shape[1], len(s)) - RANK)

        def precondition(x: Tensor) -> Tensor:
            inside = V.T @ x
            solved = torch.cholesky_solve(inside[:, None], factor)[:, 0]
            return x / around + V @ (solved - inside / around)

        def multiply(x: Tensor) -> Tensor:
            level = mean @ x
            return x + self._sums(Z, lambda rows: s[rows] * (Z[rows] @ x - level))

        reduced = gradient - mean * of_b
        w, energy = _conjugate_gradients(multiply, precondition, -reduced, state.loss)
        b = -of_b / total - float(mean @ w)
        slope, decrement = float(gradient @ w) + of_b * b, energy + of_b * of_b / total
        return Step(w, b, self._times(w), float(state.unknowns @ w), float(w @ w), slope, decrement)

    def _times(self, w: Tensor) -> Tensor:
        result = torch.empty(len(self.Z), dtype=w.dtype)

        def fill(rows: slice) -> None:
            torch.mv(self.Z[rows], w, out=result[rows])

        for _ in self.workers.map_blocks(fill, len(result), _piece(self.Z)):
            pass
        return result

    def _sum(self, Z: Tensor, factor: Tensor) -> Tensor:
        return self._sums(Z, lambda rows: factor[rows])

    def _sums(self, Z: Tensor, factor: Callable[[slice], Tensor]) -> Tensor:
        """Sum of the rows, each times its factor."""
        if _piece(Z) == len(Z):
            return Z.T @ factor(slice(None))
        total = Z.new_zeros(Z.shape[1])
        for part in self.workers.map_blocks(lambda rows: Z[rows].T @ factor(rows), len(Z), _piece(Z)):
            total += part
        return total


def _piece(Z: Tensor) -> int:
    """Rows that a thread takes at once: the same for any number of threads, so that sums are, too."""
    return -(-len(Z) // (1 << max(0, (Z.numel() // HAND_OVER).bit_length() - 1)))


def _inner(T: Tensor, weighted: Tensor, mean: Tensor, total: float) -> Tensor:
    """Factor of I + T'ST - total * mean mean'."""
    matrix = T.T @ weighted
    matrix.addr_(mean, mean, alpha=-total)
    matrix.diagonal().add_(1)
    factor, info = torch.linalg.cholesky_ex(matrix)
    jitter = torch.finfo(T.dtype).eps
    while info:
        jitter *= 10
        matrix.diagonal().add_(jitter * matrix.diagonal().max())
        factor, info = torch.linalg.cholesky_ex(matrix)
    lower: Tensor = factor
    return lower


def _conjugate_gradients(
    multiply: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], right: Tensor, loss: float
) -> tuple[Tensor, float]:
    """(x with A x = right, roughly while far from the optimum; energy x'A x)."""
    x, left = torch.zeros_like(right), right.clone()
    z = precondition(left)
    p, product = z.clone(), float(left @ z)
    first, energy = product, 0.0
    # Eisenstat and Walker 1996: the step need not be more exact than Newton's model is.
    enough = max(min(0.01, first / max(loss, 1e-300)) * first, EXACT * loss)
    for _ in range(MAX_PRODUCTS):
        Ap = multiply(p)
        length = product / max(float(p @ Ap), 1e-300)
        x.add_(p, alpha=length)
        left.sub_(Ap, alpha=length)
        energy += length * product
        z = precondition(left)
        after = float(left @ z)
        if after <= enough:
            break
        p.mul_(after / product).add_(z)
        product = after
    return x, energy
