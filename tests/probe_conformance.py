"""What holds for every probe on features: plain functions over a case that says how one is made, fitted and asked."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest

from featstore.errors import TaskError
from probes.attentive import AttentiveProbe
from probes.knn import KNNProbe
from probes.logistic import LogisticProbe
from probes.metrics import auroc
from probes.mil import MILProbe
from probes.mlp import MLPProbe
from probes.trained_config import MilConfig
from probes.training import Recipe


@dataclass(frozen=True)
class Case:
    """`fit(probe, X, y, mask)` on labels (N, L); `predict(probe, X)` gives probabilities (N, L)."""

    make: Callable[[], Any]
    fit: Callable[..., Any]
    predict: Callable[[Any, np.ndarray], np.ndarray]
    tolerance: float


def fit_logistic(probe: LogisticProbe, X: np.ndarray, y: np.ndarray, mask: np.ndarray | None = None) -> LogisticProbe:
    return probe.fit(X, y, mask, kind="multilabel")


def fit_knn(probe: KNNProbe, X: np.ndarray, y: np.ndarray, mask: np.ndarray | None = None) -> KNNProbe:
    return probe.fit(X, y, mask)


def predict_logistic(probe: LogisticProbe, X: np.ndarray) -> np.ndarray:
    return probe.probabilities(X, 0)


# One batch holds all rows: then their order changes only that of sums.
RECIPE = Recipe(lr=(0.02,), epochs=10, batch=1024)


def fit_mlp(probe: MLPProbe, X: np.ndarray, y: np.ndarray, mask: np.ndarray | None = None) -> MLPProbe:
    return probe.fit(X, y, mask, kind="multilabel")


def tokens(X: np.ndarray) -> np.ndarray:
    """Two tokens of each row."""
    return np.stack([X, X**2], 1)


def fit_attentive(
    probe: AttentiveProbe, X: np.ndarray, y: np.ndarray, mask: np.ndarray | None = None
) -> AttentiveProbe:
    return probe.fit(tokens(X), y, mask, kind="multilabel")


def predict_attentive(probe: AttentiveProbe, X: np.ndarray) -> np.ndarray:
    return probe.predict_proba(tokens(X))


def fit_mil(probe: MILProbe, X: np.ndarray, y: np.ndarray, mask: np.ndarray | None = None) -> MILProbe:
    return probe.fit(X, np.arange(len(X)), y, mask, kind="multilabel")


def predict_mil(probe: MILProbe, X: np.ndarray) -> np.ndarray:
    return probe.predict_proba(X, np.arange(len(X)))


CASES = {
    "mlp": Case(lambda: MLPProbe(RECIPE, hidden=8, dropout=0.0), fit_mlp, MLPProbe.predict_proba, 1e-4),
    "attentive": Case(lambda: AttentiveProbe(RECIPE), fit_attentive, predict_attentive, 1e-4),
    **{
        f"mil-{pooling}": Case(
            partial(MILProbe, RECIPE, MilConfig(pooling=pooling, project=6, dropout=0.0)), fit_mil, predict_mil, 1e-4
        )
        for pooling in ("abmil", "mean", "max")
    },
    "logistic": Case(lambda: LogisticProbe(C=0.1), fit_logistic, predict_logistic, 1e-4),
    "logistic-balanced": Case(
        lambda: LogisticProbe(C=1.0, standardize=False, class_weight="balanced"), fit_logistic, predict_logistic, 1e-4
    ),
    "knn-faiss": Case(lambda: KNNProbe(k=15, backend="faiss"), fit_knn, KNNProbe.predict_proba, 1e-4),
    "knn-torch": Case(lambda: KNNProbe(k=15, backend="torch"), fit_knn, KNNProbe.predict_proba, 1e-4),
}


def example(seed: int = 0, num_rows: int = 120, width: int = 9) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(X, y, queries) with two labels that the features tell."""
    random = np.random.default_rng(seed)
    X = random.standard_normal((num_rows, width)).astype(np.float32)
    y = (X[:, :2] + 0.5 * random.standard_normal((num_rows, 2)) > 0).astype(np.int8)
    return X, y, random.standard_normal((30, width)).astype(np.float32)


def check_fit_twice_is_fit_once(case: Case) -> None:
    """Nothing of an earlier fit remains, and fitting is deterministic to the bit."""
    X, y, queries = example()
    other_X, other_y, _ = example(seed=1, num_rows=50, width=4)
    once = case.predict(case.fit(case.make(), X, y), queries)
    probe = case.fit(case.make(), other_X, other_y)
    twice = case.predict(case.fit(probe, X, y), queries)
    np.testing.assert_array_equal(once, twice)


