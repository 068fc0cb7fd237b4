"""Few rows, one strength: the optimum of scikit-learn's newton-cholesky in float64, by products of the rows alone."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from probes import descent, dual, solver
from probes.descent import RowLosses
from probes.logistic import LogisticProbe
from probes.single import ROWS
from probes.workers import worker_threads

GAP = 1e-6


def features(num_rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Columns with a falling spectrum, of different scale, away from zero."""
    random = np.random.default_rng(seed)
    latent = random.standard_normal((num_rows, 40)) * np.arange(1, 41) ** -0.5
    noise = 0.3 * random.standard_normal((num_rows, width))
    X = (latent @ random.standard_normal((40, width)) + noise) * random.uniform(0.5, 2, width) + 3
    return np.asarray(X, dtype=np.float32)


def labels(X: np.ndarray, num_positives: int, seed: int = 0) -> np.ndarray:
    """As many positives, those with the largest of noisy scores."""
    random = np.random.default_rng(seed)
    score = X.astype(np.float64) @ random.standard_normal(X.shape[1])
    score = (score - score.mean()) / max(score.std(), 1e-9) + random.standard_normal(len(X))
    y = np.zeros(len(X), dtype=np.int64)
    y[np.argsort(-score)[:num_positives]] = 1
    return y


def objective(Z: np.ndarray, y: np.ndarray, w: np.ndarray, b: float, C: float, weights: np.ndarray) -> float:
    return float(w @ w / 2 + C * (weights * np.logaddexp(0, (1 - 2 * y) * (Z @ w + b))).sum())


def check_optimum(
    probe: LogisticProbe, X: np.ndarray, y: np.ndarray, C: float, weights: np.ndarray | None = None
) -> None:
    """At most GAP above newton-cholesky's objective; what the probe says of its own is so, and is a minimum."""
    weights = np.ones(len(y)) if weights is None else weights
    Z = (X.astype(np.float64) - probe.mean_) / probe.scale_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-8, max_iter=500).fit(Z, y, weights)
    ours = objective(Z, y, probe.coef_[0, :, 0], float(probe.intercept_[0, 0]), C, weights)
    assert ours <= objective(Z, y, peer.coef_[0], float(peer.intercept_[0]), C, weights) * (1 + GAP)
    assert probe.objective_[0, 0] == pytest.approx(ours, rel=1e-7)
    assert probe.converged_.all()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other way may be taken."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the way of many problems was taken")

    monkeypatch.setattr(solver, "_solve_newton", refuse)
    monkeypatch.setattr(solver, "eigenbasis", refuse)


def constant(X: np.ndarray) -> np.ndarray:
    return np.hstack([X, np.full((len(X), 30), 7, X.dtype)])


