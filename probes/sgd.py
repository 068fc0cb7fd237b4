"""Many linear heads trained by stochastic gradients at once, on features that are computed already.

Heads that read the same columns are rows of one matrix: a step is one product for their logits, the gradient in closed
form, and one product that adds it to the momentum, all in arrays that are made once. Each head takes the very steps
that it would take alone with `torch.nn.Linear`, autograd and `torch.optim`. Heads are dealt to threads in fixed pieces,
so that results do not depend on the number of threads.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from featstore.errors import ConfigError, TaskError
from probes.workers import worker_threads

MOMENTUM = 0.9
BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW, as torch has them
# Logits of one piece: 13 heads of 14 labels read each batch once; larger pieces gain little, and groups of columns, or
# more labels, give the other threads theirs.
PIECE = 192
CHUNK_ELEMENTS = 1 << 24
SHOWN = 1.0  # seconds between two calls of `advance`

Sampling = Literal["endless", "epochs", "whole batches"]
Start = Literal["normal", "uniform"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How heads are trained.

    `epochs` and `epoch_steps` (0: one pass over the rows) give the number of steps, unless `iterations` does.
    `sampling`: endless draws every batch in full from one permutation after another; epochs ends each pass with a
    smaller batch; whole batches leaves that one out. `start`: normal(0, 0.01) and bias 0, or `nn.Linear`'s own
    uniform +-1/sqrt(width). Weight decay is 0. With `cosine` the learning rate falls to 0 over all steps.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    batch: int = 128
    epochs: int = 10
    epoch_steps: int = 0
    iterations: int | None = None
    cosine: bool = True
    sampling: Sampling = "endless"
    start: Start = "normal"
    seed: int = 0

    def steps(self, num_rows: int) -> tuple[int, int]:
        """(steps in all, steps of an epoch) on `num_rows` rows.

        Raises:
            TaskError: no whole batch where only those count.
        """
        whole = self.sampling == "whole batches"
        if whole and num_rows < self.batch:
            raise TaskError(
                f"the last incomplete batch is dropped and {num_rows} training rows do not fill one of {self.batch}; "
                "lower --batch"
            )
        epoch = self.epoch_steps or (num_rows // self.batch if whole else -(-num_rows // self.batch))
        return self.iterations or self.epochs * epoch, epoch


@dataclass(frozen=True, slots=True)
class Targets:
    """What heads are fitted to: labels (N, L) of 0 and 1 in float32, or class numbers (N,).

    Labels: mean over labels of the mean over a batch's valid rows of cross-entropy, positives weighted by `positive`.
    Classes: mean over the rows of the softmax's cross-entropy.
    """

    y: Float32[Tensor, "N L"] | Int64[Tensor, " N"]
    outputs: int
    valid: Bool[Tensor, "N L"] | None = None
    positive: Float32[Tensor, " L"] | None = None

    def rows(self, used: Bool[np.ndarray, " N"]) -> "Targets":
        """Those of some rows."""
        chosen = torch.from_numpy(used)
        return Targets(self.y[chosen], self.outputs, None if self.valid is None else self.valid[chosen], self.positive)

    def gradient_(self, logits: Float32[Tensor, "C B"], rows: Int64[Tensor, " B"]) -> Float32[Tensor, "C B"]:
        """The loss's gradient in place of the logits of heads one below the other, each with `outputs` rows."""
        split = logits.view(-1, self.outputs, len(rows))
        y = self.y.index_select(0, rows)
        if y.ndim == 1:
            found = torch.softmax(split, 1)
            found -= one_hot(y, self.outputs).T
            return found.div_(len(rows)).view(-1, len(rows))
        logits.sigmoid_()
        split -= y.T
        weight = self._weight(y, rows)
        split *= weight if isinstance(weight, float) else weight.T
        return logits

    def _weight(self, y: Float32[Tensor, "B L"], rows: Int64[Tensor, " B"] | slice) -> Float32[Tensor, "B L"] | float:
        """What each entry counts: its share of its label's mean, times the weight of positives."""
        if self.valid is None and self.positive is None:
            return 1.0 / (len(y) * self.outputs)
        weight = torch.ones_like(y) if self.positive is None else 1 + (self.positive - 1) * y
        if self.valid is None:
            return weight / (len(y) * self.outputs)
        valid = self.valid[rows]
        return weight * valid / (valid.sum(0).clamp(min=1) * self.outputs)

    def loss(self, logits: Float32[Tensor, "P N C"]) -> Float[np.ndarray, " P"]:
        """The loss of each head over all rows, in float64."""
        losses = []
        weight = self._weight(self.y, slice(None)) if self.y.ndim == 2 else 0.0
        for head in logits:
            if self.y.ndim == 1:
                losses.append(float(torch.nn.functional.cross_entropy(head.double(), self.y)))
            else:
                losses.append(float(((softplus(head) - self.y * head) * weight).sum(dtype=torch.float64)))
        return np.array(losses)


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads that read the columns `columns` of the features, one for each learning rate.

    `epoch` is after how many epochs the weights were the best on validation, where that was asked for.
    """

    columns: slice
    rates: tuple[float, ...]
    coef: Float32[Tensor, "P D K"]
    intercept: Float32[Tensor, "P K"]
    epoch: Int64[np.ndarray, " P"] | None = None

    @property
    def finite(self) -> Bool[np.ndarray, " P"]:
        """Heads that have not run away: all weights are numbers, and some epoch had a loss on validation."""
        whole = torch.isfinite(self.coef).flatten(1).all(1) & torch.isfinite(self.intercept).all(1)
        kept = whole.numpy() if self.epoch is None else whole.numpy() & (self.epoch > 0)
        return np.asarray(kept, dtype=bool)

    def logits(self, X: Float32[Tensor, "N D"]) -> Float32[Tensor, "P N K"]:
        """Logits of all heads, on features with all columns."""
        used = X[:, self.columns]
        num_heads, width, outputs = self.coef.shape
        flat = self.coef.permute(1, 0, 2).reshape(width, -1)
        result = torch.empty(num_heads, len(X), outputs)
        step = max(1, CHUNK_ELEMENTS // max(flat.shape[1], width))
        for start in range(0, len(X), step):
            part = used[start : start + step] @ flat  # (n, P K)
            result[:, start : start + step] = part.view(len(part), num_heads, outputs).permute(1, 0, 2)
        return result.add_(self.intercept[:, None])


@dataclass(frozen=True, slots=True)
class Held:
    """Rows whose loss after each epoch decides which weights a head keeps: the lowest, the first of equals."""

    X: Float32[Tensor, "V D"]
    targets: Targets


def cosine_factor(step: int, total: int) -> float:
    """What the learning rate is multiplied by at a step: from 1 down to 0, as torch's CosineAnnealingLR."""
    return (1 + cos(pi * step / total)) / 2


