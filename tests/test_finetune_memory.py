"""Without memory fine-tuning says what was too much and what takes less; the same command goes on with that."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from finetunes import QUICK, evaluate, request
from test_tuning_ranks import fork
from tuning_runs import pictures
from typer.testing import CliRunner

from cli.main import _probe_app
from featstore.backbones import describe
from featstore.errors import DeviceError, StoreError
from probes.finetune_arm import Arm
from probes.finetune_config import WorkConfig
from probes.finetune_memory import advised, describe_lack
from probes.tuning_loop import Run
from probes.tuning_ranks import Team

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)
GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("memory"))


def fail_at(patch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """One step of a run fails."""
    real, calls = Run._step, []

    def failing(self: Run, *given: Any) -> float:
        calls.append(1)
        if len(calls) == step:
            raise error
        return real(self, *given)

    patch.setattr(Run, "_step", failing)


def test_it_is_said_and_the_same_command_goes_on(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"runs": tmp_path / "runs", "results": tmp_path / "results", "epochs": 2}
    with monkeypatch.context() as patch:
        fail_at(patch, 3, RuntimeError(CPU))  # the first of the second epoch
        with pytest.raises(
            DeviceError,
            match=r"^this machine has no memory for linear-online with --batch 12, 12 at once, 42x42 pixels, float32 "
            r"\(\[enforce fail .* DefaultCPUAllocator: can't allocate memory: .*\); give --micro 6 or --checkpointing, "
            r"and the same command goes on from the last checkpoint; --compute-dtype bfloat16, a smaller --res or "
            r"model make another run that takes less$",
        ):
            evaluate(store, **options)
    with caplog.at_level("INFO", "probes.tuning_loop"):
        (record,) = evaluate(store, micro=6, checkpointing=True, **options)
    assert "going on from epoch 2, step 0" in caplog.text
    assert [part["images"] for part in record["cost"]["trained_with"]] == [24, 24]


def lack(
    device: str = "cuda:1", world: int = 1, *, moves: bool = False, precision: str = "float32", **work: Any
) -> Arm:
    """An arm of batches of 30 images on a GPU."""
    team = Team()
    team.device, team.world = device, world
    return Arm(
        source=describe("tiny-random"),
        identity={"preprocess": {"width": 512, "height": 256}},
        settled=request(method="full", batch=30, compute_dtype=precision).settled,
        features="cls",
        work=WorkConfig(**work),
        team=team,
        root=Path("none"),
        moves=moves,
    )


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        (lack(), "cuda:1 has no memory for full with --batch 30, 30 at once, 512x256 pixels, float32 (CUDA out of"),
        (lack(world=8), "--batch 30, 4 at once, 512x256 pixels, float32, 8 processes ("),
        (lack(world=8), "; give --micro 2 or --checkpointing, and the same"),
        (lack(micro=7), "; give --micro 3 or --checkpointing, and the same"),
        (lack(micro=64), "--batch 30, 30 at once"),
        (lack(micro=1), "; give --checkpointing, and the same"),
        (lack(micro=1, checkpointing=True), "); --compute-dtype bfloat16, a smaller --res or model make another run"),
        (lack(micro=1, checkpointing=True, precision="bfloat16"), "); a smaller --res or model makes another run that"),
        # What batch norms see decides about the result, and they cannot be computed twice.
        (
            lack(moves=True, micro=5),
            "); --micro 2, --compute-dtype bfloat16, a smaller --res or model make another run",
        ),
        (lack(moves=True, micro=2), "); --compute-dtype bfloat16, a smaller --res or model make another run"),
    ],
)
def test_what_takes_less_follows_from_what_was_asked(arm: Any, said: str) -> None:
    assert said in describe_lack(arm, torch.OutOfMemoryError(GPU))


def test_memory_of_the_machine_is_not_that_of_a_gpu() -> None:
    assert describe_lack(lack(), RuntimeError(CPU)).startswith("this machine has no memory")
    assert "float32 (MemoryError); give" in describe_lack(lack(), MemoryError())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(GPU), MemoryError(), RuntimeError(CPU)])
def test_errors_of_memory(error: BaseException) -> None:
    with pytest.raises(DeviceError, match="has no memory for full") as raised, advised(lack()):
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), StoreError(CPU), DeviceError(CPU), ValueError(CPU)],
)
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, advised(lack()):
        raise error
    assert raised.value is error


def test_the_command_ends_as_with_any_error(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the check of bfloat16, too."""
    fail_at(monkeypatch, 1, torch.OutOfMemoryError(GPU))
    given = {**QUICK, "start": "random", "compute_dtype": "bfloat16", "runs": tmp_path / "runs"}
    runner = CliRunner(env={"FEATSTORE_HOME": str(store), "COLUMNS": "200"})
    done = runner.invoke(
        _probe_app(), ["finetune", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]
    )
    assert done.exit_code == 2
    assert "error: cpu has no memory" not in done.output
    assert "error: this machine has no memory for linear-online with --batch 12" in done.output
    assert "Traceback" not in done.output


# Real processes


def run_short(store: Path, folder: Path) -> None:
    """A run in a process whose memory is limited to a little more than it has."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    options: dict[str, Any] = {"method": "full", "res": "448", "batch": 24, "start": "random", "runs": folder}
    resource.setrlimit(resource.RLIMIT_AS, (size + 400 * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with pytest.raises(DeviceError, match=r"24 at once, 448x448 pixels, float32 \(.*memory.*\); give --micro 12 or"):
        evaluate(store, results=folder / "results", **options)
    evaluate(store, results=folder / "results", micro=1, checkpointing=True, **options)


@pytest.mark.slow
def test_a_process_that_has_too_little(store: Path, tmp_path: Path) -> None:
    fork(1, lambda: run_short(store, tmp_path))


def run_one_of_two(store: Path, folder: Path) -> None:
    """The second process has no memory for its second step; the first one must not wait for it for ever."""
    signal.alarm(100)
    patch = pytest.MonkeyPatch()
    options: dict[str, Any] = {"start": "random", "epochs": 2, "runs": folder, "results": folder / "results"}
    if os.environ["RANK"] == "1":
        fail_at(patch, 2, RuntimeError(CPU))
        with pytest.raises(DeviceError, match=r"6 at once, .*, 2 processes .* give --micro 3 or --checkpointing"):
            evaluate(store, **options)
    else:
        with pytest.raises(RuntimeError) as raised:
            evaluate(store, **options)
        assert "no memory" not in str(raised.value)


def test_a_process_without_memory_ends_the_team(store: Path, tmp_path: Path) -> None:
    fork(2, lambda: run_one_of_two(store, tmp_path))