EDGES: dict[str, tuple[np.ndarray, int]] = {
    "one positive": (features(90, 300), 1),
    "one negative": (features(90, 300), 89),
    "a row of each class": (features(2, 300), 1),
    "three rows": (features(3, 129), 1),
    "more rows than columns": (features(ROWS, 140), 40),
    "fewer rows than columns": (features(150, 900), 3),
    "constant columns": (constant(features(80, 200)), 20),
    "rows twice": (np.repeat(features(50, 200), 2, axis=0), 11),
    "columns twice": (np.hstack([features(60, 150)] * 2), 20),
    "float16 values": (features(80, 200).astype(np.float16), 20),
    "float64 values": (features(80, 200).astype(np.float64), 20),
    "far from zero": (features(80, 200) + np.float32(500), 20),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("C", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("name", EDGES)
def test_the_optimum_is_reached(name: str, C: float, standardize: bool) -> None:
    X, num_positives = EDGES[name]
    y = labels(X, num_positives)
    probe = LogisticProbe(C=C, standardize=standardize).fit(X, y[:, None], kind="multilabel")
    check_optimum(probe, X, y, C)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("C", [1e-6, 1.0, 1e5])
def test_columns_without_any_spread_leave_the_prior(C: float) -> None:
    X, y = np.full((40, 200), 2, np.float32), np.arange(40) < 3
    probe = LogisticProbe(C=C).fit(X, y[:, None], kind="multilabel")
    assert not probe.coef_.any()
    assert float(probe.intercept_[0, 0]) == pytest.approx(float(np.log(3 / 37)), rel=1e-12)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("class_weight", [None, "balanced", "positives"])
def test_rows_have_weights(class_weight: Any, seed: int) -> None:
    X = features(120, 200, seed)
    y = labels(X, 9, seed)
    rows = np.random.default_rng(seed).choice([0.0, 0.1, 1.0, 30.0], len(X))
    rows[:3], y[0], y[1] = 1.0, 1, 0
    probe = LogisticProbe(C=0.7, class_weight=class_weight).fit(X, y[:, None], kind="multilabel", sample_weight=rows)
    total = np.array([rows[y == 0].sum(), rows[y == 1].sum()])
    factor = {
        None: np.ones(2),
        "balanced": rows.sum() / (2 * total),
        "positives": np.array([1.0, total[0] / total[1]]),
    }[class_weight]
    check_optimum(probe, X, y, 0.7, rows * factor[y])


@pytest.mark.usefixtures("alone")
def test_labels_have_their_own_solutions() -> None:
    X = features(130, 200)
    y = np.stack([labels(X, count, count) for count in (1, 13, 65)], 1)
    mask = np.random.default_rng(0).random(y.shape) < 0.9
    mask[:, 0] = True
    probe = LogisticProbe(C=1.0, standardize=False).fit(X, y, mask, kind="multilabel")
    for label in range(3):
        some = mask[:, label]
        alone = LogisticProbe(C=1.0, standardize=False).fit(X[some], y[some, label : label + 1], kind="multilabel")
        np.testing.assert_allclose(probe.coef_[0, :, label], alone.coef_[0, :, 0], atol=2e-4)
        assert float(probe.objective_[0, label]) == pytest.approx(float(alone.objective_[0, 0]), rel=1e-6)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("seed", range(4))
def test_what_must_not_matter_does_not(seed: int) -> None:
    """A rotation, another order of the rows, the classes in each other's place, a row twice in place of a weight."""
    X = features(100, 160, seed).astype(np.float64)
    y = labels(X, 10, seed)
    random = np.random.default_rng(seed)

    def fit(X: np.ndarray, y: np.ndarray, **more: Any) -> LogisticProbe:
        return LogisticProbe(C=1.0, standardize=False).fit(X, y[:, None], kind="multilabel", **more)

    plain = fit(X, y)
    logits = plain.decision_function(X)[:, 0]
    turn = np.linalg.qr(random.standard_normal((160, 160)))[0]
    order = random.permutation(100)
    np.testing.assert_allclose(fit(X @ turn, y).decision_function(X @ turn)[:, 0], logits, atol=1e-3)
    np.testing.assert_allclose(fit(X[order], y[order]).decision_function(X)[:, 0], logits, atol=1e-3)
    np.testing.assert_allclose(-fit(X, 1 - y).decision_function(X)[:, 0], logits, atol=1e-3)
    counts = random.integers(1, 4, 100)
    weighted, repeated = fit(X, y, sample_weight=counts), fit(np.repeat(X, counts, 0), np.repeat(y, counts))
    assert float(weighted.objective_[0, 0]) == pytest.approx(float(repeated.objective_[0, 0]), rel=1e-6)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("C", "expected"), [(1e-3, False), (1.0, False), (1e6, True)])
def test_a_factor_serves_where_the_penalty_is_weak(C: float, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, dense = [], dual._dense_step

    def counted(*arguments: Any) -> descent.Step:
        taken.append(1)
        return dense(*arguments)

    monkeypatch.setattr(dual, "_dense_step", counted)
    X = features(280, 200)
    y = labels(X, 90)
    probe = LogisticProbe(C=C).fit(X, y[:, None], kind="multilabel")
    assert bool(taken) == expected
    check_optimum(probe, X, y, C)


@pytest.mark.parametrize(("name", "value"), [("MAX_STEPS", 1), ("MAX_CUTS", 0)])
def test_what_is_not_reached_goes_the_way_of_many_problems(
    name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, newton = [], solver._solve_newton

    def counted(*arguments: Any, **options: Any) -> solver.Fitted:
        taken.append(1)
        return newton(*arguments, **options)

    monkeypatch.setattr(solver, "_solve_newton", counted)
    monkeypatch.setattr(descent, name, value)
    X = features(100, 200)
    y = labels(X, 10)
    probe = LogisticProbe(C=1.0).fit(X, y[:, None], kind="multilabel")
    assert taken
    check_optimum(probe, X, y, 1.0)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 40])
@pytest.mark.parametrize("shared", [0, 1 << 60])
def test_products_of_the_rows(num_rows: int, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual, "SHARED", shared)
    Z = torch.from_numpy(features(num_rows, 50).astype(np.float64))
    with worker_threads() as workers:
        made = dual._products(Z, workers)
    np.testing.assert_allclose(made.numpy(), Z.numpy() @ Z.numpy().T, rtol=1e-12)
    assert torch.equal(made, made.T)


@pytest.mark.parametrize("seed", range(5))
def test_a_step_ends_at_the_best_point_of_its_plane(seed: int) -> None:
    random = np.random.default_rng(seed)
    Z, y = random.standard_normal((60, 5)), np.asarray(random.random(60) < 0.1)
    y[0], y[1] = True, False
    w, direction = random.standard_normal(5), 3 * random.standard_normal(5)
    losses = RowLosses(torch.from_numpy(y.astype(np.float64)), torch.full((60,), 2.0, dtype=torch.float64))
    state = losses.at(torch.from_numpy(w), 0.3, torch.from_numpy(Z @ w + 0.3), float(w @ w))
    step = descent.Step(
        torch.from_numpy(direction), 0.1, torch.from_numpy(Z @ direction), float(w @ direction),
        float(direction @ direction), -1.0, state.loss,
    )  # fmt: skip
    best, length = losses._improved(state, step, losses.on(state, step, 0.0, 0.0), 0.0)

    def at(point: np.ndarray) -> float:
        return objective(Z, y, w + point[0] * direction, 0.3 + point[1], 2.0, np.ones(60))

    truth = minimize(at, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 2000})
    assert best.loss == pytest.approx(at(np.array([length, best.b - 0.3])), rel=1e-12)
    assert best.loss - truth.fun <= 0.02 * (state.loss - truth.fun)


def test_a_flat_plane_is_left_as_it_is() -> None:
    """Rows of no curvature and a step of no length: there is nothing to solve for."""
    losses = RowLosses(torch.tensor([0.0, 1.0]), torch.ones(2, dtype=torch.float64))
    state = losses.at(torch.zeros(1, dtype=torch.float64), 0.0, torch.tensor([-1e4, 1e4], dtype=torch.float64), 0.0)
    step = descent.Step(torch.zeros(1), 0.0, torch.zeros(2, dtype=torch.float64), 0.0, 0.0, -1.0, 1.0)
    assert losses._improved(state, step, state, 1.0) == (state, 1.0)
