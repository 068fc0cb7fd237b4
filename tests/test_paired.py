"""Paired tests: against differences computed by hand, under a true null, and at the margins."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, false_discovery_control, norm
from sklearn.metrics import f1_score, roc_auc_score

from featstore.errors import ConfigError
from probes.delong import placements
from probes.draws import Draws
from probes.multiplicity import benjamini_hochberg, holm
from probes.paired import Criteria, Pair, bootstrap_p, compare_pair


def simulate(seed: int, *, num_groups: int = 150, gain: float = 0.0, num_labels: int = 2) -> Pair:
    """Patients of one to four rows, labels and scores that patients share; A and B equally good but for `gain`."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_groups), rng.integers(1, 5, num_groups))
    size = len(groups)
    sick = rng.random((num_groups, num_labels)) < 0.35
    y = np.where(rng.random((size, num_labels)) < 0.8, sick[groups], rng.random((size, num_labels)) < 0.35)
    common = rng.standard_normal((num_groups, num_labels))[groups]
    scores = [
        (1.0 + extra) * y
        + 0.6 * common
        + 0.7 * rng.standard_normal((num_groups, num_labels))[groups]
        + 0.7 * rng.standard_normal((size, num_labels))
        for extra in (gain, 0.0)
    ]
    mask = rng.random((size, num_labels)) < 0.9
    names = tuple(map(str, range(size)))
    labels = tuple(f"l{number}" for number in range(num_labels))
    return Pair(names, groups, labels, "multilabel", y.astype(np.int64), mask, scores[0], scores[1])


def rejections(seeds: range, num_resamples: int) -> dict[str, float]:
    """Share of null pairs that each test rejects at 5 %, over macro and labels in turn."""
    p: dict[str, list[float]] = {}
    for seed in seeds:
        found = compare_pair(simulate(seed), Criteria(num_resamples=num_resamples))
        for name, entry in {"macro": found["macro"], "label": found["per_label"][0]}.items():
            for way, value in entry["p"].items():
                p.setdefault(f"{name} {way}", []).append(value)
    return {name: float(np.mean(np.array(values) <= 0.05)) for name, values in p.items()}


def test_a_true_null_is_seldom_rejected() -> None:
    """60 pairs: as many rejections as 5 % gives, up to what happens once in a thousand."""
    highest = binom.ppf(0.999, 60, 0.05) / 60
    for name, share in rejections(range(60), 200).items():
        assert share <= highest, name


@pytest.mark.slow
def test_a_true_null_is_rejected_at_its_level() -> None:
    """1,000 clustered null pairs; the noise of the share itself is 0.7 %."""
    for name, share in rejections(range(1000), 1000).items():
        assert 0.04 <= share <= 0.07, (name, share)


def test_ignoring_patients_rejects_too_often() -> None:
    """What the clustering is for: null pairs with every row three times, as patients and each its own patient."""
    p: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(40):
        pair = simulate(seed, num_groups=80, num_labels=1)
        rows = np.tile(np.arange(len(pair.ids)), 3)
        arrays = pair.y[rows], pair.mask[rows], pair.a[rows], pair.b[rows]
        for known, groups in ((True, pair.groups[rows]), (False, np.arange(len(rows)))):
            names = tuple(map(str, range(len(rows))))
            found = compare_pair(Pair(names, groups, pair.labels, pair.kind, *arrays), Criteria(num_resamples=6))
            p[known].append(found["macro"]["p"]["delong"])
    highest = binom.ppf(0.999, 40, 0.05)
    assert sum(value <= 0.05 for value in p[True]) <= highest < sum(value <= 0.05 for value in p[False])


