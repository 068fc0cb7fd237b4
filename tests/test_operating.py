"""What a record says of decisions and probabilities: against scikit-learn, and never found on rows of the fit."""

from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
from probe_sets import with_patches, write_set
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    brier_score_loss,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from featstore import files
from featstore.errors import ConfigError, TaskError
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes import PROBES
from probes.calibration import class_calibration, fit_class_temperature
from probes.configs import EvalConfig, KnnConfig, LinearConfig, SplitConfig, TaskConfig
from probes.draws import Draws
from probes.evaluation import evaluate_sets
from probes.knn_fit import fit_knn
from probes.linear import fit_linear
from probes.operating import held_rows, operating, scarce
from probes.records import load_predictions
from probes.report import tables
from probes.selection import Fitted
from probes.tasks import Task, choose_task, make_task
from probes.thresholds import Scored
from probes.trained_config import AttentiveConfig, MilConfig, MlpConfig

SIZE = 400


@pytest.fixture
def store(tmp_path: Path, store_path: Path) -> Store:
    """400 samples, two a patient, two labels and a class that the features tell; a few are blank."""
    rng = np.random.default_rng(0)
    y = (rng.random((SIZE, 2)) < (0.4, 0.3)).astype(int)
    kind = rng.integers(0, 3, SIZE)
    features = rng.standard_normal((SIZE, 6))
    features[:, :2] += 1.2 * y
    features[np.arange(SIZE), 2 + kind] += 1.5
    patient = np.arange(SIZE) // 2
    columns: dict[str, list[Any]] = {
        "part": np.where(patient % 10 < 5, "train", np.where(patient % 10 < 7, "val", "test")).tolist(),
        "pid": [f"p{number}" for number in patient],
        "stud": [f"s{number}" for number in range(SIZE)],
        "a": [str(value) for value in y[:, 0]],
        "b": ["" if number % 9 == 0 else str(value) for number, value in enumerate(y[:, 1])],
        "kind": [("x", "y", "z")[number] for number in kind],
        "side": [("left", "right")[number] for number in y[:, 0]],
        "age": (50 + 10 * features[:, 0]).tolist(),
    }
    write_set(store_path, tmp_path / "x", columns, features)
    return Store(store_path)


def task_of(store: Store, *labels: str, allow_leak: bool = False) -> Task:
    features = store.set("x/m")
    return make_task(features, choose_task(features.manifest, labels=labels), allow_leak=allow_leak)


def run(store: Store, labels: str, head: Any, *, resamples: int = 50, reading: Any = None, **splits: Any) -> Any:
    config = EvalConfig(dataset="x", labels=labels, features="cls", resamples=resamples)
    probe = "knn" if isinstance(head, KnnConfig) else "linear"
    return evaluate_sets(store, probe, config, head, reading=reading, splits=SplitConfig(**splits))[0]


