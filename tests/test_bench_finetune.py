"""The benchmarks of fine-tuning run at tiny sizes, and where there is no GPU, so that they cannot rot."""

import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    call = [sys.executable, str(ROOT / "benchmarks/bench_finetune.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment)


def test_steps_at_tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench: Any = importlib.import_module("bench_finetune")
    options = bench.parser("x").parse_args(["--quick"])
    options.device = "cpu"
    found = bench.steps_by_method(options)["tiny 42"]
    assert set(found) == {"full", "lora", "bitfit", "against_full"}
    assert found["bitfit"]["trainable"] < found["lora"]["trainable"] < found["full"]["trainable"]
    assert all(found[method]["step_seconds"] > 0 for method in bench.METHODS)
    json.dumps(found)


@pytest.mark.slow
def test_epochs_with_and_without_cached_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench: Any = importlib.import_module("bench_activations")
    bench.main(["--quick", "--output", str(tmp_path)])
    (kept,) = tmp_path.glob("activations-*.json")
    record = json.loads(kept.read_text())
    assert json.loads(capsys.readouterr().out) == record
    assert set(record["results"]["features"]) == {"cls", "cls+mean_patch"}
    for found in record["results"]["features"].values():
        assert found["held"]["losses"]
        assert found["held"]["speed"] is (found["ratio"]["median"] >= 3)
        assert found["ratio"]["median"] == pytest.approx(
            found["seconds_per_epoch"]["plain"]["median"] / found["seconds_per_epoch"]["cached"]["median"]
        )


@pytest.mark.slow
def test_the_bound_of_cached_activations_is_that_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes cost twice the forward pass, and a last block that gives CLS alone little more than k and v."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench: Any = importlib.import_module("bench_activations")
    options = Namespace(model="dinov2-small", res=112, k=2, batch=2)
    found = bench.bound(options, "cls+mean_patch")
    tokens, width = 65, 384
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    patches = 2 * 64 * 3 * 14**2 * width
    head = 2 * 2 * width  # its input is a leaf of nothing, so both of its gradients are computed
    assert found["plain_validation"] == 12 * block + patches + head
    assert found["cached_validation"] == pytest.approx(2 * block + patches / 2 + head)  # one blank image for two here
    assert found["plain_step"] == pytest.approx((10 + 2 * 3) * block + patches + 3 * head, rel=1e-3)
    assert found["cached_step"] == pytest.approx(2 * 3 * block + patches / 2 + 3 * head, rel=1e-3)
    narrow = bench.bound(options, "cls")
    last = 2 * tokens * 2 * width**2 + 2 * 10 * width**2 + 4 * tokens**2 * width
    assert narrow["cached_validation"] == pytest.approx(block + last + patches / 2 + head / 2)
    assert narrow["ratio"] > found["ratio"] > 2.9


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
    assert done.stdout.startswith("no CUDA device here: nothing measured; --quick --device cpu tries it out")
    refused = run("--device", "cpu")
    assert refused.returncode == 2
    assert "--device cpu is for --quick alone" in refused.stderr