def test_a_difference_is_that_of_scikit_learn_on_every_resample() -> None:
    pair = simulate(0, num_groups=40)
    found = compare_pair(pair, Criteria(num_resamples=50, seed=3))
    draws = Draws.of(pair.groups[pair.mask.any(1)], num_resamples=50, seed=3)
    assert found["draws"] == draws.digest
    columns = draws.columns(pair.groups, pair.mask.any(1))
    differences = []
    for counts in draws.counts:
        rows = np.repeat(np.arange(len(pair.y)), counts[columns] * pair.mask.any(1))
        pairs = [
            [roc_auc_score(pair.y[part, c], scores[part, c]) for scores in (pair.a, pair.b)]
            for c in range(2)
            for part in [rows[pair.mask[rows, c]]]
        ]
        differences.append([a - b for a, b in pairs])
    table = np.array(differences)
    for column, entry in enumerate(found["per_label"]):
        bounds = np.percentile(table[:, column], [2.5, 97.5])
        assert (entry["delta"]["low"], entry["delta"]["high"]) == pytest.approx(tuple(bounds), abs=1e-12)
        assert entry["p"]["bootstrap"] == bootstrap_p(table[:, column])
        rows = pair.mask[:, column]
        own = [roc_auc_score(pair.y[rows, column], scores[rows, column]) for scores in (pair.a, pair.b)]
        assert entry["delta"]["value"] == pytest.approx(own[0] - own[1], abs=1e-12)
        both = np.stack([pair.a[rows, column], pair.b[rows, column]], 1)
        covariance = placements(pair.y[rows, column], both, pair.groups[rows]).covariance()
        error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
        assert entry["p"]["delong"] == pytest.approx(2 * norm.sf(abs(own[0] - own[1]) / error), rel=1e-9)
    bounds = np.percentile(table.mean(1), [2.5, 97.5])
    assert (found["macro"]["delta"]["low"], found["macro"]["delta"]["high"]) == pytest.approx(tuple(bounds), abs=1e-12)


def test_errors_of_macro_and_labels_agree_with_the_bootstrap() -> None:
    found = compare_pair(simulate(1, num_groups=400, num_labels=3), Criteria(num_resamples=2000))
    for entry in (found["macro"], *found["per_label"]):
        width = entry["delta"]["high"] - entry["delta"]["low"]
        assert 2 * 1.959964 * entry["delta"]["standard_error"] == pytest.approx(width, rel=0.08)


def test_p_values_agree_with_each_other_and_the_interval() -> None:
    found = compare_pair(simulate(3, gain=1.0), Criteria(num_resamples=999))
    for entry in (found["macro"], *found["per_label"]):
        assert entry["p"]["bootstrap"] == pytest.approx(entry["p"]["delong"], abs=0.05)
        assert (entry["p"]["bootstrap"] <= 0.05) == (not entry["delta"]["low"] <= 0 <= entry["delta"]["high"])
    assert found["macro"]["p"]["bootstrap"] < 0.05


def test_equal_scores_do_not_differ() -> None:
    pair = simulate(0)
    same = Pair(pair.ids, pair.groups, pair.labels, pair.kind, pair.y, pair.mask, pair.a, pair.a)
    found = compare_pair(same, Criteria(num_resamples=50, margin=0.01))
    for entry in (found["macro"], *found["per_label"]):
        assert entry["p"] == {"bootstrap": 1.0, "delong": 1.0}
        assert entry["delta"]["value"] == entry["delta"]["low"] == entry["delta"]["standard_error"] == 0
        assert entry["equivalence"]["holds"] == {"bootstrap": True, "delong": True}


def test_margins() -> None:
    pair = simulate(5, num_groups=400)
    for margin, holds in ((0.2, True), (0.001, False)):
        entry = compare_pair(pair, Criteria(num_resamples=400, margin=margin))["macro"]
        for name in ("noninferiority", "equivalence"):
            assert entry[name]["holds"] == {"bootstrap": holds, "delong": holds}
        delta, error = entry["delta"]["value"], entry["delta"]["standard_error"]
        lower, upper = norm.sf((delta + margin) / error), norm.sf((margin - delta) / error)
        assert entry["noninferiority"]["p"]["delong"] == pytest.approx(lower, abs=1e-12)
        assert entry["equivalence"]["p"]["delong"] == pytest.approx(max(lower, upper), abs=1e-12)
    better = compare_pair(simulate(5, num_groups=400, gain=1.0), Criteria(num_resamples=400, margin=0.02))["macro"]
    assert better["noninferiority"]["holds"] == {"bootstrap": True, "delong": True}
    assert better["equivalence"]["holds"] == {"bootstrap": False, "delong": False}


def test_non_inferiority_is_what_the_interval_says() -> None:
    pair = simulate(8)
    low = compare_pair(pair, Criteria(num_resamples=999))["macro"]["delta"]["low"]
    assert low < 0
    for margin, holds in ((-low * 1.05, True), (-low * 0.95, False)):
        entry = compare_pair(pair, Criteria(num_resamples=999, margin=margin))["macro"]
        assert entry["noninferiority"]["holds"]["bootstrap"] is holds


