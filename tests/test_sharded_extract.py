"""`--memory shard`: one extraction by the processes of torchrun, against one by a single process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import register_pictures

from featstore.configs import RunConfig, SetConfig
from featstore.errors import ConfigError
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.extraction.sharded import Lenders
from featstore.store.catalog import Store
from featstore.store.verify import verify_set

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ["extract", "--model", "tiny", "--res", "42", "--block-rows", "16", "--device", "cpu", "--batch-size", "8"]


def torchrun(store: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    """The command as typed, by two processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "featstore",
    ]
    return subprocess.run(
        [*command, *ARGUMENTS, "--memory", "shard", "--store", str(store), *more],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_sharding_needs_torchrun(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 2)
    plan = make_plan(Store(store_path), "pics", SetConfig(model="tiny", res="42"), RunConfig(memory="shard"))
    with pytest.raises(ConfigError, match="start them by torchrun --nproc-per-node N -m featstore extract"):
        Lenders([plan], RunConfig(memory="shard"), "cpu")


@pytest.mark.slow
def test_two_processes_write_the_set_of_one(tmp_path: Path, store_path: Path) -> None:
    for name, count in (("pics", 21), ("more", 5)):  # two sets: the second network is lent after the first
        register_pictures(store_path, tmp_path / name, count, name)
    done = torchrun(store_path, "--compute-dtype", "bfloat16", "--name", "shared")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("store ") == 1  # one process speaks
    assert "pics/shared@42: 21 computed" in done.stdout
    assert "more/shared@42: 5 computed" in done.stdout
    for name in ("pics", "more"):
        config = SetConfig(model="tiny", res="42", block_rows=16, compute_dtype="bfloat16", name="alone")
        extract(make_plan(Store(store_path), name, config, RunConfig(device="cpu")), RunConfig(device="cpu"))
        shared, alone = (Store(store_path)[name, f"{model}@42"] for model in ("shared", "alone"))
        np.testing.assert_allclose(shared.load("cls"), alone.load("cls"), atol=0.1)
        assert shared.spec["precision"]["arrays"]["cls"]["cosine_worst"] > 0.99
        [entry] = Store(store_path).find(name, "shared@42")
        assert verify_set(Store(store_path), entry, deep=True).ok


@pytest.mark.slow
def test_an_error_in_the_pipeline_ends_all_processes(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 20)
    (tmp_path / "data" / "images" / "00003.png").unlink()  # found after the network was lent
    failed = torchrun(store_path)
    assert failed.returncode != 0
    assert "error: data set 'pics': 1 files changed since registration, such as images/00003.png" in failed.stderr
