"""The GPU part of the extraction benchmark runs where there is no GPU, so that it cannot rot."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from featstore.backbones import describe

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench_gpu")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    call = [sys.executable, str(ROOT / "benchmarks/bench_extract.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_the_gpu_part_runs_on_a_cpu(tmp_path: Path) -> None:
    done = run("--gpu", "--device", "cpu", "--quick", "--seconds", "0.05", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads(next(tmp_path.glob("gpu-*.json")).read_text())["results"]
    found = results["models"]["tiny 56"]
    assert results["failed"] == {}
    assert set(found["floors"]) == {"mfu_of_ceiling", "speed_to_usual_loop"}
    assert found["ours"] > 0
    assert found["end_to_end"]["images"] == 8
    assert results["nearest_neighbours"]["recall"] == 1
    assert "speed_to_usual_loop: " in done.stdout
    assert "asked 1.4: " in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    done = run("--gpu")
    assert done.stdout.strip() == "no CUDA device here: nothing measured"


@pytest.mark.slow
def test_a_cpu_is_no_place_for_its_full_sizes() -> None:
    refused = run("--gpu", "--device", "cpu")
    assert refused.returncode == 2
    assert "--gpu --device cpu is for --quick alone" in refused.stderr


def test_the_ceiling_is_the_formula_of_memory_traffic(bench: Any) -> None:
    """Without attention 1 / (1 + 521 / D) at 184 FLOP a byte; attention only raises it."""
    flops, bandwidth = 184e12, 1e12
    for model, size in (("dinov3-small", 224), ("dinov3-large", 512), ("dinov3-7b", 512)):
        facts = describe(model, random_weights=0).architecture
        plain = 1 / (1 + 521 / facts.embed_dim)
        found = bench.mfu_ceiling(facts, size, flops, bandwidth)
        assert plain < found < 1
        tokens = facts.num_tokens(size, size)
        work = 24 + 4 * tokens / facts.embed_dim
        assert found == pytest.approx(work / (work + 68 * 184 / facts.embed_dim))


def test_floors(bench: Any) -> None:
    found = {"mfu": 0.5, "mfu_ceiling": 0.6, "speed_to_usual_loop": 1.2, "ours": 38.0}
    held = {name: value["held"] for name, value in bench.floors("dinov3-7b", 512, found).items()}
    assert held == {
        "mfu_of_ceiling": False,
        "speed_to_usual_loop": True,
        "images_per_second": True,
        "target_images_per_second": False,
    }
    assert bench.floors("dinov3-large", 512, found)["speed_to_usual_loop"]["held"] is False
    assert "speed_to_usual_loop" not in bench.floors("dinov2-giant", 518, found)
