"""Sets of a fine-tuned network: their names, what they say of its training, and rows that it has seen."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetunes import evaluate
from pictures import write_pictures, write_table
from tuning_runs import pictures

from featstore.backbones import describe
from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.errors import LeakError, WeightsError
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.pretraining import overlap_of_set
from featstore.register import register
from featstore.store.catalog import Store
from featstore.store.hashes import file_hashes
from probes.configs import EvalConfig, LinearConfig, SplitConfig, TaskConfig
from probes.evaluation import evaluate_sets
from probes.known import TASKS
from probes.policies import MIXED
from probes.report import notes_of
from probes.tasks import make_task, roles_of
from probes.taskspec import Fold, Noise, TaskSpec

RUN = RunConfig(device="cpu", workers=1)
TABLE = {"table": Path("table.csv"), "group_column": "patient", "label_columns": "first,second"}


def with_copies(path: Path) -> Path:
    """A store with 64 pictures as `pics`, and the same files as `copies`."""
    store = pictures(path, 64)
    names = [place.name for place in sorted((path / "pics" / "images").iterdir())]
    shutil.copytree(path / "pics" / "images", path / "copies" / "scans")
    write_table(path / "copies", [f"scans/{name}" for name in names])
    register(store, "copies", path / "copies", RegisterConfig(split_column="split", **TABLE))
    return store


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pictures as `pics`; the same files as `copies` under another name; `others`, which share nothing."""
    path = tmp_path_factory.mktemp("learned")
    store = with_copies(path)
    write_table(path / "others", write_pictures(path / "others", 40, start=500))
    register(store, "others", path / "others", RegisterConfig(split_column="split", **TABLE))
    return store


@pytest.fixture(scope="module")
def tuned(home: Path) -> dict[str, Any]:
    """A network whose last two blocks were trained."""
    return evaluate(home, model="tiny", method="last-k", lr="1e-3", start="random")[0]


def set_of(home: Path, record: dict[str, Any], dataset: str = "pics", **options: Any) -> Any:
    """The set of a data set by a run's network; its rows are extracted."""
    weights = Path(record["choices"]["weights"])
    config = SetConfig(model="tiny", res="42", weights=weights, compute_dtype="float32", **options)
    plan = make_plan(Store(home), dataset, config, RUN)
    extract(plan, RUN)
    return Store(home).set(f"{dataset}/{plan.spec['model']}@42")


def linear(home: Path, found: Any, **options: Any) -> dict[str, Any]:
    reading = {name: options.pop(name) for name in ("test_dataset",) if name in options}
    splits = {name: options.pop(name) for name in ("folds", "fold_val") if name in options}
    config = EvalConfig(
        dataset=found.manifest.name,
        model=found.name.partition("/")[2],
        labels="first,second",
        features="cls",
        resamples=2,
        **options,
    )
    head = LinearConfig(C="1")
    return evaluate_sets(
        Store(home), "linear", config, head, reading=TaskConfig(**reading), splits=SplitConfig(**splits)
    )[0]


# Names and facts


def test_its_sets_are_called_after_the_run(home: Path, tuned: dict[str, Any]) -> None:
    found = set_of(home, tuned)
    digest = describe("tiny", weights=Path(tuned["choices"]["weights"])).weights["digest"]
    assert found.name == f"pics/tiny-last-k-seed0-{digest[:6]}@42"
    frozen = make_plan(Store(home), "pics", SetConfig(model="tiny", res="42", compute_dtype="float32"), RUN)
    assert frozen.name == "pics/tiny@42"
    assert frozen.spec["fingerprint"] != found.fingerprint
    folder = describe(f"hf:{tuned['choices']['weights']}")  # whose last folder is called lr0.001
    assert folder.name == f"tiny-last-k-seed0-{digest[:6]}"
    assert set_of(home, tuned, name="mine").name == "pics/mine@42"
    (run,) = found.spec["weights"]["trained_on"]
    assert {name: run[name] for name in ("method", "seed", "changed", "refit", "dataset", "adapter")} == {
        "method": "last-k", "seed": 0, "changed": True, "refit": False, "dataset": "pics", "adapter": "table",
    }  # fmt: skip
    assert run["manifest"] == Store(home).manifest("pics").digest
    assert run["fingerprint"] == tuned["fingerprint"]
    assert run["task"]["digest"] == tuned["task"]["digest"]
    assert not run["started_from"]["random"]
    assert found.spec["weights"]["pretraining"] == frozen.spec["weights"]["pretraining"]


