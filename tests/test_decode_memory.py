"""Memory while images are decoded: what a header foretells covers the truth, and a gate keeps the sum below a limit."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import dataset, phantom, saved
from image_files import encode, png
from PIL import Image
from volume_files import nifti_bytes

from featstore.configs import RegisterConfig
from featstore.errors import FeatstoreError
from featstore.extraction import memory
from featstore.extraction.distributed import Ranks
from featstore.extraction.loader import Job, Loader, Sample
from featstore.extraction.memory import FREE, Gate, Turn, available_memory, decode_limit
from featstore.extraction.workers import WorkerPool
from featstore.images import PreprocessSpec
from featstore.images.extent import UNKNOWN, footprint, measure
from featstore.inputs import Inputs
from featstore.register import register

HALF = (0.5,) * 3
MIB = 2**20
TESTS = Path(__file__).resolve().parent


def spec(intensity: str = "native", geometry: str = "squash", decode: str = "full") -> PreprocessSpec:
    options: Any = {"geometry": geometry, "intensity": intensity, "decode": decode}
    return PreprocessSpec(height=28, width=28, mean=HALF, std=HALF, **options)


GREY = np.arange(60, dtype=np.uint8).repeat(40).reshape(60, 40)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)


@pytest.mark.parametrize(
    ("data", "sides", "channels", "itemsize"),
    [
        (encode(GREY, "PNG"), (60, 40), 1, 1),
        (encode(COLOUR, "PNG"), (60, 40), 3, 1),
        (encode(GREY.astype(np.uint16), "PNG"), (60, 40), 1, 2),
        (png(COLOUR.astype(np.uint16), 2), (60, 40), 3, 2),
        (encode(GREY, "JPEG"), (60, 40), 1, 1),
        (encode(COLOUR, "JPEG", progressive=True), (60, 40), 3, 2),
        (encode(COLOUR, "JPEG", exif=b"Exif\0\0" + bytes(60_000), icc_profile=bytes(60_000)), (60, 40), 3, 1),
        (encode(GREY, "TIFF"), (60, 40), 1, 1),
        (encode(GREY.astype(np.float32), "TIFF"), (60, 40), 1, 4),
        (encode(COLOUR, "WEBP"), (60, 40), 4, 1),
        (encode(GREY, "GIF"), (60, 40), 4, 1),
        (encode(COLOUR, "BMP"), (60, 40), 3, 1),
        (encode(COLOUR, "PPM"), (60, 40), 3, 1),
        (saved(dataset(phantom(60, 40))), (60, 40), 1, 4),
    ],
)
def test_headers_tell_sides_and_samples(data: bytes, sides: tuple[int, int], channels: int, itemsize: int) -> None:
    for file in (data, io.BytesIO(data)):
        found = measure(file, len(data))
        assert (found.height, found.width) == sides
        assert (found.channels, found.itemsize) == (channels, itemsize)
        assert found.held >= len(data)


def test_volumes_are_counted_whole() -> None:
    data = nifti_bytes(np.zeros((20, 30, 40), np.int16))
    found = measure(data, len(data))
    assert (found.samples, found.volume) == (30 * 40, 20 * 30 * 40)  # of its largest slice
    assert found.held == len(data) + 2 * 20 * 30 * 40
    file = io.BytesIO()
    np.save(file, np.zeros((20, 30, 40), np.float32))
    found = measure(file.getvalue(), 5000)
    assert (found.height, found.itemsize, found.held) == (30 * 40, 4, 5000)


def test_what_cannot_be_told_takes_several_times_its_bytes() -> None:
    late = encode(COLOUR, "TIFF") + bytes(1)
    assert measure(late[:20], len(late)).held == UNKNOWN * len(late)  # its directory lies behind these bytes
    assert measure(saved(dataset(phantom()))[:140], 1000).held == UNKNOWN * 1000
    for damaged in (b"", b"no image", encode(COLOUR, "TIFF")[:20], b"\xff\xd8\xff\xe0"):
        assert measure(damaged, len(damaged)).held == len(damaged)


def test_sizes_that_are_refused_take_nothing() -> None:
    """A damaged header may claim any; its image must not wait for all others to end."""
    data = encode(GREY, "PNG")
    claimed = data[:16] + b"\x7f\xff\xff\xff" * 2 + data[24:]
    assert measure(claimed, len(data)).samples == 0
    assert footprint(measure(claimed, len(data)), [spec()]) < 2 * len(data)


def test_footprints_follow_the_preprocessing() -> None:
    found = measure(encode(np.zeros((4096, 4096), np.uint8), "JPEG"), 0)
    plain = footprint(found, [spec()])
    assert footprint(found, [spec(), spec()]) == plain
    assert footprint(found, [spec(), spec("percentile:1-99")]) > 3 * plain
    assert footprint(found, [spec(decode="scaled")]) == pytest.approx(plain / 64, rel=0.01)
    assert footprint(found, []) == 0


def run_child(*arguments: object) -> Any:
    """What `memory_child` prints."""
    paths = os.pathsep.join([str(TESTS), *(path for path in sys.path if path)])
    call = [sys.executable, str(TESTS / "memory_child.py"), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def large(side: int) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 255, (side // 16, side // 16), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side)))


WAYS = ("native", "percentile:1-99", "window:0..200", "clahe", "minmax", "brain-c", "spline")
KINDS = (
    "PNG grey",
    "PNG RGB",
    "PNG 16",
    "PNG 1",
    "PNG P",
    "JPEG RGB",
    "JPEG CMYK",
    "TIFF 16",
    "TIFF float",
    "DICOM 16",
)


def write_kind(path: Path, kind: str, side: int) -> None:
    grey = large(side)
    colour = np.stack([grey, grey[::-1], grey[:, ::-1]], -1)
    name, what = kind.split()
    if name == "DICOM":
        path.write_bytes(saved(dataset(grey.astype(np.uint16) * 200, RescaleSlope=2, RescaleIntercept=-1024)))
        return
    images: dict[str, Any] = {
        "grey": grey,
        "RGB": colour,
        "16": grey.astype(np.uint16) * 257,
        "1": grey > 128,
        "P": Image.fromarray(colour).quantize(64) if what == "P" else None,
        "CMYK": Image.fromarray(colour).convert("CMYK"),
        "float": grey.astype(np.float32),
    }
    path.write_bytes(encode(images[what], name, **({"compress_level": 1} if name == "PNG" else {})))


@pytest.mark.parametrize(("kinds", "ways"), [(KINDS[:2], WAYS[1:2]), pytest.param(KINDS, WAYS, marks=pytest.mark.slow)])
def test_no_image_takes_more_than_foretold(tmp_path: Path, kinds: tuple[str, ...], ways: tuple[str, ...]) -> None:
    """Peaks of resident memory in a process of its own; and no more than five times as much is foretold."""
    for kind in kinds:
        write_kind(tmp_path / f"{kind} small", kind, 64)
        write_kind(tmp_path / kind, kind, 2000)
    for name, way, peak, foretold in run_child("peaks", tmp_path, ",".join(kinds), ",".join(ways)):
        assert 8 * MIB < peak < foretold + 8 * MIB, (name, way)
        assert foretold < 5 * peak, (name, way)


@pytest.mark.slow
def test_a_gate_bounds_what_threads_take_together(tmp_path: Path) -> None:
    """8 images of 3000x3000 by 8 threads, 265 MiB foretold for each."""
    for number in range(8):
        Image.fromarray(large(3000)).save(tmp_path / f"{number}.png", compress_level=1)
    limit = 270 * MIB
    gated, most = run_child("together", tmp_path, limit, "window:0..200")
    free, _ = run_child("together", tmp_path, 2**60, "window:0..200")
    assert 250 * MIB < most <= limit
    assert (
        gated < limit + 8 * 20 * MIB
    )  # each thread's pool keeps what is below 32 MiB: one array of 9 MB, and its file
    assert free > 1.5 * (limit + 8 * 20 * MIB)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class TestGate:
    def test_in_order_and_within_the_limit(self) -> None:
        """A large one that waits is not overtaken by small ones that would fit; one beyond the limit runs alone."""
        gate, entered = Gate(10 * FREE), list[str]()
        leave = {name: threading.Event() for name in "abcd"}

        def run(name: str, need: int) -> None:
            with Turn(gate) as turn:
                turn.take(need)
                entered.append(name)
                leave[name].wait(20)

        threads = []
        for place, (name, need) in enumerate((("a", 6), ("b", 50), ("c", 2), ("d", 2))):
            threads.append(threading.Thread(target=run, args=(name, need * FREE)))
            threads[-1].start()
            wait_for(lambda place=place: len(entered) + len(gate._waiting) == place + 1)
        assert entered == ["a"]  # c and d would fit beside
        gate.take(FREE)  # what is small asks nobody
        leave["a"].set()
        wait_for(lambda: entered == ["a", "b"])
        assert gate.used == 50 * FREE
        leave["b"].set()
        wait_for(lambda: sorted(entered[2:]) == ["c", "d"])
        for event in leave.values():
            event.set()
        for thread in threads:
            thread.join(20)
        assert (gate.used, gate.most) == (0, 50 * FREE)

    def test_many_threads_end(self) -> None:
        gate, over = Gate(10 * FREE), list[int]()
        generator = np.random.default_rng(0)
        needs = (generator.integers(1, 14, (8, 60)) * FREE).tolist()

        def run(mine: list[int]) -> None:
            for need in mine:
                gate.take(need)
                if gate.used > max(gate.limit, need):
                    over.append(gate.used)
                gate.give(need)

        threads = [threading.Thread(target=run, args=(mine,)) for mine in needs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert (over, gate.used) == ([], 0)
        assert gate.most > 5 * FREE

    def test_closing_sends_away_what_waits(self) -> None:
        gate, errors = Gate(2 * FREE), list[str]()
        gate.take(2 * FREE)

        def run() -> None:
            with pytest.raises(FeatstoreError, match="the loader is closed; this image was not decoded any more"):
                gate.take(2 * FREE)
            errors.append("told")

        thread = threading.Thread(target=run)
        thread.start()
        wait_for(lambda: gate._waiting)
        gate.close()
        thread.join(20)
        assert errors == ["told"]

    def test_a_turn_is_taken_once(self) -> None:
        gate = Gate(10 * FREE)
        with Turn(gate) as turn:
            assert turn.is_open
            turn.take(3 * FREE)
            turn.take(9 * FREE)
            assert (turn.is_open, gate.used) == (False, 3 * FREE)
        with Turn(None) as turn:
            assert not turn.is_open
        assert gate.used == 0


@pytest.mark.slow
def test_worker_processes_ask_over_here(tmp_path: Path) -> None:
    for number in range(4):
        Image.fromarray(large(1500)).save(tmp_path / f"{number}.png", compress_level=1)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    gate = Gate(1)  # all alone
    with WorkerPool(Inputs(tmp_path), spec("window:0..200"), workers=2, gate=gate) as pool:
        futures = [pool.submit(Sample(name, None, size)) for name, size in sizes.items()]
        assert [future.result(120)[1].reason for future in futures] == [None] * 4
    need = footprint(measure((tmp_path / "0.png").read_bytes(), sizes["0.png"]), [spec("window:0..200")])
    assert (gate.most, gate.used) == (need, 0)


def test_the_loader_passes_the_gate(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(3):
        Image.fromarray(large(1500)).save(tmp_path / "data" / f"{number}.png", compress_level=1)
    manifest = register(tmp_path / "store", "pics", tmp_path / "data", RegisterConfig())[0]
    loader = Loader(manifest, spec("window:0..200"), [Job(0, (0, 1, 2))], workers=3, decode_bytes=1)
    with loader:
        (batch,) = loader
    assert [state.reason for state in batch.states] == [None] * 3
    path = tmp_path / "data" / "0.png"
    assert loader.gate.most == footprint(measure(path.read_bytes(), path.stat().st_size), [spec("window:0..200")])


class TestAvailable:
    def group(self, folder: Path, limit: str, used: int, cached: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")

    def test_control_groups(self, tmp_path: Path) -> None:
        self.group(tmp_path / "sys/jobs/mine", "max", 5, 0)
        self.group(tmp_path / "sys/jobs", "1000", 700, 100)
        (tmp_path / "cgroup").write_text("0::/jobs/mine\n")
        folders = memory._control_groups(tmp_path / "cgroup", tmp_path / "sys")
        assert [memory._left_in(folder) for folder in folders] == [None, 400, None]

    def test_the_first_version(self, tmp_path: Path) -> None:
        folder = tmp_path / "sys/memory/job"
        folder.mkdir(parents=True)
        for name, text in (("limit", "1000"), ("usage", "300")):
            (folder / f"memory.{name}_in_bytes").write_text(text)
        (folder / "memory.stat").write_text("total_inactive_file 50")
        (tmp_path / "cgroup").write_text("5:cpu:/job\n4:memory:/job\n")
        folders = memory._control_groups(tmp_path / "cgroup", tmp_path / "sys")
        assert [memory._left_in(folder) for folder in folders] == [750, None]

    def test_the_least_counts_and_ranks_share_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.group(tmp_path / "mine", "8000000", 0, 0)
        monkeypatch.setattr(memory, "_control_groups", lambda: [tmp_path / "mine"])
        assert available_memory() == 8_000_000
        assert decode_limit() == 2_000_000
        assert decode_limit(Ranks(1, 4, 1, 4)) == 500_000
        monkeypatch.setattr(memory, "_control_groups", list)
        assert available_memory() > 2**28