def check_row_order_does_not_matter(case: Case) -> None:
    X, y, queries = example()
    order = np.random.default_rng(2).permutation(len(X))
    expected = case.predict(case.fit(case.make(), X, y), queries)
    moved = case.predict(case.fit(case.make(), X[order], y[order]), queries)
    np.testing.assert_allclose(moved, expected, atol=case.tolerance)


def check_query_batches_do_not_matter(case: Case) -> None:
    X, y, queries = example()
    probe = case.fit(case.make(), X, y)
    whole = case.predict(probe, queries)
    parts = [case.predict(probe, part) for part in (queries[:0], queries[:1], queries[1:18], queries[18:])]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=case.tolerance)


def check_clear_error_on_width_mismatch(case: Case) -> None:
    X, y, queries = example()
    probe = case.fit(case.make(), X, y)
    with pytest.raises(TaskError, match="features have 8 columns, the probe was fitted on 9"):
        case.predict(probe, queries[:, 1:])


def check_clear_error_on_nan(case: Case) -> None:
    X, y, queries = example()
    probe = case.fit(case.make(), X, y)
    for bad in (np.nan, np.inf):
        X[7, 3] = queries[5, 0] = bad
        with pytest.raises(TaskError, match="features must be finite; row 7 holds NaN or infinity"):
            case.fit(case.make(), X, y)
        with pytest.raises(TaskError, match="features must be finite; row 5 holds NaN or infinity"):
            case.predict(probe, queries)


def check_clear_error_before_fit(case: Case) -> None:
    with pytest.raises(TaskError, match="not fitted yet; call fit first"):
        case.predict(case.make(), example()[2])


def check_clear_error_without_labelled_rows(case: Case) -> None:
    X, y, _ = example()
    with pytest.raises(TaskError, match=r"no labelled row to .* among 120"):
        case.fit(case.make(), X, y, np.zeros(y.shape, dtype=bool))
    with pytest.raises(TaskError, match=r"no labelled row to .* among 0"):
        case.fit(case.make(), X[:0], y[:0])


def check_rotation_invariance(case: Case) -> None:
    """Holds where no column is scaled on its own."""
    X, y, queries = example()
    rotation = np.linalg.qr(np.random.default_rng(3).standard_normal((9, 9)))[0].astype(np.float32)
    expected = case.predict(case.fit(case.make(), X, y), queries)
    turned = case.predict(case.fit(case.make(), X @ rotation, y), queries @ rotation)
    np.testing.assert_allclose(turned, expected, atol=case.tolerance)


def check_masked_rows_do_not_matter(case: Case) -> None:
    """Rows without a valid label may hold anything, NaN too; masked labels may hold anything."""
    X, y, queries = example()
    random = np.random.default_rng(4)
    mask = random.random(y.shape) < 0.7
    mask[:20] = False
    dirty_X, dirty_y = X.copy(), np.where(mask, y, -1).astype(np.int8)
    dirty_X[:20] = np.nan
    kept = mask.any(1)
    expected = case.predict(case.fit(case.make(), X[kept], y[kept], mask[kept]), queries)
    np.testing.assert_array_equal(case.predict(case.fit(case.make(), dirty_X, dirty_y, mask), queries), expected)


def check_random_labels_give_chance(case: Case) -> None:
    """Mean test AUROC over seeds lies within three standard errors of one half."""
    areas = []
    for seed in range(20):
        random = np.random.default_rng(100 + seed)
        X, queries = (random.standard_normal((size, 6)).astype(np.float32) for size in (80, 200))
        y, true = (random.integers(0, 2, (size, 2)) for size in (80, 200))
        scores = case.predict(case.fit(case.make(), X, y), queries)
        areas.append(np.mean([auroc(true[:, label], scores[:, label]) for label in range(2)]))
    assert abs(np.mean(areas) - 0.5) <= 3 * np.std(areas, ddof=1) / np.sqrt(len(areas))


CHECKS = (
    check_fit_twice_is_fit_once,
    check_row_order_does_not_matter,
    check_query_batches_do_not_matter,
    check_clear_error_on_width_mismatch,
    check_clear_error_on_nan,
    check_clear_error_before_fit,
    check_clear_error_without_labelled_rows,
    check_masked_rows_do_not_matter,
    check_random_labels_give_chance,
)
