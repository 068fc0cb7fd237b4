"""The bootstrap against scikit-learn on the repeated rows themselves."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, recall_score, roc_auc_score

from featstore.errors import ConfigError, CorruptError, TaskError
from probes.draws import Draws
from probes.metrics import METRICS, decide, evaluate
from probes.statistics import bootstrap, draw_counts, interval, resample, resample_decisions


def data(num_rows: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Three labels (one rare), scores with ties, mask, patients of one to several rows."""
    random = np.random.default_rng(seed)
    y = (random.random((num_rows, 3)) < (0.04, 0.3, 0.7)).astype(np.int64)
    y[0], y[1:, 0] = 1, 0
    scores = np.round(np.clip(random.random((num_rows, 3)) * 0.7 + 0.3 * y, 0, 1), 1)
    mask = random.random((num_rows, 3)) < 0.8
    mask[0] = True
    groups = np.array([f"p{number}" for number in random.integers(0, num_rows // 2, num_rows)])
    return y, scores, mask, groups


def repeated(groups: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Row numbers of one resample: every row as often as its group was drawn."""
    ids = np.unique(groups)
    return np.concatenate([np.repeat(np.flatnonzero(groups == group), count) for group, count in zip(ids, counts)])


@pytest.mark.parametrize("masked", [False, True])
def test_every_resample_equals_sklearn_on_its_rows(masked: bool) -> None:
    y, scores, mask, groups = data()
    mask = mask if masked else np.ones_like(mask)
    values = resample(y, scores, mask, groups, kind="multilabel", num_resamples=40, seed=3)
    used = mask.any(1)
    counts = draw_counts(groups[used], num_resamples=40, seed=3)
    undefined = 0
    for number, count in enumerate(counts):
        rows = np.flatnonzero(used)[repeated(groups[used], count)]
        expected = evaluate(y[rows], scores[rows], mask[rows], kind="multilabel")
        # A resample that lacks a label has no macro value: means over other labels would be of another thing.
        whole = expected["skipped"] == 0
        for name in METRICS:
            macro = expected["macro"][name] if whole else float("nan")
            assert values.macro[name][number] == pytest.approx(macro, abs=1e-12, nan_ok=True)
            label_values = [entry[name] for entry in expected["per_label"]]
            assert values.per_label[name][number] == pytest.approx(label_values, abs=1e-12, nan_ok=True)
        for column in range(3):
            valid = rows[mask[rows, column]]
            true, score = y[valid, column], scores[valid, column]
            if 0 < true.sum() < len(true):
                area, precision = roc_auc_score(true, score), average_precision_score(true, score)
                assert values.per_label["auroc"][number, column] == pytest.approx(area, abs=1e-12)
                assert values.per_label["auprc"][number, column] == pytest.approx(precision, abs=1e-12)
                decided = score >= 0.5
                for name, expected_value in (
                    ("f1", f1_score(true, decided)),
                    ("sensitivity", recall_score(true, decided)),
                    ("specificity", recall_score(true, decided, pos_label=0)),
                ):
                    assert values.per_label[name][number, column] == pytest.approx(expected_value, abs=1e-12)
            else:
                undefined += 1
    assert undefined == np.isnan(values.per_label["auroc"]).sum() > 0
    assert 0 < np.isnan(values.macro["auroc"]).sum() < 40


@pytest.mark.parametrize("num_classes", [2, 4])
def test_categorical_labels_equal_evaluation_of_the_rows(num_classes: int) -> None:
    random = np.random.default_rng(5)
    y = random.integers(0, num_classes, 50)
    scores = np.round(random.random((50, num_classes)) + 0.5 * np.eye(num_classes)[y], 1)
    values = resample(y, scores, kind="multiclass", num_resamples=30, seed=1)
    for number, count in enumerate(draw_counts(np.arange(50), num_resamples=30, seed=1)):
        rows = np.repeat(np.arange(50), count)
        expected = evaluate(y[rows], scores[rows], kind="multiclass")
        for name in METRICS:
            assert values.macro[name][number] == pytest.approx(expected["macro"][name], abs=1e-12)
            label_values = [entry[name] for entry in expected["per_label"]]
            assert values.per_label[name][number] == pytest.approx(label_values, abs=1e-12)


def test_counts_draw_as_many_groups_as_there_are_and_are_a_prefix_of_longer_tables() -> None:
    groups = np.array(["b", "a", "b", "c"])
    counts = draw_counts(groups, num_resamples=200, seed=7)
    assert counts.shape == (200, 3)
    assert (counts.sum(1) == 3).all()
    np.testing.assert_array_equal(counts[:50], draw_counts(groups, num_resamples=50, seed=7))
    assert (counts != draw_counts(groups, num_resamples=200, seed=8)).any()
    large = draw_counts(np.arange(1000), num_resamples=400, seed=0)
    assert large.mean() == 1
    assert large.var() == pytest.approx(1, rel=0.02)  # multinomial: 1 - 1/1000


def test_rows_of_a_group_stay_together() -> None:
    """With one group every resample is the data itself; with each row its own group it is not."""
    y, scores, mask, _ = data()
    point = evaluate(y, scores, mask, kind="multilabel")["macro"]["auroc"]
    one = bootstrap(y, scores, mask, np.zeros(len(y)), kind="multilabel", num_resamples=20)["macro"]["auroc"]
    assert one["low"] == pytest.approx(point, abs=1e-12)
    assert one["high"] == pytest.approx(point, abs=1e-12)
    alone = bootstrap(y, scores, mask, kind="multilabel", num_resamples=20)
    assert alone["macro"]["auroc"]["low"] < point < alone["macro"]["auroc"]["high"]
    assert (one["skipped"], alone["num_groups"]) == (0, mask.any(1).sum())


def test_row_order_does_not_matter() -> None:
    y, scores, mask, groups = data()
    order = np.random.default_rng(0).permutation(len(y))
    first = resample(y, scores, mask, groups, kind="multilabel", num_resamples=30)
    second = resample(y[order], scores[order], mask[order], groups[order], kind="multilabel", num_resamples=30)
    for name in METRICS:
        np.testing.assert_allclose(first.per_label[name], second.per_label[name], rtol=0, atol=1e-14)


def test_intervals_are_percentiles_of_the_defined_resamples() -> None:
    y, scores, mask, groups = data()
    values = resample(y, scores, mask, groups, kind="multilabel", num_resamples=200, labels=["a", "b", "c"])
    result = bootstrap(y, scores, mask, groups, kind="multilabel", num_resamples=200, labels=["a", "b", "c"], level=0.9)
    rare = result["per_label"][0]
    defined = values.per_label["auroc"][:, 0]
    defined = defined[~np.isnan(defined)]
    assert (rare["label"], rare["auroc"]["skipped"]) == ("a", 200 - len(defined))
    assert len(defined) < 200
    np.testing.assert_allclose([rare["auroc"]["low"], rare["auroc"]["high"]], np.percentile(defined, [5, 95]))
    assert {name: result[name] for name in ("level", "num_resamples", "seed")} == {
        "level": 0.9,
        "num_resamples": 200,
        "seed": 0,
    }


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Accuracy 0.8 of independent rows: 95 % of intervals hold 0.8 up to the noise of 100 trials."""
    random = np.random.default_rng(0)
    inside = 0
    for trial in range(100):
        y = np.arange(150)[:, None] % 2
        right = random.random((150, 1)) < 0.8
        result = bootstrap(y, np.where(right, y, 1 - y).astype(float), kind="multilabel", num_resamples=200, seed=trial)
        inside += result["macro"]["accuracy"]["low"] <= 0.8 <= result["macro"]["accuracy"]["high"]
    assert 87 <= inside <= 100


def test_nothing_defined_gives_nan_and_counts() -> None:
    result = bootstrap(np.zeros((4, 1), int), np.zeros((4, 1)), kind="multilabel", num_resamples=10)
    assert np.isnan(result["macro"]["auroc"]["low"])
    assert result["macro"]["auroc"]["skipped"] == 10
    assert result["per_label"][0]["accuracy"] == {"low": 1.0, "high": 1.0, "skipped": 0}
    empty = bootstrap(np.zeros((0, 1), int), np.zeros((0, 1)), kind="multilabel", num_resamples=3)
    assert (empty["num_groups"], empty["macro"]["accuracy"]["skipped"]) == (0, 3)


def test_wrong_arguments_are_refused() -> None:
    y, scores, mask, groups = data()
    with pytest.raises(TaskError, match="one group per row is needed: 60 rows, 59 groups"):
        bootstrap(y, scores, mask, groups[1:], kind="multilabel")
    with pytest.raises(ConfigError, match="num_resamples must be at least 1, got 0"):
        bootstrap(y, scores, mask, groups, kind="multilabel", num_resamples=0)
    with pytest.raises(ConfigError, match=r"level must lie between 0 and 1, got 95.0"):
        interval(np.zeros(3), 95.0)


@pytest.mark.parametrize("limit", [1, 2000])
def test_resamples_too_heavy_for_packing_give_the_same_numbers(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a million rows; the bound by the largest group (here 60 rows in 28 groups) may be loose."""
    y, scores, mask, groups = data()
    expected = resample(y, scores, mask, groups, kind="multilabel", num_resamples=30)
    monkeypatch.setattr("probes.ranking.LANE_LIMIT", limit)
    found = resample(y, scores, mask, groups, kind="multilabel", num_resamples=30)
    for name in METRICS:
        np.testing.assert_allclose(found.macro[name], expected.macro[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_alone_is_the_same(name: str) -> None:
    y, scores, mask, groups = data()
    every = resample(y, scores, mask, groups, kind="multilabel", num_resamples=30)
    alone = resample(y, scores, mask, groups, kind="multilabel", num_resamples=30, metrics=(name,))  # type: ignore[arg-type]
    assert list(alone.macro) == list(alone.per_label) == [name]
    np.testing.assert_array_equal(alone.per_label[name], every.per_label[name])
    np.testing.assert_array_equal(alone.macro[name], every.macro[name])


def test_one_table_serves_every_model_and_can_be_kept(tmp_path: Path) -> None:
    y, scores, mask, groups = data()
    draws = Draws.of(groups[mask.any(1)], num_resamples=30, seed=2)
    own = resample(y, scores, mask, groups, kind="multilabel", num_resamples=30, seed=2)
    assert own.draws == draws.digest
    assert bootstrap(y, -scores, mask, groups, kind="multilabel", num_resamples=30, seed=2)["draws"] == draws.digest
    assert Draws.of(groups[::-1], num_resamples=30, seed=3).digest != draws.digest
    draws.write(tmp_path / "draws.npz")
    kept = Draws.read(tmp_path / "draws.npz")
    assert (kept.digest, kept.seed) == (draws.digest, 2)
    again = resample_decisions(decide(y, scores, mask, kind="multilabel"), groups, kept)
    np.testing.assert_array_equal(again.macro["auroc"], own.macro["auroc"])
    with np.load(tmp_path / "draws.npz") as table:
        parts = dict(table)
    parts["counts"][0, 0] += 1
    np.savez(tmp_path / "draws.npz", **parts)
    with pytest.raises(CorruptError, match="the table of resamples does not match its digest"):
        Draws.read(tmp_path / "draws.npz")


def test_tables_and_metrics_that_do_not_fit_are_refused() -> None:
    y, scores, mask, groups = data()
    decisions = decide(y, scores, mask, kind="multilabel")
    with pytest.raises(TaskError, match=r"1 groups, such as 'p\d+', are not in the table of resamples"):
        resample_decisions(decisions, groups, Draws.of(np.unique(groups)[:-1]))
    with pytest.raises(ConfigError, match="unknown metric 'dice'; known: auroc, auprc"):
        inspect.unwrap(resample_decisions)(decisions, groups, Draws.of(groups), metrics=("dice",))
