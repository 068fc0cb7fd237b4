"""Biases of attention keys: which softmax ignores, in float64 and by brute force, and that training leaves them."""

import re
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from backbone_conformance import images
from torch import Tensor, nn
from tuning import FACTS, OPTIONS, Own, fresh, load
from tuning_runs import FAST, adapted_of, pictures, task_of, tune, weights_of

from featstore.backbones import BACKBONES
from featstore.backbones.anatomy import find_key_biases
from featstore.backbones.architecture import VisionTransformer
from featstore.backbones.family import Release
from featstore.backbones.network import NetworkBackbone, build_empty, compute_tokens, load_network
from featstore.backbones.source import find_family
from featstore.backbones.tensors import RandomTensors
from featstore.backbones.timm_models import FAMILY as TIMM
from featstore.backbones.timm_models import PLAIN_ATTENTION
from featstore.backbones.tokens import Tokens
from probes.adapters import Adapted, adapt
from probes.adapters_config import AdapterConfig
from probes.tasks import Task
from probes.tuning_model import TrueZeros, Tuned, make_head

# Numbers are of size 1; float64 rounds them to 1e-16.
NOTHING, CLEAR = 1e-12, 1e-7
PLAIN = ("dinov2", "dinov2-swiglu", "dinov2-reg", "vit", "mae", "msn", "clip", "sam", "biomedclip", "uni", "conch")
BIASED_ROTARY = replace(FACTS["dinov3"], qkv_bias=(True, True, True))  # type: ignore[call-arg]


def backbone_of(label: str) -> NetworkBackbone:
    if label != "dinov3-key-bias":
        return load(label)
    found = load_network(RandomTensors(0, find_family("dinov3_vit")), BIASED_ROTARY, find_family("dinov3_vit"), "hf",
                         OPTIONS)  # fmt: skip
    assert isinstance(found, NetworkBackbone)
    return found


class Exact:
    """A small network in float64, with random numbers in every bias, and how far its tokens move."""

    def __init__(self, label: str) -> None:
        backbone = backbone_of(label)
        self.family, self.facts = backbone.family, backbone.architecture
        self.network = backbone.network.double()
        self.generator = torch.Generator().manual_seed(5)
        side = self.facts.native_size // self.facts.patch_size if self.facts.fixed_size else 3
        self.pixels = images(backbone, side, side, count=2, seed=4).double()
        with torch.no_grad():
            for parameter in self.network.parameters():
                if parameter.ndim == 1:
                    parameter.add_(self.noise(len(parameter)), alpha=0.3)
        self.expected = self.tokens()

    def noise(self, count: int) -> Tensor:
        return torch.randn(count, generator=self.generator, dtype=torch.float64)

    def tokens(self) -> Tokens:
        with torch.no_grad():
            return compute_tokens(self.network, self.facts, self.family, self.pixels)

    def moved(self, name: str, part: slice) -> float:
        """Largest change of a token where a random vector is added to a part of a parameter."""
        values = self.network.get_parameter(name).data
        before = values.clone()
        values[part] += self.noise(len(values[part]))
        found = self.tokens()
        values.copy_(before)
        pairs = ((found.cls, self.expected.cls), (found.patches, self.expected.patches))
        return max(float((first - second).abs().max()) for first, second in pairs)


@pytest.mark.parametrize("label", [*PLAIN, "dinov3-key-bias", "dinov3", "convnext", "dinov3-convnext", "resnet"])
def test_just_the_claimed_biases_are_ignored(label: str) -> None:
    """Every bias of every kind of network is moved, fused ones by thirds."""
    exact = Exact(label)
    claimed = find_key_biases(exact.network, exact.family)
    ignored: dict[str, slice] = {}
    for name, parameter in exact.network.named_parameters():
        if not name.endswith("bias"):
            continue
        third = len(parameter) // 3 if name.endswith("qkv.bias") else len(parameter)
        for start in range(0, len(parameter), third):
            moved = exact.moved(name, slice(start, start + third))
            assert moved < NOTHING or moved > CLEAR, (name, moved)
            if moved < NOTHING:
                ignored[name] = slice(start, start + third)
    behind = {"layernorm.bias", "post_layernorm.bias"} if not exact.facts.final_norm else set()
    assert {name: part for name, part in ignored.items() if name not in behind} == claimed
    depth = exact.facts.depth if label in PLAIN else 0
    assert len(claimed) == depth + (label == "conch")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if number % 3 else [])
        for number, name in enumerate(sorted({*BACKBONES} - {"tiny-random"}))
    ],
)
def test_claims_of_every_listed_network(name: str) -> None:
    release = resolve_name(BACKBONES[name])
    facts = release.architecture if isinstance(release, Release) else release
    family = find_family(facts.family)
    found = find_key_biases(build_empty(facts, family), family)
    pooled = int(facts.family == "conch")
    rotary = facts.family == "dinov3_vit"
    assert len(found) == (facts.depth + pooled if isinstance(facts, VisionTransformer) and not rotary else 0)
    assert {part.stop - part.start for part in found.values()} <= {getattr(facts, "patch_width", 0), facts.embed_dim}


def test_names_of_older_versions_of_transformers_are_known() -> None:
    (each,) = find_family("dinov2").key_biases
    assert re.fullmatch(each.names, "encoder.layer.0.attention.attention.key.bias")
    assert not re.fullmatch(each.names, "encoder.layer.0.attention.attention.query.bias")
    assert not re.fullmatch(each.names, "encoder.layer.0.attention.attention.key.weight")


