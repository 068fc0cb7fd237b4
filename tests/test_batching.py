"""Batch sizes from token budgets, and batches that go through in pieces where memory is short."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import register_pictures
from torch import Tensor

from featstore import files
from featstore.backbones.tokens import Tokens
from featstore.configs import RunConfig, SetConfig
from featstore.errors import DeviceError
from featstore.extraction import pipeline
from featstore.extraction.batching import Pieces, default_batch_size, is_out_of_memory
from featstore.extraction.creation import load_backbone
from featstore.extraction.device import Transfers
from featstore.extraction.plan import make_plan
from featstore.store.catalog import Store

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


LIBRARIES = (
    "could not create a primitive",
    "could not create a memory",
    "could not execute a primitive",
    "std::bad_alloc",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


def cuda_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def cpu_error() -> Exception:
    return RuntimeError(CPU_MESSAGE)


@pytest.mark.parametrize(
    ("tokens", "device", "options", "size"),
    [
        (257, "cpu", {}, 8),
        (1029, "cpu", {}, 2),
        (100_000, "cpu", {}, 1),
        (10, "cpu", {}, 256),
        (201, "cuda:1", {}, 256),
        (1029, "cuda", {}, 32),
        (201, "cuda", {"budget": 10**6}, 4096),
        (1029, "cpu", {"budget": 5000}, 4),
        (1029, "cpu", {"budget": 1}, 1),
        (1029, "cpu", {"streams": True}, 8),
    ],
)
def test_the_default_is_a_power_of_two_within_the_budget(
    tokens: int, device: str, options: dict[str, Any], size: int
) -> None:
    assert default_batch_size(tokens, device, **options) == size


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(cuda_error())
    assert is_out_of_memory(cpu_error())
    assert is_out_of_memory(MemoryError())
    assert all(is_out_of_memory(RuntimeError(f"{words} (of 3)")) for words in LIBRARIES)
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory\nSearch for ..."))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError(CPU_MESSAGE))


def bounded(most: int, calls: list[int], error: Callable[[], Exception]) -> Callable[[Tensor], dict[str, Tensor]]:
    def forward(images: Tensor) -> dict[str, Tensor]:
        calls.append(len(images))
        if len(images) > most:
            raise error()
        return {"sum": images.flatten(1).sum(1), "first": images[:, 0]}

    return forward


@pytest.mark.parametrize("error", [cuda_error, cpu_error])
@pytest.mark.parametrize(("batch", "most", "size"), [(8, 8, 8), (8, 3, 2), (7, 3, 3), (5, 1, 1)])
def test_pieces_give_what_the_whole_gives(error: Callable[[], Exception], batch: int, most: int, size: int) -> None:
    images = torch.arange(batch * 3 * 2 * 2, dtype=torch.float32).view(batch, 3, 2, 2)
    pieces, calls = Pieces(batch, "cpu"), []  # type: ignore[var-annotated]
    for _ in range(2):
        rows = pieces(images, bounded(most, calls, error))
        torch.testing.assert_close(rows["sum"], images.flatten(1).sum(1), rtol=0, atol=0)
        torch.testing.assert_close(rows["first"], images[:, 0], rtol=0, atol=0)
    assert pieces.size == size
    assert set(calls[-math.ceil(batch / size) :]) == {size}  # one shape, also at the end; what was learnt stays
    assert bool(pieces.notes) == (most < batch)
    if pieces.notes:
        assert f"batches of {batch} go through in pieces of {size}" in pieces.notes[0]
        assert len(pieces.notes) == 1


def test_one_image_that_does_not_fit() -> None:
    images = torch.zeros(4, 3, 32, 16)
    message = r"cpu has no memory for one image of 32x16 \(CUDA out of memory. Tried to allocate 2.00 GiB.\); use a"
    with pytest.raises(DeviceError, match=message):
        Pieces(4, "cpu")(images, bounded(0, [], cuda_error))


@pytest.mark.parametrize("words", LIBRARIES)
def test_libraries_are_quoted_where_one_image_fails(words: str) -> None:
    pieces, calls = Pieces(4, "cpu"), []  # type: ignore[var-annotated]
    with pytest.raises(DeviceError, match=rf"cpu has no memory for one image of 2x2 \({re.escape(words)}\); use a"):
        pieces(torch.zeros(4, 3, 2, 2), bounded(0, calls, lambda: RuntimeError(words)))
    assert calls == [4, 2, 1]


SHORT = """
import resource, sys
import torch
torch.set_num_threads(1)
from featstore.backbones import describe
from featstore.errors import DeviceError
from featstore.extraction.batching import Pieces

network = describe("tiny").load(device="cpu", compute_dtype=sys.argv[1])
network(torch.zeros(1, 3, 98, 98))
images = torch.randn(64, 3, 98, 98)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
pieces, failures = Pieces(64, "cpu"), 0
for megabytes in range(0, 64, 4):
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, resource.RLIM_INFINITY))
    try:
        rows = pieces(images, lambda piece: {"cls": network(piece).cls})
        assert len(rows["cls"]) == 64
    except DeviceError as error:
        assert "has no memory for one image of 98x98" in str(error), error
        failures += 1
