"""Baselines against closed forms and scikit-learn, and where tables put them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_sets import write_set
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score, roc_auc_score

from featstore.errors import TaskError, UnknownNameError
from featstore.store.features import FeatureSet
from probes import report, task
from probes.baselines import (
    BaselineConfig,
    BaselineSet,
    baseline_task,
    choose_columns,
    encode,
    fit_chance,
    fit_majority,
    fit_metadata,
)
from probes.logistic import DEFAULT_C
from probes.ridge import DEFAULT_ALPHA
from probes.scoring import score
from probes.tasks import Task

SIZE = 240
SPLIT = np.array(["train", "train", "val", "test"] * (SIZE // 4))


@pytest.fixture
def features(tmp_path: Path, store_path: Path) -> FeatureSet:
    """Labels that age and sex tell something of; a few cells are blank."""
    rng = np.random.default_rng(0)
    age, sex = rng.integers(20, 90, SIZE), rng.integers(0, 2, SIZE)
    risk = (age - 55) / 20 + sex
    a = (risk + rng.standard_normal(SIZE) > 0.5).astype(int)
    b = (rng.random(SIZE) < 0.2).astype(int)
    kind = np.array(["x", "y", "y", "z"])[rng.integers(0, 4, SIZE)]
    columns: dict[str, list[Any]] = {
        "part": SPLIT.tolist(),
        "pid": [f"p{row}" for row in range(SIZE)],
        "a": [str(value) for value in a],
        "b": ["" if row % 17 == 5 else str(value) for row, value in enumerate(b)],
        "kind": kind.tolist(),
        "depth": [f"{value:.3f}" for value in risk + 0.5 * rng.standard_normal(SIZE)],
        "stage": [str(value) for value in np.clip(np.round(risk + 1), 0, 3).astype(int)],
        "Patient Age": ["" if row % 13 == 0 else f"{value:03d}Y" for row, value in enumerate(age)],
        "sex": [["F", "M", ""][2 if row % 19 == 0 else value] for row, value in enumerate(sex)],
        "view": [["AP", "PA", "LL"][0 if row < SIZE // 2 else 1 + (SPLIT[row] == "test")] for row in range(SIZE)],
        "height": [str(100 + row % 60) for row in range(SIZE)],
    }
    matrix = rng.standard_normal((SIZE, 4))
    return write_set(store_path, tmp_path / "root", columns, matrix, label_columns="a,b", failed=(3,))


def rows_of(made: Task, split: str) -> np.ndarray:
    return np.asarray(made.index(split))


def metrics(made: Task, fitted: Any) -> dict[str, Any]:
    return score(made, "test", fitted.test_scores, resamples=0, seed=0)


def test_chance_ranks_nothing(features: FeatureSet) -> None:
    made = task(features, labels=["a", "b"])
    fitted = fit_chance(baseline_task(made, "baseline:chance"), "", BaselineConfig())
    assert fitted.test_scores.shape == (len(rows_of(made, "test")), 2)
    found = metrics(made, fitted)
    y, mask, _, _ = made.truth("test")
    for number, entry in enumerate(found["per_label"]):
        assert entry["auroc"] == 0.5
        assert entry["auprc"] == pytest.approx(y[mask[:, number], number].mean(), abs=1e-12)
    assert fitted.num_parameters == 0


def test_majority_decides_for_what_is_most_frequent_in_training(features: FeatureSet) -> None:
    made = task(features, labels=["a", "b"])
    fitted = fit_majority(made, "", BaselineConfig())
    y, mask, _, _ = made.samples("train", "train")
    shares = [y[mask[:, number], number].mean() for number in (0, 1)]
    np.testing.assert_allclose(fitted.test_scores, np.tile(shares, (len(fitted.test_scores), 1)), rtol=1e-12)
    truth = made.truth("test")
    for number, entry in enumerate(metrics(made, fitted)["per_label"]):
        right = (truth.y[truth.mask[:, number], number] == (shares[number] >= 0.5)).mean()
        assert entry["accuracy"] == pytest.approx(right, abs=1e-12)
        assert (entry["balanced_accuracy"], entry["auroc"]) == (0.5, 0.5)


def test_majority_of_classes(features: FeatureSet) -> None:
    made = task(features, labels=["kind"])
    fitted = fit_majority(made, "", BaselineConfig())
    y, mask, _, _ = made.truth("test")
    assert fitted.choices["said"] == "always y"
    assert metrics(made, fitted)["macro"]["accuracy"] == pytest.approx((y[mask] == 1).mean(), abs=1e-12)
    assert metrics(made, fitted)["macro"]["balanced_accuracy"] == pytest.approx(1 / 3, abs=1e-12)


def test_constants_of_numbers_are_mean_and_median(features: FeatureSet) -> None:
    for label, kind in (("depth", "regression"), ("stage", "ordinal")):
        more: dict[str, Any] = {"classes": "0,1,2,3"} if kind == "ordinal" else {}
        made = task(features, labels=[label], kind=kind, **more)
        y, mask, _, _ = made.samples("train", "train")
        known = y[mask[:, 0], 0]
        assert fit_chance(made, "", BaselineConfig()).test_scores[0, 0] == pytest.approx(known.mean())
        assert fit_majority(made, "", BaselineConfig()).test_scores[0, 0] == pytest.approx(np.median(known))
    # A constant explains nothing: R2 is 0 but for the means of training and test, which differ.
    made = task(features, labels=["depth"], kind="regression")
    truth, mean = made.truth("test").y[:, 0], fit_chance(made, "", BaselineConfig()).test_scores[0, 0]
    expected = -((truth.mean() - mean) ** 2) / truth.var()
    assert metrics(made, fit_chance(made, "", BaselineConfig()))["macro"]["r2"] == pytest.approx(expected, abs=1e-9)


def reference_matrix(features: FeatureSet, train: np.ndarray) -> np.ndarray:
    """Age scaled by its training rows, whether it is missing, sex and view one-hot: by hand, in float64."""
    ages = features.manifest.column("Patient Age")
    years = np.array([np.nan if not cell else float(cell[:-1]) for cell in ages])
    known = years[train][~np.isnan(years[train])]
    columns = [np.nan_to_num((years - known.mean()) / known.std()), np.isnan(years).astype(float)]
    for name, values in (("sex", ["", "F", "M"]), ("view", ["AP", "PA"])):  # LL is in test alone
        cells = np.array(["" if cell is None else cell for cell in features.manifest.column(name)])
        columns += [(cells == value).astype(float) for value in values]
    return np.stack(columns, 1)


def test_columns_become_numbers_as_training_has_them(features: FeatureSet) -> None:
    train = rows_of(task(features, labels=["a"]), "train")
    found = encode(features.manifest, ["Patient Age", "sex", "view"], train)
    np.testing.assert_allclose(found, reference_matrix(features, train), atol=1e-6)
    # Many different numbers are a quantity without an indicator where none is missing.
    assert encode(features.manifest, ["height"], train).shape == (SIZE, 1)
    assert encode(features.manifest, ["stage"], train).shape == (SIZE, 4)


def test_metadata_is_scikit_learn_chosen_on_validation(features: FeatureSet) -> None:
    made = task(features, labels=["a"])
    rows = {split: rows_of(made, split) for split in ("train", "val", "test")}
    X, y = reference_matrix(features, rows["train"]), np.array(features.manifest.column("a")) == "1"
    found = []
    for C in DEFAULT_C:
        model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10).fit(X[rows["train"]], y[rows["train"]])
        scores = model.predict_proba(X)[:, 1]
        found.append((roc_auc_score(y[rows["val"]], scores[rows["val"]]), C, scores[rows["test"]]))
    columns = ("Patient Age", "sex", "view")
    fitted = fit_metadata(baseline_task(made, "baseline:metadata", columns), "", BaselineConfig(columns=columns))
    best = max(quality for quality, _, _ in found)
    chosen = next(entry for entry in found if entry[1] == fitted.choices["C"]["a"])
    assert chosen[0] == pytest.approx(best, abs=1e-12)
    np.testing.assert_allclose(fitted.test_scores[:, 0], chosen[2], atol=1e-4)
    assert metrics(made, fitted)["macro"]["auroc"] > 0.65
    assert fitted.notes[0] == "metadata only: Patient Age, sex, view"
    assert fitted.choices["columns"] == list(columns)


def test_metadata_of_numbers_is_ridge(features: FeatureSet) -> None:
    made = task(features, labels=["depth"], kind="regression")
    rows = {split: rows_of(made, split) for split in ("train", "val", "test")}
    X = reference_matrix(features, rows["train"])
    y = np.array([float(cell) for cell in features.manifest.column("depth")])
    columns = ("Patient Age", "sex", "view")
    fitted = fit_metadata(baseline_task(made, "baseline:metadata", columns), "", BaselineConfig(columns=columns))
    alpha = fitted.choices["alpha"]["depth"]
    model = Ridge(alpha=alpha).fit(X[rows["train"]], y[rows["train"]])
    np.testing.assert_allclose(fitted.test_scores[:, 0], model.predict(X[rows["test"]]), atol=1e-4)
    qualities = [
        r2_score(y[rows["val"]], Ridge(alpha=value).fit(X[rows["train"]], y[rows["train"]]).predict(X[rows["val"]]))
        for value in DEFAULT_ALPHA
    ]
    assert r2_score(y[rows["val"]], fitted.val_scores[:, 0]) == pytest.approx(max(qualities), abs=1e-4)


def test_columns_are_found_by_what_they_are_and_labels_are_none(features: FeatureSet) -> None:
    manifest = features.manifest
    assert sorted(choose_columns(manifest, ["a"], None)) == ["Patient Age", "sex", "view"]
    assert sorted(choose_columns(manifest, ["sex"], None)) == ["Patient Age", "view"]
    assert sorted(choose_columns(manifest, ["Patient Gender"], None)) == ["Patient Age", "view"]  # sex by another name
    assert choose_columns(manifest, ["a"], ["age", "height", "age"]) == ("Patient Age", "height")
    with pytest.raises(TaskError, match="--metadata sex is a label of the task, which would predict itself"):
        choose_columns(manifest, ["sex"], ["sex"])
    with pytest.raises(UnknownNameError, match="--metadata names no column of 'x': 'scanner'; it has id"):
        choose_columns(manifest, ["a"], ["scanner"])


def test_ids_and_constants_are_no_metadata(features: FeatureSet) -> None:
    train = rows_of(task(features, labels=["a"]), "train")
    with pytest.raises(TaskError, match="'pid' has 120 different values in training, such as 'p0'; a baseline takes"):
        encode(features.manifest, ["pid"], train)
    with pytest.raises(TaskError, match="metadata part: no column varies among the training rows; name others"):
        encode(features.manifest, ["part"], train)


def test_a_baseline_has_the_rows_of_its_set_and_no_features(features: FeatureSet) -> None:
    made = task(features, labels=["a"])
    other = baseline_task(made, "baseline:chance")
    assert other.digest == made.digest
    assert [other.index(split).tolist() for split in ("train", "val", "test")] == [
        made.index(split).tolist() for split in ("train", "val", "test")
    ]
    assert other.features.failures == features.failures != {}
    assert isinstance(other.features, BaselineSet)
    with pytest.raises(TaskError, match="baseline 'chance' is a constant and has no features"):
        other.features.load("cls")


def record(probe: str, auroc: float, **more: Any) -> dict[str, Any]:
    """As much of a record as a table reads."""
    macro = {"auroc": auroc, "auprc": 0.2, "accuracy": 0.9, "balanced_accuracy": 0.5}
    entry = {"label": "a", "n": 9, "positives": 3, **macro}
    return {
        "probe": probe,
        "dataset": "d",
        "set": f"d/{probe}",
        "fingerprint": probe,
        "features": "cls",
        "random_weights": False,
        "preprocess": None,
        "task": {
            "name": "t", "digest": "1", "kind": "multilabel", "unit": "image", "pool": None, "notes": [],
            "groups_known": True, "splits": {"train": 1, "val": 1, "test": 1},
            "patients": {"train": 1, "val": 1, "test": 1},
            "spec": {"labels": ["a"]},
        },
        "config": {"head": {}, "evaluation": {"resamples": 10, "seed": 0}},
        "choices": {"said": "so"},
        "metrics": {split: {"macro": macro, "per_label": [entry], "skipped": 0} for split in ("val", "test")},
        "notes": [],
        "num_failed": 0,
        "test_opened": 1,
        **more,
    }  # fmt: skip


def test_baselines_stand_below_and_are_never_ranked() -> None:
    own, best = record("mlp", 0.4), record("baseline:metadata", 0.99)
    chance = record("baseline:chance", 0.5)
    old = {**best, "metrics": record("x", 0.1)["metrics"]}
    [(macro, labels, _)] = report.tables([chance, own, old, best])
    assert [row[0] for row in macro[2]] == ["mlp", "baseline: chance", "baseline: metadata"]
    assert [row[3] for row in macro[2]] == ["0.400", "0.500", "0.990"]  # of two equal ones the later
    assert labels[0].startswith("mlp")
    assert report.rule_of(macro) == 1
    assert macro[2][1][5:] == ["-", "-", "so", "0"]  # one score for all decides nothing
    assert macro[2][0][7] == "so"  # what a probe says of its choice
    # Another task, or none: a table of their own.
    moved = replace_task(best, digest="2")
    [(macro, _, _)] = report.tables([own, moved])
    assert (len(macro[2]), report.rule_of(macro)) == (1, None)
    assert [len(table[2]) for table in report.lone_baselines([own, moved, chance])] == [1]
    shown: list[tuple[str, int | None]] = []
    report.print_tables([chance], lambda title, columns, rows, right=(), rule=None: shown.append((rows[0][0], rule)))
    assert shown == [("baseline: chance", None)]


def replace_task(found: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**found, "task": {**found["task"], **more}}


def test_probes_of_equal_options_but_another_protocol_are_not_ranked_together() -> None:
    plain = record("linear", 0.4, config={"head": {"protocol": None}, "evaluation": {"resamples": 10, "seed": 0}})
    other = record("linear", 0.5, config={"head": {"protocol": "dinov2"}, "evaluation": {"resamples": 10, "seed": 0}})
    assert len(report.tables([plain, other, record("baseline:chance", 0.5)])) == 2


def test_patients_alike_by_their_metadata_are_no_leak(features: FeatureSet) -> None:
    """A wide matrix of few different rows."""
    columns = ("height", "sex", "view")
    made = baseline_task(task(features, labels=["a"]), "baseline:metadata", columns)
    matrix = np.tile(np.eye(20, dtype=np.float32), (SIZE // 20, 1))
    made = replace(made, features=BaselineSet(features, "metadata", columns, matrix))
    made.repeats[", ".join(columns)] = ""
    assert made.arrays("train", ", ".join(columns))[0].shape[1] == 20
    again = baseline_task(task(features, labels=["a"]), "baseline:metadata", columns)
    assert again.repeats == {", ".join(columns): ""}


def test_a_set_on_disk_stays_as_it_is(features: FeatureSet) -> None:
    made = baseline_task(task(features, labels=["a"]), "baseline:metadata", ("sex",))
    assert replace(made).features.spec["fingerprint"] != features.fingerprint
    assert made.features.name == "x/metadata"
    assert not made.features.random
