"""Label noise against hand-made counts, folds against what scikit-learn's splitter promises, and their records."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_sets import by_patient, write_set
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from featstore.errors import ConfigError, TaskError, UnknownNameError
from featstore.store.catalog import Store
from probes import report
from probes.configs import EvalConfig, KnnConfig, LinearConfig, SplitConfig, TaskConfig
from probes.evaluation import evaluate_sets
from probes.fewshot import evaluate_fewshot
from probes.fewshot_config import FewShotConfig, FewShotData
from probes.folds import carve_strata, deal, fold_specs, spread
from probes.noise import add_noise, draws, flipped
from probes.records import load_predictions
from probes.tasks import Task, choose_task, make_task
from probes.taskspec import Noise

SIZE = 300


@pytest.fixture
def store(tmp_path: Path, store_path: Path) -> Store:
    """300 samples, one to four a patient; labels that features tell, a class, an age, columns of folds."""
    rng = np.random.default_rng(0)
    patient = np.sort(rng.integers(0, 120, SIZE))
    y = (rng.random((SIZE, 2)) < (0.4, 0.25)).astype(int)
    features = rng.standard_normal((SIZE, 6))
    features[:, :2] += 1.5 * y
    kind = rng.choice(["x", "y", "z"], SIZE, p=(0.7, 0.2, 0.1))
    features[:, 2] += np.select([kind == "y", kind == "z"], [1.5, 3.0])
    columns: dict[str, list[Any]] = {
        **by_patient(patient),
        "a": [str(value) for value in y[:, 0]],
        "b": ["" if number % 9 == 0 else str(value) for number, value in enumerate(y[:, 1])],
        "No Finding": [str(int(not row.any())) for row in y],
        "kind": kind.tolist(),
        "age": (50 + 10 * features[:, 0]).tolist(),
        "fold": [str(number % 4 + 1) if number % 12 else "" for number in patient],
        "halves": [("first", "second")[number % 2] for number in patient],
    }
    write_set(store_path, tmp_path / "x", columns, features)
    return Store(store_path)


def task_of(store: Store, labels: tuple[str, ...], **reading: Any) -> Task:
    features = store.set("x/m")
    return make_task(features, choose_task(features.manifest, labels=labels, reading=TaskConfig(**reading)))


def run(store: Store, labels: str, head: Any = None, *, reading: Any = None, **splits: Any) -> list[dict[str, Any]]:
    config = EvalConfig(dataset="x", labels=labels, features="cls", resamples=40)
    return evaluate_sets(
        store,
        "knn" if isinstance(head, KnnConfig) else "linear",
        config,
        head or LinearConfig(C="0.1,1"),
        reading=reading,
        splits=SplitConfig(**splits),
    )


# --- label noise


def test_noise_flips_at_the_published_rates() -> None:
    """20,000 entries of each class: shares within four standard errors of r and r / 4."""
    y = np.repeat(np.array([[1], [0]], np.int8), 20_000, axis=0)
    ids = [f"s{row}" for row in range(len(y))]
    for ratio in (0.1, 0.4):
        noisy, counts = flipped(y, np.ones(y.shape, bool), ("Edema",), draws(("Edema",), ids, 42), ratio)
        for rows, rate, count in ((y == 1, ratio, counts[0]), (y == 0, ratio / 4, counts[1])):
            assert count == (noisy != y)[rows].sum()
            assert abs(count / 20_000 - rate) < 4 * np.sqrt(rate * (1 - rate) / 20_000)


def test_noise_hangs_on_label_and_sample_alone() -> None:
    labels, ids = ("a", "b", "No finding"), [f"s{row}" for row in range(500)]
    y = (np.random.default_rng(0).random((500, 3)) < 0.4).astype(np.int8)
    mask = np.random.default_rng(1).random((500, 3)) < 0.9

    def noisy(ratio: float, order: np.ndarray, seed: int = 42) -> np.ndarray:
        pair = y[order], mask[order]
        return add_noise(Noise(ratio=ratio, seed=seed), labels, [ids[row] for row in order], pair, pair)[0]

    whole = np.arange(500)
    order = np.random.default_rng(2).permutation(500)[:200]
    np.testing.assert_array_equal(noisy(0.3, whole)[order], noisy(0.3, order))
    assert (noisy(0.3, whole) != noisy(0.3, whole, seed=1)).any()
    few, more = (noisy(ratio, whole)[:, :2] != y[:, :2] for ratio in (0.1, 0.3))
    assert few.sum() < more.sum()
    assert not (few & ~more).any()  # what flips at a tenth flips at three tenths
    assert not (noisy(0.3, whole) != y)[~mask].any()
    positive = ((noisy(0.3, whole) == 1) & mask)[:, :2].any(1)
    np.testing.assert_array_equal(noisy(0.3, whole)[mask[:, 2], 2], (~positive)[mask[:, 2]])


def test_noise_touches_training_rows_alone_and_the_record_says_it(store: Store) -> None:
    clean = task_of(store, ("a", "b", "No Finding"))
    noisy = task_of(store, ("a", "b", "No Finding"), label_noise=0.4)
    train = clean.role == "train"
    assert (noisy.y_train[train] != clean.y_train[train]).any()
    for name in ("y", "y_train"):
        np.testing.assert_array_equal(getattr(noisy, name)[~train], getattr(clean, name)[~train])
    np.testing.assert_array_equal(noisy.y[train & noisy.mask.all(1)], noisy.y_train[train & noisy.mask.all(1)])
    for name in ("mask", "mask_train"):
        np.testing.assert_array_equal(getattr(noisy, name), getattr(clean, name))
    assert noisy.digest != clean.digest
    assert noisy.spec.as_dict()["noise"] == {"ratio": 0.4, "seed": 42}
    assert "noise" not in clean.spec.as_dict()
    assert task_of(store, ("a", "b"), label_noise=0.0).digest == task_of(store, ("a", "b")).digest
    valid = clean.mask_train & train[:, None]
    flips = (noisy.y_train != clean.y_train) & valid
    counts = [int((flips & (clean.y_train == value))[:, :2].sum()) for value in (1, 0)]
    totals = [int((valid & (clean.y_train == value))[:, :2].sum()) for value in (1, 0)]
    assert noisy.notes[-1] == (
        f"label noise 40% (seed 42): {counts[0]} of {totals[0]} positives and {counts[1]} of {totals[1]} negatives of "
        f"train flipped; val and test as they are; No finding changed in {int(flips[:, 2].sum())} rows"
    )
    reading = TaskConfig(label_noise=0.4)
    (record,) = run(store, "a,b,No Finding", reading=reading)
    assert noisy.notes[-1] in record["task"]["notes"]
    assert record["task"]["digest"] == noisy.digest


@pytest.mark.parametrize(("labels", "reading"), [(("kind",), {}), (("age",), {"kind": "regression"})])
def test_noise_is_of_labels(store: Store, labels: tuple[str, ...], reading: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match="label noise, as published, flips labels that are present or not"):
        task_of(store, labels, label_noise=0.2, **reading)


def test_noise_needs_an_abnormal_label(store: Store) -> None:
    with pytest.raises(TaskError, match="--label-noise flips abnormal labels, and the task has none: No Finding"):
        task_of(store, ("No Finding",), label_noise=0.2, kind="multilabel")


# --- folds


@pytest.mark.parametrize("seed", range(5))
def test_folds_hold_groups_and_spread_classes_as_scikit_learns_do(seed: int) -> None:
    """Whole groups, and no class spread worse than by StratifiedGroupKFold."""
    rng = np.random.default_rng(seed)
    groups = np.sort(rng.integers(0, 150, 600)).astype(str)
    classes = rng.choice(3, 600, p=(0.7, 0.2, 0.1))
    own = deal(groups, classes, 5, seed)
    for number in range(5):
        assert not set(groups[own == number]) & set(groups[own != number])
    theirs = np.zeros(600, int)
    split = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(np.zeros(600), classes, groups)
    for number, (_, held) in enumerate(split):
        theirs[held] = number

    def worst(fold: np.ndarray) -> float:
        table = np.array([np.bincount(classes[fold == number], minlength=3) for number in range(5)])
        return float(np.abs(table / table.sum(0) - 0.2).max())

    assert worst(own) <= worst(theirs) + 0.01  # of a class
    np.testing.assert_array_equal(own, deal(groups, classes, 5, seed))
    order = rng.permutation(600)
    np.testing.assert_array_equal(own[order], deal(groups[order], classes[order], 5, seed))
    assert (own != deal(groups, classes, 5, seed + 100)).any()


def test_rows_without_a_class_never_decide_where_a_group_goes() -> None:
    groups = np.repeat(np.arange(20), 2).astype(str)
    classes = np.where(np.arange(40) % 2 == 0, np.repeat(np.arange(20) % 2, 2), -1)
    fold = deal(groups, classes, 5, 0)
    for value in (0, 1):
        assert np.bincount(fold[classes == value], minlength=5).tolist() == [2] * 5
    with pytest.raises(TaskError, match=r"5 folds need at least as many groups \(patients\), got 4"):
        deal(groups[:8], None, 5, 0)


@pytest.mark.parametrize("options", [{"folds": 5}, {"folds": 5, "fold_val": 0.1}, {"fold_column": "fold"}])
def test_every_row_is_tested_once_by_heads_of_other_patients(store: Store, options: dict[str, Any]) -> None:
    features = store.set("x/m")
    specs = fold_specs(features.manifest, choose_task(features.manifest, labels=("kind",)), SplitConfig(**options))
    tasks = [make_task(features, spec) for spec in specs]
    used = np.array([value not in (None, "") for value in features.manifest.column("fold")])
    used = used if "fold_column" in options else np.ones(SIZE, bool)
    assert len(tasks) == (4 if "fold_column" in options else 5)
    np.testing.assert_array_equal(sum((task.role == "test").astype(int) for task in tasks), used.astype(int))
    for task in tasks:
        for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
            assert not set(task.groups[task.role == first]) & set(task.groups[task.role == second])
    for number, task in enumerate(tasks):
        following = tasks[(number + 1) % len(tasks)]
        if "fold_val" in options:
            share = len(set(task.groups[task.role == "val"])) / len(set(task.groups))
            assert share == pytest.approx(0.1, abs=0.01)  # 7:1:2
        else:
            np.testing.assert_array_equal(task.role == "val", following.role == "test")
    assert len({task.digest for task in tasks}) == len({task.test_key for task in tasks}) == len(tasks)
    assert "splits: fold " in tasks[0].notes[0]


def test_a_share_for_selection_holds_every_class(tmp_path: Path, store_path: Path) -> None:
    """15 positives of 150 patients: each fold's validation rows have some, and training keeps most."""
    label = [str(int(number % 10 == 0)) for number in range(150)]
    columns: dict[str, list[Any]] = {"pid": [f"p{number}" for number in range(150)], "a": label}
    features = write_set(store_path, tmp_path / "y", columns, np.random.default_rng(0).standard_normal((150, 3)))
    for seed in (1, 2, 3):
        splits = SplitConfig(folds=5, fold_seed=seed, fold_val=0.1)
        for spec in fold_specs(features.manifest, choose_task(features.manifest, labels=("a",)), splits):
            task = make_task(features, spec)
            held = task.y[task.role == "val", 0]
            assert (len(held), int(held.sum())) in [(15, 1), (15, 2)]
            assert task.notes[0].endswith(f"; 10% of the groups, seed {seed}, select, stratified by class")


