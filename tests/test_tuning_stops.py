"""What comes before and after training ends on request and goes on; batches and pieces where batch norms move."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_tuning_survey import After, together
from tuning_runs import FAST, LABELS, image_set, pictures, task_of, tune

from featstore.backbones import describe
from featstore.backbones.trainable import make_trainable
from featstore.errors import ConfigError, Stopped
from featstore.extraction.stopping import Stop
from probes import tuning_watch
from probes.finetune_start import frozen_features
from probes.tasks import Task
from probes.tuning_feed import fill_rows
from probes.tuning_images import cut_batches, make_image_task, split_images
from probes.tuning_loop import Run, least_images
from probes.tuning_ranks import Team

NORMS: dict[str, Any] = {"model": "mobilenetv2", "res": "32", "random": True}
MOVES: dict[str, Any] = {"method": "full", "features": "cls", "settings": {"batch_norm": "train"}}
ONCE = replace(FAST, epochs=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("stops"), 160)


@pytest.fixture(scope="module")
def task(store: Path) -> Task:
    return task_of(store)


@pytest.fixture(scope="module")
def normed(store: Path) -> Task:
    return make_image_task(image_set(store, **NORMS), LABELS)


# Before training


def test_frozen_features_go_on(task: Task, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainable = make_trainable(describe("tiny-random").load(device="cpu", compute_dtype="float32"))
    split = split_images(task, "train")  # 80 images, two blocks
    passed: list[int] = []
    real = trainable.features

    def counted(images: torch.Tensor, features: str) -> torch.Tensor:
        passed.append(len(images))
        return real(images, features)

    trainable.features = counted  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO, "probes.tuning_watch"):
        patch.setattr(tuning_watch, "SHOWN_SECONDS", 0.0)
        with pytest.raises(Stopped, match="stopped by the test"):
            frozen_features(trainable, split, "cls", Team(), batch=20, folder=tmp_path, stop=After(0))
    assert passed == [20, 20, 20, 4]
    assert caplog.records[0].getMessage().startswith("frozen features 64/80, ")
    found = frozen_features(trainable, split, "cls", Team(), batch=20, folder=tmp_path)
    assert passed[4:] == [16]
    expected = frozen_features(trainable, split, "cls", Team(), batch=20, folder=tmp_path / "other")
    np.testing.assert_array_equal(found, expected)
    # the last block is no reason to end: nothing is left of it
    frozen_features(trainable, split, "cls", Team(), batch=80, folder=tmp_path / "last", stop=After(1))


def test_processes_fill_rows_together(task: Task, tmp_path: Path) -> None:
    from probes.tuning_activations import Activations

    split = split_images(task, "train")

    def fill(member: Any, stop: Stop | None = None) -> list[int]:
        held = Activations(tmp_path, {"of": "sums"}, len(split))
        fill_rows(held, split, lambda images: images.sum((1, 2, 3))[:, None], member, batch=20, what="x", stop=stop)
        return held.missing

    assert together(fill, world=3) == [[], [], []]  # two blocks
    assert Activations(tmp_path, {"of": "sums"}, len(split)).read(np.arange(80)).unique().numel() > 50


def test_activations_go_on(task: Task, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "last-k", "settings": {"k": 1}, "cache": tmp_path / "cache"}
    with pytest.raises(Stopped, match="stopped by the test"):
        tune(task, tmp_path / "run", ONCE, stop=After(0), **options)
    assert len(list((tmp_path / "cache").rglob("*.bin"))) == 1
    result, _ = tune(task, tmp_path / "run", ONCE, **options)
    plain, _ = tune(task, tmp_path / "plain", ONCE, **{**options, "cache": tmp_path / "other"})
    np.testing.assert_array_equal(result.test_scores, plain.test_scores)


# Measuring


class Late(Stop):
    """Asked to end from the first measuring of scores on."""

    on = False

    @property
    def asked(self) -> bool:
        if self.on:
            self.ask("stopped by the test", 75)
        return bool(self.reason)


def test_measuring_ends_where_something_was_done(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, real = Late(), Run.scores

    def scores(self: Run, *given: Any) -> Any:
        if isinstance(self.stop, Late):
            self.stop.on = True
        return real(self, *given)

    monkeypatch.setattr(Run, "scores", scores)
    with pytest.raises(Stopped, match="stopped by the test; what is committed stays") as end:
        tune(task, tmp_path, ONCE, method="linear-online", stop=stop)
    assert end.value.code == 75
    # The next attempt has nothing else to do: ended here too, none would ever get further.
    again = Late()
    result, _ = tune(task, tmp_path, ONCE, method="linear-online", stop=again)
    assert again.on
    assert not again.has_kept
    assert result.progress.epoch == 1


# Batch norms


def test_a_short_last_batch_joins_the_one_before() -> None:
    order = np.arange(9)

    def sizes(batch: int, least: int, *, drop_last: bool = False) -> list[int]:
        found = cut_batches(order, batch, drop_last=drop_last, least=least)
        assert np.concatenate(found).tolist() == list(range(sum(map(len, found))))
        return [len(each) for each in found]

    assert sizes(4, 1) == [4, 4, 1]
    assert sizes(4, 2) == [4, 5]
    assert sizes(8, 2) == [9]
    assert sizes(7, 3) == [9]  # two processes: two images would be one each
    assert sizes(7, 2) == [7, 2]
    assert sizes(9, 2) == [9]
    assert sizes(4, 2, drop_last=True) == [4, 4]
    assert sizes(1, 2) == [1, 1, 1, 1, 1, 1, 1, 2]
    assert (least_images(True, 1), least_images(True, 4), least_images(False, 4)) == (2, 5, 1)


@pytest.mark.parametrize(("batch", "micro", "joins"), [(79, None, True), (16, 5, False)])
def test_no_image_goes_alone_where_batch_norms_move(
    batch: int, micro: int | None, joins: bool, normed: Task, tmp_path: Path
) -> None:
    assert len(split_images(normed, "train")) == 80
    recipe = replace(ONCE, batch=batch, micro=micro)
    result, adapted = tune(normed, tmp_path, recipe, **MOVES)
    assert adapted.trainable.batch_norm == "train"
    note = "the last 1 of an epoch's 80 images join the batch before"
    assert any(text.startswith(note) for text in result.notes) == joins


def test_pieces_belong_to_a_run_where_batch_norms_move(normed: Task, task: Task, tmp_path: Path) -> None:
    tune(normed, tmp_path / "norms", replace(ONCE, batch=40), **MOVES)
    with pytest.raises(ConfigError, match="another run"):
        tune(normed, tmp_path / "norms", replace(ONCE, batch=40, micro=10), **MOVES)
    tune(task, tmp_path / "plain", ONCE, method="linear-online")
    tune(task, tmp_path / "plain", replace(ONCE, micro=5), method="linear-online")  # the same one
