"""DINOv3 vision transformers: sizes of the releases, fields of `config.json`, keys of the hub's files.

Source: Simeoni et al. 2025 (DINOv3); sizes as in the releases' own `config.json`. Positions are rotary, so an image of
any multiple of 16 runs without a resized table; four registers stand between CLS and the patches.
"""

from typing import Any, Literal

from featstore.backbones.architecture import Architecture
from featstore.backbones.family import ConfigFields, Family, HubKey, Release

# The defaults of transformers' own configuration class, for fields that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "patch_size": 16,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "image_size": 224,
    "num_channels": 3,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "use_gated_mlp": False,
    "num_register_tokens": 0,
}


def hub_key(live: str) -> HubKey:
    """Name in the hub's files of a live parameter."""
    return HubKey(live.removeprefix("model."))


def _read(config: dict[str, Any]) -> Architecture:
    fields = ConfigFields(config, DEFAULTS)
    gated = fields.flag("use_gated_mlp")
    fields.require("num_channels", 3)
    fields.require("hidden_act", "silu" if gated else "gelu")
    fields.require("proj_bias", True)
    fields.require("mlp_bias", True)
    return Architecture(
        family="dinov3_vit",
        embed_dim=fields.integer("hidden_size"),
        depth=fields.integer("num_hidden_layers"),
        num_heads=fields.integer("num_attention_heads"),
        patch_size=fields.integer("patch_size"),
        num_registers=fields.integer("num_register_tokens"),
        mlp="swiglu" if gated else "gelu",
        mlp_dim=fields.integer("intermediate_size"),
        native_size=fields.integer("image_size"),
        norm_eps=fields.number("layer_norm_eps"),
        qkv_bias=(fields.flag("query_bias"), fields.flag("key_bias"), fields.flag("value_bias")),
        rope_theta=fields.number("rope_theta"),
    )


def _write(architecture: Architecture) -> dict[str, Any]:
    gated = architecture.mlp == "swiglu"
    query, key, value = architecture.qkv_bias
    return {
        "patch_size": architecture.patch_size,
        "hidden_size": architecture.embed_dim,
        "intermediate_size": architecture.mlp_dim,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.num_heads,
        "hidden_act": "silu" if gated else "gelu",
        "layer_norm_eps": architecture.norm_eps,
        "rope_theta": architecture.rope_theta,
        "image_size": architecture.native_size,
        "num_channels": 3,
        "query_bias": query,
        "key_bias": key,
        "value_bias": value,
        "proj_bias": True,
        "mlp_bias": True,
        "use_gated_mlp": gated,
        "num_register_tokens": architecture.num_registers,
    }


FAMILY = Family(
    model_type="dinov3_vit",
    model_class="DINOv3ViTModel",
    config_class="DINOv3ViTConfig",
    blocks="model.layer",
    norm="norm",
    computed=("rope_embeddings",),  # the inverse frequencies
    read=_read,
    write=_write,
    hub_key=hub_key,
)


def _release(
    meta_name: str,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_dim: int,
    *,
    mlp: Literal["gelu", "swiglu"],
    query_and_value_bias: bool = True,
) -> Release:
    architecture = Architecture(
        family="dinov3_vit",
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        patch_size=16,
        num_registers=4,
        mlp=mlp,
        mlp_dim=mlp_dim,
        native_size=224,
        norm_eps=1e-5,
        qkv_bias=(query_and_value_bias, False, query_and_value_bias),
        rope_theta=100.0,
    )
    return Release(
        architecture=architecture,
        hub_id=f"facebook/{meta_name.replace('_', '-')}-pretrain-lvd1689m",
        meta_name=meta_name,
        gated=True,
    )


SMALL = _release("dinov3_vits16", 384, 12, 6, 1536, mlp="gelu")
SMALL_PLUS = _release("dinov3_vits16plus", 384, 12, 6, 1536, mlp="swiglu")
BASE = _release("dinov3_vitb16", 768, 12, 12, 3072, mlp="gelu")
LARGE = _release("dinov3_vitl16", 1024, 24, 16, 4096, mlp="gelu")
HUGE_PLUS = _release("dinov3_vith16plus", 1280, 32, 20, 5120, mlp="swiglu")
VIT_7B = _release("dinov3_vit7b16", 4096, 40, 32, 8192, mlp="swiglu", query_and_value_bias=False)