@pytest.mark.parametrize("seed", range(5))
def test_carved_strata_keep_groups_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.sort(rng.integers(0, 100, 400)).astype(str)
    strata = rng.choice([-1, 0, 1, 2], 400, p=(0.2, 0.7, 0.08, 0.02))
    taken = carve_strata(groups, strata, 0.1, seed)
    assert not set(groups[taken]) & set(groups[~taken])
    assert len(set(groups[taken])) == round(0.1 * len(set(groups)))
    assert set(strata[taken]) >= {0, 1, 2}
    assert set(strata[~taken]) >= {0, 1, 2}
    order = rng.permutation(400)
    np.testing.assert_array_equal(taken[order], carve_strata(groups[order], strata[order], 0.1, seed))
    assert (taken != carve_strata(groups, strata, 0.1, seed + 100)).any()


def test_a_class_of_one_group_is_trained_on() -> None:
    groups = np.arange(20).astype(str)
    assert not carve_strata(groups, np.arange(20) // 19, 0.5, 0)[19]
    assert carve_strata(groups, np.arange(20), 0.1, 0).sum() == 2
    assert carve_strata(groups, np.full(20, -1), 0.1, 0).sum() == 2


def test_folds_keep_the_filter_of_the_task(store: Store) -> None:
    """As with five folds of an official training part, whose test part stays unseen."""
    features = store.set("x/m")
    spec = choose_task(features.manifest, labels=("a",), where="split=train")
    (first, *_) = fold_specs(features.manifest, spec, SplitConfig(folds=5))
    task = make_task(features, first)
    assert set(np.array(features.manifest.column("split"))[task.role != ""]) == {"train"}


@pytest.mark.parametrize("labels", ["a,b", "kind", "age"])
def test_the_record_over_folds_pools_their_test_rows(store: Store, labels: str) -> None:
    reading = TaskConfig(kind="regression") if labels == "age" else None
    head = LinearConfig(alpha="1,10") if labels == "age" else None
    *folds, whole = run(store, labels, head, reading=reading, folds=3, fold_seed=4)
    assert [record["fold"]["number"] for record in folds] == [1, 2, 3]
    assert whole["folds"]["records"] == [record["id"] for record in folds]
    table = load_predictions(whole).to_pydict()
    assert len(set(table["id"])) == len(table["id"]) == whole["task"]["splits"]["test"] == SIZE
    macro = whole["metrics"]["test"]["macro"]
    name = "r2" if labels == "age" else "auroc"
    values = [record["metrics"]["test"]["macro"][name] for record in folds]
    found = whole["folds"]["test"][name]
    assert (found["mean"], found["sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    vals = [record["metrics"]["val"]["macro"][name] for record in folds]
    assert whole["metrics"]["val"]["macro"][name] == pytest.approx(np.mean(vals))
    if labels == "a,b":
        areas = []
        for label in ("a", "b"):
            rows = np.flatnonzero(table[f"mask:{label}"])
            truth, scores = (np.array(table[f"{what}:{label}"])[rows] for what in ("label", "score"))
            areas.append(roc_auc_score(truth, scores))
        assert macro["auroc"] == pytest.approx(np.mean(areas), abs=1e-12)
        assert whole["folds"]["at_youden"]["sensitivity"]["n"] == 3
        assert whole["folds"]["at_test_youden"]["optimistic"] is True
        assert whole["folds"]["calibration"]["raw"]["ece"]["min"] > 0
    elif labels == "kind":
        scores = np.stack([table[f"score:{name}"] for name in "xyz"], 1)
        assert macro["auroc"] == pytest.approx(roc_auc_score(table["label"], scores, multi_class="ovr"), abs=1e-9)
    bounds = whole["metrics"]["test"]["intervals"]["macro"][name]
    assert bounds["low"] < macro[name] < bounds["high"]
    assert whole["test_opened"] == 1
    assert any(f"{name} of the 3 folds: mean {np.mean(values):.3f}" in note for note in whole["notes"])
    shown = report.tables([whole])[0]
    assert shown[0][2][0][-2] == "in each of 3 folds"


def test_neighbours_have_folds_and_features_may_be_chosen_in_each(store: Store) -> None:
    *folds, whole = run(store, "a", KnnConfig(k="5,15"), fold_column="halves", fold_val=0.2)
    assert len(folds) == 2
    assert whole["choices"]["vote"] == folds[0]["choices"]["vote"]
    assert [choices["k"] for choices in whole["choices"]["per_fold"]] == [fold["choices"]["k"] for fold in folds]


def test_spread_of_undefined_values() -> None:
    assert spread([1.0, None, 3.0, float("nan")]) == {"mean": 2, "sd": np.sqrt(2), "min": 1, "max": 3, "n": 2}
    assert np.isnan(spread([None])["mean"])


def test_folds_that_cannot_be(store: Store) -> None:
    for options, error, message in (
        ({"fold_column": "nothing"}, UnknownNameError, "data set 'x' has no column 'nothing'; --fold-column names one"),
        ({"fold_column": "halves"}, TaskError, "2 folds leave nothing to train on beside test and selection"),
        ({"folds": 2, "fold_val": 0.6}, TaskError, "--fold-val 0.6 with 2 folds leaves nothing to train on"),
        ({"folds": 400}, TaskError, "400 folds need at least as many groups"),
    ):
        with pytest.raises(error, match=message):
            run(store, "a", **options)
    config = EvalConfig(dataset="x", labels="a", where="fold=1")
    with pytest.raises(TaskError, match="--fold-column fold: at least two folds are needed, it names 1"):
        evaluate_sets(store, "linear", config, LinearConfig(), splits=SplitConfig(fold_column="fold"))
    for reading, message in (
        (TaskConfig(policies="all"), "--folds and --policies exclude each other"),
        (TaskConfig(test_dataset="y"), "--folds and --test-dataset exclude each other"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(store, "a", reading=reading, folds=3)
    with pytest.raises(ConfigError, match="--folds and --train-resamples exclude each other"):
        run(store, "a", folds=3, train_resamples=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "--folds must be at least 2, got 1"),
        ({"folds": 3, "fold_column": "f"}, "--folds and --fold-column exclude each other"),
        ({"folds": 3, "fold_seed": -1}, "--fold-seed must be 0 or more, got -1"),
        ({"folds": 3, "fold_val": 1.0}, "--fold-val must lie between 0 and 1, got 1.0"),
        ({"fold_val": 0.1}, "--fold-val belongs to --folds or --fold-column"),
        ({"fold_seed": 1}, "--fold-seed belongs to --folds or --fold-column"),
        ({"train_resamples": 1}, "--train-resamples must be at least 2, got 1"),
    ],
)
def test_split_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SplitConfig(**options)


def test_other_options_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"--label-noise is a share from 0 to 1, got 1.5"):
        TaskConfig(label_noise=1.5)
    with pytest.raises(ConfigError, match="--noise-seed must be 0 or more, got -1"):
        TaskConfig(noise_seed=-1)
    with pytest.raises(ConfigError, match="--noise-seed 3 belongs to --label-noise; give that too, or leave it out"):
        TaskConfig(noise_seed=3)
    with pytest.raises(ConfigError, match="--features names features, comma-separated; got ' ,'"):
        EvalConfig(dataset="x", features=" ,")
    with pytest.raises(ConfigError, match="--seed must be 0 or more, got -2"):
        EvalConfig(dataset="x", seed=-2)


def test_curves_take_noise_and_lists_of_features_and_no_other_options(store: Store) -> None:
    data = FewShotData(dataset="x", labels="a", features="cls,cls")
    (record,) = evaluate_fewshot(store, data, FewShotConfig(shots="2", repeats=2), reading=TaskConfig(label_noise=0.3))
    assert any("label noise 30%" in note for note in record["task"]["notes"])
    for name in ("choose_features", "resamples", "folds", "train_resamples"):
        assert not hasattr(data, name)
    for reading, flag in (
        (TaskConfig(policies="all"), "--policies"),
        (TaskConfig(test_dataset="y"), "--test-dataset"),
    ):
        with pytest.raises(ConfigError, match=f"{flag} belongs to `probes linear` and `probes knn`"):
            evaluate_fewshot(store, data, FewShotConfig(), reading=reading)
