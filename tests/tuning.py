"""Small networks of every kind for the tests of fine-tuning, and how their tokens are compared."""

from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

import torch
from backbone_conformance import images
from torch import Tensor, nn

from featstore.backbones import BACKBONES, describe
from featstore.backbones.architecture import Architecture
from featstore.backbones.convnext import make as make_convnext
from featstore.backbones.mobilenet import MOBILENETV2
from featstore.backbones.network import NetworkBackbone, load_network
from featstore.backbones.source import LoadOptions, find_family
from featstore.backbones.tensors import RandomTensors
from featstore.backbones.tokens import Tokens
from featstore.backbones.trainable import Trainable, make_trainable
from probes.adapters import Adapted

OPTIONS = LoadOptions(device="cpu", compute_dtype="float32")
DINOV2 = replace(describe("tiny-random").architecture, family="dinov2", num_registers=0, depth=3, embed_dim=48)
FACTS: dict[str, Architecture] = {
    "dinov2": replace(DINOV2, mlp_dim=192),  # type: ignore[call-arg]
    "dinov2-swiglu": replace(DINOV2, mlp="swiglu", mlp_dim=128),  # type: ignore[call-arg]
    "dinov2-reg": replace(DINOV2, family="dinov2_with_registers", num_registers=4, mlp_dim=192),  # type: ignore[call-arg]
    "dinov3": replace(
        resolve_name(BACKBONES["dinov3-small"]).architecture, depth=3, embed_dim=48, num_heads=3, mlp_dim=96
    ),
    "dinov3-gated": replace(
        resolve_name(BACKBONES["dinov3-7b"]).architecture, depth=2, embed_dim=48, num_heads=3, mlp_dim=96
    ),
    "convnext": make_convnext("convnext", (1, 2, 1, 1), (8, 16, 24, 32), eps=1e-6),
    "dinov3-convnext": make_convnext("dinov3_convnext", (1, 2, 1, 1), (8, 16, 24, 32), eps=1e-6),
    "resnet": replace(resolve_name(BACKBONES["resnet50"]).architecture, variant="1-1-1-1"),
    "mobilenet": MOBILENETV2.architecture,
}
# Other listed vision transformers, of the size of those above.
SHRUNK = {
    label: replace(
        resolve_name(BACKBONES[name]).architecture, depth=3, embed_dim=48, num_heads=3, mlp_dim=96, native_size=size
    )
    for label, name, size in (
        ("vit", "vit-large", 64),
        ("mae", "mae-base", 64),
        ("msn", "msn-large", 64),
        ("clip", "clip-large", 56),
        ("sam", "sam-large", 64),
        ("biomedclip", "biomedclip", 64),
        ("uni", "uni", 64),
        ("conch", "conch", 64),
    )
}
for label in ("biomedclip", "conch"):  # a trunk as wide as what is made of it
    SHRUNK[label] = replace(SHRUNK[label], patch_dim=48)
LEARNERS = ("dinov2", "dinov3", "dinov3-convnext", "mobilenet")


def load(label: str, seed: int = 0) -> NetworkBackbone:
    facts = FACTS[label] if label in FACTS else SHRUNK[label]
    family = find_family(facts.family)
    backbone = load_network(RandomTensors(seed, family), facts, family, "hf", OPTIONS)
    assert isinstance(backbone, NetworkBackbone)
    return backbone


def fresh(label: str, **options: Any) -> Trainable:
    return make_trainable(load(label), **options)


def pixels(trainable: Trainable, count: int = 4, seed: int = 0) -> Tensor:
    facts = trainable.architecture
    side = facts.native_size // facts.patch_size if facts.fixed_size else 2
    return images(trainable, side, side, count=count, seed=seed)


def perturb(adapted: Adapted, scale: float = 0.05, seed: int = 1) -> None:
    """Something else than the first values in all that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def same(first: Tokens, second: Tokens) -> bool:
    pairs = ((first.cls, second.cls), (first.registers, second.registers), (first.patches, second.patches))
    layers = first.layers.keys() == second.layers.keys()
    inner = all(same(first.layers[number], second.layers[number]) for number in first.layers)
    return layers and inner and all(torch.equal(x, y) for x, y in pairs)


def gap(first: Tokens, second: Tokens) -> float:
    """Largest difference relative to the largest number."""
    pairs = ((first.cls, second.cls), (first.patches, second.patches))
    return max(float(((x - y).abs().max() / y.abs().max()).detach()) for x, y in pairs)


class FusedBlock(nn.Module):
    """A block with timm's names: query, key and value in one matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.attn["qkv"](tokens).chunk(3, dim=-1)
        tokens = tokens + self.attn["proj"](nn.functional.scaled_dot_product_attention(query, key, value))
        mixed: Tensor = tokens + self.mlp["fc2"](torch.relu(self.mlp["fc1"](tokens)))
        return mixed


class Own(nn.Module):
    """A user's own network."""

    architecture = replace(DINOV2, embed_dim=8, depth=0)
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 14, 14)
        self.blocks = nn.ModuleList([FusedBlock(8), FusedBlock(8)])

    def forward(self, pixels: Tensor, *, layers: tuple[int, ...] = ()) -> Tokens:
        tokens = self.stem(pixels).flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens)
        return Tokens(cls=tokens.mean(1), registers=tokens[:, :0], patches=tokens)


class Closed(Own):
    def forward(self, pixels: Tensor, *, layers: tuple[int, ...] = ()) -> Tokens:
        with torch.inference_mode():
            return super().forward(pixels)
