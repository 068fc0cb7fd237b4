"""CLIP: the image tower alone, before the projection into the space that it shares with text.

Source: Radford et al. 2021 (CLIP), Cherti et al. 2023 (OpenCLIP); sizes as in the releases' own `config.json`. The
final norm belongs to CLS alone: the network applies it to no patch. OpenAI's activation is x * sigmoid(1.702 x),
OpenCLIP's is the exact GELU.
"""

from typing import Any, Literal

from featstore.backbones.architecture import Architecture, VisionTransformer
from featstore.backbones.family import SEPARATE_KEYS, ConfigFields, Dialect, Family, HubKey, Release
from featstore.backbones.vit import BEFORE_NORM, counted, num_parameters
from featstore.errors import WeightsError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The defaults of transformers' own configuration class, for fields that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def tower_config(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the image tower, from its own `config.json` or from that of the whole model.

    Old files of whole models state some fields twice; as in transformers, `vision_config_dict` counts, with defaults
    for what it leaves out.
    """
    if config.get("model_type") != "clip":
        return config
    tower, older = config.get("vision_config") or {}, config.get("vision_config_dict")
    if not isinstance(tower, dict) or not isinstance(older or {}, dict):
        raise WeightsError("config.json says vision_config is no object; it must hold the image tower's fields")
    return tower if older is None else {**tower, **DEFAULTS, **older}


def _counted(facts: VisionTransformer) -> VisionTransformer:
    # One more norm, before the blocks, and no bias of the patches.
    return counted(facts, num_parameters(facts) + facts.embed_dim)


def _read(config: dict[str, Any]) -> VisionTransformer:
    fields = ConfigFields(tower_config(config), DEFAULTS)
    fields.require("num_channels", 3)
    mlp = fields.values["hidden_act"]
    if mlp not in ("gelu", "quick_gelu"):
        raise WeightsError(
            f"config.json says hidden_act = {mlp!r}, which is not supported; it must be 'gelu' or 'quick_gelu'"
        )
    return _counted(
        VisionTransformer(
            family="clip_vision_model",
            embed_dim=fields.integer("hidden_size"),
            depth=fields.integer("num_hidden_layers"),
            num_heads=fields.integer("num_attention_heads"),
            patch_size=fields.integer("patch_size"),
            num_registers=0,
            mlp=mlp,
            mlp_dim=fields.integer("intermediate_size"),
            native_size=fields.integer("image_size"),
            norm_eps=fields.number("layer_norm_eps"),
            mean=CLIP_MEAN,
            std=CLIP_STD,
            final_norm=False,
        )
    )


def _write(architecture: Architecture) -> dict[str, Any]:
    assert isinstance(architecture, VisionTransformer)
    return {
        "hidden_size": architecture.embed_dim,
        "intermediate_size": architecture.mlp_dim,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.num_heads,
        "num_channels": 3,
        "image_size": architecture.native_size,
        "patch_size": architecture.patch_size,
        "hidden_act": architecture.mlp,
        "layer_norm_eps": architecture.norm_eps,
    }


def _call(network: Any, pixels: Any, architecture: Architecture) -> Any:
    return _norm_cls(network.post_layernorm, network(pixels, interpolate_pos_encoding=True).last_hidden_state)


def _norm_cls(norm: Any, sequence: Any) -> Any:
    import torch

    return torch.cat((norm(sequence[:, 0]).unsqueeze(1), sequence[:, 1:]), dim=1)


HUB = Dialect(
    name="hub",
    key=HubKey,
    prefixes=("vision_model.", ""),
    ignored=(r"embeddings\.position_ids$",),  # the numbers 0, 1, ..., which files of old versions hold
    outside=(r"text_model\.", r"text_projection\.", r"visual_projection\.", r"logit_scale$", r"classifier\."),
)

FAMILY = Family(
    model_type="clip_vision_model",
    model_class="CLIPVisionModel",
    config_class="CLIPVisionConfig",
    blocks="encoder.layers",
    norm="post_layernorm",
    read=_read,
    write=_write,
    call=_call,
    finish=_norm_cls,
    dialects=(HUB,),
    key_biases=(SEPARATE_KEYS,),
)


def _architecture(
    embed_dim: int, depth: int, num_heads: int, *, mlp: Literal["gelu", "quick_gelu"]
) -> VisionTransformer:
    return _counted(
        VisionTransformer(
            family="clip_vision_model",
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            patch_size=14,
            num_registers=0,
            mlp=mlp,
            mlp_dim=4 * embed_dim,
            native_size=224,
            norm_eps=1e-5,
            mean=CLIP_MEAN,
            std=CLIP_STD,
            final_norm=False,
        )
    )


LARGE = Release(
    architecture=_architecture(1024, 24, 16, mlp="quick_gelu"),
    hub_id="openai/clip-vit-large-patch14",
    licence="MIT (of the code)",
    pretraining=("WIT-400M",),
    feature=f"{BEFORE_NORM}; no projection",
)
HUGE = Release(
    architecture=_architecture(1280, 32, 16, mlp="gelu"),
    hub_id="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    files=("model.safetensors",),  # open_clip's own files lie beside it
    licence="MIT",
    pretraining=("LAION-2B",),
    feature=f"{BEFORE_NORM}; no projection",
)
