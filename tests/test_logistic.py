"""Logistic regression against scikit-learn's optimum, computed by Newton's method in float64."""

import csv
import inspect
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import probe_conformance as conformance
import pytest
import torch
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from featstore.errors import ConfigError, TaskError
from probes import polish, solver
from probes.logistic import DEFAULT_C, LogisticProbe, choose
from probes.metrics import evaluate
from probes.objectives import BinaryProblems, Objective, Rows, SoftmaxProblems, hessian
from probes.workers import worker_threads


@pytest.mark.parametrize("check", conformance.CHECKS)
@pytest.mark.parametrize("case", ["logistic", "logistic-balanced"])
def test_conformance(check: Callable[[conformance.Case], None], case: str) -> None:
    check(conformance.CASES[case])


def test_rotation_does_not_matter_without_standardisation() -> None:
    conformance.check_rotation_invariance(conformance.CASES["logistic-balanced"])


def reference(X: np.ndarray, y: np.ndarray, C: float, class_weight: Any = None) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at weak penalties it may stop short, and says so
        model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-8, max_iter=500, class_weight=class_weight)
        return model.fit(X.astype(np.float64), y)


def objective(X: np.ndarray, y: np.ndarray, coef: np.ndarray, intercept: np.ndarray, C: float, balanced: bool) -> float:
    """scikit-learn's objective in float64; coef (D, K), K = 1 for binary."""
    logits = X.astype(np.float64) @ coef + intercept
    if logits.shape[1] == 1:
        logits = np.hstack([np.zeros_like(logits), logits])
    loss = -log_softmax(logits, axis=1)[np.arange(len(y)), y]
    weights = (len(y) / (len(np.unique(y)) * np.bincount(y)))[y] if balanced else np.ones(len(y))
    return float(0.5 * np.square(coef).sum() + C * (weights * loss).sum())


def excess(probe: LogisticProbe, number: int, X: np.ndarray, y: np.ndarray, label: int | None = None) -> float:
    """Relative objective above scikit-learn's; also checks what the probe says about itself."""
    C, balanced = float(probe.C_[number]), probe.class_weight == "balanced"
    columns = slice(None) if label is None else slice(label, label + 1)
    family = 0 if label is None else label
    X = (X.astype(np.float64) - probe.mean_) / probe.scale_
    ours = objective(X, y, probe.coef_[number][:, columns], probe.intercept_[number, columns], C, balanced)
    model = reference(X, y, C, probe.class_weight)
    best = objective(X, y, model.coef_.T, model.intercept_, C, balanced)
    assert probe.converged_[number, family]
    assert probe.status_[number, family] == "converged"
    assert probe.objective_[number, family] == pytest.approx(ours, rel=1e-6)
    return (ours - best) / best


def labels_of(X: np.ndarray, prevalence: tuple[float, ...], seed: int, noise: float = 1.0) -> np.ndarray:
    """Labels that a few directions tell, with given shares of positives."""
    random = np.random.default_rng(seed)
    signal = X @ random.standard_normal((X.shape[1], len(prevalence))) / np.sqrt(X.shape[1])
    signal += noise * random.standard_normal(signal.shape)
    return np.stack([column > np.quantile(column, 1 - share) for column, share in zip(signal.T, prevalence)], 1).astype(
        int
    )


