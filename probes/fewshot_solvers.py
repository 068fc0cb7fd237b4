"""Heads on few rows, many problems in one batch, exact in float64.

With n rows and n below the width of the features every minimiser is a sum of rows, w = F'a, so problems are solved in
n dimensions, on the products K = F F'. Rows of weight zero fill up shorter problems and hold out folds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-10  # gap to the optimum relative to the loss, by the predicted decrease of the next step
NEAR = 1e-6  # the same of a softmax, whose last step is found to a tenth of it
FORCING = 0.01  # squared share of a gradient that a step may leave
MAX_STEPS = 100
MAX_CUTS = 30
MAX_PRODUCTS = 400


@dataclass(frozen=True)
class Solutions:
    """Problems P at strengths C: `a` (P, C, n) or (P, C, n, K), `b` (P, C) or (P, C, K), and logits of all rows,
    also of those with weight zero, `logits` as `a`; `objective` and `converged` (P, C)."""

    a: Tensor
    b: Tensor
    logits: Tensor
    objective: Tensor
    converged: Tensor


def binary_logistic(K: Tensor, y: Tensor, weight: Tensor, C: Tensor) -> Solutions:
    """0.5 a'Ka + C sum_i weight_i logloss_i at every C (P, C), ascending, intercept b not penalised.

    `K` (P, n, n), `y` (P, n) of 0/1, `weight` (P, n); both classes have weight in every problem. Newton's method with
    B = I + S^1/2 K S^1/2, whose eigenvalues are at least one, each strength starting at the solution of the last.
    """
    num, n = y.shape
    sign = 2 * y - 1
    share = (weight * y).sum(1) / weight.sum(1)
    state = _State(torch.zeros_like(y), torch.logit(share), torch.zeros_like(y))
    out = Solutions(
        y.new_zeros(num, C.shape[1], n),
        y.new_zeros(C.shape),
        y.new_zeros(num, C.shape[1], n),
        y.new_zeros(C.shape),
        torch.zeros(C.shape, dtype=torch.bool),
    )
    for number in range(C.shape[1]):
        loss, done = _newton(K, sign, weight * C[:, number, None], state)
        out.a[:, number], out.b[:, number] = state.a, state.b
        out.logits[:, number] = state.Ka + state.b[:, None]
        out.objective[:, number], out.converged[:, number] = loss, done
    return out


@dataclass
class _State:
    a: Tensor
    b: Tensor
    Ka: Tensor

    def at(self, index: Tensor) -> "_State":
        return _State(self.a[index], self.b[index], self.Ka[index])


def _binary_loss(state: _State, sign: Tensor, weight: Tensor) -> Tensor:
    margin = sign * (state.Ka + state.b[:, None])
    return (weight * torch.nn.functional.softplus(-margin)).sum(1) + 0.5 * (state.a * state.Ka).sum(1)


def _newton(K: Tensor, sign: Tensor, weight: Tensor, state: _State) -> tuple[Tensor, Tensor]:
    """Move `state` to the optimum; returns (loss, converged)."""
    loss = _binary_loss(state, sign, weight)
    converged = torch.zeros(len(sign), dtype=torch.bool)
    running = torch.arange(len(sign))
    part = (K, sign, weight)
    for _ in range(MAX_STEPS):
        now = state.at(running)
        da, db, slope = _direction(*part, now)
        dK = torch.bmm(part[0], da[..., None])[..., 0]
        length, before = torch.ones_like(db), loss[running]
        for _ in range(MAX_CUTS):
            new = _State(now.a + length[:, None] * da, now.b + length * db, now.Ka + length[:, None] * dK)
            after = _binary_loss(new, *part[1:])
            rises = ~(after <= before + 1e-4 * length * slope + 1e-14 * before)
            if not rises.any():
                break
            length = torch.where(rises, length / 2, length)
        # The last step counts too: from a gap of 1e-10 it squares what is left. One that rises is not taken.
        for old, value in ((state.a, new.a), (state.b, new.b), (state.Ka, new.Ka)):
            old[running[~rises]] = value[~rises]
        loss[running] = torch.where(rises, before, after)
        done = -slope / 2 <= TOLERANCE * before
        converged[running[done]] = True
        left = (~done & ~rises).nonzero()[:, 0]
        if not len(left):
            break
        if len(left) < len(running):
            running = running[left]
            part = (part[0][left], part[1][left], part[2][left])
    return loss, converged


def _direction(K: Tensor, sign: Tensor, weight: Tensor, state: _State) -> tuple[Tensor, Tensor, Tensor]:
    """Newton's step (da, db) and the slope of the loss along it."""
    f = state.Ka + state.b[:, None]
    # sqrt(p (1 - p)) and residual / sqrt(p (1 - p)) in forms that neither underflow nor divide by zero.
    half = torch.exp(-f.abs() / 2)
    root, scale = weight.sqrt() * half / (1 + half * half), weight.sqrt()
    right = root * f + sign * scale * torch.exp((-sign * f / 2).clamp_max(300.0))
    B = root[:, :, None] * K * root[:, None, :]
    B.diagonal(dim1=1, dim2=2).add_(1)
    solved = torch.cholesky_solve(torch.stack([right, root], 2), torch.linalg.cholesky(B))
    of_target, of_one = root * solved[..., 0], root * solved[..., 1]
    b = of_target.sum(1) / of_one.sum(1)
    da = of_target - b[:, None] * of_one - state.a
    db = b - state.b
    residual = -sign * torch.sigmoid(-sign * f) * weight
    dK = torch.bmm(K, da[..., None])[..., 0]
    slope = (residual * (dK + db[:, None])).sum(1) + (state.a * dK).sum(1)
    return da, db, slope.clamp_max(0.0)


