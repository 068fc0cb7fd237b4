"""Worker processes: the same images as threads, whatever dies."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_inputs import HostileInputs, UnreadableInputs
from pictures import register_pictures, tree_bytes, write_pictures
from PIL import Image

from featstore.configs import RunConfig, SetConfig
from featstore.errors import FeatstoreError, ManifestError
from featstore.extraction import workers
from featstore.extraction.loader import Job, Loader, Sample, load_image
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.extraction.recheck import recheck
from featstore.extraction.workers import CRASHED, WorkerPool
from featstore.images import PreprocessSpec
from featstore.images.opening import OpenFiles
from featstore.inputs import HASH_HEX, Inputs
from featstore.store.catalog import Store

SPEC = PreprocessSpec(geometry="squash", height=28, width=28, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 12)
    first = (folder / "images" / "00000.png").read_bytes()
    for name in ("crash.png", "once.png", "hang.png", "broken.png"):
        (folder / name).write_bytes(first)
    (folder / "bad.png").write_bytes(b"no image")
    pages = [Image.fromarray(np.full((30, 30), 10 * page, np.uint8)) for page in range(9)]
    for name in ("a.tif", "b.tif"):
        pages[0].save(folder / name, save_all=True, append_images=pages[1:])
    return folder


def sample(root: Path, path: str, part: str | None = None) -> Sample:
    return Sample(path, part, (root / path).stat().st_size)


@pytest.fixture(scope="module")
def pool(root: Path) -> Iterator[WorkerPool]:
    with WorkerPool(HostileInputs(root), SPEC, workers=2, decode_seconds=60.0) as opened:
        yield opened


def test_images_are_those_of_threads(root: Path, pool: WorkerPool) -> None:
    samples = [sample(root, f"images/{number:05d}.png") for number in range(12)] + [sample(root, "bad.png")]
    samples += [sample(root, "a.tif", f"frame={page}") for page in range(9)]
    futures = [pool.submit(one) for one in samples]
    inputs, opened = Inputs(root), OpenFiles()
    for one, future in zip(samples, futures):
        images, state = future.result(60)
        image = images[0] if images else None
        expected, expected_state = load_image(inputs, opened, one, SPEC)
        assert state == expected_state
        if expected is None or image is None:
            assert image is expected
        else:
            np.testing.assert_array_equal(image, expected)
            assert image.dtype == expected.dtype


def test_a_crash_costs_its_image_only(root: Path, pool: WorkerPool) -> None:
    names = ["images/00001.png", "crash.png", "images/00002.png"]
    results = [pool.submit(sample(root, name)) for name in names]
    images, state = results[1].result(60)
    assert images == []
    assert state.reason == CRASHED == "the decoder crashed"
    assert state.content == hashlib.sha256((root / "crash.png").read_bytes()).hexdigest()[:HASH_HEX]
    assert len(results[0].result(60)[0]) == len(results[2].result(60)[0]) == 1


@pytest.mark.slow
def test_an_image_is_tried_once_more(root: Path, pool: WorkerPool) -> None:
    assert pool.load(sample(root, "once.png"))[1].reason is None
    assert (root / "done").exists()


@pytest.mark.slow
def test_what_takes_too_long_is_ended(root: Path) -> None:
    with WorkerPool(HostileInputs(root), SPEC, workers=1, decode_seconds=2.0) as opened:
        image, state = opened.load(sample(root, "hang.png"))
    assert image is None
    assert state.reason == "decoding took more than 2 s"


def test_errors_that_stop_a_run_come_through(root: Path, pool: WorkerPool) -> None:
    with pytest.raises(ManifestError, match="gone since registration"):
        pool.load(Sample("images/none.png", None, 5))
    with pytest.raises(ManifestError, match="at registration"):
        pool.load(Sample("images/00001.png", None, 5))
    with pytest.raises(RuntimeError, match=r"KeyError while decoding broken\.png"):
        pool.load(sample(root, "broken.png"))
    assert pool.load(sample(root, "images/00001.png"))[0] is not None


def test_parts_of_one_file_go_to_one_worker(root: Path, pool: WorkerPool) -> None:
    for _ in range(2):
        futures = [pool.submit(sample(root, name, f"frame={page}")) for page in range(9) for name in ("a.tif", "b.tif")]
        assert [future.result(60)[1].reason for future in futures] == [None] * 18
    held = [worker.path for worker in pool._workers]
    assert len(set(held) - {None}) == len([path for path in held if path])


def test_workers_end_with_the_pool(root: Path) -> None:
    with WorkerPool(HostileInputs(root), SPEC, workers=1) as opened:
        opened.load(sample(root, "images/00001.png"))
        (pid,) = opened.pids
        late = opened.submit(sample(root, "hang.png"))
        time.sleep(0.1)
        started = time.monotonic()
    assert time.monotonic() - started < 10  # nobody waits for the hanging image
    with pytest.raises(FeatstoreError, match="the worker processes are closed"):
        late.result(5)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# A process that dies as soon as it is given an image: starting it costs no import of torch.
DYING = """
import os, sys, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
pipe.recv_bytes(), pipe.send("ready"), pipe.recv_bytes()
number = int(sys.argv[2])
if number < 0:
    pipe.close(), time.sleep(100)
