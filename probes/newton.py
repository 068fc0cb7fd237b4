"""Small logistic problems by Newton's method in float64, many at once: every label, along the path of C.

A problem minimises 0.5 ||w||^2 + C * sum_i s_i * softplus(-+ (x_i w + b)). It is solved in whichever form has the
smaller Hessian: over the columns (`Columns`, w itself), or, with fewer rows than columns, over the rows (`Kernel`,
w = X'a, where the rows enter through their products XX' alone; the system I + D^1/2 XX' D^1/2 of Gaussian process
classification, Rasmussen and Williams 2006, algorithm 3.1, with an intercept). Both see the logits as a linear map of
their unknowns, so that a line search needs no second pass over the features.

Every problem starts on the line or parabola through solutions at neighbouring strengths: a few first ones in ascending
order, then those between them, all in one batch. One to three steps a problem take the place of a dozen.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from probes.workers import Workers

TOLERANCE = 1e-8  # gap to the optimum by Newton's own prediction, relative to the objective
MAX_STEPS = 100
MAX_CUTS = 40
NOISE = 1e-13  # relative rounding of an objective: a step inside it is no failure
STRIDE = 4  # strengths between those that are solved in ascending order
# A factor in float32 halves the time of a step; its error, condition * 6e-8, must stay a small part of the step.
SINGLE_CONDITION = 1e5
SINGLE_SIDE = 192
# A factor serves until a logit has moved this far: log p(1-p) changes no faster than the logit.
REUSE = 1.0
GROWTH = math.exp(REUSE)
HAND_OVER = 2e7  # operations from which a second thread is worth waking
STATE_BYTES = 1 << 28  # logits and the like of the problems solved at once


Scratch = dict[torch.dtype, tuple[Tensor, Tensor]]


@runtime_checkable
class System(Protocol):
    """Problems over the same rows: logits = unknowns @ map + intercept."""

    map: Tensor  # (n, N)
    operations: float  # multiplications per direction

    def scratch(self) -> Scratch:
        """Memory for `direction` of one thread: fresh pages cost as much as the numbers written there."""
        ...

    def norm(self, unknowns: Tensor, image: Tensor) -> Tensor:
        """||w||^2 (P,) for unknowns (P, n) and image = unknowns @ map (P, N)."""
        ...

    def gradient(self, unknowns: Tensor, residual: Tensor) -> Tensor:
        """What `slope` multiplies with: (P, n) or (P, N), for the residuals C s (p - y) (P, N)."""
        ...

    def slope(self, gradient: Tensor, step: Tensor, image: Tensor) -> Tensor:
        """Derivative of the objective (P,) along a step (P, n) with its image (P, N), intercept aside."""
        ...

    def factor(self, curvature: Tensor, scratch: Scratch) -> "Factor":
        """What `direction` needs of the Hessian of one problem, with the curvature (N,) of its rows."""
        ...

    def direction(self, unknowns: Tensor, gradient: Tensor, residual: Tensor, factor: "Factor") -> Tensor:
        """Newton step (n + 1,), intercept last, of one problem."""
        ...


@dataclass(frozen=True)
class Factor:
    """Cholesky factor; over the rows also the root of their curvature, and what an intercept of one answers."""

    lower: Tensor
    root: Tensor | None = None
    level: Tensor | None = None

    def solve(self, right: Tensor) -> Tensor:
        solved: Tensor = torch.cholesky_solve(right[:, None].to(self.lower.dtype), self.lower)[:, 0].double()
        return solved


@dataclass(frozen=True)
class Point:
    """Where problems stand: objective (P,), residual C s (p - y) and curvature C s p (1 - p) (P, N)."""

    objective: Tensor
    residual: Tensor
    curvature: Tensor

    def take(self, index: Tensor) -> "Point":
        return Point(self.objective[index], self.residual[index], self.curvature[index])


class Columns:
    """Unknowns are the weights of the columns."""

    def __init__(self, design: Tensor) -> None:
        """design (N, D), float64, centred."""
        self.design = torch.cat([design, torch.ones(len(design), 1, dtype=design.dtype)], 1)
        self.single = self.design.float() if self.design.shape[1] >= SINGLE_SIDE else None
        self.map = design.T.contiguous()
        self.squares = self.design.square().sum(1)
        self.operations = float(self.design.shape[0] * self.design.shape[1] ** 2)

    def scratch(self) -> Scratch:
        (rows, side), made = self.design.shape, {}
        for dtype in (torch.float32, torch.float64)[self.single is None :]:
            made[dtype] = (torch.empty(rows, side, dtype=dtype), torch.empty(side, side, dtype=dtype))
        return made

    def norm(self, unknowns: Tensor, image: Tensor) -> Tensor:
        return unknowns.square().sum(1)

    def gradient(self, unknowns: Tensor, residual: Tensor) -> Tensor:
        return torch.addmm(unknowns, residual, self.map.T)

    def slope(self, gradient: Tensor, step: Tensor, image: Tensor) -> Tensor:
        return (gradient * step).sum(1)

    def factor(self, curvature: Tensor, scratch: Scratch) -> Factor:
        design = self.design
        if self.single is not None and float(curvature @ self.squares) < SINGLE_CONDITION:
            design = self.single
        half, matrix = scratch[design.dtype]
        torch.mul(design, curvature.to(design.dtype).sqrt()[:, None], out=half)
        torch.mm(half.T, half, out=matrix)
        diagonal = matrix.diagonal()
        diagonal[:-1] += 1
        diagonal[-1].clamp_(min=1e-30)
        return Factor(_cholesky(matrix))

    def direction(self, unknowns: Tensor, gradient: Tensor, residual: Tensor, factor: Factor) -> Tensor:
        return -factor.solve(torch.cat([gradient, residual.sum()[None]]))


class Kernel:
    """Unknowns are the weights of the rows: w = X'a."""

    def __init__(self, products: Tensor) -> None:
        """products (N, N) of the centred rows, float64."""
        self.map = products
        self.single = products.float() if len(products) >= SINGLE_SIDE else None
        self.trace = products.diagonal().clone()
        self.operations = float(len(products) ** 3) / 3

    def scratch(self) -> Scratch:
        made = {}
        for dtype in (torch.float32, torch.float64)[self.single is None :]:
            made[dtype] = (torch.empty_like(self.map, dtype=dtype), torch.empty(0))
        return made

    def norm(self, unknowns: Tensor, image: Tensor) -> Tensor:
        return (unknowns * image).sum(1)

    def gradient(self, unknowns: Tensor, residual: Tensor) -> Tensor:
        return unknowns + residual

    def slope(self, gradient: Tensor, step: Tensor, image: Tensor) -> Tensor:
        return (gradient * image).sum(1)

    def factor(self, curvature: Tensor, scratch: Scratch) -> Factor:
        products = self.map
        if self.single is not None and float(curvature @ self.trace) < SINGLE_CONDITION:
            products = self.single
        root = curvature.sqrt().clamp_min(1e-150)
        scale = root.to(products.dtype)
        matrix = torch.mul(products, scale, out=scratch[products.dtype][0])
        matrix *= scale[:, None]
        matrix.diagonal().add_(1)
        lower = _cholesky(matrix)
        return Factor(lower, root, root * Factor(lower).solve(root))

    def direction(self, unknowns: Tensor, gradient: Tensor, residual: Tensor, factor: Factor) -> Tensor:
        # At the next point a = -residual - curvature * (change of logit), and a sums to zero. With the miss a +
        # residual, which the optimum has not: step = -miss + root * u - level * shift of the intercept, where
        # (I + root K root) u = root * K miss.
        assert factor.root is not None
        assert factor.level is not None
        bend = factor.root * factor.solve(factor.root * (self.map @ gradient))
        shift = (unknowns.sum() - gradient.sum() + bend.sum()) / factor.level.sum()
        return torch.cat([bend - gradient - factor.level * shift, shift[None]])


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower factor; rounding is met by a diagonal that grows until the factor exists."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    jitter = 1e-14
    while info:
        matrix = matrix + torch.diag(jitter * matrix.diagonal().clamp_min(1e-30))
        factor, info = torch.linalg.cholesky_ex(matrix)
        jitter *= 100
    lower: Tensor = factor
    return lower


