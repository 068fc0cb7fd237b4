"""ML-kNN against the formulas of its paper, counted row by row."""

import numpy as np
import pytest

from featstore.errors import ConfigError, TaskError
from probes.mlknn import MLKNN
from probes.neighbours import unit_rows


def example(num_rows: int = 70, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    X = random.standard_normal((num_rows, 6)).astype(np.float32)
    y = (X[:, :3] + random.standard_normal((num_rows, 3)) > 0.7).astype(int)
    return X, y, random.standard_normal((20, 6)).astype(np.float32)


def nearest(bank: np.ndarray, query: np.ndarray, k: int, without: int = -1) -> list[int]:
    similarity = unit_rows(bank).astype(float) @ unit_rows(query[None])[0].astype(float)
    return [int(row) for row in np.argsort(-similarity, kind="stable") if row != without][:k]


def posterior(
    X: np.ndarray, y: np.ndarray, mask: np.ndarray, queries: np.ndarray, k: int, s: float, include_self: bool
) -> np.ndarray:
    """Loops over labels, rows and queries, with the paper's names."""
    result = np.zeros((len(queries), y.shape[1]))
    y = y * mask
    for label in range(y.shape[1]):
        known = mask[:, label]
        prior = (s + y[:, label].sum()) / (2 * s + known.sum())
        c = {0: np.zeros(k + 1), 1: np.zeros(k + 1)}
        for row in range(len(X)):
            if known[row]:
                delta = y[nearest(X, X[row], k, -1 if include_self else row), label].sum()
                c[y[row, label]][delta] += 1
        likelihood = {b: (s + c[b]) / (s * (k + 1) + c[b].sum()) for b in (0, 1)}
        for number, query in enumerate(queries):
            delta = y[nearest(X, query, k), label].sum()
            yes, no = prior * likelihood[1][delta], (1 - prior) * likelihood[0][delta]
            result[number, label] = yes / (yes + no)
    return result


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_posteriors_equal_the_paper(include_self: bool, backend: str) -> None:
    X, y, queries = example()
    everything = np.ones(y.shape, dtype=bool)
    for smoothing in (1.0, 0.3):
        probe = MLKNN(k=(3, 12, 69), smoothing=smoothing, include_self=include_self, backend=backend)  # type: ignore[arg-type]
        for k, scores in probe.fit(X, y).scores(queries).items():
            expected = posterior(X, y, everything, queries, k, smoothing, include_self)
            np.testing.assert_allclose(scores, expected, rtol=1e-12)
    assert probe.choose(12).predict(queries).tolist() == (probe.scores(queries)[12] > 0.5).astype(int).tolist()


def test_masked_labels_leave_prior_and_counts() -> None:
    X, y, queries = example()
    mask = np.random.default_rng(5).random(y.shape) < 0.7
    mask[:, 0] = True
    found = MLKNN(k=5).fit(X, np.where(mask, y, -1), mask)
    np.testing.assert_allclose(found.scores(queries)[5], posterior(X, y, mask, queries, 5, 1.0, False), rtol=1e-12)


def test_equal_rows_are_neighbours_of_each_other() -> None:
    """A row is told from its copy by its number: without itself it still has the copy, which comes first."""
    X, y, _ = example(30)
    X, y = np.vstack([X, X]), np.vstack([y, y])
    found = MLKNN(k=1).fit(X, y)
    counts = found.likelihood_[1] * (2 + np.stack([60 - y.sum(0), y.sum(0)])[:, :, None]) - 1
    np.testing.assert_allclose(counts[1, :, 1], y.sum(0))  # each positive has one positive neighbour: its copy
    np.testing.assert_allclose(counts[0, :, 0], 60 - y.sum(0))


def test_what_is_refused() -> None:
    X, y, _ = example()
    with pytest.raises(ConfigError, match=r"smoothing must be above 0, got 0\.0"):
        MLKNN(smoothing=0.0).fit(X, y)
    with pytest.raises(ConfigError, match="k=70 neighbours asked of a bank with 69 rows beside the row itself"):
        MLKNN(k=70).fit(X, y)
    assert MLKNN(k=70, include_self=True).fit(X, y).ks_ == (70,)
    with pytest.raises(ConfigError, match="neighbours beside the row itself asked of a bank with one row"):
        MLKNN().fit(X[:1], y[:1])
    with pytest.raises(TaskError, match="multilabel labels of 70 rows have 2 axes"):
        MLKNN(k=3).fit(X, y[:, 0])
    with pytest.raises(TaskError, match="requires y to be passed"):
        MLKNN(k=3).fit(X, None)
