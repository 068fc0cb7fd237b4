"""Label policies: readers' votes, rows that leave, the extra label, merged labels, and what a command may ask for."""

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_sets import PARTS, write_set

import probes
from featstore.errors import ConfigError, TaskError, UnknownNameError
from featstore.store.features import FeatureSet
from probes.configs import TaskConfig
from probes.known import TASKS
from probes.known.chest import CHEXPERT_14
from probes.labels import code_of, label_columns, read_labels, read_targets
from probes.policies import POLICIES, SENSITIVITY, UNCERTAIN, Policy, named_policy, policy_name
from probes.tasks import choose_task, make_task, read_as
from probes.taskspec import TaskSpec

BITS = ["0", "1"] * 4
FEATURES = np.repeat(np.arange(8.0)[:, None], 3, axis=1)


@pytest.fixture
def labelled(tmp_path: Path, store_path: Path) -> FeatureSet:
    columns: dict[str, list[Any]] = {
        "part": PARTS,
        "fold": ["valid", "train", "train", "test", "train", "Val", "test", None],
        "a": ["1", "-1", "0", None, "0", "1", "-1", "0"],
        "b": ["0", "0", "1", "1", "-1", "0", "1", "0"],
        "c": ["-1", "0", "0", None, "0", "0", "0", "1"],
        "votes": ["1|0|1", "0|0|1", "1|0", "-1|-1", "1|1|0", "0|0|0", "1|1|1", "|"],
        "odd": ["1", "2", "3", "1", "2", "1", "2", "3"],
    }
    return write_set(store_path, tmp_path / "x", columns, FEATURES)


# --- votes


def brute(votes: tuple[str, ...], readers: str) -> int:
    """What the votes of readers come to, from the definition: -2 is blank."""
    sure = [int(vote) for vote in votes if vote in ("0", "1")]
    if readers == "any":
        if "1" in votes:
            return 1
        return -1 if "-1" in votes else 0 if sure else -2
    if sure:
        return int(sum(sure) / len(sure) > 0.5)
    return -1 if "-1" in votes else -2


