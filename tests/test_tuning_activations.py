"""Cached activations: the same run as without, from every family that can, and refused where they would be wrong."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tuning import FACTS, SHRUNK, FusedBlock, Own, fresh, pixels
from tuning_runs import FAST, LABELS, equal, pictures, task_of, tune, weights_of

from featstore.backbones.tokens import Tokens
from featstore.backbones.trainable import make_trainable
from featstore.errors import ConfigError, CorruptError
from probes import tuning_feed
from probes.adapters import adapt
from probes.adapters_config import AdapterConfig
from probes.tasks import Task
from probes.tuning_activations import Activations, Entry, check_entry, entry_block, frozen_digest
from probes.tuning_recipe import AugmentRecipe


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return task_of(pictures(tmp_path_factory.mktemp("activations")), LABELS)


@pytest.mark.parametrize("method", ["last-k", "linear-online"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_losses_as_without(method: str, precision: Any, task: Task, tmp_path: Path) -> None:
    recipe = replace(FAST, precision=precision, optimisation=replace(FAST.optimisation, lr=1e-3))
    plain, first = tune(task, tmp_path / "plain", recipe, method=method)
    cached, second = tune(task, tmp_path / "cached", recipe, method=method, cache=tmp_path / "cache")
    limit = 1e-6 if precision == "float32" else 1e-4
    for name, values in plain.history.items():
        np.testing.assert_allclose(cached.history[name], values, rtol=0, atol=limit)
    np.testing.assert_allclose(cached.test_scores, plain.test_scores, rtol=0, atol=limit * 10)
    before, after = weights_of(first), weights_of(second)
    assert max(float((value - after[name]).abs().max()) for name, value in before.items()) < limit * 10
    if method == "last-k":
        assert plain.history["train_loss"][1] < plain.history["train_loss"][0]


def test_made_once_and_resumed(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run, with another recipe, computes nothing in front of the last blocks; nor what a kill has left."""
    taken: list[int] = []
    take = Entry.take

    def counting(self: Entry, call: Any) -> Any:
        found = take(self, call)
        taken.append(len(found))
        return found

    monkeypatch.setattr(Entry, "take", counting)
    once = replace(FAST, epochs=1)
    first, _ = tune(task, tmp_path / "a", once, method="last-k", cache=tmp_path / "cache")
    assert sum(taken) == 48 + 2  # all images, and those that check the entry
    (marker, *_), taken[:] = sorted((tmp_path / "cache").glob("*/00000000.json")), []
    tune(task, tmp_path / "b", replace(once, seed=3), method="last-k", cache=tmp_path / "cache")
    assert taken == [2]
    marker.unlink()
    again, _ = tune(task, tmp_path / "c", once, method="last-k", cache=tmp_path / "cache")
    assert again.history == first.history
    assert 2 < sum(taken) < 48
    tune(task, tmp_path / "d", once, method="last-k", settings={"k": 1}, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2 * 3  # another block, other folders


@pytest.mark.slow
def test_a_kill_while_it_is_filled(tmp_path: Path) -> None:
    """Rows without their marker count as absent: the next run makes them again, and has the losses of the images."""
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parent)!r}]
from featstore import files
from tuning_runs import LABELS, pictures, task_of, tune
plain, written = files.write_atomic, []
def writing(path, *arguments, **options):
    if path.suffix == ".json" and path.parent.parent.name == "cache" and written:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(path, *arguments, **options)
    written.extend([path] if path.suffix == ".json" and path.parent.parent.name == "cache" else [])
