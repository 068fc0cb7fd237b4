"""What a label column must be to be read as asked: classes that are there, numbers that are few, a name of its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_sets import by_patient, write_set
from typer.testing import CliRunner

from cli.main import _probe_app, _store_app
from featstore.errors import ConfigError, TaskError
from featstore.request import request_of
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes.configs import TaskConfig
from probes.known import TASKS
from probes.labels import MOST_NUMBERS, read_targets
from probes.tasks import Task, choose_task, make_task
from probes.taskspec import TaskSpec

SIZE = 60
SEVERITY = ["none"] * 30 + ["mild"] * 15 + ["severe"] * 10 + [""] * 5


@pytest.fixture
def features(tmp_path: Path, store_path: Path) -> FeatureSet:
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = by_patient(np.arange(SIZE))
    columns |= {
        "severity": [SEVERITY[row] for row in rng.permutation(SIZE)],
        "a": ["0", "1"] * (SIZE // 2),
        "num": [float(row % 30) for row in range(SIZE)],
        "grade": [row % 3 for row in range(SIZE)],
        "size": [["small", "large"][row % 2] for row in rng.permutation(SIZE)],
    }
    return write_set(store_path, tmp_path / "x", columns, rng.standard_normal((SIZE, 3)))


def task_of(features: FeatureSet, *labels: str, **reading: Any) -> Task:
    return make_task(features, choose_task(features.manifest, labels=labels, reading=TaskConfig(**reading)))


@pytest.mark.parametrize("kind", ["ordinal", "multiclass"])
def test_classes_that_no_row_has(features: FeatureSet, kind: Any) -> None:
    message = (
        r"no row of 'severity' is of the class 'sever' \(near it: 'severe'\); name classes as the column spells them. "
        r"Its values, with their rows: none \(30\), mild \(15\), severe \(10\)$"
    )
    with pytest.raises(TaskError, match=message):
        task_of(features, "severity", kind=kind, classes="none,mild,sever")
    with pytest.raises(TaskError, match=r"no row of 'severity' is of the class 'critical'; name classes as"):
        task_of(features, "severity", kind=kind, classes="none,mild,severe,critical")
    whole = task_of(features, "severity", kind=kind, classes="none,mild,severe")
    assert not any("classes" in note for note in whole.notes)


@pytest.mark.parametrize("kind", ["ordinal", "multiclass"])
def test_values_that_are_no_class_are_counted(features: FeatureSet, kind: Any) -> None:
    task = task_of(features, "severity", kind=kind, classes="none,severe")
    assert "severity: rows of values that are none of the classes left out: mild (15)" in task.notes
    assert sum(len(task.index(split)) for split in ("train", "val", "test")) == 40


def test_classes_spelt_as_numbers_and_in_one_of_several_columns(features: FeatureSet) -> None:
    task = task_of(features, "grade", kind="ordinal", classes="0,1,2")
    assert np.bincount(task.y[:, 0].astype(int)).tolist() == [20, 20, 20]
    spec = TaskSpec(name="t", labels=("p", "q"), kind="ordinal", classes=("lo", "mid", "hi"))
    found = read_targets({"p": ["lo", "hi", "lo"], "q": ["mid", "lo", "x"]}, spec, every_class=True)
    assert found.y.tolist() == [[0, 1], [2, 0], [0, 0]]
    assert found.mask.tolist() == [[True, True], [True, True], [True, False]]
    assert found.notes == ("q: rows of values that are none of the classes left out: x (1)",)


def test_known_tasks_may_have_classes_that_a_data_set_lacks(
    features: FeatureSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TaskSpec(name="t", labels=("severity",), kind="multiclass", classes=("none", "mild", "severe", "critical"))
    monkeypatch.setitem(TASKS, "t", spec)
    task = make_task(features, choose_task(features.manifest, task="t"))
    assert "no row of critical in train: never predicted, rows of it count as wrong" in task.notes
    with pytest.raises(TaskError, match="no row of 'severity' is of the class 'sever'"):
        make_task(features, choose_task(features.manifest, task="t", reading=TaskConfig(classes="none,mild,sever")))


def test_many_values_are_cut_short() -> None:
    spec = TaskSpec(name="t", labels=("p",), kind="multiclass", classes=("a", "b"))
    values = ["a", "b", *(f"v{number}" for number in range(14))]
    notes = read_targets({"p": values}, spec, every_class=True).notes
    assert notes[0].endswith(
        "v0 (1), v1 (1), v10 (1), v11 (1), v12 (1), v13 (1), v2 (1), v3 (1), v4 (1), v5 (1) and 4 more"
    )


def test_numbers_are_no_classes_unless_asked(features: FeatureSet) -> None:
    message = (
        "label 'num' has 30 different values, all of them numbers: with --kind regression they are numbers to fit; "
        "--kind multiclass takes each for a class of its own"
    )
    with pytest.raises(TaskError, match=message):
        task_of(features, "num")
    assert task_of(features, "num", kind="regression").kind == "regression"
    assert len(task_of(features, "num", kind="multiclass").labels) == 30
    few = [str(number) for number in range(MOST_NUMBERS)]
    assert len(read_targets({"p": few}, TaskSpec(name="t", labels=("p",))).labels) == MOST_NUMBERS
    words = [*map(str, range(30)), "n/a"]
    assert len(read_targets({"p": words}, TaskSpec(name="t", labels=("p",))).labels) == 31


def test_a_column_named_like_the_manifests_own(features: FeatureSet, tmp_path: Path) -> None:
    with pytest.raises(
        TaskError, match="label 'size' is the manifest's own column, and that of the table stands in 'source_size'"
    ):
        task_of(features, "size")
    assert task_of(features, "source_size").labels == ("large", "small")
    call = ["register", "y", str(tmp_path / "x"), "--table", "labels.parquet", "--store", str(tmp_path / "new")]
    done = CliRunner().invoke(_store_app(), [*call, "--split-column", "part"])
    assert done.exit_code == 0, done.output
    assert "columns of yours named like the manifest's own: path is source_path, size is source_size" in done.stdout
    made = CliRunner().invoke(_store_app(), [*call, "--split-column", "part", "--json"])
    assert '"size": "source_size"' in made.stdout


def test_imported_features_have_no_views_and_no_extraction(features: FeatureSet) -> None:
    call = ["linear", "--dataset", "x", "--labels", "a", "--model", "m", "--store", str(features.folder.parents[2])]
    for options, message in (
        (
            ["--protocol", "dinov2", "--views", "3"],
            "x/m holds imported features, which have no augmented views; leave --views out",
        ),
        (["--extract"], "holds imported features, which no extraction makes; leave --extract out"),
    ):
        failed = CliRunner().invoke(_probe_app(), [*call, *options])
        assert failed.exit_code == 2
        assert message in str(failed.output) + str(failed.exception), failed.output
    entry = Store(features.folder.parents[2]).find("x")[0]
    with pytest.raises(ConfigError, match="x/m holds imported features, which no extraction can make again or extend"):
        request_of(entry.spec)
