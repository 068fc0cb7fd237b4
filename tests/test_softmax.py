"""Softmax problems at weak penalties against scikit-learn's optimum, computed by Newton's method in float64."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from probes import softmax, solver
from probes.logistic import DEFAULT_C, LogisticProbe
from probes.objectives import Rows, SoftmaxProblems
from probes.workers import worker_threads

WEAK = (1.0, 1e2, 1e3, 1e4, 1e5)


def excess(probe: LogisticProbe, X: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Largest objective of the probe above scikit-learn's, relatively; checks what the probe says about itself, too."""
    Z = (X.astype(np.float64) - probe.mean_) / probe.scale_
    weights = np.ones(len(y)) if weights is None else weights
    worst = -np.inf
    assert probe.converged_.all()
    for number, C in enumerate(probe.C_):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may stop short, and says so
            model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-8, max_iter=500).fit(Z, y, weights)
        pairs = ((probe.coef_[number], probe.intercept_[number]), (model.coef_.T, model.intercept_))
        ours, best = (
            float(0.5 * np.square(coef).sum() - C * weights @ log_softmax(Z @ coef + b, axis=1)[np.arange(len(y)), y])
            for coef, b in pairs
        )
        assert probe.objective_[number, 0] == pytest.approx(ours, rel=1e-9)
        worst = max(worst, ours / best - 1)
    return worst


def rounded_number(num_rows: int, width: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Features that tell a number in part, and the number rounded: many classes, the outer ones with one row."""
    random = np.random.default_rng(0)
    X = random.standard_normal((num_rows, width))
    value = X @ random.standard_normal(width) / np.sqrt(width) + 0.7 * random.standard_normal(num_rows)
    y = np.unique(np.round(most / 6 * value), return_inverse=True)[1]
    return (X * np.arange(1, width + 1) ** -0.5 + 3).astype(np.float32), y


def clusters(num_rows: int, width: int, num_classes: int, distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Classes around means, from overlapping to separable."""
    random = np.random.default_rng(1)
    y = np.arange(num_rows) % num_classes
    return distance * random.standard_normal((num_classes, width))[y] + random.standard_normal((num_rows, width)), y


def at_every_size(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """`batch`: in a batch first, as at large sizes; `blocks`: blocks over the first few coordinates, made early."""
    if way == "batch":
        monkeypatch.setattr(solver, "DIRECT", 0)
    if way == "blocks":
        monkeypatch.setattr(softmax, "LEADING", (4, 6))
        monkeypatch.setattr(softmax, "CALLS", 0)


@pytest.mark.parametrize("way", ["direct", "batch", "blocks"])
def test_many_classes_at_weak_penalties(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    at_every_size(monkeypatch, way)
    X, y = rounded_number(120, 8, 48)
    counts = np.bincount(y)
    assert len(counts) > 30
    assert counts.min() == 1
    assert excess(LogisticProbe(C=WEAK).fit(X, y, kind="multiclass"), X, y) < 1e-7


@pytest.mark.parametrize("way", ["direct", "batch", "blocks"])
@pytest.mark.parametrize("distance", [0.5, 1.5, 4.0])
def test_from_overlapping_to_separable(monkeypatch: pytest.MonkeyPatch, way: str, distance: float) -> None:
    at_every_size(monkeypatch, way)
    X, y = clusters(120, 10, 5, distance)
    assert excess(LogisticProbe(C=WEAK).fit(X, y, kind="multiclass"), X, y) < 1e-7
    # Without milder neighbours to start from.
    alone = LogisticProbe(C=1e5).fit(X, y, kind="multiclass")
    assert excess(alone, X, y) < 1e-7


@pytest.mark.parametrize(("num_rows", "width"), [(200, 1), (30, 50), (9, 3)])
def test_shapes(num_rows: int, width: int) -> None:
    """One column, fewer rows than columns, and about as many classes as rows."""
    X, _ = clusters(num_rows, width, 3, 1.0)
    y = np.random.default_rng(2).permutation(np.arange(num_rows) % 7)
    assert excess(LogisticProbe(C=WEAK).fit(X, y, kind="multiclass"), X, y) < 1e-7


def test_equal_and_constant_columns() -> None:
    X, y = clusters(100, 4, 4, 1.0)
    X = np.hstack([X, X[:, :2], np.ones((100, 1))])
    probe = LogisticProbe(C=WEAK).fit(X, y, kind="multiclass")
    assert excess(probe, X, y) < 1e-7
    np.testing.assert_allclose(probe.coef_[:, :2], probe.coef_[:, 4:6], rtol=1e-6, atol=1e-8)


def test_one_row_of_a_class_and_weights_of_rows() -> None:
    X, y = clusters(80, 5, 3, 1.0)
    y[y == 2] = 1
    y[7] = 2
    weights = np.random.default_rng(3).uniform(0.2, 3, 80)
    probe = LogisticProbe(C=WEAK).fit(X, y, kind="multiclass", sample_weight=weights)
    assert excess(probe, X, y, weights) < 1e-7


def test_two_classes_as_a_softmax_are_the_binary_problem() -> None:
    """0.5 |W|^2 of two opposite rows is a quarter of |w|^2 of their difference: half the penalty, twice C."""
    X, y = clusters(90, 6, 2, 0.7)
    C = np.array(WEAK)
    with worker_threads() as workers:
        found = solver.solve_softmax(
            X, torch.from_numpy(y), torch.ones(90, dtype=torch.float64), torch.from_numpy(C), workers, standardize=True
        )
    binary = LogisticProbe(C=2 * C).fit(X, y, kind="multiclass")
    assert found.converged.all()
    np.testing.assert_allclose(found.objective[:, 0], binary.objective_[:, 0] / 2, rtol=1e-7)
    difference = found.coef[:, :, 1] - found.coef[:, :, 0]
    np.testing.assert_allclose(difference, binary.coef_[:, :, 0], rtol=1e-3, atol=1e-4)


def test_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "SHARED", 0)
    X, y = clusters(100, 6, 5, 1.0)
    before, coefs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            coefs.append(LogisticProbe(C=DEFAULT_C[::3]).fit(X, y, kind="multiclass").coef_)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*coefs)


@pytest.mark.parametrize(("name", "value"), [("MAX_STEPS", 2), ("MAX_PRODUCTS", 1)])
def test_what_is_not_reached_is_said(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    X, y = clusters(120, 10, 5, 1.5)
    best = LogisticProbe(C=1e4).fit(X, y, kind="multiclass").objective_[0, 0]
    monkeypatch.setattr(softmax, name, value)
    probe = LogisticProbe(C=1e4).fit(X, y, kind="multiclass")
    assert probe.objective_[0, 0] >= best * (1 + (1e-3 if name == "MAX_STEPS" else 0))
    assert probe.status_.tolist() == [["iteration limit"]]


def test_problems_too_large_for_the_arrays_of_one_are_left_to_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = clusters(120, 10, 5, 1.0)
    with worker_threads() as workers:
        rows = Rows(torch.from_numpy(X), workers)
        problems = SoftmaxProblems(rows, torch.from_numpy(y), torch.ones(120).double(), torch.ones(1).double(), 5)
        assert softmax.fits(problems)
        for name in ("LOGITS", "DESIGN"):
            with monkeypatch.context() as limited:
                limited.setattr(softmax, name, 599)
                assert not softmax.fits(problems)
    monkeypatch.setattr(softmax, "LOGITS", 0)
    assert excess(LogisticProbe(C=WEAK[:3]).fit(X, y, kind="multiclass"), X, y) < 1e-6
