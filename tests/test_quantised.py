"""Matrices in 8 bits: bounds of their rounding in closed form, what they do to tokens, what they save and leave."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featstore.backbones import describe
from featstore.backbones.architecture import VisionTransformer
from featstore.backbones.dinov2 import GIANT
from featstore.backbones.dinov3 import SMALL, SMALL_PLUS
from featstore.backbones.family import Family, Release
from featstore.backbones.quantised import QuantisedLinear, quantise, quantise_block, quantise_matrix
from featstore.backbones.source import BackboneSource, from_seed
from featstore.errors import ConfigError
from featstore.extraction.precision import THRESHOLDS_8_BIT


def smaller(release: Release, mlp_dim: int) -> VisionTransformer:
    """Two narrow blocks of a published kind."""
    assert isinstance(release.architecture, VisionTransformer)
    return replace(release.architecture, embed_dim=48, depth=2, num_heads=3, mlp_dim=mlp_dim, native_size=112)


SOURCES = {
    "tiny": describe("tiny"),
    "dinov3": from_seed("d3", smaller(SMALL, 192), 0),
    "dinov3 swiglu": from_seed("d3g", smaller(SMALL_PLUS, 192), 0),
    "dinov2 swiglu": from_seed("d2g", smaller(GIANT, 128), 0),
}


def matrix(seed: int, rows: int = 40, columns: int = 96) -> Tensor:
    """Rows of very different size, and a heavy tail."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) ** 3
    return values * 10.0 ** torch.linspace(-6, 4, rows)[:, None]


def pixels(count: int = 4, size: int = 112) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def load(source: BackboneSource, compute_dtype: str = "float32", weight_dtype: str = "same") -> Any:
    return source.load(device="cpu", compute_dtype=compute_dtype, weight_dtype=weight_dtype)


def stored_bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


@pytest.mark.parametrize("seed", range(5))
def test_int8_rounds_within_half_a_step(seed: int) -> None:
    weights = matrix(seed)
    levels, scale = quantise_matrix(weights, "int8")
    assert levels.dtype == torch.int8
    assert torch.equal(scale[:, 0], weights.abs().amax(1) / 127)
    error = (weights.double() - levels.double() * scale.double()).abs()
    assert (error <= scale.double() / 2 * (1 + 1e-5)).all()
    assert (levels.abs().amax(1) == 127).all()


@pytest.mark.parametrize("seed", range(5))
def test_fp8_rounds_within_half_of_its_last_bit(seed: int) -> None:
    weights = matrix(seed)
    levels, scale = quantise_matrix(weights, "fp8")
    assert levels.dtype == torch.float8_e4m3fn
    error = (weights.double() - levels.double() * scale.double()).abs()
    # Three bits of mantissa; below 2^-6 the steps are all 2^-9.
    bound = torch.maximum(weights.double().abs() / 16, scale.double() / 1024)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (levels.double().abs().amax(1) == 448).all()


@pytest.mark.parametrize(("weight_dtype", "share"), [("int8", 1 / 254), ("fp8", 0.0255)])
def test_the_share_that_rounding_takes(weight_dtype: str, share: float) -> None:
    """int8: a step of 1/127, whose RMS is step / sqrt(12), beside numbers of RMS 1 / sqrt(3)."""
    weights = 2 * torch.rand(256, 1024, generator=torch.Generator().manual_seed(0)) - 1
    levels, scale = quantise_matrix(weights, weight_dtype)
    assert float((levels.float() * scale - weights).norm() / weights.norm()) == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("weight_dtype", ["int8", "fp8"])
