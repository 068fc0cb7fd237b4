"""From shots to heads and scores: gather rows, solve all draws in one batch, choose strengths within the shots."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featstore.errors import ConfigError, TaskError
from probes.checks import CHUNK, check_finite
from probes.fewshot_config import FewShotConfig, Scaling
from probes.fewshot_solvers import Solutions, binary_logistic, class_means, multinomial_logistic, ridge
from probes.logistic import DEFAULT_C, LogisticProbe
from probes.ridge import DEFAULT_ALPHA, RidgeProbe, column_moments
from probes.shots import Shots

NUM_FOLDS = 5
MAX_ROWS = 2048  # problems with more rows are solved one by one in the space of the features
SIMILARITY_BYTES = 1 << 26


@dataclass(frozen=True)
class Space:
    """How features are scaled before any head sees them."""

    mean: Tensor
    scale: Tensor
    unit: bool

    @classmethod
    def of(cls, X: Float[np.ndarray, "N D"], scaling: Scaling) -> "Space":
        """Mean and deviation of all training rows where the scaling needs them.

        Raises:
            TaskError: features that are not finite.
        """
        check_finite(X)
        width = X.shape[1]
        mean, scale = torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
        if scaling in ("standardize", "centred"):
            mean, deviation = (torch.from_numpy(part) for part in column_moments(X))
            scale = deviation if scaling == "standardize" else scale
        return cls(mean, scale, scaling in ("unit", "centred"))

    def __call__(self, X: Tensor) -> Tensor:
        """Rows (..., D) scaled, float64.

        Raises:
            TaskError: a row without direction.
        """
        values = (X.double() - self.mean) / self.scale
        if not self.unit:
            return values
        length = values.norm(dim=-1, keepdim=True)
        if not bool((length > 0).all()):
            raise TaskError(
                "a row of the features is zero (or the training mean) and has no direction; use --scaling none"
            )
        return torch.div(values, length)

    def of_all(self, X: Float[np.ndarray, "N D"]) -> Tensor:
        """All rows scaled, float32, in blocks."""
        check_finite(X)
        result = torch.empty(X.shape, dtype=torch.float32)
        for start in range(0, len(X), CHUNK):
            result[start : start + CHUNK] = self(torch.from_numpy(X[start : start + CHUNK]))
        return result


@dataclass(frozen=True)
class Heads:
    """Linear heads of E draws: `W` (E, D) and `b` (E,), or (E, K, D) and (E, K) of classes; strengths as chosen.

    Strength and objective are NaN where a head has none.
    """

    W: Tensor
    b: Tensor
    strength: Float[np.ndarray, " E"]
    at_edge: Bool[np.ndarray, " E"]
    converged: Bool[np.ndarray, " E"]
    objective: Float[np.ndarray, " E"]
    without_choice: int = 0

    def scores(self, queries: Tensor) -> Tensor:
        """(Q, E), or (E, Q, K) of classes, from queries (Q, D) float32."""
        if self.W.ndim == 2:
            return torch.addmm(self.b.float(), queries, self.W.float().T)
        num_heads, num_classes, width = self.W.shape
        flat = torch.addmm(self.b.float().reshape(-1), queries, self.W.float().reshape(-1, width).T)
        return flat.view(len(queries), num_heads, num_classes).transpose(0, 1)


Quality = Callable[[Heads], Float[np.ndarray, " E"]]


@dataclass(frozen=True)
class _Batch:
    """Shots of some draws with their features F (E, n, D) and products K (E, n, n), float64; filled up by weight 0."""

    F: Tensor
    K: Tensor
    y: Tensor
    weight: Tensor
    shot: Tensor

    @classmethod
    def of(cls, X: Tensor, space: Space, shots: Shots) -> "_Batch":
        F, weight = gathered(X, space, shots)
        return cls(F, torch.bmm(F, F.transpose(1, 2)), torch.from_numpy(shots.y), weight, torch.from_numpy(shots.shot))


def gathered(X: Tensor, space: Space, shots: Shots) -> tuple[Tensor, Tensor]:
    """(features (E, n, D) float64, weight (E, n)): the first row of a draw stands where it has no more."""
    rows = np.where(shots.valid, shots.rows, shots.rows[:, :1])
    F = space(X[torch.from_numpy(rows.reshape(-1))]).view(*rows.shape, X.shape[1])
    return F, torch.from_numpy(shots.valid).double()


def grid_of(config: FewShotConfig) -> tuple[float, ...]:
    """Strengths that are solved: one where nothing is chosen."""
    if config.strengths is not None:
        return config.strengths
    if config.select == "fixed":
        return (1.0,)
    return DEFAULT_C if config.head == "logistic" else DEFAULT_ALPHA


def fit_heads(
    X: Tensor, space: Space, shots: Shots, config: FewShotConfig, *, num_classes: int | None, quality: Quality | None
) -> Heads:
    """Heads of draws of one label (`num_classes` None) or of classes.

    `quality` gives their AUROC on validation where that chooses the strength.
    """
    if config.head == "ncm":
        F, weight = gathered(X, space, shots)
        W, b = class_means(F, torch.from_numpy(shots.y), weight, num_classes=num_classes or 2)
        return _made((W, b) if num_classes else (W[:, 1] - W[:, 0], b[:, 1] - b[:, 0]))
    grid = torch.tensor(grid_of(config), dtype=torch.float64)
    if shots.rows.shape[1] > MAX_ROWS:
        return _fit_large(X, space, shots, config, num_classes, grid=grid, quality=quality)
    batch = _Batch.of(X, space, shots)
    which, without = None, 0
    if config.select == "inner":
        which, without = _chosen(_held_out_loss(batch, config, num_classes, grid), grid, config)
        chosen = torch.where(which >= 0, grid[which.clamp_min(0)], 1.0)
        solved = _solve(batch, batch.weight, chosen[:, None], config, num_classes)
        return _heads(batch, solved, 0, chosen, _edges(which, grid), without)
    strengths = grid.expand(len(batch.y), -1)
    solved = _solve(batch, batch.weight, strengths, config, num_classes)
    if quality is None:
        return _heads(batch, solved, 0, strengths[:, 0])
    every = [_heads(batch, solved, number, strengths[:, number]) for number in range(len(grid))]
    return _best(every, quality, grid, config)


def _made(linear: tuple[Tensor, Tensor]) -> Heads:
    """Heads without a strength."""
    none = np.full(len(linear[0]), np.nan)
    sound = np.ones(len(none), dtype=bool)
    return Heads(*linear, none, ~sound, sound, none)


def _heads(
    batch: _Batch,
    solved: Solutions,
    number: int,
    strength: Tensor,
    at_edge: Bool[np.ndarray, " E"] | None = None,
    without: int = 0,
) -> Heads:
    """Weights of the features from those of the rows, at one of the strengths."""
    a, b = solved.a[:, number], solved.b[:, number]
    W = torch.bmm(a[:, None], batch.F)[:, 0] if a.ndim == 2 else torch.bmm(a.transpose(1, 2), batch.F)
    edge = np.zeros(len(b), dtype=bool) if at_edge is None else at_edge
    done, loss = solved.converged[:, number].numpy(), solved.objective[:, number].numpy()
    if a.ndim == 3 and a.shape[2] == 1:  # two classes are one problem: the other class has score 0
        W, b = torch.cat([torch.zeros_like(W), W], 1), torch.cat([torch.zeros_like(b), b], 1)
    return Heads(W, b, strength.numpy(), edge, done, loss, without)


def _solve(
    batch: _Batch, weight: Tensor, strengths: Tensor, config: FewShotConfig, num_classes: int | None
) -> Solutions:
    """All draws at strengths (E, S), rows weighted by `weight`; `a` and `logits` (E, S, n), of classes with their axis.

    Two classes have one column, that of class 1.
    """
    if config.head == "ridge":
        targets = _signs(batch.y, num_classes)
        solved = ridge(batch.K, targets, weight, strengths)
        if num_classes is None:
            return Solutions(
                solved.a[..., 0], solved.b[..., 0], solved.logits[..., 0], solved.objective, solved.converged
            )
        return solved
    if num_classes is not None and num_classes > 2:
        return multinomial_logistic(batch.K, batch.y, weight, strengths, num_classes=num_classes)
    solved = binary_logistic(batch.K, batch.y.double(), weight, strengths)
    if num_classes is None:
        return solved
    wide = (solved.a[..., None], solved.b[..., None], solved.logits[..., None])
    return Solutions(*wide, solved.objective, solved.converged)


def _signs(y: Tensor, num_classes: int | None) -> Tensor:
    """Targets of ridge, -1 and 1: of one label, or one column a class (of two classes that of class 1)."""
    if num_classes is None or num_classes == 2:
        return (2.0 * y - 1).double()[..., None]
    return 2.0 * torch.nn.functional.one_hot(y, num_classes).double() - 1


def _held_out_loss(batch: _Batch, config: FewShotConfig, num_classes: int | None, grid: Tensor) -> Tensor:
    """Mean loss (E, S) of shots held out in turn, NaN where no fold has all classes left to fit on."""
    num_shots = torch.where(batch.weight > 0, batch.shot, -1).amax(1) + 1
    folds = num_shots.clamp(max=NUM_FOLDS)
    total, count = torch.zeros(len(batch.y), len(grid), dtype=torch.float64), torch.zeros(len(batch.y), 1)
    for fold in range(int(folds.max())):
        held = (batch.shot % folds[:, None] == fold) & (batch.weight > 0)
        weight = batch.weight * ~held
        sound = held.any(1)
        for number in range(num_classes or 2):
            sound &= ((batch.y == number) & (weight > 0)).any(1)
        index = sound.nonzero()[:, 0]
        if not len(index):
            continue
        part = _Batch(batch.F[:0], batch.K[index], batch.y[index], weight[index], batch.shot[index])
        solved = _solve(part, part.weight, grid.expand(len(index), -1), config, num_classes)
        losses = _losses(solved.logits, part.y, config, num_classes)
        total[index] += (losses * held[index, None]).sum(2)
        count[index] += held[index].sum(1, keepdim=True)
    return total / torch.where(count > 0, count, torch.nan)


def _losses(logits: Tensor, y: Tensor, config: FewShotConfig, num_classes: int | None) -> Tensor:
    """Loss of every row (E, S, n): squared error of ridge, log loss else."""
    if config.head == "ridge":
        targets = _signs(y, num_classes)
        columns = logits if logits.ndim == 4 else logits[..., None]
        return (columns - targets[:, None]).square().sum(3)
    if logits.ndim == 4 and logits.shape[3] > 1:
        truth = y[:, None, :, None].expand(-1, logits.shape[1], -1, 1)
        return torch.logsumexp(logits, 3) - logits.gather(3, truth)[..., 0]
    flat = logits if logits.ndim == 3 else logits[..., 0]
    return torch.nn.functional.softplus(-(2 * y - 1)[:, None] * flat)


def _chosen(loss: Tensor, grid: Tensor, config: FewShotConfig) -> tuple[Tensor, int]:
    """(grid number (E,), -1 where nothing could be held out; how many those are); ties take the stronger penalty."""
    undefined = loss.isnan().any(1)
    if config.head == "ridge":
        which = len(grid) - 1 - loss.nan_to_num().flip(1).argmin(1)
    else:
        which = loss.nan_to_num().argmin(1)
    return torch.where(undefined, -1, which), int(undefined.sum())


def _edges(which: Tensor, grid: Tensor) -> Bool[np.ndarray, " E"]:
    return np.asarray(((which == 0) | (which == len(grid) - 1)).numpy() & (len(grid) > 1))


def _best(every: list[Heads], quality: Quality, grid: Tensor, config: FewShotConfig) -> Heads:
    """Of each draw the strength with the largest AUROC on validation; ties take the stronger penalty."""
    found = torch.from_numpy(np.stack([quality(heads) for heads in every], 1))
    # A label with one class in validation has no AUROC there, and nothing to choose by.
    which, without = _chosen(-found, grid, config)
    picked = which.clamp_min(0)
    if without:
        raise TaskError("validation has a single class of a label, so no strength can be chosen; use --select inner")
    each = torch.arange(len(which))
    place = picked.numpy(), each.numpy()  # numpy takes a tensor of one element for a number
    return Heads(
        torch.stack([heads.W for heads in every])[picked, each],
        torch.stack([heads.b for heads in every])[picked, each],
        grid[picked].numpy(),
        _edges(which, grid),
        np.stack([heads.converged for heads in every])[place],
        np.stack([heads.objective for heads in every])[place],
    )


def _fit_large(
    X: Tensor,
    space: Space,
    shots: Shots,
    config: FewShotConfig,
    num_classes: int | None,
    *,
    grid: Tensor,
    quality: Quality | None,
) -> Heads:
    """Draws with many rows, one after the other, by the probes for whole training sets."""
    made = []
    for number in range(len(shots.rows)):
        valid = shots.valid[number]
        F = space(X[torch.from_numpy(shots.rows[number, valid])]).numpy()
        y, shot = shots.y[number, valid], shots.shot[number, valid]
        strengths, which, without = grid, torch.tensor([0]), 0
        if config.select == "inner":
            loss = _held_out_large(F, y, shot, config, num_classes, grid)
            which, without = _chosen(loss[None], grid, config)
            strengths = grid[which] if int(which[0]) >= 0 else torch.ones(1, dtype=torch.float64)
        W, b, done, loss_ = _fit_whole(F, y, config, num_classes, strengths)
        every = [
            Heads(
                W[None, value], b[None, value], strengths[value : value + 1].numpy(), np.zeros(1, dtype=bool),
                done[value : value + 1], loss_[value : value + 1], without,
            )
            for value in range(len(strengths))
        ]  # fmt: skip
        if quality is not None:
            made.append(_best(every, quality, grid, config))
        else:
            edge = _edges(which, grid) if config.select == "inner" else every[0].at_edge
            made.append(replace(every[0], at_edge=edge))
    return Heads(
        torch.cat([heads.W for heads in made]),
        torch.cat([heads.b for heads in made]),
        np.concatenate([heads.strength for heads in made]),
        np.concatenate([heads.at_edge for heads in made]),
        np.concatenate([heads.converged for heads in made]),
        np.concatenate([heads.objective for heads in made]),
        sum(heads.without_choice for heads in made),
    )


def _fit_whole(
    F: Float[np.ndarray, "n D"], y: np.ndarray, config: FewShotConfig, num_classes: int | None, strengths: Tensor
) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
    """(W (S, D) or (S, K, D), b, converged (S,), objective (S,)) of one draw."""
    values = strengths.numpy()
    if config.head == "ridge":
        targets = _signs(torch.from_numpy(y), num_classes).numpy()
        probe = RidgeProbe(alpha=values, standardize=False).fit(F, targets)
        W, b = probe.coef_, probe.intercept_ - (probe.mean_ / probe.scale_) @ probe.coef_
        done, loss = np.ones(len(values), dtype=np.bool_), np.full(len(values), np.nan)
    else:
        head = LogisticProbe(C=values, standardize=False)
        head.fit(F, y, kind="multiclass", num_classes=num_classes or 2)
        W, b = head.coef_, head.intercept_
        done, loss = np.all(head.converged_, axis=1, keepdims=False), head.objective_[:, 0]
    W_, b_ = torch.from_numpy(np.swapaxes(W, 1, 2).copy()), torch.from_numpy(np.asarray(b))
    if num_classes is None:
        return W_[:, -1], b_[:, -1], done, loss
    if W_.shape[1] == 1:
        W_, b_ = torch.cat([torch.zeros_like(W_), W_], 1), torch.cat([torch.zeros_like(b_), b_], 1)
    return W_, b_, done, loss


def _held_out_large(
    F: Float[np.ndarray, "n D"],
    y: np.ndarray,
    shot: np.ndarray,
    config: FewShotConfig,
    num_classes: int | None,
    grid: Tensor,
) -> Tensor:
    """As `_held_out_loss`, of one draw: (S,)."""
    folds = min(int(shot.max()) + 1, NUM_FOLDS)
    total, count = torch.zeros(len(grid), dtype=torch.float64), 0
    for fold in range(folds):
        held = np.asarray(shot % folds == fold)
        if len(np.unique(y[~held])) < (num_classes or 2) or not held.any():
            continue
        W, b, _, _ = _fit_whole(F[~held], y[~held], config, num_classes, grid)
        rows, truth = torch.from_numpy(F[held]), torch.from_numpy(y[held])[None]
        logits = (rows @ W.transpose(-1, -2) if W.ndim == 3 else (rows @ W.T).T) + b[:, None]
        if W.ndim == 3 and W.shape[1] == 2:
            logits = logits[..., 1:]
        total += _losses(logits[None], truth, config, num_classes)[0].sum(1)
        count += int(held.sum())
    return total / count if count else torch.full_like(total, torch.nan)


def neighbour_scores(
    X: Tensor,
    space: Space,
    queries: Tensor,
    shots: Shots,
    *,
    k: int | None,
    temperature: float,
    num_classes: int | None,
) -> Tensor:
    """DINO's vote among the shots: scores (Q, E) of a label, the weighted share of positives, or (E, Q, K) of classes.

    Similarity is the cosine in the scaled space. Weights are the softmax of similarity / `temperature` over the `k`
    nearest shots, all of them for None; among equal similarities the first row counts.

    Raises:
        ConfigError: more neighbours than a draw has rows.
    """
    F, weight = gathered(X, space, shots)
    bank = torch.nn.functional.normalize(F.float(), dim=2)
    num, n, width = bank.shape
    fewest = int(shots.valid.sum(1).min())
    if k is not None and k > fewest:
        raise ConfigError(f"k={k} neighbours asked of {fewest} shots; lower --k or leave out small budgets")
    member = torch.nn.functional.one_hot(torch.from_numpy(shots.y), num_classes or 2).float()  # (E, n, K)
    result = torch.empty(num, len(queries), num_classes or 2)
    empty = (weight == 0)[:, None]
    block = max(1, SIMILARITY_BYTES // (4 * num * n * 3))
    for start in range(0, len(queries), block):
        part = torch.nn.functional.normalize(queries[start : start + block], dim=1)
        similarity = (bank.reshape(-1, width) @ part.T).view(num, n, -1).transpose(1, 2)  # (E, q, n)
        similarity = similarity.masked_fill(empty, -torch.inf)
        if k is not None and k < n:
            order = similarity.argsort(stable=True, dim=2, descending=True)
            similarity = similarity.scatter(2, order[..., k:], -torch.inf)
        result[:, start : start + block] = (similarity / temperature).softmax(2) @ member
    return result if num_classes else result[..., 1].T