def features(num_rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Correlated columns of different scale, far from zero."""
    random = np.random.default_rng(seed)
    factors = random.standard_normal((num_rows, max(width // 3, 1))) @ random.standard_normal(
        (max(width // 3, 1), width)
    )
    scale = np.exp(random.standard_normal(width))
    return ((factors + random.standard_normal((num_rows, width)) + 5) * scale).astype(np.float32)


def in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems go the way of large ones."""
    monkeypatch.setattr(solver, "is_cheaper", lambda *_: False)
    monkeypatch.setattr(solver, "newton_is_cheaper", lambda *_: False)


GRID = (1e-6, 1e-3, 0.1, 1.0, 30.0, 1e3, 1e5)


@pytest.mark.parametrize(
    ("num_rows", "width", "noise"), [(400, 6, 1.0), (301, 40, 0.5), (60, 90, 1.0), (50, 1, 1.0), (9, 200, 0.1)]
)
@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize("standardize", [True, False])
def test_binary_optimum(num_rows: int, width: int, noise: float, class_weight: Any, standardize: bool) -> None:
    X = features(num_rows, width)
    y = labels_of(X, (0.5, 0.12), seed=num_rows, noise=noise)
    probe = LogisticProbe(C=GRID, class_weight=class_weight, standardize=standardize).fit(X, y, kind="multilabel")
    assert probe.coef_.shape == (7, width, 2)
    assert probe.intercept_.shape == probe.converged_.shape == (7, 2)
    for number in (0, 2, 3, 4, 6):
        for label in range(2):
            assert excess(probe, number, X, y[:, label], label) < 1e-6


def test_standardisation_is_standard_scalers() -> None:
    X = features(80, 5).astype(np.float64)
    X[:, 2] = 0.1
    y = labels_of(X, (0.4,), seed=0)
    probe = LogisticProbe(C=1.0).fit(X, y, kind="multilabel")
    scaler = StandardScaler().fit(X)
    np.testing.assert_allclose(probe.mean_, scaler.mean_, rtol=1e-12)
    np.testing.assert_allclose(probe.scale_, scaler.scale_, rtol=1e-12)
    assert probe.scale_[2] == 1
    model = reference(scaler.transform(X), y[:, 0], 1.0)
    np.testing.assert_allclose(probe.coef_[0, :, 0], model.coef_[0], atol=1e-3)
    np.testing.assert_allclose(probe.intercept_[0], model.intercept_, atol=1e-3)
    np.testing.assert_allclose(probe.decision(X)[0, :, 0], model.decision_function(scaler.transform(X)), atol=2e-3)
    np.testing.assert_allclose(
        probe.probabilities(X, 0)[:, 0], model.predict_proba(scaler.transform(X))[:, 1], atol=5e-4
    )


@pytest.mark.parametrize("num_positives", [1, 3])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_rare_positives(num_positives: int, class_weight: Any) -> None:
    X = features(200, 30)
    y = np.zeros((200, 1), int)
    y[:num_positives] = 1
    probe = LogisticProbe(C=GRID, class_weight=class_weight).fit(X, y, kind="multilabel")
    for number in range(5):
        assert excess(probe, number, X, y[:, 0], 0) < 1e-6
    assert probe.converged_.all()


def test_masked_rows_have_no_weight() -> None:
    """Each label equals a fit on its own rows, standardised as all rows are; balanced weights count its own rows."""
    X = features(300, 12)
    y = labels_of(X, (0.3, 0.2, 0.6), seed=1)
    mask = np.random.default_rng(0).random((300, 3)) < (0.9, 0.3, 0.6)
    mask[~mask.any(1), 0] = True
    for class_weight in (None, "balanced"):
        probe = LogisticProbe(C=(1e-2, 1.0, 1e2), class_weight=class_weight).fit(X, y, mask, kind="multilabel")
        for label in range(3):
            rows = mask[:, label]
            for number in range(3):
                assert excess(probe, number, X[rows], y[rows, label], label) < 1e-6


@pytest.mark.parametrize(("num_rows", "width", "num_classes"), [(300, 8, 3), (200, 30, 6), (40, 60, 4)])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_softmax_optimum(num_rows: int, width: int, num_classes: int, class_weight: Any) -> None:
    X = features(num_rows, width)
    random = np.random.default_rng(1)
    signal = X @ random.standard_normal((width, num_classes)) / np.abs(X).mean() + 4 * random.standard_normal(
        (num_rows, num_classes)
    )
    y = signal.argmax(1)
    y[:num_classes] = np.arange(num_classes)
    probe = LogisticProbe(C=(1e-6, 1e-2, 1.0, 1e2, 1e5), class_weight=class_weight).fit(X, y, kind="multiclass")
    assert probe.coef_.shape == (5, width, num_classes)
    assert probe.converged_.shape == (5, 1)
    for number in range(5):
        assert excess(probe, number, X, y) < 1e-6
    scaled = (X.astype(np.float64) - probe.mean_) / probe.scale_
    expected = reference(scaled, y, 1.0, class_weight).predict_proba(scaled)
    np.testing.assert_allclose(probe.probabilities(X, 2), expected, atol=2e-3)


def test_two_classes_are_one_binary_problem() -> None:
    X = features(100, 7)
    y = labels_of(X, (0.4,), seed=2)
    classes = LogisticProbe(C=(0.1, 1.0)).fit(X, y[:, 0], kind="multiclass")
    label = LogisticProbe(C=(0.1, 1.0)).fit(X, y, kind="multilabel")
    np.testing.assert_array_equal(classes.coef_, label.coef_)
    probability = label.probabilities(X, 1)
    np.testing.assert_array_equal(classes.probabilities(X, 1), np.hstack([1 - probability, probability]))


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_digits_at_every_strength(every: int) -> None:
    """450 separable binary problems and a softmax; the default grid of 45 strengths or a part of it, all solved."""
    X, y = load_digits(return_X_y=True)
    one_hot = (y[:, None] == np.arange(10)).astype(int)
    np.testing.assert_allclose(DEFAULT_C, 10 ** np.linspace(-6, 5, 45))
    probe = LogisticProbe(C=DEFAULT_C[::every]).fit(X, one_hot, kind="multilabel")
    assert probe.converged_.all()
    for number in (0, 20, 32, 36):
        assert excess(probe, number // every, X, one_hot[:, 8], 8) < 1e-6
    softmax = LogisticProbe(C=DEFAULT_C[::8]).fit(X, y, kind="multiclass")
    assert softmax.converged_.all()
    assert excess(softmax, 2, X, y) < 1e-6


def sparse_features(num_rows: int, width: int, seed: int) -> np.ndarray:
    """Mostly zero, with heavy tails: single rows rule the curvature until they are certain."""
    random = np.random.default_rng(seed)
    return np.abs(random.standard_normal((num_rows, width))) ** 3 * (random.random((num_rows, width)) < 0.2)


@pytest.mark.parametrize("seed", [2, 5])
def test_outliers_do_not_hide_a_gap(seed: int) -> None:
    X = sparse_features(20, 3, seed)
    y = np.random.default_rng(seed).random(20) < 0.25
    y[:2] = [True, False]
    probe = LogisticProbe(C=(1e-5, 60.0, 400.0, 2e4)).fit(X, y[:, None].astype(int), kind="multilabel")
    for number in range(4):
        assert excess(probe, number, X, y.astype(int), 0) < 1e-6


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("certain", [False, True])
def test_hessian_equals_automatic_differentiation(num_classes: int, dtype: torch.dtype, certain: bool) -> None:
    """Also where every row is certain: a probability of almost one must not lose its distance from it."""
    random = torch.Generator().manual_seed(0)
    design = torch.randn(50, 4, generator=random, dtype=torch.float64)
    design[:, -1] = 1
    y = torch.arange(50) % num_classes
    weights = torch.rand(50, generator=random, dtype=torch.float64)
    C = torch.tensor([0.1, 1e9], dtype=torch.float64)
    W = torch.randn(1 if num_classes == 2 else num_classes, 4, generator=random, dtype=torch.float64)
    W[0, -1] += 22 * certain
    with worker_threads() as workers:
        rows = Rows(design, workers)
        problems: Objective = SoftmaxProblems(rows, y, weights, C, num_classes)
        if num_classes == 2:
            problems = BinaryProblems(rows, y[None].double(), weights[None], C)
        found = hessian(problems, W.to(dtype), 1)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        logits = design @ flat.view_as(W).T
        logits = torch.cat([torch.zeros_like(logits), logits], 1) if num_classes == 2 else logits
        terms = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        return (weights * terms).sum() / weights.sum()

    size = W.numel()
    expected: torch.Tensor = torch.autograd.functional.hessian(loss, W.flatten())  # type: ignore[no-untyped-call]
    if num_classes > 2:  # the curvature lent to a common shift of the intercepts
        expected[3::4, 3::4] += expected[3::4, 3::4].diagonal().mean()
    expected += torch.diag(1 / (1e9 * weights.sum()) * torch.tensor([1, 1, 1, 0] * (size // 4)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert (found.diagonal().max() < 1e-6) == certain


@pytest.mark.parametrize("C", [1e5, (1e4, 1e5)])
def test_separable_data_without_a_milder_neighbour(C: Any) -> None:
    X = features(120, 60)
    y = labels_of(X, (0.5, 0.1), seed=3, noise=0.0)
    probe = LogisticProbe(C=C).fit(X, y, kind="multilabel")
    assert probe.converged_.all()
    for label in range(2):
        assert excess(probe, 0, X, y[:, label], label) < 1e-5  # the reference stops on its gradient


def test_float32_path_reaches_the_same_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large problems run in float32 first, with the design in float32 only, and are checked in float64."""
    in_one_batch(monkeypatch)
    monkeypatch.setattr(solver, "SMALL", 0)
    monkeypatch.setattr("probes.eigenbasis.EXACT_BYTES", 0)
    monkeypatch.setattr("probes.eigenbasis.CHUNK", 64)
    monkeypatch.setattr("probes.objectives.BLOCK_ELEMENTS", 1 << 12)
    monkeypatch.setattr(solver, "BATCH_BYTES", 22 * 8 * 41 * 5)  # five problems at a time
    X = features(1001, 40)
    y = labels_of(X, (0.5, 0.05), seed=4, noise=0.3)
    probe = LogisticProbe(C=GRID).fit(X, y, kind="multilabel")
    for number in range(6):
        for label in range(2):
            assert excess(probe, number, X, y[:, label], label) < 1e-6


def test_wide_problems_go_without_hessians(monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_batch(monkeypatch)
    monkeypatch.setattr(polish, "MAX_WIDTH", 20)
    X = features(150, 60)
    y = labels_of(X, (0.3,), seed=5, noise=0.2)
    probe = LogisticProbe(C=(1e-2, 1.0, 30.0)).fit(X, y, kind="multilabel")
    for number in range(3):
        assert excess(probe, number, X, y[:, 0], 0) < 1e-6


def test_what_is_not_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_batch(monkeypatch)
    monkeypatch.setattr(solver, "EASY_ITERATIONS", 1)
    monkeypatch.setattr(polish, "ROUNDS", 1)
    monkeypatch.setattr(polish, "STEPS", 1)
    X = features(150, 60)
    y = labels_of(X, (0.3,), seed=5, noise=0.2)
    probe = LogisticProbe(C=1e4).fit(X, y, kind="multilabel")
    assert not probe.converged_.any()
    assert probe.status_.tolist() == [["iteration limit"]]
    assert np.isfinite(probe.coef_).all()
    assert (
        probe.objective_[0, 0]
        > LogisticProbe(C=1e4, standardize=True).fit(X, y[::-1], kind="multilabel").objective_[0, 0] * 0
    )


def test_hessians_are_shared_out_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_batch(monkeypatch)
    X = features(150, 60)
    y = labels_of(X, (0.3, 0.5, 0.2), seed=5, noise=0.2)
    expected = LogisticProbe(C=GRID).fit(X, y, kind="multilabel")
    monkeypatch.setattr(polish, "FACTOR_BYTES", 8 * 61 * 61)
    probe = LogisticProbe(C=GRID).fit(X, y, kind="multilabel")
    assert probe.converged_.all()
    np.testing.assert_allclose(probe.objective_, expected.objective_, rtol=1e-6)


def test_thread_count_changes_no_bit_and_is_given_back() -> None:
    X = features(900, 20)
    y = labels_of(X, (0.3, 0.1), seed=6)
    before, alive = torch.get_num_threads(), threading.active_count()
    coefs = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            coefs.append(LogisticProbe(C=DEFAULT_C).fit(X, y, kind="multilabel").coef_)
            assert torch.get_num_threads() == threads
        with pytest.raises(TaskError):
            LogisticProbe().fit(X * np.float32("nan"), y, kind="multilabel")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*coefs)
    assert threading.active_count() == alive


def test_labels_with_one_class() -> None:
    X = features(20, 4)
    y = np.zeros((20, 4), int)
    y[:, 1], y[:7, 3] = 1, 1
    mask = np.ones((20, 4), dtype=bool)
    mask[:, 2] = False
    probe = LogisticProbe(C=(0.1, 1.0)).fit(X, y, mask, kind="multilabel")
    np.testing.assert_array_equal(probe.one_class_, [True, True, True, False])
    assert (probe.coef_[:, :, :3] == 0).all()
    np.testing.assert_allclose(probe.intercept_[1, :3], [np.log(0.5 / 20.5), np.log(20.5 / 0.5), 0])
    assert probe.status_[0].tolist() == ["one class"] * 3 + ["converged"]
    assert np.isnan(probe.objective_[:, :3]).all()
    np.testing.assert_allclose(
        probe.probabilities(X, 0)[:, :3], np.tile([0.5 / 21, 20.5 / 21, 0.5], (20, 1)), rtol=1e-5
    )


def test_classes_without_rows_are_never_predicted() -> None:
    X = features(60, 4)
    y = np.arange(60) % 3 * 2  # classes 0, 2, 4 of 6
    probe = LogisticProbe(C=1.0).fit(X, y, kind="multiclass", num_classes=6)
    np.testing.assert_array_equal(probe.one_class_, [False, True, False, True, False, True])
    probability = probe.probabilities(X, 0)
    assert (probability[:, 1::2] == 0).all()
    compact = LogisticProbe(C=1.0).fit(X, y // 2, kind="multiclass").probabilities(X, 0)
    np.testing.assert_allclose(probability[:, ::2], compact, atol=1e-6)
    single = LogisticProbe(C=1.0).fit(X, np.full(60, 2), kind="multiclass", num_classes=4)
    assert single.status_.tolist() == [["one class"]]
    np.testing.assert_array_equal(single.probabilities(X, 0).argmax(1), 2)


def test_two_rows_one_column() -> None:
    X = np.array([[1.0], [3.0]])
    probe = LogisticProbe(C=GRID).fit(X, np.array([[0], [1]]), kind="multilabel")
    for number in range(7):
        assert excess(probe, number, X, np.array([0, 1]), 0) < 1e-6
    np.testing.assert_allclose(probe.intercept_, 0, atol=1e-6)


def test_repeated_and_constant_rows() -> None:
    """Fewer directions than rows and columns: the span has two axes."""
    X = np.repeat(features(3, 8), [5, 4, 6], axis=0)
    y = np.array([0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1])
    probe = LogisticProbe(C=(0.1, 10.0)).fit(X, y[:, None], kind="multilabel")
    for number in range(2):
        assert excess(probe, number, X, y, 0) < 1e-6
    same = LogisticProbe(C=1.0).fit(np.ones((6, 3), np.float32), y[:6, None], kind="multilabel")
    np.testing.assert_allclose(same.intercept_, np.log(y[:6].sum() / (6 - y[:6].sum())), atol=1e-6)
    assert same.converged_.all()


def test_half_precision_features_count_as_they_are() -> None:
    X = features(200, 10).astype(np.float16)
    y = labels_of(X.astype(np.float32), (0.4,), seed=7)
    half = LogisticProbe(C=1.0).fit(X, y, kind="multilabel")
    single = LogisticProbe(C=1.0).fit(X.astype(np.float32), y, kind="multilabel")
    np.testing.assert_array_equal(half.coef_, single.coef_)
    assert half.decision(X).dtype == np.float32
    np.testing.assert_allclose(half.decision(X), single.decision(X.astype(np.float64)), atol=1e-4)


def test_choice_per_label() -> None:
    X = features(60, 5)
    y = labels_of(X, (0.3, 0.5), seed=8)
    probe = LogisticProbe(C=(1e-3, 0.1, 1.0)).fit(X, y, kind="multilabel")
    logits = probe.decision(X)
    expected = 1 / (1 + np.exp(-np.stack([logits[2, :, 0], logits[0, :, 1]], 1)))
    np.testing.assert_allclose(probe.probabilities(X, np.array([2, 0])), expected, rtol=1e-4)
    np.testing.assert_array_equal(probe.probabilities(X, 1), probe.probabilities(X, np.array([1, 1])))
    with pytest.raises(ConfigError, match="got 3 choices for 2 columns"):
        probe.probabilities(X, np.array([0, 1, 2]))
    for bad in (3, -1):
        with pytest.raises(ConfigError, match=rf"a choice is a number from 0 to 2, got \[{bad}\]"):
            probe.probabilities(X, bad)
    classes = LogisticProbe(C=(1e-3, 0.1)).fit(X, np.arange(60) % 3, kind="multiclass")
    np.testing.assert_array_equal(classes.probabilities(X, np.array([1])), classes.probabilities(X, 1))
    with pytest.raises(ConfigError, match="got 3 choices for 3 columns"):
        classes.probabilities(X, np.array([0, 1, 1]))


@pytest.mark.parametrize("C", [0.0, -1.0, (), (1.0, 0.1), (1.0, 1.0), float("nan")])
def test_strengths_that_cannot_be_used(C: Any) -> None:
    with pytest.raises(ConfigError, match="C must be positive and ascending, got"):
        LogisticProbe(C=C).fit(features(4, 2), np.array([0, 1, 1, 0]))


def test_options_and_labels_that_cannot_be_used() -> None:
    X = features(4, 2)
    y = np.array([[0], [1], [1], [0]])
    with pytest.raises(ConfigError, match="class_weight is None, 'balanced', 'positives' or a weight of each class"):
        LogisticProbe().set_params(class_weight="equal").fit(X, y)
    with pytest.raises(ConfigError, match="kind is 'multilabel' or 'multiclass', got 'ranking'"):
        inspect.unwrap(LogisticProbe.fit)(LogisticProbe(), X, y, kind="ranking")
    with pytest.raises(TaskError, match=r"multilabel labels of 4 rows have 2 axes and 4 rows, got shape \(4,\)"):
        LogisticProbe().fit(X, y[:, 0], kind="multilabel")
    with pytest.raises(TaskError, match=r"labels must be 0 or 1, found \[0, 1, 2\]"):
        LogisticProbe().fit(X, y + np.array([[0], [0], [0], [2]]), kind="multilabel")
    with pytest.raises(TaskError, match="classes must be numbers from 0, found -1 to 1"):
        LogisticProbe().fit(X, np.array([0, 1, -1, 0]), kind="multiclass")


def test_choose_takes_the_best_and_the_smallest_of_ties() -> None:
    nan = np.nan
    scores = np.array(
        [
            [0.6, 0.7, 0.9, nan, 0.5],
            [0.8, 0.9, 0.1, nan, 0.7],
            [0.8, 0.8, 0.1, nan, 0.9],
        ]
    )
    choice = choose(scores, np.array([20, 10, 9, 0, 50]))
    np.testing.assert_array_equal(choice.index, [1, 1, 2, 2, 2])  # pooled mean of labels 0, 1, 4 is best at 2
    np.testing.assert_array_equal(choice.pooled, [False, False, True, True, False])
    np.testing.assert_array_equal(choice.edge, [False, False, True, True, True])


def test_choose_pools_over_all_defined_labels_where_none_has_enough() -> None:
    scores = np.array([[0.6, 0.9, np.nan], [0.7, 0.5, np.nan]])
    choice = choose(scores, np.array([3, 2, 0]))
    np.testing.assert_array_equal(choice.index, [0, 0, 0])
    assert choice.pooled.all()
    assert not choose(scores[:1], np.array([30, 2, 0])).edge.any()  # a single C has no edge
    with pytest.raises(TaskError, match="no label has both classes among the validation rows"):
        choose(scores[:, 2:], np.array([0]))


REFERENCES = [
    ("cxr", "cxr/metadata.csv", "view=AP", 0.987),
    ("cxr", "cxr/metadata.csv", "sex=F", 0.916),
    ("cxr", "cxr/metadata.csv", "No_Finding=1", 0.826),
    ("cxr", "cxr/metadata.csv", "Edema=1", 0.820),
    ("cxr", "cxr/metadata.csv", "Effusion=1", 0.688),
    ("cxr", "cxr/metadata.csv", "Cardiomegaly=1", 0.731),
    ("cxr-paed", "cxr-paed/metadata.csv", "pneumonia=1", 0.981),
    ("cxr-paed", "cxr-paed/metadata.csv", "label", 0.780),
    ("ct-head", "ct/head_metadata.csv", "hemorrhage=1", 0.851),
    ("mri-slices", "mri/slices_metadata.csv", "label", 0.843),
]


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "table", "target", "published"), REFERENCES)
def test_published_references_on_real_features(
    shared_data: Path, name: str, table: str, target: str, published: float
) -> None:
    """Standardised, balanced, C=0.01, fitted on train and val: AUROC, or balanced accuracy of several classes."""
    with (shared_data / table).open(newline="") as file:
        rows = list(csv.DictReader(file))
    stored = np.load(shared_data / "features" / f"{name}_mobilenetv2.npz")
    assert [row["path"] for row in rows] == stored["path"].tolist()
    used = np.array([row.get("source", "nih") == "nih" for row in rows])
    train, test = (used & (stored["split"] != "test"), used & (stored["split"] == "test"))
    column, equals, positive = target.partition("=")
    values = np.array([row[column] for row in rows])
    if equals:
        y, kind = (values == positive)[:, None].astype(int), "multilabel"
    else:
        y, kind = np.unique(values, return_inverse=True)[1], "multiclass"
    X = stored["features"]
    probe = LogisticProbe(C=0.01, class_weight="balanced").fit(X[train], y[train], kind=kind)  # type: ignore[arg-type]
    assert probe.converged_.all()
    result = evaluate(y[test], probe.probabilities(X[test], 0), kind=kind)["macro"]  # type: ignore[arg-type]
    assert result["auroc" if equals else "balanced_accuracy"] == pytest.approx(published, abs=0.0005 + 1e-9)
