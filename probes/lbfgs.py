"""Limited-memory BFGS for many problems in one batch, each with its own steps and its own preconditioner.

In the eigenbasis of the features the Hessian of a logistic problem is close to diag(mean p(1-p) * spread + ridge).
With that diagonal, renewed in every iteration, in the place of BFGS's scaled identity, a problem needs about ten
passes over the rows, whatever its strength. Nearly separable problems need a full Hessian there: `Factored`.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from probes.objectives import Evaluation, Objective, evaluate

MEMORY = 8  # pairs kept
ARMIJO = 1e-4


@runtime_checkable
class Preconditioner(Protocol):
    """An approximate Hessian of every problem in a batch."""

    def solve(self, gradient: Tensor, value: Evaluation) -> Tensor:
        """Inverse Hessian times gradient (P, K, d), at the point where `value` was taken."""
        ...

    def keep(self, index: Tensor) -> None:
        """Forget all but the problems at `index` (ascending)."""
        ...


def centred(weights: Tensor) -> Tensor:
    """Without the part that all classes of a softmax share (P, K, d): no loss depends on it, and the optimum has none.

    A preconditioner must leave it out, too, or it would predict almost no gap where only the ridge has curvature.
    """
    return weights if weights.shape[1] == 1 else weights - weights.mean(1, keepdim=True)


class Diagonal:
    """diag(mean p(1-p) * spread + ridge), or the Hessian's own diagonal where `value` holds it."""

    def __init__(self, objective: Objective, which: Tensor) -> None:
        self.spread, self.ridge = objective.spread[which], objective.ridge[which].clone()

    def solve(self, gradient: Tensor, value: Evaluation) -> Tensor:
        h = value.curvature * self.spread[:, None] if value.curvature.shape[2] == 1 else value.curvature.clone()
        h[:, :, :-1] += self.ridge[:, None, None]
        # An intercept whose every row is certain has no curvature, and then no gradient.
        return centred(centred(gradient) / h.clamp_min_(1e-30).to(gradient.dtype))

    def keep(self, index: Tensor) -> None:
        self.spread, self.ridge = self.spread[index], self.ridge[index]


class Factored:
    """Cholesky factors (F, Kd, Kd) of Hessians; problem p uses factor `of[p]`, `of` ascending.

    A factor taken at one strength serves its neighbours too: the Hessian changes mostly by the factor by which the
    mean curvature does (of separable data C p(1-p) hardly changes with C).
    """

    def __init__(self, factors: Tensor, of: Tensor, curvature: Tensor) -> None:
        """curvature: (F,) mean p(1-p) where the Hessians were taken."""
        self.factors, self.of, self.curvature = factors, of, curvature

    def solve(self, gradient: Tensor, value: Evaluation | None) -> Tensor:
        """As in `Preconditioner`; without a value, at the points where the Hessians were taken."""
        flat = gradient.flatten(1).to(self.factors.dtype)
        result = torch.empty_like(flat)
        used, counts = torch.unique_consecutive(self.of, return_counts=True)
        stop = 0
        for number, count in zip(used.tolist(), counts.tolist()):
            run, stop = slice(stop, stop + count), stop + count
            result[run] = torch.cholesky_solve(flat[run].T, self.factors[number]).T
        if value is not None:
            scale = self.curvature[self.of] / value.curvature.mean((1, 2)).clamp_min(1e-30)
            result *= scale[:, None]
        return centred(result.view_as(gradient).to(gradient.dtype))

    def keep(self, index: Tensor) -> None:
        self.of = self.of[index]


@dataclass(frozen=True)
class Solution:
    """Weights (P, K, d), loss (P,) and which problems reached the tolerance."""

    W: Tensor
    loss: Tensor
    converged: Tensor


def solve(
    objective: Objective,
    W: Tensor,
    which: Tensor,
    preconditioner: Preconditioner,
    *,
    tolerance: float,
    max_iterations: int,
    max_backtracks: int,
) -> Solution:
    """Minimise the problems `which` from W (P, K, d), centred over classes, in W's precision.

    A problem is converged when the gap to its optimum is below `tolerance` times its loss, by the prediction of the
    preconditioner, g'H^-1 g / 2, and by that of the BFGS direction, which has learnt where the preconditioner is too
    steep. A problem whose step still fails after `max_backtracks` cuts is given up; so is the rest at `max_iterations`.
    """
    result = Solution(
        W.clone(), torch.zeros(len(which), dtype=torch.float64), torch.zeros(len(which), dtype=torch.bool)
    )
    batch = _Batch(objective, W, which, preconditioner)
    for iteration in range(max_iterations + 1):
        direction, slope, plain = batch.direction()
        done = torch.maximum(-slope, plain) / 2 <= tolerance * batch.value.loss
        result.W[batch.place], result.loss[batch.place] = batch.W, batch.value.loss
        result.converged[batch.place] = done
        keep = (~done & ~batch.stuck).nonzero()[:, 0]
        if not len(keep) or iteration == max_iterations:
            break
        if len(keep) < len(done):
            batch.shrink(keep)
            direction, slope = direction[keep], slope[keep]
        batch.step(direction, slope, max_backtracks)
    return result


