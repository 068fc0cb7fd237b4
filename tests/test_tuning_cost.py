"""Cost belongs to the training: added up over attempts, by what each was computed with, whoever reads it afterwards."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetunes import evaluate, request
from tuning_runs import FAST, After, pictures, task_of, tune

from featstore import files
from featstore.backbones import describe
from featstore.errors import Stopped
from probes.finetune_arm import Arm
from probes.finetune_config import WorkConfig
from probes.finetune_costs import keep_cost, paying, read_before, seed_cost, spent_in_vain
from probes.tasks import Task
from probes.tuning_cost import cost_notes, describe_settings, merged, reset_peak, run_cost, settings_of, spent_on
from probes.tuning_loop import Run
from probes.tuning_ranks import Team
from probes.tuning_state import Progress

METHOD: dict[str, Any] = {"method": "linear-online"}
EIGHT = {"device": "big", "processes": 8, "micro": None, "checkpointing": False, "sharded": True}
ONE = {"device": "big", "processes": 1, "micro": 4, "checkpointing": True, "sharded": False}


class KilledError(BaseException):
    """Stands for a process that is no more; nothing catches it."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("cost"))


@pytest.fixture(scope="module")
def task(store: Path) -> Task:
    return task_of(store)


def used(gpu_seconds: float, memory: int) -> dict[str, float]:
    return {"gpu_seconds": gpu_seconds, "peak_memory_bytes": memory, "peak_gpu_memory_bytes": 10 * memory}


def on(device: str, world: int) -> Team:
    """Processes on GPUs that are not there."""
    team = Team()
    team.device, team.world = device, world
    return team


# Adding up


def test_attempts_add_up_by_their_settings() -> None:
    progress = Progress()
    for settings, seconds, images, memory in ((EIGHT, 10.0, 800, 5), (ONE, 4.0, 40, 9), (EIGHT, 2.0, 160, 3)):
        progress.images += images
        progress.spend(settings, seconds, used(seconds * settings["processes"], memory))
    assert progress.trained_with == [
        {**ONE, "seconds": 4.0, "images": 40, **used(4.0, 9)},
        {**EIGHT, "seconds": 12.0, "images": 960, **used(96.0, 5)},
    ]
    found = run_cost(progress, 7)
    assert found.pop("trained_with") == progress.trained_with
    assert found == {
        "trainable_parameters": 7,
        "seconds": 16.0,
        "gpu_seconds": 100.0,
        "images_per_second": 62.5,
        "peak_memory_bytes": 9,
        "peak_gpu_memory_bytes": 90,
        "processes": 8,
    }


def test_runs_of_a_seed_add_up() -> None:
    first, second = Progress(images=100), Progress(images=50)
    first.spend(EIGHT, 10.0, used(80.0, 5))
    second.spend(ONE, 4.0, used(4.0, 9))
    runs = [run_cost(each, 7) for each in (first, second, first)]
    vain = spent_in_vain(3.0, on("cuda:0", 2))
    found = seed_cost([*runs, vain], [{"seconds": 2.0, "gpu_seconds": 16.0}], runs[1])
    assert (found["seconds"], found["gpu_seconds"], found["runs"]) == (29.0, 186.0, 4)
    assert (found["peak_memory_bytes"], found["peak_gpu_memory_bytes"]) == (9, 90)
    assert (found["images_per_second"], found["processes"]) == (12.5, 1)
    assert [(part["processes"], part["seconds"], part["images"]) for part in found["trained_with"]] == [
        (8, 20.0, 200),
        (1, 4.0, 50),
    ]
    assert merged([]) == []


def test_settings_are_said() -> None:
    assert describe_settings(EIGHT) == "8 processes on big, sharded"
    assert describe_settings(ONE) == "1 process on big, --micro 4, --checkpointing"
    assert cost_notes([{**ONE, "seconds": 4.0}], ONE) == []
    (note,) = cost_notes([{**EIGHT, "seconds": 12.0}, {**ONE, "seconds": 4.0}], ONE)
    assert note == (
        "trained with 8 processes on big, sharded (12 s); 1 process on big, --micro 4, --checkpointing (4 s): time and "
        "memory are of that; this command has 1 process on big, --micro 4, --checkpointing, and to measure these give "
        "another folder by --runs"
    )


