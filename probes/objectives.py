"""Losses of many L2-regularised logistic problems at once, one pass over the rows for all of them.

A problem owns K weight rows of d numbers: K = 1 for a binary problem, K classes for a softmax. The last of the d
coordinates is the intercept and is not penalised. With row weights s_i, S = sum of s_i, and strength C, a problem
minimises

    f(W) = 1/S * sum_i s_i * loss_i(W) + ||W without intercept||^2 / (2 C S),

which is scikit-learn's objective divided by C S. Products run in the type of W, sums over row blocks in float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from probes.workers import Workers

# Logits of one block of rows: 4 MB in float32, so that the element-wise steps between the two products stay in cache.
BLOCK_ELEMENTS = 1 << 20
# Rows whose share of the curvature is below this part of their block's mean are left out of a Hessian.
NEGLIGIBLE = 1e-6

Out = TypeVar("Out")


class Rows:
    """The design matrix (N, d), last column one, in float32 and in the precision it came in."""

    def __init__(self, design: Tensor, workers: Workers) -> None:
        self.exact = design
        self.fast = design.float()
        self.workers = workers

    def __len__(self) -> int:
        return self.fast.shape[0]

    @property
    def width(self) -> int:
        return self.fast.shape[1]

    def block(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows in the asked precision."""
        return self.fast[rows] if dtype == torch.float32 else self.exact[rows].to(dtype)

    def map(self, work: Callable[[slice], Out], columns: int) -> Iterator[Out]:
        """`work` on every block of rows, results in order; blocks suit `columns` numbers a row."""
        return self.workers.map_blocks(work, len(self), min(max(BLOCK_ELEMENTS // max(columns, 1), 256), 8192))


@dataclass(frozen=True)
class Evaluation:
    """Loss (P,), gradient (P, K, d) and curvature of P problems.

    `curvature` is the mean of p(1-p), (P, K, 1), or where asked for the Hessian's diagonal without ridge, (P, K, d).
    """

    loss: Tensor
    gradient: Tensor
    curvature: Tensor

    def put(self, index: Tensor, other: "Evaluation") -> None:
        """Overwrite some problems."""
        self.loss[index], self.gradient[index], self.curvature[index] = other.loss, other.gradient, other.curvature

    def take(self, index: Tensor) -> "Evaluation":
        """Some problems only."""
        return Evaluation(self.loss[index], self.gradient[index], self.curvature[index])


@runtime_checkable
class Objective(Protocol):
    """Problems over the same rows, numbered family * num_C + C number; a family is a label, or the softmax."""

    rows: Rows
    heads: int  # K
    C: Tensor  # (num_C,) float64, ascending
    ridge: Tensor  # (problems,) 1 / (C S), float64
    spread: Tensor  # (problems, d) weighted mean square of every coordinate, float64

    def block(self, rows: slice, W: Tensor, which: Tensor, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, gradient, curvature) of one block of rows as in `Evaluation`, without ridge; `exact`: the diagonal.

        Problems of one family stand together in `which`.
        """
        ...

    def hessian_block(self, rows: slice, W: Tensor, problem: int) -> Tensor:
        """(K, d, K, d) part of the Hessian of one problem at W (K, d), without ridge."""
        ...


def evaluate(objective: Objective, W: Tensor, which: Tensor, *, exact: bool = False) -> Evaluation:
    """Loss, gradient and curvature (its diagonal if `exact`) of the problems `which` at weights W (P, K, d)."""
    num_problems, heads, width = W.shape
    loss = torch.zeros(num_problems, dtype=torch.float64)
    gradient = torch.zeros(num_problems, heads, width, dtype=torch.float64)
    curvature = torch.zeros(num_problems, heads, width if exact else 1, dtype=torch.float64)
    for part in objective.rows.map(lambda rows: objective.block(rows, W, which, exact), num_problems * heads):
        loss += part[0]
        gradient += part[1]
        curvature += part[2]
    penalised, ridge = W[:, :, :-1].double(), objective.ridge[which]
    loss += ridge / 2 * penalised.square().sum((1, 2))
    gradient[:, :, :-1] += ridge[:, None, None] * penalised
    return Evaluation(loss, gradient.to(W.dtype), curvature)


def hessian(objective: Objective, W: Tensor, problem: int) -> Tensor:
    """(Kd, Kd) Hessian of one problem at W (K, d), float64; products run in the type of W."""
    heads, width = objective.heads, objective.rows.width
    total = torch.zeros(heads, width, heads, width, dtype=torch.float64)
    for part in objective.rows.map(lambda rows: objective.hessian_block(rows, W, problem), 4 * width):
        total += part
    head = torch.arange(heads)
    coordinate = torch.arange(width - 1)
    total[head[:, None], coordinate, head[:, None], coordinate] += objective.ridge[problem]
    if heads > 1:  # a common shift of all intercepts changes no loss: lend it some curvature
        total[:, -1, :, -1] += total[head, -1, head, -1].mean()
    return total.view(heads * width, heads * width)


class BinaryProblems:
    """Every label at every C, each row weighted per label."""

    heads = 1

    def __init__(self, rows: Rows, y: Tensor, weights: Tensor, C: Tensor) -> None:
        """y, weights: (L, N) float64, y 0/1; C: (num_C,) float64."""
        self.rows, self.C = rows, C
        total = weights.sum(1, keepdim=True)
        self.ridge = (1 / (C * total)).flatten()
        self.sign = (1 - 2 * y).to(torch.int8)
        self.share = weights / total
        self.spread = _mean_square(rows, self.share).repeat_interleave(len(C), 0)

    def block(self, rows: slice, W: Tensor, which: Tensor, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
        z = self.rows.block(rows, W.dtype)
        sign, share = self.sign[:, rows].to(W.dtype), self.share[:, rows].to(W.dtype)
        moments = z.square() if exact else torch.ones(len(z), 1, dtype=W.dtype)
        logits = W[:, 0] @ z.T  # (P, n)
        loss, curvature = torch.empty(len(W), dtype=W.dtype), torch.empty(len(W), moments.shape[1], dtype=W.dtype)
        labels, counts = torch.unique_consecutive(which // len(self.C), return_counts=True)
        start = 0
        for label, count in zip(labels.tolist(), counts.tolist()):
            run, start = slice(start, start + count), start + count
            t = logits[run].mul_(sign[label])  # negative where the decision is right
            loss[run] = softplus(t) @ share[label]
            t.sigmoid_()  # distance of the probability from the label
            curvature[run] = torch.addcmul(t, t, t, value=-1) @ (share[label, :, None] * moments)
            t.mul_(sign[label] * share[label])
        return loss, (logits @ z)[:, None], curvature[:, None]

    def hessian_block(self, rows: slice, W: Tensor, problem: int) -> Tensor:
        z = self.rows.block(rows, W.dtype)
        logits = z @ W[0]
        weight = torch.sigmoid(logits) * torch.sigmoid(-logits) * self.share[problem // len(self.C), rows].to(W.dtype)
        active = (weight > NEGLIGIBLE * weight.mean()).nonzero()[:, 0]
        z = z[active] * weight[active].sqrt()[:, None]
        return (z.T @ z)[None, :, None]


class SoftmaxProblems:
    """One softmax over K classes at every C."""

    def __init__(self, rows: Rows, y: Tensor, weights: Tensor, C: Tensor, num_classes: int) -> None:
        """y: (N,) class numbers; weights: (N,) float64; C: (num_C,) float64."""
        self.rows, self.C, self.y, self.heads = rows, C, y, num_classes
        self.ridge = 1 / (C * weights.sum())
        self.share = weights / weights.sum()
        self.spread = _mean_square(rows, self.share[None]).expand(len(C), -1)

    def block(self, rows: slice, W: Tensor, which: Tensor, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
        z, y, share = self.rows.block(rows, W.dtype), self.y[rows], self.share[rows].to(W.dtype)
        num_problems, heads, width = W.shape
        moments = z.square() if exact else torch.ones(len(z), 1, dtype=W.dtype)
        logits = (W.reshape(-1, width) @ z.T).view(num_problems, heads, -1)
        true = y.expand(num_problems, 1, -1)
        normaliser = torch.logsumexp(logits, 1, keepdim=True)
        loss = (normaliser - logits.gather(1, true))[:, 0] @ share
        p = logits.sub_(normaliser).exp_()
        curvature = torch.addcmul(p, p, p, value=-1) @ (share[:, None] * moments)
        p.scatter_add_(1, true, torch.full_like(normaliser, -1)).mul_(share)
        return loss, (p.view(num_problems * heads, -1) @ z).view_as(W), curvature

    def hessian_block(self, rows: slice, W: Tensor, problem: int) -> Tensor:
        z = self.rows.block(rows, W.dtype)
        p = torch.softmax((z @ W.T).double(), 1)
        own = torch.eye(self.heads, dtype=torch.float64)
        # -p_k p_l off the diagonal; p_k (1 - p_k) as a sum, which stays exact where p_k is nearly one.
        pair = p[:, :, None] * torch.where(own > 0, (p @ (1 - own))[:, :, None], -p[:, None, :])
        pair = (pair * self.share[rows, None, None]).to(W.dtype)  # (n, K, K)
        size = pair.diagonal(dim1=1, dim2=2).sum(1)
        active = (size > NEGLIGIBLE * size.mean()).nonzero()[:, 0]
        z, pair, width = z[active], pair[active], z.shape[1]
        result = torch.empty(self.heads, width, self.heads, width, dtype=W.dtype)
        for first in range(self.heads):
            for second in range(first, self.heads):
                product = z.T @ (z * pair[:, first, second, None])
                result[first, :, second], result[second, :, first] = product, product.T
        return result


def _mean_square(rows: Rows, share: Tensor) -> Tensor:
    """(L, d) sum over rows of share * z^2, for L sets of shares that each sum to one."""
    total = torch.zeros(len(share), rows.width, dtype=torch.float64)
    for part in rows.map(lambda block: share[:, block].float() @ rows.fast[block].square(), rows.width):
        total += part
    return total
