"""One strength at a time, by conjugate gradients: the optimum of scikit-learn's newton-cholesky in float64."""

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from probes import descent, solver
from probes.logistic import LogisticProbe


def problem(num_rows: int, width: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated float32 columns away from zero, and a label with a share of positives."""
    random = np.random.default_rng(seed)
    latent = random.standard_normal((num_rows, 40))
    mixing = random.standard_normal((40, width)) * np.arange(1, 41)[:, None] ** -0.5
    X = latent @ mixing + 0.3 * random.standard_normal((num_rows, width)) + 3
    score = latent[:, :5].sum(1) + random.standard_normal(num_rows)
    y = score > np.quantile(score, 1 - share)
    return X.astype(np.float32), y.astype(np.int64)[:, None]


def gap(probe: LogisticProbe, X: np.ndarray, y: np.ndarray, C: float) -> float:
    """Objective above newton-cholesky's, relative."""
    Z = (X.astype(np.float64) - probe.mean_) / probe.scale_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-8, max_iter=500).fit(Z, y[:, 0])

    def objective(w: np.ndarray, b: float) -> float:
        return float(w @ w / 2 + C * np.logaddexp(0, (1 - 2 * y[:, 0]) * (Z @ w + b)).sum())

    reached = objective(probe.coef_[0, :, 0], float(probe.intercept_[0, 0]))
    assert probe.objective_[0, 0] == pytest.approx(reached, rel=1e-6)
    return reached / objective(best.coef_[0], float(best.intercept_[0])) - 1


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "width", "share", "C"),
    [
        (100, 300, 0.1, 1.0),  # the rows' own span
        (400, 20, 0.3, 1.0),  # dense steps alone
        (400, 20, 0.3, 1e5),
        (300, 200, 0.05, 1.0),
        (900, 200, 0.4, 1e-4),
        (900, 200, 0.4, 1.0),
        (900, 200, 0.02, 1e5),  # separable
        (6000, 200, 0.4, 1.0),  # several pieces for the threads
    ],
)
def test_the_optimum_is_reached(
    num_rows: int, width: int, share: float, C: float, standardize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the way of many problems was taken")

    monkeypatch.setattr(solver, "_solve_newton", refuse)
    monkeypatch.setattr(solver, "eigenbasis", refuse)
    X, y = problem(num_rows, width, share)
    probe = LogisticProbe(C=C, standardize=standardize).fit(X, y, kind="multilabel")
    assert probe.converged_.all()
    assert gap(probe, X, y, C) < 1e-6


def test_what_is_not_reached_goes_the_way_of_many_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent, "MAX_STEPS", 1)
    X, y = problem(300, 200, 0.3)
    probe = LogisticProbe(C=1.0).fit(X, y, kind="multilabel")
    assert probe.converged_.all()
    assert gap(probe, X, y, 1.0) < 1e-6


def test_masked_rows_count_for_nothing() -> None:
    X, y = problem(400, 200, 0.3)
    mask = np.ones(y.shape, dtype=bool)
    mask[300:] = False
    some = LogisticProbe(C=1.0, standardize=False).fit(X, y, mask, kind="multilabel")
    part = LogisticProbe(C=1.0, standardize=False).fit(X[:300], y[:300], kind="multilabel")
    np.testing.assert_allclose(some.coef_, part.coef_, atol=2e-3 * float(np.abs(part.coef_).max()))
    assert float(some.objective_[0, 0]) == pytest.approx(float(part.objective_[0, 0]), rel=1e-6)
