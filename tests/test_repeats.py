"""A planted copy of a test image among the training rows is refused, whatever it is called."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import register_pictures
from PIL import Image
from probe_sets import write_set

import probes
import probes.repeats
from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.errors import LeakError
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes.configs import EvalConfig, LinearConfig, TaskConfig
from probes.evaluation import evaluate_sets

SIZE = 60
RUN = RunConfig(device="cpu", workers=2)


def planted(root: Path, *, copies: dict[int, int], width: int = 32) -> FeatureSet:
    """Features of patients of their own, two thirds for training; row `key` gets those of row `value`."""
    random = np.random.default_rng(5)
    X = random.standard_normal((SIZE, width)).astype(np.float32)
    for row, source in copies.items():
        X[row] = X[source]
    columns: dict[str, list[Any]] = {
        "part": ["train"] * 30 + ["val"] * 15 + ["test"] * 15,
        "pid": [f"p{number}" for number in range(SIZE)],
        "sick": [str(value) for value in np.arange(SIZE) % 2],
    }
    return write_set(root / "store", root / "data", columns, X)


def test_equal_features_in_train_and_test_are_refused(tmp_path: Path) -> None:
    found = planted(tmp_path, copies={50: 3})
    task = probes.task(found, labels=["sick"])
    with pytest.raises(
        LeakError, match=r"1 images with equal cls stand in more than one split, such as 003.png \(train"
    ):
        task.arrays("train", "cls")
    store = Store(tmp_path / "store")
    config = EvalConfig(dataset="x", labels="sick", features="cls", resamples=10)
    with pytest.raises(LeakError, match="--allow-leak"):
        evaluate_sets(store, "linear", config, LinearConfig(C="1"))
    allowed = EvalConfig(dataset="x", labels="sick", features="cls", resamples=10, allow_leak=True)
    (record,) = evaluate_sets(store, "linear", allowed, LinearConfig(C="1"))
    assert any(note.startswith("leak allowed: 1 images with equal cls") for note in record["notes"])


@pytest.mark.parametrize("copies", [{}, {4: 3}, {55: 50}])
def test_copies_within_a_split_are_no_leak(tmp_path: Path, copies: dict[int, int]) -> None:
    probes.task(planted(tmp_path, copies=copies), labels=["sick"]).arrays("train", "cls")


def test_narrow_and_constant_features_prove_nothing(tmp_path: Path) -> None:
    probes.task(planted(tmp_path / "narrow", copies={50: 3}, width=15), labels=["sick"]).arrays("train", "cls")
    random = np.random.default_rng(0)
    values = random.standard_normal((10, 20)).astype(np.float32)
    values[[2, 8]] = 1.0
    role = np.array(["train"] * 5 + ["test"] * 5)
    assert probes.repeats.repeated_features(values, role, np.arange(10)) == []
    values[[3, 4, 9]] = values[3]
    assert probes.repeats.repeated_features(values, role, np.arange(10)) == [[3, 4, 9]]
    assert probes.repeats.repeated_features(values, role, np.arange(9)) == []


def test_every_planted_pair_is_found() -> None:
    """Against brute force over all pairs, with blocks of odd sizes, in float16 as stored."""
    random = np.random.default_rng(1)
    values = random.standard_normal((20_000, 16)).astype(np.float16)
    copies = random.permutation(20_000)[:400].reshape(2, 200)
    values[copies[0]] = values[copies[1]]
    role = random.choice(["train", "val", "test"], 20_000)
    _, number = np.unique(values, axis=0, return_inverse=True)
    alike = [np.flatnonzero(number == value) for value in np.flatnonzero(np.bincount(number) > 1)]
    expected = sorted(rows.tolist() for rows in alike if len(set(role[rows])) > 1)
    assert len(expected) > 100
    assert sorted(probes.repeats.repeated_features(values, role, np.arange(20_000))) == expected


def test_equal_files_in_two_splits_are_refused(tmp_path: Path, store_path: Path) -> None:
    """Hashes that extraction took while it read the bytes, of files of two patients."""
    names = register_pictures(store_path, tmp_path / "data", 24).column("path")
    shutil.copy(tmp_path / "data" / names[2], tmp_path / "data" / names[20])
    lines = ["path,pid,part,sick"]
    lines += [
        f"{name},p{row},{'train' if row < 12 else 'val' if row < 18 else 'test'},{row % 2}"
        for row, name in enumerate(names)
    ]
    (tmp_path / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    reading = RegisterConfig(table=tmp_path / "data" / "labels.csv", group_column="pid", split_column="part")
    register(store_path, "copies", tmp_path / "data", reading)
    store = Store(store_path)
    extract(make_plan(store, "copies", SetConfig(model="tiny", res="42"), RUN), RUN)
    found = Store(store_path)["copies", "tiny@42"]
    with pytest.raises(LeakError, match=rf"1 byte-identical images .*{names[2]} \(train\) = {names[20]} \(test\)"):
        probes.task(found, labels=["sick"])
    task = probes.task(found, labels=["sick"], allow_leak=True)
    assert any("leak allowed: 1 byte-identical" in note for note in task.notes)


def test_images_that_many_patients_have_are_no_leak(tmp_path: Path, store_path: Path) -> None:
    """Six volumes of six patients, each with the same black slice: equal features, a note."""
    (tmp_path / "data").mkdir()
    random = np.random.default_rng(0)
    lines = ["path,pid,part,sick"]
    for number in range(6):
        volume = random.integers(0, 200, (4, 42, 42)).astype(np.uint8)
        volume[number % 2] = 0
        np.save(tmp_path / "data" / f"v{number}.npy", volume)
        lines.append(f"v{number}.npy,p{number},{['train', 'val', 'test'][number // 2]},{number % 2}")
    (tmp_path / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    reading = RegisterConfig(
        table=tmp_path / "data" / "labels.csv", group_column="pid", split_column="part", frames="all"
    )
    register(store_path, "slices", tmp_path / "data", reading)
    extract(make_plan(Store(store_path), "slices", SetConfig(model="tiny", res="42"), RUN), RUN)
    task = probes.task(Store(store_path)["slices", "tiny@42"], labels=["sick"])
    task.arrays("train", "cls")
    assert task.repeats["cls"] == (
        "1 images with equal cls stand in more than one split and belong to 4 patients or more: taken for empty images"
    )


def test_a_copy_saved_again_is_refused(tmp_path: Path, store_path: Path) -> None:
    """Other bytes, the same pixels: the files differ and the features do not."""
    names = register_pictures(store_path, tmp_path / "data", 24).column("path")
    with Image.open(tmp_path / "data" / names[20]) as image:
        image.save(tmp_path / "data" / names[2], compress_level=1)
    lines = ["path,pid,part,sick"]
    lines += [
        f"{name},p{row},{'train' if row < 12 else 'val' if row < 18 else 'test'},{row % 2}"
        for row, name in enumerate(names)
    ]
    (tmp_path / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    reading = RegisterConfig(table=tmp_path / "data" / "labels.csv", group_column="pid", split_column="part")
    register(store_path, "copies", tmp_path / "data", reading)
    extract(make_plan(Store(store_path), "copies", SetConfig(model="tiny", res="42"), RUN), RUN)
    task = probes.task(Store(store_path)["copies", "tiny@42"], labels=["sick"])
    with pytest.raises(LeakError, match="1 images with equal cls stand in more than one split"):
        task.arrays("train", "cls")
    with pytest.raises(LeakError, match="1 images with equal mean_patch"):
        task.check_images("mean_patch")


def test_equal_features_of_two_data_sets_are_refused(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    columns: dict[str, list[Any]] = {
        "part": ["train"] * 30 + ["val"] * 15 + ["test"] * 15,
        "pid": [f"p{number}" for number in range(SIZE)],
        "sick": [str(value) for value in np.arange(SIZE) % 2],
    }
    X, Y = random.standard_normal((2, SIZE, 32)).astype(np.float32)
    Y[50] = X[3]
    Y[2] = Y[55]  # within the other data set, of rows that are not used
    write_set(tmp_path / "store", tmp_path / "x", columns, X, name="x", label_columns="sick")
    write_set(tmp_path / "store", tmp_path / "y", columns, Y, name="y", label_columns="sick")
    config = EvalConfig(dataset="x", labels="sick", features="cls", resamples=10)
    reading = TaskConfig(test_dataset="y")
    store = Store(tmp_path / "store")
    with pytest.raises(LeakError, match=r"1 images with equal cls .*003.png \(train\) = 050.png \(test\)"):
        evaluate_sets(store, "linear", config, LinearConfig(C="1"), reading=reading)
    allowed = EvalConfig(dataset="x", labels="sick", features="cls", resamples=10, allow_leak=True)
    (record,) = evaluate_sets(store, "linear", allowed, LinearConfig(C="1"), reading=reading)
    assert any(note.startswith("leak allowed: 1 images with equal cls") for note in record["notes"])
