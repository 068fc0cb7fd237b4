"""`probes finetune` in real processes: killed or asked to end at any moment, the same command gives the same bits."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_commands import arguments
from forked import ALWAYS, ROOT, At, Commands, shared
from tuning_runs import pictures

from probes.records import load_predictions

LOOP, STATE, RUN, FINETUNE = "probes.tuning_loop", "probes.tuning_state", "probes.tuning_run", "probes.finetune"
GOES_ON = "what is committed stays, the same command goes on from there"
# Two seeds of two epochs of three steps. Each is a call of a function at which the process is no more.
POINTS = {
    "first-epoch": At(LOOP, "Run._step", 2),
    "measuring": At(LOOP, "Run._judge", 1),
    "tensors-half-written": At(STATE, "google_crc32c.extend", 9),
    "tensors-not-named-yet": At(STATE, "files.sealed", 1),
    "named-not-pruned": At(STATE, "Checkpoints._prune", 2),
    "between-epochs": At(LOOP, "Run._epoch", 2),
    "first-export": At(RUN, "write_weights", 2),
    "second-seed": At(LOOP, "Run._step", 8),
    "second-export": At(RUN, "write_weights", 4),
    "before-records": At(FINETUNE, "keep_record", 1),
    "between-records": At(FINETUNE, "keep_record", 2),
}

LATE = At(LOOP, "Run._prepare", 1, 0)  # a budget of a second is used up before the first step


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def server() -> Commands:
    return shared()


@pytest.fixture(scope="module")
def undisturbed(store: Path, server: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    runs = tmp_path_factory.mktemp("undisturbed")
    return runs, server.run(arguments(store, runs)).records


def weights_of(runs: Path) -> dict[str, bytes]:
    """Exported weights, and what stands beside them for those who read them."""
    return {
        path.relative_to(runs).as_posix(): path.read_bytes()
        for path in sorted(runs.glob("pics/*/seed*/**/*"))
        if path.is_file() and path.parent.name != "checkpoints" and path.name != "cost.json"
    }


def check_same(runs: Path, records: list[dict[str, Any]], undisturbed: tuple[Path, Any]) -> None:
    whole, expected = undisturbed
    assert len(records) == len(expected)
    for found, wanted in zip(records, expected, strict=True):
        assert found["metrics"] == wanted["metrics"]
        for name in ("history", "tried", "said", "epoch"):
            assert found["choices"][name] == wanted["choices"][name]
        assert load_predictions(found).equals(load_predictions(wanted))
    weights, wanted_weights = weights_of(runs), weights_of(whole)
    assert sum(name.endswith("model.safetensors") for name in wanted_weights) == len(expected)
    assert weights.keys() == wanted_weights.keys()  # nothing half and no lock is left
    assert [name for name in weights if weights[name] != wanted_weights[name]] == []
    for folder in runs.glob("pics/*/*/*/checkpoints"):
        names = sorted(path.name[:5] for path in folder.iterdir())
        assert names == ["best-", "state"], folder  # of what the killed ones wrote nothing is left


def progress_of(runs: Path, seed: int = 0) -> dict[str, Any]:
    """Where a seed's run is; empty where nothing is kept."""
    found: dict[str, Any] = {}
    for path in runs.glob(f"pics/*/seed{seed}/*/checkpoints/state.json"):
        found = json.loads(path.read_text())["progress"]
    return found


def num_epochs(runs: Path) -> int:
    """Epochs that are committed, of all seeds."""
    return sum(progress_of(runs, seed).get("epoch", 0) for seed in range(2))


def test_killed_three_times(store: Path, server: Commands, tmp_path: Path, undisturbed: tuple[Path, Any]) -> None:
    for name in ("first-epoch", "tensors-half-written", "first-export"):
        ended = server.run(arguments(store, tmp_path), at=POINTS[name])
        assert ended.code == -signal.SIGKILL, name
        if name == "tensors-half-written":
            assert list(tmp_path.rglob("*.partial"))
    ended = server.run(arguments(store, tmp_path))
    check_same(tmp_path, ended.records, undisturbed)
    assert "run 2 of 2" in ended.err
    assert "epoch 2/2" not in ended.err.split("run 2 of 2")[0]  # what was finished is not trained again


