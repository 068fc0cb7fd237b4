"""One softmax along the path of C, by Newton's method with conjugate gradients in float64.

For problems of which a pass over the rows takes less than the calls around it, and for what batched L-BFGS leaves over:
many classes, nearly separable, at weak penalties. There the classes that a row hesitates between are few and curve
the loss by orders of magnitude more than the penalty does; the Hessian's blocks, one per class, over the leading
directions of the features make the preconditioner, and steps are followed to the lowest point of their line. Every
strength starts where the solutions at its neighbours point to, as in `probes.newton`.

A step's end is predicted: no probability changes by more than the factor exp(d), with d the largest change of a
difference of logits, so neither does the Hessian, and after a full step of decrement g the gap to the optimum is at
most exp(d) (exp(d) - 1)^2 g / 2 (self-concordance; Bach 2010) and what conjugate gradients left over.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from probes.newton import STRIDE, start_of
from probes.objectives import SoftmaxProblems
from probes.workers import Workers

GAP = 3e-8  # to the optimum, relative to the loss, at most
LEFT = 1e-8  # of it that conjugate gradients may leave, relative to the loss
FORCING = 0.03  # share of a step's energy that they may leave (Dembo, Eisenstat and Steihaug 1982)
# What the last products added to the energy tells what was missing before them (Golub and Strakos 1994); where they are
# many, these are.
DELAY = 4
DELAYED = 0.25  # of all
MAX_STEPS = 80
MAX_PRODUCTS = 3000  # in a step
MAX_TURNS = 12  # points of a step's line
FLAT = 0.1  # part of the slope at which a point of the line is low enough
NOISE = 4e-15  # relative rounding of an objective
LEADING = (128, 1024)  # coordinates of the eigenbasis in a block: at first, and where that is not enough
BLOCK_NUMBERS = 1 << 24  # in all blocks
CALLS = 6  # products in whose time the calls that make blocks run
FASTER = 0.25  # time per multiplication there, of that in a product (measured)
NEGLIGIBLE = 1e-4  # rows whose curvature is below this part of their class's mean are left out of its block
LOGITS = 1 << 23  # rows * classes up to which their arrays are held
DESIGN = 1 << 26  # numbers of the design
SHARED = 1 << 16  # rows * classes * width from which another thread is woken


@dataclass(frozen=True)
class _State:
    """Weights (K, d), logits and probabilities (K, N), and the objective."""

    W: Tensor
    logits: Tensor
    p: Tensor
    loss: float


@dataclass
class _Preconditioner:
    """Inverse of the Hessian's diagonal (K, d); if any, of its blocks (K, r, r), over r - 1 columns and the last."""

    diagonal: Tensor
    level: int = 0  # number of the blocks' size, 0 where there are none
    blocks: Tensor | None = None

    def solve(self, residual: Tensor) -> Tensor:
        result = residual * self.diagonal
        if self.blocks is not None:
            side = self.blocks.shape[1] - 1
            wide = torch.cat([residual[:, :side], residual[:, -1:]], 1)
            inside = torch.bmm(self.blocks, wide[..., None])[..., 0]
            result[:, :side], result[:, -1] = inside[:, :-1], inside[:, -1]
        # The part that all classes share: no loss depends on it, and the optimum has none.
        return result.sub_(result.mean(0))


def fits(problems: SoftmaxProblems) -> bool:
    """Whether the arrays of one problem may be held."""
    rows = problems.rows
    return len(rows) * problems.heads <= LOGITS and len(rows) * rows.width <= DESIGN