def test_random_weights_that_were_trained_say_where_they_began(home: Path, tmp_path: Path) -> None:
    options = {"runs": tmp_path / "runs", "results": tmp_path / "results", "start": "random"}
    (record,) = evaluate(home, method="bitfit", lr="1e-3", **options)
    source = describe("tiny", weights=Path(record["choices"]["weights"]))
    assert source.name.startswith("tiny-bitfit-seed0-from-random-weights-")
    assert not source.random
    assert source.weights["trained_on"][0]["started_from"] == {"random": True, "pretraining": None}
    again = evaluate(home, model="tiny", weights=Path(record["choices"]["weights"]), method="bitfit", **options)
    twice = describe("tiny", weights=Path(again[0]["choices"]["weights"]))
    assert [run["method"] for run in twice.weights["trained_on"]] == ["bitfit", "bitfit"]
    assert twice.name.startswith(f"{source.name}-bitfit-seed0-")
    assert any("; then fine-tuned (bitfit" in note for note in linear(home, set_of(home, again[0]))["task"]["notes"])


def test_facts_must_be_about_these_weights(tuned: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(tuned["choices"]["weights"], tmp_path / "copied")
    about = json.loads((folder / "about.json").read_bytes())
    (folder / "about.json").write_text(json.dumps({**about, "digest": "0" * 64}))
    with pytest.raises(
        WeightsError, match=r"about.json is about weights with the SHA-256 000000000000, and model.safe"
    ):
        describe("tiny", weights=folder)
    (folder / "about.json").write_text("{")
    with pytest.raises(WeightsError, match=r"about.json is damaged .*; run `probes finetune` again, which writes it"):
        describe("tiny", weights=folder)
    (folder / "about.json").write_text('{"somebody": "else"}')
    assert "trained_on" not in describe("tiny", weights=folder).weights
    alone = shutil.copy(folder / "model.safetensors", tmp_path)  # without its facts it is a file of unknown training
    assert "trained_on" not in describe("tiny", weights=Path(alone)).weights


# What records say


def test_a_record_says_what_the_network_has_learned(home: Path, tuned: dict[str, Any]) -> None:
    record = linear(home, set_of(home, tuned))
    assert record["pretraining_overlap"] == "yes"
    assert record["weights"]["trained_on"][0]["dataset"] == "pics"
    said = "network: fine-tuned (last-k, seed 0) on the train rows of pics, task labels:first+second"
    assert said in notes_of([record])
    assert not any("leak" in note for note in record["task"]["notes"])
    assert not any(note.startswith("val: the network") for note in record["task"]["notes"])


def test_a_network_that_did_not_change_has_learned_nothing(home: Path, tmp_path: Path) -> None:
    (record,) = evaluate(home, model="tiny", runs=tmp_path / "runs", results=tmp_path / "results", start="random")
    assert record["choices"]["method"] == "linear-online"
    found = set_of(home, record)
    assert found.name.startswith("pics/tiny-linear-online-seed0-")
    assert not any(note.startswith("network: ") for note in linear(home, found)["task"]["notes"])


def test_validation_rows_that_trained_it_are_told(home: Path, tmp_path: Path) -> None:
    options = {"runs": tmp_path / "runs", "results": tmp_path / "results", "start": "random", "refit": True}
    (record,) = evaluate(home, model="tiny", method="bitfit", lr="1e-3", **options)
    task = make_task(set_of(home, record), TaskSpec(name="x", labels=("first", "second")))
    count = len(set(task.groups[task.role == "val"]))
    assert any("on the train and val rows of pics" in note for note in task.notes)
    assert any(
        note.startswith("val: the network was trained on ") and f"{count} groups (patients)" in note
        for note in task.notes
    )


# Rows that it has seen


def test_test_rows_that_it_has_seen_are_refused(home: Path, tuned: dict[str, Any]) -> None:
    found = set_of(home, tuned)
    with pytest.raises(LeakError, match=r"the network of pics/tiny-last-k.* has seen test rows: .* share .* or pass"):
        linear(home, found, folds=4)
    record = linear(home, found, folds=4, allow_leak=True)
    (note,) = [note for note in record["task"]["notes"] if note.startswith("leak allowed: ")]
    manifest = found.manifest
    used = roles_of(manifest, TaskSpec(name="labels:first+second", labels=("first", "second")))
    spec = TaskSpec.from_dict(record["task"]["spec"])
    tested = roles_of(manifest, spec) == "test"
    both = set(manifest.column("id")) & {
        name for name, role, test in zip(manifest.column("id"), used, tested) if test and role in ("train", "val")
    }
    assert f" share {len(both)} images (by id), such as {min(str(name) for name in both)!r}" in note
    assert "groups (patients), such as 'p" in note


def test_rows_of_another_data_set_are_found_by_their_bytes(tmp_path: Path) -> None:
    """Nothing of the training data is extracted: their hashes are those of the look through it before training."""
    home = with_copies(tmp_path)
    record = evaluate(home, model="tiny", method="last-k", lr="1e-3", start="random")[0]
    found = set_of(home, record, "copies")
    assert Store(home).sets() == [found.name]
    plain = linear(home, found)  # its test rows are not those that trained
    assert plain["pretraining_overlap"] == "unknown"
    assert not any("known hash" in note for note in plain["task"]["notes"])
    with pytest.raises(
        LeakError, match=r"training fine-tuned .* and testing on copies share 1\d byte-identical images"
    ):
        linear(home, found, folds=4)
    spec = TaskSpec(name="x", labels=("first", "second"), fold=Fold(number=0, of=4))
    assert any("leak allowed: " in note for note in make_task(found, spec, allow_leak=True).notes)
    assert file_hashes(Store(home), Store(home).manifest("pics")) == file_hashes(Store(home), found.manifest)
    for piece in (home / "finetune/pics/surveys").rglob("*.json"):
        piece.write_bytes(piece.read_bytes()[:-9])  # as by a broken disk: what it says is unknown
    assert set(file_hashes(Store(home), Store(home).manifest("pics"))) == {None}


def test_what_cannot_be_sought_by_its_bytes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = with_copies(tmp_path)
    monkeypatch.chdir(tmp_path)
    record = evaluate(home, model="tiny", method="last-k", lr="1e-3", start="random", runs=Path("runs"))[0]
    assert Path(record["choices"]["weights"]).is_relative_to(tmp_path / "runs")
    spec = TaskSpec(name="x", labels=("first", "second"), fold=Fold(number=0, of=4))
    shutil.rmtree(home / "finetune")  # the look through them is kept in the store, wherever runs lie
    found = set_of(home, record, "copies")
    task = make_task(found, spec)
    tested, seen = len(task.index("test")), sum(record["task"]["splits"][split] for split in ("train", "val"))
    assert (
        "network: rows of pics that trained it were sought by their bytes among the "
        f"{tested} of {tested + seen} images whose file has a known hash; it may have seen others of copies "
        "(an extracted set of pics in this store makes its hashes known)"
    ) in task.notes
    set_of(home, record, "pics")
    with pytest.raises(LeakError, match="byte-identical"):
        make_task(found, spec)


def test_files_of_others_are_not_taken_for_seen(home: Path, tuned: dict[str, Any]) -> None:
    spec = TaskSpec(name="x", labels=("first", "second"), fold=Fold(number=0, of=4))
    clean = make_task(set_of(home, tuned, "others"), spec).notes
    assert not any("leak" in note or "known hash" in note for note in clean)


def test_tests_on_another_data_set_are_checked(home: Path, tuned: dict[str, Any], tmp_path: Path) -> None:
    set_of(home, tuned)
    set_of(home, tuned, "others")
    record = linear(home, set_of(home, tuned), test_dataset="others")
    assert [note for note in record["task"]["notes"] if "network: " in note] == [
        "network: fine-tuned (last-k, seed 0) on the train rows of pics, task labels:first+second"
    ]
    assert record["pretraining_overlap"] == "yes"
    # The other way round: a head of other rows, tested on rows that trained the network.
    options = {"runs": tmp_path / "runs", "results": tmp_path / "results", "start": "random", "lr": "1e-3"}
    with open(home.parent / "pics" / "table.csv") as file:
        lines = file.read().splitlines()
    swapped = {"train": "test", "test": "train", "val": "val"}
    rows = [line.split(",") for line in lines[1:]]
    root = home.parent / "swapped"
    shutil.copytree(home.parent / "pics" / "images", root / "images")
    (root / "table.csv").write_text(
        "\n".join([lines[0], *(",".join([*row[:2], swapped[row[2]], *row[3:]]) for row in rows)]) + "\n"
    )
    register(home, "swapped", root, RegisterConfig(split_column="split", **TABLE))
    (other,) = evaluate(home, dataset="others", model="tiny", method="bitfit", **options)
    set_of(home, tuned, "swapped")
    with pytest.raises(LeakError, match=r"has seen test rows: .* testing on swapped share"):
        linear(home, set_of(home, tuned, "others"), test_dataset="swapped")
    set_of(home, other, "swapped")
    fine = linear(home, set_of(home, other, "others"), test_dataset="swapped")
    assert not any("leak" in note for note in fine["task"]["notes"])


def test_fine_tuning_it_further_is_checked_too(home: Path, tuned: dict[str, Any], tmp_path: Path) -> None:
    options = {"runs": tmp_path / "runs", "results": tmp_path / "results", "start": "random"}
    weights = Path(tuned["choices"]["weights"])
    with pytest.raises(LeakError, match="has seen test rows"):
        evaluate(home, model="tiny", weights=weights, folds=4, **options)


def test_a_run_that_the_store_does_not_know_is_told(tuned: dict[str, Any], tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_table(tmp_path / "data", write_pictures(tmp_path / "data", 40, start=900))
    register(store, "elsewhere", tmp_path / "data", RegisterConfig(split_column="split", **TABLE))
    task = make_task(set_of(store, tuned, "elsewhere"), TaskSpec(name="x", labels=("first", "second")))
    assert any(note.startswith("network: which rows of pics trained it cannot be told here") for note in task.notes)


# Overlap


def run_on(adapter: str, dataset: str = "d", *, random: bool = False, changed: bool = True) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "adapter": adapter,
        "changed": changed,
        "started_from": {"random": random, "pretraining": ["ImageNet-1k"]},
    }


@pytest.mark.parametrize(
    ("run", "family", "answer"),
    [
        (run_on("nih"), "nih", "yes"),
        (run_on("nih"), "rsna", "yes"),
        (run_on("rsna"), "nih", "yes"),
        (run_on("nih"), "chexpert", "no"),
        (run_on("table"), "chexpert", "unknown"),
        (run_on("nih"), "table", "unknown"),
        (run_on("phantom"), "phantom", "yes"),
        (run_on("nih", changed=False), "nih", "no"),
        (run_on("chexpert", random=True), "nih", "no"),
    ],
)
def test_what_it_was_tuned_on_counts_as_training(run: dict[str, Any], family: str, answer: str) -> None:
    weights = {"pretraining": ["ImageNet-1k"], "trained_on": [run]}
    assert overlap_of_set(weights, [family], random=False) == answer
    assert overlap_of_set(weights, [family], random=False, datasets=["d"]) == ("yes" if run["changed"] else answer)
    assert overlap_of_set({"pretraining": None, "trained_on": [run_on("nih")]}, ["chexpert"], random=False) == "unknown"


# Tasks out of JSON


@pytest.mark.parametrize("name", TASKS)
def test_a_task_comes_back_from_json(name: str) -> None:
    assert TaskSpec.from_dict(json.loads(json.dumps(TASKS[name].as_dict()))) == TASKS[name]


def test_a_task_with_everything_comes_back_from_json() -> None:
    spec = TaskSpec(
        name="x",
        labels=("a", "b"),
        train_policy=MIXED,
        where=(("view", ("AP", "PA")),),
        merge=(("b", ("c", "d")),),
        fold=Fold(number=1, of=5, val=0.1),
        noise=Noise(ratio=0.2),
    )
    assert TaskSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


def test_roles_are_those_of_the_task(home: Path, tuned: dict[str, Any]) -> None:
    found = set_of(home, tuned)
    spec = TaskSpec(name="x", labels=("first", "second"))
    np.testing.assert_array_equal(roles_of(found.manifest, spec), make_task(found, spec).role)
