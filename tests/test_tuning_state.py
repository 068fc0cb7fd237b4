"""Checkpoints: killed anywhere, a run goes on to the same bits; another run, damage and leftovers are told or swept."""

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tuning_runs import FAST, LABELS, equal, image_set, pictures, task_of, tune, weights_of

from featstore import files
from featstore.errors import ConfigError, CorruptError, Stopped, StoreError
from featstore.extraction.stopping import Stop
from probes import tuning_loop, tuning_state
from probes.tasks import Task
from probes.tuning_loop import Run
from probes.tuning_recipe import AugmentRecipe, Optimisation, TuningRecipe
from probes.tuning_state import Checkpoints, Progress

# Everything that has a state: momenta, an average, drawn dropout, augmentation, pieces of a batch, an odd last batch.
RECIPE = TuningRecipe(
    epochs=2,
    batch=10,
    micro=4,
    keep="auroc",
    class_weight="balanced",
    optimisation=Optimisation(lr=1e-3, head_lr=1e-2, weight_decay=0.05, warmup=1.0, clip=0.5, ema=0.9, layer_decay=0.8),
    augment=AugmentRecipe(flip="plain", degrees=7.0, crop="0.75-1"),
)
LORA: dict[str, Any] = {"method": "lora", "settings": {"r": 2, "dropout": 0.2}}


class KilledError(BaseException):
    """Stands for a process that is no more; nothing catches it."""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return task_of(pictures(tmp_path_factory.mktemp("state")), LABELS)


