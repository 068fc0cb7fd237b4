"""A backbone that trains: the pass of extraction, what training switches on, features of the store."""

import copy
from typing import Any

import pytest
import torch
from backbone_conformance import images
from pictures import register_pictures
from reduced import RUN, config, opened, run
from torch import Tensor, nn
from tuning import (
    FACTS,
    Own,
    fresh,
    load,
    perturb,
    pixels,
    same,
)

from featstore.backbones.pooling import parts_of, pool, width_of
from featstore.backbones.tokens import Tokens
from featstore.backbones.trainable import DropPath, Trainable, make_trainable
from featstore.errors import ConfigError
from featstore.extraction.loader import Job, open_loader
from featstore.extraction.plan import make_plan
from featstore.images.pixels import to_pixels
from featstore.store.catalog import Store
from probes.adapters import adapt
from probes.adapters_config import AdapterConfig

# The same pass


@pytest.mark.parametrize("label", FACTS)
@pytest.mark.parametrize("training", [False, True])
def test_tokens_are_those_of_the_frozen_network_to_the_bit(label: str, training: bool) -> None:
    backbone = load(label)
    layers = (1, -1) if backbone.architecture.depth else ()
    batch = images(backbone, 2, 3)
    expected = backbone(batch, layers=layers)
    trainable = make_trainable(backbone).train(training)
    with torch.no_grad():
        assert same(trainable(batch, layers), expected)
    assert trainable.training is training
    assert not any(parameter.requires_grad for parameter in trainable.parameters())


@pytest.mark.parametrize("label", ["dinov2", "dinov3", "convnext", "mobilenet"])
def test_gradients_are_those_of_finite_differences(label: str) -> None:
    trainable = fresh(label)
    adapt(trainable, "bitfit")
    trainable.double()
    batch = images(trainable, 2, 2, count=2).double()

    def loss() -> Tensor:
        # `forward` computes in float32: the network alone is the function whose gradient is checked.
        family = trainable.family
        assert family is not None
        called = family.call(trainable.network, batch, trainable.architecture)
        return family.split(called, trainable.architecture)[0].square().sum()

    name, parameter = next((n, p) for n, p in trainable.network.named_parameters() if p.requires_grad)
    (gradient,) = torch.autograd.grad(loss(), [parameter])
    with torch.no_grad():
        step = torch.zeros_like(parameter)
        step.view(-1)[0] = 1e-5
        parameter.add_(step)
        above = float(loss())
        parameter.sub_(2 * step)
        below = float(loss())
    assert float(gradient.view(-1)[0]) == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("label", ["dinov2", "dinov3", "dinov3-convnext", "resnet"])
def test_checkpointing_changes_nothing_but_memory(label: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        trainable = fresh(label, checkpointing=checkpointing)
        adapted = adapt(trainable, "full", AdapterConfig(batch_norm="frozen" if label == "resnet" else "auto"))
        trainable.train()
        trainable.features(pixels(trainable), "cls+mean_patch").square().sum().backward()
        gradients.append([parameter.grad for parameter in adapted.parameters.values()])
        assert all("forward" not in block.__dict__ for block in trainable.blocks)
    for plain, twice in zip(*gradients, strict=True):
        assert plain is not None
        assert twice is not None
        assert torch.equal(plain, twice)


def test_checkpointed_blocks_run_twice() -> None:
    counts = []
    for checkpointing in (False, True):
        trainable = fresh("dinov2", checkpointing=checkpointing)
        adapt(trainable, "full")
        calls: list[int] = []
        inner = trainable.blocks[1].get_submodule("mlp")
        inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainable.features(pixels(trainable), "cls").sum().backward()
        counts.append(len(calls))
    assert counts == [1, 2]


def test_checkpointing_refuses_norms_that_would_count_twice() -> None:
    with pytest.raises(ConfigError, match=r"batch norms would count every batch twice; use frozen batch norms"):
        adapt(fresh("mobilenet", checkpointing=True), "full")
    trainable = make_trainable(Own())
    trainable.block_names = ()
    with pytest.raises(ConfigError, match="has no known blocks to checkpoint"):
        trainable.check_checkpointing()


def test_copies_and_threads_are_sound() -> None:
    """An average of weights begins with a deep copy, whose blocks must be its own."""
    trainable = fresh("dinov2", checkpointing=True)
    adapted = adapt(trainable, "full")
    trainable.features(pixels(trainable), "cls").sum().backward()
    twin = copy.deepcopy(trainable)
    expected = twin(pixels(trainable))
    perturb(adapted)
    assert same(twin(pixels(trainable)), expected)


def test_positions_that_extraction_cached_do_not_stop_gradients() -> None:
    backbone = load("dinov3")
    batch = images(backbone, 2, 2)
    backbone(batch)  # under inference mode
    trainable = make_trainable(backbone)
    adapted = adapt(trainable, "full", features="cls")
    trainable.features(batch, "cls").sum().backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters.values())


