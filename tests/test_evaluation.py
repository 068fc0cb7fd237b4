"""From features to records: against scikit-learn, without leaks, reproducible from what is on disk."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from featstore.configs import RegisterConfig
from featstore.errors import ConfigError, IncompleteError, TaskError
from featstore.register import register
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from featstore.store.importer import import_features
from probes import report
from probes.configs import EvalConfig, KnnConfig, LinearConfig
from probes.evaluation import complete_sets, evaluate_sets, with_token_mean
from probes.linear import fit_linear
from probes.records import load_predictions, load_records
from probes.selection import folds
from probes.tasks import choose_task, make_task

POOLED = {"summary": "pool"}
LINEAR, KNN = LinearConfig(C="0.001,0.01,0.1,1"), KnnConfig(k="5,20")
CONFIG = RegisterConfig(
    table=Path("table.csv"), id_column="name", group_column="patient", split_column="split", label_columns="a,b,kind"
)


def write_data(root: Path, count: int, *, seed: int = 0, signal: float = 1.0) -> np.ndarray:
    """`count` samples, three a patient, in `table.csv`; features with a signal in `features.npz`; returns them."""
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True, exist_ok=True)
    features = rng.standard_normal((count, 12)).astype(np.float32)
    with open(root / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "name", "patient", "split", "a", "b", "kind"])
        for row in range(count):
            a, b, kind = int(rng.random() < 0.4), int(rng.random() < 0.3), int(rng.integers(3))
            features[row, :3] += signal * np.array([a, b, kind])
            path = root / f"images/{row:04d}.bin"
            if not path.is_file():
                path.write_bytes(bytes([row % 251] * (row % 7 + 1)))
            patient = row // 3
            split = "train" if patient % 10 < 6 else "val" if patient % 10 < 8 else "test"
            blank_b = "" if row % 11 == 0 else b
            writer.writerow([f"images/{row:04d}.bin", f"s{row:04d}", f"p{patient:04d}", split, a, blank_b, "xyz"[kind]])
    np.savez(root / "features.npz", features=features, ids=np.array([f"s{row:04d}" for row in range(count)]))
    return features


@pytest.fixture
def data(tmp_path: Path, store_path: Path) -> tuple[Store, Path, np.ndarray]:
    root = tmp_path / "data"
    features = write_data(root, 450)
    register(store_path, "synth", root, CONFIG)
    store, _, count = import_features(store_path, root / "features.npz", dataset="synth", model="given")
    assert count == 450
    return store, root, features


def evaluation(**options: Any) -> EvalConfig:
    return EvalConfig(dataset="synth", resamples=100, **options)


def test_linear_is_scikit_learn_chosen_on_validation(data: tuple[Store, Path, np.ndarray]) -> None:
    store, _, features = data
    record = evaluate_sets(store, "linear", evaluation(labels="a,b"), LINEAR)[0]
    manifest = store.manifest("synth")
    split = np.array(manifest.column("split"))
    for number, label in enumerate(("a", "b")):
        values = manifest.column(label)
        valid = np.array([value is not None for value in values])
        y = np.array([value == "1" for value in values])
        rows = {name: valid & (split == name) for name in ("train", "val", "test")}
        # Rows without any label are no training rows; here every row has `a`.
        mean, scale = features[split == "train"].mean(0), features[split == "train"].std(0)
        X = ((features - mean) / scale).astype(np.float64)
        best = None
        for C in (0.001, 0.01, 0.1, 1):
            model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10).fit(X[rows["train"]], y[rows["train"]])
            scores = model.predict_proba(X)[:, 1]
            quality = roc_auc_score(y[rows["val"]], scores[rows["val"]])
            if best is None or quality > best[0]:
                best = (quality, C, roc_auc_score(y[rows["test"]], scores[rows["test"]]))
        assert best is not None
        assert record["choices"]["C"][label] == best[1]
        assert record["metrics"]["val"]["per_label"][number]["auroc"] == pytest.approx(best[0], abs=1e-6)
        assert record["metrics"]["test"]["per_label"][number]["auroc"] == pytest.approx(best[2], abs=1e-6)
        assert record["choices"]["solver"][label] == "converged"
        assert record["choices"]["C_per_sample"][label] == pytest.approx(best[1] * int((split == "train").sum()))


def test_categorical_label_is_multinomial(data: tuple[Store, Path, np.ndarray]) -> None:
    store, _, features = data
    config = replace(LINEAR, C="0.1", standardize=False, class_weight="balanced")
    record = evaluate_sets(store, "linear", evaluation(labels="kind"), config)[0]
    manifest = store.manifest("synth")
    split, y = np.array(manifest.column("split")), np.array(manifest.column("kind"))
    model = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-10, max_iter=10_000)
    model.fit(features[split == "train"].astype(np.float64), y[split == "train"])
    scores = model.predict_proba(features[split == "test"].astype(np.float64))
    truth = y[split == "test"]
    macro = record["metrics"]["test"]["macro"]
    assert macro["auroc"] == pytest.approx(roc_auc_score(truth, scores, multi_class="ovr"), abs=1e-5)
    predicted = np.array(["x", "y", "z"])[scores.argmax(1)]
    assert macro["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted), abs=1e-9)
    low, high = (record["metrics"]["test"]["intervals"]["macro"]["auroc"][key] for key in ("low", "high"))
    assert low < macro["auroc"] < high


def test_refit_chooses_out_of_fold_and_fits_on_both(data: tuple[Store, Path, np.ndarray]) -> None:
    store, _, features = data
    config = replace(LINEAR, C="0.1", refit=True)
    record = evaluate_sets(store, "linear", evaluation(labels="a"), config)[0]
    manifest = store.manifest("synth")
    split, y = np.array(manifest.column("split")), np.array(manifest.column("a")) == "1"
    both = split != "test"
    X = (features - features[both].mean(0)) / features[both].std(0)
    model = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-10).fit(X[both].astype(np.float64), y[both])
    expected = roc_auc_score(y[~both], model.predict_proba(X[~both].astype(np.float64))[:, 1])
    assert record["metrics"]["test"]["macro"]["auroc"] == pytest.approx(expected, abs=1e-6)
    assert record["metrics"]["val"]["scored"] == "train and val, out of fold"
    assert record["metrics"]["val"]["n"] == int(both.sum())
    assert "refit on train and val" in record["notes"][0]


def test_no_row_is_scored_by_a_head_that_saw_it(
    data: tuple[Store, Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With labels that are pure noise a leak shows as an out-of-fold AUROC far above one half."""
    from probes import linear

    store = data[0]
    seen: list[tuple[np.ndarray, list[np.ndarray]]] = []
    real = linear.LogisticProbe

    class Watched(real):  # type: ignore[misc, valid-type]
        def fit(self, X: np.ndarray, *args: Any, **options: Any) -> Any:
            seen.append((X, []))
            return super().fit(X, *args, **options)

        def probabilities(self, X: np.ndarray, choice: Any) -> Any:
            seen[-1][1].append(X)
            return super().probabilities(X, choice)

    monkeypatch.setattr(linear, "LogisticProbe", Watched)
    evaluate_sets(store, "linear", evaluation(labels="a"), replace(LINEAR, refit=True))
    assert len(seen) == 6
    for fitted, scored in seen:
        rows = {row.tobytes() for row in fitted}
        assert scored
        assert not rows & {row.tobytes() for part in scored for row in part}


