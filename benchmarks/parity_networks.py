"""Shared by the parity scripts: random parameters, noise for images, transformers' networks and what they give."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Reference = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
TABLES = ("token", "tokens", "pos_embed", "position_embeddings", "class_embedding", "position_embedding.weight")


def images(height: int, width: int) -> Tensor:
    """Two images of normal noise, (2, 3, height, width)."""
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def randomise(network: Any) -> Any:
    """Random numbers in every parameter and running statistic, of a size at which signals neither die nor grow."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in (*network.named_parameters(), *network.named_buffers()):
            if not value.is_floating_point() or name.endswith(("inv_freq", "periods", "bias_mask", "k_bias")):
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith(TABLES):
                value.copy_(0.2 * noise)
            elif name.endswith("running_var"):
                value.copy_((1 + 0.2 * noise).abs() + 0.1)
            elif value.ndim >= 2:
                value.copy_(noise / max(1, value[0].numel()) ** 0.5)
            elif name.endswith(("bias", "running_mean")):
                value.copy_(0.1 * noise)
            else:  # norms and layer scales
                value.copy_(1 + 0.2 * noise)
    return network.eval()


def sequence(registers: int = 0, **options: Any) -> Reference:
    """CLS and patches of `last_hidden_state`."""

    def reference(network: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = network(pixels, **options).last_hidden_state
        return tokens[:, 0], tokens[:, 1 + registers :]

    return reference


def before_norm(**options: Any) -> Reference:
    """CLS and patches as the last block gives them."""

    def reference(network: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = _last_block(network, pixels, **options)
        return tokens[:, 0], tokens[:, 1:]

    return reference


def masked_autoencoder(network: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """With nothing masked and the noise that shuffles patches in order, so that they stay where they are."""
    patch = network.config.patch_size
    count = pixels.shape[2] // patch * (pixels.shape[3] // patch)
    noise = torch.arange(count).expand(len(pixels), count)
    return before_norm(noise=noise, interpolate_pos_encoding=True)(network, pixels)


def mean_of_last_block(network: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over space of the last block, and its places along rows."""
    patches = _last_block(network, pixels).flatten(1, 2)
    return patches.mean(1), patches


def feature_map(network: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What the network pools, and its last feature map along rows."""
    output = network(pixels)
    return output.pooler_output.flatten(1), output.last_hidden_state.flatten(2).transpose(1, 2)


def _last_block(network: Any, pixels: Tensor, **options: Any) -> Tensor:
    # The longest list of modules is that of the blocks.
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    kept: list[Any] = []
    handle = max(lists, key=len)[-1].register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        network(pixels, **options)
    finally:
        handle.remove()
    tokens: Tensor = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    return tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A network of transformers: `config` is the release's size, `small` what replaces parts of it in a quick run.

    `sizes` are in pixels, the native one first.
    """

    label: str
    family: str
    model: str
    config: dict[str, Any]
    small: dict[str, Any]
    sizes: tuple[tuple[int, int], ...]
    small_sizes: tuple[tuple[int, int], ...]
    reference: Reference
    options: dict[str, Any] = field(default_factory=dict)


VIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
VIT_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
AT_14 = {"sizes": ((518, 518), (224, 224), (224, 336)), "small_sizes": ((42, 42), (70, 70), (28, 56))}
AT_16 = {"sizes": ((224, 224), (384, 384), (224, 336)), "small_sizes": ((48, 48), (80, 80), (32, 64))}
# The larger networks.
B_AT_16 = {**AT_16, "sizes": ((224, 224), (256, 256), (160, 224))}
AT_32 = {"sizes": ((224, 224), (256, 256), (224, 320)), "small_sizes": ((64, 64), (96, 96), (64, 128))}
TINY_14, TINY_16 = {**TINY, "image_size": 42}, {**TINY, "image_size": 48, "intermediate_size": 64}
DINOV2: dict[str, Any] = {"image_size": 518, "patch_size": 14}
DINOV3: dict[str, Any] = {"image_size": 224, "patch_size": 16, "num_register_tokens": 4}
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
PLAIN: dict[str, Any] = {"image_size": 224, "patch_size": 16, "intermediate_size": 3072}
STAGES: dict[str, Any] = {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]}
TINY_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}

CASES = (
    Case(
        label="DINOv2 S/14",
        family="dinov2",
        model="Dinov2",
        config={**VIT_S, **DINOV2},
        small=TINY_14,
        reference=sequence(),
        **AT_14,
    ),
    Case(
        label="DINOv2 S/14, gated as in g",
        family="dinov2",
        model="Dinov2",
        config={**VIT_S, **DINOV2, "use_swiglu_ffn": True},
        small=TINY_14,
        reference=sequence(),
        **AT_14,
    ),
    Case(
        label="DINOv2 S/14 with registers",
        family="dinov2_with_registers",
        model="Dinov2WithRegisters",
        config={**VIT_S, **DINOV2, "num_register_tokens": 4},
        small=TINY_14,
        reference=sequence(4),
        **AT_14,
    ),
    Case(
        label="DINOv3 S/16",
        family="dinov3_vit",
        model="DINOv3ViT",
        config={**VIT_S, **DINOV3, "intermediate_size": 1536},
        small=TINY_16,
        reference=sequence(4),
        **AT_16,
    ),
    Case(
        label="DINOv3 S+/16",
        family="dinov3_vit",
        model="DINOv3ViT",
        config={**VIT_S, **DINOV3, **GATED, "intermediate_size": 1536},
        small=TINY_16,
        reference=sequence(4),
        **AT_16,
    ),
    Case(
        label="DINOv3 ConvNeXt-T",
        family="dinov3_convnext",
        model="DINOv3ConvNext",
        config={**STAGES, "image_size": 224},
        small=TINY_STAGES,
        reference=sequence(),
        **AT_32,
    ),
    Case(
        label="ViT-B/16",
        family="vit",
        model="ViT",
        config={**VIT_B, **PLAIN},
        small=TINY_16,
        reference=sequence(interpolate_pos_encoding=True),
        options={"add_pooling_layer": False},
        **B_AT_16,
    ),
    Case(
        label="MAE B/16",
        family="vit_mae",
        model="ViTMAE",
        config={**VIT_B, **PLAIN, "mask_ratio": 0.0},
        small=TINY_16,
        reference=masked_autoencoder,
        **B_AT_16,
    ),
    Case(
        label="MSN B/16",
        family="vit_msn",
        model="ViTMSN",
        config={**VIT_B, **PLAIN},
        small=TINY_16,
        reference=before_norm(interpolate_pos_encoding=True),
        **B_AT_16,
    ),
    Case(
        label="CLIP B/16",
        family="clip_vision_model",
        model="CLIPVision",
        config={**VIT_B, **PLAIN},
        small=TINY_16,
        reference=before_norm(interpolate_pos_encoding=True),
        **B_AT_16,
    ),
    Case(
        label="SAM B/16, 512 pixels",
        family="sam_vision_model",
        model="SamVision",
        config={**VIT_B, "image_size": 512, "patch_size": 16, "global_attn_indexes": [2, 5, 8, 11]},
        small={**TINY, "image_size": 64, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 64},
        sizes=((512, 512),),
        small_sizes=((64, 64),),
        reference=mean_of_last_block,
    ),
    Case(
        label="ConvNeXt-T",
        family="convnext",
        model="ConvNext",
        config=STAGES,
        small=TINY_STAGES,
        reference=feature_map,
        **AT_32,
    ),
    Case(
        label="ResNet50",
        family="resnet",
        model="ResNet",
        config={},
        small={"depths": [1, 1, 1, 1]},
        reference=feature_map,
        **AT_32,
    ),
    Case(
        label="MobileNetV2",
        family="mobilenet_v2",
        model="MobileNetV2",
        config={"layer_norm_eps": 0.001},
        small={},
        reference=feature_map,
        **AT_32,
    ),
)