print(failures, pieces.size)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no table of this process's memory")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_process_short_of_memory_gets_pieces_or_advice(dtype: str) -> None:
    """Whichever of torch's allocator and oneDNN finds out, under limits from none at all to a batch's."""
    done = subprocess.run(
        [sys.executable, "-c", SHORT, dtype],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-800:]


def test_a_batch_that_cannot_even_be_uploaded(
    tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_pictures(store_path, tmp_path / "data", 4)
    run = RunConfig(device="cpu", batch_size=4)
    plan = make_plan(Store(store_path), "pics", SetConfig(model="tiny", res="42"), run)

    def full(self: Any, pixels: np.ndarray, size: int) -> Tensor:
        raise cuda_error()

    monkeypatch.setattr(Transfers, "upload", full)
    message = (
        r"no memory for the pixels and rows of 4 images of 42x42 \(CUDA out of memory. Tried .*; use a smaller --b"
    )
    with pytest.raises(DeviceError, match=message):
        pipeline.extract(plan, run)
    monkeypatch.setattr(Transfers, "upload", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.extract(plan, run)


def test_other_errors_pass_through() -> None:
    calls: list[int] = []
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Pieces(4, "cpu")(torch.zeros(4, 3, 2, 2), bounded(0, calls, lambda: RuntimeError("shapes do not match")))
    assert calls == [4]


class Bounded:
    """A backbone that has memory for `most` images."""

    def __init__(self, network: Any, most: int) -> None:
        self.network, self.most = network, most
        self.architecture, self.device, self.dtype = network.architecture, network.device, network.dtype
        self.calls: list[int] = []

    def __call__(self, pixels: Tensor, *, layers: tuple[int, ...] = ()) -> Tokens:
        self.calls.append(len(pixels))
        if len(pixels) > self.most:
            raise cuda_error()
        found: Tokens = self.network(pixels, layers=layers)
        return found


@pytest.mark.parametrize("reduce", ["", "int8"])
def test_a_run_out_of_memory_goes_on_in_pieces(tmp_path: Path, store_path: Path, reduce: str) -> None:
    register_pictures(store_path, tmp_path / "data", 20)
    run = RunConfig(device="cpu", batch_size=8)

    def config(name: str) -> SetConfig:
        return SetConfig(
            model="tiny", res="42", block_rows=16, tokens="cls,patches", layers="2", name=name, reduce=reduce
        )

    plan = make_plan(Store(store_path), "pics", config("short"), run)
    network = load_backbone(plan, run, "cpu")
    short = Bounded(network, 3)
    summary = pipeline.extract(plan, run, backbone=short)
    assert (summary.computed, summary.batch_size, summary.micro_batch) == (20, 8, 2)
    assert "cpu has no memory for 4 images of 42x42 at once: batches of 8 go through in pieces of 2" in summary.notes
    assert max(short.calls[-8:]) == 2
    whole = make_plan(Store(store_path), "pics", config("whole"), run)
    assert pipeline.extract(whole, run, backbone=network).micro_batch == 8
    a, b = (Store(store_path)["pics", name] for name in ("short", "whole"))
    for name in a.arrays:  # within parity: a step of int8 is a hundredth of what tokens span
        left, right = (features.array(name).load().astype(np.float32) for features in (a, b))
        np.testing.assert_allclose(left, right, atol=1.01 if reduce and "patches" in name else 4e-3)
    record = files.unseal(next((a.folder / "runs").glob("*.json")).read_bytes(), a.folder / "runs")
    facts = record["summary"]
    assert (facts["batch_size"], facts["micro_batch"]) == (8, 2)
    assert facts["how"] == {**facts["how"], "kernel": None, "memory": "resident", "compile": "off", "tf32": False}
    assert facts["how"]["device_name"]


@pytest.mark.slow
def test_nothing_is_committed_where_one_image_does_not_fit(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 4)
    run = RunConfig(device="cpu")
    plan = make_plan(Store(store_path), "pics", SetConfig(model="tiny", res="42"), run)
    short = Bounded(load_backbone(plan, run, "cpu"), 0)
    with pytest.raises(DeviceError, match=r"no memory for one image of 42x42"):
        pipeline.extract(plan, run, backbone=short)
    assert Store(store_path)["pics", "tiny@42"].pending().all()


def test_streamed_networks_get_no_padded_images(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 5)
    run = RunConfig(device="cpu", tokens_per_batch=2 * 14)
    plan = make_plan(Store(store_path), "pics", SetConfig(model="tiny", res="42"), run)
    streamed = Bounded(load_backbone(plan, run, "cpu"), 8)
    streamed.memory = "stream"  # type: ignore[attr-defined]
    summary = pipeline.extract(plan, run, backbone=streamed)
    assert (summary.batch_size, streamed.calls) == (2, [2, 2, 1])
    assert summary.how["memory"] == "stream"
