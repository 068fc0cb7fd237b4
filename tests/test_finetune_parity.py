"""The check of bfloat16 before training: cut over processes as the runs are, one model at a time, done once."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetunes import evaluate
from test_tuning_ranks import fork
from tuning_runs import FAST, FEATURES, LABELS, After, adapted_of, image_set, pictures, task_of

from featstore.errors import Stopped
from probes import finetune_start
from probes.finetune_start import PRECISIONS, check_parity
from probes.tasks import Task
from probes.tuning_images import make_image_task
from probes.tuning_loop import Run
from probes.tuning_model import Tuned, make_head
from probes.tuning_ranks import Team

RECIPE = replace(FAST, batch=6)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("parity"))


class Maker:
    """Makes models, and knows at each which of those before are still there."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.made: list[weakref.ref[Tuned]] = []
        self.left: list[int] = []
        self.parts: list[weakref.ref[Any]] = []

    def __call__(self, precision: Any) -> Tuned:
        self.left.append(sum(each() is not None for each in (*self.made, *self.parts)))
        adapted = adapted_of(self.task)
        model = Tuned(adapted, FEATURES, make_head(adapted, FEATURES, len(self.task.labels), 0), precision)
        self.made.append(weakref.ref(model))
        return model


def check(task: Task, folder: Path, team: Team, **options: Any) -> tuple[dict[str, Any], Maker, list[bool]]:
    """(facts, who made the models, whether each run was cut over processes); nothing is collected by chance."""
    maker, cut, patch = Maker(task), [], pytest.MonkeyPatch()
    real = Run._prepare

    def prepare(self: Run) -> None:
        real(self)
        cut.append(any(hasattr(value, "full_tensor") for value in self.model.trained().values()))
        maker.parts.append(weakref.ref(self._optimizer))
        maker.parts += [weakref.ref(value) for value in self.model.trained().values()]

    patch.setattr(Run, "_prepare", prepare)
    gc.disable()
    try:
        return check_parity(task, maker, RECIPE, folder, team, **options), maker, cut
    finally:
        gc.enable()
        patch.undo()


def run_two(store: Path, folder: Path, shard: bool) -> None:
    team = Team()
    try:
        task = make_image_task(image_set(store, workers=1), LABELS, team)
        facts, maker, cut = check(task, folder / "check", team, shard=shard)
        assert cut == [shard, shard]
        assert maker.left == [0, 0]  # nothing is left of the first model and its optimiser
        (folder / f"facts-{shard}-{team.rank}.json").write_text(json.dumps(facts))
    finally:
        team.close()


def test_cut_over_processes_it_finds_the_same(store: Path, tmp_path: Path) -> None:
    task = task_of(store)
    expected, maker, cut = check(task, tmp_path / "one", Team())
    assert (maker.left, cut) == ([0, 0], [False, False])
    assert expected["steps"] == 4
    for shard in (False, True):
        fork(2, lambda shard=shard: run_two(store, tmp_path / f"two-{shard}", shard))  # type: ignore[misc]
        for rank in (0, 1):
            found = json.loads((tmp_path / f"two-{shard}" / f"facts-{shard}-{rank}.json").read_text())
            assert found["loss_float32"] == pytest.approx(expected["loss_float32"], abs=1e-5)
            assert found["loss_bfloat16"] == pytest.approx(expected["loss_bfloat16"], rel=5e-3)
            assert 0 < found["mean_score_gap"] < finetune_start.SCORE_GAP
            assert (found["steps"], found["images"]) == (4, expected["images"])


def test_asked_to_end_it_goes_on(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(store)
    expected, _, _ = check(task, tmp_path / "whole", Team())
    steps: list[str] = []
    real = Run._step

    def counted(self: Run, *given: Any) -> float:
        steps.append(self.recipe.precision)
        return real(self, *given)

    monkeypatch.setattr(Run, "_step", counted)
    attempts = 0
    while True:
        attempts += 1
        assert attempts < 20
        try:
            found, _, _ = check(task, tmp_path / "pieces", Team(), stop=After(1))
            break
        except Stopped:
            pass
    assert attempts > 4
    assert steps == ["float32"] * 4 + ["bfloat16"] * 4  # each once
    assert found == expected
    assert not list((tmp_path / "pieces").rglob("*.safetensors"))  # as large as the network
    assert [path.name.partition("-")[0] for path in sorted((tmp_path / "pieces").iterdir())] == sorted(PRECISIONS)
    # Another seed is another check.
    maker = Maker(task)
    other = check_parity(task, maker, replace(RECIPE, seed=1), tmp_path / "pieces", Team())
    assert len(maker.made) == 2
    assert not np.isclose(other["loss_float32"], expected["loss_float32"], atol=1e-9)


def test_the_command_hands_on_what_it_needs(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    real = check_parity

    def spy(*arguments: Any, **options: Any) -> Any:
        given.update(options)
        return real(*arguments, **options)

    monkeypatch.setattr("probes.finetune_fit.check_parity", spy)
    stop = After(10**6)
    options: dict[str, Any] = {"compute_dtype": "bfloat16", "start": "random", "runs": tmp_path / "runs"}
    (record,) = evaluate(store, stop=stop, shard=False, results=tmp_path / "results", **options)
    assert given == {"shard": False, "stop": stop}
    (path,) = (tmp_path / "runs").rglob("pics/*/cost.json")
    assert record["cost"]["seconds"] > json.loads(path.read_text())["parity.json"]["seconds"] > 0
