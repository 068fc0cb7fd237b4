"""All problems of an objective, from a start to the optimum: the easy many in one batch, then the hard few."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.lbfgs import Diagonal, solve
from probes.objectives import Objective
from probes.polish import certify, polish

# Gap to the optimum that a solved problem may have by its own estimate, relative to its loss.
TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-8}
EASY_ITERATIONS = 16
EASY_BACKTRACKS = 4
SMALL = 1e8  # rows * problems * width up to which everything runs in float64
BATCH_BYTES = 1 << 30  # state of the problems solved at once


@dataclass(frozen=True)
class Solved:
    """Results per problem, reshaped to (num_C, families)."""

    W: Float[np.ndarray, "C F K d"]
    objective: Float[np.ndarray, "C F"]
    converged: Bool[np.ndarray, "C F"]


def minimise(objective: Objective, start: Tensor) -> Solved:
    """Minimise all problems of an objective from `start` (problems, K, d), float64, centred over classes."""
    num_problems, heads, width = start.shape
    exact = len(objective.rows) * num_problems * heads * width <= SMALL
    W, loss = start.clone(), torch.zeros(num_problems, dtype=torch.float64)
    converged = torch.zeros(num_problems, dtype=torch.bool)
    at_once = max(1, BATCH_BYTES // (22 * 8 * heads * width))
    for first in range(0, num_problems, at_once):
        which = torch.arange(first, min(first + at_once, num_problems))
        begin = start[which] if exact else start[which].float()
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
            loss[done], converged[done] = certify(objective, W[done], done)
    polish(objective, W, loss, converged, tolerance=TOLERANCE[torch.float64])
    num_C = len(objective.C)
    return Solved(
        W.view(-1, num_C, heads, width).transpose(0, 1).numpy(),
        (loss / objective.ridge).view(-1, num_C).T.numpy(),
        converged.view(-1, num_C).T.numpy(),
    )
