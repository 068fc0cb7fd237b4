"""Temperatures against a brute-force search, ECE and Brier against their definitions and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, log_loss
from test_thresholds import scored

from featstore.errors import ConfigError, LeakError, TaskError
from probes.calibration import (
    SHARPNESS,
    brier,
    brier_classes,
    calibration,
    expected_calibration_error,
    fit_temperature,
    logits_of,
)
from probes.thresholds import Scored


def overconfident(seed: int = 0, prefix: str = "v", sharpness: float = 3.0) -> Scored:
    """Probabilities whose logits are `sharpness` times what the labels were drawn with."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((4000, 2)) * (1.0, 2.0)
    y = (rng.random((4000, 2)) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    mask = rng.random((4000, 2)) < 0.9
    names = tuple(f"{prefix}{number}" for number in range(4000))
    return Scored(y, 1 / (1 + np.exp(-sharpness * logits)), mask, names, names, ("a", "b"))


def losses(parts: list[tuple[np.ndarray, np.ndarray]], temperatures: np.ndarray) -> np.ndarray:
    z = np.concatenate([logits_of(p) for p, _ in parts])
    y = np.concatenate([y for _, y in parts])
    return np.array([np.logaddexp(0, np.where(y == 1, -z, z) / t).mean() for t in temperatures])


@pytest.mark.parametrize("sharpness", [3.0, 0.3])
@pytest.mark.parametrize("shared", [False, True])
def test_the_temperature_is_the_best_of_all(sharpness: float, shared: bool) -> None:
    data = overconfident(sharpness=sharpness)
    found = fit_temperature(data, shared=shared)
    columns = [(data.scores[rows, c], data.y[rows, c]) for c, rows in enumerate(data.mask.T)]
    for column in range(2):
        parts = columns if shared else [columns[column]]
        own = found.values[column]
        near = losses(parts, own * np.array([0.999, 1.0, 1.001]))
        assert near[1] == near.min()
        grid = np.geomspace(0.01, 100, 400)
        assert near[1] <= losses(parts, grid).min()
        assert own == pytest.approx(sharpness, rel=0.1)
    assert found.at_bound == (False, False)
    assert shared == (found.values[0] == found.values[1])


def test_calibrated_probabilities_are_better_and_rank_alike() -> None:
    temperature = fit_temperature(overconfident(0))
    test = overconfident(1, "t")
    after = temperature.apply(test)
    for column in range(2):
        rows = test.mask[:, column]
        y, before, now = test.y[rows, column], test.scores[rows, column], after[rows, column]
        assert log_loss(y, now) < log_loss(y, before)
        assert expected_calibration_error(y, now) < 0.3 * expected_calibration_error(y, before)
        assert (np.diff(now[np.argsort(before, kind="stable")]) >= 0).all()
        np.testing.assert_array_equal(after[~rows, column], test.scores[~rows, column])


def test_no_row_meets_the_temperature_that_was_found_on_it() -> None:
    data = overconfident()
    with pytest.raises(LeakError, match="a temperature must not be applied to what it was found on"):
        fit_temperature(data).apply(data)


def test_perfect_and_useless_scores_reach_a_bound() -> None:
    y = np.tile([0, 1], 20)[:, None]
    names = tuple(map(str, range(40)))

    def of(scores: np.ndarray) -> Scored:
        return Scored(y, scores, np.ones(y.shape, dtype=bool), names, names, ("a",))

    sharp = fit_temperature(of(0.2 + 0.6 * y))
    assert (sharp.values[0], sharp.at_bound) == (1 / SHARPNESS[1], (True,))
    wrong = fit_temperature(of(0.8 - 0.6 * y))
    assert (wrong.values[0], wrong.at_bound) == (1 / SHARPNESS[0], (True,))
    certain = fit_temperature(of(np.where(np.arange(40)[:, None] == 0, 1.0, y).astype(float)))  # votes of 0 and 1
    assert 1 < certain.values[0] < 20


def test_a_label_with_one_class_keeps_its_probabilities() -> None:
    y = scored().y.copy()
    y[:, 1] = 0
    found = fit_temperature(scored(y=y))
    assert found.values[1] == 1
    with pytest.raises(TaskError, match=r"no label has both classes .* no temperature can be found"):
        fit_temperature(scored(y=np.zeros_like(y)))


def test_brier_is_scikit_learns() -> None:
    data = scored()
    for column, value in enumerate(brier(data.y, data.scores, data.mask)):
        rows = data.mask[:, column]
        assert value == pytest.approx(brier_score_loss(data.y[rows, column], data.scores[rows, column]), abs=1e-14)
    assert np.isnan(brier(data.y, data.scores, np.zeros_like(data.mask))).all()
    y, p = np.array([0, 2, 1]), np.array([[1.0, 0, 0], [0.2, 0.2, 0.6], [0.5, 0.5, 0]])
    assert brier_classes(y, p) == pytest.approx((0 + 0.04 + 0.04 + 0.16 + 0.25 + 0.25) / 3)


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_calibration_error_is_its_definition(num_bins: int) -> None:
    data = scored(200)
    y, p = data.y[:, 0], data.scores[:, 0]
    expected = 0.0
    for number in range(num_bins):
        inside = np.array([max(int(np.ceil(value * num_bins)), 1) == number + 1 for value in p])
        if inside.any():
            expected += inside.mean() * abs(y[inside].mean() - p[inside].mean())
    assert expected_calibration_error(y, p, num_bins=num_bins) == pytest.approx(expected, abs=1e-12)
    even = expected_calibration_error(y[:196], p[:196], num_bins=7, bins="mass")
    parts = np.split(np.argsort(p[:196], kind="stable"), 7)
    assert even == pytest.approx(np.mean([abs(y[part].mean() - p[part].mean()) for part in parts]), abs=1e-12)


def test_the_table_has_every_label() -> None:
    data = scored()
    found = calibration(data)
    assert [entry["label"] for entry in found] == ["a", "b"]
    rows = data.mask[:, 1]
    assert found[1]["ece"] == expected_calibration_error(data.y[rows, 1], data.scores[rows, 1])
    assert found[1]["ece_mass"] == expected_calibration_error(data.y[rows, 1], data.scores[rows, 1], bins="mass")


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TaskError, match="calibration takes probabilities from 0 to 1, got -1 to 2"):
        logits_of(np.array([-1.0, 2.0]))
    with pytest.raises(TaskError, match="calibration takes probabilities from 0 to 1; pass logits"):
        expected_calibration_error(np.array([1]), np.array([1.5]))
    with pytest.raises(ConfigError, match="num_bins must be at least 1, got 0"):
        expected_calibration_error(np.array([1]), np.array([0.5]), num_bins=0)
    with pytest.raises(TaskError, match="temperatures of a, b do not fit scores of a, c"):
        fit_temperature(scored()).apply(scored(prefix="t", labels=("a", "c")))
    assert np.isnan(expected_calibration_error(np.zeros(0, int), np.zeros(0)))
