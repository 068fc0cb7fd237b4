"""What the probes are measured against: scikit-learn's loops, and DINO's heads and vote written again."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from probes.draws import Draws
from probes.shots import Shots

VOTE_COUNTS = (10, 20, 100, 200)
MAX_ITERATIONS = 1000  # of scikit-learn's lbfgs, as DINOv2's and DINOv3's protocols have it


def one_thread(call: Callable[[], object]) -> object:
    """A call with one thread in BLAS, OpenMP and torch."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            return call()
    finally:
        torch.set_num_threads(count)


def logistic(X: np.ndarray, y: np.ndarray, C: float) -> LogisticRegression:
    """lbfgs at scikit-learn's default tolerance, on float32."""
    return LogisticRegression(C=C, max_iter=MAX_ITERATIONS).fit(X, y)


def scaled_logistic(X: np.ndarray, y: np.ndarray, C: float) -> LogisticRegression:
    """The same on features standardised first, as ours does within its fit."""
    return logistic(StandardScaler().fit_transform(X), y, C)


def objective(model: LogisticRegression, X: np.ndarray, y: np.ndarray, C: float) -> float:
    """What both minimise, at scikit-learn's weights, in float64."""
    w = model.coef_[0].astype(np.float64)
    logits = X.astype(np.float64) @ w + float(model.intercept_[0])
    return float(w @ w / 2 + C * np.logaddexp(0, (1 - 2 * y) * logits).sum())


def few_shot_loop(X: np.ndarray, queries: np.ndarray | None, shots: Shots, jobs: Sequence[tuple[int, float]]) -> None:
    """One fit per (draw, C), with the scores of the queries."""
    for draw, C in jobs:
        model = logistic(X[shots.rows[draw]], shots.y[draw], C)
        if queries is not None:
            model.decision_function(queries)


def bootstrap_loop(y: np.ndarray, scores: np.ndarray, groups: np.ndarray, resamples: int) -> np.ndarray:
    """AUROC of every label on the repeated rows of the first resamples of the same table."""
    draws = Draws.of(groups, num_resamples=resamples, seed=0)
    columns = draws.columns(groups)
    found = np.full((resamples, y.shape[1]), np.nan)
    for number, counts in enumerate(draws.counts):
        rows = np.repeat(np.arange(len(y)), counts[columns])
        for label in range(y.shape[1]):
            if 0 < y[rows, label].sum() < len(rows):
                found[number, label] = roc_auc_score(y[rows, label], scores[rows, label])
    return found


def brute_neighbours(bank: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Index and search; of unit rows the Euclidean order, its fastest, is that of the cosine."""
    found = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="euclidean").fit(bank)
    return np.asarray(found.kneighbors(queries, return_distance=False))


def product_and_topk(bank: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """DINO's search: a product with the whole bank and a partial sort, 256 queries at a time."""
    rows, asked = torch.from_numpy(bank), torch.from_numpy(queries)
    return np.concatenate([(part @ rows.T).topk(k).indices.numpy() for part in asked.split(256)])


def dino_vote(similarity: torch.Tensor, labels: torch.Tensor, num_classes: int) -> list[torch.Tensor]:
    """The published vote: softmax over all neighbours, one-hot times weight, sum over the first k."""
    weights = torch.softmax(similarity / 0.07, 1)
    votes = torch.nn.functional.one_hot(labels, num_classes) * weights[:, :, None]
    return [votes[:, :k].sum(1) for k in VOTE_COUNTS]


def dino_heads(X: torch.Tensor, y: torch.Tensor, rates: Sequence[float], batch: int, steps: int) -> None:
    """DINOv2's linear evaluation on cached features: a linear layer for each learning rate, autograd on the sum of
    their losses, SGD with momentum in one group a layer, a cosine schedule."""
    torch.manual_seed(0)
    heads = torch.nn.ModuleDict({f"head {n}": torch.nn.Linear(X.shape[1], y.shape[1]) for n in range(len(rates))})
    for head in heads.values():
        assert isinstance(head, torch.nn.Linear)
        head.weight.data.normal_(mean=0.0, std=0.01)
        head.bias.data.zero_()
    groups: list[Any] = [{"params": head.parameters(), "lr": rate} for head, rate in zip(heads.values(), rates)]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
    order = np.random.default_rng(0).permutation(len(X))
    for step in range(steps):
        rows = torch.from_numpy(order.take(np.arange(step * batch, (step + 1) * batch), mode="wrap"))
        features, target = X[rows], y[rows]
        outputs = {name: head(features) for name, head in heads.items()}
        losses = [torch.nn.functional.binary_cross_entropy_with_logits(out, target) for out in outputs.values()]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()


def ridge_loop(X: np.ndarray, targets: np.ndarray, alphas: Sequence[float]) -> None:
    """All targets at once for one strength after the other."""
    for alpha in alphas:
        Ridge(alpha=alpha, solver="cholesky").fit(X, targets)