def test_folds_hold_groups_together() -> None:
    groups = np.array([f"g{number // 4}" for number in range(47)])
    held = list(folds(groups))
    assert np.array(held).sum(0).tolist() == [1] * 47
    for mask in held:
        assert not set(groups[mask]) & set(groups[~mask])
    with pytest.raises(TaskError, match=r"--refit needs at least 5 groups \(patients\) in train and val, got 3"):
        list(folds(np.array(["a", "b", "c"] * 4)))


def test_test_labels_never_touch_the_choice(data: tuple[Store, Path, np.ndarray]) -> None:
    store = data[0]
    features = store["synth", "given"]
    task = make_task(features, choose_task(features.manifest, labels=("a", "b")))
    flipped = replace(task, y=np.where((task.role == "test")[:, None], 1 - task.y, task.y))
    for fit, config in ((fit_linear, LINEAR), (fit_linear, replace(LINEAR, refit=True))):
        honest, other = fit(task, "cls", config), fit(flipped, "cls", config)
        assert honest.choices == other.choices
        np.testing.assert_array_equal(honest.test_scores, other.test_scores)


@pytest.mark.parametrize("probe", ["linear", "knn"])
def test_random_labels_give_chance(tmp_path: Path, store_path: Path, probe: str) -> None:
    values = []
    for seed in range(8):
        write_data(tmp_path / f"d{seed}", 240, seed=seed, signal=0.0)
        register(store_path, f"noise{seed}", tmp_path / f"d{seed}", CONFIG)
        store = import_features(store_path, tmp_path / f"d{seed}" / "features.npz", dataset=f"noise{seed}", model="m")[
            0
        ]
        config = EvalConfig(dataset=f"noise{seed}", labels="a", resamples=2)
        record = evaluate_sets(store, probe, config, LINEAR if probe == "linear" else KNN)[0]
        values.append(record["metrics"]["test"]["macro"]["auroc"])
    assert abs(np.mean(values) - 0.5) < 3 * np.std(values, ddof=1) / np.sqrt(len(values)) + 0.01


