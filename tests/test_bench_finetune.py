"""The benchmark of fine-tuning runs at tiny sizes, and where there is no GPU, so that it cannot rot."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    call = [sys.executable, str(ROOT / "benchmarks/bench_finetune.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment)


def test_steps_and_cached_epochs_at_tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench: Any = importlib.import_module("bench_finetune")
    options = bench.parser("x").parse_args(["--quick"])
    options.device = "cpu"
    found = bench.steps_by_method(options)["tiny 42"]
    assert set(found) == {"full", "lora", "bitfit", "against_full"}
    assert found["bitfit"]["trainable"] < found["lora"]["trainable"] < found["full"]["trainable"]
    assert all(found[method]["step_seconds"] > 0 for method in bench.METHODS)
    cached = bench.cached_epochs(options)
    assert cached["loss_gap"] < 1e-4
    assert set(cached["epoch_seconds"]) == {"images", "cached"}
    json.dumps([found, cached])


def test_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench: Any = importlib.import_module("bench_finetune")
    costs = {
        "full": {"step_seconds": 1.3, "peak_bytes": 100},
        "lora": {"step_seconds": 0.9, "peak_bytes": 60},
        "bitfit": {"step_seconds": 0.9, "peak_bytes": 61},
    }
    found = bench.against_full(costs)
    assert [found[method]["held"] for method in ("lora", "bitfit")] == [True, False]
    assert bench.against_full({**costs, "full": {"failed": "memory"}}) == {}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 0
    assert done.stdout.startswith("no CUDA device here: nothing measured; --cached measures on a CPU")
    refused = run("--device", "cpu")
    assert refused.returncode == 2
    assert "--device cpu is for --quick or --cached alone" in refused.stderr