# What training switches on


def test_random_positions_are_asked_for() -> None:
    batch = images(load("dinov3"), 3, 3)
    for asked in (False, True):
        trainable = fresh("dinov3", augment_positions=asked).train()
        torch.manual_seed(0)
        assert torch.equal(trainable(batch).cls, trainable(batch).cls) is not asked
        trainable.eval()
        assert torch.equal(trainable(batch).cls, trainable(batch).cls)
    with pytest.raises(ConfigError, match="dinov2 has no rotary positions to stretch"):
        fresh("dinov2", augment_positions=True)


@pytest.mark.parametrize("label", ["dinov2", "dinov3", "convnext"])
def test_dropped_paths_are_asked_for(label: str) -> None:
    trainable = fresh(label, drop_path=0.5)
    batch = pixels(trainable)
    expected = load(label)(batch)
    assert same(trainable(batch), expected)
    trainable.train()
    torch.manual_seed(0)
    assert not same(trainable(batch), expected)
    rates = [module.rate for module in trainable.modules() if isinstance(module, DropPath)]
    assert rates[0] == 0
    assert rates[-1] == 0.5


def test_dropped_paths_keep_the_mean() -> None:
    drop = DropPath(0.25).train()
    torch.manual_seed(0)
    dropped = drop(torch.ones(20000, 2))
    assert sorted(set(dropped[:, 0].tolist())) == pytest.approx([0, 1 / 0.75])
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)


def test_dropped_paths_need_a_place() -> None:
    with pytest.raises(ConfigError, match=r"at least 0 and below 1; got 1"):
        fresh("dinov2", drop_path=1.0)
    with pytest.raises(ConfigError, match="have no place to drop paths; leave it out"):
        fresh("mobilenet", drop_path=0.1)


@pytest.mark.parametrize(
    ("method", "config", "moves"),
    [
        ("full", AdapterConfig(), True),
        ("full", AdapterConfig(batch_norm="frozen"), False),
        ("bitfit", AdapterConfig(), False),
        ("last-k", AdapterConfig(), False),
        ("last-k", AdapterConfig(k=1, batch_norm="train"), True),
        ("linear-online", AdapterConfig(), False),
    ],
)
def test_running_statistics_move_where_they_should(method: str, config: AdapterConfig, moves: bool) -> None:
    trainable = fresh("mobilenet")
    adapted = adapt(trainable, method, config)
    before = {name: value.clone() for name, value in trainable.state_dict().items() if "running" in name}
    trainable.train()
    trainable.features(pixels(trainable), "cls")
    moved = [name for name, value in before.items() if not torch.equal(trainable.state_dict()[name], value)]
    assert bool(moved) is moves
    if method == "last-k" and moves:
        assert {name.split(".")[2] for name in moved} == {"18"}
    assert adapted.settings["batch_norm"] == ("train" if moves else "frozen")
    assert any("running_mean" in name for name in adapted.state()) is moves


def batch_norms(trainable: Trainable) -> list[nn.BatchNorm2d]:
    return [module for module in trainable.network.modules() if isinstance(module, nn.BatchNorm2d)]


def fold(trainable: Trainable, batch: Tensor) -> None:
    """Statistics of a batch as the norms' own, then folded into their weights and biases, as exports have them."""
    norms = batch_norms(trainable)
    trainable.requires_grad_(True)
    trainable.batch_norm = "train"
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        trainable.train()(batch)
        for norm in norms:
            norm.weight.div_((norm.running_var + norm.eps).sqrt())
            norm.bias.sub_(norm.running_mean * norm.weight)
            norm.weight.mul_((1 + norm.eps) ** 0.5)
            norm.reset_running_stats()
    trainable.batch_norm = "frozen"
    trainable.requires_grad_(False).eval()