def test_asked_to_end(store: Path, server: Commands, tmp_path: Path, undisturbed: tuple[Path, Any]) -> None:
    """By a scheduler, by Ctrl-C, and by the time budget, which lets every attempt get further."""
    given = arguments(store, tmp_path)
    ended = server.run(given, at=At(LOOP, "Run._step", 2, signal.SIGTERM))
    assert (ended.code, ended.out) == (143, "")
    assert ended.err.endswith(f"\nstopped by SIGTERM; {GOES_ON}\n")
    assert (progress_of(tmp_path)["epoch"], progress_of(tmp_path)["step"]) == (0, 2)
    ended = server.run([*given, "--time-budget", "1s"], at=LATE)
    assert ended.code == 75, ended.err
    assert f"the time budget of 1 s is used up; {GOES_ON}" in ended.err
    assert "going on from epoch 1, step 2" in ended.err
    assert (progress_of(tmp_path)["epoch"], progress_of(tmp_path)["step"]) == (0, 3)
    ended = server.run(given, at=At(LOOP, "Run._step", 4, signal.SIGINT))  # the first one of the second seed
    assert ended.code == 130
    assert ended.err.endswith(f"\nstopped by SIGINT; {GOES_ON}\n")
    assert "Traceback" not in ended.err
    assert progress_of(tmp_path)["finished"]
    assert progress_of(tmp_path, seed=1)["step"] == 1
    ended = server.run(given)
    check_same(tmp_path, ended.records, undisturbed)
    assert any("went on 2 times from a checkpoint" in note for note in ended.records[0]["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere(
    point: str, store: Path, server: Commands, tmp_path: Path, undisturbed: tuple[Path, Any]
) -> None:
    assert server.run(arguments(store, tmp_path), at=POINTS[point]).code == -signal.SIGKILL
    check_same(tmp_path, server.run(arguments(store, tmp_path)).records, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("point", ["measuring", "tensors-half-written", "between-epochs", "second-export"])
def test_signals_anywhere(
    point: str, number: int, store: Path, server: Commands, tmp_path: Path, undisturbed: tuple[Path, Any]
) -> None:
    """A checkpoint that is being written is finished; where nothing is open the signal ends the command at once."""
    ended = server.run(arguments(store, tmp_path), at=POINTS[point]._replace(number=int(number)))
    assert ended.code == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}[number]
    assert ended.err.endswith(f"\nstopped by {signal.Signals(number).name}; {GOES_ON}\n")
    assert not list(tmp_path.rglob("*.partial"))
    assert progress_of(tmp_path)
    check_same(tmp_path, server.run(arguments(store, tmp_path)).records, undisturbed)


@pytest.mark.slow
def test_attempts_of_no_time_come_to_the_end(
    store: Path, server: Commands, tmp_path: Path, undisturbed: tuple[Path, Any]
) -> None:
    """Each does a step or measures an epoch, so that a budget that is too small costs time only."""
    given, seen = [*arguments(store, tmp_path), "--time-budget", "1s"], []
    for _ in range(30):
        ended = server.run(given, at=LATE)
        if ended.code == 0:
            break
        assert ended.code == 75, ended.err
        seen.append((progress_of(tmp_path).copy(), progress_of(tmp_path, 1).copy()))
        places = [tuple((one.get("epoch", 0), one.get("step", 0)) for one in both) for both in seen]
        assert places == sorted(set(places))
    check_same(tmp_path, ended.records, undisturbed)
    assert len(seen) == 16  # of two seeds two epochs of three steps and a validation


@pytest.mark.slow
def test_twenty_kills_at_random(store: Path, server: Commands, tmp_path: Path) -> None:
    """Most of them soon after a moment when one more epoch was committed: while it steps, measures, writes, exports."""
    more = {"epochs": "12", "patience": "0"}
    whole = tmp_path / "whole"
    started = time.monotonic()
    undisturbed = (whole, server.run(arguments(store, whole, **more)).records)
    pace = (time.monotonic() - started) / 24
    rng, living, committed = random.Random(20), 0, []
    given = arguments(store, tmp_path / "runs", **more)
    for number in range(20):
        before = num_epochs(tmp_path / "runs")
        wanted = before + rng.randint(0, max(1, (24 - before) // (20 - number)))
        child = server.start(given)
        deadline = time.monotonic() + (rng.uniform(0, 2) if number % 5 == 4 else 120)
        while num_epochs(tmp_path / "runs") < wanted and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 2 * pace))
        living += child.poll() is None
        if child.poll() is None:
            child.kill()
        child.end()
        committed.append(num_epochs(tmp_path / "runs"))
        assert committed[-1] >= before
    records = server.run(given).records
    check_same(tmp_path / "runs", records, undisturbed)
    assert living >= 15
    assert len(set(committed)) >= 8  # they were killed at different places


@pytest.mark.slow
def test_the_command_itself(store: Path, tmp_path: Path, undisturbed: tuple[Path, Any]) -> None:
    """`python -m probes`, killed when it says or has written something: no server, nothing counted."""
    given = [sys.executable, "-m", "probes", *arguments(store, tmp_path / "runs")]
    runs = tmp_path / "runs"
    moments: list[tuple[str, Callable[[str], bool]]] = [
        ("first epoch", lambda err: "run 1 of 2" in err),
        ("an epoch is kept", lambda err: progress_of(runs).get("epoch", 0) == 1),
        ("weights are written", lambda err: bool(list(runs.glob("pics/*/seed0/*/head.safetensors")))),
        ("second seed", lambda err: "run 2 of 2" in err),
        ("a record is kept", lambda err: bool(list(runs.glob("results/*.parquet")))),
    ]
    for number, (name, reached) in enumerate(moments):
        path = tmp_path / f"err-{number}"
        with open(path, "w") as err:
            process = subprocess.Popen(
                given, cwd=ROOT, env={**os.environ, **ALWAYS}, stdout=subprocess.DEVNULL, stderr=err
            )
        deadline = time.monotonic() + 200
        while not reached(path.read_text()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert reached(path.read_text()), (name, path.read_text())
    done = subprocess.run(given, cwd=ROOT, env={**os.environ, **ALWAYS}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check_same(runs, json.loads(done.stdout), undisturbed)


@pytest.mark.slow
def test_two_of_the_same_at_once(store: Path, server: Commands, tmp_path: Path, undisturbed: tuple[Path, Any]) -> None:
    """One waits wherever the other one is at work, and takes what that has made."""
    given = arguments(store, tmp_path)
    first = server.start(given, at=At(LOOP, "Run._judge", 1, 0))  # slower at a place
    while not list(tmp_path.glob("pics/*/*/*/training.lock")):
        assert first.poll() is None
        time.sleep(0.002)
    ended = [child.end() for child in (server.start(given), first)]
    for each in ended:
        check_same(tmp_path, each.records, undisturbed)
    said = [each.err for each in ended]
    assert re.search(rf"another process \({first.pid} on .*\) trains in .*; waiting for its end", said[0])
    assert sum(text.count("epoch 1/2") for text in said) == 2  # each seed was trained once, by one of them
    # A killed one is not waited for.
    assert server.run([*given, "--seeds", "3"], at=At(LOOP, "Run._step", 2)).code == -signal.SIGKILL
    assert list(tmp_path.glob("pics/*/*/*/training.lock"))
    assert "waiting" not in server.run([*given, "--seeds", "3"]).err


@pytest.mark.slow
def test_records_that_cannot_be_written(
    store: Path, server: Commands, tmp_path: Path, undisturbed: tuple[Path, Any]
) -> None:
    """What was trained is kept: the same command with another folder scores and writes, and trains nothing."""
    (tmp_path / "file").write_text("x")
    given = arguments(store, tmp_path, results=tmp_path / "file" / "results")
    ended = server.run(given)
    assert ended.code == 2
    assert "records cannot be written here" in ended.err
    assert "pass --results FOLDER" in ended.err
    ended = server.run(arguments(store, tmp_path))
    check_same(tmp_path, ended.records, undisturbed)
    assert "epoch" not in ended.err


@pytest.mark.slow
def test_a_damaged_checkpoint_is_told(store: Path, server: Commands, tmp_path: Path) -> None:
    assert server.run(arguments(store, tmp_path), at=POINTS["second-seed"]).code == -signal.SIGKILL
    (best,) = tmp_path.glob("pics/*/seed0/*/checkpoints/best-*")
    data = bytearray(best.read_bytes())
    data[len(data) // 2] ^= 1
    best.write_bytes(data)
    ended = server.run(arguments(store, tmp_path))
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert f"remove {best.parent} and begin this run anew" in ended.err