class _Batch:
    """The problems still running: weights, values and the pairs (step, change of gradient, 1 / product) of each."""

    def __init__(self, objective: Objective, W: Tensor, which: Tensor, preconditioner: Preconditioner) -> None:
        self.objective, self.W, self.which, self.preconditioner = objective, W, which, preconditioner
        self.place = torch.arange(len(which))
        self.value = evaluate(objective, W, which)
        self.stuck = torch.zeros(len(which), dtype=torch.bool)
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        # Rounding of the logits leaves this much noise in a loss, relatively; a step inside it is no failure.
        self.noise = 2 * torch.finfo(W.dtype).eps

    def shrink(self, keep: Tensor) -> None:
        self.W, self.which, self.place = self.W[keep], self.which[keep], self.place[keep]
        self.value, self.stuck = self.value.take(keep), self.stuck[keep]
        self.pairs = [(s[keep], y[keep], rho[keep]) for s, y, rho in self.pairs]
        self.preconditioner.keep(keep)

    def direction(self) -> tuple[Tensor, Tensor, Tensor]:
        """(BFGS direction, its slope, g'H^-1 g): the two-loop recursion with the preconditioner in the middle."""
        gradient = self.value.gradient
        newton = self.preconditioner.solve(gradient, self.value)
        plain = _dot(gradient, newton).double()
        if not self.pairs:
            return -newton, -plain, plain
        q = gradient.clone()
        factors = []
        for s, y, rho in reversed(self.pairs):
            factor = rho * _dot(s, q)
            q.addcmul_(factor[:, None, None], y, value=-1)
            factors.append(factor)
        q = self.preconditioner.solve(q, self.value)
        for (s, y, rho), factor in zip(self.pairs, reversed(factors)):
            q.addcmul_((factor - rho * _dot(y, q))[:, None, None], s)
        direction = q.neg_()
        slope = _dot(gradient, direction).double()
        uphill = ~(slope < 0)
        if uphill.any():  # rounding spoilt the pairs of these problems
            self.pairs = [(s, y, torch.where(uphill, 0, rho)) for s, y, rho in self.pairs]
            direction = torch.where(uphill[:, None, None], -newton, direction)
            slope = torch.where(uphill, -plain, slope)
        return direction, slope, plain

    def step(self, direction: Tensor, slope: Tensor, max_backtracks: int) -> None:
        """Backtracking line search from step one, each problem on its own; then remember the pair."""
        length = torch.ones_like(slope)
        W = self.W + direction
        value = evaluate(self.objective, W, self.which)
        for attempt in range(max_backtracks + 1):
            allowed = self.value.loss + ARMIJO * length * slope + self.noise * self.value.loss
            failed = (~(value.loss <= allowed)).nonzero()[:, 0]
            if not len(failed) or attempt == max_backtracks:
                break
            rise, step = value.loss[failed] - self.value.loss[failed], length[failed]
            lowest = -slope[failed] * step.square() / (2 * (rise - slope[failed] * step))  # of the parabola
            length[failed] = torch.minimum(torch.maximum(torch.nan_to_num(lowest), 0.1 * step), 0.5 * step)
            W[failed] = self.W[failed] + length[failed].to(W.dtype)[:, None, None] * direction[failed]
            value.put(failed, evaluate(self.objective, W[failed], self.which[failed]))
        W[failed], self.stuck[failed] = self.W[failed], True
        value.put(failed, self.value.take(failed))
        s, y = W - self.W, value.gradient - self.value.gradient
        product = _dot(s, y)
        sound = product > 1e-10 * (_dot(s, s) * _dot(y, y)).sqrt()
        self.pairs.append((s, y, torch.where(sound, 1 / product, 0.0)))
        del self.pairs[:-MEMORY]
        self.W, self.value = W, value


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2))