os.kill(os.getpid(), number) if number else sys.exit(3)
"""


def start_dying(monkeypatch: pytest.MonkeyPatch, *signals: int, program: str = DYING) -> list[int]:
    """Make every worker such a process, with one of these signals each in turn; returns those that were started."""
    started: list[int] = []

    def start(pipe: Any) -> "subprocess.Popen[bytes]":
        started.append(signals[len(started) % len(signals)])
        os.set_inheritable(pipe.fileno(), True)
        arguments = [sys.executable, "-S", "-c", program, str(pipe.fileno()), str(int(started[-1]))]
        return subprocess.Popen(arguments, pass_fds=(pipe.fileno(),))

    monkeypatch.setattr(workers, "_start", start)
    return started


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_killed_from_outside_stop_the_run(root: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    started = start_dying(monkeypatch, number)
    with (
        WorkerPool(Inputs(root), SPEC, workers=1) as opened,
        pytest.raises(FeatstoreError, match=f"ended by signal {int(number)}, as when memory runs out; use fewer --wor"),
    ):
        opened.load(sample(root, "images/00001.png"))
    assert len(started) == 2


@pytest.mark.parametrize(
    ("signals", "starts"),
    [
        ([signal.SIGSEGV], 2),
        ([signal.SIGABRT], 2),
        ([0], 2),
        ([signal.SIGKILL, signal.SIGBUS, signal.SIGFPE], 3),  # one kill by chance
    ],
)
def test_codecs_that_end_themselves_cost_the_image(
    root: Path, monkeypatch: pytest.MonkeyPatch, signals: list[int], starts: int
) -> None:
    started = start_dying(monkeypatch, *signals)
    with WorkerPool(Inputs(root), SPEC, workers=1) as opened:
        assert opened.load(sample(root, "images/00001.png"))[1].reason == CRASHED
    assert len(started) == starts


def test_a_kill_of_ours_is_not_taken_for_one_from_outside(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "EXIT_SECONDS", 0.1)
    start_dying(monkeypatch, -1)  # closes its pipe and goes on
    with WorkerPool(Inputs(root), SPEC, workers=1) as opened:
        assert opened.load(sample(root, "images/00001.png"))[1].reason == CRASHED


def test_workers_killed_before_they_are_ready_are_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = start_dying(monkeypatch, signal.SIGKILL, program="import os; os.kill(os.getpid(), 9)")
    with (
        WorkerPool(Inputs(root), SPEC, workers=1) as opened,
        pytest.raises(FeatstoreError, match="did not start: ended by signal 9, as when memory runs out"),
    ):
        opened.load(sample(root, "images/00001.png"))
    assert len(started) == workers.STARTS


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(root: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from hostile_inputs import HostileInputs\n"
        "from featstore.extraction.workers import WorkerPool; from featstore.extraction.loader import Sample\n"
        "from featstore.images import PreprocessSpec\n"
        "root = Path(sys.argv[1]); spec = PreprocessSpec(geometry='squash', height=8, width=8, mean=(0.5,) * 3, "
        "std=(0.5,) * 3)\n"
        "pool = WorkerPool(HostileInputs(root), spec, workers=1)\n"
        "pool.submit(Sample('images/00000.png', None, (root / 'images/00000.png').stat().st_size)).result(60)\n"
        "pool.submit(Sample('hang.png', None, (root / 'hang.png').stat().st_size))\n"
        "time.sleep(0.2); print(pool.pids[0], flush=True); time.sleep(100)\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def test_a_worker_that_cannot_start_is_told(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        WorkerPool(UnreadableInputs(root), SPEC, workers=1) as opened,
        pytest.raises(FeatstoreError, match="a worker process did not start"),
    ):
        opened.load(Sample("images/00000.png", None, 1))
    assert "no number" in capfd.readouterr().err


def stress(root: Path, kills: int, *, seed: int = 0) -> None:
    """Kill random workers at random moments; every image comes, or the error says that somebody killed."""
    generator = random.Random(seed)
    inputs, opened = Inputs(root), OpenFiles()
    paths = [f"images/{number:05d}.png" for number in range(12)]
    expected = {path: load_image(inputs, opened, sample(root, path), SPEC)[0] for path in paths}
    done = threading.Event()
    with WorkerPool(inputs, SPEC, workers=2) as pool:

        def kill() -> None:
            for _ in range(kills):
                time.sleep(generator.uniform(0, 0.1))
                for pid in pool.pids[: generator.randint(1, 2)]:
                    with contextlib.suppress(ProcessLookupError):  # replaced just now
                        os.kill(pid, signal.SIGKILL)
            done.set()

        killer = threading.Thread(target=kill)
        pool.load(sample(root, paths[0]))
        killer.start()
        while not done.is_set():
            futures = [(path, pool.submit(sample(root, path))) for path in paths]
            for path, future in futures:
                if (error := future.exception(120)) is not None:
                    assert "ended by signal 9" in str(error)
                    continue
                images, state = future.result()
                assert state.reason is None
                np.testing.assert_array_equal(images[0], expected[path])
        killer.join()
        assert pool.load(sample(root, paths[0]))[0] is not None


@pytest.mark.slow
def test_no_deadlock_when_many_workers_are_killed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "STARTS", 1000)  # they die faster than they start
    stress(root, kills=3)
    for seed in range(5):
        stress(root, kills=40, seed=seed)


@pytest.mark.slow
def test_sets_are_equal_to_those_of_threads(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 20)
    trees = []
    for kind in ("thread", "process"):
        count = 2 if kind == "thread" else 1
        run = RunConfig(batch_size=8, workers=count, device="cpu", worker_type=kind)
        config = SetConfig(model="tiny", res="42", block_rows=16)
        extract(make_plan(Store(store_path), "pics", config, run), run)
        folder = Store(store_path)["pics", "tiny@42"].folder
        trees.append(tree_bytes(folder))
        Store(store_path).remove("pics/tiny@42")
    assert trees[0] == trees[1]


def test_every_step_of_a_run_reads_as_it_is_told(
    tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample of a reduction, rows computed again before a set grows, decoding for the cache, and a recheck."""
    seen: list[tuple[str, Path | None]] = []
    original = Loader.__init__

    def recorded(self: Loader, *given: Any, worker_type: str, stage: Path | None, **options: Any) -> None:
        seen.append((worker_type, stage))
        original(self, *given, stage=stage, **options)

    monkeypatch.setattr(Loader, "__init__", recorded)
    told = RunConfig(batch_size=8, workers=2, device="cpu", worker_type="process", stage=tmp_path / "stage")
    config = SetConfig(model="tiny", res="42", block_rows=16, tokens="patches", reduce="int8")
    steps = []
    for count, run in ((20, told), (30, replace(told, decoded_cache=True))):
        register_pictures(store_path, tmp_path / "data", count)
        extract(make_plan(Store(store_path), "pics", config, run), run)
        steps.append(len(seen))
    features = Store(store_path)["pics", "tiny@42"]
    assert recheck(features, told, rows=3).ok
    steps.append(len(seen))
    assert steps == [2, 4, 5]
    assert set(seen) == {("process", tmp_path / "stage")}
    records = [json.loads(path.read_bytes()) for path in (features.folder / "runs").iterdir()]
    assert [record["run"]["stage"] for record in records] == [str(tmp_path / "stage")] * 2
    copies = list((tmp_path / "stage").rglob("*.png"))
    assert len(copies) == 20 + 30  # all were written again when the data set grew, and have another time


@pytest.mark.slow
def test_the_loader_reads_as_threads_do_and_ends_its_workers(tmp_path: Path, store_path: Path) -> None:
    manifest = register_pictures(store_path, tmp_path / "data", 8)
    jobs = [Job(0, (0, 1, 2, 3)), Job(0, (4, 5, 6, 7))]
    with Loader(manifest, SPEC, jobs, workers=2) as threads:
        expected = list(threads)
    loader = Loader(manifest, SPEC, jobs, workers=1, worker_type="process")
    with loader:
        batch = next(iter(loader))
        assert (batch.job, batch.states) == (jobs[0], expected[0].states)
        assert batch.pixels.shape == (4, 1, 28, 28)
        assert batch.pixels.tobytes() == expected[0].pixels.tobytes()
        assert loader._processes is not None
        pids = loader._processes.pids
        assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
