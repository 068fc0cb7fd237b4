"""Fitted and chosen on one data set, tested on another: shared labels, equal sets, and what the record says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from probe_sets import by_patient, write_set
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import probes
from featstore import files
from featstore.errors import ConfigError, IncompleteError, LeakError, TaskError, UnknownNameError
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes import report
from probes.configs import EvalConfig, KnnConfig, LinearConfig, TaskConfig
from probes.cross import best_task, cross_task, matching_set
from probes.evaluation import evaluate_sets
from probes.known import TASKS
from probes.records import load_predictions, load_records
from probes.tasks import make_task
from probes.taskspec import TaskSpec

HEAD = LinearConfig(C="0.01,1")


def write(store: Path, root: Path, name: str, labels: tuple[str, ...], *, seed: int, model: str = "m") -> FeatureSet:
    """180 samples whose first features carry the labels, shifted for every data set."""
    rng = np.random.default_rng(seed)
    y = (rng.random((180, len(labels))) < 0.4).astype(int)
    features = rng.standard_normal((180, 8)) + seed
    features[:, : len(labels)] += 1.5 * y
    patient = np.arange(180) // 2
    columns: dict[str, list[Any]] = {
        **by_patient(patient),
        "kind": [("x", "y", "z")[number % 3] for number in range(180)],
        "age": [str(number % 7) for number in range(180)],
    }
    columns |= {label: [str(value) for value in y[:, column]] for column, label in enumerate(labels)}
    return write_set(store, root / name, columns, features, name=name, model=model)


@pytest.fixture
def two(tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[FeatureSet, FeatureSet]:
    """`one` calls it Effusion, `two` calls it Pleural Effusion; each has a label of its own."""
    one = write(store_path, tmp_path, "one", ("Effusion", "Edema", "Mass"), seed=0)
    two = write(store_path, tmp_path, "two", ("Edema", "Pleural Effusion", "Fracture"), seed=1)
    monkeypatch.setitem(TASKS, "one-3", TaskSpec(name="one-3", labels=("Effusion", "Edema", "Mass")))
    names = (("Pleural Effusion", "Effusion"),)
    labels = ("Edema", "Pleural Effusion", "Fracture")
    monkeypatch.setitem(TASKS, "two-3", TaskSpec(name="two-3", labels=labels, names=names))
    return one, two


def evaluate(store: Path, probe: str = "linear", head: Any = HEAD, **options: Any) -> list[dict[str, Any]]:
    task = options.pop("task", "one-3")
    reading = TaskConfig(**{"test_dataset": "two", "test_task": "two-3", **options})
    config = EvalConfig(dataset="one", task=task, features="cls", resamples=20)
    return evaluate_sets(Store(store), probe, config, head, reading=reading)


def test_shared_labels_meet_by_their_words(two: tuple[FeatureSet, FeatureSet]) -> None:
    task = cross_task(probes.task(two[0], "one-3"), probes.task(two[1], "two-3"))
    assert task.labels == ("effusion", "edema")
    manifest = two[1].manifest
    rows = [row for row, part in enumerate(manifest.column("split")) if part == "test"]
    truth = task.truth("test")
    assert truth.ids == [manifest.column("id")[row] for row in rows]
    for column, name in enumerate(("Pleural Effusion", "Edema")):
        assert truth.y[:, column].tolist() == [int(manifest.column(name)[row]) for row in rows]
    np.testing.assert_array_equal(task.arrays("test", "cls")[0], two[1].load("cls")[rows])
    assert task.arrays("train", "cls")[0].shape == (108, 8)
    notes = " / ".join(task.notes)
    assert "tested on two, task two-3: 2 shared labels" in notes
    assert "labels of one alone, left out: Mass" in notes
    assert "labels of two alone, left out: Fracture" in notes
    assert task.digest != probes.task(two[0], "one-3").digest


def test_external_validation_is_scikit_learn(two: tuple[FeatureSet, FeatureSet], store_path: Path) -> None:
    record = evaluate(store_path)[0]
    source, target = two
    X, Z = (features.load("cls").astype(np.float64) for features in two)
    part = np.array(source.manifest.column("split"))
    mean, scale = X[part == "train"].mean(0), X[part == "train"].std(0)
    test = np.array(target.manifest.column("split")) == "test"
    for entry, (ours, theirs) in zip(
        record["metrics"]["test"]["per_label"], (("Effusion", "Pleural Effusion"), ("Edema", "Edema"))
    ):
        y = np.array(source.manifest.column(ours)) == "1"
        best = []
        for C in (0.01, 1.0):
            model = LogisticRegression(C=C, tol=1e-10).fit((X[part == "train"] - mean) / scale, y[part == "train"])
            val = roc_auc_score(y[part == "val"], model.decision_function((X[part == "val"] - mean) / scale))
            truth = np.array(target.manifest.column(theirs))[test] == "1"
            best.append((val, -C, roc_auc_score(truth, model.decision_function((Z[test] - mean) / scale))))
        assert entry["auroc"] == pytest.approx(max(best)[2], abs=1e-6)
        assert entry["label"] == ours.lower()


@pytest.mark.parametrize(("probe", "head"), [("knn", KnnConfig(k="5,9")), ("linear", HEAD)])
def test_records_say_where_they_were_trained_and_tested(
    two: tuple[FeatureSet, FeatureSet], store_path: Path, probe: str, head: Any
) -> None:
    first, again = evaluate(store_path, probe, head)[0], evaluate(store_path, probe, head)[0]
    assert (first["dataset"], first["set"]) == ("one", "one/m")
    assert first["test"]["dataset"] == "two"
    assert first["test"]["manifest"] == two[1].manifest.digest
    assert first["test"]["task"]["name"] == "two-3"
    assert first["task"]["labels"] == ["effusion", "edema"]
    assert first["task"]["splits"] == {"train": 108, "val": 36, "test": 36}
    assert (first["test_opened"], again["test_opened"]) == (1, 2)
    assert set(load_predictions(first).to_pydict()) >= {"score:effusion", "label:edema"}
    own = evaluate_sets(Store(store_path), probe, EvalConfig(dataset="one", task="one-3", resamples=2), head)
    tables = report.tables([first, *own])
    assert [macro[0].split(" · ")[0] for macro, _, _ in tables] == ["one -> two", "one"]
    assert any("2 shared labels" in note for note in tables[0][2])


def test_a_data_set_is_no_other_one(two: tuple[FeatureSet, FeatureSet], store_path: Path) -> None:
    with pytest.raises(ConfigError, match="--test-dataset one is the data set itself, whose own test split is scored"):
        evaluate(store_path, test_dataset="two,one")


def test_several_data_sets_at_once(two: tuple[FeatureSet, FeatureSet], tmp_path: Path, store_path: Path) -> None:
    write(store_path, tmp_path, "three", ("Edema", "Pleural Effusion", "Fracture"), seed=2)
    records = evaluate(store_path, test_dataset="two,three")
    assert [record["test"]["dataset"] for record in records] == ["two", "three"]
    assert records[0]["metrics"]["test"] != records[1]["metrics"]["test"]


def test_rare_words_and_kinds_that_do_not_meet(two: tuple[FeatureSet, FeatureSet]) -> None:
    one, other = probes.task(two[0], "one-3"), probes.task(two[1], "two-3")
    with pytest.raises(TaskError, match="no label in common; one has Mass, the other Fracture; give the tasks `names`"):
        cross_task(probes.task(two[0], labels=["Mass"]), probes.task(two[1], labels=["Fracture"]))
    with pytest.raises(TaskError, match="one is multilabel, the other multiclass; choose another --test-task"):
        cross_task(one, probes.task(two[1], labels=["kind"]))
    with pytest.raises(
        TaskError, match=r"they count image \(mean\) and patient \(mean\); set both with --unit and --pool"
    ):
        cross_task(one, probes.task(two[1], "two-3", unit="patient"))
    twice = replace(other.spec, names=(("Pleural Effusion", "Effusion"), ("Fracture", "Effusion")))
    with pytest.raises(TaskError, match="the labels 'Pleural Effusion' and 'Fracture' both mean 'effusion'"):
        cross_task(one, make_task(two[1], twice))


def test_classes_and_ranks_across_data_sets(two: tuple[FeatureSet, FeatureSet]) -> None:
    ours = probes.task(two[0], labels=["kind"])
    names = (("x", "z"), ("z", "x"))
    theirs = make_task(two[1], TaskSpec(name="t", labels=("kind",), names=names))
    task = cross_task(ours, theirs)
    assert task.labels == ("x", "y", "z")
    text = np.array(two[1].manifest.column("kind"))[task.index("test")]
    swap = {"x": 2, "y": 1, "z": 0}
    assert task.truth("test").y.tolist() == [swap[value] for value in text]
    fewer = make_task(two[1], TaskSpec(name="t", labels=("kind",), classes=("x", "y")))
    with pytest.raises(TaskError, match="classes must be the same; got x, y, z and x, y"):
        cross_task(ours, fewer)
    ranks = [probes.task(features, labels=["kind"], kind="ordinal", classes="x,y,z") for features in two]
    assert cross_task(*ranks).truth("test").y.shape == (36, 1)
    other = probes.task(two[1], labels=["kind"], kind="ordinal", classes="z,y,x")
    with pytest.raises(TaskError, match="ordered classes must be the same; name them with --classes"):
        cross_task(ranks[0], other)
    ages = [probes.task(features, labels=["age"], kind="regression") for features in two]
    assert cross_task(*ages).labels == ("age",)


def test_units_across_data_sets(two: tuple[FeatureSet, FeatureSet], store_path: Path) -> None:
    # The label of a patient is that of any image.
    record = evaluate(store_path, unit="patient")[0]
    assert record["task"]["splits"]["test"] == 18
    assert record["task"]["unit"] == "patient"


def respec(features: FeatureSet, **changes: Any) -> None:
    """Change the identity of a set on disk."""
    path = features.folder / "spec.json"
    spec = files.unseal(path.read_bytes(), path)
    spec["identity"] |= changes
    path.write_bytes(files.sealed({key: value for key, value in spec.items() if key != "digest"}))


def test_sets_must_be_made_alike(two: tuple[FeatureSet, FeatureSet], store_path: Path) -> None:
    store = Store(store_path)
    assert matching_set(store, two[0], "two").name == "two/m"
    with pytest.raises(UnknownNameError, match="'nope'"):
        matching_set(store, two[0], "nope")
    respec(two[1], stored_dtype="float16", preprocess={"geometry": "dino"})
    with pytest.raises(
        TaskError,
        match=r"one/m and two/m-\w+ must be made alike to be compared, but differ in .*(stored_dtype|preproc)",
    ):
        matching_set(store, two[0], "two")
    (two[1].folder / "spec.json").unlink()
    with pytest.raises(
        UnknownNameError, match=r"data set 'two' has no set like one/m; run\n  featstore import FILE --"
    ):
        matching_set(store, two[0], "two")


def test_weights_of_extracted_sets_must_be_equal(two: tuple[FeatureSet, FeatureSet], store_path: Path) -> None:
    for number, features in enumerate(two):
        respec(features, imported=False, weights=f"{number}")
    source = Store(store_path)["one", "m"]
    with pytest.raises(TaskError, match="differ in weights; run"):
        matching_set(Store(store_path), source, "two")


def test_incomplete_sets_are_named(two: tuple[FeatureSet, FeatureSet], store_path: Path) -> None:
    for path in (two[1].folder / "commits").rglob("*.json"):
        path.unlink()
    with pytest.raises(IncompleteError, match=r"two/m lacks rows of its manifest; run\n  featstore import FILE"):
        matching_set(Store(store_path), two[0], "two")


def test_groups_are_known_only_if_both_data_sets_know_them(
    two: tuple[FeatureSet, FeatureSet], store_path: Path
) -> None:
    record = evaluate(store_path)[0]
    assert record["groups"] == "known"
    assert json.dumps(record["config"]["task"])
    target = store_path / "datasets" / "two"
    source = next(target.rglob("source.toml"))
    text = source.read_text().replace("groups_known = true", "groups_known = false")
    body = text.rpartition('seal = "')[0]
    source.write_text(body + f'seal = "{files.digest(body.encode())}"\n')
    assert evaluate(store_path)[0]["groups"] == "unknown"


# --- images and patients on both sides


def tagged(features: FeatureSet, adapter: str, **meta: Any) -> FeatureSet:
    """The set as if `adapter` had read its data set."""
    changed = {**features.manifest.meta, "adapter": adapter, **meta}
    features.manifest = replace(features.manifest, meta=changed)
    return features


def test_a_data_set_is_not_tested_on_rows_that_it_trained_on(two: tuple[FeatureSet, FeatureSet]) -> None:
    ours = probes.task(two[0], "one-3")
    cross_task(ours, ours)  # its own test split
    part = np.array(two[0].manifest.column("split"))
    other = replace(ours, role=np.where(part == "train", "test", np.where(part == "test", "train", part)))
    with pytest.raises(
        LeakError,
        match=r"training on one and testing on one share 108 images \(by id\), such as '000.png'; "
        r"54 groups \(patients\), such as 'p0'; test on rows that were not trained on, or "
        r"pass --allow-leak to mark the record",
    ):
        cross_task(ours, other)
    notes = cross_task(ours, other, allow_leak=True).notes
    assert any(note.startswith("leak allowed: training on one and testing on one share 108") for note in notes)


def test_ids_of_two_tables_are_not_compared_and_that_is_said(two: tuple[FeatureSet, FeatureSet]) -> None:
    notes = cross_task(probes.task(two[0], "one-3"), probes.task(two[1], "two-3")).notes
    assert "patients of the two data sets are not compared: unknown in one, or not of one numbering" in notes
    assert "byte-identical images: sought among the 0 of 180 whose file has a known hash" in notes


@pytest.mark.parametrize(
    ("adapters", "known", "message"),
    [
        (("nih", "rsna"), True, r"share 18 groups \(patients\), such as 'p16'"),
        (("nih", "rsna"), False, None),
        (("vindr-cxr", "vindr-cxr"), False, r"share 36 images \(by id\), such as '012.png'"),
        (("nih", "chexpert"), True, None),
    ],
)
def test_patients_and_images_of_one_numbering_are_compared(
    two: tuple[FeatureSet, FeatureSet], adapters: tuple[str, str], known: bool, message: str | None
) -> None:
    ours = probes.task(tagged(two[0], adapters[0], groups_known=known), "one-3")
    theirs = probes.task(tagged(two[1], adapters[1], groups_known=known), "two-3")
    part = np.array(two[1].manifest.column("split"))
    shifted = replace(theirs, role=np.where(part == "train", "", "test"))
    if message:
        with pytest.raises(LeakError, match=message):
            cross_task(ours, shifted)
    else:
        assert cross_task(ours, shifted).index("test").tolist() == np.flatnonzero(part != "train").tolist()


def test_byte_identical_images_are_found_by_their_hashes(two: tuple[FeatureSet, FeatureSet]) -> None:
    size = len(two[0].manifest)
    for number, features in enumerate(two):
        table = features.manifest.table
        # Validation rows of the one are test rows of the other.
        part = np.array(features.manifest.column("split"))
        shared = np.flatnonzero(part == ("val" if number == 0 else "test"))
        hashes = np.array([f"{number}{row:031d}" for row in range(size)])
        hashes[shared] = [f"x{row:031d}" for row in range(len(shared))]
        place = table.column_names.index("content")
        features.manifest = replace(
            features.manifest, table=table.set_column(place, "content", pa.array(hashes.tolist()))
        )
    ours, theirs = probes.task(two[0], "one-3"), probes.task(two[1], "two-3")
    with pytest.raises(LeakError, match="training on one and testing on two share 36 byte-identical images; test on"):
        cross_task(ours, theirs)
    notes = cross_task(ours, theirs, allow_leak=True).notes
    assert not any("known hash" in note for note in notes), "every hash is known"


# --- which task of the other data set


def test_the_target_task_that_shares_most_labels_is_chosen(
    two: tuple[FeatureSet, FeatureSet], store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "two-1", TaskSpec(name="two-1", labels=("Fracture",)))
    monkeypatch.setitem(TASKS, "two-2", TaskSpec(name="two-2", labels=("Edema", "Pleural Effusion")))
    tasks = ["two-1", "two-3", "two-2", "nih-14"]
    manifest = tagged(two[1], "table", tasks=tasks, default_task="two-1").manifest
    source = probes.task(two[0], "one-3")
    spec, why = best_task(source, manifest, TaskConfig())
    assert (spec.name, why) == ("two-2", "two: task two-2, which shares most labels; --test-task names another")
    manifest = tagged(two[1], "table", tasks=tasks, default_task="two-3").manifest
    assert best_task(source, manifest, TaskConfig())[0].name == "two-3", "the default one, as none shares more"
    with pytest.raises(TaskError, match="data set 'two' has no default task"):
        evaluate(store_path, test_task=None)


def test_each_data_set_has_its_task(two: tuple[FeatureSet, FeatureSet], tmp_path: Path, store_path: Path) -> None:
    write(store_path, tmp_path, "three", ("Edema", "Pleural Effusion", "Fracture"), seed=2)
    TASKS["three-1"] = TaskSpec(name="three-1", labels=("Edema",))
    try:
        records = evaluate(store_path, test_dataset="two,three", test_task="two-3,three-1")
    finally:
        del TASKS["three-1"]
    assert [record["test"]["task"]["name"] for record in records] == ["two-3", "three-1"]


def test_notes_of_a_target_on_its_own_training_are_left_out(two: tuple[FeatureSet, FeatureSet]) -> None:
    spec = replace(TASKS["two-3"], selection="carve", split_column="part")
    carved = make_task(two[1], spec)
    assert any(note.startswith("val: ") for note in carved.notes)
    notes = cross_task(probes.task(two[0], "one-3"), carved).notes
    assert "two: splits: column 'part'" in notes
    assert not any("val: " in note for note in notes)


# --- how often a test split was opened


def test_every_task_on_a_test_split_counts_as_one_more_look(
    two: tuple[FeatureSet, FeatureSet], store_path: Path
) -> None:
    def own(**options: Any) -> dict[str, Any]:
        reading = {key: options.pop(key) for key in ("train_policy", "eval_policy") if key in options}
        config = EvalConfig(dataset="two", features="cls", resamples=2, **options)
        return evaluate_sets(Store(store_path), "knn", config, KnnConfig(k="5"), reading=TaskConfig(**reading))[0]

    records = [
        own(task="two-3"),
        own(labels="Edema"),
        own(labels="Edema", train_policy="ones"),
        own(labels="Edema", eval_policy="drop-row"),
        evaluate(store_path)[0],
    ]
    assert [record["test_opened"] for record in records] == [1, 2, 3, 4, 5]
    assert len({record["test_key"] for record in records}) == 1
    assert len({record["task"]["digest"] for record in records}) == 5
    config = EvalConfig(dataset="one", task="one-3", features="cls", resamples=2)
    other = evaluate_sets(Store(store_path), "knn", config, KnnConfig(k="5"))[0]
    assert (other["test_opened"], other["test_key"] != records[0]["test_key"]) == (1, True)


def test_records_from_before_the_key_count_by_their_task(two: tuple[FeatureSet, FeatureSet], store_path: Path) -> None:
    first = evaluate(store_path)[0]
    path = Path(first["file"])
    record = files.unseal(path.read_bytes(), path)
    path.write_bytes(files.sealed({key: value for key, value in record.items() if key not in ("test_key", "digest")}))
    assert "test_key" not in load_records(store_path / "results")[0]
    assert evaluate(store_path)[0]["test_opened"] == 2
