"""`probes fewshot` from a store to curves and records: against a scikit-learn loop, on noise, with every option."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probe_sets import write_set
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from cli.fewshot import COMMANDS
from featstore.errors import ConfigError, TaskError
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes import fewshot_heads
from probes.configs import TaskConfig
from probes.curves import curve_tables
from probes.fewshot import evaluate_fewshot, fit_fewshot
from probes.fewshot_config import FewShotConfig, FewShotData
from probes.records import load_predictions, load_records
from probes.shots import ShotTable, pools
from probes.tasks import Task, choose_task, make_task

SIZE, WIDTH = 400, 10


@pytest.fixture
def features(tmp_path: Path, store_path: Path) -> FeatureSet:
    return write(store_path, tmp_path / "data", 1.0)


def write(store: Path, root: Path, signal: float, seed: int = 0) -> FeatureSet:
    """Labels a (common), b (three positives in training) and kind (three classes); two samples a patient."""
    rng = np.random.default_rng(seed)
    part = ["train"] * 240 + ["val"] * 60 + ["test"] * 100
    a = (rng.random(SIZE) < 0.4).astype(int)
    b = np.where(np.arange(SIZE) < 240, np.arange(SIZE) % 80 == 5, rng.random(SIZE) < 0.4).astype(int)
    kind = rng.integers(0, 3, SIZE)
    X = rng.standard_normal((SIZE, WIDTH))
    X[:, :3] += signal * np.stack([a, b, kind], 1)
    cells: list[Any] = [str(value) for value in a]
    cells[3] = "-1"
    columns = {
        "part": part,
        "pid": [f"p{row // 2:03d}" for row in range(SIZE)],
        "a": cells,
        "b": [str(value) for value in b],
        "kind": ["xyz"[value] for value in kind],
        "age": [f"{30 + row % 40}.5" for row in range(SIZE)],
    }
    return write_set(store, root, columns, X, label_columns="a,b,kind,age")


def task_of(features: FeatureSet, labels: tuple[str, ...], **reading: Any) -> Task:
    return make_task(features, choose_task(features.manifest, labels=labels, reading=TaskConfig(**reading)))


def test_curve_is_a_loop_of_scikit_learn(features: FeatureSet) -> None:
    task = task_of(features, ("a",))
    curve = fit_fewshot(task, "cls", FewShotConfig(shots="1,4", repeats=3, C="0.5"), seed=7)
    X, y, mask, groups, _ = task.arrays("train", "cls")
    Q, truth, valid, _, _ = task.arrays("test", "cls")
    mean, scale = X.astype(np.float64).mean(0), X.astype(np.float64).std(0)
    table = ShotTable.drawn(pools(y, mask, groups, "sample", num_classes=2), ["a"], 4, repeats=3, seed=7)
    for number, count in enumerate((1, 4)):
        shots = table.at(count)
        for repeat in range(3):
            Z = (X[shots.rows[repeat]] - mean) / scale
            model = LogisticRegression(C=0.5, solver="newton-cholesky", tol=1e-10).fit(Z, shots.y[repeat])
            scores = model.decision_function((Q - mean) / scale)
            expected = roc_auc_score(truth[valid[:, 0], 0], scores[valid[:, 0]])
            assert curve.per_label["auroc"][number, repeat, 0] == pytest.approx(expected, abs=1e-12)
            assert curve.macro["auroc"][number, repeat] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "ncm", "scaling": "centred"},
        {"head": "ridge", "select": "inner"},
        {"head": "knn"},
        {"select": "inner", "C": "0.01,1"},
        {"select": "val", "C": "0.01,1"},
        {"by": "patient"},
        {"sampling": "first", "by": "patient", "repeats": None},
        {"percent": "20,50"},
    ],
    ids=str,
)
@pytest.mark.parametrize("labels", [("a", "b"), ("kind",)], ids=str)
def test_signal_is_found_by_every_head(features: FeatureSet, options: dict[str, Any], labels: tuple[str, ...]) -> None:
    task = task_of(features, labels)
    curve = fit_fewshot(task, "cls", FewShotConfig(shots="2,16", **({"repeats": 10} | options)))
    column = curve.per_label["auroc"][..., 0]
    assert not np.isnan(column).any()
    assert column[-1].mean() > 0.6
    assert (curve.macro["auroc"][-1] > 0.5).all()
    assert column.shape[1] == (1 if options.get("sampling") else 10)


def test_test_features_are_read_once(features: FeatureSet, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = Task.arrays

    def counted(self: Task, split: str, features: str = "cls") -> Any:
        read.append(split)
        return real(self, split, features)

    monkeypatch.setattr(Task, "arrays", counted)
    fit_fewshot(task_of(features, ("a", "b")), "cls", FewShotConfig(shots="1,2,3", repeats=5))
    assert read == ["train", "test"]  # and validation not at all


def test_heads_see_no_test_and_no_validation_labels(features: FeatureSet) -> None:
    """Other labels there change the metrics, never the choice."""
    task = task_of(features, ("a",))
    config = FewShotConfig(shots="8", repeats=5, select="inner", C="0.001,0.1,10")
    before = fit_fewshot(task, "cls", config)
    task.y[task.role != "train"] = 1 - task.y[task.role != "train"]
    after = fit_fewshot(task, "cls", config)
    assert before.facts[0]["strength"] == after.facts[0]["strength"]
    np.testing.assert_allclose(before.per_label["auroc"], 1 - after.per_label["auroc"], atol=1e-12)


def test_val_selection_takes_the_best_on_validation(features: FeatureSet) -> None:
    task = task_of(features, ("a",))
    values = ("0.0001", "0.1", "10")
    curves = [fit_fewshot(task, "cls", FewShotConfig(shots="4", repeats=20, C=C)) for C in values]
    chosen = fit_fewshot(task, "cls", FewShotConfig(shots="4", repeats=20, select="val", C=",".join(values)))
    # The same heads scored on validation, by the same code with the splits exchanged.
    swapped = task_of(features, ("a",))
    swapped.role[:] = np.where(task.role == "val", "test", np.where(task.role == "test", "val", task.role))
    on_val = [fit_fewshot(swapped, "cls", FewShotConfig(shots="4", repeats=20, C=C)) for C in values]
    best = np.argmax([curve.per_label["auroc"][0, :, 0] for curve in on_val], axis=0)
    expected = np.array([curve.per_label["auroc"][0, :, 0] for curve in curves])[best, np.arange(20)]
    np.testing.assert_allclose(chosen.per_label["auroc"][0, :, 0], expected, atol=1e-12)
    assert any("label budget" in note and "60 labelled validation samples" in note for note in chosen.notes)


def test_rare_labels_are_skipped_and_named(features: FeatureSet) -> None:
    curve = fit_fewshot(task_of(features, ("a", "b")), "cls", FewShotConfig(shots="2,8", repeats=4))
    assert curve.facts[0]["skipped"] == {}
    assert curve.facts[1]["skipped"] == {"b": "3 samples of its rarest class, 8 asked for"}
    assert not np.isnan(curve.per_label["auroc"][0]).any()
    assert np.isnan(curve.per_label["auroc"][1, :, 1]).all()
    assert curve.common == ("a",)
    np.testing.assert_array_equal(curve.macro["auroc"], curve.per_label["auroc"][:, :, 0])
    said = "macro over a: the labels that have every budget that any label has, and both classes in test; not b"
    assert said in curve.notes
    beyond = fit_fewshot(task_of(features, ("a", "b")), "cls", FewShotConfig(shots="1,2,500", repeats=4))
    assert beyond.common == ("a", "b")
    np.testing.assert_allclose(beyond.macro["auroc"][:2], beyond.per_label["auroc"][:2].mean(2))
    assert np.isnan(beyond.macro["auroc"][2]).all()


def test_shares_that_lack_a_class_are_skipped_and_counted(features: FeatureSet) -> None:
    curve = fit_fewshot(task_of(features, ("a", "b")), "cls", FewShotConfig(shots="", percent="10,100", repeats=6))
    assert "a class is missing in" in curve.facts[0]["skipped"]["b"]
    assert curve.facts[1]["skipped"] == {}
    assert curve.facts[1]["mean_rows"] == pytest.approx(
        (239 + 240) / 2
    )  # all training rows, one of them uncertain in a


def test_units_are_pooled(features: FeatureSet) -> None:
    task = task_of(features, ("a",), unit="patient", pool="mean")
    curve = fit_fewshot(task, "cls", FewShotConfig(shots="8", repeats=2))
    assert len(task.truth("test").ids) == 50
    assert not np.isnan(curve.per_label["auroc"]).any()


@pytest.mark.parametrize("head", ["logistic", "ncm", "ridge", "knn"])
def test_noise_stays_at_one_half(head: Any) -> None:
    """20 seeds of random labels: the mean AUROC is within three standard errors of 0.5."""
    means = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        X, y = rng.standard_normal((700, 8)).astype(np.float32), rng.integers(0, 2, 700)
        means.append(noise_auroc(head, X, y, seed))
    error = np.std(means, ddof=1) / np.sqrt(len(means))
    assert abs(np.mean(means) - 0.5) < 3 * error
    assert error < 0.01


def noise_auroc(head: Any, X: np.ndarray, y: np.ndarray, seed: int) -> float:
    from probes.curves import label_metrics
    from probes.fewshot_heads import Space, fit_heads, neighbour_scores

    config = FewShotConfig(head=head)
    space = Space.of(X[:300], config.space)
    found = pools(y[:300, None], np.ones((300, 1), dtype=bool), np.arange(300), "sample", num_classes=2)
    shots = ShotTable.drawn(found, ["l"], 8, repeats=20, seed=seed).at(8)
    rows, queries = torch.from_numpy(X[:300]), space.of_all(X[300:])
    if head == "knn":
        scores = neighbour_scores(rows, space, queries, shots, k=None, temperature=0.07, num_classes=None)
    else:
        scores = fit_heads(rows, space, shots, config, num_classes=None, quality=None).scores(queries)
    return float(label_metrics(y[300:] == 1, scores.numpy())["auroc"].mean())


# --- records and tables


def test_record_keeps_every_head(features: FeatureSet, store_path: Path) -> None:
    data = FewShotData(dataset="x", labels="a,b", seed=5)
    (record,) = evaluate_fewshot(Store(store_path), data, FewShotConfig(shots="1,2", repeats=7))
    (loaded,) = load_records(store_path / "results", probe="fewshot")
    assert loaded["curve"] == record["curve"]
    table = load_predictions(loaded).to_pylist()
    assert len(table) == 2 * 7 * 3
    values = [row["auroc"] for row in table if row["budget"] == "2 shots" and row["label"] == "a"]
    point = record["curve"][1]["per_label"][0]
    assert point["label"] == "a"
    assert point["auroc"]["mean"] == pytest.approx(np.mean(values))
    assert point["auroc"]["low"] == pytest.approx(np.percentile(values, 2.5))
    assert record["label_budget"] == {"unit": "sample", "selection": "fixed", "validation_samples": 0}
    assert record["test_opened"] == 1


def test_curves_of_another_label_budget_stand_apart(features: FeatureSet, store_path: Path) -> None:
    data = FewShotData(dataset="x", labels="a")
    records = []
    for options in ({}, {"select": "val", "C": "0.1,1"}):
        records += evaluate_fewshot(Store(store_path), data, FewShotConfig(shots="2", repeats=3, **options))
    found = curve_tables(records)
    assert len(found) == 2
    assert records[1]["label_budget"]["validation_samples"] == 60
    assert any("label budget" in note for note in found[1][1])
    same = curve_tables([records[0], records[0]])
    assert len(same) == 1
    assert len(same[0][0][0][2]) == 1  # one row: the later of two equal ones


def test_command_prints_the_curve(features: FeatureSet, store_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    COMMANDS["fewshot"](
        dataset="x", labels="a,b", shots="1,8", repeats=4, head="ncm", store=str(store_path), **DEFAULTS
    )
    printed = capsys.readouterr().out
    for text in ("1 shot", "8 shots", "AUROC by label", "8 shots: skipped b (3 samples", "n positive and n negative"):
        assert text in printed
    assert "scored 1 times" in printed


DEFAULTS: dict[str, Any] = {
    "model": None, "task": None, "where": "", "features": None, "manifest": None, "seed": 0, "allow_leak": False,
    "results": None, "train_policy": None, "eval_policy": None, "unit": None, "pool": None, "kind": None,
    "classes": "", "policies": "", "test_dataset": "", "test_task": None, "label_noise": 0.0, "noise_seed": 42,
    "percent": "", "by": "sample", "sampling": "random", "select": "fixed", "C": None, "alpha": None, "scaling": None,
    "k": None, "temperature": None, "json": False,
}  # fmt: skip


# --- errors


def test_numbers_have_no_shots(features: FeatureSet) -> None:
    with pytest.raises(TaskError, match=r"few-shot curves are of labels and classes; task .* holds regression values"):
        fit_fewshot(task_of(features, ("age",), kind="regression"), "cls", FewShotConfig())


def test_nothing_to_draw(features: FeatureSet) -> None:
    with pytest.raises(TaskError, match="no label has the samples that any of the budgets 200 shots asks for"):
        fit_fewshot(task_of(features, ("a", "b")), "cls", FewShotConfig(shots="200"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": "1", "sampling": "systematic"}, r"all its classes in the draws of 1 shot \(b: .* raise --shots"),
        ({"shots": "", "percent": "0.5", "repeats": 4}, r"all its classes in the draws of 0\.5 % .* raise --percent"),
        (
            {"shots": "300", "percent": "0.5", "repeats": 4},
            r"any of the budgets 300 shots asks for; lower --shots; no label has all .* raise --percent",
        ),
    ],
)
def test_draws_that_lack_a_class_are_to_be_larger(features: FeatureSet, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        fit_fewshot(task_of(features, ("b",)), "cls", FewShotConfig(**options))


def test_a_test_split_of_one_class_has_no_curve(features: FeatureSet) -> None:
    task = task_of(features, ("a",))
    task.y[task.role == "test"] = 0
    with pytest.raises(TaskError, match="no label has both classes in test; choose other labels or splits"):
        fit_fewshot(task, "cls", FewShotConfig(shots="2", repeats=2))


@pytest.mark.parametrize("reading", [{"policies": "all"}, {"test_dataset": "y"}])
def test_options_of_other_probes(features: FeatureSet, store_path: Path, reading: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="belongs to `probes linear`"):
        evaluate_fewshot(
            Store(store_path), FewShotData(dataset="x", labels="a"), FewShotConfig(), reading=TaskConfig(**reading)
        )


def test_validation_of_one_class_cannot_choose(features: FeatureSet) -> None:
    task = task_of(features, ("a",))
    task.y[task.role == "val"] = 0
    with pytest.raises(TaskError, match="validation has a single class of a label"):
        fit_fewshot(task, "cls", FewShotConfig(shots="2", repeats=2, select="val", C="0.1,1"))


@pytest.mark.parametrize("draws", [1, 2, 5])
def test_the_best_strength_of_any_number_of_draws(draws: int) -> None:
    rng = np.random.default_rng(draws)
    grid = torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64)
    quality = rng.random((draws, 3))
    every = [
        fewshot_heads.Heads(
            torch.full((draws, 1, 4), float(number), dtype=torch.float64),
            torch.zeros((draws, 1), dtype=torch.float64),
            np.full(draws, float(grid[number])),
            np.zeros(draws, dtype=bool),
            np.full(draws, number != 1),
            np.full(draws, number / 2),
        )
        for number in range(3)
    ]
    config = FewShotConfig(select="val", C="0.01,1,100")
    best = fewshot_heads._best(every, lambda heads: quality[:, int(heads.W[0, 0, 0])], grid, config)
    chosen = quality.argmax(1)
    assert best.W[:, 0, 0].tolist() == chosen.tolist()
    assert best.strength.tolist() == grid[chosen].tolist()
    assert best.converged.tolist() == (chosen != 1).tolist()
    assert best.objective.tolist() == (chosen / 2).tolist()
    assert best.at_edge.tolist() == (chosen != 1).tolist()
