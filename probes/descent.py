"""Newton's steps for one label: each is followed to the best point of the plane of the step and the intercept.

With few positives the intercept alone is a start from which full steps go far beyond the optimum or stop short of it,
a factor of the Hessian each. A point of the plane costs a pass over the logits, and two or three find its best.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

MAX_STEPS = 60
MAX_CUTS = 25
MAX_TURNS = 8
ENOUGH = 1e-2  # of the gap that a step finds: what a turn in the plane must promise


@dataclass(frozen=True)
class State:
    """Where a problem stands: unknowns, intercept, logits, |w|^2, loss, residuals and curvature of the rows (N,)."""

    unknowns: Tensor
    b: float
    logits: Tensor
    square: float
    loss: float
    residual: Tensor
    curvature: Tensor


@dataclass(frozen=True)
class Step:
    """Direction of the unknowns and of the intercept.

    image (N,): change of the logits that the weights bring; along and square: <w, step> and |step|^2 of the weights;
    slope along the step; decrement g'H^-1 g.
    """

    unknowns: Tensor
    b: float
    image: Tensor
    along: float
    square: float
    slope: float
    decrement: float


class RowLosses:
    """Sum over the rows of weight (N,) * softplus(-+ logit), y (N,) 0 or 1."""

    def __init__(self, y: Tensor, weight: Tensor) -> None:
        self.weight = weight
        self.sign = (1 - 2 * y).to(weight.dtype)
        self.prior = float(torch.log((weight * y).sum() / (weight * (1 - y)).sum()))
        self.noise = 4 * torch.finfo(weight.dtype).eps

    def start(self, num_unknowns: int) -> State:
        """No weights, and the intercept that is best then."""
        unknowns = self.weight.new_zeros(num_unknowns)
        return self.at(unknowns, self.prior, torch.full_like(self.weight, self.prior), 0.0)

    def at(self, unknowns: Tensor, b: float, logits: Tensor, square: float) -> State:
        margin = self.sign * logits
        loss = float((self.weight * softplus(margin)).sum(dtype=torch.float64)) + square / 2
        wrong = self.weight * torch.sigmoid(margin)
        curvature = wrong * margin.neg_().sigmoid_()
        return State(unknowns, b, logits, square, loss, wrong.mul_(self.sign), curvature)

    def on(self, state: State, step: Step, length: float, shift: float) -> State:
        """The point of the plane at `length` steps, the intercept moved by `shift`; its unknowns are not."""
        logits = torch.add(state.logits, step.image, alpha=length).add_(shift)
        square = max(0.0, state.square + 2 * length * step.along + length * length * step.square)
        return self.at(state.unknowns, state.b + shift, logits, square)

    def descend(self, state: State, step_of: Callable[[State], Step], tolerance: float) -> tuple[State, bool]:
        """Steps until the gap before the last one is below `tolerance` of the loss; whether it came to that."""
        for _ in range(MAX_STEPS):
            step = step_of(state)
            last = step.decrement / 2 <= tolerance * state.loss
            if not step.slope < 0:
                return state, last
            length, shift = 1.0, step.b
            for _ in range(MAX_CUTS):
                new = self.on(state, step, length, shift)
                if new.loss <= state.loss * (1 + self.noise) + 1e-4 * length * step.slope:
                    break
                length, shift = length / 2, shift / 2
            else:
                return state, False
            if not last:
                new, length = self._improved(state, step, new, length)
            state = State(**{**vars(new), "unknowns": torch.add(state.unknowns, step.unknowns, alpha=length)})
            if last:
                return state, True
        return state, False

    def _improved(self, state: State, step: Step, best: State, length: float) -> tuple[State, float]:
        """Newton's steps in the plane, from a point of it: (its best, the length there)."""
        worth = ENOUGH * min(state.loss, step.decrement / 2)
        for _ in range(MAX_TURNS):
            bent = best.curvature * step.image
            of_length = float(best.residual @ step.image) + step.along + length * step.square
            of_shift = float(best.residual.sum())
            first, mixed, second = (
                float(bent @ step.image) + step.square,
                float(bent.sum()),
                float(best.curvature.sum()),
            )
            area = first * second - mixed * mixed
            if not area > 0:
                break
            longer = (mixed * of_shift - second * of_length) / area
            higher = (mixed * of_length - first * of_shift) / area
            if -(longer * of_length + higher * of_shift) / 2 < worth:
                break
            new = self.on(state, step, length + longer, best.b - state.b + higher)
            if not new.loss < best.loss:
                break
            best, length = new, length + longer
        return best, length