def test_records_and_predictions_tell_everything(data: tuple[Store, Path, np.ndarray]) -> None:
    store = data[0]
    for expected in (1, 2):
        record = evaluate_sets(store, "knn", evaluation(labels="a,b"), KNN)[0]
        assert record["test_opened"] == expected
    assert len(load_records(store.path / "results", dataset="synth", probe="knn")) == 2
    assert load_records(store.path / "results", probe="linear") == []
    table = load_predictions(record).to_pydict()
    assert set(table["split"]) == {"val", "test"}
    test = [row for row, split in enumerate(table["split"]) if split == "test"]
    for label in ("a", "b"):
        rows = [row for row in test if table[f"mask:{label}"][row]]
        again = roc_auc_score(
            [table[f"label:{label}"][row] for row in rows], [table[f"score:{label}"][row] for row in rows]
        )
        stated = next(item for item in record["metrics"]["test"]["per_label"] if item["label"] == label)
        assert stated["auroc"] == pytest.approx(again, abs=1e-12)
        assert stated["n"] == len(rows)
    assert {"versions", "machine", "cost", "task", "choices", "manifest", "fingerprint", "seed", "deviations"} <= set(
        record
    )
    assert record["task"]["patients"]["test"] == len({table["group"][row] for row in test})


def test_old_records_reproduce_after_growth(data: tuple[Store, Path, np.ndarray], tmp_path: Path) -> None:
    store, root, _ = data
    before = evaluate_sets(store, "linear", evaluation(labels="a,b"), LINEAR)[0]
    write_data(root, 480)
    register(store.path, "synth", root, CONFIG)
    with pytest.raises(
        IncompleteError, match=r"1 of 1 sets of 'synth' lack rows of this manifest; run\n  featstore import FILE"
    ):
        evaluate_sets(store, "linear", evaluation(labels="a,b"), LINEAR)
    again = evaluate_sets(store, "linear", evaluation(labels="a,b", manifest=before["manifest"][:8]), LINEAR)[0]
    assert again["metrics"] == before["metrics"]
    assert again["task"]["digest"] == before["task"]["digest"]


def test_failed_rows_are_masked_in_every_probe(data: tuple[Store, Path, np.ndarray], tmp_path: Path) -> None:
    store, _, features = data
    keep = np.setdiff1d(np.arange(450), [0, 19, 200, 449])
    np.savez(tmp_path / "part.npz", features=features[keep], ids=np.array([f"s{row:04d}" for row in keep]))
    import_features(store.path, tmp_path / "part.npz", dataset="synth", model="partial")
    for probe, config in (("knn", KNN), ("linear", LINEAR)):
        record = evaluate_sets(store, probe, evaluation(labels="a", model="partial"), config)[0]
        assert record["num_failed"] == 4
        assert sum(record["task"]["splits"].values()) == 446
        assert np.isfinite(record["metrics"]["test"]["macro"]["auroc"])