@pytest.mark.parametrize("readers", ["any", "majority"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_votes_of_every_kind(readers: Any, count: int) -> None:
    for votes in product(["1", "0", "-1", ""], repeat=count):
        assert code_of("|".join(votes), readers) == brute(votes, readers), votes


def test_two_readers_who_disagree_make_no_majority() -> None:
    for text in ("1|0", "0|1", "1.0|0.0", "1 | 0"):
        assert code_of(text, "majority") == 0
        assert code_of(text, "any") == 1


def test_a_vote_that_is_no_label() -> None:
    assert code_of("1|yes", "any") is None
    with pytest.raises(TaskError, match=r"label 'a': row 1 says '1\|2'; several labels together must be 0, 1, -1"):
        read_labels(["1|2"], Policy(), "a")


def test_majority_is_the_default_and_leaves_single_values_alone() -> None:
    values = ["1", "0", "-1", "", None, 1.0, -1]
    for readers in ("any", "majority"):
        y, mask = read_labels(values, Policy(readers=readers), "a")
        assert y.tolist() == [1, 0, 0, 0, 0, 1, 0]
        assert mask.tolist() == [True, True, False, False, False, True, False]


def test_a_column_of_votes_is_no_categorical_label(labelled: FeatureSet) -> None:
    task = probes.task(labelled, labels=["votes"])
    assert task.kind == "multilabel"
    assert task.y[:, 0].tolist() == [1, 0, 0, 0, 1, 0, 1, 0]
    assert task.mask[:, 0].tolist() == [True, True, True, False, True, True, True, False]
    anyone = probes.task(labelled, labels=["votes"], train_policy="any-reader", eval_policy="any-reader")
    assert anyone.y[:, 0].tolist() == [1, 1, 1, 0, 1, 0, 1, 0]


# --- rows that leave, and the extra label


def test_drop_row_leaves_the_role_whose_policy_it_is(labelled: FeatureSet) -> None:
    train = probes.task(labelled, labels=["a", "b", "c"], train_policy="drop-row", eval_policy="zeros")
    assert train.role.tolist() == ["", "", "train", "train", *PARTS[4:]]
    assert train.index("train").tolist() == [2, 3]
    assert train.notes == ("train: 2 rows with an uncertain label left out",)
    assert not train.mask_train[[0, 1, 4, 6]].any(), "a refit leaves them out as well"
    test = probes.task(labelled, labels=["a", "b", "c"], train_policy="zeros", eval_policy="drop-row")
    assert test.role.tolist() == ["train"] * 4 + ["", "val", "", "test"]
    assert test.notes == (
        "val: 1 rows with an uncertain label left out",
        "test: 1 rows with an uncertain label left out",
        "c: one class in train (0 positive, 4 negative), not fitted",
    )


def test_drop_labels_say_which_labels_drop_a_row(labelled: FeatureSet) -> None:
    policy = Policy(uncertain="drop", blank="zero", drop_labels=("c",))
    spec = TaskSpec(name="t", labels=("a", "b"), train_policy=policy)
    task = make_task(labelled, spec)
    assert task.index("train").tolist() == [1, 2, 3]
    assert task.mask_train[1].tolist() == [False, True], "an uncertain value that drops no row is masked"
    overridden = Policy(uncertain="drop", blank="zero", overrides=(("a", "one"),))
    task = make_task(labelled, TaskSpec(name="t", labels=("a", "b"), train_policy=overridden))
    assert task.index("train").tolist() == [0, 1, 2, 3]
    assert task.y_train[1].tolist() == [1, 0]


def test_the_extra_class_is_one_where_any_label_is_uncertain(labelled: FeatureSet) -> None:
    task = probes.task(labelled, labels=["a", "b", "c"], train_policy="extra-class", eval_policy="extra-class")
    assert task.labels == ("a", "b", "c", UNCERTAIN)
    assert task.y_train[:, 3].tolist() == [1, 1, 0, 0, 1, 0, 1, 0]
    assert task.y_train[:, 0].tolist() == [1, 0, 0, 0, 0, 1, 0, 0], "uncertain is read as 0"
    assert task.mask_train.all()
    trained = probes.task(labelled, labels=["a", "b", "c"], train_policy="extra-class", eval_policy="ignore")
    assert trained.labels == task.labels
    assert not trained.mask[:, 3].any(), "not scored where the evaluation policy has no such label"
    assert trained.index("test").tolist() == [6, 7]


def test_an_extra_class_that_is_never_trained(labelled: FeatureSet) -> None:
    with pytest.raises(TaskError, match="the evaluation policy adds the label 'Uncertain', which the training policy"):
        probes.task(labelled, labels=["a"], eval_policy="extra-class")
    renamed = TaskSpec(name="t", labels=(UNCERTAIN,), train_policy=POLICIES["extra-class"])
    with pytest.raises(UnknownNameError, match="has no column 'Uncertain'"):
        make_task(labelled, renamed)


def test_an_extra_class_beside_a_label_of_that_name(tmp_path: Path, store_path: Path) -> None:
    features = write_set(store_path, tmp_path / "x", {"part": PARTS, UNCERTAIN: BITS}, FEATURES)
    with pytest.raises(TaskError, match="has a label 'Uncertain' already; use another policy than extra-class"):
        probes.task(features, labels=[UNCERTAIN], train_policy="extra-class")


@pytest.mark.parametrize("reading", [{"train_policy": "zeros"}, {"eval_policy": "ignore"}])
def test_policies_of_what_is_no_0_1_label_are_refused(labelled: FeatureSet, reading: dict[str, Any]) -> None:
    message = "label policies read columns of 1, 0, -1 and blank; leave --kind, --train-policy, --eval-policy and"
    with pytest.raises(TaskError, match=f"task 'labels:odd' is multiclass: {message}"):
        probes.task(labelled, labels=["odd"], **reading)
    with pytest.raises(TaskError, match=f"is regression: {message}"):
        probes.task(labelled, labels=["odd"], kind="regression", **reading)
    with pytest.raises(TaskError, match=f"is ordinal: {message}"):
        probes.task(labelled, labels=["odd"], kind="ordinal", classes="1,2,3", **reading)


def test_a_task_that_reads_labels_under_policies_is_no_regression(labelled: FeatureSet) -> None:
    spec = TaskSpec(name="t", labels=("a",), eval_policy=Policy(blank="zero"))
    assert make_task(labelled, spec).kind == "multilabel"
    with pytest.raises(TaskError, match="task 't' is regression: label policies read"):
        make_task(labelled, read_as(spec, TaskConfig(kind="regression")))


def test_a_label_named_twice(labelled: FeatureSet) -> None:
    with pytest.raises(TaskError, match="task 'labels:a\\+b\\+a' names the label 'a' twice; name it once"):
        probes.task(labelled, labels=["a", "b", "a"])


def test_a_label_that_drops_rows_does_so_whatever_its_override(labelled: FeatureSet) -> None:
    policy = Policy(uncertain="drop", blank="zero", overrides=(("a", "zero"), ("b", "zero")), drop_labels=("a",))
    task = make_task(labelled, TaskSpec(name="t", labels=("a", "b"), train_policy=policy))
    assert task.index("train").tolist() == [0, 2, 3]


NOTHREE = ("Cardiomegaly", "Lung Opacity", "Lung Lesion", "Pneumonia", "Edema")


@pytest.mark.parametrize("name", ["chexpert-10-a-nothree", "mimic-10-a-nothree"])
@pytest.mark.parametrize("label", CHEXPERT_14)
def test_nothree_drops_rows_uncertain_in_any_of_its_five_labels(name: str, label: str) -> None:
    spec = TASKS[name]
    columns = {column: ["-1.0" if column == label else "1.0", "0.0"] for column in label_columns(spec)}
    found = read_targets(columns, spec)
    for dropped, mask, y in (
        (found.dropped_train, found.mask_train, found.y_train),
        (found.dropped, found.mask, found.y),
    ):
        assert dropped.tolist() == [label in NOTHREE, False]
        assert mask[0].tolist() == [label not in NOTHREE] * 10
        assert y[0].tolist() == [int(other != label) for other in spec.labels]


@pytest.mark.parametrize("label", ["Pleural Effusion", "Pleural effusion", "Effusion", "edema", "ATELECTASIS"])
def test_overrides_find_labels_of_another_spelling(label: str) -> None:
    assert read_labels(["-1"], POLICIES["mixed"], label)[0].tolist() == [1]
    assert read_labels(["-1"], POLICIES["mixed"], "Pericardial effusion")[0].tolist() == [0]
    exact = Policy(overrides=(("Effusion", "zero"), ("Pleural Effusion", "one")))
    assert [int(read_labels(["-1"], exact, name)[0][0]) for name in ("Effusion", "Pleural Effusion")] == [0, 1]


def test_a_policy_that_singles_out_none_of_the_labels_is_told(labelled: FeatureSet) -> None:
    task = probes.task(labelled, labels=["a", "b"], train_policy="mixed")
    assert task.notes == (
        "training policy: it singles out Atelectasis, Edema, Pleural Effusion, which the task has not; every uncertain "
        "value: zero",
    )


def test_rows_that_nobody_labelled_are_masked_where_the_task_says_so(tmp_path: Path, store_path: Path) -> None:
    columns: dict[str, list[Any]] = {
        "part": PARTS,
        "a": ["1", None, "0", None, "0", "1", None, "0"],
        "b": ["0", "", "1", None, "1", "0", "", "1"],
        "none": [None, None, None, "1", None, None, "", None],
    }
    features = write_set(store_path, tmp_path / "x", columns, FEATURES, label_columns="a,b,none")
    spec = TaskSpec(name="t", labels=("a", "b"), train_policy=POLICIES["zeros"], eval_policy=POLICIES["zeros"])
    blank, masked = make_task(features, spec), make_task(features, dataclasses.replace(spec, unlabelled="mask"))
    assert blank.mask.all()
    assert "unlabelled" not in spec.as_dict()
    # Row 3 has a value in a column that the task does not read: its blanks were looked at and left.
    assert masked.mask.all(1).tolist() == [True, False, True, True, True, True, False, True]
    assert not masked.mask[[1, 6]].any()
    assert not masked.mask_train[[1, 6]].any()
    assert (masked.index("train").tolist(), masked.index("test").tolist()) == ([0, 2, 3], [7])
    assert masked.notes == ("masked: 2 rows that nobody labelled, blank in every label column",)


def test_mimic_rows_without_labels_are_masked_and_its_scoring_leaves_uncertain_out() -> None:
    for name, spec in TASKS.items():
        assert spec.unlabelled == ("mask" if name.startswith("mimic-") else "blank"), name
    for name in ("mimic-5", "mimic-14"):
        assert TASKS[name].eval_policy == TASKS["chexpert-5"].eval_policy
        assert TASKS[name].deviations


# --- merged labels, other splits, rows left out by id


MEANING = {"1": 1, "0": 0, "-1": None, None: None}


def test_a_merged_label_is_one_if_any_is_else_masked_if_any_is() -> None:
    cells = list(product(["1", "0", "-1", None], repeat=2))
    columns = {"a": [a for a, _ in cells], "b": [b for _, b in cells]}
    spec = TaskSpec(name="t", labels=("ab",), merge=(("ab", ("a", "b")),), kind="multilabel")
    found = read_targets(columns, spec)
    for row, (a, b) in enumerate(cells):
        meanings = [MEANING[a], MEANING[b]]
        truth = 1 if 1 in meanings else None if None in meanings else 0
        assert bool(found.mask[row, 0]) == (truth is not None), (a, b)
        assert int(found.y[row, 0]) == (truth or 0)


def test_merged_labels_of_a_task(labelled: FeatureSet) -> None:
    merge = (("ab", ("a", "b")),)
    spec = TaskSpec(name="t", labels=("ab", "c"), merge=merge, train_policy=Policy(uncertain="drop", blank="zero"))
    task = make_task(labelled, spec)
    assert task.labels == ("ab", "c")
    assert task.index("train").tolist() == [2, 3], "an uncertain part of a merged label drops the row"
    assert task.y_train[:, 0].tolist() == [1, 0, 1, 1, 0, 1, 1, 0]
    with pytest.raises(TaskError, match="merge makes 'zz', which is not among its labels"):
        make_task(labelled, dataclasses.replace(spec, labels=("a",), merge=(("zz", ("a", "b")),)))
    with pytest.raises(TaskError, match="only 0/1 labels can be merged, not those of a regression task"):
        make_task(labelled, dataclasses.replace(spec, kind="regression"))


def test_another_split_column(labelled: FeatureSet) -> None:
    task = make_task(labelled, TaskSpec(name="t", labels=("b",), split_column="fold"))
    assert task.role.tolist() == ["val", "train", "train", "test", "train", "val", "test", ""]
    assert task.notes == ("splits: column 'fold'",)
    with pytest.raises(TaskError, match="split column 'odd' must say train, val or test or be blank; found 3 other"):
        make_task(labelled, TaskSpec(name="t", labels=("b",), split_column="odd"))
    with pytest.raises(UnknownNameError, match="has no column 'nope'"):
        make_task(labelled, TaskSpec(name="t", labels=("b",), split_column="nope"))


def test_rows_left_out_by_id(labelled: FeatureSet) -> None:
    task = make_task(labelled, TaskSpec(name="t", labels=("b",), without=("001.png", "999.png")))
    assert task.role.tolist() == ["train", "", "train", "train", *PARTS[4:]]
    assert task.notes == ("left out by id: 1 of 2 samples that the task names",)


def test_kinds_and_classes_must_fit(labelled: FeatureSet) -> None:
    spec = TaskSpec(name="t", labels=("odd",), classes=("3", "1"))
    task = make_task(labelled, spec)
    assert (task.kind, task.labels) == ("multiclass", ("3", "1"))
    assert task.y.tolist()[:4] == [1, 0, 0, 1]
    assert task.mask.tolist()[:4] == [True, False, True, True], "other values are masked"
    assert make_task(labelled, TaskSpec(name="t", labels=("b",), kind="multiclass")).labels == ("-1", "0", "1")
    with pytest.raises(TaskError, match="a multiclass task has one label column, got 2"):
        make_task(labelled, TaskSpec(name="t", labels=("a", "b"), kind="multiclass"))
    with pytest.raises(TaskError, match="classes belong to one categorical column or to ordinal ones"):
        make_task(labelled, TaskSpec(name="t", labels=("b",), kind="multilabel", classes=("1",)))


# --- by name


def test_named_policies() -> None:
    assert set(SENSITIVITY) <= set(POLICIES)
    assert named_policy("mixed") is POLICIES["mixed"]
    assert policy_name(POLICIES["drop-row"]) == "drop-row"
    assert policy_name(Policy(uncertain="one")) == "own"
    with pytest.raises(UnknownNameError, match="unknown label policy 'zero'; known: ignore, zeros, ones, mixed"):
        named_policy("zero")


def test_policies_of_a_command_stand_in_the_digest(labelled: FeatureSet) -> None:
    spec = choose_task(labelled.manifest, labels=("a", "b"), reading=TaskConfig(train_policy="ones"))
    assert spec.train_policy == POLICIES["ones"]
    assert spec.eval_policy == Policy()
    names = [name for name in POLICIES if not POLICIES[name].normal]
    digests = {make_task(labelled, read_as(spec, TaskConfig(train_policy=name))).digest for name in names}
    # "majority" reads as "ignore" does: the same policy by two names.
    assert len(digests) == len(names) - 1
    with pytest.raises(UnknownNameError, match="data set 'x' has no column 'No Finding'"):
        make_task(labelled, read_as(spec, TaskConfig(train_policy="ignore-xrv")))
    with pytest.raises(UnknownNameError, match="unknown label policy 'u-ones'"):
        probes.task(labelled, labels=["a"], eval_policy="u-ones")


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="--policies and --test-dataset exclude each other"):
        TaskConfig(policies="all", test_dataset="nih")
    with pytest.raises(ConfigError, match="--policies and --train-policy exclude each other"):
        TaskConfig(policies="all", train_policy="ones")
    with pytest.raises(ConfigError, match="--test-task names the task of --test-dataset"):
        TaskConfig(test_task="nih-14")
    with pytest.raises(ConfigError, match="one task for all of --test-dataset or one for each; got 2 for 3"):
        TaskConfig(test_dataset="a,b,c", test_task="x,y")
    assert TaskConfig(test_dataset="a,b").tests == (("a", None), ("b", None))
    assert TaskConfig(test_dataset="a, b,", test_task="x").tests == (("a", "x"), ("b", "x"))
    assert TaskConfig(test_dataset="a,b", test_task="x,y").tests == (("a", "x"), ("b", "y"))
    assert TaskConfig(test_dataset="a,a", test_task="x,y").tests == (("a", "x"), ("a", "y"))
    assert TaskConfig(test_dataset="nih, chexpert,nih").test_datasets == ("nih", "chexpert")


def test_a_task_asked_of_a_data_set_without_its_columns(tmp_path: Path, store_path: Path) -> None:
    columns = {"part": PARTS, "Frontal/Lateral": ["Frontal"] * 8}
    columns |= dict.fromkeys(TASKS["chexpert-5"].labels, BITS)
    manifest = write_set(store_path, tmp_path / "x", columns, FEATURES)
    with pytest.raises(
        UnknownNameError,
        match=r"task 'nih-14' reads columns that data set 'x' lacks: Effusion, Infiltration, .*; tasks that fit it: "
        r"(.*, )?chexpert-5.*; or name its columns with --labels",
    ):
        probes.task(manifest, "nih-14")
    with pytest.raises(UnknownNameError, match=r"unknown task 'chexpert'; known: chexpert-5, .*nih-14"):
        probes.task(manifest, "chexpert")


def test_digests_of_tasks_from_before_hold() -> None:
    spec = TASKS["chexpert-5"].as_dict()
    assert {"name", "labels", "train_policy", "eval_policy", "where", "selection", "seed"} <= spec.keys()
    assert spec.keys().isdisjoint({"unit", "pool", "kind", "merge", "split_column"})
