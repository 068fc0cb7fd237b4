"""`probes finetune` on two processes: losses, scores and weights as on one, and no hanging where one is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetune_commands import arguments
from forked import ALWAYS, ROOT, At, Commands, shared
from safetensors.torch import load_file
from tuning_runs import pictures

from probes.records import load_predictions

LIMIT = 1e-5
# Without -- the launcher takes --start and --r, which begin names of several of its own options, for its own.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# 24 training images in batches of 7, 7, 7 and 3, in pieces of 2: both processes have rows that do not count.
UNEVEN: dict[str, Any] = {"batch": 7, "micro": 2, "seeds": 1}
SGD = {"optimizer": "sgd", "lr": "1e-2"}
ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "full-sgd": SGD,
    "full-linear-start": {"start": "linear", "class_weight": "balanced", "keep": "auroc", "ema": 0.5},
    "lora": {"method": "lora", "r": 4, "dropout": 0, "lr": "1e-3,1e-2"},  # what is dropped is drawn by each process
    "last-k-from-cache": {"method": "last-k", "k": 2, "from_cache": True, "flip": "off", "degrees": 0},
    "bitfit-refit": {"method": "bitfit", "refit": True},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def server() -> Commands:
    return shared()


def check_close(runs: Path, records: list[dict[str, Any]], one: Path, expected: list[dict[str, Any]]) -> None:
    assert len(records) == len(expected)
    for found, wanted in zip(records, expected, strict=True):
        assert (found["cost"]["processes"], wanted["cost"]["processes"]) == (2, 1)
        for name, values in wanted["choices"]["history"].items():
            np.testing.assert_allclose(found["choices"]["history"][name], values, rtol=0, atol=LIMIT)
        assert found["choices"]["said"] == wanted["choices"]["said"]
        for split in ("val", "test"):
            areas = [record["metrics"][split]["macro"]["auroc"] for record in (found, wanted)]
            assert areas[0] == pytest.approx(areas[1], abs=LIMIT)
        tables = [load_predictions(record) for record in (found, wanted)]
        assert tables[0]["id"].equals(tables[1]["id"])
        for label in wanted["task"]["labels"]:
            scores = [table[f"score:{label}"].to_numpy() for table in tables]
            np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=LIMIT)
    folders = {path.parent.relative_to(one) for path in one.rglob("model.safetensors")}
    assert folders == {path.parent.relative_to(runs) for path in runs.rglob("model.safetensors")}
    assert folders
    for folder in folders:
        for name in ("model.safetensors", "head.safetensors"):
            first, second = load_file(one / folder / name), load_file(runs / folder / name)
            assert first.keys() == second.keys()
            assert max(float((first[key] - second[key]).abs().max()) for key in first) <= LIMIT


def test_two_processes_equal_one(store: Path, server: Commands, tmp_path: Path) -> None:
    """The rank of the second one is killed first: the other one fails and does not wait for it."""
    one, two = tmp_path / "one", tmp_path / "two"
    expected = server.run(arguments(store, one, **UNEVEN, **SGD)).records
    assert expected[0]["choices"]["history"]["train_loss"][1] < expected[0]["choices"]["history"]["train_loss"][0]
    given = arguments(store, two, **UNEVEN, **SGD)
    first, second = server.team(given, 2, at={1: At("probes.tuning_loop", "Run._epoch", 2)})
    assert second.end().code == -signal.SIGKILL
    assert first.end(60).code not in (0, 75)
    first, second = (child.end() for child in server.team(given, 2))
    check_close(two, first.records, one, expected)
    assert "going on from epoch 2, step 0" in first.err
    assert (second.code, second.out, second.err) == (0, "", "")  # one process speaks, and JSON is whole
    # Read again by one process, cost is that of the two that trained.
    (again,) = server.run(given).records
    assert again["cost"] == first.records[0]["cost"]
    (part,) = again["cost"]["trained_with"]
    assert (part["processes"], part["micro"], part["images"]) == (2, 2, 48)
    (note,) = [text for text in again["notes"] if text.startswith("trained with")]
    assert re.match(r"trained with 2 processes on cpu, --micro 2 \(.* s\): .* this command has 1 process on cpu", note)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_every_method(arm: str, store: Path, server: Commands, tmp_path: Path) -> None:
    options = {**UNEVEN, **ARMS[arm]}
    expected = server.run(arguments(store, tmp_path / "one", **options)).records
    ended = [child.end() for child in server.team(arguments(store, tmp_path / "two", **options), 2)]
    assert ended[1].code == 0, ended[1].err
    check_close(tmp_path / "two", ended[0].records, tmp_path / "one", expected)


def torchrun(given: list[str], **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*TORCHRUN, "-m", "--", "probes", *given], cwd=ROOT, env={**os.environ, **ALWAYS}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True, **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("method", "shard"), [("full", False), ("full", True), ("lora", True)])
def test_torchrun(method: str, shard: bool, store: Path, server: Commands, tmp_path: Path) -> None:
    """By the launcher itself, DDP and FSDP2; what is sharded is exported whole."""
    options = {**UNEVEN, **ARMS[method]}
    expected = server.run(arguments(store, tmp_path / "one", **options)).records
    given = arguments(store, tmp_path / "two", **options, **({"shard": True} if shard else {}))
    out, err = (process := torchrun(given)).communicate(timeout=400)
    assert process.returncode == 0, err
    records = json.loads(out)
    assert records[0]["choices"]["training"]["sharded"] is shard
    check_close(tmp_path / "two", records, tmp_path / "one", expected)
    assert err.count("run 1 of") == 1


def wait_for_epoch(runs: Path, process: "subprocess.Popen[str]") -> None:
    while not list(runs.glob("pics/*/*/*/checkpoints/state.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_lost_rank_ends_the_command(shard: bool, store: Path, server: Commands, tmp_path: Path) -> None:
    """It goes on with one process or with two afterwards."""
    options = {**UNEVEN, "epochs": 6, "patience": 0}
    expected = server.run(arguments(store, tmp_path / "one", **options)).records
    runs = tmp_path / "two"
    given = arguments(store, runs, **options)
    process = torchrun([*given, "--shard"] if shard else given)
    wait_for_epoch(runs, process)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[0 if shard else 1]), signal.SIGKILL)
    started = time.monotonic()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert time.monotonic() - started < 120
    assert "SIGKILL" in err
    if shard:
        out, err = (process := torchrun(given)).communicate(timeout=400)
        assert process.returncode == 0, err
        check_close(runs, json.loads(out), tmp_path / "one", expected)
    else:
        (record,) = server.run(given).records
        np.testing.assert_allclose(
            record["choices"]["history"]["val_loss"], expected[0]["choices"]["history"]["val_loss"], rtol=0, atol=LIMIT
        )


@pytest.mark.slow
def test_asked_to_end_all_keep_one_checkpoint(store: Path, server: Commands, tmp_path: Path) -> None:
    """torchrun hands SIGTERM on, and its own status is 1 then."""
    options = {**UNEVEN, "epochs": 6, "patience": 0}
    expected = server.run(arguments(store, tmp_path / "one", **options)).records
    runs = tmp_path / "two"
    given = arguments(store, runs, **options)
    process = torchrun(given)
    wait_for_epoch(runs, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, out) == (1, "")
    assert "the same command goes on from there" in err
    out, err = (process := torchrun(given)).communicate(timeout=400)
    assert process.returncode == 0, err
    assert "going on from epoch" in err
    check_close(runs, json.loads(out), tmp_path / "one", expected)


def test_one_rank_is_asked_and_all_end(store: Path, server: Commands, tmp_path: Path) -> None:
    """The time budget of one is up first: all leave at the same step, and all say that it is not done."""
    given = arguments(store, tmp_path, **UNEVEN)
    at = At("probes.tuning_loop", "Run._step", 2, signal.SIGUSR1)
    first, second = (child.end() for child in server.team(given, 2, at={1: at}))
    assert (first.code, second.code) == (75, 75), first.err + second.err
    assert "stopped on another process; what is committed stays" in first.err
    (state,) = tmp_path.glob("pics/*/*/*/checkpoints/state.json")
    assert json.loads(state.read_text())["progress"]["step"] == 2
