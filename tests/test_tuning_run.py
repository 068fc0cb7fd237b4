"""From images to a result: what is read, what fails, units, weights that extraction takes, options that exclude."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from probe_sets import write_set
from safetensors.torch import load_file
from tuning_runs import FAST, FEATURES, LABELS, RUN, adapted_of, equal, image_set, pictures, task_of, tune, weights_of

from featstore.backbones import describe
from featstore.configs import SetConfig
from featstore.errors import ConfigError, DecodeError, IncompleteError, TaskError
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.store.catalog import Store
from probes.tasks import make_task
from probes.taskspec import TaskSpec
from probes.tuning_images import (
    cut_batches,
    epoch_order,
    kind_of,
    make_image_task,
    pool_note,
    pool_scores,
    split_images,
)

ONCE = replace(FAST, epochs=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("run"))


def read(images: object, rows: np.ndarray) -> np.ndarray:
    with images.open([rows[:5], rows[5:]]) as batches:  # type: ignore[attr-defined]
        return np.concatenate([batch.pixels for batch in batches])


def test_memory_cache_and_decoding_give_the_same_pixels_and_runs(tmp_path: Path) -> None:
    store = pictures(tmp_path)
    held, cached = task_of(store), task_of(store, cache=True)
    decoded = image_set(store)
    decoded._hold_bytes = 0
    direct = make_image_task(decoded, LABELS)
    rows = np.array([3, 1, 40, 2, 2, 17, 9])
    expected = read(held.features, rows)
    for task in (cached, direct):
        np.testing.assert_array_equal(read(task.features, rows), expected)
    assert not decoded._held
    names = [entry.name for entry in Store(store).entries("pics")]
    assert not any("tiny" in name for name in names), names  # no set of features was made or opened
    results = [
        tune(task, tmp_path / str(number), ONCE, method="bitfit")[0]
        for number, task in enumerate((held, cached, direct))
    ]
    for result in results[1:]:
        assert result.history == results[0].history
        np.testing.assert_array_equal(result.test_scores, results[0].test_scores)


def test_images_that_fail_are_left_out_and_counted(tmp_path: Path) -> None:
    store = pictures(tmp_path)
    names = [tmp_path / "pics" / "images" / f"{number:05d}.png" for number in (0, 4)]
    for name in names:
        name.write_bytes(bytes(name.stat().st_size))
    whole = Store(store).manifest("pics").table.column("mtime_ns").to_pylist()
    for name, row in zip(names, (0, 4)):
        os.utime(name, ns=(whole[row], whole[row]))
    for cache in (False, True):
        task = task_of(store, cache=cache)
        assert sorted(task.features.failures) == [0, 4]
        assert len(split_images(task, "train")) == 23
        assert 0 not in split_images(task, "train").rows
        result, _ = tune(task, tmp_path / f"run{cache}", ONCE, method="linear-online")
        assert len(result.val_scores) == 11


def test_an_image_that_breaks_later_is_an_error(store: Path) -> None:
    task = task_of(store)
    images = task.features
    images._held = {}  # type: ignore[attr-defined]
    name = Path(images.manifest.root) / images.manifest.column("path")[0]
    data, facts = name.read_bytes(), name.stat()
    try:
        name.write_bytes(bytes(len(data)))
        with pytest.raises(DecodeError, match="could be decoded when the run began and cannot now"):
            read(images, np.arange(6))
    finally:
        name.write_bytes(data)
        os.utime(name, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize("pool", ["mean", "max", "features"])
def test_images_of_a_unit_share_its_label(pool: str, store: Path, tmp_path: Path) -> None:
    spec = TaskSpec(name="units", labels=("first", "second"), unit="patient", pool=pool)  # type: ignore[arg-type]
    task = task_of(store, spec)
    split = split_images(task, "val")
    units, truth = task.units("val"), task.truth("val")
    for row, unit in enumerate(units.number):
        np.testing.assert_array_equal(split.y[row][split.mask[row]], truth.y[unit][truth.mask[unit]])
    scores = np.random.default_rng(0).random((len(split), 2))
    pooled = pool_scores(task, "val", scores)
    for unit in range(len(units.ids)):
        rows = scores[units.number == unit]
        np.testing.assert_allclose(pooled[unit], rows.max(0) if pool == "max" else rows.mean(0))
    result, _ = tune(task, tmp_path, ONCE, method="linear-online")
    assert len(result.val_scores) == len(units.ids) == 6
    assert (pool_note(task) != []) is (pool == "features")


def test_extraction_takes_the_weights(store: Path, tmp_path: Path) -> None:
    task = task_of(store)
    for method in ("full", "lora"):
        folder = tmp_path / method
        result, adapted = tune(
            task, folder, replace(ONCE, optimisation=replace(ONCE.optimisation, lr=1e-3)), method=method, export=True
        )
        assert result.weights == folder
        source = describe("tiny", weights=result.weights)
        assert source.weights["digest"] != task.features.spec["identity"]["weights"]
        backbone = source.load(device="cpu", compute_dtype="float32")
        batch = torch.rand(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            tokens = adapted.trainable(batch)
        assert torch.allclose(backbone(batch).cls, tokens.cls, atol=1e-5)
        assert load_file(folder / "head.safetensors").keys() == {"head.weight", "head.bias"}
        assert (folder / "adapters.safetensors").is_file() is (method == "lora")
        if method == "full":
            config = SetConfig(
                model="tiny", res="42", weights=result.weights, name="tuned", tokens="cls,mean_patch", dtype="float32"
            )
            extract(make_plan(Store(store), "pics", config, RUN), RUN)
            made = make_task(Store(store).open(Store(store).entry("pics/tuned@42")), LABELS)
            X = made.arrays("test", FEATURES)[0].astype(float)
            head = load_file(folder / "head.safetensors")
            logits = X @ head["head.weight"].double().numpy().T + head["head.bias"].double().numpy()
            np.testing.assert_allclose(1 / (1 + np.exp(-logits)), result.test_scores, atol=1e-5)


def test_an_order_follows_from_seed_and_epoch() -> None:
    first = epoch_order(100, 0, 0)
    assert sorted(first) == list(range(100))
    np.testing.assert_array_equal(first, epoch_order(100, 0, 0))
    assert (first != epoch_order(100, 0, 1)).any()
    assert (first != epoch_order(100, 1, 0)).any()
    assert [len(cut) for cut in cut_batches(first, 30, drop_last=False)] == [30, 30, 30, 10]
    assert [len(cut) for cut in cut_batches(first, 30, drop_last=True)] == [30, 30, 30]
    assert [len(cut) for cut in cut_batches(first, 300, drop_last=True)] == [100]
    np.testing.assert_array_equal(np.concatenate(cut_batches(first, 30, drop_last=False)), first)


def test_what_cannot_be_trained_is_refused(store: Path, tmp_path: Path) -> None:
    images = image_set(store)
    with pytest.raises(IncompleteError, match="images to train on, with no rows of features"):
        images.row_index  # noqa: B018
    numbers = task_of(store, TaskSpec(name="n", labels=("first",), kind="regression"))
    with pytest.raises(TaskError, match="is regression, and `probes finetune` trains heads of labels and classes"):
        kind_of(numbers)
    columns = {"part": ["train", "val", "test"] * 4, "a": [0, 0, 0, 1, 1, 1] * 2}
    held = write_set(tmp_path / "other", tmp_path / "x", columns, np.ones((12, 4)) * np.arange(12)[:, None])
    with pytest.raises(ConfigError, match="is a set of features; make the task on an ImageSet"):
        split_images(make_task(held, TaskSpec(name="a", labels=("a",))), "train")


def test_batch_norms_keep_what_they_learned(store: Path, tmp_path: Path) -> None:
    """Running statistics are part of what is kept, resumed and exported."""
    task = task_of(store, model="mobilenetv2", res="32", random=True)
    recipe = replace(ONCE, micro=4)
    result, adapted = tune(task, tmp_path / "a", recipe, features="cls", export=True)
    assert any("batch norms take the statistics" in note for note in result.notes)
    again, second = tune(task, tmp_path / "a", recipe, features="cls")
    assert equal(weights_of(adapted), weights_of(second))
    fresh = weights_of(adapted_of(task, "full", features="cls"))
    moved = [
        name
        for name, value in weights_of(adapted).items()
        if "running_mean" in name and not torch.equal(value, fresh[name])
    ]
    assert moved
    source = describe("mobilenetv2", weights=result.weights)
    backbone = source.load(device="cpu", compute_dtype="float32")
    batch = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(backbone(batch).cls, adapted.trainable.eval()(batch).cls, atol=1e-4)
    np.testing.assert_array_equal(again.test_scores, result.test_scores)
