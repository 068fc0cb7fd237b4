"""`--engine ray` on real local Ray clusters: the bytes of one process, whoever is killed, frozen or stopped."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pictures import CONFIG, register_pictures, tree_bytes
from s3_server import serving

from featstore.configs import RunConfig, SetConfig
from featstore.errors import FeatstoreError, ManifestError
from featstore.extraction.pipeline import Hooks, Summary, extract
from featstore.extraction.plan import make_plan
from featstore.extraction.ray_engine import import_ray, run_on_ray
from featstore.objects import parse_place
from featstore.register import register
from featstore.store.catalog import Store
from featstore.store.verify import verify_set

ROOT = Path(__file__).resolve().parent.parent
TINY = SetConfig(model="tiny", res="42", block_rows=16)
SLOWER = replace(TINY, res="98", tokens="cls,mean_patch,patches")
LOCAL = RunConfig(batch_size=8, workers=1, device="cpu")
RAY = replace(LOCAL, engine="ray", actors=3, patience=20.0)

# The command as a process of its own: arguments are the store and how many actors.
DRIVER = """
import sys
from pathlib import Path
from featstore.configs import RunConfig, SetConfig
from featstore.extraction.pipeline import Hooks
from featstore.extraction.plan import make_plan
from featstore.extraction.ray_engine import run_on_ray
from featstore.objects import parse_place
from featstore.store.catalog import Store

