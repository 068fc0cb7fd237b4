"""Units of evaluation: volumes, studies and patients count once, by pooled scores or averaged features."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_sets import PARTS, with_volumes, write_set
from sklearn.metrics import roc_auc_score

import probes
from featstore.errors import LeakError, TaskError
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes import report
from probes.configs import EvalConfig, KnnConfig, LinearConfig, TaskConfig
from probes.evaluation import evaluate_sets
from probes.records import load_predictions
from probes.tasks import make_task
from probes.taskspec import TaskSpec
from probes.units import Units

BITS = ["0", "1"] * 4
PAIRS = ["s0", "s0", "s1", "s1", "s2", "s2", "s3", "s3"]


@pytest.fixture
def pairs(tmp_path: Path, store_path: Path) -> FeatureSet:
    """Eight images, two a study and patient; the feature of image i is i."""
    columns: dict[str, list[Any]] = {
        "part": PARTS,
        "pid": [f"p{name}" for name in PAIRS],
        "stud": PAIRS,
        "a": BITS,
        "volume": PAIRS,
    }
    columns |= {"kind": ["x", "x", "y", "y", "x", "x", "y", "y"], "age": ["3", "3", "4", "4", "5", "5", "6", "6"]}
    columns |= {"mixed": ["x", "y"] * 4, "grow": ["1", "2"] * 4, "gap": ["1", None, "0", None, None, "1", "0", None]}
    return write_set(store_path, tmp_path / "x", columns, np.repeat(np.arange(8.0)[:, None], 3, axis=1))


def test_units_keep_the_order_of_their_first_rows() -> None:
    units = Units.of(np.array(["b", "a", "b", "c", "a"]))
    assert units.ids == ("b", "a", "c")
    assert units.number.tolist() == [0, 1, 0, 2, 1]
    assert units.first.tolist() == [0, 1, 3]
    assert units.sizes.tolist() == [2, 2, 1]
    empty = Units.of(np.array([], dtype="U3"))
    assert empty.pool(np.zeros((0, 2)), "mean").shape == (0, 2)


def test_pooled_scores_and_features_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    ids = np.array([f"u{number}" for number in rng.integers(0, 9, 50)])
    scores, features = rng.random((4, 50, 3)), rng.standard_normal((50, 7)).astype(np.float16)
    units = Units.of(ids)
    for position, name in enumerate(units.ids):
        rows = ids == name
        np.testing.assert_allclose(units.pool(scores, "mean")[:, position], scores[:, rows].mean(1), rtol=1e-13)
        np.testing.assert_array_equal(units.pool(scores, "max")[:, position], scores[:, rows].max(1))
        truth = features[rows].astype(np.float64).mean(0)
        np.testing.assert_allclose(units.mean(features)[position], truth, rtol=1e-13)


def test_features_are_averaged_in_pieces_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).standard_normal((6, 5))
    units = Units.of(np.array(["a", "b"] * 3))
    whole = units.mean(features)
    monkeypatch.setattr("probes.units.CHUNK_BYTES", 8 * 6 * 2)
    np.testing.assert_array_equal(units.mean(features), whole)


def test_averages_are_summed_in_float64() -> None:
    features = np.full((3, 1), 60000, np.float16)
    assert Units.of(np.array(["a"] * 3)).mean(features).tolist() == [[float(np.float16(60000))]]


def test_a_unit_is_positive_if_any_image_is_and_masked_if_none_is_labelled(pairs: FeatureSet) -> None:
    task = probes.task(pairs, labels=["a", "gap"], unit="study")
    y, mask, groups, ids = task.truth("test")
    assert ids == ["s3"]
    assert groups.tolist() == ["ps3"]
    assert y.tolist() == [[1, 0]]
    assert mask.tolist() == [[True, True]]
    units = Units.of(np.array(["a", "a", "b", "b"]))
    y, mask = np.array([[1, 0], [0, 1], [0, 1], [0, 0]], np.int8), np.array([[1, 1], [1, 0], [1, 0], [1, 0]], bool)
    y, mask = units.labels(y, mask, "multilabel", "study")
    assert y.tolist() == [[1, 0], [0, 0]]
    assert mask.tolist() == [[True, True], [True, False]]


def test_a_labelled_unit_is_scored_with_all_of_its_images(pairs: FeatureSet) -> None:
    task = probes.task(pairs, labels=["gap"], unit="study")
    assert task.index("train").tolist() == [0, 2], "a head on images is fitted on those that are labelled"
    assert task.index("val").tolist() == [4, 5]
    whole = probes.task(pairs, labels=["gap"], unit="study", pool="features")
    assert whole.index("train").tolist() == [0, 1, 2, 3]


def test_classes_and_numbers_of_a_unit_must_agree(pairs: FeatureSet) -> None:
    task = probes.task(pairs, labels=["kind"], unit="study", pool="features")
    assert task.truth("train").y.tolist() == [0, 1]
    ages = probes.task(pairs, labels=["age"], kind="regression", unit="study")
    assert ages.truth("train").y.tolist() == [[3.0], [4.0]]
    mixed = probes.task(pairs, labels=["mixed"], unit="study")
    with pytest.raises(TaskError, match="1 of 1 studies hold images of different classes, so they have no label"):
        mixed.truth("test")
    with pytest.raises(TaskError, match="2 of 2 patients hold images of different numbers"):
        probes.task(pairs, labels=["grow"], kind="regression", unit="patient", pool="features").arrays("train", "cls")
    with pytest.raises(TaskError, match="1 of 1 studies hold images of different ranks"):
        probes.task(pairs, labels=["grow"], kind="ordinal", classes="1,2", unit="study").truth("val")


def test_a_head_sees_the_average_of_a_volume(pairs: FeatureSet) -> None:
    task = probes.task(with_volumes(pairs), labels=["a"], unit="volume", pool="features")
    X, y, mask, groups, ids = task.arrays("train", features="cls")
    assert X.dtype == np.float32
    assert X[:, 0].tolist() == [0.5, 2.5]
    assert y.tolist() == [[1], [1]]
    assert mask.all()
    assert groups.tolist() == ["ps0", "ps1"]
    assert ids == ["s0", "s1"]


def test_failed_images_leave_the_average(tmp_path: Path, store_path: Path) -> None:
    columns = {"part": PARTS, "stud": PAIRS, "a": BITS}
    values = np.repeat(np.arange(8.0)[:, None], 3, axis=1)
    features = write_set(store_path, tmp_path / "x", columns, values, failed=(1,))
    task = probes.task(features, labels=["a"], unit="study", pool="features")
    X, y, *_ = task.arrays("train", features="cls")
    assert X[:, 0].tolist() == [0.0, 2.5]
    assert y.tolist() == [[0], [1]]


def test_images_are_fitted_and_their_scores_pooled(pairs: FeatureSet) -> None:
    task = probes.task(pairs, labels=["a"], unit="study")
    assert task.arrays("train", "cls")[0].shape == (4, 3)
    assert task.pool("test", np.array([[0.2], [0.6]])).tolist() == [[0.4]]
    biggest = probes.task(pairs, labels=["a"], unit="study", pool="max")
    assert biggest.pool("test", np.array([[0.2], [0.6]])).tolist() == [[0.6]]
    assert task.digest != biggest.digest
    assert task.evaluate(np.array([[0.2], [0.6]]), resamples=0)["n"] == 1


@pytest.mark.parametrize(("unit", "column"), [("study", "study"), ("patient", "group"), ("volume", "volume")])
def test_missing_ids_name_the_column(tmp_path: Path, store_path: Path, unit: Any, column: str) -> None:
    features = write_set(store_path, tmp_path / "x", {"part": PARTS, "a": BITS}, np.zeros((8, 3)))
    with pytest.raises(
        TaskError, match=f"unit '{unit}' needs an id of every sample, but 8 of 8 have none in the column '{column}'"
    ):
        probes.task(features, labels=["a"], unit=unit)


def test_study_ids_that_patients_share_are_studies_of_their_own(tmp_path: Path, store_path: Path) -> None:
    columns = {"part": PARTS, "pid": PAIRS, "stud": ["study1"] * 6 + ["study2"] * 2, "a": BITS}
    task = probes.task(write_set(store_path, tmp_path / "x", columns, np.ones((8, 3))), labels=["a"], unit="study")
    assert task.truth("val").ids == ["s2/study1"]
    assert task.truth("test").ids == ["study2"]


def test_a_volume_in_two_splits_is_a_leak(tmp_path: Path, store_path: Path) -> None:
    columns = {"part": PARTS, "a": BITS, "volume": ["v0"] * 5 + ["v1"] * 3}
    features = with_volumes(write_set(store_path, tmp_path / "x", columns, np.ones((8, 3))))
    with pytest.raises(LeakError, match=r"2 units \(volume\) stand in more than one split, such as 'v0'"):
        probes.task(features, labels=["a"], unit="volume")
    task = probes.task(features, labels=["a"], unit="volume", allow_leak=True)
    assert task.notes[-1].startswith("leak allowed: 2 units (volume)")


def test_a_pool_needs_a_unit(pairs: FeatureSet) -> None:
    with pytest.raises(TaskError, match="pool 'max' needs a unit of several images: volume, study or patient"):
        probes.task(pairs, labels=["a"], pool="max")
    with pytest.raises(TaskError, match="--pool mean needs a unit of several images; give --unit too, or leave it out"):
        probes.task(pairs, labels=["a"], pool="mean")
    spec = TaskSpec(name="t", labels=("a",), unit="study", pool="max")
    from probes.tasks import read_as

    assert read_as(spec, TaskConfig(unit="image")).pool == "mean"
    assert make_task(pairs, read_as(spec, TaskConfig(unit="image"))).unit_ids is None


# --- through to the record


def studies(store: Path, root: Path) -> FeatureSet:
    """240 images, four a study, two studies a patient; the label belongs to the study."""
    rng = np.random.default_rng(0)
    study = np.arange(240) // 4
    patient = study // 2
    label = rng.integers(0, 2, 60)[study]
    features = rng.standard_normal((240, 6))
    features[:, 0] += 1.2 * label
    split = np.where(patient % 10 < 6, "train", np.where(patient % 10 < 8, "val", "test"))
    columns = {
        "part": split.tolist(),
        "pid": [f"p{number}" for number in patient],
        "stud": [f"s{number}" for number in study],
        "a": [str(value) for value in label],
    }
    return write_set(store, root, columns, features)


@pytest.mark.parametrize("pool", ["mean", "max", "features"])
@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_records_count_studies_and_resample_patients(tmp_path: Path, store_path: Path, probe: str, pool: Any) -> None:
    studies(store_path, tmp_path / "x")
    head = KnnConfig(k="3,9") if probe == "knn" else LinearConfig(C="0.01,1")
    reading = TaskConfig(unit="study", pool=pool)
    record = evaluate_sets(
        Store(store_path), probe, EvalConfig(dataset="x", labels="a", resamples=20), head, reading=reading
    )[0]
    task = record["task"]
    assert (task["unit"], task["pool"]) == ("study", pool)
    assert task["splits"] == {"train": 36, "val": 12, "test": 12}
    assert task["images"]["test"] == 48
    assert task["patients"]["test"] == 6
    assert record["metrics"]["test"]["n"] == 12
    assert record["metrics"]["test"]["intervals"]["num_groups"] == 6
    table = load_predictions(record).to_pydict()
    assert table["images"] == [4] * 24
    test = [row for row, split in enumerate(table["split"]) if split == "test"]
    truth, scores = ([table[name][row] for row in test] for name in ("label:a", "score:a"))
    assert record["metrics"]["test"]["macro"]["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    macro = report.macro_table([record])
    assert "studies (patients)" in macro[0]
    assert "test 12 (6)" in macro[0]


def test_refit_pools_out_of_fold_scores(tmp_path: Path, store_path: Path) -> None:
    studies(store_path, tmp_path / "x")
    for pool in ("mean", "features"):
        record = evaluate_sets(
            Store(store_path),
            "linear",
            EvalConfig(dataset="x", labels="a", resamples=2),
            LinearConfig(C="0.1,1", refit=True),
            reading=TaskConfig(unit="study", pool=pool),
        )[0]
        assert record["metrics"]["val"]["n"] == 48
        assert record["metrics"]["val"]["macro"]["auroc"] > 0.75