def batches(num_rows: int, recipe: Recipe, *, views: int = 1) -> Iterator[Int64[np.ndarray, " B"]]:
    """Row numbers of one batch after another, without end; `view * num_rows + row` where there are views.

    Each pass is a permutation of the rows. A row takes one view a pass, and each of its views once before any again.
    """
    order, choice = np.random.default_rng([recipe.seed, 0]), np.random.default_rng([recipe.seed, 1])
    left, passes = np.zeros(0, np.int64), 0
    turns = np.zeros((1, num_rows), np.int64)
    while True:
        rows = order.permutation(num_rows)
        if views > 1:
            if passes % views == 0:
                turns = choice.random((views, num_rows)).argsort(0)
            rows = turns[passes % views, rows] * num_rows + rows
        passes += 1
        if recipe.sampling == "endless":
            rows = np.concatenate([left, rows])
        whole = len(rows) // recipe.batch * recipe.batch
        yield from rows[:whole].reshape(-1, recipe.batch)
        left = rows[whole:]
        if recipe.sampling == "epochs" and len(left):
            yield left


def starts(
    recipe: Recipe, number: int, width: int, num_heads: int, outputs: int
) -> tuple[Float32[Tensor, "P D K"], Float32[Tensor, "P K"]]:
    """(weights, biases) of the heads of group `number` before the first step, from a generator of its own."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + number)
    if recipe.start == "normal":
        weights = torch.empty(num_heads, width, outputs).normal_(0, 0.01, generator=generator)
        return weights, torch.zeros(num_heads, outputs)
    bound = width**-0.5
    made = torch.empty(num_heads, width + 1, outputs).uniform_(-bound, bound, generator=generator)
    return made[:, :width], made[:, width]


def train_grid(
    X: Float32[Tensor, "M D"],
    targets: Targets,
    groups: Sequence[tuple[slice, tuple[float, ...]]],
    recipe: Recipe,
    *,
    held: Held | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Heads]:
    """Train a head for every learning rate of every group (columns of X, learning rates), all on the same batches.

    X holds the N rows of the targets, or N rows of each of several views one after another. `advance` is told of steps
    done, a few times a second at most, from the thread of the first piece. While it runs, torch uses one thread per
    operation in the whole process.

    Raises:
        ConfigError: X is not a whole number of views of the targets.
    """
    num_rows = len(targets.y)
    if not num_rows or len(X) % num_rows:
        raise ConfigError(f"X holds every row once for each view: a multiple of {num_rows} rows, got {len(X)}")
    pieces = []
    made = []
    for number, (columns, rates) in enumerate(groups):
        coef, intercept = starts(recipe, number, len(range(X.shape[1])[columns]), len(rates), targets.outputs)
        epoch = None if held is None else np.zeros(len(rates), np.int64)
        made.append(Heads(columns, rates, coef, intercept, epoch))
        shares = min(len(rates), -(-len(rates) * targets.outputs // PIECE))
        size = -(-len(rates) // shares)
        pieces += [(number, slice(first, first + size)) for first in range(0, len(rates), size)]
    # The largest first, so that no thread is left with one at the end.
    pieces.sort(key=lambda piece: -made[piece[0]].coef[piece[1]].numel())

    def work(piece: tuple[int, slice]) -> None:
        number, which = piece
        tell = advance if piece == pieces[0] else None
        _train_piece(X, targets, made[number], which, recipe, held=held, advance=tell)

    with worker_threads() as workers:
        list(workers.pool.map(work, pieces))
    return made


def _train_piece(
    X: Float32[Tensor, "M D"],
    targets: Targets,
    heads: Heads,
    which: slice,
    recipe: Recipe,
    *,
    held: Held | None,
    advance: Callable[[int], None] | None,
) -> None:
    """Train some heads of a group and write their weights in place."""
    num_rows, outputs = len(targets.y), targets.outputs
    total, epoch_steps = recipe.steps(num_rows)
    coef = heads.coef[which]
    num_heads, width = len(coef), coef.shape[1]
    # Rows of the transposed weights are as long as the features: products with them run up to twice as fast.
    weight = coef.transpose(1, 2).reshape(-1, width).clone()  # (P K, D)
    bias = heads.intercept[which].reshape(-1).clone()
    rates = torch.tensor(heads.rates[which]).repeat_interleave(outputs)
    used = X[:, heads.columns]
    update = _SGD(weight, bias, rates) if recipe.optimizer == "sgd" else _AdamW(weight, bias, rates)
    features, logits = torch.empty(recipe.batch, width), torch.empty(len(weight) * recipe.batch)
    best = None if held is None else np.full(num_heads, np.inf)
    draw = batches(num_rows, recipe, views=len(X) // num_rows)
    shown, told = time.monotonic(), 0
    for step, batch in zip(range(1, total + 1), draw):
        index = torch.from_numpy(batch)
        read, found = features[: len(index)], logits[: len(weight) * len(index)].view(len(weight), -1)
        torch.index_select(used, 0, index, out=read)  # (B, D)
        torch.addmm(bias[:, None], weight, read.T, out=found)  # (P K, B)
        gradient = targets.gradient_(found, index if len(X) == num_rows else index % num_rows)
        update.step(read, gradient, cosine_factor(step - 1, total) if recipe.cosine else 1.0)
        if held is not None and best is not None and (step % epoch_steps == 0 or step == total):
            _keep_best(heads, which, (weight, bias), best, held, epoch=-(-step // epoch_steps))
        if advance is not None and (step == total or time.monotonic() - shown > SHOWN):
            advance(step - told)
            shown, told = time.monotonic(), step
    if held is None:
        _write(heads, which, (weight, bias), slice(None))


def _keep_best(
    heads: Heads,
    which: slice,
    theta: tuple[Float32[Tensor, "C D"], Float32[Tensor, " C"]],
    best: Float[np.ndarray, " P"],
    held: Held,
    *,
    epoch: int,
) -> None:
    """Write the weights of the heads whose loss on the rows held out is lower than ever."""
    weight, bias = theta
    logits = torch.addmm(bias, held.X[:, heads.columns], weight.T)  # (V, P K)
    loss = held.targets.loss(logits.view(len(logits), len(best), -1).permute(1, 0, 2))
    better = np.flatnonzero(loss < best)
    best[better] = loss[better]
    _write(heads, which, theta, torch.from_numpy(better))
    assert heads.epoch is not None
    heads.epoch[which][better] = epoch


def _write(
    heads: Heads, which: slice, theta: tuple[Float32[Tensor, "C D"], Float32[Tensor, " C"]], chosen: Tensor | slice
) -> None:
    num_heads, width, outputs = heads.coef[which].shape
    weight, bias = theta
    heads.coef[which][chosen] = weight.view(num_heads, outputs, width)[chosen].transpose(1, 2)
    heads.intercept[which][chosen] = bias.view(num_heads, outputs)[chosen]


class _SGD:
    """Momentum as torch's SGD has it: v = 0.9 v + g, w = w - lr v."""

    def __init__(
        self, weight: Float32[Tensor, "C D"], bias: Float32[Tensor, " C"], rates: Float32[Tensor, " C"]
    ) -> None:
        self.weight, self.bias, self.rates = weight, bias, rates
        self.velocity, self.drift = torch.zeros_like(weight), torch.zeros_like(bias)

    def step(self, features: Float32[Tensor, "B D"], gradient: Float32[Tensor, "C B"], factor: float) -> None:
        """One update by the gradient of the logits."""
        self.velocity.addmm_(gradient, features, beta=MOMENTUM)
        self.drift.mul_(MOMENTUM).add_(gradient.sum(1))
        rates = self.rates * -factor
        self.weight.addcmul_(self.velocity, rates[:, None])
        self.bias.addcmul_(self.drift, rates)


class _AdamW:
    """torch's AdamW without weight decay."""

    def __init__(
        self, weight: Float32[Tensor, "C D"], bias: Float32[Tensor, " C"], rates: Float32[Tensor, " C"]
    ) -> None:
        self.rates, self.count = rates, 0
        self.parts = [
            (part, *(torch.zeros_like(part) for _ in range(4)), rate)
            for part, rate in ((weight, rates[:, None]), (bias, rates))
        ]

    def step(self, features: Float32[Tensor, "B D"], gradient: Float32[Tensor, "C B"], factor: float) -> None:
        """One update; see `_SGD.step`."""
        self.count += 1
        torch.mm(gradient, features, out=self.parts[0][3])
        torch.sum(gradient, 1, out=self.parts[1][3])
        size = -factor / (1 - BETAS[0] ** self.count)
        for part, first, second, slope, scale, rates in self.parts:
            first.lerp_(slope, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(slope, slope, value=1 - BETAS[1])
            torch.sqrt(second, out=scale).div_((1 - BETAS[1] ** self.count) ** 0.5).add_(EPSILON)
            part.addcdiv_(torch.mul(first, rates * size, out=slope), scale)
