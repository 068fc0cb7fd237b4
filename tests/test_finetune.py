"""`probes finetune` from a request to records: the frozen probes' task and statistics, choices, costs, weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetunes import evaluate, request
from pictures import register_pictures, tree_bytes
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tuning_runs import After, pictures, task_of
from typer.testing import CliRunner

from cli.main import _probe_app
from featstore.backbones import describe
from featstore.backbones.trainable import make_trainable
from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.errors import ConfigError, CorruptError, Stopped, TaskError
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.objects import parse_place
from featstore.register import register
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes import finetune_start, tuning_run
from probes.configs import EvalConfig, LinearConfig
from probes.evaluation import evaluate_sets
from probes.finetune import describe as describe_request
from probes.finetune import runs_folder
from probes.finetune_start import frozen_features, linear_start
from probes.finetune_tasks import refit_task
from probes.records import load_predictions
from probes.taskspec import TaskSpec
from probes.tuning_images import pool_scores, split_images
from probes.tuning_ranks import Team

RUN = RunConfig(device="cpu", workers=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with 64 pictures and their frozen features."""
    store = pictures(tmp_path_factory.mktemp("finetune"), 64)
    extract(
        make_plan(Store(store), "pics", SetConfig(model="tiny-random", res="42", compute_dtype="float32"), RUN), RUN
    )
    return store


@pytest.fixture(scope="module")
def frozen(home: Path) -> dict[str, Any]:
    config = EvalConfig(dataset="pics", labels="first,second", features="cls+mean_patch", resamples=20)
    return evaluate_sets(Store(home), "linear", config, LinearConfig())[0]


