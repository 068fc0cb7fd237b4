"""Tasks: label policies, roles of splits, filters, leaks, failed rows, and the records that keep the results."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import probes
from featstore import files
from featstore.configs import RegisterConfig
from featstore.datasets import manifest as manifests
from featstore.datasets.splits import carve
from featstore.errors import CorruptError, LeakError, StoreError, TaskError, UnknownNameError
from featstore.register import register
from featstore.store.features import FeatureSet
from featstore.store.importer import import_features
from probes.known import TASKS
from probes.known.chest import CHEXPERT_5
from probes.labels import read_labels
from probes.policies import Policy
from probes.records import load_predictions, load_records, prediction_columns, save_record
from probes.roles import assign_roles, crossing_groups, parse_where
from probes.tasks import choose_task, make_task
from probes.taskspec import TaskSpec

MakeSet = Callable[..., FeatureSet]


@pytest.fixture
def make_set(tmp_path: Path, store_path: Path) -> MakeSet:
    """A set of 3-dimensional features, row i = i, on a table with the given columns; no backbone, no images."""

    def make(
        columns: dict[str, list[Any]],
        *,
        labels: str = "",
        failed: tuple[int, ...] = (),
        task: str = "",
        model: str = "m",
    ) -> FeatureSet:
        size = len(next(iter(columns.values())))
        names = [f"{number:03d}.png" for number in range(size)]
        for name in names:
            (tmp_path / name).write_bytes(name.encode())
        pq.write_table(pa.table({"path": names, **columns}), tmp_path / "labels.parquet")
        config = RegisterConfig(
            table=tmp_path / "labels.parquet",
            label_columns=labels,
            split_column="part" if "part" in columns else None,
            group_column="pid" if "pid" in columns else None,
        )
        manifest, _ = register(store_path, "x", tmp_path, config)
        if task:
            meta = {**manifest.meta, "default_task": task}
            manifests.save(store_path / "datasets", dataclasses.replace(manifest, meta=meta))
        kept = [number for number in range(size) if number not in failed]
        features = np.repeat(np.array(kept, np.float32)[:, None], 3, axis=1)
        np.savez(tmp_path / "f.npz", features=features, id=np.array([names[number] for number in kept]))
        store, _, _ = import_features(store_path, tmp_path / "f.npz", dataset="x", model=model)
        return store["x", model]

    return make


PARTS = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
BITS = ["0", "1"] * 4


# --- policies


# MGCA trains atelectasis, edema and effusion with uncertain as 1, the other two as 0, blank as 0.
MGCA_UNCERTAIN = {"Atelectasis": 1, "Cardiomegaly": 0, "Consolidation": 0, "Edema": 1, "Pleural Effusion": 1}


@pytest.mark.parametrize("label", CHEXPERT_5)
def test_chexpert_5_trains_mixed_and_scores_what_is_certain(label: str) -> None:
    values = ["1.0", "0.0", "-1.0", None, "", 1, 0, -1, 1.0, -1.0, float("nan"), True, False]
    spec = TASKS["chexpert-5"]
    y, mask = read_labels(values, spec.train_policy, label)
    uncertain = MGCA_UNCERTAIN[label]
    assert y.tolist() == [1, 0, uncertain, 0, 0, 1, 0, uncertain, 1, uncertain, 0, 1, 0]
    assert mask.all()
    y, mask = read_labels(values, spec.eval_policy, label)
    sure = [True, True, False, True, True, True, True, False, True, False, True, True, True]
    assert mask.tolist() == sure
    assert y.tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["1", "0", "-1", ""]), max_size=20),
    st.sampled_from(["mask", "zero", "one"]),
    st.sampled_from(["mask", "zero"]),
    st.sampled_from([None, "mask", "zero", "one"]),
)
def test_policies_against_their_table(values: list[str], uncertain: Any, blank: Any, override: Any) -> None:
    overrides: Any = () if override is None else (("a", override), ("b", "mask"))
    y, mask = read_labels(values, Policy(uncertain=uncertain, blank=blank, overrides=overrides), "a")
    meaning = {"mask": None, "zero": 0, "one": 1}
    truth = {"1": 1, "0": 0, "-1": meaning[override or uncertain], "": meaning[blank]}
    assert mask.tolist() == [truth[value] is not None for value in values]
    assert y.tolist() == [truth[value] or 0 for value in values]


@pytest.mark.parametrize("value", ["2", "yes", "0.5", " ", 2, 0.5])
def test_values_that_are_no_label(value: Any) -> None:
    with pytest.raises(
        TaskError, match=r"label 'Edema': row 2 says .*; several labels together must be 0, 1, -1 or blank"
    ):
        read_labels(["1", value], Policy(), "Edema")


def test_named_tasks_are_what_the_papers_say() -> None:
    counts = {"chexpert-5": 5, "chexpert-14": 14, "nih-14": 14, "nih-15": 15}
    assert {name: len(TASKS[name].labels) for name in counts} == counts
    assert all(name == task.name for name, task in TASKS.items())
    assert TASKS["nih-15"].labels[-1] == "No Finding"


# --- roles


def roles_of(parts: list[str], spec: TaskSpec, keep: list[bool] | None = None) -> tuple[list[str], tuple[str, ...]]:
    groups = np.array([f"p{number}" for number in range(len(parts))])
    kept = np.ones(len(parts), dtype=bool) if keep is None else np.array(keep)
    role, notes = assign_roles(np.array(parts, dtype=object), groups, spec, kept)
    return role.tolist(), notes


OFFICIAL = TaskSpec(name="t", labels=("a",))
CARVE = TaskSpec(name="t", labels=("a",), selection="carve")


def test_official_splits_stay_what_they_are() -> None:
    assert roles_of([*PARTS, ""], OFFICIAL) == ([*PARTS, ""], ())


@pytest.mark.parametrize("spec", [OFFICIAL, CARVE])
def test_without_a_test_split_the_validation_split_is_it_and_train_gives_a_tenth(spec: TaskSpec) -> None:
    role, notes = roles_of(["train"] * 30 + ["val"] * 5, spec)
    assert role[30:] == ["test"] * 5
    marks = carve([f"p{number}" for number in range(30)], fraction=0.1, seed=0)
    assert role[:30] == ["val" if mark else "train" for mark in marks]
    assert role.count("val") == 3
    assert notes == ("test: the validation split, as there is no test split", "val: 10% of the training groups, seed 0")


def test_without_a_validation_split_train_gives_a_tenth() -> None:
    role, notes = roles_of(["train"] * 30 + ["test"] * 5, OFFICIAL)
    assert [role.count(name) for name in ("train", "val", "test")] == [27, 3, 5]
    assert notes == ("val: 10% of the training groups, seed 0",)


def test_carving_leaves_the_official_validation_split_unused_beside_a_test_split() -> None:
    role, _ = roles_of(["train"] * 20 + ["val"] * 5 + ["test"] * 5, CARVE)
    assert role[20:] == [""] * 5 + ["test"] * 5
    assert role.count("val") == 2


def test_the_carved_groups_follow_the_seed() -> None:
    parts = ["train"] * 30 + ["test"]
    assert roles_of(parts, CARVE) != roles_of(parts, dataclasses.replace(CARVE, seed=1))


def test_a_filter_does_not_change_what_a_split_is_for() -> None:
    keep = [True] * 6 + [False] * 2
    with pytest.raises(
        TaskError, match=r"task 't' needs samples to train, select and test on; it has train 4, val 2, test 0"
    ):
        roles_of(PARTS, OFFICIAL, keep)
    with pytest.raises(TaskError, match=r"it has train 4, val 0, test 2; check the split column and --where"):
        roles_of(PARTS, OFFICIAL, [True] * 4 + [False] * 2 + [True] * 2)


@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        (["train"] * 3, "train 2, val 1, test 0"),
        (["val"] * 3, "train 0, val 0, test 3"),
        (["train", "test"], "train 1, val 0, test 1"),
        ([""], "train 0, val 0, test 0"),
    ],
)
def test_roles_without_samples(parts: list[str], counts: str) -> None:
    with pytest.raises(TaskError, match=f"needs samples to train, select and test on; it has {counts}"):
        roles_of(parts, OFFICIAL)


splits = st.sampled_from(["train", "val", "test", ""])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(splits, st.integers(0, 30), st.booleans()), min_size=1, max_size=60),
    st.sampled_from([OFFICIAL, CARVE]),
)
def test_no_split_and_no_group_gets_two_roles(rows: list[tuple[str, int, bool]], spec: TaskSpec) -> None:
    home = {number: part for part, number, _ in rows}  # a group's last split, so that no group crosses
    groups = np.array([f"p{number}" for _, number, _ in rows])
    parts = np.array([home[number] for _, number, _ in rows], dtype=object)
    keep = np.array([kept for _, _, kept in rows])
    try:
        role, _ = assign_roles(parts, groups, spec, keep)
    except TaskError:
        return
    assert crossing_groups(role, groups) == []
    assert not (role[~keep] != "").any()
    pairs = {(part, new) for part, new in zip(parts.tolist(), role.tolist()) if new != ""}
    assert {new for part, new in pairs if part == "test"} <= {"test"}
    assert len({new for part, new in pairs if part == "val"}) <= 1
    assert {part for part, new in pairs if new == "train"} == {"train"}
    assert len({part for part, new in pairs if new == "test"}) == 1
    assert len({part for part, new in pairs if new == "val"}) == 1


# --- tasks on sets


def test_arrays_are_the_rows_of_the_split(make_set: MakeSet) -> None:
    features = make_set(
        {"part": PARTS, "pid": [f"p{number // 2}" for number in range(8)], "a": BITS, "b": ["1", "0"] + ["1"] * 6}
    )
    task = probes.task(features, labels=["a", "b"])
    x, y, mask, groups, ids = task.arrays("val", features="cls")
    assert x.dtype == np.float32
    assert x.tolist() == [[4.0] * 3, [5.0] * 3]
    assert y.tolist() == [[0, 1], [1, 1]]
    assert mask.all()
    assert groups.tolist() == ["p2", "p2"]
    assert ids == ["004.png", "005.png"]
    assert task.name == "labels:a+b"
    assert (task.kind, task.labels) == ("multilabel", ("a", "b"))
    assert task.arrays("train", features="cls")[0].shape == (4, 3)
    with pytest.raises(TaskError, match="a split is one of train, val, test, got 'valid'"):
        task.index("valid")


def test_train_rows_follow_the_training_policy(make_set: MakeSet) -> None:
    columns = {name: ["1.0", "-1.0", None, "0.0", "-1.0", "1.0", "-1.0", "0.0"] for name in CHEXPERT_5}
    frontal = ["Frontal"] * 8
    features = make_set({"part": ["train"] * 4 + ["val"] * 4, "Frontal/Lateral": frontal, **columns}, task="chexpert-5")
    task = probes.task(features)
    assert task.name == "chexpert-5"
    assert task.role[4:].tolist() == ["test"] * 4
    assert (task.role == "val").sum() == 1
    train = task.index("train")
    uncertain = [MGCA_UNCERTAIN[name] for name in CHEXPERT_5]
    truth = {0: [1] * 5, 1: uncertain, 2: [0] * 5, 3: [0] * 5}
    assert task.arrays("train", features="cls")[1].tolist() == [truth[row] for row in train]
    assert task.arrays("train", features="cls")[2].all()
    assert task.arrays("test", features="cls")[4] == ["005.png", "007.png"], "rows without a certain label are left out"


def test_failed_rows_are_left_out_of_every_split(make_set: MakeSet) -> None:
    features = make_set({"part": PARTS, "a": BITS}, failed=(0, 4, 7))
    task = probes.task(features, labels=["a"])
    assert [task.index(split).tolist() for split in ("train", "val", "test")] == [[1, 2, 3], [5], [6]]
    assert not any(np.isnan(task.arrays(split, features="cls")[0]).any() for split in ("train", "val", "test"))
    features = make_set({"part": PARTS, "a": BITS, "more": BITS}, failed=(4, 5), model="n")
    with pytest.raises(
        TaskError, match="task 'labels:a': none of the 2 val samples has a label and features; check the"
    ):
        probes.task(features, labels=["a"])


def test_a_split_without_any_label(make_set: MakeSet) -> None:
    features = make_set({"part": PARTS, "a": ["0", "1", "0", "1", "0", "1", None, "-1"]})
    with pytest.raises(TaskError, match="none of the 2 test samples has a label and features"):
        probes.task(features, labels=["a"])


def test_single_columns_are_categorical_unless_they_are_0_and_1(make_set: MakeSet) -> None:
    views = ["PA", "AP", None, "LL", "AP", "PA", "", "AP"]
    features = make_set({"part": PARTS, "view": views, "a": BITS, "n": [1, 2, 3, 1, 2, 3, 1, 2], "f": [0.0, 1.0] * 4})
    task = probes.task(features, labels=["view"])
    assert (task.kind, task.labels) == ("multiclass", ("AP", "LL", "PA"))
    assert task.y.tolist()[:2] == [2, 0]
    assert task.mask.tolist() == [value not in (None, "") for value in views]
    assert task.index("train").tolist() == [0, 1, 3]
    assert probes.task(features, labels=["n"]).labels == ("1", "2", "3")
    for name in ("a", "f"):
        binary = probes.task(features, labels=[name])
        assert (binary.kind, binary.labels, binary.y.shape) == ("multilabel", (name,), (8, 1))
        assert binary.y[:, 0].tolist() == [0, 1] * 4
    with pytest.raises(
        TaskError, match=r"label 'view': row 1 says 'PA'; several labels together must be 0, 1, -1 or blank"
    ):
        probes.task(features, labels=["view", "a"])


def test_too_many_classes(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    features = make_set({"part": PARTS, "name": [f"n{number}" for number in range(8)]})
    monkeypatch.setattr("probes.labels.MAX_CLASSES", 7)
    with pytest.raises(TaskError, match="label 'name' has 8 different values; a categorical label has at most 7"):
        probes.task(features, labels=["name"])


def test_where_keeps_rows_and_their_classes(make_set: MakeSet) -> None:
    columns = {"part": PARTS * 2, "view": (["AP", "PA"] * 4) + ["LL"] * 8, "site": ["1", None] + ["2"] * 14}
    features = make_set({**columns, "odd": BITS + ["?"] * 8})
    task = probes.task(features, labels=["view"], where="view=AP|PA")
    assert task.labels == ("AP", "PA"), "classes of rows that are left out are none"
    assert task.role.tolist() == [*PARTS, *[""] * 8]
    assert probes.task(features, labels=["odd"], where="view = AP | PA").kind == "multilabel"
    assert probes.task(features, labels=["view"], where="site=2,view=AP|PA").index("train").tolist() == [2, 3]
    role = make_task(features, TaskSpec(name="t", labels=("view",), where=(("site", ("", "2")),))).role
    assert role[:2].tolist() == ["", "train"], "a blank cell is the empty text"
    with pytest.raises(
        TaskError,
        match=r"no sample passes the filter view=ap\|pa; view has AP, LL, PA; check the column's values with "
        "`featstore info x`",
    ):
        probes.task(features, labels=["view"], where="view=ap|pa")
    with pytest.raises(TaskError, match=r"the filter site=None; site has \(blank\), 1, 2; check"):
        probes.task(features, labels=["view"], where="site=None")
    with pytest.raises(TaskError, match=r"the filter id=none; id has 000.png, .*, 009.png and 6 more; check"):
        probes.task(features, labels=["view"], where="id=none")


def test_parse_where() -> None:
    assert parse_where("source=nih,view=AP|PA") == (("source", ("nih",)), ("view", ("AP", "PA")))
    assert parse_where("a=x=y") == (("a", ("x=y",)),)
    assert parse_where("a=") == (("a", ("",)),)
    for text in ("view", "=AP", "a=1,", "a=1, =2"):
        with pytest.raises(TaskError, match=r"--where takes COLUMN=VALUE or COLUMN=VALUE\|VALUE, comma-separated; got"):
            parse_where(text)


def test_choose_task(make_set: MakeSet) -> None:
    plain = make_set({"part": PARTS, "a": BITS, "b": BITS}).manifest
    with pytest.raises(TaskError, match="data set 'x' has no default task; name label columns with --labels"):
        choose_task(plain)
    with pytest.raises(
        UnknownNameError, match=r"unknown task 'nope'; known: .*chexpert-5, .*nih-14, .*; or name columns with --labels"
    ):
        choose_task(plain, task="nope")
    assert choose_task(plain, task="nih-14") is TASKS["nih-14"]
    labelled = make_set({"part": PARTS, "a": BITS, "b": BITS, "c": BITS}, labels="a,b").manifest
    assert choose_task(labelled).labels == ("a", "b")
    assert choose_task(labelled, labels=("c",)).labels == ("c",)
    default = dataclasses.replace(labelled, meta={**labelled.meta, "default_task": "chexpert-5"})
    assert choose_task(default) is TASKS["chexpert-5"]
    both = choose_task(default, where="AP/PA=AP")
    assert both.where == (("Frontal/Lateral", ("Frontal",)), ("AP/PA", ("AP",)))
    assert both.train_policy == TASKS["chexpert-5"].train_policy


def test_unknown_columns(make_set: MakeSet) -> None:
    features = make_set({"part": PARTS, "a": BITS})
    known = "its columns: id, path, size, split, group, study, mask_path, source_path, part, a$"
    with pytest.raises(UnknownNameError, match=f"data set 'x' has no column 'A'; {known}"):
        probes.task(features, labels=["A"])
    with pytest.raises(UnknownNameError, match=f"data set 'x' has no column 'view'; {known}"):
        probes.task(features, labels=["a"], where="view=AP")


def test_a_group_in_two_splits_stops_unless_allowed(make_set: MakeSet) -> None:
    pids = ["p0", "p1", "p2", "p3", "p4", "p5", "p0", "p5"]
    features = make_set({"part": PARTS, "pid": pids, "a": BITS, "site": ["1"] * 6 + ["2"] * 2})
    with pytest.raises(
        LeakError, match=r"2 groups \(patients\) stand in more than one split, such as 'p0'; fix --split-column"
    ):
        probes.task(features, labels=["a"])
    task = probes.task(features, labels=["a"], allow_leak=True)
    assert task.notes == ("leak allowed: 2 groups (patients) stand in more than one split, such as 'p0'",)
    assert crossing_groups(task.role, task.groups) == ["p0", "p5"]


def test_samples_without_a_group_are_their_own(make_set: MakeSet) -> None:
    features = make_set({"part": PARTS, "pid": ["p0", None, None, "p3", None, "p5", None, None], "a": BITS})
    task = probes.task(features, labels=["a"])
    assert len(set(task.groups.tolist())) == 8
    assert task.groups[:2].tolist() == ["p0", "id:001.png"]


def test_digest_changes_with_labels_policies_filters_and_rows(make_set: MakeSet) -> None:
    features = make_set({"part": PARTS, "a": BITS, "b": BITS, "c": ["1"] * 8})
    spec = TaskSpec(name="t", labels=("a",))
    specs = [
        spec,
        dataclasses.replace(spec, labels=("b",)),
        dataclasses.replace(spec, eval_policy=Policy(blank="zero")),
        dataclasses.replace(spec, where=(("c", ("1",)),)),
        dataclasses.replace(spec, selection="carve"),
        dataclasses.replace(spec, seed=1),
    ]
    digests = [make_task(features, item).digest for item in specs]
    assert len(set(digests)) == len(digests)
    task = make_task(features, spec)
    assert task.digest == digests[0]
    moved = dataclasses.replace(task, role=np.array(["train", "", *PARTS[2:]]))
    other = dataclasses.replace(task, role=np.array(["", "train", *PARTS[2:]]))
    assert moved.digest != other.digest, "which row is unused is part of the task"


def test_evaluate_wants_a_score_for_every_row_and_label(make_set: MakeSet) -> None:
    task = probes.task(make_set({"part": PARTS, "a": BITS}), labels=["a"])
    result = task.evaluate(np.array([[0.1], [0.9]]), resamples=0)
    assert result["macro"]["auroc"] == 1.0
    with pytest.raises(TaskError, match=r"test has 2 samples and 1 labels or classes; got scores of shape \(2, 2\)"):
        task.evaluate(np.zeros((2, 2)))


# --- records


def test_records_come_back_with_their_predictions(make_set: MakeSet, tmp_path: Path) -> None:
    features = make_set(
        {"part": PARTS, "pid": [f"p{number}" for number in range(8)], "a": BITS, "b": ["-1", "0"] + ["1"] * 6}
    )
    task = probes.task(features, labels=["a", "b"])
    scores = {"val": np.array([[0.1, 0.2], [0.3, 0.4]]), "test": np.array([[0.5, 0.6], [0.7, 0.8]])}
    folder = tmp_path / "results"
    record = {
        "dataset": "x",
        "value": np.float32(0.5),
        "bad": float("nan"),
        "rows": np.arange(2),
        "in": (tmp_path, {1: np.inf}),
    }
    path = save_record(folder, record, prediction_columns(task, scores))
    [loaded] = load_records(folder, dataset="x")
    assert loaded["file"] == str(path)
    assert {key: loaded[key] for key in record} == {
        "dataset": "x",
        "value": 0.5,
        "bad": None,
        "rows": [0, 1],
        "in": [str(tmp_path), {"1": None}],
    }
    assert loaded["schema"] == 1
    assert "numpy" in loaded["versions"]
    assert load_records(folder, dataset="y") == []
    table = load_predictions(loaded)
    assert table.column("id").to_pylist() == ["004.png", "005.png", "006.png", "007.png"]
    assert table.column("group").to_pylist() == ["p4", "p5", "p6", "p7"]
    assert table.column("split").to_pylist() == ["val", "val", "test", "test"]
    assert table.column("label:a").to_pylist() == [0, 1, 0, 1]
    assert table.column("mask:b").to_pylist() == [True] * 4
    assert table.column("score:b").to_pylist() == [0.2, 0.4, 0.6, 0.8]


def test_predictions_of_classes_name_the_class(make_set: MakeSet) -> None:
    task = probes.task(make_set({"part": PARTS, "view": ["AP", "PA"] * 4}), labels=["view"])
    columns = prediction_columns(task, {"test": np.array([[0.9, 0.1], [0.2, 0.8]])})
    assert columns["label"] == ["AP", "PA"]
    assert columns["score:PA"] == [0.1, 0.8]
    assert columns.keys() == {"id", "group", "split", "label", "score:AP", "score:PA"}


def test_damaged_records(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    assert load_records(folder) == []
    path = save_record(folder, {"dataset": "x"}, {"id": ["a"]})
    [loaded] = load_records(folder)
    path.with_suffix(".parquet").unlink()
    with pytest.raises(CorruptError, match=r"parquet: the predictions of this record are missing"):
        load_predictions(loaded)
    path.write_text(path.read_text().replace('"x"', '"y"'))
    with pytest.raises(CorruptError, match="does not match its digest"):
        load_records(folder)
    path.write_text("{}")
    with pytest.raises(CorruptError, match="not a sealed JSON file"):
        load_records(folder)


def test_records_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"results: records cannot be written here \(.*\); pass --results FOLDER"):
        save_record(tmp_path / "file" / "results", {}, {"id": ["a"]})


def test_records_are_in_order_of_time(tmp_path: Path) -> None:
    for name, time in (("b", "2024-01-01T00:00:00Z"), ("a", "2025-01-01T00:00:00Z"), ("c", "2023-01-01T00:00:00Z")):
        (tmp_path / f"{name}.json").write_bytes(files.sealed({"time": time, "id": name}))
    assert [record["id"] for record in load_records(tmp_path)] == ["c", "b", "a"]
    assert json.loads((tmp_path / "a.json").read_text())["digest"]
