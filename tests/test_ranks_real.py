"""870 real X-rays by one process, torchrun with two and three, ranks in any order and Ray: one and the same store."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import tree_bytes

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ["--model", "tiny", "--res", "98", "--block-rows", "32", "--device", "cpu", "--max-failed", "0"]


def run(store: Path, *more: str, ranks: int = 0) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, "-m", "featstore", "extract", *ARGUMENTS, "--store", str(store), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def set_bytes(store: Path) -> dict[str, bytes]:
    [folder] = (store / "sets/xrays").iterdir()
    return tree_bytes(folder)


@pytest.fixture(scope="module")
def registered(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("real") / "store"
    folder = shared_data / "cxr/images"
    command = ["register", "xrays", str(folder), "--adapter", "folder", "--store", str(store)]
    done = subprocess.run([sys.executable, "-m", "featstore", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "xrays: 870 samples" in done.stdout
    return store


@pytest.fixture(scope="module")
def alone(registered: Path) -> dict[str, bytes]:
    store = registered.parent / "alone"
    shutil.copytree(registered, store)
    run(store)
    return set_bytes(store)


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("way", ["torchrun 2", "torchrun 3", "ray 3", "array 3", "array 4, each its own"])
def test_whoever_computes_the_bytes_are_the_same(
    registered: Path, alone: dict[str, bytes], tmp_path: Path, way: str
) -> None:
    store = tmp_path / "store"
    shutil.copytree(registered, store)
    kind, _, count = way.partition(" ")
    number = int(count[0])
    if kind == "torchrun":
        run(store, ranks=number)
    elif kind == "ray":
        pytest.importorskip("ray")
        run(store, "--engine", "ray", "--actors", str(number))
    else:
        own = ["--no-take-over"] if "own" in way else []
        for rank in random.Random(number).sample(range(number), number):
            run(store, "--rank", str(rank), "--world", str(number), *own)
    assert set_bytes(store) == alone
