"""Two processes train as one does: gradients weigh rows of the whole batch, scores come together, one writes."""

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tuning import fresh, pixels
from tuning_child import run
from tuning_runs import adapted_of, pictures, task_of

from featstore.errors import ConfigError
from probes.adapters import adapt
from probes.tuning_model import TrueZeros, Tuned, make_head
from probes.tuning_ranks import Team, like, put, should_shard, whole

TESTS = Path(__file__).parent


def fork(world: int, call: Callable[[], object]) -> None:
    """Run a call in `world` processes that believe that torchrun started them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
                os.environ.update({name: str(number) for name, number in numbers.items()})
                os.environ |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                call()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world


def check_equal(one: Path, two: Path, *, weights: bool = True, limit: float = 1e-5) -> None:
    expected = torch.load(one / "result-0.pt", weights_only=False)
    for rank in (0, 1):
        history, val, test = torch.load(two / f"result-{rank}.pt", weights_only=False)
        for name, values in history.items():
            np.testing.assert_allclose(values, expected[0][name], rtol=0, atol=limit)
        np.testing.assert_allclose(val, expected[1], rtol=0, atol=limit)
        np.testing.assert_allclose(test, expected[2], rtol=0, atol=limit)
        if weights:
            found = torch.load(two / f"weights-{rank}.pt", weights_only=True)
            for name, value in torch.load(one / "weights-0.pt", weights_only=True).items():
                assert float((found[name] - value).abs().max()) <= limit, name
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert first.keys() == second.keys()
    moved = max(float((value - second[name]).abs().max()) for name, value in first.items())
    assert moved <= limit


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_equal_one(method: str, store: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    result = run(store, one, method)
    assert result.progress.train_loss[1] < result.progress.train_loss[0]
    fork(2, lambda: run(store, two, method))
    check_equal(one, two)
    assert sum(path.name.startswith("best-") for path in (two / "checkpoints").iterdir()) == 1


def test_two_processes_share_a_cache_of_activations(store: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run(store, one, "last-k", cache=tmp_path / "first")
    fork(2, lambda: run(store, two, "last-k", cache=tmp_path / "second"))
    check_equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "how"), [("full", "plain"), ("full", "shard"), ("lora", "shard")])
def test_torchrun(method: str, how: str, store: Path, tmp_path: Path) -> None:
    """DDP, and FSDP2 with weights, optimiser state and average cut over the processes, exported whole."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(store, one, method)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(TESTS / "tuning_child.py"), str(store), str(two), method, how]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    check_equal(one, two, weights=how == "plain")


def hold_fused() -> None:
    """Of one process of two that have a network cut over them, whose query, key and value are one matrix."""
    team = Team()
    try:
        adapted = adapt(fresh("sam"), "full", features="mean_patch")
        model = Tuned(adapted, "mean_patch", make_head(adapted, "mean_patch", 2, 0))
        shapes = {name: value.shape for name, value in model.trained().items()}
        batch = pixels(model.trainable, count=2)
        wrapped = team.wrap(model, model.trainable, shard=True)
        zeros = TrueZeros(model)
        wrapped(batch).square().sum().backward()
        before = {name: whole(value.grad) for name, value in model.trained().items() if value.grad is not None}
        zeros.hold()
        after = {name: whole(value.grad) for name, value in model.trained().items() if value.grad is not None}
        assert shapes == {name: value.shape for name, value in after.items()}
        fused = [name for name in after if name.endswith("qkv.bias")]
        assert len(fused) == 3
        for name, value in after.items():
            if name in fused:
                assert not value[48:96].any()
                assert value[:48].any()
                assert value[96:].any()
                before[name][48:96] = 0
            assert torch.equal(value, before[name])
    finally:
        team.close()


def test_a_part_of_a_bias_that_is_cut_over_processes_is_held_at_zero() -> None:
    fork(2, hold_fused)


def test_shares_cover_a_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    team = Team()
    for count in (1, 2, 5, 6):
        for world in (1, 2, 3, 4):
            found: list[int] = []
            sizes = set()
            for rank in range(world):
                monkeypatch.setattr(team, "rank", rank)
                monkeypatch.setattr(team, "world", world)
                places, counts = team.share(count)
                found += places[counts].tolist()
                sizes.add(len(places))
                assert (places < count).all()
            assert sorted(found) == list(range(count))
            assert len(sizes) == 1  # all processes wait for one another equally often


def test_one_process_needs_no_group(store: Path) -> None:
    team = Team()
    assert (team.world, team.writes) == (1, True)
    assert team.sum([1.5, 2.0]) == [1.5, 2.0]
    assert team.any([True, False]) == [True, False]
    assert team.objects("x") == ["x"]
    rows = torch.arange(6.0).view(3, 2)
    assert torch.equal(team.join(rows, 2), rows[:2])
    target = torch.zeros(2)
    put(target, torch.ones(2, dtype=torch.float64))
    assert torch.equal(whole(target), torch.ones(2))
    assert like(target, torch.ones(2, dtype=torch.float64)).dtype == torch.float32
    trainable = adapted_of(task_of(store), "linear-online").trainable
    assert should_shard(None, trainable, 2) is False
    assert should_shard(True, trainable, 2) is True
    with pytest.raises(ConfigError, match="sharding cuts a network over several processes; start them by torchrun"):
        team.wrap(trainable, trainable, shard=True)
