"""Small models of transformers that stand for ViT, MAE, MSN, CLIP and SAM, as the hub has them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
PLAIN = {**SHAPE, "image_size": 48, "patch_size": 16}
TEXT = {**SHAPE, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
TOWER = {**SHAPE, "image_size": 42, "patch_size": 14}
GELU_TOWER = {**TOWER, "hidden_act": "gelu"}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
# Windows of 3 x 3 patches over a grid of 4 x 4, so that some are padded.
WINDOWED = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "window_size": 3,
    "global_attn_indexes": [1],
    "mlp_ratio": 1.5,
    "output_channels": 8,
    "num_pos_feats": 4,
}


@dataclass(frozen=True)
class Case:
    """A model of transformers as the hub has it, and where its image network stands in it."""

    model: str
    config: Callable[[], Any]
    part: str = ""
    options: dict[str, Any] | None = None


CASES = {
    "vit": Case("ViTModel", lambda: transformers.ViTConfig(**PLAIN)),
    "vit-classifier": Case(
        "ViTForImageClassification", lambda: transformers.ViTConfig(**PLAIN, layer_norm_eps=1e-6), "vit"
    ),
    "vit-no-bias": Case("ViTModel", lambda: transformers.ViTConfig(**PLAIN, qkv_bias=False)),
    "mae": Case("ViTMAEForPreTraining", lambda: transformers.ViTMAEConfig(**PLAIN, **DECODER), "vit"),
    "mae-encoder": Case("ViTMAEModel", lambda: transformers.ViTMAEConfig(**PLAIN, **DECODER)),
    "msn": Case("ViTMSNModel", lambda: transformers.ViTMSNConfig(**PLAIN)),
    "msn-classifier": Case("ViTMSNForImageClassification", lambda: transformers.ViTMSNConfig(**PLAIN), "vit"),
    "clip": Case(
        "CLIPModel", lambda: transformers.CLIPConfig(vision_config=TOWER, text_config=TEXT), part="vision_model"
    ),
    "clip-gelu": Case(
        "CLIPModel", lambda: transformers.CLIPConfig(vision_config=GELU_TOWER, text_config=TEXT), part="vision_model"
    ),
    "clip-tower": Case("CLIPVisionModel", lambda: transformers.CLIPVisionConfig(**TOWER)),
    "clip-projection": Case(
        "CLIPVisionModelWithProjection", lambda: transformers.CLIPVisionConfig(**TOWER), part="vision_model"
    ),
}
SAM_CASES = {
    "sam": Case(
        "SamModel",
        lambda: transformers.SamConfig(
            vision_config=WINDOWED,
            prompt_encoder_config={"hidden_size": 8, "image_size": 64, "mask_input_channels": 4},
            mask_decoder_config={"hidden_size": 8, "mlp_dim": 8, "num_attention_heads": 2, "iou_head_hidden_dim": 8},
        ),
        "vision_encoder",
    ),
    "sam-tower": Case("SamVisionModel", lambda: transformers.SamVisionConfig(**WINDOWED), "vision_encoder"),
}
ALL = {**CASES, **SAM_CASES}


def make_model(label: str, seed: int = 0) -> Any:
    """A small model of transformers in which every parameter is random, biases and scales too."""
    case = ALL[label]
    network = getattr(transformers, case.model)(case.config()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + 0.05)
    return network


def image_part(label: str, network: Any) -> Any:
    return network.get_submodule(ALL[label].part)


def save_all(folder: Path) -> dict[str, Path]:
    """One folder in the hub's format per model."""
    for label in ALL:
        make_model(label).save_pretrained(folder / label)
    return {label: folder / label for label in ALL}
