"""What a request of `probes finetune` means beyond one run: test data sets, folds, rates, refits, units."""

import json
import os
import shlex
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetunes import evaluate, request
from pictures import write_pictures, write_table
from tuning_runs import pictures, task_of
from typer.testing import CliRunner

import featstore.backbones
from cli.main import _probe_app, _store_app
from featstore.configs import RegisterConfig
from featstore.errors import Stopped
from featstore.register import register
from featstore.store.catalog import Store
from probes.finetune import describe
from probes.finetune_table import extract_line
from probes.records import load_predictions
from probes.taskspec import TaskSpec
from probes.tuning_images import split_images
from probes.tuning_loop import Run
from probes.tuning_ranks import Team


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with 64 pictures, and two more data sets of the same labels."""
    folder = tmp_path_factory.mktemp("protocols")
    store = pictures(folder, 64)
    table = RegisterConfig(
        table=Path("table.csv"), group_column="patient", split_column="split", label_columns="first,second"
    )
    for number, name in enumerate(("other", "third"), start=1):
        root = folder / name
        write_table(root, write_pictures(root, 40, start=500 * number))
        register(store, name, root, table)
    return store


def folders(tmp_path: Path) -> dict[str, Any]:
    return {"results": tmp_path / "results", "runs": tmp_path / "runs"}


def test_one_training_serves_every_test_data_set(home: Path, tmp_path: Path) -> None:
    plain = evaluate(home, **folders(tmp_path))
    records = [*plain, *evaluate(home, test_dataset="other,third", **folders(tmp_path))]
    assert [record.get("test", {}).get("dataset") for record in records] == [None, "other", "third"]
    assert records[1]["task"]["splits"]["test"] == 10
    assert len({record["choices"]["weights"] for record in records}) == 1
    assert len(list((tmp_path / "runs").rglob("state.json"))) == 1
    assert records[0]["choices"]["history"] == records[2]["choices"]["history"]
    assert not any("went on" in note for record in records for note in record["notes"])
    again = evaluate(home, refit=True, test_dataset="other", **folders(tmp_path))
    assert again[0]["choices"]["weights"] == evaluate(home, refit=True, **folders(tmp_path))[0]["choices"]["weights"]


def test_folds(home: Path, tmp_path: Path) -> None:
    options = {"start": "random", "refit": True, "label_noise": 0.2}
    records = evaluate(home, folds=3, **options, **folders(tmp_path))
    assert [record.get("fold", {}).get("number") for record in records] == [1, 2, 3, None]
    assert records[3]["task"]["splits"]["test"] == 64
    shared = [note for note in records[0]["notes"] if all(note in fold["notes"] for fold in records[1:3])]
    assert any(note.startswith("trained again on train and val with the rate") for note in shared)
    assert records[3]["notes"][2:] == shared


def test_folds_are_printed_and_shown_again(home: Path, tmp_path: Path) -> None:
    runner = CliRunner(env={"COLUMNS": "200"})
    given = ["--dataset", "pics", "--model", "tiny-random", "--res", "42", "--labels", "first,second", "--lr", "1e-3"]
    given += ["--method", "linear-online", "--epochs", "1", "--seeds", "1", "--folds", "3", "--resamples", "20"]
    given += [
        "--store",
        str(home),
        "--device",
        "cpu",
        "--results",
        str(tmp_path / "results"),
        "--runs",
        str(tmp_path / "runs"),
    ]
    done = runner.invoke(_probe_app(), ["finetune", *given], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "in each of 3 folds" in done.output
    lines = [line for line in done.output.splitlines() if "features of seed 0, fold 2: featstore extract" in line]
    assert "--dataset pics --model tiny --res 42 --weights " in lines[0]
    assert lines[0].endswith(f" --store {shlex.quote(str(home))}")
    options = ["results", "--dataset", "pics", "--store", str(home), "--results", str(tmp_path / "results")]
    kept = runner.invoke(_probe_app(), options, catch_exceptions=False)
    assert kept.exit_code == 0, kept.output
    assert "in each of 3 folds" in kept.output


def test_where_the_last_epoch_is_kept_validation_still_chooses_the_rate(home: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep": "last", "lr": "1e-6,1e-2", "start": "random", "epochs": 3, "patience": 0}
    (record,) = evaluate(home, **options, **folders(tmp_path))
    losses = {name: tried["val_loss"] for name, tried in record["choices"]["tried"].items()}
    assert losses["lr=0.01"] < losses["lr=1e-06"]
    assert record["choices"]["lr"] == 0.01
    assert record["choices"]["epoch"] == 3
    assert record["choices"]["budget"]["selection"] == "validation loss of the last epoch"


def test_a_refit_ends_where_validation_ended(home: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"refit": True, "lr": "0.3", "epochs": 6, "patience": 1, "label_noise": 0.4}
    (record,) = evaluate(home, **options, **folders(tmp_path))
    chosen = record["choices"]["epoch"]
    assert chosen < 6
    assert record["choices"]["refit_epochs"] == chosen
    assert f"on train and val it was trained for {chosen} epochs" in record["notes"]


def test_a_published_refit_has_all_epochs(home: Path, tmp_path: Path) -> None:
    options = {"preset": "radiology", "published": "none", "head_lr": "0.01", "epochs": 2, "res": "42", "batch": 12}
    (record,) = evaluate(home, method="full", lr="1e-5", **options, **folders(tmp_path))
    assert record["choices"]["refit_epochs"] == 2


def test_cached_activations(home: Path, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"method": "last-k", "k": 2, "flip": "off", "degrees": 0.0}
    (first,) = evaluate(home, results=tmp_path / "a", runs=tmp_path / "one", **plain)
    (second,) = evaluate(home, results=tmp_path / "a", runs=tmp_path / "two", from_cache=True, **plain)
    assert list((tmp_path / "two").rglob("activations/*/*.bin"))
    for name in ("score:first", "score:second"):
        one, two = (load_predictions(record)[name].to_numpy() for record in (first, second))
        np.testing.assert_allclose(one, two, atol=1e-4)


def test_the_same_with_kept_activations_is_another_run(home: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "last-k", "k": 1, "flip": "off", "degrees": 0.0}
    records = [evaluate(home, from_cache=cached, **options, **folders(tmp_path))[0] for cached in (False, True)]
    scores = [record["metrics"]["test"]["macro"]["auroc"] for record in records]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert records[0]["choices"]["weights"] != records[1]["choices"]["weights"]


@pytest.mark.parametrize("pool", ["mean", "features"])
def test_training_labels_are_those_of_the_frozen_probe(pool: str, home: Path) -> None:
    spec = TaskSpec(name="units", labels=("first", "second"), unit="patient", pool=pool)  # type: ignore[arg-type]
    task = task_of(home, spec)
    split, samples = split_images(task, "train"), task.samples("train", "train")
    expected = samples.y[task.units("train").number] if pool == "features" else samples.y
    np.testing.assert_array_equal(split.y, expected)


@pytest.mark.parametrize(
    ("model", "res", "features"),
    [("vit-large", "32", "cls"), ("tiny", "42", "mean_all"), ("dinov3-small", "32", "mean_all")],
)
def test_chest_reads_what_the_paper_reads_of_each_network(model: str, res: str, features: str, home: Path) -> None:
    asked = request(model=model, random_weights=0, res=res, preset="chest", method=None, published="none")
    about = describe(Store(home), asked)
    assert about.facts["features"] == features
    assert not any("--features" in text for text in about.facts["deviations"])


def test_the_printed_line_makes_features_whatever_names_the_network(home: Path, tmp_path: Path) -> None:
    start = extract_line(evaluate(home, method="full", **folders(tmp_path))[0])
    first = run_line(start, home)
    assert first["weights"]["trained_on"][0]["method"] == "full"
    assert Path(shlex.split(start)[shlex.split(start).index("--weights") + 1]).is_absolute()
    again = {"model": f"hf:{shlex.split(start)[shlex.split(start).index('--weights') + 1]}", "allow_leak": True}
    line = extract_line(evaluate(home, method="bitfit", **again, **folders(tmp_path))[0])
    assert " --model hf:" in line
    assert [run["method"] for run in run_line(line, home)["weights"]["trained_on"]] == ["full", "bitfit"]


def test_pixels_as_the_checkpoint_has_them_stay_so(home: Path, tmp_path: Path) -> None:
    tiny = Path(featstore.backbones.__file__).parent / "tiny_weights"
    base = shutil.copytree(tiny, tmp_path / "base")
    processor = json.loads((base / "preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 56, "width": 56}}
    processor |= {"resample": 2, "image_mean": [0.4, 0.5, 0.6]}
    (base / "preprocessor_config.json").write_text(json.dumps(processor))
    options: dict[str, Any] = {"model": f"hf:{base}", "geometry": "hf", "res": None, "method": "bitfit"}
    (record,) = evaluate(home, start="random", **options, **folders(tmp_path))
    weights = Path(record["choices"]["weights"])
    assert json.loads((weights / "preprocessor_config.json").read_text()) == processor
    line = extract_line(record)
    assert line.endswith(f"--model hf:{weights} --res 56 --geometry hf")
    spec = run_line(line, home)
    assert spec["identity"]["preprocess"] == record["preprocess"]
    assert spec["identity"]["architecture"]["mean"] == [0.4, 0.5, 0.6]
    (again,) = evaluate(home, model="tiny", weights=weights, allow_leak=True, start="random", **folders(tmp_path))
    kept = json.loads((Path(again["choices"]["weights"]) / "preprocessor_config.json").read_text())
    assert kept == processor


def run_line(line: str, home: Path) -> dict[str, Any]:
    """The spec of the set that a printed command makes."""
    before = set(Store(home).sets())
    words = shlex.split(line)
    runner = CliRunner(env={"FEATSTORE_HOME": str(home)})
    done = runner.invoke(_store_app(), [*words[1:], "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (made,) = set(Store(home).sets()) - before
    return Store(home).set(made).spec


@pytest.mark.parametrize(("targets", "listed"), [(None, True), ("qkv", False)])
def test_lora_of_the_chest_paper_has_a_fused_qkv_in_imagenets_network(
    targets: str | None, listed: bool, home: Path
) -> None:
    options: dict[str, Any] = {"model": "vit-large", "random_weights": 0, "published": "none", "method": None}
    about = describe(Store(home), request(preset="lora-chest", targets=targets, **options))
    assert (
        any("published for this network: one on its fused qkv" in text for text in about.facts["deviations"]) is listed
    )


def test_an_image_that_failed_then_and_not_now_makes_another_run(tmp_path: Path) -> None:
    store = pictures(tmp_path, 64)
    manifest = Store(store).manifest("pics")
    rows = {split: manifest.column("split").index(split) for split in ("train", "test")}
    held = {}
    for split, row in rows.items():
        path = Path(manifest.root) / manifest.column("path")[row]
        held[split] = (path, path.read_bytes(), path.stat())
        path.write_bytes(bytes(path.stat().st_size))
        os.utime(path, ns=(held[split][2].st_atime_ns, held[split][2].st_mtime_ns))

    def again(split: str) -> dict[str, Any]:
        path, data, times = held[split]
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        return evaluate(store, **folders(tmp_path))[0]

    first = evaluate(store, **folders(tmp_path))[0]
    tested, trained = again("test"), again("train")
    assert [record["num_failed"] for record in (first, tested, trained)] == [2, 1, 0]
    assert first["choices"]["weights"] == tested["choices"]["weights"]  # a test image is not trained on
    assert trained["choices"]["weights"] != first["choices"]["weights"]
    assert len(list((tmp_path / "runs").rglob("start.npz"))) == 2


def test_a_check_of_bfloat16_that_was_killed_begins_anew(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"compute_dtype": "bfloat16", "results": tmp_path / "results"}
    expected = evaluate(home, train_seed=1, runs=tmp_path / "calm", **options)[0]["choices"]["parity"]
    real = Run.train

    def killed(self: Run) -> Any:
        real(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(home, runs=tmp_path / "runs", **options)
    assert list((tmp_path / "runs").rglob("parity/float32-*/*"))
    assert evaluate(home, train_seed=1, runs=tmp_path / "runs", **options)[0]["choices"]["parity"] == expected


def test_what_an_error_came_through_is_gone_before_the_team_is(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Network:
        pass

    held: list[weakref.ref[Network]] = []
    found: list[object] = []

    def fit(*_: Any) -> None:
        network = Network()
        held.append(weakref.ref(network))
        try:
            raise KeyError
        except KeyError as error:
            raise Stopped("stopped by the test", 75) from error

    monkeypatch.setattr("probes.finetune.fit_arm", fit)
    monkeypatch.setattr(Team, "close", lambda _: found.append(held[0]()))
    with pytest.raises(Stopped, match="stopped by the test") as error:
        evaluate(home, **folders(tmp_path))
    assert found == [None]
    assert error.value.code == 75
