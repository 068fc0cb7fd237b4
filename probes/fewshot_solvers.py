"""Heads on few rows, many problems in one batch, exact in float64.

With n rows and n below the width of the features every minimiser is a sum of rows, w = F'a, so problems are solved in
n dimensions, on the products K = F F'. Rows of weight zero fill up shorter problems and hold out folds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-10  # gap to the optimum relative to the loss, by the predicted decrease of the next step
SOFTMAX_TOLERANCE = 1e-8  # of L-BFGS, which comes near in small steps
MAX_STEPS = 100
MAX_CUTS = 30
MEMORY = 10
MAX_PASSES = 2000


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

    `K` (P, n, n), `y` (P, n) class numbers, `weight` (P, n). The products of the rows, centred, give axes on which the
    Hessian is nearly diagonal; batched L-BFGS with that diagonal finds the optimum there.
    """
    num, n = y.shape
    total = weight.sum(1)
    mean = weight / total[:, None]
    of_mean = torch.bmm(K, mean[..., None])  # (P, n, 1)
    centred = K - of_mean - of_mean.transpose(1, 2) + (mean[:, None] @ of_mean)
    live = (weight > 0).to(K.dtype)
    squares, axes = torch.linalg.eigh(centred * live[:, :, None] * live[:, None])
    root = squares.clamp_min(0).sqrt()
    keep = root > 1e-7 * root[:, -1:].clamp_min(1e-300)
    inverse = torch.where(keep, 1 / root.where(keep, root.new_ones(())), 0)
    turn = axes * inverse[:, None]  # (P, n, m): a of the centred rows is turn @ W
    coordinates = torch.bmm(centred, turn)  # all rows, held out ones too
    one = torch.ones(num, n, 1, dtype=K.dtype)
    design = torch.cat([coordinates, one], 2)
    target = torch.nn.functional.one_hot(y, num_classes).to(K.dtype)
    W = K.new_zeros(num, n + 1, num_classes)
    shape = C.shape
    out = Solutions(
        K.new_zeros(*shape, n, num_classes),
        K.new_zeros(*shape, num_classes),
        K.new_zeros(*shape, n, num_classes),
        K.new_zeros(shape),
        torch.zeros(shape, dtype=torch.bool),
    )
    for number in range(C.shape[1]):
        W, loss, done = _softmax_minimum(design, target, weight * C[:, number, None], W)
        a = torch.bmm(turn, W[:, :-1])
        W[:, -1] -= W[:, -1].mean(1, keepdim=True)  # no loss depends on what all classes share
        logits = torch.bmm(design, W)
        # Weights are sums of centred rows: put the mean's share into a and the intercept.
        out.a[:, number] = a - mean[..., None] * a.sum(1, keepdim=True)
        out.logits[:, number] = logits
        out.b[:, number] = (mean[..., None] * (logits - torch.bmm(K, out.a[:, number]))).sum(1)
        out.objective[:, number], out.converged[:, number] = loss, done
    return out


def _softmax_value(design: Tensor, target: Tensor, weight: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (P,), gradient (P, d, K), diagonal of the Hessian (P, d, K)); the last row of W is not penalised."""
    logits = torch.bmm(design, W)
    top = torch.logsumexp(logits, 2)
    penalised = W.clone()
    penalised[:, -1] = 0
    loss = (weight * (top - (logits * target).sum(2))).sum(1) + 0.5 * penalised.square().sum((1, 2))
    p = torch.exp(logits - top[..., None])
    gradient = torch.bmm(design.transpose(1, 2), (p - target) * weight[..., None]) + penalised
    curvature = torch.bmm(design.square().transpose(1, 2), p * (1 - p) * weight[..., None])
    curvature[:, :-1] += 1
    return loss, gradient, curvature.clamp_min(1e-30)


def _softmax_minimum(design: Tensor, target: Tensor, weight: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(W, loss, converged) of batched L-BFGS from W, each problem with its own steps."""
    result, converged = W.clone(), torch.zeros(len(W), dtype=torch.bool)
    running = torch.arange(len(W))
    data = (design, target, weight)
    loss, gradient, curvature = _softmax_value(*data, W)
    losses = loss.clone()
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(MAX_PASSES):
        direction = -_two_loop(gradient, curvature, pairs)
        slope = _dot(gradient, direction)
        plain = _dot(gradient, gradient / curvature)
        done = torch.maximum(-slope, plain) / 2 <= SOFTMAX_TOLERANCE * loss
        length = torch.ones_like(slope)
        for _ in range(MAX_CUTS):
            new_W = W + length[:, None, None] * direction
            new_loss, new_gradient, new_curvature = _softmax_value(*data, new_W)
            rises = ~(new_loss <= loss + 1e-4 * length * slope + 1e-14 * loss)
            if not rises.any():
                break
            length = torch.where(rises, length / 2, length)
        result[running[~rises]], losses[running[~rises]] = new_W[~rises], new_loss[~rises]
        converged[running[done]] = True
        left = (~done & ~rises).nonzero()[:, 0]
        if not len(left):
            break
        s, change = new_W - W, new_gradient - gradient
        product = _dot(s, change)
        inverse = torch.where(product > 1e-12 * (_dot(s, s) * _dot(change, change)).sqrt(), 1 / product, 0.0)
        pairs = [*pairs[-MEMORY + 1 :], (s, change, inverse)]
        W, loss, gradient, curvature = new_W, new_loss, new_gradient, new_curvature
        if len(left) < len(running):
            running = running[left]
            data = (data[0][left], data[1][left], data[2][left])
            W, loss, gradient, curvature = W[left], loss[left], gradient[left], curvature[left]
            pairs = [(a[left], b[left], c[left]) for a, b, c in pairs]
    return result, losses, converged


def _two_loop(gradient: Tensor, curvature: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    q = gradient.clone()
    factors = []
    for s, change, inverse in reversed(pairs):
        factor = inverse * _dot(s, q)
        q -= factor[:, None, None] * change
        factors.append(factor)
    q = q / curvature
    for (s, change, inverse), factor in zip(pairs, reversed(factors)):
        q += (factor - inverse * _dot(change, q))[:, None, None] * s
    return q


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2))


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
