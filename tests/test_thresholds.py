"""Youden's threshold against scikit-learn's ROC curve, and that none meets the rows it was found on."""

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from featstore.errors import LeakError, TaskError
from probes.draws import Draws
from probes.thresholds import Scored, fit_thresholds, optimistic_youden, youden_threshold


def scored(num_rows: int = 120, seed: int = 0, prefix: str = "v", **changes: Any) -> Scored:
    rng = np.random.default_rng(seed)
    y = (rng.random((num_rows, 2)) < (0.3, 0.6)).astype(np.int64)
    scores = np.round(np.clip(rng.random((num_rows, 2)) * 0.8 + 0.2 * y, 0, 1), 2)
    names = tuple(f"{prefix}{number}" for number in range(num_rows))
    groups = tuple(f"p{prefix}{number // 2}" for number in range(num_rows))
    values: dict[str, Any] = {
        "y": y,
        "scores": scores,
        "mask": rng.random(y.shape) < 0.9,
        "ids": names,
        "groups": groups,
        "labels": ("a", "b"),
    }
    return Scored(**{**values, **changes})


def sklearn_youden(y: np.ndarray, scores: np.ndarray) -> tuple[float, float, float]:
    """(threshold, sensitivity, specificity); sums are rounded, so that equal ones are equal."""
    false, true, cuts = roc_curve(y, scores, drop_intermediate=False)
    best = int(np.round(true - false, 12).argmax())
    return float(cuts[best]), float(true[best]), float(1 - false[best])


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_that_of_the_roc_curve(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = rng.random(40) < 0.4
    scores = np.round(rng.random(40) + (0.5 if seed % 2 else 0.0) * y, 1)
    assert youden_threshold(y, scores) == sklearn_youden(y, scores)[0]


def test_a_ranking_upside_down_selects_nothing() -> None:
    assert youden_threshold(np.array([1, 0]), np.array([0.1, 0.9])) == np.inf
    assert np.isnan(youden_threshold(np.array([1, 1]), np.array([0.1, 0.9])))


def test_validation_thresholds_decide_test_rows() -> None:
    validation, test = scored(seed=0), scored(seed=1, prefix="t")
    thresholds = fit_thresholds(validation)
    found = thresholds.evaluate(test)
    for column, entry in enumerate(found["per_label"]):
        rows = test.mask[:, column]
        y, decided = test.y[rows, column] == 1, test.scores[rows, column] >= thresholds.values[column]
        assert entry["sensitivity"] == pytest.approx(decided[y].mean())
        assert entry["specificity"] == pytest.approx((~decided[~y]).mean())
        assert entry["f1"] == pytest.approx(2 * (decided & y).sum() / (decided.sum() + y.sum()))


def test_a_label_without_both_classes_takes_the_median_of_the_others() -> None:
    y = scored().y.copy()
    y[:, 1] = 0
    thresholds = fit_thresholds(scored(y=y))
    assert thresholds.pooled == (False, True)
    assert thresholds.values[1] == thresholds.values[0]
    with pytest.raises(TaskError, match="no label has both classes among the validation rows"):
        fit_thresholds(scored(y=np.zeros_like(y)))


def test_no_row_meets_the_threshold_that_was_found_on_it() -> None:
    """Not its own rows, not one of them among others, and no other image of one of its patients."""
    validation = scored()
    thresholds = fit_thresholds(validation)
    with pytest.raises(LeakError, match="a threshold must not be applied to what it was found on: 120 samples"):
        thresholds.evaluate(validation)
    other = scored(seed=1, prefix="t")
    one = scored(seed=1, prefix="t", ids=(*other.ids[:-1], "v7"))
    with pytest.raises(LeakError, match="1 samples are in both, such as 'v7'"):
        thresholds.evaluate(one)
    patient = scored(seed=1, prefix="t", groups=(*other.groups[:-1], "pv3"))
    with pytest.raises(LeakError, match=r"1 groups \(patients\) are in both, such as 'pv3'"):
        thresholds.evaluate(patient)
    thresholds.evaluate(other)


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TaskError, match="thresholds of a, b do not fit scores of a, c"):
        fit_thresholds(scored()).evaluate(scored(prefix="t", labels=("a", "c")))
    with pytest.raises(TaskError, match="one entry a row; got 120, 120, 120, 1 and 120"):
        scored(ids=("x",))
    with pytest.raises(TaskError, match="1 label names for 2 columns"):
        scored(labels=("a",))


@pytest.mark.parametrize("lanes", [True, False])
def test_optimistic_numbers_are_marked_and_equal_the_roc_curve_of_every_resample(
    lanes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not lanes:  # as with more than a million rows
        monkeypatch.setattr("probes.ranking.LANE_LIMIT", 1)
    test = scored(60)
    draws = Draws.of(np.array(test.groups), num_resamples=25, seed=4)
    found = optimistic_youden(test, draws)
    assert found["optimistic"] is True
    assert found["intervals"]["draws"] == draws.digest
    assert optimistic_youden(test)["macro"] == found["macro"]
    columns = draws.columns(np.array(test.groups))
    for column, entry in enumerate(found["per_label"]):
        rows = np.flatnonzero(test.mask[:, column])
        y, scores = test.y[rows, column], test.scores[rows, column]
        assert (entry["threshold"], entry["sensitivity"], entry["specificity"]) == pytest.approx(
            sklearn_youden(y, scores), abs=1e-12
        )
        values = []
        for counts in draws.counts:
            again = np.repeat(np.arange(len(rows)), counts[columns[rows]])
            values.append(sklearn_youden(y[again], scores[again])[1:])
        for place, name in enumerate(("sensitivity", "specificity")):
            low, high = np.percentile([value[place] for value in values], [2.5, 97.5])
            interval = entry["intervals"][name]
            assert (interval["low"], interval["high"]) == pytest.approx((low, high), abs=1e-12)