def multinomial_logistic(K: Tensor, y: Tensor, weight: Tensor, C: Tensor, *, num_classes: int) -> Solutions:
    """0.5 |W|^2 + C sum_i weight_i softmax loss_i at every C (P, C), ascending, intercepts not penalised.

    `K` (P, n, n), `y` (P, n) class numbers, `weight` (P, n). Newton's method on the products of the centred rows, each
    strength starting at the solution of the last; its steps are found by conjugate gradients (`_softmax_step`).
    """
    num, n = y.shape
    mean = weight / weight.sum(1, keepdim=True)
    of_mean = torch.bmm(K, mean[..., None])  # (P, n, 1)
    centred = K - of_mean - of_mean.transpose(1, 2) + (mean[:, None] @ of_mean)
    target = torch.nn.functional.one_hot(y, num_classes).to(K.dtype).transpose(1, 2).contiguous()
    state = _Classes(K.new_zeros(num, num_classes, n), K.new_zeros(num, num_classes), K.new_zeros(num, num_classes, n))
    shape = C.shape
    out = Solutions(
        K.new_zeros(*shape, n, num_classes),
        K.new_zeros(*shape, num_classes),
        K.new_zeros(*shape, n, num_classes),
        K.new_zeros(shape),
        torch.zeros(shape, dtype=torch.bool),
    )
    for number in range(C.shape[1]):
        loss, done = _softmax_newton(centred, target, weight * C[:, number, None], state)
        state.b -= state.b.mean(1, keepdim=True)  # no loss depends on what all classes share
        a = (state.a - mean[:, None] * state.a.sum(2, keepdim=True)).transpose(1, 2)  # of the rows as they came
        logits = (state.Ka + state.b[..., None]).transpose(1, 2)
        out.a[:, number], out.logits[:, number] = a, logits
        out.b[:, number] = (mean[..., None] * (logits - torch.bmm(K, a))).sum(1)
        out.objective[:, number], out.converged[:, number] = loss, done
    return out


@dataclass
class _Classes:
    """a (P, k, n), b (P, k) and the products Ka (P, k, n) of k classes."""

    a: Tensor
    b: Tensor
    Ka: Tensor

    def at(self, index: Tensor) -> "_Classes":
        return _Classes(self.a[index], self.b[index], self.Ka[index])