def follow(problems: SoftmaxProblems, W: Tensor, loss: Tensor, converged: Tensor) -> None:
    """Solve what is not converged; W (num_C, K, d), loss and converged (num_C,) are changed in place."""
    C, workers = problems.C, problems.rows.workers
    solver = _Softmax(problems)
    left = (~converged).nonzero()[:, 0].tolist()
    known = converged.nonzero()[:, 0].tolist()
    levels = [[number] for number in left[::STRIDE]]
    for place in ((STRIDE // 2,), tuple(n for n in range(1, STRIDE) if n != STRIDE // 2)):
        levels.append([number for at, number in enumerate(left) if at % STRIDE in place])
    levels_of = [0] * len(C)

    def solve(number: int) -> None:
        starts = [W[number]]
        if known:
            nearest = min(known, key=lambda other: abs(other - number))
            starts += [start_of(W.flatten(1)[None], C.log(), number, known)[0].view_as(W[0]), W[nearest]]
        start_level = levels_of[nearest] if known else 0
        W[number], value, converged[number], levels_of[number] = solver.solve(starts, float(C[number]), start_level)
        loss[number] = value * float(problems.ridge[number])

    for level in levels:
        run = workers if solver.size >= SHARED else Workers(workers.pool, 1)
        list(run.map(solve, level))
        known = sorted(known + level)


class _Softmax:
    """0.5 |W|^2 + C * sum_i s_i loss_i over the rows of Z (N, d), the last column one and not penalised."""

    def __init__(self, problems: SoftmaxProblems) -> None:
        self.Z = problems.rows.exact.double()
        self.ZT = self.Z.T.contiguous()
        self.weight = problems.share / problems.share.sum() / float(problems.ridge[0]) / float(problems.C[0])
        self.num_classes, (num_rows, width) = problems.heads, self.Z.shape
        self.target = torch.zeros(self.num_classes, num_rows, dtype=torch.float64)
        self.target[problems.y, torch.arange(num_rows)] = 1
        self.squares = self.Z.square()
        self.size = num_rows * self.num_classes * width
        most = math.isqrt(BLOCK_NUMBERS // self.num_classes)
        self.sides = sorted({min(width, side, most) for side in LEADING})
        self.leads = [torch.cat([self.Z[:, : side - 1], self.Z[:, -1:]], 1) for side in self.sides]
        # What blocks cost, in products with the Hessian, which wait for memory; none come after the last.
        operations = [side**2 / (2 * width) + side**3 / (num_rows * width) for side in self.sides]
        self.prices = [CALLS + FASTER * number for number in operations] + [math.inf]

    def at(self, W: Tensor, logits: Tensor, C: float) -> _State:
        top = torch.logsumexp(logits, 0)
        loss = C * float(self.weight @ (top - (logits * self.target).sum(0)))
        # Probabilities below 1e-260 weigh nothing, but their products would be too small for fast arithmetic.
        p = (logits - top).clamp_(min=-600).exp_()
        return _State(W, logits, p, loss + float(W[:, :-1].square().sum()) / 2)

    def solve(self, starts: list[Tensor], C: float, level: int) -> tuple[Tensor, float, bool, int]:
        """From the lowest of some weights: (weights, objective, converged, level of blocks that was worth it)."""
        state = min((self.at(W, W @ self.ZT, C) for W in starts), key=lambda state: state.loss)
        before, inverse, products, spent = 1.0, None, 0, 0
        scaled = self.weight * C
        for _ in range(MAX_STEPS):
            gradient = ((state.p - self.target) * scaled) @ self.Z
            gradient[:, :-1] += state.W[:, :-1]
            if inverse is None or inverse.blocks is None or products > self.prices[inverse.level - 1]:
                inverse = self._preconditioner(state.p, scaled, level)
            forcing = min(FORCING, before)
            step, decrement, left, products, inverse = self._direction(
                state, gradient, scaled, inverse, forcing=forcing, spent=spent
            )
            spent, level = (spent + products if inverse.level == level else 0), inverse.level
            change = step @ self.ZT
            slope = float((gradient * step).sum())
            new, length = self._lowest(state, step, change, slope, C)
            spread = float((change.amax(0) - change.amin(0)).max()) if length == 1 else math.inf
            before = decrement / 2 / state.loss
            if new is None:  # rounding hides what is left, or the step is none
                return state.W, state.loss, decrement / 2 + left <= GAP * state.loss, level
            state = new
            grown = math.exp(min(spread, 30.0))
            if grown * (grown - 1) ** 2 * decrement / 2 + left <= GAP * state.loss:
                return state.W, state.loss, True, level
        return state.W, state.loss, False, level

    def _preconditioner(self, p: Tensor, scaled: Tensor, level: int) -> _Preconditioner:
        curvature = torch.addcmul(p, p, p, value=-1) * scaled
        diagonal = curvature @ self.squares
        diagonal[:, :-1] += 1
        # An intercept whose every row is certain has no curvature, and then no gradient.
        diagonal = diagonal.clamp_min_(1e-30).reciprocal_()
        if not level:
            return _Preconditioner(diagonal)
        lead, side = self.leads[level - 1], self.sides[level - 1]
        matrices = torch.empty(self.num_classes, side, side, dtype=torch.float64)
        for one, of_class in zip(matrices, curvature):
            active = (of_class > NEGLIGIBLE * of_class.mean()).nonzero()[:, 0]
            some = lead[active]
            torch.mm((some * of_class[active, None]).T, some, out=one)
        along = matrices.diagonal(dim1=1, dim2=2)
        along[:, :-1] += 1
        along[:, -1] *= 1 + 1e-10
        along[:, -1].clamp_min_(1e-30)
        factors, info = torch.linalg.cholesky_ex(matrices)
        if info.any():
            return _Preconditioner(diagonal, level)
        return _Preconditioner(diagonal, level, torch.cholesky_inverse(factors))

    def _direction(
        self, state: _State, gradient: Tensor, scaled: Tensor, inverse: _Preconditioner, *, forcing: float, spent: int
    ) -> tuple[Tensor, float, float, int, _Preconditioner]:
        """Newton's step by conjugate gradients: (step, g'H^-1 g, half of what they left, products, preconditioner)."""
        p, weighted = state.p, state.p * scaled
        step, residual = torch.zeros_like(gradient), -gradient
        toward = ahead = inverse.solve(residual)
        size, energy = float((residual * ahead).sum()), 0.0
        gains: list[float] = []
        for count in range(1, MAX_PRODUCTS + 1):
            if not size > 0:
                return step, energy, 0.0, count, inverse
            bent = toward @ self.ZT
            pull = bent * weighted
            pull.addcmul_(weighted, (bent * p).sum(0), value=-1)
            bend = pull @ self.Z
            bend[:, :-1] += toward[:, :-1]
            length = size / float((toward * bend).sum())
            step.add_(toward, alpha=length)
            residual.sub_(bend, alpha=length)
            energy += length * size
            gains.append(length * size)
            late = sum(gains[-max(DELAY, int(DELAYED * len(gains))) :])
            if len(gains) >= DELAY and late <= max(forcing * energy, LEFT * state.loss):
                return step, energy, late / 2, count, inverse
            if spent + count > self.prices[inverse.level]:
                spent = -count
                inverse = self._preconditioner(p, scaled, inverse.level + 1)
                toward = ahead = inverse.solve(residual)
                size = float((residual * ahead).sum())
                gains.clear()
                continue
            ahead = inverse.solve(residual)
            size, previous = float((residual * ahead).sum()), size
            toward = ahead.add(toward, alpha=size / previous)
        return step, energy, math.inf, count, inverse

    def _lowest(
        self, state: _State, step: Tensor, change: Tensor, slope: float, C: float
    ) -> tuple[_State | None, float]:
        """About the lowest point of a step's line, and how long the step is there; None where none is lower."""
        if not slope < 0:
            return None, 0.0
        scaled, square = self.weight * C, float(step[:, :-1].square().sum())
        across = float((state.W[:, :-1] * step[:, :-1]).sum())
        of_target = float(((change * self.target).sum(0) * scaled).sum())
        length, low, high, best = 1.0, 0.0, math.inf, None
        for _ in range(MAX_TURNS):
            new = self.at(state.W + length * step, state.logits + length * change, C)
            mean = (new.p * change).sum(0)
            steep = float(scaled @ mean) - of_target + across + length * square
            lower = new.loss <= state.loss * (1 + NOISE) + 1e-4 * length * slope
            if lower and (best is None or new.loss <= best[0].loss):
                best = (new, length)
            if lower and abs(steep) <= -FLAT * slope:
                break
            low, high = (length, high) if steep < 0 else (low, length)
            curve = float(scaled @ ((new.p * change * change).sum(0) - mean * mean)) + square
            after = length - steep / max(curve, 1e-300)
            if not low < after < high or after > 10 * length:
                after = (low + high) / 2 if high < math.inf else 10 * length
            length = after
        return (None, 0.0) if best is None else best
