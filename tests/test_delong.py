"""DeLong and Obuchowski against their formulas written out over all pairs, and against the bootstrap."""

import inspect

import numpy as np
import pytest

from featstore.errors import TaskError
from probes.delong import auroc_intervals, delong_interval, placements
from probes.statistics import bootstrap


def clustered(num_groups: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patients of one to four rows with both classes in some, two tied scores that share the patient's effect."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_groups), rng.integers(1, 5, num_groups))
    sick = rng.random(num_groups) < 0.4
    y = np.where(rng.random(len(groups)) < 0.8, sick[groups], rng.random(len(groups)) < 0.4).astype(np.int64)
    effect = rng.standard_normal(num_groups)[groups]
    scores = y[:, None] + effect[:, None] + rng.standard_normal((len(groups), 2))
    return y, np.round(scores, 1), np.array([f"p{number}" for number in groups])


def direct(y: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROCs and covariance as printed in Obuchowski 1997, every pair of rows looked at."""
    sick, well = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    m, n = len(sick), len(well)
    psi = np.array(
        [[[1.0 if s[i] > s[j] else 0.5 if s[i] == s[j] else 0.0 for j in well] for i in sick] for s in scores.T]
    )  # (K, m, n)
    auroc = psi.mean((1, 2))
    v10, v01 = psi.mean(2), psi.mean(1)
    names = sorted(set(groups.tolist()))
    x = np.array([[v10[k][groups[sick] == g].sum() for g in names] for k in range(len(auroc))])
    w = np.array([[v01[k][groups[well] == g].sum() for g in names] for k in range(len(auroc))])
    m_i = np.array([(groups[sick] == g).sum() for g in names])
    n_i = np.array([(groups[well] == g).sum() for g in names])
    i10, i01, i = (m_i > 0).sum(), (n_i > 0).sum(), len(names)
    covariance = np.zeros((len(auroc), len(auroc)))
    for r in range(len(auroc)):
        for s in range(len(auroc)):
            dx = [x[k] - m_i * auroc[k] for k in (r, s)]
            dw = [w[k] - n_i * auroc[k] for k in (r, s)]
            s10 = i10 / ((i10 - 1) * m) * (dx[0] * dx[1]).sum()
            s01 = i01 / ((i01 - 1) * n) * (dw[0] * dw[1]).sum()
            s11 = [i / (i - 1) * (dx[a] * dw[b]).sum() for a, b in ((0, 1), (1, 0))]
            covariance[r, s] = s10 / m + s01 / n + sum(s11) / (m * n)
    return auroc, covariance


@pytest.mark.parametrize("seed", range(5))
def test_clustered_equals_the_formula_over_all_pairs(seed: int) -> None:
    y, scores, groups = clustered(seed=seed)
    placed = placements(y, scores, groups)
    auroc, covariance = direct(y, scores, groups)
    np.testing.assert_allclose(placed.auroc, auroc, rtol=0, atol=1e-14)
    np.testing.assert_allclose(placed.covariance(), covariance, rtol=1e-10, atol=1e-16)


def test_unclustered_is_delong_from_placement_values() -> None:
    y, scores, _ = clustered()
    placed = placements(y, scores)
    sick, well = scores[y == 1], scores[y == 0]
    won = (sick[:, None] > well[None]) + 0.5 * (sick[:, None] == well[None])  # (m, n, K)
    expected = np.cov(won.mean(1).T) / len(sick) + np.cov(won.mean(0).T) / len(well)
    np.testing.assert_allclose(placed.covariance(), expected, rtol=1e-10)
    influence = placed.influence()
    np.testing.assert_allclose(influence @ influence.T, expected, rtol=1e-10)
    np.testing.assert_allclose(placements(y, scores, np.arange(len(y))).covariance(), expected, rtol=1e-10)


def test_influence_is_close_to_the_formula_where_patients_have_both_classes() -> None:
    y, scores, groups = clustered(200)
    placed = placements(y, scores, groups)
    influence = placed.influence()
    np.testing.assert_allclose(influence @ influence.T, placed.covariance(), rtol=0.02)


def test_half_widths_agree_with_the_bootstrap() -> None:
    ratios = []
    for seed in range(6):
        y, scores, groups = clustered(300, seed)
        error = np.sqrt(placements(y, scores[:, :1], groups).covariance()[0, 0])
        found = bootstrap(y[:, None], scores[:, :1], None, groups, kind="multilabel", num_resamples=2000, seed=seed)
        width = found["macro"]["auroc"]["high"] - found["macro"]["auroc"]["low"]
        ratios.append(2 * 1.959964 * error / width)
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)
    assert max(abs(ratio - 1) for ratio in ratios) < 0.08


def test_rows_of_one_patient_widen_the_error() -> None:
    """Every row four times over: as rows the error halves, as patients it stays."""
    y, scores, _ = clustered()
    patients = np.tile(np.arange(len(y)), 4)
    once = placements(y, scores).covariance()
    again = np.tile(y, 4), np.tile(scores, (4, 1))
    np.testing.assert_allclose(placements(*again, patients).covariance(), once, rtol=1e-10)
    assert placements(*again).covariance()[0, 0] < 0.3 * once[0, 0]


def test_intervals_stay_inside_the_range_and_hold_the_value() -> None:
    low, high = delong_interval(0.98, 0.02**2)
    assert 0 < low < 0.98 < high < 1
    middle = delong_interval(0.5, 0.01**2)
    np.testing.assert_allclose(middle, (0.5 - 0.0196, 0.5 + 0.0196), atol=5e-5)
    assert delong_interval(1.0, 0.0) == (1.0, 1.0)
    assert np.isnan(delong_interval(0.7, float("nan"))).all()


def test_one_patient_of_a_class_has_no_variance() -> None:
    y, scores = np.array([1, 1, 0, 0]), np.arange(4.0)[:, None]
    groups = np.array(["a", "a", "b", "c"])
    placed = placements(y, scores, groups)
    assert np.isnan(placed.covariance()).all()
    assert np.isnan(placed.influence()).all()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TaskError, match="an AUROC needs both classes; got 2 positives and 0 negatives"):
        placements(np.array([1, 1]), np.zeros((2, 1)))
    with pytest.raises(TaskError, match="one group per row is needed: 2 rows, 1 groups"):
        inspect.unwrap(placements)(np.array([0, 1]), np.zeros((2, 1)), np.array(["a"]))


def test_intervals_of_every_label() -> None:
    y, scores, groups = clustered()
    both = np.stack([y, np.zeros_like(y)], 1)
    mask = np.ones(both.shape, dtype=bool)
    mask[:9, 0] = False
    found = auroc_intervals(both, scores, mask, groups, labels=("a", "b"))
    placed = placements(y[9:], scores[9:, :1], groups[9:])
    error = float(np.sqrt(placed.covariance()[0, 0]))
    assert found[0]["auroc"] == placed.auroc[0]
    assert found[0]["standard_error"] == pytest.approx(error)
    assert (found[0]["low"], found[0]["high"]) == delong_interval(float(placed.auroc[0]), error**2)
    assert np.isnan([found[1][name] for name in ("auroc", "standard_error", "low", "high")]).all()
