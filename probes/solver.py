"""All problems of an objective, from a start to the optimum: the easy many in one batch, then the hard few."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.eigenbasis import eigenbasis, moments, scaled
from probes.lbfgs import Diagonal, solve
from probes.newton import STRIDE, Columns, Kernel, System, products, solve_path
from probes.objectives import BinaryProblems, Objective, Rows, SoftmaxProblems
from probes.polish import certify, polish
from probes.single import is_cheaper, solve_singles
from probes.softmax import fits, follow
from probes.workers import Workers

# Gap to the optimum that a solved problem may have by its own estimate, relative to its loss.
TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-8}
EASY_ITERATIONS = 16
EASY_BACKTRACKS = 4
SLACK = 1e8  # multiplications that the calls of the other way cost
SMALL = 1e8  # rows * problems * width up to which everything runs in float64
# Rows * classes * width up to which a softmax needs no batch: its calls take longer than its passes. Thrice that where
# rows are few for the weights, and most strengths so weak that the batch would leave them over.
DIRECT = 5e5
FEW_ROWS = 10  # rows per weight
BATCH_BYTES = 1 << 30  # state of the problems solved at once


@dataclass(frozen=True)
class Solved:
    """Results per problem, reshaped to (num_C, families)."""

    W: Float[np.ndarray, "C F K d"]
    objective: Float[np.ndarray, "C F"]
    converged: Bool[np.ndarray, "C F"]


@dataclass(frozen=True)
class Fitted:
    """Weights for the features (x - mean) / scale, and how far they got; F = 1 for a softmax, else L."""

    mean: Float[np.ndarray, " D"]
    scale: Float[np.ndarray, " D"]
    coef: Float[np.ndarray, "C D L"]
    intercept: Float[np.ndarray, "C L"]
    objective: Float[np.ndarray, "C F"]
    converged: Bool[np.ndarray, "C F"]


def _costs(num_rows: int, width: int, num_labels: int, num_C: int) -> tuple[float, float]:
    """Rough count of multiplications: every problem by its own Newton steps, and all of them together.

    A factor per problem and step against one eigenbasis and some passes. The figures are measured: a problem takes
    two to three factors beside solved neighbours and six without; passes and Hessians of hard problems make 120.
    """
    side = min(num_rows, width)
    factor = num_rows**3 / 3 if num_rows <= width else num_rows * width**2
    problems = num_labels * num_C
    newton = problems * (2.5 if num_C > STRIDE else 6) * factor
    together = num_rows * width * side + 20 * side**3 + 120 * problems * num_rows * side
    return float(newton), float(together + SLACK)


def newton_is_cheaper(num_rows: int, width: int, num_labels: int, num_C: int) -> bool:
    """Whether every problem is solved by its own Newton steps with a factored Hessian."""
    newton, together = _costs(num_rows, width, num_labels, num_C)
    return newton <= together


def solve_binary(
    X: Float[np.ndarray, "N D"], y: Tensor, weights: Tensor, C: Tensor, workers: Workers, *, standardize: bool
) -> Fitted:
    """Every label at every strength; y and weights (L, N) float64, y 0/1 with both classes; C ascending."""
    num_labels, num_C = len(y), len(C)
    rows, width = X.shape
    if num_C == 1 and num_labels and is_cheaper(rows, width, num_labels, min(_costs(rows, width, num_labels, 1))):
        found = solve_singles(X, y, weights, float(C[0]), workers, standardize=standardize)
        if found is not None:
            return Fitted(
                found.mean,
                found.scale,
                found.coef[None],
                found.intercept[None],
                found.objective[None],
                np.ones((1, num_labels), dtype=bool),
            )
    if not num_labels or newton_is_cheaper(len(X), X.shape[1], num_labels, num_C):
        return _solve_newton(X, y, weights, C, workers, standardize=standardize)
    basis = eigenbasis(X, workers, standardize=standardize)
    problems = BinaryProblems(Rows(basis.design, workers), y, weights, C)
    start = torch.zeros(num_labels, num_C, 1, problems.rows.width, dtype=torch.float64)
    start[..., -1] = torch.log((weights * y).sum(1) / (weights * (1 - y)).sum(1))[:, None, None]
    solved = minimise(problems, start.view(-1, 1, problems.rows.width))
    coef = basis.rotation @ solved.W[:, :, 0, :-1].transpose(0, 2, 1)
    return Fitted(basis.mean, basis.scale, coef, solved.W[:, :, 0, -1], solved.objective, solved.converged)


def _solve_newton(
    X: Float[np.ndarray, "N D"], y: Tensor, weights: Tensor, C: Tensor, workers: Workers, *, standardize: bool
) -> Fitted:
    mean, deviation = moments(X)
    scale = deviation if standardize else np.ones_like(mean)
    rows = scaled(X, mean, scale)
    kernel = len(X) <= X.shape[1]
    system: System = Kernel(products(rows, workers)) if kernel else Columns(torch.from_numpy(rows))
    path = solve_path(system, y, weights, C, workers)
    flat = path.unknowns.flatten(0, 1)
    coef = ((flat @ torch.from_numpy(rows)) if kernel else flat).view(len(y), len(C), -1)
    return Fitted(
        mean,
        scale,
        coef.permute(1, 2, 0).numpy(),
        path.intercept.T.numpy(),
        path.objective.T.numpy(),
        path.converged.T.numpy(),
    )


def solve_softmax(
    X: Float[np.ndarray, "N D"], y: Tensor, weights: Tensor, C: Tensor, workers: Workers, *, standardize: bool
) -> Fitted:
    """One softmax at every strength; y (N,) numbers of classes that all have rows; weights (N,) float64."""
    basis = eigenbasis(X, workers, standardize=standardize)
    rows, num_C = Rows(basis.design, workers), len(C)
    prior = torch.log(torch.bincount(y, weights))
    if len(prior) == 1:
        shape = (num_C, X.shape[1], 1)
        never = np.zeros((num_C, 1), dtype=bool)
        return Fitted(
            basis.mean, basis.scale, np.zeros(shape), np.zeros((num_C, 1)), np.full((num_C, 1), np.nan), never
        )
    start = torch.zeros(num_C, len(prior), rows.width, dtype=torch.float64)
    start[:, :, -1] = prior - prior.mean()
    solved = minimise(SoftmaxProblems(rows, y, weights, C, len(prior)), start)
    W = solved.W[:, 0]
    coef = basis.rotation @ W[:, :, :-1].transpose(0, 2, 1)
    return Fitted(basis.mean, basis.scale, coef, W[:, :, -1], solved.objective, solved.converged)


def minimise(objective: Objective, start: Tensor) -> Solved:
    """Minimise all problems of an objective from `start` (problems, K, d), float64, centred over classes."""
    num_problems, heads, width = start.shape
    W, loss = start.clone(), torch.zeros(num_problems, dtype=torch.float64)
    converged = torch.zeros(num_problems, dtype=torch.bool)
    num_rows, side = len(objective.rows), heads * width
    alone = isinstance(objective, SoftmaxProblems) and fits(objective)
    if not alone or num_rows * side > DIRECT * (3 if num_rows < FEW_ROWS * side else 1):
        _solve_easy(objective, W, loss, converged)
    if isinstance(objective, SoftmaxProblems) and alone:
        follow(objective, W, loss, converged)
    else:
        polish(objective, W, loss, converged, tolerance=TOLERANCE[torch.float64])
    num_C = len(objective.C)
    return Solved(
        W.view(-1, num_C, heads, width).transpose(0, 1).numpy(),
        (loss / objective.ridge).view(-1, num_C).T.numpy(),
        converged.view(-1, num_C).T.numpy(),
    )


def _solve_easy(objective: Objective, W: Tensor, loss: Tensor, converged: Tensor) -> None:
    """Batched L-BFGS as far as it goes; W (problems, K, d), loss and converged (problems,) are changed in place."""
    num_problems, heads, width = W.shape
    exact = len(objective.rows) * num_problems * heads * width <= SMALL
    at_once = max(1, BATCH_BYTES // (22 * 8 * heads * width))
    for first in range(0, num_problems, at_once):
        which = torch.arange(first, min(first + at_once, num_problems))
        begin = W[which] if exact else W[which].float()
        result = solve(
            objective,
            begin,
            which,
            Diagonal(objective, which),
            tolerance=TOLERANCE[begin.dtype],
            max_iterations=EASY_ITERATIONS,
            max_backtracks=EASY_BACKTRACKS,
        )
        W[which] = result.W.double()
        loss[which], converged[which] = result.loss, result.converged
        done = which[result.converged]
        if len(done):
            # What float32 has solved it can also certify: the gradient's rounding is far below what is asked of it.
            loss[done], converged[done] = certify(objective, W[done].to(begin.dtype), done)