def rows_of(record: dict[str, Any], split: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    """(truth, scores) of a label as the record's predictions have them."""
    table = load_predictions(record).to_pydict()
    rows = [row for row, part in enumerate(table["split"]) if part == split]
    if "label" in table:
        truth = np.array([table["label"][row] == label for row in rows])
        return truth, np.array([table[f"score:{label}"][row] for row in rows])
    rows = [row for row in rows if table[f"mask:{label}"][row]]
    return tuple(np.array([table[f"{what}:{label}"][row] for row in rows]) for what in ("label", "score"))  # type: ignore[return-value]


def best_cut(y: np.ndarray, scores: np.ndarray) -> float:
    false, true, cuts = roc_curve(y, scores, drop_intermediate=False)
    return float(cuts[np.round(true - false, 12).argmax()])


@pytest.mark.parametrize("head", [LinearConfig(C="0.1,1"), LinearConfig(C="0.1,1", refit=True), KnnConfig(k="9")])
@pytest.mark.parametrize("labels", ["a,b", "kind", "side"])
def test_decisions_of_a_record_are_scikit_learns(store: Store, head: Any, labels: str) -> None:
    record = run(store, labels, head, test_youden=True)
    test = record["metrics"]["test"]
    names = {"a,b": ["a", "b"], "kind": ["x", "y", "z"], "side": ["right"]}[labels]
    assert [entry["label"] for entry in test["at_youden"]["per_label"]] == names
    for cut_split, key in (("val", "at_youden"), ("test", "at_test_youden")):
        for number, name in enumerate(names):
            cut = best_cut(*rows_of(record, cut_split, name))
            y, scores = rows_of(record, "test", name)
            decided, entry = scores >= cut, test[key]["per_label"][number]
            stated = test["at_youden"]["thresholds"][name] if key == "at_youden" else entry["threshold"]
            assert stated == pytest.approx(cut)
            expected = {
                "sensitivity": recall_score(y, decided),
                "specificity": recall_score(y, decided, pos_label=0),
                "f1": f1_score(y, decided),
                "precision": precision_score(y, decided),
                "accuracy": (y == decided).mean(),
            }
            assert {name: entry[name] for name in expected} == pytest.approx(expected)
            bounds = (test[key]["intervals"]["per_label"][number] if key == "at_youden" else entry["intervals"])["f1"]
            assert bounds["low"] < entry["f1"] < bounds["high"]
        values = [entry["sensitivity"] for entry in test[key]["per_label"]]
        assert test[key]["macro"]["sensitivity"] == pytest.approx(np.mean(values))
    assert test["at_test_youden"]["optimistic"] is True
    assert test["at_test_youden"]["macro"]["balanced_accuracy"] >= test["at_youden"]["macro"]["balanced_accuracy"]


def test_intervals_of_the_optimistic_numbers_are_asked_for(store: Store) -> None:
    found = run(store, "a,b", LinearConfig(C="1"))["metrics"]["test"]["at_test_youden"]
    assert "intervals" not in found
    assert "intervals" not in found["per_label"][0]


@pytest.mark.parametrize("head", [LinearConfig(C="100"), KnnConfig(k="9"), KnnConfig(k="9", vote="majority")])
def test_calibration_of_a_record_is_scikit_learns(store: Store, head: Any) -> None:
    record = run(store, "a,b", head)
    found = record["metrics"]["test"]["calibration"]
    for number, name in enumerate("ab"):
        y, scores = rows_of(record, "test", name)
        val_y, val_scores = rows_of(record, "val", name)

        def mended(T: float, p: np.ndarray) -> np.ndarray:
            p = np.clip(p, 1e-7, 1 - 1e-7)
            return np.asarray(1 / (1 + (1 / p - 1) ** (1 / T)))

        best = minimize_scalar(
            lambda b, y=val_y, p=val_scores: log_loss(y, mended(1 / np.exp(b), p)),
            bounds=(-6, 6),
            method="bounded",
            options={"xatol": 1e-9},
        )
        assert np.log(1 / found["temperature"]["T"][name]) == pytest.approx(best.x, abs=1e-3)
        for part, p in (("raw", scores), ("temperature", mended(found["temperature"]["T"][name], scores))):
            entry = found[part]["per_label"][number]
            assert entry["brier"] == pytest.approx(brier_score_loss(y, p), abs=1e-6)
            share, mean = calibration_curve(y, p, n_bins=15)
            sizes = np.bincount(np.searchsorted(np.linspace(0, 1, 16)[1:-1], p), minlength=15)
            assert (sizes > 0).sum() == len(share)
            assert entry["ece"] == pytest.approx((sizes[sizes > 0] * np.abs(share - mean)).sum() / len(y), abs=1e-6)
    macro = np.mean([entry["brier"] for entry in found["raw"]["per_label"]])
    assert found["raw"]["macro"]["brier"] == pytest.approx(macro)


def test_classes_share_one_temperature(store: Store) -> None:
    record = run(store, "kind", LinearConfig(C="1000"))
    found = record["metrics"]["test"]["calibration"]
    parts = {}
    for split in ("val", "test"):
        pairs = [rows_of(record, split, name) for name in "xyz"]
        parts[split] = np.stack([pair[0] for pair in pairs], 1).argmax(1), np.stack([pair[1] for pair in pairs], 1)

    def mended(T: float, p: np.ndarray) -> np.ndarray:
        powers = p ** (1 / T)
        return np.asarray(powers / powers.sum(1, keepdims=True))

    y, p = parts["val"]
    best = minimize_scalar(
        lambda b: log_loss(y, mended(1 / np.exp(b), p)), bounds=(-4, 4), method="bounded", options={"xatol": 1e-9}
    )
    T = found["temperature"]["T"]["kind"]
    assert np.log(1 / T) == pytest.approx(best.x, abs=1e-4)
    y, p = parts["test"]
    for part, values in (("raw", p), ("temperature", mended(T, p))):
        assert found[part]["macro"]["brier"] == pytest.approx(((values - np.eye(3)[y]) ** 2).sum(1).mean(), abs=1e-9)
        assert 0 < found[part]["macro"]["ece"] < 1
        assert 0 < found[part]["macro"]["ece_mass"] < 1


def test_a_temperature_of_classes_gives_probabilities() -> None:
    rng = np.random.default_rng(0)
    y = np.eye(4, dtype=np.int8)[rng.integers(0, 4, 60)]
    p = rng.dirichlet(np.ones(4), 60)
    p[0] = (1, 0, 0, 0)  # as a vote says
    names, groups = tuple(f"v{row}" for row in range(60)), tuple(f"p{row}" for row in range(60))
    val = Scored(y, p, np.ones(y.shape, bool), names, groups, ("a", "b", "c", "d"))
    found = fit_class_temperature(val)
    assert len(set(found.values.tolist())) == 1
    other = replace(val, ids=tuple(f"t{row}" for row in range(60)), groups=tuple(f"q{row}" for row in range(60)))
    applied = found.apply(other)
    np.testing.assert_allclose(applied.sum(1), 1)
    np.testing.assert_array_equal(applied.argmax(1), p.argmax(1))
    sure = class_calibration(replace(val, scores=y.astype(float)))
    assert sure == {"ece": 0, "ece_mass": 0, "brier": 0}
    with pytest.raises(TaskError, match="the validation rows are of one class, so no temperature can be found"):
        fit_class_temperature(replace(val, y=np.eye(4, dtype=np.int8)[np.zeros(60, int)]))


# --- no sample that finds a threshold was in the fit that scored it


def fitted_by(probe: str) -> Any:
    def fit(task: Task, features: str, config: Any) -> Fitted:
        found: Fitted = resolve_name(PROBES[probe])(task, features, config)  # which imports torch
        return found

    return fit


def sgd(protocol: Any, *, refit: bool = False, **options: Any) -> LinearConfig:
    """One rate and one epoch at most, so that validation has nothing to choose."""
    return LinearConfig(**{"protocol": protocol, "iterations": 20, "lr": "0.01", "refit": refit, **options})


ONE_EPOCH: dict[str, Any] = {"lr": "1e-3", "epochs": 1, "device": "cpu"}
REFITS: dict[str, tuple[Any, Any, bool]] = {
    "linear": (fit_linear, LinearConfig(C="0.1"), False),
    "linear refit": (fit_linear, LinearConfig(C="0.1", refit=True), True),
    "knn": (fit_knn, KnnConfig(k="9"), False),
    "knn refit": (fit_knn, KnnConfig(k="9", refit=True), True),
    "knn, a patient left out": (fit_knn, KnnConfig(k="9", select="loo"), False),
    "ML-kNN on train and val": (fit_knn, KnnConfig(k="9", protocol="radiology"), True),
    "SGD": (fit_linear, sgd("dinov2"), False),
    "SGD refit": (fit_linear, sgd("dinov2", refit=True), True),
    "SGD dinov3": (fit_linear, sgd("dinov3"), False),
    "SGD dinov3 refit": (fit_linear, sgd("dinov3", refit=True), True),
    "SGD radiology": (fit_linear, sgd("radiology"), True),  # which fits on both, as published
    "SGD medical": (fit_linear, sgd("medical"), False),
    "SGD medical refit": (fit_linear, sgd("medical", refit=True), True),
    "SGD chest": (fit_linear, sgd("chest", iterations=1, batch=100), False),
    "mlp": (fitted_by("mlp"), MlpConfig(**ONE_EPOCH), False),
    "mlp chest": (fitted_by("mlp"), MlpConfig(**ONE_EPOCH, protocol="chest"), False),
    "attentive": (fitted_by("attentive"), AttentiveConfig(**ONE_EPOCH), False),
    "mil": (fitted_by("mil"), MilConfig(**ONE_EPOCH, project=8), False),
    "mil mean": (fitted_by("mil"), MilConfig(**ONE_EPOCH, pooling="mean"), False),
}


def task_for(store: Store, name: str, *labels: str) -> tuple[Task, str]:
    """(task, features) that a head takes: patches, bags of one image, or vectors."""
    if name == "attentive":
        features = with_patches(store.set("x/m"))
        return make_task(features, choose_task(features.manifest, labels=labels)), "patches"
    if name.startswith("mil"):
        features = store.set("x/m")
        return make_task(features, choose_task(features.manifest, labels=labels, reading=BAGS)), "cls"
    return task_of(store, *labels), "cls"


BAGS = TaskConfig(unit="study")


@pytest.mark.parametrize("name", REFITS)
@pytest.mark.parametrize("labels", [("a", "b"), ("kind",)])
def test_scores_that_find_thresholds_come_from_heads_that_did_not_see_the_sample(
    store: Store, name: str, labels: tuple[str, ...]
) -> None:
    """With the strength given, other labels of a patient's validation rows change no score that finds a threshold for
    them; a refit shows that they reach the tested head."""
    if labels == ("kind",) and "ML-kNN" in name:
        pytest.skip("ML-kNN is of labels that are present or not")
    fit, config, refit = REFITS[name]
    task, features = task_for(store, name, *labels)
    if labels == ("kind",) and name in ("SGD medical", "SGD medical refit", "SGD chest"):
        pytest.skip("published for labels")
    before = fit(task, features, config)
    val = task.truth("val")
    changed = 0.0
    for patient in sorted(set(val.groups.tolist()))[::20]:
        own = (task.role == "val") & (task.groups == patient)
        where = own[:, None] if task.y.ndim == 2 else own
        other = (1 - task.y) if task.y.ndim == 2 else (task.y + 1) % 3
        flipped = replace(task, y=np.where(where, other, task.y), y_train=np.where(where, other, task.y_train))
        after = fit(flipped, features, config)
        rows = val.groups == patient
        np.testing.assert_allclose(after.val_scores[rows], before.val_scores[rows], atol=1e-7)
        changed = max(changed, float(np.abs(after.test_scores - before.test_scores).max()))
    assert (changed > 1e-6) == refit


@pytest.mark.parametrize("name", ["linear", "linear refit", "knn", "knn refit"])
def test_the_record_names_what_thresholds_were_found_on(store: Store, name: str) -> None:
    record = run(store, "a,b", REFITS[name][1])
    task = task_of(store, "a", "b")
    val, test, train = (task.truth(split) for split in ("val", "test", "train"))
    for part in ("at_youden", "calibration"):
        said = record["metrics"]["test"][part]["found_on"]
        assert said["ids"] == files.digest(val.ids)
        assert (said["n"], said["left_out"]) == (len(val.ids), 0)
        assert said["scored"] == ("out of fold" if name == "linear refit" else "by a head fitted on train")
    assert not set(val.ids) & ({*test.ids} | {*train.ids})
    assert not set(val.groups) & ({*test.groups} | {*train.groups})


def test_patients_of_an_allowed_leak_find_nothing(store: Store) -> None:
    task = task_of(store, "a", "b")
    role = task.role.copy()
    val_rows = np.flatnonzero(role == "val")
    role[val_rows[0]] = "train"  # the other image of that patient stays in validation
    role[val_rows[2]] = "test"
    leaky = replace(task, role=role)
    fitted = fit_linear(leaky, "cls", LinearConfig(C="0.1"))
    held = held_rows(leaky, fitted)
    assert held.left_out == 2
    assert not set(held.val.groups) & (set(leaky.truth("train").groups) | set(leaky.truth("test").groups))
    found, notes = operating(leaky, fitted, resamples=10, seed=0)
    assert found["at_youden"]["found_on"]["left_out"] == 2
    assert "2 validation rows find no threshold or temperature: their patients are in train or test too" in notes
    everyone = replace(task, groups=np.full(SIZE, "one"))
    found, notes = operating(everyone, fitted_as(task, fitted), resamples=10, seed=0)
    assert set(found) == {"at_test_youden", "calibration"}
    assert "temperature" not in found["calibration"]
    assert "no label has both classes among the validation rows that may find a threshold or temperature" in notes


def fitted_as(task: Task, fitted: Fitted) -> Fitted:
    val, test = (np.resize(fitted.test_scores, (len(task.truth(split).ids), 2)) for split in ("val", "test"))
    return replace(fitted, val_scores=val, test_scores=test)


def test_scores_that_are_no_probabilities_have_no_calibration(store: Store) -> None:
    task = task_of(store, "a", "b")
    fitted = fit_linear(task, "cls", LinearConfig(C="0.1"))
    found, notes = operating(task, replace(fitted, test_scores=fitted.test_scores * 3), resamples=10, seed=0)
    assert set(found) == {"at_youden", "at_test_youden"}
    assert "scores are no probabilities, so the record has no calibration" in notes
    numbers = run(store, "age", LinearConfig(alpha="1"), reading=TaskConfig(kind="regression"))
    assert not {"at_youden", "at_test_youden", "calibration"} & set(numbers["metrics"]["test"])


def test_few_positives_and_patients_are_warned_of(store: Store) -> None:
    y = np.zeros((60, 3), np.int8)
    y[:12, 0], y[:30, 1], y[:55, 2] = 1, 1, 1
    groups = tuple(f"p{row // 4}" for row in range(60))
    test = Scored(y, y * 0.5, np.ones(y.shape, bool), tuple(map(str, range(60))), groups, ("few", "many", "most"))
    assert scarce(test, True) == (
        "test has 15 patients: under 20, intervals are unreliable",
        "under 20 positives in test: few (12); do not rely on their intervals",
        "under 20 negatives in test: most (5); do not rely on their intervals",
    )
    assert scarce(test, False)[0] == "test has 15 samples (patients unknown): under 20, intervals are unreliable"
    assert scarce(replace(test, y=y[:, [1, 1, 1]], groups=test.ids), True) == ()
    assert not any("under 20" in note for note in run(store, "a", LinearConfig(C="1"))["notes"])


# --- features chosen on validation


@pytest.fixture
def two_features(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The set as if it had patch means of pure noise beside its CLS tokens."""
    whole = FeatureSet.load

    def load(self: FeatureSet, features: str = "cls", **options: Any) -> np.ndarray:
        real = whole(self, "cls", **options)
        noise = np.random.default_rng(0).standard_normal(real.shape).astype(real.dtype)
        return {"cls": real, "mean_patch": noise, "cls+mean_patch": np.hstack([real, noise])}[features]

    monkeypatch.setattr(FeatureSet, "load", load)
    monkeypatch.setattr(FeatureSet, "arrays", property(lambda self: ["cls", "mean_patch"]))
    return store


def test_features_are_chosen_on_validation_and_tested_once(two_features: Store) -> None:
    head = LinearConfig(C="0.1")
    config = EvalConfig(dataset="x", labels="a,b", resamples=20)
    each = evaluate_sets(two_features, "linear", replace(config, features="mean_patch,cls,cls+mean_patch"), head)
    assert [record["features"] for record in each] == ["mean_patch", "cls", "cls+mean_patch"]
    (chosen,) = evaluate_sets(two_features, "linear", replace(config, choose_features=True), head)
    expected = {record["features"]: record["metrics"]["val"]["macro"]["auroc"] for record in each}
    said = chosen["choices"]["features"]
    assert said["val_auroc"] == expected
    assert said["chosen"] == chosen["features"] == max(expected, key=lambda name: expected[name]) != "mean_patch"
    twin = next(record for record in each if record["features"] == chosen["features"])
    assert chosen["metrics"] == twin["metrics"]
    assert chosen["test_opened"] == twin["test_opened"] + (3 - each.index(twin))
    assert tables([chosen])[0][0][2][0][1] == chosen["features"]
    asked = replace(config, choose_features=True, features="mean_patch,cls")
    (of_two,) = evaluate_sets(two_features, "linear", asked, head)
    assert set(of_two["choices"]["features"]["val_auroc"]) == {"mean_patch", "cls"}
    folds = evaluate_sets(two_features, "linear", asked, head, splits=SplitConfig(folds=3))
    assert [record["features"] for record in folds] == ["cls"] * 4


def test_a_choice_needs_two_features(store: Store) -> None:
    config = EvalConfig(dataset="x", labels="a", choose_features=True)
    with pytest.raises(ConfigError, match=r"--choose-features needs two features or more, x/m gives cls; name them"):
        evaluate_sets(store, "linear", config, LinearConfig())
    with pytest.raises(ConfigError, match="--choose-features and --policies exclude each other"):
        evaluate_sets(store, "linear", config, LinearConfig(), reading=TaskConfig(policies="all"))


# --- training patients resampled too


def test_nested_intervals_are_those_of_heads_fitted_again(store: Store) -> None:
    """Three training resamples, two test resamples each, by hand with scikit-learn's solver and area."""
    record = run(store, "a", LinearConfig(C="0.5", standardize=False), resamples=6, train_resamples=3)
    found = record["metrics"]["test"]["intervals_nested"]
    task = task_of(store, "a")
    X, y, _, groups, _ = task.arrays("train", "cls")
    queries, truth, _, test_groups, _ = task.arrays("test", "cls")
    train = Draws.of(groups, num_resamples=3, seed=1)
    test = Draws.of(test_groups, num_resamples=6, seed=0)
    values = []
    for number, counts in enumerate(train.counts):
        rows = np.repeat(np.arange(len(X)), counts[np.searchsorted(train.groups, groups)])
        model = LogisticRegression(C=0.5, solver="newton-cholesky", tol=1e-10).fit(X[rows].astype(float), y[rows, 0])
        scores = model.predict_proba(queries.astype(float))[:, 1]
        for weights in test.counts[number::3]:
            again = np.repeat(np.arange(len(scores)), weights[np.searchsorted(test.groups, test_groups)])
            values.append(roc_auc_score(truth[again, 0], scores[again]))
    low, high = np.percentile(values, [2.5, 97.5])
    bounds = found["macro"]["auroc"]
    assert (bounds["low"], bounds["high"]) == pytest.approx((low, high), abs=1e-3)
    assert (found["train_resamples"], found["num_resamples"]) == (3, 6)
    assert found["draws"] == record["metrics"]["test"]["intervals"]["draws"]


@pytest.mark.parametrize("head", [KnnConfig(k="5"), KnnConfig(k="all", refit=True), LinearConfig(C="1", refit=True)])
@pytest.mark.parametrize("labels", ["a,b", "kind"])
def test_nested_intervals_hold_more_than_the_test_rows(store: Store, head: Any, labels: str) -> None:
    record = run(store, labels, head, resamples=40, train_resamples=8)
    test = record["metrics"]["test"]
    nested, plain = (test[name]["macro"]["auroc"] for name in ("intervals_nested", "intervals"))
    assert nested["low"] < test["macro"]["auroc"] + 0.05
    assert nested["high"] > test["macro"]["auroc"] - 0.05
    assert (nested["low"], nested["high"]) != (plain["low"], plain["high"])
    assert len(test["intervals_nested"]["per_label"]) == len(test["per_label"])
    ((title, columns, rows), (_, label_columns, label_rows), notes) = tables([record])[0]
    assert rows[0][columns.index("[95%] + training")] == f"[{nested['low']:.3f}, {nested['high']:.3f}]", title
    first = test["intervals_nested"]["per_label"][0]["auroc"]
    place = label_columns.index("[95%] + training")
    assert label_rows[0][place] == f"[{first['low']:.3f}, {first['high']:.3f}]"
    assert {len(columns)} == {len(row) for row in rows}
    assert {len(label_columns)} == {len(row) for row in label_rows}
    assert any(
        note.startswith("[95%] + training: of the same, over heads fitted again on 8 resamples") for note in notes
    )


def test_nested_intervals_are_refused_where_nothing_can_be_fitted_again(store: Store) -> None:
    config = EvalConfig(dataset="x", labels="a", features="cls", resamples=10)
    three = SplitConfig(train_resamples=3)
    with pytest.raises(ConfigError, match="which probes mlp cannot; leave it out"):
        evaluate_sets(store, "mlp", config, REFITS["mlp"][1], splits=three)
    with pytest.raises(ConfigError, match="which probes linear --protocol dinov2 cannot; leave it out"):
        evaluate_sets(store, "linear", config, REFITS["SGD"][1], splits=three)
    with pytest.raises(TaskError, match=r"--train-resamples is of labels and classes; task .* holds regression values"):
        run(store, "age", LinearConfig(alpha="1"), reading=TaskConfig(kind="regression"), train_resamples=3)
    with pytest.raises(ConfigError, match="--train-resamples 60 needs as many --resamples, got 50"):
        run(store, "a", LinearConfig(C="1"), train_resamples=60)