@pytest.fixture(scope="module")
def full(home: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two rates, two seeds."""
    folder = tmp_path_factory.mktemp("full")
    options = {"method": "full", "lr": "1e-5,3e-4", "seeds": 2, "epochs": 2}
    return evaluate(home, results=folder / "results", runs=folder / "runs", **options)


# The record


def test_task_and_set_are_those_of_the_frozen_probe(full: list[dict[str, Any]], frozen: dict[str, Any]) -> None:
    same = ("dataset", "set", "fingerprint", "weights", "random_weights", "preprocess", "compute_dtype", "manifest")
    for name in (*same, "task", "groups", "num_failed", "num_masked", "test_key", "features", "pretraining_overlap"):
        assert full[0][name] == frozen[name], name
    assert full[0]["random_weights"]
    assert full[0]["probe"] == "finetune"


def test_metrics_are_those_of_its_predictions(full: list[dict[str, Any]]) -> None:
    for record in full:
        table = load_predictions(record).to_pydict()
        for split in ("val", "test"):
            areas = []
            for label in ("first", "second"):
                rows = [
                    row
                    for row, (name, valid) in enumerate(zip(table["split"], table[f"mask:{label}"]))
                    if name == split and valid
                ]
                y, scores = ([table[f"{what}:{label}"][row] for row in rows] for what in ("label", "score"))
                areas.append(roc_auc_score(y, scores))
            assert record["metrics"][split]["macro"]["auroc"] == pytest.approx(np.mean(areas), abs=1e-12)
    bounds = full[0]["metrics"]["test"]["intervals"]["macro"]["auroc"]
    assert bounds["low"] <= full[0]["metrics"]["test"]["macro"]["auroc"] <= bounds["high"]


def test_choices_say_what_was_tried(full: list[dict[str, Any]]) -> None:
    first, second = (record["choices"] for record in full)
    assert set(first["tried"]) == {"lr=1e-05", "lr=0.0003"}
    best = min(first["tried"], key=lambda rate: first["tried"][rate]["val_loss"])
    assert first["said"].startswith(f"{best}, epoch {first['tried'][best]['epoch']}")
    assert set(second["tried"]) == {best}
    assert (first["lr"], second["lr"]) == (float(best.removeprefix("lr=")),) * 2
    assert first["at_edge"]
    assert first["budget"] == {
        "configurations": 2,
        "seeds": 2,
        "epochs": 2,
        "augmentation": "mirrored (auto), turned by up to 7 degrees",
        "selection": "validation loss",
    }
    assert "learning rates were chosen with seed 0 for all seeds" in full[1]["notes"]
    assert [record["config"]["head"]["train_seed"] for record in full] == [0, 1]
    assert full[0]["metrics"]["val"] != full[1]["metrics"]["val"]
    assert len(first["history"]["val_loss"]) == first["tried"][best]["epochs"]
    assert first["start"]["from"] == "linear"
    assert full[0]["deviations"][0].startswith("--lr 1e-5,3e-4; fair has 1e-5,3e-5,1e-4")


def test_costs(full: list[dict[str, Any]]) -> None:
    network = describe("tiny-random").architecture
    head = 2 * 2 * network.embed_dim * 1 + 2
    for record, runs in zip(full, (2, 1)):
        cost = record["cost"]
        # all but a mask token, which no token depends on
        assert cost["trainable_parameters"] == network.num_parameters() - network.embed_dim + head
        assert cost["runs"] == runs
        assert cost["gpu_seconds"] == 0
        assert cost["seconds"] > 0
        assert cost["images_per_second"] > 0
        assert cost["peak_memory_bytes"] > 10**7


def test_costs_of_a_frozen_probe_have_the_same_fields(full: list[dict[str, Any]], frozen: dict[str, Any]) -> None:
    own = {"seconds", "gpu_seconds", "peak_memory_bytes", "peak_gpu_memory_bytes", "trainable_parameters"}
    assert frozen["cost"].keys() == own | {"not_counted"}
    assert frozen["cost"]["not_counted"] == "extraction of the features"
    assert full[0]["cost"].keys() == own | {"images_per_second", "processes", "runs", "trained_with"}


def test_the_first_seed_pays_for_what_comes_before(home: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"runs": tmp_path / "runs", "results": tmp_path / "results", "seeds": 2}
    evaluate(home, **options)
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("start.npz"))
    path = folder / "cost.json"
    assert json.loads(path.read_bytes())["start.npz"]["seconds"] > 0
    for held, used in (({"seconds": 1000.0, "gpu_seconds": 8000.0}, 8000.0), (1000.0, 0.0)):  # and as it once was
        path.write_text(json.dumps({"start.npz": held}))
        first, second = evaluate(home, **options)  # goes on: the start is read, not fitted
        assert first["cost"]["seconds"] > 1000 > second["cost"]["seconds"]
        assert (first["cost"]["gpu_seconds"], second["cost"]["gpu_seconds"]) == (used, 0)


def test_the_test_split_is_scored_for_the_choice_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []

    def spy(task: Any, split: str, scores: Any) -> Any:
        scored.append(split)
        return pool_scores(task, split, scores)

    monkeypatch.setattr(tuning_run, "pool_scores", spy)
    options: dict[str, Any] = {"lr": "1e-3,1e-2,1e-1", "seeds": 2, "runs": tmp_path / "runs"}
    evaluate(home, results=tmp_path / "results", **options)
    assert scored.count("test") == 2  # of 3 rates with the first seed and one with the second


def test_no_cached_feature_is_read_or_written(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = next((home / "sets" / "pics").iterdir())
    before = tree_bytes(folder)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("cached features were asked for")

    for name in ("load", "array"):
        monkeypatch.setattr(FeatureSet, name, refuse)
    evaluate(home, results=tmp_path / "results", runs=tmp_path / "runs")
    assert tree_bytes(folder) == before
    assert [path.name for path in (home / "sets" / "pics").iterdir()] == [folder.name]


def test_each_record_counts_as_a_look_at_the_test_split(home: Path, tmp_path: Path) -> None:
    options = {"results": tmp_path / "results", "runs": tmp_path / "runs", "seeds": 2}
    assert [record["test_opened"] for record in evaluate(home, **options)] == [1, 2]
    assert [record["test_opened"] for record in evaluate(home, **options)] == [3, 4]


@pytest.mark.parametrize("method", ["lora", "bitfit", "last-k"])
def test_every_method_trains(method: str, home: Path, tmp_path: Path) -> None:
    (record,) = evaluate(home, method=method, lr="1e-3", results=tmp_path / "results", runs=tmp_path / "runs")
    assert record["choices"]["method"] == method
    about = json.loads((Path(record["choices"]["weights"]) / "about.json").read_text())
    assert about["options"]["method"] == method
    assert about["started_from"]["random"]


# The start of the head


@pytest.mark.parametrize(
    "spec",
    [
        TaskSpec(name="labels", labels=("first", "second")),
        TaskSpec(name="classes", labels=("kind",)),
        TaskSpec(name="two", labels=("first",), kind="multiclass"),
    ],
    ids=lambda spec: spec.name,
)
def test_the_head_starts_from_scikit_learns_probe(spec: TaskSpec, home: Path, tmp_path: Path) -> None:
    task = task_of(home, spec)
    trainable = make_trainable(describe("tiny-random").load(device="cpu", compute_dtype="float32"))
    start, facts = linear_start(task, trainable, "cls", Team(), batch=10, class_weight="none", folder=tmp_path)
    train, val = (split_images(task, split) for split in ("train", "val"))
    X, V = (frozen_features(trainable, split, "cls", Team(), batch=10, folder=tmp_path) for split in (train, val))
    assert start.mean is not None
    assert start.scale is not None
    mean, scale = X.mean(0), X.std(0)
    found = (V - start.mean) / start.scale @ start.weight.T + start.bias
    assert found.shape == (len(V), len(task.labels))
    for column in range(len(task.labels)):
        binary = task.kind == "multilabel"
        rows = train.mask[:, column] if binary else train.mask
        y = train.y[rows, column] if binary else train.y[rows]
        errors = []
        for C in facts["C"]:
            peer = LogisticRegression(C=C, max_iter=5000, tol=1e-8).fit(((X - mean) / scale)[rows], y)
            expected = peer.decision_function((V - mean) / scale)
            if binary:
                errors.append(np.abs(found[:, column] - expected).max())
            elif len(task.labels) == 2:
                errors.append(np.abs(found[:, 1] - found[:, 0] - expected).max())
            else:
                centred = found - found.mean(1, keepdims=True)
                errors.append(np.abs(centred - expected + expected.mean(1, keepdims=True)).max())
        assert min(errors) < 2e-3


def test_features_are_those_that_a_set_holds(home: Path, tmp_path: Path) -> None:
    task = task_of(home)
    trainable = make_trainable(describe("tiny-random").load(device="cpu", compute_dtype="float32"))
    split = split_images(task, "val")
    found = frozen_features(trainable, split, "cls+mean_patch", Team(), batch=7, folder=tmp_path)
    expected = Store(home).set("pics/tiny-random@42").load()[split.rows]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_an_untrained_head_scores_as_the_probe(home: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"flip": "off", "degrees": 0.0, "lr": "1e-12", "weight_decay": 0.0}
    (record,) = evaluate(home, results=tmp_path / "results", runs=tmp_path / "runs", **options)
    assert record["metrics"]["val"]["macro"]["auroc"] == record["choices"]["start"]["val_auroc"]


def test_a_damaged_start_is_told(home: Path, tmp_path: Path) -> None:
    options = {"results": tmp_path / "results", "runs": tmp_path / "runs"}
    evaluate(home, **options)
    (path,) = (tmp_path / "runs").rglob("start.npz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptError, match=r"start.npz is damaged; remove it, and the head's start is fitted again"):
        evaluate(home, **options)


# Going on


def test_the_same_request_goes_on(home: Path, full: list[dict[str, Any]], tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "full", "lr": "1e-5,3e-4", "seeds": 2, "epochs": 2}
    options |= {"results": tmp_path / "results", "runs": tmp_path / "runs"}
    stops = 0
    for looks in (2, 9, 12):
        try:
            evaluate(home, stop=After(looks), **options)
        except Stopped:
            stops += 1
    assert stops == 3
    assert not (tmp_path / "results").exists()
    records = evaluate(home, **options)
    for found, expected in zip(records, full, strict=True):
        assert found["choices"]["tried"] == expected["choices"]["tried"]
        assert load_predictions(found).equals(load_predictions(expected))
    assert any("from a checkpoint" in note for record in records for note in record["notes"])


def test_more_seeds_keep_the_runs_that_are_there(home: Path, tmp_path: Path) -> None:
    options = {"results": tmp_path / "results", "runs": tmp_path / "runs"}
    (first,) = evaluate(home, **options)
    states = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("checkpoints/*")}
    again, _ = evaluate(home, seeds=2, **options)
    assert load_predictions(again).equals(load_predictions(first))
    assert all(path.read_bytes() == held for path, held in states.items())


# Train and val


def test_refit_trains_on_both_and_shows_the_run_before(home: Path, tmp_path: Path) -> None:
    task = task_of(home)
    both = refit_task(task)
    assert both.digest != task.digest
    assert both.index("train").tolist() == sorted([*task.index("train"), *task.index("val")])
    assert both.index("val").tolist() == task.index("val").tolist()
    options = {"lr": "1e-2", "epochs": 2}
    (plain,) = evaluate(home, results=tmp_path / "a", runs=tmp_path / "runs", **options)
    (refit,) = evaluate(home, results=tmp_path / "a", runs=tmp_path / "runs", refit=True, **options)
    assert refit["metrics"]["val"] == plain["metrics"]["val"]
    assert refit["metrics"]["test"]["macro"] != plain["metrics"]["test"]["macro"] or not load_predictions(refit).equals(
        load_predictions(plain)
    )
    assert any(note.startswith("trained again on train and val") for note in refit["notes"])
    assert "refit-lr0.01" in refit["choices"]["weights"]
    assert refit["cost"]["runs"] == 2


# Weights


def test_a_trained_network_is_a_backbone(home: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": "tiny", "method": "full", "lr": "1e-3", "features": "cls"}
    (record,) = evaluate(home, results=tmp_path / "results", runs=tmp_path / "runs", **options)
    weights = Path(record["choices"]["weights"])
    config = SetConfig(model="tiny", res="42", weights=weights, name="tiny-full", compute_dtype="float32")
    plan = make_plan(Store(home), "pics", config, RUN)
    assert plan.spec["fingerprint"] != record["fingerprint"]
    extract(plan, RUN)
    found = Store(home).set("pics/tiny-full@42").load("cls").astype(np.float32)
    with torch.no_grad():
        from safetensors.torch import load_file

        head = load_file(weights / "head.safetensors")
        logits = torch.from_numpy(found) @ head["head.weight"].T + head["head.bias"]
    table = load_predictions(record).to_pydict()
    ids = {str(name): row for row, name in enumerate(Store(home).manifest("pics").column("id"))}
    for row, name in enumerate(table["id"]):
        for column, label in enumerate(("first", "second")):
            expected = table[f"score:{label}"][row]
            assert float(torch.sigmoid(logits[ids[name], column])) == pytest.approx(expected, abs=5e-3)


def test_the_printed_line_makes_that_set(home: Path, tmp_path: Path) -> None:
    from probes.finetune_table import extract_line

    (record,) = evaluate(home, model="tiny", results=tmp_path / "results", runs=tmp_path / "runs", published="xrv")
    line = extract_line(record)
    weights = record["choices"]["weights"]
    assert line == (f"featstore extract --dataset pics --model tiny --res 42 --weights {weights} --published xrv")


# Other tasks


def test_bfloat16_comes_after_a_check(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"compute_dtype": "bfloat16", "results": tmp_path / "results"}
    (record,) = evaluate(home, runs=tmp_path / "runs", **options)
    parity = record["choices"]["parity"]
    assert 0 < parity["loss_gap"] <= finetune_start.LOSS_GAP
    assert record["compute_dtype"] == "bfloat16"
    assert not list((tmp_path / "runs").rglob("parity/*/*"))
    evaluate(home, runs=tmp_path / "runs", **options)  # the check is kept
    monkeypatch.setattr(finetune_start, "LOSS_GAP", 0.0)
    with pytest.raises(ConfigError, match=r"bfloat16 departs from float32 within 3 steps: the loss by .* leave it out"):
        evaluate(home, runs=tmp_path / "others", **options)


# What cannot be


def test_numbers_are_refused_before_images_are_read(home: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"is regression, and `probes finetune` trains heads of labels and classes"):
        evaluate(home, labels="first", kind="regression", runs=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": "zeros,ones"}, "--policies compares training policies of frozen probes"),
        ({"train_resamples": 5}, "--train-resamples fits heads again"),
        ({"features": "cls,mean_patch"}, "--features names what one head reads"),
        ({"model": "tiny@42"}, "--model names one backbone, and --res its size"),
        ({"res": "42,98"}, "--res is one size"),
        ({"task": "x"}, "--task and --labels exclude each other"),
        ({"resamples": 1}, "--resamples must be at least 2, got 1"),
        ({"micro": 0}, "--micro must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request(**options)


def test_a_bucket_needs_a_folder_for_runs() -> None:
    bucket = parse_place("s3://bucket/store")
    with pytest.raises(ConfigError, match=r"checkpoints need a folder on a file system, .*; give --runs FOLDER"):
        runs_folder(bucket, request())
    assert runs_folder(bucket, request(runs=Path("x"))) == Path("x")


def test_a_network_without_a_class_token_has_no_token_mean(home: Path) -> None:
    about = describe_request(
        Store(home), request(model="mobilenetv2", random_weights=0, res="32", preset="chest", method=None)
    )
    assert about.facts["features"] == "cls"
    with pytest.raises(ConfigError, match="mean_all is the mean over CLS"):
        describe_request(Store(home), request(model="mobilenetv2", random_weights=0, res="32", features="mean_all"))


# The command


def command(*arguments: str, store: Path) -> Any:
    given = ["finetune", "--dataset", "pics", "--model", "tiny-random", "--res", "42", "--labels", "first,second"]
    runner = CliRunner(env={"FEATSTORE_HOME": str(store), "COLUMNS": "200"})
    return runner.invoke(_probe_app(), [*given, "--device", "cpu", *arguments], catch_exceptions=False)


def test_dry_run_says_what_would_be_trained(home: Path) -> None:
    before = sorted(home.rglob("*"))
    done = command("--method", "full", "--dry-run", store=home)
    assert done.exit_code == 0, done.output
    for part in (
        "pics/tiny-random@42 (RANDOM WEIGHTS, ",
        "full (fair), head on cls+mean_patch, started from the linear probe of the frozen features; adamw, batch 32",
        "5 runs: lr=1e-05; lr=3e-05; lr=0.0001 with seed 0, then the best with 2 more seeds",
    ):
        assert part in done.output
    facts = json.loads(command("--method", "full", "--dry-run", "--json", store=home).output)
    assert sorted(home.rglob("*")) == before
    assert facts["runs"] == 5
    assert facts["random_weights"]


def test_the_command_prints_arms_and_what_comes_next(home: Path, frozen: dict[str, Any], tmp_path: Path) -> None:
    runs = ["--runs", str(tmp_path / "runs"), "--lr", "1e-3", "--epochs", "1", "--resamples", "20", "--seeds", "2"]
    done = command("--method", "linear-online", *runs, store=home)
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    for part in (
        "finetune linear-online (fair)",
        "RANDOM WEIGHTS",
        "not as fair has it: --lr 1e-3; fair has 1e-4,1e-3,1e-2",
        "time and memory of a frozen probe are those of its head",
        "test AUROC of 2 seeds: mean",
        "compare it: probes compare FROZEN",
        "features of seed 1: featstore extract --dataset pics",
        "epoch 1/1: train loss",
    ):
        assert part in text, part
    said = next(line for line in done.output.splitlines() if "test AUROC of 2 seeds: mean" in line).strip()
    runner = CliRunner(env={"FEATSTORE_HOME": str(home), "COLUMNS": "200"})
    kept = runner.invoke(_probe_app(), ["results", "--dataset", "pics"], catch_exceptions=False).output
    assert said in kept  # from the records alone
    assert "extraction is paid once for all heads and is not in them" in kept
    found = json.loads(command("--method", "linear-online", *runs, "--json", store=home).stdout)
    assert [record["probe"] for record in found] == ["finetune", "finetune"]


def test_help_teaches() -> None:
    runner = CliRunner(env={"COLUMNS": "200"})
    text = " ".join(runner.invoke(_probe_app(), ["finetune", "--help"]).output.split())
    for part in (
        "--method linear-online",
        "LP-FT",
        "--label-noise 0.2",
        "--test-dataset nih,chexpert",
        "torchrun",
        "goes on",
    ):
        assert part in text


def test_a_registered_picture_that_fails_is_left_out(tmp_path: Path) -> None:
    manifest = register_pictures(tmp_path / "store", tmp_path / "data", 64)
    path = tmp_path / "data" / str(manifest.column("path")[0])
    path.write_bytes(b"\x89PNG" + bytes(path.stat().st_size - 4))
    register_pictures_again = register(tmp_path / "store", "pics", tmp_path / "data", RegisterConfig(
        table=Path("table.csv"), group_column="patient", split_column="split", label_columns="kind"
    ))  # fmt: skip
    assert len(register_pictures_again[0]) == 64
    (record,) = evaluate(tmp_path / "store", start="random")
    assert record["num_failed"] == 1