if __name__ == "__main__":
    config = SetConfig(model="tiny", res=sys.argv[3], block_rows=16, tokens=sys.argv[4])
    run = RunConfig(batch_size=8, workers=1, device="cpu", engine="ray", actors=int(sys.argv[2]))
    plan = make_plan(Store(parse_place(sys.argv[1])), "pics", config, run)
    [summary] = run_on_ray([plan], run, Hooks(advance=lambda *done: print("done", *done, flush=True)))
    print("computed", summary.computed, "failed", summary.failed, flush=True)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one machine that says it has six cores: room for three actors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_enable_worker_prestart", "0")  # six idle workers take longer to start than the tests
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        ray = import_ray()
        ray.init(num_cpus=6, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
        yield ray
        ray.shutdown()


def on_ray(store: Path, config: SetConfig = TINY, run: RunConfig = RAY, **hooks: Any) -> Summary:
    [summary] = run_on_ray([make_plan(Store(store), "pics", config, run)], run, Hooks(**hooks))
    return summary


def alone(store: Path, other: Path, config: SetConfig = TINY) -> dict[str, bytes]:
    """The set as one process makes it, in another store with the same manifest."""
    shutil.copytree(store / "datasets", other / "datasets")
    extract(make_plan(Store(other), "pics", config, LOCAL), LOCAL)
    return tree_bytes(folder_of(other))


def folder_of(store: Path) -> Path:
    [folder] = [path.parent for path in (store / "sets").glob("*/*/spec.json")]
    return folder


def workers() -> list[int]:
    """Process ids of the actors that this process's cluster runs; Ray names them after their class."""
    children: dict[int, list[tuple[int, str]]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            title = (path / "cmdline").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append((int(path.name), title))
    found, waiting = [], [os.getpid()]
    while waiting:
        for process, title in children.get(waiting.pop(), []):
            waiting.append(process)
            if title.startswith("ray::Actor"):
                found.append(process)
    return found


def start_driver(store: str, actors: int, config: SetConfig = TINY) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, store, str(actors), str(config.res), config.tokens],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_prestart_worker_first_driver": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_real_actors_write_the_set_of_one_process(cluster: Any, tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 70)
    expected = alone(store_path, tmp_path / "alone")
    told: list[tuple[int, int]] = []
    summary = on_ray(store_path, run=replace(RAY, actors=2), advance=lambda *done: told.append(done))
    assert tree_bytes(folder_of(store_path)) == expected
    assert (summary.computed, summary.failed, summary.blocks) == (70, 0, 5)
    assert [sum(done) for done in zip(*told)] == [70, 0]
    assert summary.how["engine"] == "ray"
    assert summary.how["actors_died"] == 0


@pytest.mark.slow
def test_actors_killed_in_flight(cluster: Any, tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 900)
    expected = alone(store_path, tmp_path / "alone", SLOWER)
    rng, killed, done = random.Random(0), [0], [0]

    def kill(images: int, failed: int) -> None:
        done[0] += images
        if killed[0] < 6 and done[0] > 100 * (killed[0] + 1) and (running := workers()):
            os.kill(rng.choice(running), signal.SIGKILL)
            killed[0] += 1

    summary = on_ray(store_path, SLOWER, advance=kill)
    assert killed[0] >= 4
    assert summary.how["actors_died"] >= 4
    assert summary.computed == done[0] == 900
    assert tree_bytes(folder_of(store_path)) == expected
    [entry] = Store(store_path).find("pics", "tiny@98")
    assert verify_set(Store(store_path), entry, deep=True).ok


@pytest.mark.slow
def test_a_frozen_actor_is_done_without_and_wakes_up_late(cluster: Any, tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 400)
    expected = alone(store_path, tmp_path / "alone", SLOWER)
    frozen: list[int] = []

    def freeze(images: int, failed: int) -> None:
        if not frozen and len(running := workers()) > 1:
            frozen.append(running[0])
            os.kill(running[0], signal.SIGSTOP)

    try:
        summary = on_ray(store_path, SLOWER, replace(RAY, actors=2, patience=5.0), advance=freeze)
        assert frozen
        assert summary.computed == 400
        assert tree_bytes(folder_of(store_path)) == expected
    finally:
        for process in frozen:
            os.kill(process, signal.SIGCONT)
    time.sleep(3)
    assert tree_bytes(folder_of(store_path)) == expected


@pytest.mark.slow
def test_errors_of_real_actors_keep_their_class(cluster: Any, tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 60)
    for path in sorted((tmp_path / "data" / "images").iterdir())[::10]:
        path.write_bytes(b"broken")
    register(store_path, "pics", tmp_path / "data", CONFIG)
    with pytest.raises(FeatstoreError, match=r"could not be decoded, more than --max-failed 1% allows"):
        on_ray(store_path, run=replace(RAY, actors=2, max_failed="1%"))
    plan = make_plan(Store(store_path), "pics", TINY, RAY)
    (tmp_path / "data" / "images" / "00055.png").unlink()
    with pytest.raises(ManifestError, match=r"1 files changed since registration, such as images/00055.png"):
        run_on_ray([plan], replace(RAY, actors=2), Hooks())  # as itself, not as an error of Ray


@pytest.mark.slow
def test_a_killed_driver_takes_its_actors_along(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 600)
    expected = alone(store_path, tmp_path / "alone", SLOWER)
    driver = start_driver(str(store_path), 2, SLOWER)
    assert driver.stdout is not None
    seen = 0
    for line in driver.stdout:
        seen += int(line.split()[1])
        if seen > 100:
            break
    driver.kill()
    driver.communicate()
    assert 0 < len(make_plan(Store(store_path), "pics", SLOWER, LOCAL).todo) < 600
    again = start_driver(str(store_path), 3, SLOWER)
    output, errors = again.communicate(timeout=500)
    assert again.returncode == 0, errors
    computed = int(output.splitlines()[-1].split()[1])
    assert computed < 600
    assert tree_bytes(folder_of(store_path)) == expected


@pytest.mark.slow
def test_a_store_in_a_bucket(tmp_path: Path, store_path: Path) -> None:
    with serving() as server:  # what its variables say must be there before the cluster is started
        place = server.prefix()
        register_pictures(store_path, tmp_path / "data", 70)
        extract(make_plan(Store(store_path), "pics", TINY, LOCAL), LOCAL)

        register(place, "pics", tmp_path / "data", CONFIG)
        driver = start_driver(str(place), 2)
        output, errors = driver.communicate(timeout=500)
        assert driver.returncode == 0, errors
        assert output.splitlines()[-1] == "computed 70 failed 0"
        features = Store(parse_place(str(place)))["pics", "tiny@42"]
        assert (features.load() == Store(store_path)["pics", "tiny@42"].load()).all()
        there = {
            path.relative_to(features.folder).as_posix(): path for path in features.folder.glob("data.zarr/cls/c/*/*")
        }
        here = folder_of(store_path)
        assert there
        assert {name: path.read_bytes() for name, path in there.items()} == {
            name: (here / name).read_bytes() for name in there
        }


@pytest.mark.slow  # a cluster that starts while other tests run may take longer than Ray waits
def test_signals_of_the_command_stay_its_own(cluster: Any) -> None:
    """Ray would take SIGTERM: the run's own handler is back when the cluster has been started."""
    assert threading.current_thread() is threading.main_thread()
    from featstore.extraction.ray_engine import kept_signals

    before = signal.getsignal(signal.SIGTERM)
    with kept_signals():
        signal.signal(signal.SIGTERM, lambda *_: None)
    assert signal.getsignal(signal.SIGTERM) is before