@pytest.fixture(scope="module")
def undisturbed(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Any:
    result, adapted = tune(task, tmp_path_factory.mktemp("whole"), RECIPE, **LORA)
    return result, weights_of(adapted)


def check_same(found: Any, expected: Any) -> None:
    (result, adapted), (whole, weights) = found, expected
    assert result.history == whole.history
    assert result.progress.chosen == whole.progress.chosen
    assert equal(weights_of(adapted), weights)
    np.testing.assert_array_equal(result.val_scores, whole.val_scores)
    np.testing.assert_array_equal(result.test_scores, whole.test_scores)


def test_the_same_run_twice_is_equal_to_the_bit(task: Task, tmp_path: Path, undisturbed: Any) -> None:
    check_same(tune(task, tmp_path, RECIPE, **LORA), undisturbed)


@pytest.mark.parametrize("at", [1, 3, 4, 6], ids=["first-epoch", "before-val", "second-epoch", "last-step"])
def test_a_signal_keeps_a_checkpoint(
    at: int, task: Task, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, steps = Stop(), []
    step = Run._step

    def stopping(self: Run, *arguments: Any) -> float:
        steps.append(1)
        if len(steps) == at:
            stop.ask("stopped by SIGTERM", 143)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", stopping)
        with pytest.raises(Stopped, match="stopped by SIGTERM; what is committed stays") as raised:
            tune(task, tmp_path, RECIPE, stop=stop, **LORA)
    assert raised.value.code == 143
    assert len(steps) == at  # nothing more was begun
    held = files.unseal((tmp_path / "checkpoints/state.json").read_bytes(), tmp_path)["progress"]
    assert (held["epoch"], held["step"], len(held["val_loss"])) == ((at - 1) // 3, (at - 1) % 3 + 1, (at - 1) // 3)
    result, adapted = tune(task, tmp_path, RECIPE, **LORA)
    check_same((result, adapted), undisturbed)
    assert "went on once from a checkpoint" in result.notes


def test_asked_while_it_measures(task: Task, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The averaged weights are in place then: what is kept must be the trained ones."""
    stop, shown = Stop(), tuning_loop.Average.shown

    def asking(self: Any) -> Any:
        stop.ask("the time budget is used up", 75)
        return shown(self)

    with monkeypatch.context() as patch:
        patch.setattr(tuning_loop.Average, "shown", asking)
        with pytest.raises(Stopped, match="the time budget is used up"):
            tune(task, tmp_path, RECIPE, stop=stop, **LORA)
    held = files.unseal((tmp_path / "checkpoints/state.json").read_bytes(), tmp_path)["progress"]
    assert (held["epoch"], held["step"], held["val_loss"]) == (0, 3, [])
    check_same(tune(task, tmp_path, RECIPE, **LORA), undisturbed)


def test_asked_between_epochs(task: Task, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, save = Stop(), Checkpoints.save

    def asking(self: Checkpoints, *arguments: Any) -> None:
        save(self, *arguments)
        stop.ask("stopped by SIGUSR1", 75)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", asking)
        with pytest.raises(Stopped, match="stopped by SIGUSR1"):
            tune(task, tmp_path, RECIPE, stop=stop, **LORA)
    held = files.unseal((tmp_path / "checkpoints/state.json").read_bytes(), tmp_path)["progress"]
    assert (held["epoch"], held["step"], len(held["val_loss"])) == (1, 0, 1)
    check_same(tune(task, tmp_path, RECIPE, **LORA), undisturbed)


@pytest.mark.parametrize(
    ("where", "at"),
    [
        ("step", 5),
        ("tensors", 2),
        ("commit", 1),
        *(
            pytest.param(*place, marks=pytest.mark.slow)
            for place in (("step", 2), ("tensors", 1), ("rename", 3), ("prune", 2))
        ),
    ],
)
def test_killed_anywhere_it_ends_with_the_same_bits(
    where: str, at: int, task: Task, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first epoch, in the second, and at every stage of writing a checkpoint."""
    place, name = {
        "step": (Run, "_step"),
        "tensors": (tuning_state, "_pieces"),
        "rename": (tuning_state.os, "replace"),
        "commit": (tuning_state.files, "write_atomic"),
        "prune": (Checkpoints, "_prune"),
    }[where]
    real, calls = getattr(place, name), []

    def killing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise KilledError
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, killing)
        with pytest.raises(KilledError):
            tune(task, tmp_path, RECIPE, **LORA)
    check_same(tune(task, tmp_path, RECIPE, **LORA), undisturbed)


def test_a_finished_run_is_not_trained_again(
    task: Task, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(task, tmp_path, RECIPE, **LORA)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert len(names) == 2  # the last one is gone, the best stays
    assert names[0].startswith("best-")
    monkeypatch.setattr(Run, "_step", None)
    check_same(tune(task, tmp_path, RECIPE, **LORA), undisturbed)


def test_another_run_is_refused(task: Task, tmp_path: Path) -> None:
    store = Path(task.features.plan.folder).parents[2]  # type: ignore[attr-defined]
    once = replace(FAST, epochs=1)
    tune(task, tmp_path, once, method="linear-online")
    other = replace(once, optimisation=replace(once.optimisation, lr=2e-4))
    with pytest.raises(
        ConfigError, match=r"checkpoint of another run: recipe.optimisation.lr 0.0001 there, 0.0002 here; give the same"
    ):
        tune(task, tmp_path, other, method="linear-online")
    with pytest.raises(ConfigError, match="method linear-online there, bitfit here"):
        tune(task, tmp_path, once, method="bitfit")
    elsewhere = task_of(store, replace(LABELS, labels=("second", "first")))
    with pytest.raises(ConfigError, match=r"task .* there, .* here"):
        tune(elsewhere, tmp_path, once, method="linear-online")
    # What changes nothing but rounding goes on.
    tune(task, tmp_path, replace(once, micro=3), method="linear-online")


def kept(folder: Path, value: float = 1.0) -> Checkpoints:
    checkpoints = Checkpoints(folder, {"a": 1})
    checkpoints.save(Progress(epoch=1), {"x": torch.full((3,), value)}, {"x": torch.zeros(3)})
    return checkpoints


def test_damage_is_found(tmp_path: Path) -> None:
    kept(tmp_path)
    again = Checkpoints(tmp_path, {"a": 1})
    assert again.open() == Progress(epoch=1)
    assert torch.equal(again.last()["x"], torch.ones(3))
    (file,) = tmp_path.glob("last-*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptError, match="this part of the checkpoint is missing or damaged; restore it"):
        again.last()
    file.unlink()
    with pytest.raises(CorruptError, match="missing or damaged"):
        again.last()
    state = tmp_path / "state.json"
    state.write_text(state.read_text().replace('"epoch": 1', '"epoch": 2'))
    with pytest.raises(CorruptError, match="does not match its digest"):
        Checkpoints(tmp_path, {"a": 1}).open()


def test_what_to_do_about_a_damaged_state_is_said(tmp_path: Path) -> None:
    kept(tmp_path)
    state = tmp_path / "state.json"
    state.write_bytes(state.read_bytes()[:-40])
    with pytest.raises(CorruptError, match=r"state.json: not a sealed .*; restore it from a copy, or remove .* anew"):
        Checkpoints(tmp_path, {"a": 1}).open()


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """Read by the format's own reader, whatever types and shapes."""
    tensors = {
        "numbers": torch.randn(3, 5),
        "halves": torch.randn(7).half(),
        "short": torch.randn(2, 2).bfloat16(),
        "wide": torch.randn(2).double(),
        "one": torch.tensor(3),
        "few": torch.tensor([1, 2], dtype=torch.int32),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4),
        "turned": torch.randn(4, 3).T,
    }
    checkpoints = Checkpoints(tmp_path, {"a": 1})
    checkpoints.save(Progress(epoch=1), tensors)
    (path,) = tmp_path.glob("last-*")
    from safetensors.torch import load_file

    assert equal(load_file(path), tensors)
    assert equal(checkpoints.last(), tensors)
    assert all(value.dtype == tensors[name].dtype for name, value in load_file(path).items())


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit of the size of files stands for the disk: the system refuses to write on in the middle of a tensor."""
    checkpoints = kept(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(StoreError, match=r"last-.*: cannot write \(File too large\); free space"):
            checkpoints.save(Progress(epoch=2), {"x": torch.zeros(2**20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    again = Checkpoints(tmp_path, {"a": 1})
    assert again.open() == Progress(epoch=1)
    assert torch.equal(again.last()["x"], torch.ones(3))


def test_a_full_disk_ends_a_run_that_goes_on_later(
    task: Task, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = tuning_state._write, []

    def full(path: Path, tensors: Any) -> Any:
        calls.append(path.name)
        if len(calls) == 3:  # the first two are those of the first epoch
            raise StoreError(f"{path}: cannot write (No space left on device)")
        return save(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(tuning_state, "_write", full)
        with pytest.raises(StoreError, match="No space left on device"):
            tune(task, tmp_path, RECIPE, **LORA)
    held = files.unseal((tmp_path / "checkpoints/state.json").read_bytes(), tmp_path)["progress"]
    assert held["epoch"] == 1
    check_same(tune(task, tmp_path, RECIPE, **LORA), undisturbed)


def test_another_version_is_refused(tmp_path: Path) -> None:
    kept(tmp_path)
    state = tmp_path / "state.json"
    body = files.unseal(state.read_bytes(), state)
    state.write_bytes(files.sealed({**body, "schema": 99}))
    with pytest.raises(ConfigError, match="was written by another version"):
        Checkpoints(tmp_path, {"a": 1}).open()


def test_old_files_are_pruned_and_nothing_is_pickled(tmp_path: Path) -> None:
    checkpoints = kept(tmp_path)
    dead = tmp_path / f"last-0.safetensors.{files.own_name().rsplit('-', 2)[0]}-999999999-{'0' * 32}.partial"
    for path in (dead, tmp_path / "last-stale.safetensors", tmp_path / "notes.txt"):
        path.write_bytes(b"x")
    checkpoints.save(Progress(epoch=2), {"x": torch.zeros(3)})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "best-00001-0000000.safetensors",
        "last-00002-0000000.safetensors",
        "notes.txt",
        "state.json",
    ]
    # The same place twice: what is committed is never written over.
    checkpoints.save(Progress(epoch=2, resumed=1), {"x": torch.ones(3)})
    assert torch.equal(checkpoints.last()["x"], torch.ones(3))
    assert not (tmp_path / "last-00002-0000000.safetensors").exists()


def test_only_one_process_writes(tmp_path: Path) -> None:
    silent = Checkpoints(tmp_path, {"a": 1}, writes=False)
    silent.save(Progress(epoch=1), {"x": torch.ones(3)})
    assert not list(tmp_path.iterdir())
    kept(tmp_path)
    assert silent.best() is None
    silent.reread()
    assert silent.best() is not None


def test_images_that_fail_make_another_run(task: Task, tmp_path: Path) -> None:
    store = pictures(tmp_path)
    once = replace(FAST, epochs=1)
    tune(task_of(store), tmp_path / "run", once, method="linear-online")
    images = image_set(store)
    images._reasons[0] = "damaged"
    from probes.tuning_images import make_image_task

    with pytest.raises(ConfigError, match=r"task .* there, .* here"):
        tune(make_image_task(images, LABELS), tmp_path / "run", once, method="linear-online")
