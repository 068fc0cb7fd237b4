"""Few rows, one label: w = Z'a, and the products K = ZZ' of the rows, which a core keeps to itself, are all it takes.

A step is found by conjugate gradients on the weights, a product with K (N, N) each, and only as exactly as Newton's
model is: of the problems with a weak penalty it would take too many, and theirs come from a factor (`newton.Kernel`).
"""

import numpy as np
import torch
from torch import Tensor

from probes.descent import RowLosses, State, Step
from probes.newton import Kernel
from probes.workers import Workers

BEFORE_LAST = 2e-5  # gap before the last step, which squares it
EXACT = 1e-7  # gap, by its upper bound, that the last step may leave
FORCING = 0.1  # share of a step's energy that the last product may still add (Dembo, Eisenstat and Steihaug 1982)
LEAST_PRODUCTS = 16  # in a step before a factor is tried; it costs about as much,
ROWS_A_PRODUCT = 8  # or, of many rows, as much as a product for every eight of them
SHARED = 1 << 28  # multiplications of the rows' products from which another thread is woken


class DualProblem:
    """0.5 |w|^2 + the rows' losses, over the rows of Z (N, D), float64."""

    def __init__(self, Z: Tensor, workers: Workers) -> None:
        self.Z, self.products = Z, _products(Z, workers)
        self.system: Kernel | None = None

    def solve(self, y: Tensor, weight: Tensor) -> tuple[Tensor, float, float] | None:
        """(weights (D,), intercept, the rows' loss); None where the optimum is not reached."""
        losses = RowLosses(y, weight)
        self.system, self.before = None, 1.0
        state, reached = losses.descend(losses.start(len(y)), self._step, BEFORE_LAST)
        return (self.Z.T @ state.unknowns, state.b, state.loss - state.square / 2) if reached else None

    def _step(self, state: State) -> Step:
        step = self._sparse_step(state) if self.system is None else None
        if step is None:
            self.system = self.system or Kernel(self.products)
            step = _dense_step(self.system, state)
        self.before = step.decrement / 2 / state.loss
        return step

    def _sparse_step(self, state: State) -> Step | None:
        """Conjugate gradients; None where they take too long. Vectors of rows stand for weights, in the metric of K."""
        unknowns, s = state.unknowns.numpy(), state.curvature.numpy()
        miss, of_b, total = unknowns + state.residual.numpy(), float(state.residual.sum()), max(float(s.sum()), 1e-300)
        left = s * (of_b / total) - miss
        image_left = self._times(left)
        size = float(left @ image_left)
        part, image_part = left, image_left
        step, image, energy = np.zeros_like(left), np.zeros_like(left), 0.0
        forcing = min(FORCING, self.before / 3)
        for _ in range(max(LEAST_PRODUCTS, len(s) // ROWS_A_PRODUCT)):
            # No curvature is below that of the penalty, one: no more than this is left to win.
            if size / 2 <= EXACT * state.loss:
                break
            # The intercept follows every change of the logits, so only their distance from the mean counts.
            bent = part + s * (image_part - float(s @ image_part) / total)
            length = size / float(bent @ image_part)
            step += length * part
            image += length * image_part
            left = left - length * bent
            energy += length * size
            if length * size <= forcing * energy and energy / 2 > BEFORE_LAST * state.loss:
                break
            image_left = self._times(left)
            before, size = size, float(left @ image_left)
            part, image_part = left + size / before * part, image_left + size / before * image_part
        else:
            return None
        b = -(of_b + float(s @ image)) / total
        return Step(
            torch.from_numpy(step),
            b,
            torch.from_numpy(image),
            float(unknowns @ image),
            float(step @ image),
            float(miss @ image) + b * of_b,
            energy + of_b * of_b / total,
        )

    def _times(self, vector: np.ndarray) -> np.ndarray:
        # One thread, as torch is held to here; numpy's would wake others for every product.
        result: np.ndarray = torch.mv(self.products, torch.from_numpy(vector)).numpy()
        return result


def _dense_step(system: Kernel, state: State) -> Step:
    """Newton's, by a factor."""
    miss = state.unknowns + state.residual
    found = system.direction(state.unknowns, miss, state.residual, system.factor(state.curvature, system.scratch()))
    step, b = found[:-1], float(found[-1])
    image = system.map @ step
    slope = float(miss @ image) + b * float(state.residual.sum())
    return Step(step, b, image, float(state.unknowns @ image), float(step @ image), slope, -slope)


def _products(Z: Tensor, workers: Workers) -> Tensor:
    """(N, N) products of the rows, the part below the diagonal by symmetry."""
    half = len(Z) // 2
    first, second = Z[:half], Z[half:]
    pairs = [(first, second), (second, second), (first, first)]
    shared = Z.numel() * len(Z) >= SHARED
    across, last, begin = (workers.map if shared else map)(lambda pair: pair[0] @ pair[1].T, pairs)
    return torch.cat([torch.cat([begin, across], 1), torch.cat([across.T, last], 1)])
