"""Attention kernels: the same tokens through each, and the name of the one that really ran."""

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_conformance import SMALL, TOLERANCE, images, largest_difference, load, make_network, save_small
from torch import Tensor

from featstore.backbones import attention, describe
from featstore.backbones.architecture import Architecture
from featstore.backbones.attention import OWN, choose_attention, kernel_that_runs
from featstore.backbones.family import Dialect, Family, HubKey
from featstore.backbones.source import find_family
from featstore.errors import ConfigError

ROUTED = ("dinov2", "dinov2-swiglu", "dinov2-reg", "dinov3", "dinov3-gated")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_small(tmp_path_factory.mktemp("weights"))


def operators_of(backbone: Any, pixels: Tensor) -> set[str]:
    """Names of everything that torch runs for some images."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        backbone(pixels)
    return {event.key for event in profile.key_averages()}


@pytest.fixture
def fake_xformers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The documented interface of xformers.ops in plain torch: (B, M, H, K) in and out. Returns the shapes it saw."""
    calls: list[tuple[int, ...]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
        calls.append(tuple(query.shape))
        if query.dtype == torch.float16:
            raise NotImplementedError("No operator found for memory_efficient_attention_forward")
        weights = torch.einsum("bmhk,bnhk->bhmn", query, key) * (scale or query.shape[-1] ** -0.5)
        return torch.einsum("bhmn,bnhk->bmhk", weights.softmax(-1), value)

    module, ops, fmha = (types.ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha"))
    module.__spec__ = importlib.machinery.ModuleSpec("xformers", None)
    ops.memory_efficient_attention = attend  # type: ignore[attr-defined]
    fmha.Inputs = lambda **parts: parts  # type: ignore[attr-defined]
    fmha._dispatch_fw = lambda inputs, needs_gradient: types.SimpleNamespace(NAME="cutlassF-pt")  # type: ignore[attr-defined]
    module.ops, ops.fmha = ops, fmha  # type: ignore[attr-defined]
    for name, part in (("xformers", module), ("xformers.ops", ops), ("xformers.ops.fmha", fmha)):
        monkeypatch.setitem(sys.modules, name, part)
    attention._register.cache_clear()
    return calls


@pytest.mark.parametrize("label", ROUTED)
@pytest.mark.parametrize("kernel", ["sdpa", "flash", "xformers"])
def test_kernels_agree_with_the_formula(
    label: str, kernel: str, folders: dict[str, Path], fake_xformers: list[tuple[int, ...]]
) -> None:
    source = describe(f"hf:{folders[label]}")
    eager, other = load(source, attention="eager"), load(source, attention=kernel)
    for rows, columns in ((3, 3), (1, 1), (2, 5)):
        pixels = images(eager, rows, columns, count=3)
        one, two = eager(pixels, layers=(1,)), other(pixels, layers=(1,))
        assert largest_difference(one, two) <= TOLERANCE
        assert largest_difference(one.layers[1], two.layers[1]) <= TOLERANCE
    assert other.network.config._attn_implementation == OWN.get(kernel, kernel)
    if kernel == "xformers":
        heads, depth = 2, 3
        assert len(fake_xformers) == 3 * depth
        assert fake_xformers[-1] == (3, other.architecture.num_tokens(*pixels.shape[2:]), heads, 16)
    else:
        assert not fake_xformers


@pytest.mark.parametrize("kernel", ["sdpa", "flash", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_named_is_the_one_that_ran(kernel: str, dtype: str, folders: dict[str, Path]) -> None:
    backbone = load(describe(f"hf:{folders['dinov3']}"), dtype, attention=kernel)
    pixels = images(backbone, 4, 4)
    seen = operators_of(backbone, pixels)
    named = backbone.kernel
    assert named == kernel_that_runs(kernel, backbone.architecture, pixels, backbone.dtype)
    ran = {
        "sdpa (flash)": "aten::_scaled_dot_product_flash_attention_for_cpu",
        "sdpa (math)": "aten::_scaled_dot_product_attention_math",
        "eager": "aten::_softmax",
    }[named]
    assert ran in seen
    assert (kernel == "eager") == (named == "eager")


def test_sdpa_falls_back_where_flash_cannot_run(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    backbone = load(describe(f"hf:{folders['dinov2']}"), attention="flash")

    def refuse(*parts: Tensor, **options: Any) -> Tensor:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(attention, "scaled_dot_product_attention", refuse)
    with pytest.raises(ConfigError, match=r"--attention flash: torch has no FlashAttention kernel for torch\.float32"):
        backbone(images(backbone, 1, 1))

    def broken(*parts: Tensor, **options: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(attention, "scaled_dot_product_attention", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        backbone(images(backbone, 1, 1))


def test_xformers_without_a_kernel_here(folders: dict[str, Path], fake_xformers: list[tuple[int, ...]]) -> None:
    backbone = load(describe(f"hf:{folders['dinov2']}"), "float16", attention="xformers")
    with pytest.raises(ConfigError, match=r"--attention xformers: it has no kernel for torch\.float16 on cpu; use"):
        backbone(images(backbone, 1, 1))
    assert kernel_that_runs("xformers", backbone.architecture, images(backbone, 1, 1), torch.float32) == (
        "xformers (cutlassF-pt)"
    )


def test_xformers_that_is_absent(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    attention._register.cache_clear()
    with pytest.raises(ConfigError, match=r"--attention xformers: the package cannot be imported .*featstore\[gpu\]"):
        load(describe(f"hf:{folders['dinov2']}"), attention="xformers")


def test_masks_are_not_dropped_silently() -> None:
    query = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ConfigError, match="this attention kernel takes no mask; use --attention sdpa or eager"):
        attention._flash(None, query, query, query, torch.ones(2, 2))


def test_families_that_ignore_the_choice_say_so() -> None:
    plain = Family(model_type="plain", dialects=(Dialect(name="hub", key=HubKey),), attention=())
    choose_attention(None, plain, "sdpa")
    with pytest.raises(ConfigError, match="--attention eager: plain does not run its attention through it; leave"):
        choose_attention(None, plain, "eager")
    some = Family(model_type="some", dialects=(Dialect(name="hub", key=HubKey),), attention=("sdpa", "eager"))
    with pytest.raises(ConfigError, match=r"--attention flash: some does not run .*; it can be sdpa or eager"):
        choose_attention(None, some, "flash")


def test_networks_without_heads_keep_the_plain_name() -> None:
    facts = Architecture(family="own", embed_dim=8, depth=0, patch_size=32, num_registers=0, native_size=224)
    assert kernel_that_runs("sdpa", facts, torch.zeros(1, 3, 32, 32), torch.float32) == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kernel", ["sdpa", "flash", "xformers"])
def test_kernels_agree_on_a_gpu(kernel: str) -> None:
    if kernel == "xformers":
        pytest.importorskip("xformers")
    source = describe("dinov3-small", random_weights=0)
    eager = source.load(device="cuda", compute_dtype="bfloat16", attention="eager")
    other = source.load(device="cuda", compute_dtype="bfloat16", attention=kernel)
    pixels = images(eager, 14, 14, count=4).cuda()
    one, two = eager(pixels), other(pixels)
    assert float(torch.cosine_similarity(one.patches.float(), two.patches.float(), dim=-1).min()) > 0.999
    assert other.kernel.startswith(("sdpa (", "xformers ("))


def test_small_networks_are_all_routed() -> None:
    assert set(ROUTED) <= set(SMALL)
    for label in ROUTED:
        kind = make_network(label).config.model_type
        assert find_family(kind).attention == ("sdpa", "eager", "xformers", "flash")