def test_of_own_networks_nothing_is_known() -> None:
    assert find_key_biases(Own(), None) == {}


# timm


class Fused(nn.Module):
    """The formula of timm's plain attention, by its names."""

    def __init__(self, width: int = 12, heads: int = 3, *, normed: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.k_norm = nn.LayerNorm(width // heads, elementwise_affine=False) if normed else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(query, self.k_norm(key), value).transpose(1, 2).flatten(2)


class Pool(nn.Module):
    """That of its pool of a latent query; it has no norms of keys by default."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.kv = nn.Linear(width, 2 * width)
        self.latent = nn.Parameter(torch.randn(1, heads, 1, width // heads))

    def forward(self, tokens: Tensor) -> Tensor:
        key, value = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query = self.latent.expand(len(tokens), -1, -1, -1)
        return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def called(kind: type[nn.Module], place: str, **options: Any) -> nn.Module:
    """A module whose class stands at a place of timm's."""
    module, _, name = place.rpartition(".")
    made: nn.Module = type(name, (kind,), {"__module__": module})(**options)
    return made


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        (called(Fused, PLAIN_ATTENTION[0]), {"attn.qkv.bias": slice(12, 24)}),
        (called(Fused, PLAIN_ATTENTION[1]), {"attn.qkv.bias": slice(12, 24)}),
        (called(Pool, PLAIN_ATTENTION[2]), {"attn.kv.bias": slice(0, 12)}),
        (called(Fused, PLAIN_ATTENTION[0], normed=True), {}),
    ],
)
def test_those_of_timm(attention: nn.Module, expected: dict[str, slice]) -> None:
    """By the class of the attention; `timm_parity.py` moves those of timm's own networks."""
    whole = nn.ModuleDict({"attn": attention}).double()
    assert find_key_biases(whole, TIMM) == expected
    bias = next(value.data for name, value in whole.named_parameters() if name.endswith("bias"))
    tokens = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for start in range(0, len(bias), 12):
        before = attention(tokens).detach()
        bias[start : start + 12] += torch.linspace(-2, 3, 12, dtype=torch.float64)
        moved = float((attention(tokens) - before).detach().abs().max())
        assert moved < NOTHING if slice(start, start + 12) in expected.values() else moved > CLEAR


def test_of_other_attention_of_timm_nothing_is_known() -> None:
    for place in ("timm.layers.attention.AttentionRope", "timm.models.maxxvit.AttentionCl", "own.Attention"):
        assert find_key_biases(nn.ModuleDict({"attn": called(Fused, place)}), TIMM) == {}


# Training


def tuned(label: str, method: str = "full", **settings: Any) -> Tuned:
    features = "mean_patch" if label == "sam" else "cls+mean_patch"
    adapted = adapt(fresh(label), method, AdapterConfig(**settings), features=features)
    return Tuned(adapted, features, make_head(adapted, features, 2, 0))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return task_of(pictures(tmp_path_factory.mktemp("keys")))


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_a_run_leaves_them_as_they_were(method: str, task: Task, tmp_path: Path) -> None:
    """To the bit, with AdamW, averages and clipping, which all other biases move by."""
    before = weights_of(adapted_of(task))
    how = replace(FAST.optimisation, weight_decay=0.1, ema=0.5, clip=1.0)
    _, adapted = tune(task, tmp_path, replace(FAST, optimisation=how), method=method)
    ignored = adapted.ignored()
    assert len(ignored) == 4
    for name, value in weights_of(adapted).items():
        if name.endswith("bias"):
            assert torch.equal(value, before[name]) is (name in ignored), name
    held = sum(len(adapted.parameters[name]) for name in ignored)
    assert adapted.counts().trainable >= held == 4 * 192  # they count all the same


@pytest.mark.parametrize(
    ("label", "method", "settings"),
    [
        ("dinov2", "full", {}),
        ("dinov2", "bitfit", {}),
        ("dinov2", "last-k", {"k": 1}),
        ("dinov2", "lora", {"targets": "q,k,v", "bias": "lora_only"}),
        ("sam", "full", {}),
        ("sam", "lora", {"targets": "qkv", "bias": "lora_only"}),
        ("conch", "full", {}),
        ("dinov3", "full", {}),
    ],
)
def test_gradients_are_held_at_zero(label: str, method: str, settings: dict[str, Any]) -> None:
    model = tuned(label, method, **settings)
    zeros = TrueZeros(model)
    for parameter in model.trained().values():
        parameter.grad = torch.ones_like(parameter)
    zeros.hold()
    for name, parameter in model.trained().items():
        assert parameter.grad is not None
        expected = torch.ones_like(parameter)
        if name.endswith(("k_proj.bias", "k_proj.base_layer.bias", "key_projection.bias", "key.bias")):
            expected.zero_()
        elif ".qkv." in name and name.endswith("bias"):
            expected[48:96] = 0
        assert torch.equal(parameter.grad, expected), name
    assert len(model.adapted.ignored()) == {"last-k": 1}.get(method, {"conch": 4, "dinov3": 0}.get(label, 3))


def test_adapters_on_keys_train_as_ever() -> None:
    adapted: Adapted = adapt(fresh("dinov2"), "lora", AdapterConfig(targets="k"))
    assert len(adapted.parameters) == 6
    assert adapted.ignored() == {}
