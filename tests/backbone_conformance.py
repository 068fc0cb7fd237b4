"""What every backbone must do, as plain functions; `test_backbones.py` runs them over all families.

Beside them the small networks that stand for the families: of transformers, with random numbers in every parameter.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from featstore.backbones import BackboneSource
from featstore.backbones.tokens import Backbone, Tokens
from featstore.errors import ConfigError

TOLERANCE = 1e-5
DIFFERENCE = 1e-3  # that noise makes at the least; norms bring tokens to about 1

SMALL_DINOV2 = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 14,
}
SMALL_DINOV3 = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 16,
    "num_register_tokens": 4,
}
# label -> (transformers' model class, its config, arguments of the config)
SMALL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Model", "Dinov2Config", SMALL_DINOV2),
    "dinov2-swiglu": ("Dinov2Model", "Dinov2Config", {**SMALL_DINOV2, "use_swiglu_ffn": True, "qkv_bias": False}),
    "dinov2-reg": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {**SMALL_DINOV2, "layer_norm_eps": 1e-3}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", SMALL_DINOV3),
    "dinov3-gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**SMALL_DINOV3, "use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False},
    ),
}


def make_network(label: str, seed: int = 0) -> Any:
    """A small network of transformers in which every parameter is random, biases and scales too."""
    model_class, config_class, arguments = SMALL[label]
    network = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    return network


def save_small(folder: Path) -> dict[str, Path]:
    """One folder in the hub's format per small network."""
    for label in SMALL:
        make_network(label).save_pretrained(folder / label)
    return {label: folder / label for label in SMALL}


def load(source: BackboneSource, compute_dtype: str = "float32", attention: str = "sdpa") -> Any:
    return source.load(device="cpu", compute_dtype=compute_dtype, attention=attention)


def safetensors_bytes(payload: bytes) -> bytes:
    """A valid file with one tensor of bytes."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}}).encode()
    return len(header).to_bytes(8, "little") + header + payload


def shards(folder: Path, payloads: dict[str, bytes]) -> Path:
    """A folder of shards with an index and a config."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name, payload in payloads.items():
        (folder / name).write_bytes(safetensors_bytes(payload))
    index = {"weight_map": {f"tensor.{i}.{name}": name for name in payloads for i in range(2)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def images(backbone: Backbone, rows: int, columns: int, *, count: int = 2, seed: int = 0) -> Tensor:
    """Normalised noise on a grid of rows x columns patches, shape (count, 3, H, W)."""
    patch = backbone.architecture.patch_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, rows * patch, columns * patch, generator=generator)


def largest_difference(a: Tokens, b: Tokens) -> float:
    """max |a - b| over all tokens but those of inner layers."""
    pairs = ((a.cls, b.cls), (a.registers, b.registers), (a.patches, b.patches))
    return max(float((x - y).abs().max()) for x, y in pairs if x.numel())


def check_tokens_cover_the_grid(backbone: Backbone) -> None:
    facts = backbone.architecture
    for rows, columns in ((1, 1), (3, 3), (2, 5)):
        tokens = backbone(images(backbone, rows, columns))
        assert tokens.cls.shape == (2, facts.embed_dim)
        assert tokens.registers.shape == (2, facts.num_registers, facts.embed_dim)
        assert tokens.patches.shape == (2, rows * columns, facts.patch_width)
        assert facts.num_tokens(rows * facts.patch_size, columns * facts.patch_size) == 1 + facts.num_registers + (
            rows * columns
        )
        assert tokens.layers == {}
        for part in (tokens.cls, tokens.registers, tokens.patches):
            assert part.dtype == backbone.dtype
            assert part.device == backbone.device
            assert bool(torch.isfinite(part).all())


def check_patches_run_along_rows(backbone: Backbone) -> None:
    """Where the image changes, the token that changes most is that of the changed patch."""
    rows, columns, patch = 3, 4, backbone.architecture.patch_size
    plain = images(backbone, rows, columns, count=1)
    for row, column in ((0, 3), (2, 0), (1, 2)):
        changed = plain.clone()
        # The very same content at every place would only test positions, so the contrast is turned round.
        changed[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] *= -1
        moved = (backbone(changed).patches - backbone(plain).patches).float().norm(dim=-1)[0]
        assert int(moved.argmax()) == row * columns + column


def check_batch_size_does_not_matter(backbone: Backbone) -> None:
    """Up to rounding, which goes with the size of the numbers: kernels of convolutions depend on the batch."""
    batch = images(backbone, 2, 3, count=5)
    together = backbone(batch)
    largest = max(1.0, float(together.cls.abs().max()), float(together.patches.abs().max()))
    for start, stop in ((0, 1), (1, 3), (4, 5)):
        alone = backbone(batch[start:stop])
        expected = Tokens(
            cls=together.cls[start:stop],
            registers=together.registers[start:stop],
            patches=together.patches[start:stop],
        )
        assert largest_difference(alone, expected) <= TOLERANCE * largest


def check_same_image_same_tokens(backbone: Backbone) -> None:
    batch = images(backbone, 3, 2)
    assert largest_difference(backbone(batch), backbone(batch.clone())) == 0


def check_images_differ(backbone: Backbone) -> None:
    tokens = backbone(images(backbone, 3, 3, count=4))
    assert float(tokens.cls.float().std(dim=0).mean()) > DIFFERENCE
    assert float(tokens.patches.float().std(dim=0).mean()) > DIFFERENCE
    assert float(tokens.patches.float().std(dim=1).mean()) > DIFFERENCE


def check_layers_end_in_final_tokens(backbone: Backbone) -> None:
    depth = backbone.architecture.depth
    batch = images(backbone, 2, 3)
    tokens = backbone(batch, layers=(1, -1, depth))
    assert list(tokens.layers) == [1, depth]
    assert largest_difference(tokens.layers[depth], tokens) == 0
    assert largest_difference(tokens.layers[1], tokens) > 0.01
    assert largest_difference(backbone(batch), tokens) <= TOLERANCE
    # A LayerNorm was applied to each: rows have been standardised before gain and shift.
    assert tokens.layers[1].registers.shape == tokens.registers.shape


def check_layer_must_exist(backbone: Backbone) -> None:
    depth = backbone.architecture.depth
    for layer in (0, depth + 1, -depth - 1):
        with pytest.raises(ConfigError, match=f"layer {layer} does not exist: blocks are numbered 1 to {depth}"):
            backbone(images(backbone, 1, 1), layers=(layer,))


def check_size_must_fit_patch(backbone: Backbone) -> None:
    patch = backbone.architecture.patch_size
    for height, width in ((2 * patch + 1, patch), (patch, 2 * patch - 1), (patch - 1, patch - 1)):
        with pytest.raises(ConfigError, match=f"multiples of the patch size {patch}; {height} x {width} is not"):
            backbone(torch.zeros(1, 3, height, width))


def check_frozen(backbone: Backbone) -> None:
    tokens = backbone(images(backbone, 2, 2).requires_grad_())
    assert not tokens.cls.requires_grad
    assert not tokens.patches.requires_grad


CHECKS = (
    check_tokens_cover_the_grid,
    check_patches_run_along_rows,
    check_batch_size_does_not_matter,
    check_same_image_same_tokens,
    check_images_differ,
    check_layers_end_in_final_tokens,
    check_layer_must_exist,
    check_size_must_fit_patch,
    check_frozen,
)
