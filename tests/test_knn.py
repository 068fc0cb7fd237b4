"""The weighted vote against brute force, against DINO's own formula, and FAISS against torch."""

import builtins
import inspect
import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import probe_conformance as conformance
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from featstore.errors import ConfigError, TaskError
from probes.knn import KNNProbe
from probes.neighbours import SPARE, build_index, import_faiss, ranked

BACKENDS = ["faiss", "torch"]


@pytest.mark.parametrize("check", conformance.CHECKS)
@pytest.mark.parametrize("case", ["knn-faiss", "knn-torch"])
def test_conformance(check: Callable[[conformance.Case], None], case: str) -> None:
    check(conformance.CASES[case])


@pytest.mark.parametrize("case", ["knn-faiss", "knn-torch"])
def test_rotation_does_not_matter(case: str) -> None:
    conformance.check_rotation_invariance(conformance.CASES[case])


def bank(num_rows: int = 250, width: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around 5 centres, and their classes."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 5, num_rows)
    centres = np.random.default_rng(9).standard_normal((5, width))
    return (centres[y] + random.standard_normal((num_rows, width))).astype(np.float32), y


def neighbours(X: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Brute force in float64: (similarity, row), descending."""
    unit = [part.astype(float) / np.linalg.norm(part.astype(float), axis=1, keepdims=True) for part in (X, queries)]
    similarity = unit[1] @ unit[0].T
    rows = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, rows, 1), rows


def dino_scores(
    similarity: np.ndarray, labels: np.ndarray, counts: tuple[int, ...], num_classes: int
) -> dict[int, np.ndarray]:
    """The published vote: softmax over all neighbours, one-hot times weight, sum over the first k."""
    weights = torch.softmax(torch.from_numpy(similarity) / 0.07, 1)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels), num_classes)
    votes = one_hot * weights[:, :, None]
    return {k: votes[:, :k].sum(1).numpy() for k in counts}


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_equal_dinos_vote(backend: Any) -> None:
    X, y = bank()
    queries, _ = bank(40, seed=1)
    probe = KNNProbe(renormalize=False, backend=backend).fit(X, y, num_classes=7)
    similarity, rows = neighbours(X, queries, 200)
    expected = dino_scores(similarity, y[rows], (10, 20, 100, 200), 7)
    scores = probe.scores(queries)
    assert probe.ks_ == tuple(scores) == (10, 20, 100, 200)
    for k, values in scores.items():
        np.testing.assert_allclose(values, expected[k], atol=2e-6)
    assert probe.backend_ == backend
    for k in (10, 200):
        probe.choose(k)
        np.testing.assert_array_equal(probe.predict(queries), scores[k].argmax(1))
        np.testing.assert_allclose(probe.predict_proba(queries).sum(1), 1)


def label_scores(
    X: np.ndarray, y: np.ndarray, mask: np.ndarray, queries: np.ndarray, counts: tuple[int, ...], temperature: float
) -> dict[int, np.ndarray]:
    """Loops over queries, labels and k."""
    similarity, rows = neighbours(X, queries, max(counts))
    result = {k: np.zeros((len(queries), y.shape[1])) for k in counts}
    for query in range(len(queries)):
        weights = np.exp((similarity[query] - similarity[query, 0]) / temperature)
        for label in range(y.shape[1]):
            for k in counts:
                chosen = [place for place in range(k) if mask[rows[query, place], label]]
                if chosen:
                    total = sum(weights[place] for place in chosen)
                    part = sum(weights[place] * y[rows[query, place], label] for place in chosen)
                    result[k][query, label] = part / total
                else:
                    result[k][query, label] = y[mask[:, label], label].mean() if mask[:, label].any() else 0.5
    return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_labels_equal_brute_force(backend: Any) -> None:
    X, _ = bank(90)
    queries, _ = bank(25, seed=1)
    random = np.random.default_rng(3)
    y = (random.random((90, 4)) < 0.3).astype(np.int8)
    mask = random.random((90, 4)) < (0.9, 0.5, 0.03, 0.0)
    mask[:, 0] |= ~mask.any(1)
    probe = KNNProbe(k=(3, 7, 30), temperature=0.2, backend=backend).fit(X, y, mask)
    scores = probe.scores(queries)
    expected = label_scores(X, y, mask, queries, (3, 7, 30), 0.2)
    for k, values in scores.items():
        np.testing.assert_allclose(values, expected[k], atol=2e-6)
    _, rows = neighbours(X, queries, 30)
    for k in (3, 7, 30):
        none = (~mask[rows[:, :k]].any(1)).sum(0)
        np.testing.assert_array_equal(probe.unlabelled_[k], none)
    assert probe.unlabelled_[3][2] > 0
    np.testing.assert_array_equal(probe.unlabelled_[30], [0, 0, probe.unlabelled_[30][2], 25])
    assert (scores[30][:, 3] == 0.5).all()
    np.testing.assert_array_equal(probe.choose(7).predict(queries), scores[7] >= 0.5)


def test_masked_classes_are_no_neighbours() -> None:
    X, y = bank(60)
    mask = np.arange(60) % 3 > 0
    queries, _ = bank(10, seed=1)
    expected = KNNProbe(k=9).fit(X[mask], y[mask], num_classes=5).scores(queries)[9]
    np.testing.assert_array_equal(
        KNNProbe(k=9).fit(X, np.where(mask, y, -1), mask, num_classes=5).scores(queries)[9], expected
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_equal_sklearn(backend: Any) -> None:
    X, _ = bank(500, 32)
    queries, _ = bank(70, 32, seed=1)
    unit, asked = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (X, queries))
    similarity, rows = ranked(build_index(unit, backend)[0], asked, 20)
    distance, expected = NearestNeighbors(n_neighbors=20, algorithm="brute", metric="cosine").fit(X).kneighbors(queries)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(1 - similarity, distance, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("copies", [3, SPARE + 1, 40])
def test_ties_take_the_first_rows(backend: Any, copies: int) -> None:
    """Rows are signed unit axes, so that products are exact; each stands several times, in mixed order."""
    axes = np.vstack([np.eye(4), -np.eye(4)]).astype(np.float32)
    places = np.random.default_rng(0).permutation(np.repeat(np.arange(8), copies))
    index, _ = build_index(axes[places], backend)
    queries = np.vstack([axes, [[0.8, 0.6, 0, 0]]]).astype(np.float32)
    similarity, rows = ranked(index, queries, 5)
    every = queries @ axes[places].T
    expected = np.argsort(-every, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(similarity, np.take_along_axis(every, expected, 1))


def test_small_banks_drop_default_counts_only() -> None:
    X, y = bank(30)
    probe = KNNProbe().fit(X, y)
    assert (probe.ks_, probe.k_, probe.dropped_k_) == ((10, 20), 20, (100, 200))
    probe = KNNProbe().fit(X[:4], y[:4])
    assert (probe.ks_, probe.dropped_k_) == ((4,), (10, 20, 100, 200))
    assert KNNProbe(k=4).fit(X[:4], y[:4]).dropped_k_ == ()
    with pytest.raises(ConfigError, match="k=9 neighbours asked of a bank with 4 rows; lower k or extract more"):
        KNNProbe(k=(2, 9)).fit(X[:4], y[:4])


def test_one_row_bank_and_no_queries() -> None:
    X, _ = bank(1)
    probe = KNNProbe(k=1).fit(X, np.array([[1, 0]]))
    np.testing.assert_array_equal(probe.scores(-X)[1], [[1, 0]])
    assert probe.predict(X[:0]).shape == (0, 2)
    np.testing.assert_array_equal(KNNProbe(k=1).fit(X, np.array([0])).predict(X), [0])


def test_scale_and_type_of_features_do_not_matter() -> None:
    X, y = bank(60)
    expected = KNNProbe(k=9).fit(X, y).scores(X[:5])[9]
    huge = X.astype(np.float64) * 1e200
    np.testing.assert_allclose(KNNProbe(k=9).fit(huge, y).scores(huge[:5])[9], expected, atol=1e-6)
    np.testing.assert_allclose(KNNProbe(k=9).fit(huge * 1e-300 * 1e-150, y).scores(huge[:5])[9], expected, atol=1e-6)
    half = X.astype(np.float16)
    np.testing.assert_allclose(KNNProbe(k=9).fit(half, y).scores(half[:5])[9], expected, atol=1e-2)


def test_at_a_tiny_temperature_far_neighbours_still_count() -> None:
    """The query's own row has all the weight, but no label."""
    X, _ = bank(30)
    y, mask = np.zeros((30, 2), int), np.ones((30, 2), dtype=bool)
    _, rows = neighbours(X, X[:1], 2)
    assert rows[0, 0] == 0
    y[rows[0, 1], 0] = 1
    mask[0, 0] = False
    scores = KNNProbe(k=2, temperature=1e-6).fit(X, y, mask).scores(X[:1])[2]
    np.testing.assert_array_equal(scores, [[1, 0]])


def test_zero_rows_are_refused() -> None:
    X, y = bank(30)
    probe = KNNProbe(k=3).fit(X, y)
    X[4] = 0
    with pytest.raises(TaskError, match="row 4 of the features is zero and has no direction"):
        KNNProbe(k=3).fit(X, y)
    with pytest.raises(TaskError, match="row 1 of the features is zero"):
        probe.scores(X[3:6])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be different counts of at least 1, got 0"),
        ({"k": ()}, r"k must be different counts of at least 1, got \(\)"),
        ({"k": (5, 5)}, r"got \(5, 5\)"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_options_that_cannot_be_used(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KNNProbe(**arguments).fit(*bank(30))


def test_choice_and_labels_that_cannot_be_used() -> None:
    X, y = bank(30)
    with pytest.raises(ConfigError, match="k=7 is not among the fitted 3, 5"):
        KNNProbe(k=(3, 5)).fit(X, y).choose(7)
    with pytest.raises(TaskError, match="classes must be numbers from 0 to 2, found 0 to 4"):
        KNNProbe(k=3).fit(X, y, num_classes=3)
    with pytest.raises(ConfigError, match="at least two classes, got num_classes=1"):
        KNNProbe(k=3).fit(X, y, num_classes=1)
    with pytest.raises(TaskError, match=r"labels must be 0 or 1, found \[-1, 1\]; apply the label policy first"):
        KNNProbe(k=3).fit(X[:2], np.array([[1], [-1]]))
    with pytest.raises(TaskError, match=r"multiclass labels of 30 rows have 1 axes and 30 rows, got shape \(29,\)"):
        KNNProbe(k=3).fit(X, y[1:])
    with pytest.raises(TaskError, match=r"the mask has the shape of the labels, \(30,\); got \(29,\)"):
        KNNProbe(k=3).fit(X, y, np.ones(29, dtype=bool))
    with pytest.raises(ConfigError, match="backend is 'auto', 'faiss' or 'torch', got 'annoy'"):
        inspect.unwrap(build_index)(X, "annoy")


def test_broken_faiss_falls_back_to_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A build for another numpy raises all sorts of errors on import."""
    original = builtins.__import__

    def broken(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "faiss":
            raise AttributeError("_ARRAY_API not found")
        return original(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", broken)
    X, y = bank(60)
    with caplog.at_level(logging.WARNING):
        probe = KNNProbe(k=9).fit(X, y)
    assert probe.backend_ == "torch"
    assert "FAISS cannot be imported (AttributeError: _ARRAY_API not found)" in caplog.text
    with pytest.raises(ConfigError, match=r"FAISS cannot be imported .*install featstore\[cpu\]"):
        KNNProbe(k=9, backend="faiss").fit(X, y)


def test_importing_faiss_leaves_the_environment_alone() -> None:
    before = dict(os.environ)
    assert import_faiss().IndexFlatIP(3).d == 3
    assert dict(os.environ) == before