def test_a_gpu_is_asked_about_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not whichever is the current one."""
    asked: list[tuple[str, Any]] = []
    for name, answer in (
        ("reset_peak_memory_stats", None),
        ("max_memory_allocated", 5),
        ("get_device_name", "big"),
    ):
        monkeypatch.setattr(
            torch.cuda, name, lambda *given, name=name, answer=answer: asked.append((name, *given)) or answer
        )
    team = on("cuda:1", 8)
    monkeypatch.setattr(team, "objects", lambda mine: [mine, (mine[0] - 1, 7)])
    reset_peak(team)
    found = spent_on(team, 2.0)
    assert (found["gpu_seconds"], found["peak_gpu_memory_bytes"]) == (16.0, 7)
    assert settings_of(team, None, False, True) == EIGHT
    assert [each[1:] for each in asked] == [("cuda:1",)] * 3
    asked.clear()
    alone = Team()
    reset_peak(alone)
    assert spent_on(alone, 2.0)["gpu_seconds"] == 0
    assert settings_of(alone, 4, True, False)["device"] == "cpu"
    assert asked == []


# Runs


def test_a_finished_run_keeps_its_cost(task: Task, tmp_path: Path) -> None:
    plain, _ = tune(task, tmp_path, replace(FAST, epochs=1), **METHOD)
    again, _ = tune(task, tmp_path, replace(FAST, epochs=1, micro=2), **METHOD)
    assert again.cost == plain.cost
    assert (plain.asked["micro"], again.asked["micro"]) == (None, 2)
    assert again.settings["recipe"]["micro"] is None  # of what was trained
    (part,) = again.cost["trained_with"]
    assert {name: part[name] for name in plain.asked} == plain.asked
    assert part["images"] == again.progress.images == 24


def test_an_attempt_that_was_killed_counts(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch, calls = Run._epoch, []

    def killed(self: Run) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KilledError
        epoch(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_epoch", killed)
        with pytest.raises(KilledError):
            tune(task, tmp_path, FAST, **METHOD)
    path = tmp_path / "checkpoints" / "state.json"
    (before,) = files.unseal(path.read_bytes(), path)["progress"]["trained_with"]
    result, _ = tune(task, tmp_path, replace(FAST, micro=3), **METHOD)
    first, second = result.progress.trained_with
    assert first == before
    assert [part["micro"] for part in (first, second)] == [None, 3]
    assert [part["images"] for part in (first, second)] == [24, 24]
    assert first["seconds"] + second["seconds"] == pytest.approx(result.progress.seconds)
    assert result.settings["recipe"]["micro"] == 3  # the last


@pytest.mark.parametrize("stops", [True, False])
def test_a_run_that_an_older_version_began_goes_on(stops: bool, task: Task, tmp_path: Path) -> None:
    if stops:
        with pytest.raises(Stopped):
            tune(task, tmp_path, FAST, stop=After(5), **METHOD)
    else:
        tune(task, tmp_path, FAST, **METHOD)
    path = tmp_path / "checkpoints" / "state.json"
    body = files.unseal(path.read_bytes(), path)
    seconds, images = (body["progress"][name] for name in ("seconds", "images"))
    del body["progress"]["trained_with"]
    path.write_bytes(files.sealed(body))
    result, _ = tune(task, tmp_path, FAST, **METHOD)
    old, *new = result.progress.trained_with
    assert old == {"device": "not known", "seconds": seconds, "images": images}
    assert [part["images"] for part in new] == ([48 - images] if stops else [])
    assert (0 < images < 48) is stops
    assert result.cost["gpu_seconds"] == 0
    (note,) = cost_notes(result.cost["trained_with"], result.asked)
    assert note.startswith(
        "trained with settings that its version did not keep (GPU time is not known and not counted)"
    )
    # What it knew of memory stands beside the run.
    beside = tmp_path / "cost.json"
    beside.write_text('{"peak_memory_bytes": 123456789012, "peak_gpu_memory_bytes": 7}')
    for _ in range(2):
        assert keep_cost(result.cost, beside, Team())["peak_memory_bytes"] == 123456789012


def test_what_comes_before_adds_up(tmp_path: Path) -> None:
    arm = Arm(
        source=describe("tiny-random"),
        identity={},
        settled=request().settled,
        features="cls",
        work=WorkConfig(),
        team=on("cuda:0", 8),
        root=tmp_path,
    )
    assert read_before(arm, "start") == {"seconds": 0.0, "gpu_seconds": 0.0}
    with pytest.raises(Stopped), paying(arm, "start"):
        raise Stopped("asked", 75)
    (tmp_path / "cost.json").write_text('{"start": {"seconds": 10.0, "gpu_seconds": 80.0}, "parity": 3.0}')
    arm.team.world = 1
    with paying(arm, "start"):
        pass
    found = read_before(arm, "start")
    assert found["seconds"] >= 10
    assert found["gpu_seconds"] == pytest.approx(70 + found["seconds"], abs=2e-3)
    assert read_before(arm, "parity") == {"seconds": 3.0, "gpu_seconds": 0.0}


def test_a_record_says_what_it_was_trained_with(store: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"runs": tmp_path / "runs", "results": tmp_path / "results", "start": "random"}
    (plain,) = evaluate(store, **options)
    (again,) = evaluate(store, micro=2, checkpointing=True, **options)
    assert again["cost"] == plain["cost"]
    assert again["config"]["work"]["checkpointing"]  # what was asked for
    assert not again["choices"]["training"]["checkpointing"]  # what it was trained with
    assert again["metrics"] == plain["metrics"]
    assert not any("trained with" in note for note in plain["notes"])
    said = "this command has 1 process on cpu, --micro 2, --checkpointing, and to measure these give another folder"
    assert any(note.startswith("trained with 1 process on cpu (") and said in note for note in again["notes"])
    (other,) = evaluate(store, micro=2, checkpointing=True, **{**options, "runs": tmp_path / "others"})
    assert not any("trained with" in note for note in other["notes"])
    (part,) = other["cost"]["trained_with"]
    assert (part["micro"], part["checkpointing"], part["processes"]) == (2, True, 1)
    # A second seed is trained as the command says, the first one stays.
    first, second = evaluate(store, micro=2, seeds=2, **options)
    assert first["cost"]["trained_with"] == plain["cost"]["trained_with"]
    assert [part["micro"] for part in second["cost"]["trained_with"]] == [2]
    assert not any("trained with" in note for note in second["notes"])