def _softmax_newton(K: Tensor, target: Tensor, weight: Tensor, state: _Classes) -> tuple[Tensor, Tensor]:
    """Move `state` to the optimum; returns (loss, converged).

    Where a problem stands is known in float64. Steps are found in float32, and where that is not enough in float64.
    """
    losses, converged = weight.new_zeros(len(weight)), torch.zeros(len(weight), dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        running = (~converged).nonzero()[:, 0]
        if not len(running):
            break
        now = _Run.of(K[running], target[running], weight[running], state.at(running), dtype)
        for _ in range(MAX_STEPS):
            done, rises = now.move()
            state.a[running], state.b[running], state.Ka[running] = now.state.a, now.state.b, now.state.Ka
            losses[running] = now.loss
            converged[running[done]] = True
            left = (~done & ~rises).nonzero()[:, 0]
            if not len(left):
                break
            if len(left) < len(running):
                running, now = running[left], now.at(left)
    return losses, converged


@dataclass
class _Run:
    """Softmax problems that still run: their data, `fast` the products in the precision of steps, and where they are.

    `square` is a'Ka, `top` (P, n) the normaliser of the rows.
    """

    K: Tensor
    fast: Tensor
    weight: Tensor
    weighted: Tensor  # target times weight
    state: _Classes
    square: Tensor
    loss: Tensor
    top: Tensor

    @classmethod
    def of(cls, K: Tensor, target: Tensor, weight: Tensor, state: _Classes, dtype: torch.dtype) -> "_Run":
        square, weighted = _dot(state.a, state.Ka), target * weight[:, None]
        loss, top = _softmax_loss(state.Ka + state.b[..., None], weight, weighted, square)
        return cls(K, K.to(dtype), weight, weighted, state, square, loss, top)

    def at(self, index: Tensor) -> "_Run":
        return _Run(
            self.K[index], self.fast[index], self.weight[index], self.weighted[index],
            self.state.at(index), self.square[index], self.loss[index], self.top[index],
        )  # fmt: skip

    def move(self) -> tuple[Tensor, Tensor]:
        """A step; the logits along it are linear and cost no product. Returns (at the optimum, no step is lower)."""
        now = self.state
        logits = now.Ka + now.b[..., None]
        p = (logits - self.top[:, None]).exp_()
        gradient = p * self.weight[:, None] - self.weighted
        of_b = gradient.sum(2)
        gradient += now.a
        fast = [value.to(self.fast.dtype) for value in (p, self.weight, gradient, of_b, self.loss)]
        da, db = (value.double() for value in _softmax_step(self.fast, *fast))
        dK = torch.bmm(da, self.K)
        slope = _dot(gradient, dK) + (of_b * db).sum(1)
        across, ahead = _dot(now.a, dK), _dot(da, dK)
        along, length = dK + db[..., None], torch.ones_like(slope)
        for _ in range(MAX_CUTS):
            square = self.square + length * (2 * across + length * ahead)
            after, top = _softmax_loss(logits + length[:, None, None] * along, self.weight, self.weighted, square)
            rises = ~(after <= self.loss + 1e-4 * length * slope.clamp_max(0) + 1e-14 * self.loss)
            if not rises.any():
                break
            length = torch.where(rises, length / 2, length)
        # The last step counts too: from there it squares what is left. One that rises is not taken.
        done = (slope <= 0) & (-slope / 2 <= NEAR * self.loss)
        length = torch.where(rises, 0.0, length)
        wide = length[:, None, None]
        self.state = _Classes(now.a + wide * da, now.b + length[:, None] * db, now.Ka + wide * dK)
        self.loss, self.top = torch.where(rises, self.loss, after), top
        self.square = torch.where(rises, self.square, square)
        return done, rises


def _softmax_loss(logits: Tensor, weight: Tensor, weighted: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """(loss (P,), normaliser (P, n)) at logits (P, k, n)."""
    top = torch.logsumexp(logits, 1)
    return (weight * top).sum(1) - _dot(logits, weighted) + 0.5 * square, top


def _softmax_step(
    K: Tensor, p: Tensor, weight: Tensor, gradient: Tensor, of_b: Tensor, loss: Tensor
) -> tuple[Tensor, Tensor]:
    """Newton's step (da (P, k, n), db (P, k)) by conjugate gradients in the metric of K, one product with K each.

    They are those of the weights F'a with the identity as preconditioner, and of the intercepts with the diagonal.
    """
    spread = p * weight[:, None]
    of_bb = (spread * (1 - p)).sum(2).clamp_min_(1e-30)
    a, b, left, left_b = torch.zeros_like(gradient), torch.zeros_like(of_b), -gradient, -of_b
    K_left = torch.bmm(left, K)
    toward, toward_b, K_toward = left.clone(), left_b / of_bb, K_left.clone()
    size = _dot(left, K_left) + (left_b * toward_b).sum(1)
    # Eisenstat and Walker 1996: the step need not be more exact than Newton's model is.
    enough = torch.maximum((size / loss).clamp_max(FORCING) * size, 0.1 * NEAR * loss)
    live = size > enough
    for _ in range(MAX_PRODUCTS):
        logits = K_toward + toward_b[..., None]
        pull = spread * logits
        pull.addcmul_(p, pull.sum(1, keepdim=True), value=-1)
        bend = _dot(toward, K_toward) + _dot(pull, logits)
        length = torch.where(live, size / bend.clamp_min(1e-30), 0.0)
        wide = length[:, None, None]
        a.addcmul_(wide, toward)
        b.addcmul_(length[:, None], toward_b)
        left_b.addcmul_(length[:, None], pull.sum(2), value=-1)
        left.addcmul_(wide, pull.add_(toward), value=-1)
        torch.bmm(left, K, out=K_left)
        ahead_b = left_b / of_bb
        after = _dot(left, K_left) + (left_b * ahead_b).sum(1)
        still = live & (after > enough)
        if not still.any():
            break
        factor = torch.where(still, after / size, 0.0)
        wide = factor[:, None, None]
        toward.mul_(wide).add_(left)
        K_toward.mul_(wide).add_(K_left)
        toward_b.mul_(factor[:, None]).add_(ahead_b)
        size, live = after, still
    return a, b


def _dot(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return product


def ridge(K: Tensor, targets: Tensor, weight: Tensor, alpha: Tensor) -> Solutions:
    """sum_i weight_i (t_i - f_i)^2 + alpha |w|^2 at every alpha (P, A) for weights of 0 and 1, intercept not penalised.

    `K` (P, n, n), `targets` (P, n, T). `a` is (P, A, n, T), `b` (P, A, T); one eigendecomposition serves all alphas.
    """
    mean = weight / weight.sum(1, keepdim=True)
    of_mean = torch.bmm(K, mean[..., None])
    centred = K - of_mean - of_mean.transpose(1, 2) + (mean[:, None] @ of_mean)
    squares, axes = torch.linalg.eigh(centred * weight[:, :, None] * weight[:, None])
    level = torch.bmm(mean[:, None], targets)  # (P, 1, T)
    turned = torch.bmm(axes.transpose(1, 2), (targets - level) * weight[..., None])
    inverse = 1 / (squares.clamp_min(0)[:, None] + alpha[..., None])  # (P, A, n)
    a = axes[:, None] @ (inverse[..., None] * turned[:, None])  # (P, A, n, T), zero where the weight is
    a = a * weight[:, None, :, None]
    a = a - mean[:, None, :, None] * a.sum(2, keepdim=True)
    Ka = K[:, None] @ a
    b = level - (mean[:, None, :, None] * Ka).sum(2)
    logits = Ka + b[:, :, None]
    error = (weight[:, None, :, None] * (targets[:, None] - logits).square()).sum((2, 3))
    objective = error + alpha * (a * Ka).sum((2, 3))
    return Solutions(a, b, logits, objective, torch.ones(objective.shape, dtype=torch.bool))


def class_means(F: Tensor, y: Tensor, weight: Tensor, *, num_classes: int) -> tuple[Tensor, Tensor]:
    """Nearest class mean as linear scores x.m - |m|^2 / 2: (W (P, K, D), b (P, K)); `F` (P, n, D)."""
    member = torch.nn.functional.one_hot(y, num_classes).to(F.dtype) * weight[..., None]
    means = torch.bmm(member.transpose(1, 2), F) / member.sum(1)[..., None]
    return means, -0.5 * means.square().sum(2)