def test_norms_without_statistics_stay_frozen() -> None:
    trainable = fresh("mobilenet")
    batch = pixels(trainable, 8)
    assert trainable.folded_norms() == 0  # nothing has trained them
    fold(trainable, batch)
    assert trainable.folded_norms() == len(batch_norms(trainable)) == 52
    with torch.no_grad():
        frozen = trainable.features(batch, "cls")
    living, first = copy.deepcopy(trainable), copy.deepcopy(trainable)
    adapted = adapt(trainable, "full")
    assert adapted.settings["batch_norm"] == "frozen"
    (note,) = adapted.notes
    assert note.startswith("batch norms stay frozen: 52 of 52 hold no statistics (mean 0, variance 1: folded into")
    with torch.no_grad():
        assert torch.equal(trainable.train().features(batch, "cls"), frozen)
    # What is asked for is done, and said; it is another network, which is why it is not the default.
    asked = adapt(first, "full", AdapterConfig(batch_norm="train"))
    (note,) = asked.notes
    assert note.startswith("batch norms move although 52 of 52 hold no statistics")
    with torch.no_grad():
        moved = first.train().features(batch, "cls")
    assert float((moved - frozen).abs().mean()) > 0.3 * float(frozen.abs().mean())
    batch_norms(living)[3].running_mean.add_(0.1)
    assert living.folded_norms() == 51


def test_norms_that_hold_statistics_move() -> None:
    trainable = fresh("resnet")
    for norm in batch_norms(trainable):
        norm.bias.data.fill_(0.1)
        norm.running_mean.add_(0.2)
    assert trainable.folded_norms() == 0
    adapted = adapt(trainable, "full")
    assert adapted.settings["batch_norm"] == "train"
    assert adapted.notes == []


def test_norms_cannot_take_the_statistics_of_one_image() -> None:
    trainable = fresh("mobilenet")
    adapt(trainable, "full")
    with pytest.raises(ConfigError, match="need at least 2 images at once, and a batch has 1: use another batch size"):
        trainable.train()(pixels(trainable, 1))
    trainable.eval()(pixels(trainable, 1))


# Features


@pytest.mark.parametrize("features", ["cls", "mean_patch", "cls+mean_patch", "mean_all", "last2", "last3+mean_patch"])
def test_features_of_a_frozen_network_are_those_of_the_store(
    features: str, tuned_store: tuple[Any, Trainable, Tensor]
) -> None:
    stored, trainable, batch = tuned_store
    with torch.no_grad():
        found = trainable.features(batch, features)
    expected = torch.from_numpy(stored.load(features))
    assert found.shape == expected.shape == (len(batch), width_of(features, trainable.architecture))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def tuned_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Trainable, Tensor]:
    """A set of the tiny network with all arrays in float32, the network to train, and the images as it saw them."""
    folder = tmp_path_factory.mktemp("tuned")
    register_pictures(folder / "store", folder / "data", 6)
    settings = config("", tokens="cls,mean_patch,registers,patches", layers="2,3", dtype="float32")
    run(folder / "store", settings)
    plan = make_plan(Store(folder / "store"), "pics", settings, RUN)
    with open_loader(plan.manifest, plan.preprocess, [Job(-1, tuple(range(6)))], RUN, workers=1) as loader:
        loaded = torch.from_numpy(next(iter(loader)).pixels)
    batch = to_pixels(loaded, plan.preprocess, device="cpu", dtype=torch.float32)
    network = make_trainable(plan.source.load(device="cpu", compute_dtype="float32"))
    return opened(folder / "store"), network, batch


def test_features_that_a_head_cannot_have() -> None:
    facts = FACTS["dinov2"]
    assert parts_of("last2+layers/1/mean_patch", facts) == ("layers/2/cls", "cls", "layers/1/mean_patch")
    for features, of, message in (
        ("patches", facts, r"a head takes vectors: cls, mean_patch, lastN .*; got 'patches' in 'patches'"),
        ("cls+mean_all", facts, "or mean_all; got 'mean_all'"),
        ("last4", facts, "last4 asks for the tokens of 4 blocks, and dinov2 has 3 that can be kept"),
        ("layers/4/cls", facts, "layer 4 does not exist"),
        ("mean_all", FACTS["mobilenet"], "mobilenet_v2 has no CLS token: its cls is what it pools"),
        ("last2", FACTS["mobilenet"], "mobilenet_v2 has 0 that can be kept"),
    ):
        with pytest.raises(ConfigError, match=message):
            parts_of(features, of)


def test_pooling_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens(
        cls=torch.randn(2, 48, generator=generator, dtype=torch.float32).bfloat16(),
        registers=torch.randn(2, 4, 48, generator=generator).bfloat16(),
        patches=torch.randn(2, 9, 48, generator=generator).bfloat16(),
    )
    every = torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), dim=1).double()
    found = pool(tokens, "mean_all", FACTS["dinov2"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), every.mean(1), rtol=0, atol=1e-6)
    both = pool(tokens, "cls+mean_patch", FACTS["dinov2"]).double()
    torch.testing.assert_close(
        both, torch.cat((tokens.cls.double(), tokens.patches.double().mean(1)), 1), rtol=0, atol=1e-6
    )