@dataclass(frozen=True)
class Path:
    """Solutions: unknowns (L, num_C, n), intercept, objective and converged (L, num_C)."""

    unknowns: Tensor
    intercept: Tensor
    objective: Tensor
    converged: Tensor


def solve_path(system: System, y: Tensor, weights: Tensor, C: Tensor, workers: Workers) -> Path:
    """Every label at every strength; y and weights (L, N), y 0/1 with both classes; C (num_C,) ascending."""
    num_labels, num_C = len(y), len(C)
    prior = torch.log((weights * y).sum(1) / (weights * (1 - y)).sum(1))
    result = Path(
        torch.zeros(num_labels, num_C, len(system.map), dtype=torch.float64),
        prior[:, None].repeat(1, num_C),
        torch.full((num_labels, num_C), torch.inf, dtype=torch.float64),
        torch.zeros(num_labels, num_C, dtype=torch.bool),
    )
    first = list(range(0, num_C, STRIDE))
    levels = [[number] for number in first]
    between = [number for number in range(num_C) if number % STRIDE]
    levels += [[number for number in between if number % STRIDE == STRIDE // 2]]
    levels += [[number for number in between if number % STRIDE != STRIDE // 2]]
    side = len(system.map)
    at_once = max(1, STATE_BYTES // (8 * (8 * y.shape[1] + side * side) * num_labels))
    known: list[int] = []
    for level in levels:
        for start in range(0, len(level), at_once):
            numbers = level[start : start + at_once]
            _solve_batch(system, y, weights, C, result, numbers=numbers, known=known, workers=workers)
        known = sorted(known + level)
    return result


def _solve_batch(
    system: System,
    y: Tensor,
    weights: Tensor,
    C: Tensor,
    result: Path,
    *,
    numbers: list[int],
    known: list[int],
    workers: Workers,
) -> None:
    num_labels = len(y)
    theta = torch.cat([result.unknowns, result.intercept[..., None]], 2)
    start = torch.cat([start_of(theta, C.log(), number, known) for number in numbers])  # (numbers * L, n + 1)
    label = torch.arange(num_labels).repeat(len(numbers))
    column = torch.tensor(numbers).repeat_interleave(num_labels)
    scaled = weights[label] * C[column, None]
    found, objective, converged = newton(system, (1 - 2 * y)[label], scaled, start, workers)
    result.unknowns[label, column], result.intercept[label, column] = found[:, :-1], found[:, -1]
    result.objective[label, column], result.converged[label, column] = objective, converged


def start_of(theta: Tensor, position: Tensor, number: int, known: list[int]) -> Tensor:
    """Lagrange's polynomial through the nearest known solutions, two beside the grid's end and four inside."""
    if not known:
        return theta[:, number]
    inside = known[0] < number < known[-1]
    near = sorted(known, key=lambda other: abs(other - number))[: 4 if inside else 2]
    total = torch.zeros_like(theta[:, number])
    for one in near:
        factor = 1.0
        for other in near:
            if other != one:
                factor *= float((position[number] - position[other]) / (position[one] - position[other]))
        total += factor * theta[:, one]
    return total


def newton(
    system: System, sign: Tensor, weights: Tensor, theta: Tensor, workers: Workers
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise from theta (P, n + 1): (theta, objective (P,), converged (P,)).

    sign (P, N): -1 for positives, +1 for negatives; weights (P, N): C times row weight.
    """
    result, value = theta.clone(), torch.empty(len(theta), dtype=torch.float64)
    converged = torch.zeros(len(theta), dtype=torch.bool)
    place = torch.arange(len(theta))
    image = theta[:, :-1] @ system.map
    at = _evaluate(system, sign, weights, theta, image)
    anchor = torch.full_like(image, torch.inf)  # logits where the factors were taken
    factors: list[Factor | None] = [None] * len(theta)
    for _ in range(MAX_STEPS):
        gradient = system.gradient(theta[:, :-1], at.residual)
        logits = image + theta[:, -1:]
        moved_far = (logits - anchor).abs().amax(1) > REUSE
        anchor = torch.where(moved_far[:, None], logits, anchor)
        for number in moved_far.nonzero()[:, 0].tolist():
            factors[number] = None
        step = _directions(system, theta, gradient, at, factors, workers)
        moved = step[:, :-1] @ system.map
        slope = system.slope(gradient, step[:, :-1], moved) + step[:, -1] * at.residual.sum(1)
        # No row's curvature has changed by more than a factor exp(REUSE), nor has the Hessian.
        done = -slope / 2 * GROWTH <= TOLERANCE * at.objective
        length = torch.ones_like(slope)
        for cut in range(MAX_CUTS + 1):
            trial = theta + length[:, None] * step
            trial_image = image + length[:, None] * moved
            after = _evaluate(system, sign, weights, trial, trial_image)
            allowed = at.objective * (1 + NOISE) + 1e-4 * length * slope
            failed = ~(after.objective <= allowed)
            if not failed.any():
                break
            length = torch.where(failed, length * (0.5 if cut < MAX_CUTS - 1 else 0.0), length)
        stuck = failed & ~done
        theta, image, at = trial, trial_image, after
        result[place], value[place] = theta, at.objective
        converged[place] = done
        keep = (~done & ~stuck).nonzero()[:, 0]
        if not len(keep):
            break
        if len(keep) < len(place):
            place, theta, image, at = place[keep], theta[keep], image[keep], at.take(keep)
            sign, weights, anchor = sign[keep], weights[keep], anchor[keep]
            factors = [factors[number] for number in keep.tolist()]
    return result, value, converged


def _directions(
    system: System,
    theta: Tensor,
    gradient: Tensor,
    at: Point,
    factors: list[Factor | None],
    workers: Workers,
) -> Tensor:
    """Newton steps (P, n + 1); factors that are None are taken here, and kept in the list."""
    step = torch.empty_like(theta)

    def fill(run: slice) -> None:
        scratch: Scratch = {}
        for number in range(run.start, run.stop):
            factor = factors[number]
            if factor is None:
                scratch = scratch or system.scratch()
                factor = factors[number] = system.factor(at.curvature[number], scratch)
            step[number] = system.direction(theta[number, :-1], gradient[number], at.residual[number], factor)

    if factors.count(None) * system.operations < HAND_OVER:
        fill(slice(0, len(theta)))
    else:
        workers.share(fill, len(theta))
    return step


def _evaluate(system: System, sign: Tensor, weights: Tensor, theta: Tensor, image: Tensor) -> Point:
    margin = (image + theta[:, -1:]).mul_(sign)
    wrong = torch.sigmoid(margin)
    loss = (weights * softplus(margin)).sum(1)
    residual = weights * wrong
    curvature = residual * torch.sigmoid(-margin)
    return Point(loss + system.norm(theta[:, :-1], image) / 2, residual * sign, curvature)


def products(X: np.ndarray, workers: Workers) -> Tensor:
    """(N, N) products of the rows (N, D), float64."""
    rows = torch.from_numpy(X)
    return torch.cat(list(workers.map_blocks(lambda block: rows[block] @ rows.T, len(X), 512)))
