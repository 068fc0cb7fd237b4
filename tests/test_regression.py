"""Numbers and ranks: ridge, nearest neighbours, metrics and intervals against scikit-learn, scipy and brute force."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_sets import PARTS, by_patient, write_set
from scipy import stats
from sklearn import metrics as sk
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

import probes
from featstore.errors import ConfigError, TaskError
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes import report
from probes.configs import EvalConfig, KnnConfig, LinearConfig, TaskConfig
from probes.evaluation import evaluate_sets
from probes.knn import KNNProbe, KNNRegressor
from probes.labels import read_numbers
from probes.records import load_predictions
from probes.regression import bootstrap_numbers, evaluate_numbers
from probes.ridge import RidgeProbe

RNG = np.random.default_rng(0)


# --- heads


@pytest.mark.parametrize("shape", [(60, 8), (20, 30), (9, 9)])
@pytest.mark.parametrize("standardize", [True, False])
def test_ridge_is_scikit_learn(shape: tuple[int, int], standardize: bool) -> None:
    X = RNG.standard_normal(shape) * RNG.uniform(0.1, 5, shape[1]) + 3
    y = RNG.standard_normal((shape[0], 2)) + X[:, :2] + 40
    mask = np.ones(y.shape, dtype=bool)
    mask[3:6, 1] = False
    head = RidgeProbe(alpha=(0.1, 10.0, 1000.0), standardize=standardize).fit(X, y, mask)
    queries = RNG.standard_normal((5, shape[1]))
    scaler = StandardScaler(with_mean=standardize, with_std=standardize).fit(X)
    for number, alpha in enumerate((0.1, 10.0, 1000.0)):
        for target in range(2):
            rows = mask[:, target]
            model = Ridge(alpha=alpha).fit(scaler.transform(X[rows]), y[rows, target])
            expected = model.predict(scaler.transform(queries))
            np.testing.assert_allclose(head.predictions(queries)[number, :, target], expected, rtol=1e-9)


def test_ridge_in_pieces_is_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = RNG.standard_normal((50, 4)), RNG.standard_normal((50, 1))
    whole = RidgeProbe(alpha=1.0).fit(X, y)
    monkeypatch.setattr("probes.ridge.CHUNK", 7)
    np.testing.assert_allclose(RidgeProbe(alpha=1.0).fit(X, y).coef_, whole.coef_, rtol=1e-10)
    np.testing.assert_allclose(whole.predict(X), RidgeProbe(alpha=1.0).fit(X, y).predict(X), rtol=1e-10)


def test_rows_without_a_target_may_hold_nan() -> None:
    X, y = RNG.standard_normal((12, 3)), RNG.standard_normal((12, 1))
    mask = np.ones((12, 1), dtype=bool)
    mask[[0, 5]] = False
    broken = X.copy()
    broken[[0, 5]] = np.nan
    np.testing.assert_array_equal(
        RidgeProbe(alpha=1.0).fit(broken, y, mask).coef_, RidgeProbe(alpha=1.0).fit(X, y, mask).coef_
    )


def test_what_ridge_refuses() -> None:
    X, y = RNG.standard_normal((6, 3)), RNG.standard_normal((6, 1))
    for alpha in (0.0, (1.0, 1.0), (2.0, 1.0), ()):
        with pytest.raises(ConfigError, match="alpha must be positive and ascending"):
            RidgeProbe(alpha=alpha).fit(X, y)
    with pytest.raises(TaskError, match="targets and mask of 6 rows differ in shape"):
        RidgeProbe().fit(X, y[:5])
    with pytest.raises(TaskError, match="a target has no row to fit on among 6"):
        RidgeProbe().fit(X, y, np.zeros((6, 1), dtype=bool))
    with pytest.raises(TaskError, match="targets must be finite numbers, not NaN or infinity; mask other rows out"):
        RidgeProbe().fit(X, np.full((6, 1), np.nan))
    with pytest.raises(TaskError, match="not fitted yet"):
        RidgeProbe().predict(X)
    with pytest.raises(TaskError, match="features have 2 columns, the probe was fitted on 3"):
        RidgeProbe().fit(X, y).predict(X[:, :2])


def test_neighbours_give_their_weighted_mean() -> None:
    X, y = RNG.standard_normal((40, 5)).astype(np.float32), RNG.standard_normal((40, 2)) * 100
    mask = RNG.random((40, 2)) < 0.7
    queries = RNG.standard_normal((6, 5)).astype(np.float32)
    head = KNNRegressor(k=(3, 7), backend="torch").fit(X, y, mask)
    bank = np.flatnonzero(mask.any(1))
    unit = X[bank] / np.linalg.norm(X[bank], axis=1, keepdims=True)
    similarity = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ unit.T
    scores = head.scores(queries)
    for row in range(6):
        order = np.argsort(-similarity[row])[:7]
        weights = np.exp(similarity[row, order] / 0.07)
        for k in (3, 7):
            for target in range(2):
                known = mask[bank[order[:k]], target]
                w, values = weights[:k][known], y[bank[order[:k]], target][known]
                expected = (w * values).sum() / w.sum() if known.any() else y[mask[:, target], target].mean()
                assert scores[k][row, target] == pytest.approx(expected, rel=1e-4)
    np.testing.assert_array_equal(head.predict(queries), scores[7])


def test_neighbours_of_0_and_1_are_the_vote() -> None:
    X = RNG.standard_normal((30, 4)).astype(np.float32)
    y = (RNG.random((30, 2)) < 0.4).astype(np.int64)
    expected = KNNProbe(k=5, backend="torch").fit(X, y).predict_proba(X)
    np.testing.assert_allclose(
        KNNRegressor(k=5, backend="torch").fit(X, y.astype(float)).predict(X), expected, atol=1e-12
    )


def test_what_neighbours_refuse() -> None:
    X, y = RNG.standard_normal((6, 3)).astype(np.float32), RNG.standard_normal((6, 1))
    with pytest.raises(TaskError, match=r"targets and mask of 6 rows are \(N, T\) or \(N,\); got \(5, 1\)"):
        KNNRegressor().fit(X, y[1:])
    with pytest.raises(TaskError, match="targets must be finite numbers"):
        KNNRegressor().fit(X, np.full((6, 1), np.inf))
    with pytest.raises(TaskError, match="no labelled row to take as neighbours"):
        KNNRegressor().fit(X, y, np.zeros((6, 1), dtype=bool))


# --- metrics


def truth_of(y: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    return {
        "mae": sk.mean_absolute_error(y, scores),
        "rmse": sk.root_mean_squared_error(y, scores),
        "r2": sk.r2_score(y, scores),
        "pearson": stats.pearsonr(y, scores).statistic,
        "spearman": stats.spearmanr(y, scores).statistic,
    }


def test_regression_metrics_are_scikit_learn_and_scipy() -> None:
    y, scores = np.round(RNG.normal(60, 15, (80, 2))), np.round(RNG.normal(60, 15, (80, 2)), 1)
    scores += 0.7 * (y - 60)
    mask = RNG.random((80, 2)) < 0.8
    found = evaluate_numbers(y, scores, mask, kind="regression", labels=("age", "b"))
    assert found["n"] == int(mask.any(1).sum())
    truths = []
    for column, entry in enumerate(found["per_label"]):
        truths.append(truth_of(y[mask[:, column], column], scores[mask[:, column], column]))
        assert {name: entry[name] for name in truths[-1]} == pytest.approx(truths[-1], rel=1e-11)
    assert found["macro"] == pytest.approx({name: np.mean([t[name] for t in truths]) for name in truths[0]}, rel=1e-11)


def test_ordinal_metrics_are_scikit_learn_and_scipy() -> None:
    y = RNG.integers(0, 4, (70, 1)).astype(float)
    scores = y + RNG.normal(0, 1.2, (70, 1))
    found = evaluate_numbers(y, scores, kind="ordinal", labels=("grade",), num_classes=4)["per_label"][0]
    rounded = np.clip(np.rint(scores[:, 0]), 0, 3).astype(int)
    assert found["qwk"] == pytest.approx(sk.cohen_kappa_score(y[:, 0].astype(int), rounded, weights="quadratic"))
    assert found["mae"] == pytest.approx(np.abs(y - scores).mean())
    assert found["spearman"] == pytest.approx(stats.spearmanr(y[:, 0], scores[:, 0]).statistic)


@pytest.mark.parametrize("kind", ["regression", "ordinal"])
def test_intervals_are_those_of_repeated_patients(kind: Any) -> None:
    from probes.statistics import draw_counts, interval

    y = RNG.integers(0, 4, (30, 1)).astype(float)
    scores = y + np.round(RNG.normal(0, 1, (30, 1)), 1)
    groups = np.array([f"p{number // 3}" for number in range(30)])
    found = bootstrap_numbers(
        y, scores, None, groups, kind=kind, labels=("t",), num_classes=4, num_resamples=70, seed=3
    )
    counts = draw_counts(groups, num_resamples=70, seed=3)
    index = np.unique(groups, return_inverse=True)[1]
    values: dict[str, list[float]] = {}
    for row in counts:
        again = np.repeat(np.arange(30), row[index])
        entry = evaluate_numbers(y[again], scores[again], kind=kind, labels=("t",), num_classes=4)["per_label"][0]
        for name, value in entry.items():
            if name not in ("label", "n"):
                values.setdefault(name, []).append(value)
        if kind == "regression":
            assert entry["spearman"] == pytest.approx(stats.spearmanr(y[again, 0], scores[again, 0]).statistic)
    for name, column in values.items():
        expected = interval(np.array(column))
        for made in (found["macro"][name], found["per_label"][0][name]):
            assert made == pytest.approx(expected, rel=1e-9)
    assert found["num_groups"] == 10


def test_constant_targets_are_not_guessed() -> None:
    y = np.array([[3.0, 1.0], [3.0, 2.0]])
    found = evaluate_numbers(y, y, kind="regression", labels=("a", "b"))
    assert found["skipped"] == 1
    assert np.isnan(found["per_label"][0]["r2"])
    assert found["macro"]["r2"] == 1.0
    one = evaluate_numbers(y[:1], y[:1], kind="ordinal", labels=("a", "b"), num_classes=5)
    assert np.isnan(one["macro"]["qwk"])
    assert one["per_label"][0]["mae"] == 0.0
    none = evaluate_numbers(y[:0], y[:0], kind="regression", labels=("a", "b"))
    assert none["n"] == 0
    assert np.isnan(none["per_label"][0]["mae"])


def test_metrics_that_cannot_be_computed() -> None:
    y = np.zeros((3, 1))
    with pytest.raises(TaskError, match="targets, predictions and mask have one shape"):
        evaluate_numbers(y, np.zeros((3, 2)), kind="regression", labels=("a",))
    with pytest.raises(TaskError, match="targets and predictions must be finite numbers"):
        evaluate_numbers(y, np.full((3, 1), np.nan), kind="regression", labels=("a",))


# --- tasks and records


def test_a_value_that_is_no_number(tmp_path: Path, store_path: Path) -> None:
    columns: dict[str, list[Any]] = {
        "part": PARTS,
        "age": ["30", "061Y", None, "", "44", "50", "60", "70"],
        "grade": ["lo", "hi"] * 4,
    }
    columns |= {"years": ["30", 61.5, None, "", "44", "-1", "60", "7e1"]}
    columns["years"] = [None if value is None else str(value) for value in columns["years"]]
    features = write_set(store_path, tmp_path / "x", columns, np.ones((8, 3)))
    with pytest.raises(TaskError, match="label 'age': row 2 holds a value that is no number; a regression task reads"):
        probes.task(features, labels=["age"], kind="regression")
    task = probes.task(features, labels=["years"], kind="regression")
    assert task.y[:, 0].tolist() == [30, 61.5, 0, 0, 44, -1, 60, 70], "-1 is a number here"
    assert task.mask[:, 0].tolist() == [True, True, False, False, True, True, True, True]
    assert task.mask_train[:, 0].tolist() == task.mask[:, 0].tolist(), "a blank is never a zero"
    with pytest.raises(TaskError, match="an ordinal task needs its classes in order, at least two; name them with"):
        probes.task(features, labels=["grade"], kind="ordinal")
    ranks = probes.task(features, labels=["grade"], kind="ordinal", classes="hi,lo")
    assert ranks.y[:, 0].tolist() == [1, 0] * 4
    with pytest.raises(TaskError, match="label 'age': row 1 holds a value that is no number"):
        read_numbers(["inf"], "age")


def aged(store: Path, root: Path, *, failed: tuple[int, ...] = ()) -> FeatureSet:
    """150 samples, two a patient, with an age and a grade that the features know of."""
    rng = np.random.default_rng(1)
    age = np.round(rng.normal(60, 10, 150))
    features = rng.standard_normal((150, 6))
    features[:, 0] += (age - 60) / 5
    patient = np.arange(150) // 2
    columns = {
        **by_patient(patient),
        "age": [None if row % 13 == 0 else f"{value:.0f}" for row, value in enumerate(age)],
        "grade": ["low" if value < 55 else "mid" if value < 65 else "high" for value in age],
        "same": ["5"] * 150,
    }
    return write_set(store, root, columns, features, failed=failed)


def run(store: Path, probe: str, head: Any, **reading: Any) -> dict[str, Any]:
    label = "grade" if reading["kind"] == "ordinal" else "age"
    config = EvalConfig(dataset="x", labels=label, resamples=30)
    return evaluate_sets(Store(store), probe, config, head, reading=TaskConfig(**reading))[0]


def test_linear_regression_is_ridge_chosen_on_validation(tmp_path: Path, store_path: Path) -> None:
    features = aged(store_path, tmp_path / "x")
    record = run(store_path, "linear", LinearConfig(alpha="1,100,10000"), kind="regression")
    X, manifest = features.load("cls").astype(np.float64), features.manifest
    known = np.array([value is not None for value in manifest.column("age")])
    y = np.array([float(value or 0) for value in manifest.column("age")])
    rows = {name: known & (np.array(manifest.column("split")) == name) for name in ("train", "val", "test")}
    scaler = StandardScaler().fit(X[rows["train"]])
    quality = {}
    for alpha in (1.0, 100.0, 10000.0):
        model = Ridge(alpha=alpha).fit(scaler.transform(X[rows["train"]]), y[rows["train"]])
        quality[alpha] = (model.score(scaler.transform(X[rows["val"]]), y[rows["val"]]), model)
    best = max(quality, key=lambda alpha: quality[alpha][0])
    assert record["choices"]["alpha"] == {"age": best}
    expected = quality[best][1].predict(scaler.transform(X[rows["test"]]))
    assert record["metrics"]["test"]["macro"] == pytest.approx(truth_of(y[rows["test"]], expected), rel=1e-5)
    assert record["metrics"]["val"]["macro"]["r2"] == pytest.approx(quality[best][0], rel=1e-5)
    table = load_predictions(record).to_pydict()
    assert {"label:age", "mask:age", "score:age"} <= table.keys()
    low, high = (record["metrics"]["test"]["intervals"]["macro"]["mae"][key] for key in ("low", "high"))
    assert low < record["metrics"]["test"]["macro"]["mae"] < high


@pytest.mark.parametrize(("probe", "head"), [("knn", KnnConfig(k="3,9,20")), ("linear", LinearConfig(refit=True))])
@pytest.mark.parametrize("kind", ["regression", "ordinal"])
def test_records_of_numbers_and_ranks(tmp_path: Path, store_path: Path, probe: str, head: Any, kind: str) -> None:
    aged(store_path, tmp_path / "x", failed=(3,))
    classes = "low,mid,high" if kind == "ordinal" else ""
    record = run(store_path, probe, head, kind=kind, classes=classes)
    macro = record["metrics"]["test"]["macro"]
    assert macro["spearman"] > 0.5
    assert record["task"]["kind"] == kind
    assert record["num_failed"] == 1
    macro_table, labels, _ = report.tables([record])[0]
    headings = {"regression": "test R2 [95%]", "ordinal": "test weighted kappa [95%]"}
    assert headings[kind] in macro_table[1]
    assert "AUROC" not in " ".join([*macro_table[1], *labels[1]])
    assert labels[1][:2] == ["label", "n"]
    assert len(macro_table[2][0]) == len(macro_table[1])


def test_numbers_are_never_ranked_with_classes(tmp_path: Path, store_path: Path) -> None:
    aged(store_path, tmp_path / "x")
    config = EvalConfig(dataset="x", labels="grade", resamples=2)
    head = KnnConfig(k="5")
    classes = evaluate_sets(Store(store_path), "knn", config, head)
    ranks = run(store_path, "knn", head, kind="ordinal", classes="low,mid,high")
    assert len(report.tables([*classes, ranks])) == 2


def test_a_target_that_never_varies(tmp_path: Path, store_path: Path) -> None:
    aged(store_path, tmp_path / "x")
    config = EvalConfig(dataset="x", labels="same", resamples=2)
    with pytest.raises(TaskError, match="no target has two different values in train"):
        evaluate_sets(Store(store_path), "linear", config, LinearConfig(), reading=TaskConfig(kind="regression"))


def test_options_of_the_other_head(tmp_path: Path, store_path: Path) -> None:
    aged(store_path, tmp_path / "x")
    for head, flag in ((LinearConfig(C="1"), "--C"), (LinearConfig(class_weight="balanced"), "--class-weight")):
        with pytest.raises(TaskError, match=f"is fitted by ridge regression, which takes --alpha, not {flag}"):
            run(store_path, "linear", head, kind="regression")
    config = EvalConfig(dataset="x", labels="grade", resamples=2)
    with pytest.raises(TaskError, match="--alpha is the penalty of ridge regression; labels and classes take --C"):
        evaluate_sets(Store(store_path), "linear", config, LinearConfig(alpha="1"))
    with pytest.raises(ConfigError, match="--alpha takes positive numbers"):
        LinearConfig(alpha="0")


def test_no_target_that_varies_in_validation_chooses_nothing() -> None:
    from probes.linear import choose_alpha
    from probes.tasks import Samples

    y = np.array([[1.0, 2.0], [1.0, 3.0]])
    truth = Samples(y, np.ones((2, 2), dtype=bool), np.array(["a", "b"]), ["a", "b"])
    per_alpha = np.stack([y, y, y + 1])
    assert choose_alpha(per_alpha, truth).tolist() == [1, 1], "ties take the largest alpha"
    with pytest.raises(TaskError, match="no target varies among the validation rows, so no alpha can be chosen"):
        choose_alpha(per_alpha, truth._replace(y=np.ones((2, 2))))