def test_tables_rank_by_validation_and_keep_protocols_apart(data: tuple[Store, Path, np.ndarray]) -> None:
    store = data[0]
    record = evaluate_sets(store, "linear", evaluation(labels="a,b"), LINEAR)[0]

    def variant(name: str, val: float, test: float, **changes: Any) -> dict[str, Any]:
        made = {**record, "set": f"synth/{name}", "fingerprint": name, **changes}
        metrics = {
            split: {**record["metrics"][split], "macro": {**record["metrics"][split]["macro"]}}
            for split in ("val", "test")
        }
        metrics["val"]["macro"]["auroc"], metrics["test"]["macro"]["auroc"] = val, test
        return {**made, "metrics": metrics}

    good_val = variant("good-val", 0.9, 0.6)
    good_test = variant("good-test", 0.7, 0.95, random_weights=True)
    cropped = variant("cropped", 0.99, 0.99, preprocess={"geometry": "dino"})
    tables = report.tables([good_test, good_val, cropped, good_val])
    assert [len(macro[2]) for macro, _, _ in tables] == [2, 1]
    macro, labels, notes = tables[0]
    assert [row[0] for row in macro[2]] == ["good-val", "good-test RANDOM WEIGHTS"]
    assert labels[0].startswith("good-val")
    assert any("has been scored 1 times" in note for note in notes)


def test_incomplete_sets_are_named_with_their_command(data: tuple[Store, Path, np.ndarray]) -> None:
    store = data[0]
    entry = store.entries("synth")[0]
    for path in (entry.folder / "commits").rglob("*.json"):
        path.unlink()
    with pytest.raises(IncompleteError, match=r"featstore import FILE --dataset synth --name given"):
        complete_sets(store, evaluation())


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("kind=x", r"no label has both classes in train"),
        ("patient=p0000", r"needs samples to train, select and test on"),
    ],
)
def test_splits_without_both_classes(data: tuple[Store, Path, np.ndarray], where: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        evaluate_sets(data[0], "linear", evaluation(labels="kind", where=where), LINEAR)


def test_default_k_above_the_bank_is_dropped_and_recorded(tmp_path: Path, store_path: Path) -> None:
    write_data(tmp_path / "small", 90)
    register(store_path, "small", tmp_path / "small", CONFIG)
    store = import_features(store_path, tmp_path / "small" / "features.npz", dataset="small", model="m")[0]
    record = evaluate_sets(store, "knn", EvalConfig(dataset="small", labels="a", resamples=10), KnnConfig())[0]
    assert record["choices"]["dropped"] == [100, 200]
    assert record["choices"]["k"] in (10, 20)


def test_networks_that_pool_are_passed_over_for_mean_all(
    data: tuple[Store, Path, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    store = data[0]
    (plain,) = complete_sets(store, evaluation())
    pooled = FeatureSet(plain.folder, plain.manifest)
    pooled.spec = {**plain.spec, "model": "net", "identity": {**plain.spec["identity"], "architecture": POOLED}}
    assert with_token_mean([plain, pooled], "cls") == [plain, pooled]
    assert caplog.text == ""
    assert with_token_mean([plain, pooled], "mean_all") == [plain]
    assert "skipped, no CLS token to take a mean_all with: synth/net" in caplog.text
    (only,) = with_token_mean([pooled], "mean_all")  # asked for alone: the error says why
    with pytest.raises(ConfigError, match="synth/net: mean_all is the mean over CLS, registers and patches, and this"):
        only.parts("mean_all")


def test_damaged_records_are_told_and_not_counted(
    data: tuple[Store, Path, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    store = data[0]
    first = evaluate_sets(store, "knn", evaluation(labels="kind"), KnnConfig(k="5"))[0]
    damaged = store.path / "results" / "damaged.json"
    damaged.write_text("{}")
    try:
        second = evaluate_sets(store, "knn", evaluation(labels="kind"), KnnConfig(k="5"))[0]
    finally:
        damaged.unlink()
    assert second["test_opened"] > first["test_opened"]
    assert "not counted" in caplog.text
