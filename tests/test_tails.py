"""The last blocks on their own: the whole network's tokens and gradients, from sequences that were kept."""

from dataclasses import replace
from pkgutil import resolve_name

import pytest
import torch
from tuning import FACTS, fresh, load, pixels, same

from featstore.backbones import BACKBONES
from featstore.backbones.network import NetworkBackbone, load_network
from featstore.backbones.source import LoadOptions, find_family
from featstore.backbones.tails import Tail
from featstore.backbones.tensors import RandomTensors
from featstore.backbones.trainable import make_trainable
from featstore.errors import ConfigError
from probes.adapters import adapt
from probes.adapters_config import AdapterConfig

KINDS = ("dinov2", "dinov2-reg", "dinov3", "clip-large", "vit-large")


def small(label: str) -> NetworkBackbone:
    if label in FACTS:
        return load(label)
    facts = replace(
        resolve_name(BACKBONES[label]).architecture, depth=3, embed_dim=48, num_heads=3, mlp_dim=96, native_size=64
    )
    facts = replace(facts, patch_size=16) if label == "clip-large" else facts
    family = find_family(facts.family)
    options = LoadOptions(device="cpu", compute_dtype="float32")
    backbone = load_network(RandomTensors(0, family), facts, family, "hf", options)
    assert isinstance(backbone, NetworkBackbone)
    return backbone


@pytest.mark.parametrize("label", KINDS)
def test_a_tail_goes_on_where_the_rest_stopped(label: str) -> None:
    backbone = small(label)
    trainable = make_trainable(backbone)
    depth = backbone.architecture.depth
    batch = pixels(trainable)
    expected = backbone(batch, layers=(depth - 1, depth))
    k = 2 if depth > 2 else 1
    tail = Tail(trainable, k, *batch.shape[2:])
    sequence = tail.inputs(batch)
    assert not sequence.requires_grad
    layers = (depth - 1, depth) if k == 2 else ()
    with torch.no_grad():
        found = tail(sequence, layers)
    assert same(found, expected)


@pytest.mark.parametrize("label", ["dinov2", "dinov3"])
def test_gradients_from_kept_sequences_are_those_from_images(label: str) -> None:
    gradients = []
    for kept in (False, True):
        trainable = fresh(label, checkpointing=kept)
        adapted = adapt(trainable, "last-k", AdapterConfig(k=2), features="cls+mean_patch")
        batch = pixels(trainable)
        trainable.train()
        if kept:
            tail = Tail(trainable, 2, *batch.shape[2:])
            assert trainable.training
            tokens = tail(tail.inputs(batch))
        else:
            tokens = trainable(batch)
        (tokens.cls.square().sum() + tokens.patches.square().sum()).backward()
        gradients.append([parameter.grad for parameter in adapted.parameters.values()])
    for plain, from_kept in zip(*gradients, strict=True):
        assert plain is not None
        assert from_kept is not None
        assert torch.equal(plain, from_kept)


def test_the_rest_is_not_computed() -> None:
    trainable = fresh("dinov2")
    tail = Tail(trainable, 1, 28, 28)
    calls: list[int] = []
    for number, block in enumerate(trainable.blocks, start=1):
        block.get_submodule("mlp").register_forward_hook(lambda *_, number=number: calls.append(number))
    tail(tail.inputs(pixels(trainable)))
    assert calls == [1, 2, 3]  # two before it, and its own


def test_tails_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="convnext has no list of blocks that run one behind the other on tokens"):
        Tail(fresh("convnext"), 1, 64, 64)
    trainable = fresh("dinov2")
    with pytest.raises(ConfigError, match="at least 1 and fewer than the network's 3 blocks; got 3"):
        Tail(trainable, 3, 28, 28)
    tail = Tail(trainable, 1, 28, 28)
    with pytest.raises(ConfigError, match="made for images of 28 x 28 pixels, these have 28 x 42; make one for them"):
        tail.inputs(torch.zeros(1, 3, 28, 42))
    with pytest.raises(ConfigError, match="block 2 is not among the last 1; use features of blocks 3 on"):
        tail(tail.inputs(pixels(trainable)), (2,))
    with pytest.raises(ConfigError, match="a tail keeps positions as they are; leave their augmentation out"):
        Tail(fresh("dinov3", augment_positions=True), 1, 32, 32)
    swapped = fresh("dinov2")
    encoder = swapped.network.get_submodule("encoder")
    plain = encoder.forward

    def doubled(*arguments: object, **options: object) -> object:
        output = plain(*arguments, **options)
        output.last_hidden_state = output.last_hidden_state * 2 + 1
        return output

    encoder.forward = doubled  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="the blocks of dinov2 do not run one behind the other"):
        Tail(swapped, 1, 28, 28)
