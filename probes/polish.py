"""Problems that the diagonal preconditioner leaves over: nearly separable data at weak penalties.

For each family (label) they are taken in ascending C, a few at a time, in float64: started on the line through the
two solutions before, because weights of separable data grow with log C, and preconditioned by the full Hessian at the
last one. A few passes and one Hessian for eight problems take the place of hundreds of passes each.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from probes.lbfgs import Diagonal, Factored, Preconditioner, solve
from probes.objectives import Objective, evaluate, hessian

MAX_WIDTH = 2100  # widest Hessian (heads * coordinates) that is formed; above it the diagonal has to do
FACTOR_BYTES = 1 << 29  # Cholesky factors held at once
WAVE = 8  # strengths per family that share a Hessian
ROUNDS = 20  # new Hessians per problem before it is given up
STEPS = 15  # iterations per Hessian
BACKTRACKS = 20
CERTIFIED = 4e-7  # gap to the optimum, relative to the loss, that `certify` lets a solved problem have
EXACT = 1e8  # rows * width^2 up to which a Hessian is formed in float64, else in float32
CHEAP = 2e9  # rows * width^2 * problems up to which it looks at full Hessians


@dataclass
class _Wave:
    """Problems solved together; problem i is preconditioned by the Hessian at problem `centres[of[i]]`."""

    which: list[int] = field(default_factory=list)
    starts: list[Tensor] = field(default_factory=list)
    of: list[int] = field(default_factory=list)
    centres: list[int] = field(default_factory=list)


def polish(objective: Objective, W: Tensor, loss: Tensor, converged: Tensor, *, tolerance: float) -> None:
    """Solve what is not converged; W (problems, K, d), loss and converged (problems,) are changed in place."""
    num_C = len(objective.C)
    left = [
        [number for number in range(num_C) if not converged[family * num_C + number]]
        for family in range(len(W) // num_C)
    ]
    side = W.shape[1] * W.shape[2]
    at_once = max(1, FACTOR_BYTES // (8 * side * side)) if side <= MAX_WIDTH else 0
    while any(left):
        families = [family for family, numbers in enumerate(left) if numbers][: at_once or len(left)]
        wave = _Wave()
        for family in families:
            left[family] = _extend(wave, objective.C, W, converged, family * num_C, left[family])
        _choose_starts(objective, W, wave)
        _solve_wave(objective, W, loss, converged, wave, tolerance=tolerance, at_once=at_once)


def _extend(wave: _Wave, C: Tensor, W: Tensor, converged: Tensor, base: int, numbers: list[int]) -> list[int]:
    """Add the next strengths of the family whose problems start at `base`, with starting points; returns the rest."""
    before = [number for number in range(numbers[0]) if converged[base + number]][-2:]
    take = numbers[:WAVE] if before else numbers[:1]
    centre = base + (before[-1] if before else take[0])
    for number in take:
        start = W[centre]
        if len(before) == 2:
            low, high, here = C[[*before, number]].log()
            start = start + (here - high) / (high - low) * (start - W[base + before[0]])
        wave.starts.append(start)
    wave.which += [base + number for number in take]
    wave.of += [len(wave.centres)] * len(take)
    wave.centres.append(centre)
    return numbers[len(take) :]


def _choose_starts(objective: Objective, W: Tensor, wave: _Wave) -> None:
    """Start on the path, or where the first solver stopped if that is lower."""
    which, starts = torch.tensor(wave.which), torch.stack(wave.starts)
    better = evaluate(objective, starts, which).loss < evaluate(objective, W[which], which).loss
    W[which[better]] = starts[better]


def _solve_wave(
    objective: Objective, W: Tensor, loss: Tensor, converged: Tensor, wave: _Wave, *, tolerance: float, at_once: int
) -> None:
    """Rounds of a few steps per Hessian; after the first round every problem gets its own. `at_once` 0: no Hessians."""
    which, of, centres = (torch.tensor(part) for part in (wave.which, wave.of, wave.centres))
    for _ in range(ROUNDS):
        for first in range(0, len(centres), at_once or len(centres)):
            group = torch.arange(first, min(first + (at_once or len(centres)), len(centres)))
            members = torch.isin(of, group).nonzero()[:, 0]
            here = which[members]
            preconditioner: Preconditioner = Diagonal(objective, here)
            if at_once:
                preconditioner = _factored(objective, W[centres[group]], centres[group], of[members] - first)
            result = solve(
                objective,
                W[here],
                here,
                preconditioner,
                tolerance=tolerance,
                max_iterations=STEPS,
                max_backtracks=BACKTRACKS,
            )
            # Converged where it stood by its own full Hessian: that needs no second opinion.
            sure = (W[here] == result.W).all(2).all(1) & (centres[of[members]] == here) & (at_once > 0)
            W[here] = result.W
            loss[here], certified = certify(objective, W[here], here)
            converged[here] = result.converged & (certified | sure)
        which = which[~converged[which]]
        if not len(which):
            return
        of, centres = torch.arange(len(which)), which


def certify(objective: Objective, W: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """(loss (P,), whether the gap to the optimum is below CERTIFIED of it) at W (P, K, d), in W's precision.

    Predicted with the Hessian at this very point, or its diagonal where Hessians are not cheap. A preconditioner from
    elsewhere, or a mean over rows, can overrate the curvature and so hide a gap: a single outlier that has become
    certain is enough.
    """
    value = evaluate(objective, W, which, exact=True)
    side = W.shape[1] * W.shape[2]
    if len(objective.rows) * side * side * len(which) > CHEAP:
        newton = Diagonal(objective, which).solve(value.gradient, value)
    else:
        at_once = max(1, FACTOR_BYTES // (8 * side * side))
        newton = torch.cat(
            [
                _factored(objective, W[part], which[part], torch.arange(len(which[part]))).solve(
                    value.gradient[part], None
                )
                for part in (slice(first, first + at_once) for first in range(0, len(which), at_once))
            ]
        )
    return value.loss, (value.gradient * newton).sum((1, 2)) / 2 <= CERTIFIED * value.loss


def _factored(objective: Objective, W: Tensor, centres: Tensor, of: Tensor) -> Factored:
    """Hessians of the problems `centres` at W (their weights), factored."""
    exact = len(objective.rows) * (W.shape[1] * W.shape[2]) ** 2 <= EXACT
    dtype, jitter = (torch.float64, 1e-13) if exact else (torch.float32, 1e-7)
    matrices = [hessian(objective, weights.to(dtype), int(centre)) for weights, centre in zip(W, centres)]
    factors = torch.stack(list(objective.rows.workers.map(lambda matrix: _cholesky(matrix, jitter), matrices)))
    return Factored(factors, of, evaluate(objective, W, centres).curvature.mean((1, 2)))


def _cholesky(matrix: Tensor, jitter: float) -> Tensor:
    """Factor of a Hessian with rounding noise: its diagonal grows by `jitter` and more until the factor exists."""
    size = matrix.diagonal().clamp_min(1e-30)
    while jitter < 1:
        attempt = torch.linalg.cholesky_ex(matrix + torch.diag(jitter * size))
        if not attempt.info:
            lower: Tensor = attempt.L
            return lower
        jitter *= 10
    return torch.diag(size.sqrt())