files.write_atomic = writing
task = task_of(pictures(Path({str(tmp_path)!r})), LABELS)
tune(task, Path({str(tmp_path / "killed")!r}), method="last-k", cache=Path({str(tmp_path / "cache")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    cache = tmp_path / "cache"
    assert len(list(cache.glob("*/*.json"))) == 1
    assert len(list(cache.glob("*/*.bin"))) == 2
    own = task_of(pictures(tmp_path), LABELS)
    plain, _ = tune(own, tmp_path / "plain", method="last-k")
    cached, _ = tune(own, tmp_path / "cached", method="last-k", cache=cache)
    assert len(list(cache.glob("*/*.json"))) == 3
    for name, values in plain.history.items():
        np.testing.assert_allclose(cached.history[name], values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("label", [*FACTS, *SHRUNK])
def test_every_family_goes_on_from_its_activations(label: str) -> None:
    trainable = fresh(label, checkpointing=True)
    adapted = adapt(trainable, "last-k", AdapterConfig(k=1), features="cls+mean_patch")
    images = pixels(trainable)
    number = entry_block(adapted, "cls+mean_patch")
    entry = Entry(trainable, number, tuple(images.shape[2:]))
    check_entry(trainable, entry, "cls+mean_patch")
    expected: list[torch.Tensor] = []
    taken = entry.take(lambda: expected.append(trainable.features(images, "cls+mean_patch")))
    trainable.features(images, "cls+mean_patch").square().sum().backward()
    wanted = {name: value.grad.clone() for name, value in adapted.parameters.items() if value.grad is not None}
    trainable.zero_grad()
    found = entry.features(taken, "cls+mean_patch")
    assert torch.allclose(found, expected[0], rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    for name, value in adapted.parameters.items():
        assert value.grad is not None
        assert torch.allclose(value.grad, wanted[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max())), name
    assert all("forward" not in block.__dict__ for block in trainable.blocks)


def test_networks_that_cannot_are_refused() -> None:
    class Skipping(Own):
        def forward(self, pixels: torch.Tensor, *, layers: tuple[int, ...] = ()) -> Tokens:
            early = self.stem(pixels).flatten(2).mT
            tokens = torch.cat((self.blocks[1](self.blocks[0](early)), early), dim=1)
            return Tokens(cls=tokens.mean(1), registers=tokens[:, :0], patches=tokens)

    trainable = make_trainable(Skipping())
    with pytest.raises(ConfigError, match="cannot go on from the activations of a block"):
        check_entry(trainable, Entry(trainable, 1, (28, 28)), "cls")


def test_networks_whose_blocks_read_more_than_the_block_before_are_refused() -> None:
    trainable = fresh("dinov2")
    first, last = trainable.blocks[0], trainable.blocks[-1]
    early: list[torch.Tensor] = []
    first.register_forward_hook(lambda module, inputs, output: early.append(output))
    last.register_forward_hook(lambda module, inputs, output: output + early[-1])
    with pytest.raises(
        ConfigError, match=r"gives other features when it goes on .* reads more than the block before it"
    ):
        check_entry(trainable, Entry(trainable, 2, (28, 28)), "cls")


def test_blocks_that_give_more_than_one_tensor_are_refused() -> None:
    class Pair(FusedBlock):
        def forward(self, tokens: torch.Tensor) -> Any:
            return super().forward(tokens), tokens

    class Pairs(Own):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Pair(8), Pair(8)])

        def forward(self, pixels: torch.Tensor, *, layers: tuple[int, ...] = ()) -> Tokens:
            tokens = self.stem(pixels).flatten(2).mT
            for block in self.blocks:
                tokens, _ = block(tokens)
            return Tokens(cls=tokens.mean(1), registers=tokens[:, :0], patches=tokens)

    trainable = make_trainable(Pairs())
    with pytest.raises(ConfigError, match="the blocks of this network give more than one tensor; leave it out"):
        check_entry(trainable, Entry(trainable, 1, (28, 28)), "cls")
    plain = make_trainable(Own())
    check_entry(plain, Entry(plain, 1, (28, 28)), "cls")


def test_blocks_in_front_are_not_computed() -> None:
    trainable = fresh("dinov2")
    entry = Entry(trainable, 2, (28, 28))
    images = pixels(trainable)
    taken = entry.take(lambda: trainable(images))
    calls: list[int] = []
    for number, block in enumerate(trainable.blocks, start=1):
        block.get_submodule("mlp").register_forward_hook(lambda *_, number=number: calls.append(number))
    entry.features(taken, "cls")
    assert calls == [3]


def test_what_the_cache_cannot_serve_is_refused(task: Task, tmp_path: Path) -> None:
    cached: dict[str, Any] = {"cache": tmp_path / "cache"}
    for method in ("full", "bitfit"):
        with pytest.raises(ConfigError, match=rf"{method} trains from the first on; use last-k"):
            tune(task, tmp_path / "x", method=method, **cached)
    with pytest.raises(ConfigError, match="keeps images as they are; leave augmentation out"):
        tune(task, tmp_path / "x", replace(FAST, augment=AugmentRecipe(degrees=7.0)), method="last-k", **cached)
    with pytest.raises(ConfigError, match="activations behind block 2, and last4 reads block 1"):
        tune(task, tmp_path / "x", method="last-k", features="last4", **cached)
    with pytest.raises(ConfigError, match="needs the network whole on every device; leave sharding out"):
        tune(task, tmp_path / "x", method="last-k", shard=True, **cached)
    trainable = fresh("dinov3", augment_positions=True)
    adapted = adapt(trainable, "last-k", AdapterConfig(k=1))
    with pytest.raises(ConfigError, match="frozen blocks that give the same numbers every time"):
        entry_block(adapted, "cls")
    feed = tuning_feed.ActivationFeed(Activations(tmp_path, {}, 1), np.arange(1), "cpu")
    with pytest.raises(ConfigError, match="cached activations are of images as they are"):
        next(feed.read([np.arange(1)], []))


def test_a_digest_covers_what_is_in_front_and_nothing_else() -> None:
    trainable = fresh("dinov3")
    first = frozen_digest(trainable, 2)
    for name, changes in {
        "model.layer.2.mlp.up_proj.bias": False,
        "norm.weight": False,
        "model.layer.1.mlp.up_proj.bias": True,
        "embeddings.cls_token": True,
    }.items():
        with torch.no_grad():
            trainable.network.get_parameter(name).add_(1)
        now = frozen_digest(trainable, 2)
        assert (now != first) is changes, name
        first = now


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_come_back_as_they_were(dtype: Any, tmp_path: Path) -> None:
    held = Activations(tmp_path, {"a": 1}, 70, dtype)
    rows = torch.randn(70, 5, 3, generator=torch.Generator().manual_seed(0))
    assert held.missing == [0, 1]
    for block in held.missing:
        held.write(block, rows[torch.from_numpy(held.rows_of(block))])
    assert Activations(tmp_path, {"a": 1}, 70, dtype).missing == []
    order = np.array([69, 0, 63, 64, 0])
    expected = rows if dtype == "float32" else rows.bfloat16().float()
    assert torch.equal(held.read(order), expected[torch.from_numpy(order)])
    assert Activations(tmp_path, {"a": 2}, 70, dtype).missing == [0, 1]


def test_damaged_and_infinite_rows_are_errors(tmp_path: Path) -> None:
    held = Activations(tmp_path, {}, 2)
    with pytest.raises(CorruptError, match="activations of images 0 and following are not finite"):
        held.write(0, torch.tensor([[1.0], [float("nan")]]))
    held.write(0, torch.ones(2, 4))
    (data,) = held.folder.glob("*.bin")
    data.write_bytes(data.read_bytes()[:-1] + b"\x01")
    assert equal({"x": held.read(np.array([0]))}, {"x": torch.ones(1, 4)})
    with pytest.raises(CorruptError, match="row 1 differs from its checksum; remove the folder"):
        held.read(np.array([1]))
