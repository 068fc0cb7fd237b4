"""Labels that the training rows cannot teach: told, and left out of every choice, macro and comparison."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_sets import by_patient, write_set
from sklearn.metrics import roc_auc_score

from featstore.errors import TaskError
from featstore.store.catalog import Store
from probes.compare import compare
from probes.configs import EvalConfig, KnnConfig, LinearConfig, SplitConfig, TaskConfig
from probes.evaluation import evaluate_sets
from probes.known import TASKS
from probes.paired import Criteria
from probes.records import load_predictions
from probes.report import protocol_key, tables
from probes.tasks import choose_task, make_task
from probes.taskspec import TaskSpec
from probes.trained_config import MlpConfig
from probes.unfitted import unfitted_labels

SIZE = 200
NOTES = {
    "none": "none: one class in train (0 positive, 120 negative), not fitted",
    "all": "all: one class in train (120 positive, 0 negative), not fitted",
}
PLAIN = LinearConfig(C="0.01,0.1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with labels a and b, `none` and `all` of one class in train and of two elsewhere, a class x never there.

    `unsure` is positive in train only where -1 counts as 1; `flat` and `line` are numbers.
    """
    path = tmp_path_factory.mktemp("unfitted")
    rng = np.random.default_rng(0)
    y = (rng.random((SIZE, 3)) < 0.4).astype(int)
    X = rng.standard_normal((SIZE, 5))
    X[:, :2] += y[:, :2]
    columns = by_patient(np.arange(SIZE) // 2)
    train = np.array(columns["part"]) == "train"
    columns |= {
        "a": [str(value) for value in y[:, 0]],
        "b": [str(value) for value in y[:, 1]],
        "none": [str(value) for value in np.where(train, 0, y[:, 2])],
        "all": [str(value) for value in np.where(train, 1, y[:, 2])],
        "unsure": [str(value) for value in np.where(train, -y[:, 1], y[:, 1])],
        "kind": ["x" if value and not here else "yz"[other] for value, other, here in zip(y[:, 2], y[:, 0], train)],
        "flat": [7.0 if here else float(value) for here, value in zip(train, X[:, 0])],
        "line": [float(value) for value in X[:, 1]],
    }
    write_set(path / "store", path / "root", columns, X)
    return path / "store"


@pytest.fixture
def store(made: Path) -> Store:
    return Store(made)


def run(
    store: Store, folder: Path, head: Any, labels: str = "a,none,b,all", probe: str = "linear", **more: Any
) -> list[dict[str, Any]]:
    reading, splits = more.pop("reading", None), more.pop("splits", None)
    config = EvalConfig(dataset="x", labels=labels, resamples=20, results=folder, **more)
    return evaluate_sets(store, probe, config, head, reading=reading, splits=splits)


@pytest.mark.parametrize(
    ("probe", "head"),
    [
        ("linear", PLAIN),
        ("linear", LinearConfig(C="0.01,0.1", refit=True)),
        ("linear", LinearConfig(protocol="dinov2", iterations=5, lr="0.1")),
        ("knn", KnnConfig(k="5,20")),
        ("mlp", MlpConfig(lr="1e-3", epochs=2)),
    ],
)
def test_every_probe_leaves_them_out(store: Store, tmp_path: Path, probe: str, head: Any) -> None:
    record = run(store, tmp_path, head, probe=probe)[0]
    test = record["metrics"]["test"]
    assert record["task"]["not_fitted"] == ["none", "all"]
    assert record["task"]["notes"][-2:] == list(NOTES.values())
    table = load_predictions(record).to_pandas()
    table = table[table["split"] == "test"]
    by_hand = [roc_auc_score(table[f"label:{name}"], table[f"score:{name}"]) for name in "ab"]
    assert test["macro"]["auroc"] == pytest.approx(np.mean(by_hand), abs=1e-12)
    assert test["skipped"] == 2
    assert [entry["n"] for entry in test["per_label"]] == [40, 0, 40, 0]
    assert not table[["mask:none", "mask:all"]].to_numpy().any()
    assert not any("none" in note or "all" in note for note in record["notes"]), record["notes"]
    shown = [note for _, _, notes in tables([record]) for note in notes]
    assert NOTES["none"] in shown
    assert not any("labels have one class in the test split" in note for note in shown)


def test_choices_of_c_are_those_without_them(store: Store, tmp_path: Path) -> None:
    """The default grid has edges, and a constant label would stand at one of them."""
    with_them, without = (run(store, tmp_path, LinearConfig(), labels)[0] for labels in ("a,none,b,all", "a,b"))
    names = {"C", "pooled", "at_edge", "converged", "solver"}
    assert {name: with_them["choices"][name] for name in names} == {name: without["choices"][name] for name in names}
    assert with_them["metrics"]["test"]["macro"] == pytest.approx(without["metrics"]["test"]["macro"], rel=1e-9)
    assert with_them["metrics"]["val"]["macro"] == pytest.approx(without["metrics"]["val"]["macro"], rel=1e-9)


def test_heads_fitted_again_and_folds(store: Store, tmp_path: Path) -> None:
    nested = run(store, tmp_path, PLAIN, splits=SplitConfig(train_resamples=3))[0]["metrics"]["test"]
    found = nested["intervals_nested"]
    assert [entry["auroc"]["low"] is None for entry in found["per_label"]] == [False, True, False, True]
    assert found["macro"]["auroc"]["low"] > 0.5
    *folds, summary = run(store, tmp_path, PLAIN, splits=SplitConfig(folds=3))
    assert [record["task"]["not_fitted"] for record in folds] == [[]] * 3  # positives of val and test train by turns
    assert summary["task"]["not_fitted"] == []


def test_targets_of_one_value_in_train(store: Store, tmp_path: Path) -> None:
    record = run(store, tmp_path, LinearConfig(), "flat,line", reading=TaskConfig(kind="regression"))[0]
    alone = run(store, tmp_path, LinearConfig(), "line", reading=TaskConfig(kind="regression"))[0]
    assert "flat: one value in train (120 equal values), not fitted" in record["task"]["notes"]
    assert record["metrics"]["test"]["macro"] == pytest.approx(alone["metrics"]["test"]["macro"], rel=1e-9)
    assert set(record["choices"]["alpha"]) == set(record["choices"]["at_edge"]) == {"line"}


def test_a_class_that_train_lacks_is_told(store: Store, tmp_path: Path) -> None:
    record = run(store, tmp_path, PLAIN, "kind")[0]
    assert "no row of x in train: never predicted, rows of it count as wrong" in record["task"]["notes"]
    assert record["metrics"]["test"]["n"] == 40


def test_nothing_to_fit_at_all(store: Store, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no label has both classes in train \(none 0 positive 120 negative, all 120"):
        run(store, tmp_path, PLAIN, "none,all")


def test_compared_without_what_either_could_not_fit(store: Store, tmp_path: Path) -> None:
    """A trains on -1 as 1 and has the label; B masks -1 and has it not."""
    a, b = run(store, tmp_path, PLAIN, "a,unsure", reading=TaskConfig(policies="ones,zeros"))[1:]
    assert [record["task"]["not_fitted"] for record in (a, b)] == [[], ["unsure"]]
    assert protocol_key(a)[:3] == protocol_key(b)[:3] != protocol_key(a)
    assert protocol_key(a) != protocol_key({**a, "task": {**a["task"], "not_fitted": ["unsure"]}})
    found = compare(a["id"], b["id"], Criteria(num_resamples=50), store=store, folder=tmp_path)
    assert "40 entries that A scored are masked in the other and are left out" in found["notes"]
    macro, per_label = found["result"]["macro"], found["result"]["per_label"]
    assert macro["delta"]["value"] == pytest.approx(per_label[0]["delta"]["value"])
    assert found["result"]["num_labels"] == 1
    assert np.isnan(per_label[1]["p_holm"]["delong"])
    assert per_label[0]["p_holm"]["delong"] == pytest.approx(per_label[0]["p"]["delong"])
    assert not any("unsure" in text for text in found["result"]["few"])


def test_policies_are_compared_by_what_all_could_fit(store: Store, tmp_path: Path) -> None:
    own, ones, zeros = run(store, tmp_path, PLAIN, "a,unsure", reading=TaskConfig(policies="ones,zeros"))
    assert own["task"]["not_fitted"] == ["unsure"]
    assert own["sensitivity"]["labels"] == ones["sensitivity"]["labels"] == zeros["sensitivity"]["labels"] == ["a"]
    assert ones["metrics"]["test"]["skipped"] == 0
    auroc = [record["metrics"]["test"]["per_label"][0]["auroc"] for record in (own, ones)]
    assert ones["sensitivity"]["difference"]["auroc"] == pytest.approx(auroc[1] - auroc[0])


def test_another_data_set_is_tested_without_them(
    store: Store, tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    spec = TaskSpec(name="t", labels=("a", "none"))
    monkeypatch.setitem(TASKS, "t", spec)
    for name, size in (("one", 80), ("two", 81)):
        y = rng.integers(0, 2, (size, 2))
        columns: dict[str, list[Any]] = {
            "part": [["train", "val", "test", "train"][row % 4] for row in range(size)],
            "pid": [f"{name}{row}" for row in range(size)],
            "a": y[:, 0].tolist(),
            # One class in train of the first; of one class in train of the second too, which does not matter.
            "none": [int(value) if row % 4 in (1, 2) else 0 for row, value in enumerate(y[:, 1])],
        }
        X = rng.standard_normal((size, 4)).astype(np.float32)
        X[:, 0] += y[:, 0]
        write_set(store_path, tmp_path / name, columns, X, name=name)
    config = EvalConfig(dataset="one", task="t", resamples=10, allow_leak=True)  # files of one name are equal
    reading = TaskConfig(test_dataset="two", test_task="t")
    record = evaluate_sets(Store(store_path), "linear", config, PLAIN, reading=reading)[0]
    assert record["task"]["not_fitted"] == ["none"]
    assert [entry["n"] > 0 for entry in record["metrics"]["test"]["per_label"]] == [True, False]
    fs = Store(store_path)["two", "m"]
    target = make_task(fs, choose_task(fs.manifest, task="t"), splits=("test",))
    assert target.mask.all(), "what another data set's own training rows lack says nothing of its test rows"
    assert list(unfitted_labels(target)) == ["none"]


def test_many_such_labels_share_a_note(tmp_path: Path, store_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"l{number}" for number in range(25)]
    columns = by_patient(np.arange(60)) | {name: [0] * 60 for name in names} | {"a": rng.integers(0, 2, 60).tolist()}
    fs = write_set(store_path, tmp_path / "x", columns, rng.standard_normal((60, 3)))
    task = make_task(fs, choose_task(fs.manifest, labels=("a", *names)))
    assert task.notes[-1] == f"one class in train, not fitted: {', '.join(names)}"
    assert json.loads(json.dumps(unfitted_labels(task)))["l0"] == "0 positive, 36 negative"