def test_channels_without_numbers(weight_dtype: str) -> None:
    weights = torch.stack([torch.zeros(8), torch.full((8,), 1e-44), torch.ones(8)])
    levels, scale = quantise_matrix(weights, weight_dtype)
    restored = levels.float() * scale
    assert torch.isfinite(scale).all()
    assert torch.allclose(restored, torch.stack([torch.zeros(8), torch.zeros(8), torch.ones(8)]))


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_multiplies_by_the_restored_matrix(weight_dtype: str, compute_dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 16, bias=bias).to(compute_dtype).requires_grad_(False)
    layer = QuantisedLinear(linear, weight_dtype)
    inputs = torch.randn(5, 7, 32).to(compute_dtype)
    restored = (layer.quantised.double() * layer.scale.double()).to(compute_dtype)
    assert torch.equal(layer(inputs), nn.functional.linear(inputs, restored, linear.bias))
    assert layer(inputs).dtype == compute_dtype
    assert f"in_features=32, out_features=16, stored={layer.quantised.dtype}" in repr(layer)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    ("weight_dtype", "worst", "mean"),
    # Of uniform numbers int8 loses 1/254 (RMS error / RMS), fp8 0.0255: angles grow 6.5 times, 1 - cosine 42 times.
    # So 0.9995 and 0.9997 become 0.979 and 0.9874, and what the gate asks is the sharper bound.
    [("int8", 0.9995, 0.9997), ("fp8", THRESHOLDS_8_BIT.cosine_worst, THRESHOLDS_8_BIT.cosine_mean)],
)
def test_tokens_stay_near_float32(name: str, weight_dtype: str, worst: float, mean: float) -> None:
    source = SOURCES[name]
    exact, found = load(source)(pixels()), load(source, weight_dtype=weight_dtype)(pixels())
    for one, other in ((exact.cls, found.cls), (exact.patches, found.patches)):
        cosine = nn.functional.cosine_similarity(one.flatten(0, -2), other.flatten(0, -2), dim=-1)
        assert worst < float(cosine.min()) < 0.9999999
        assert float(cosine.mean()) > mean


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("weight_dtype", ["int8", "fp8"])
def test_blocks_take_half_the_bytes_of_bfloat16(name: str, weight_dtype: str) -> None:
    source = SOURCES[name]
    whole, small = (load(source, "bfloat16", kind) for kind in ("same", weight_dtype))
    blocks = [backbone.network.get_submodule(backbone.family.blocks) for backbone in (whole, small)]
    matrices = sum(module.weight.numel() for module in blocks[0].modules() if isinstance(module, nn.Linear))
    channels = sum(module.out_features for module in blocks[1].modules() if isinstance(module, QuantisedLinear))
    assert stored_bytes(blocks[0]) - stored_bytes(blocks[1]) == matrices - 4 * channels
    # Of widths that matter; here scales, biases and norms are a larger share.
    assert stored_bytes(blocks[1]) < (0.53 if source.architecture.embed_dim > 100 else 0.6) * stored_bytes(blocks[0])


@pytest.mark.parametrize("weight_dtype", ["int8", "fp8"])
def test_only_matrices_of_blocks_change(weight_dtype: str) -> None:
    plain, found = load(SOURCES["tiny"], "bfloat16"), load(SOURCES["tiny"], "bfloat16", weight_dtype)
    before, after = plain.network.state_dict(), found.network.state_dict()
    gone = {name for name in before if name not in after}
    assert gone == {name for name, value in before.items() if name.startswith("encoder.layer.") and value.ndim == 2}
    assert all(torch.equal(before[name], after[name]) for name in before if name in after)
    assert found.dtype == torch.bfloat16
    assert {name.rpartition(".")[2] for name in after if name not in before} == {"quantised", "scale"}


def test_block_by_block_is_the_same_and_once_is_enough() -> None:
    whole, single = load(SOURCES["tiny"], weight_dtype="int8"), load(SOURCES["tiny"])
    blocks = list(single.network.get_submodule(single.family.blocks).children())
    assert [quantise_block(block, "int8") for block in blocks] == [6] * 4
    assert [quantise_block(block, "fp8") for block in blocks] == [0] * 4
    found, expected = single.network.state_dict(), whole.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_kinds_of_linear_layers_stay() -> None:
    class Own(nn.Linear):
        """Whose matrix somebody reads."""

    own = Own(4, 4)
    block = nn.Sequential(nn.Linear(4, 4), nn.Sequential(own))
    assert quantise_block(block, "int8") == 1
    assert own in list(block.modules())


def test_it_can_be_copied() -> None:
    layer = copy.deepcopy(QuantisedLinear(nn.Linear(8, 8).requires_grad_(False), "fp8"))
    inputs = torch.randn(2, 8)
    assert torch.equal(layer.to("cpu")(inputs), layer(inputs))


def test_networks_without_such_blocks() -> None:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)))
    for blocks in ("", "0"):
        family = Family(model_type="resnet", blocks=blocks, dialects=())
        with pytest.raises(ConfigError, match=r"--weight-dtype int8: resnet has no blocks with linear layers"):
            quantise(network, family, "int8")


def test_unknown_type() -> None:
    with pytest.raises(ConfigError, match=r"weight dtype must be one of int8, fp8; got 'int4'"):
        quantise_block(nn.Linear(2, 2), "int4")