def test_decisions_have_a_threshold_for_each_model_and_no_delong() -> None:
    pair = simulate(2)
    found = compare_pair(pair, Criteria(metric="f1", num_resamples=50), (np.array([0.2, 0.4]), 1.0))
    for column, entry in enumerate(found["per_label"]):
        rows = pair.mask[:, column]
        y = pair.y[rows, column]
        assert entry["a"]["value"] == pytest.approx(f1_score(y, pair.a[rows, column] >= (0.2, 0.4)[column]), abs=1e-12)
        assert entry["b"]["value"] == pytest.approx(f1_score(y, pair.b[rows, column] >= 1.0), abs=1e-12)
    assert list(found["macro"]["p"]) == ["bootstrap"]


def test_a_few_patients_or_positives_are_warned_of() -> None:
    few = compare_pair(simulate(0, num_groups=15), Criteria(num_resamples=50))["few"]
    assert few[0].startswith("only 15 patients: fewer than 20")
    pair = simulate(0)
    y = pair.y.copy()
    y[np.flatnonzero(y[:, 1])[5:], 1] = 0
    rare = Pair(pair.ids, pair.groups, pair.labels, pair.kind, y, pair.mask, pair.a, pair.b)
    (warning,) = compare_pair(rare, Criteria(num_resamples=50))["few"]
    positives = int((y[:, 1] * pair.mask[:, 1]).sum())
    assert warning == f"l1: {positives} positives (fewer than 20); do not rely on its interval"
    assert compare_pair(pair, Criteria(num_resamples=50))["few"] == []


def test_a_label_with_one_class_is_in_no_family() -> None:
    pair = simulate(4, num_labels=3)
    y = pair.y.copy()
    y[:, 1] = 0
    found = compare_pair(
        Pair(pair.ids, pair.groups, pair.labels, pair.kind, y, pair.mask, pair.a, pair.b), Criteria(num_resamples=99)
    )
    p = [entry["p"]["delong"] for entry in found["per_label"]]
    assert np.isnan(p[1])
    assert found["num_labels"] == 2
    expected = holm(np.array([p[0], p[2]]))
    adjusted = [entry["p_holm"]["delong"] for entry in found["per_label"]]
    assert [adjusted[0], adjusted[2]] == pytest.approx(expected.tolist())
    assert np.isnan(adjusted[1])


def test_categorical_labels_compare_each_class_and_the_overall_accuracy() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 150)
    a, b = (rng.random((150, 3)) + strength * np.eye(3)[y] for strength in (0.5, 0.2))
    pair = Pair(
        tuple(map(str, range(150))), np.arange(150), ("x", "y", "z"), "multiclass", y, np.ones(150, dtype=bool), a, b
    )
    found = compare_pair(pair, Criteria(metric="accuracy", num_resamples=60))
    assert found["macro"]["delta"]["value"] == pytest.approx((a.argmax(1) == y).mean() - (b.argmax(1) == y).mean())
    areas = compare_pair(pair, Criteria(num_resamples=60))
    expected = [roc_auc_score(y == label, a[:, label]) - roc_auc_score(y == label, b[:, label]) for label in range(3)]
    assert [entry["delta"]["value"] for entry in areas["per_label"]] == pytest.approx(expected)
    assert areas["macro"]["delta"]["value"] == pytest.approx(np.mean(expected))


def test_adjusted_p_values() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 9):
        p = rng.random(size) ** 3
        order = np.argsort(p)
        stepped, last = np.zeros(size), 0.0
        for rank, place in enumerate(order):
            last = max(last, min(1.0, p[place] * (size - rank)))
            stepped[place] = last
        np.testing.assert_allclose(holm(p), stepped)
        np.testing.assert_allclose(benjamini_hochberg(p), false_discovery_control(p, method="bh"))
    np.testing.assert_allclose(holm(np.array([0.01, np.nan, 0.04])), [0.02, np.nan, 0.04])
    assert np.isnan(benjamini_hochberg(np.array([np.nan]))).all()


def test_bootstrap_p_of_known_resamples() -> None:
    assert bootstrap_p(np.arange(1.0, 100.0)) == pytest.approx(0.02)
    assert bootstrap_p(np.zeros(50)) == 1.0
    assert bootstrap_p(np.array([-1.0, 1.0, 2.0, np.nan])) == 1.0
    assert np.isnan(bootstrap_p(np.full(3, np.nan)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0.0}, "a margin lies between 0 and 1, got 0.0"),
        ({"level": 95.0}, "level must lie between 0 and 1, got 95.0"),
    ],
)
def test_wrong_criteria_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Criteria(**options)
