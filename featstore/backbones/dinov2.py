"""DINOv2 with and without registers: sizes of the releases, fields of `config.json`, keys of the hub's files.

Source: Oquab et al. 2023 (DINOv2), Darcet et al. 2023 (registers); sizes as in the releases' own `config.json`.
The two differ in more than registers: transformers resizes the position table with antialiasing only in the second.
"""

from typing import Any

from featstore.backbones.architecture import Architecture
from featstore.backbones.family import ConfigFields, Family, HubKey, Release
from featstore.errors import WeightsError

# The defaults of transformers' own configuration classes, for fields that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
REGISTER_DEFAULTS: dict[str, Any] = {**DEFAULTS, "patch_size": 16, "num_register_tokens": 4}

# Live names of transformers 5.23 against the files' names, which 5.17 also uses while it runs.
RENAMED = (
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.down_proj.", ".mlp.weights_out."),
)
# The files keep the two input matrices of SwiGLU in one tensor, the gate first.
HALVES = ((".mlp.gate_proj.", 0), (".mlp.up_proj.", 1))


def swiglu_dim(embed_dim: int, ratio: int) -> int:
    """Hidden width of DINOv2's SwiGLU: two thirds of the plain width, rounded up to a multiple of 8."""
    return (int(embed_dim * ratio * 2 / 3) + 7) // 8 * 8


def hub_key(live: str) -> HubKey:
    """Name in the hub's files of a live parameter."""
    for new, part in HALVES:
        if new in live:
            return HubKey(live.replace(new, ".mlp.weights_in."), part, 2)
    for new, old in RENAMED:
        live = live.replace(new, old)
    return HubKey(live)


def _read(config: dict[str, Any], family: str, defaults: dict[str, Any]) -> Architecture:
    fields = ConfigFields(config, defaults)
    fields.require("num_channels", 3)
    fields.require("hidden_act", "gelu")  # SwiGLU ignores it, and its releases say gelu too
    embed_dim, ratio, swiglu = fields.integer("hidden_size"), fields.integer("mlp_ratio"), fields.flag("use_swiglu_ffn")
    return Architecture(
        family=family,
        embed_dim=embed_dim,
        depth=fields.integer("num_hidden_layers"),
        num_heads=fields.integer("num_attention_heads"),
        patch_size=fields.integer("patch_size"),
        num_registers=fields.integer("num_register_tokens") if "num_register_tokens" in defaults else 0,
        mlp="swiglu" if swiglu else "gelu",
        mlp_dim=swiglu_dim(embed_dim, ratio) if swiglu else embed_dim * ratio,
        native_size=fields.integer("image_size"),
        norm_eps=fields.number("layer_norm_eps"),
        qkv_bias=(fields.flag("qkv_bias"),) * 3,
    )


def _write(architecture: Architecture) -> dict[str, Any]:
    dim, swiglu = architecture.embed_dim, architecture.mlp == "swiglu"
    widths = {swiglu_dim(dim, ratio) if swiglu else dim * ratio: ratio for ratio in range(16, 0, -1)}
    if architecture.mlp_dim not in widths:
        raise WeightsError(
            f"mlp_dim {architecture.mlp_dim} is no width of a {architecture.mlp} block of {dim}: "
            f"mlp_ratio must be a whole number from 1 to 16"
        )
    config = {
        "hidden_size": dim,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.num_heads,
        "mlp_ratio": widths[architecture.mlp_dim],
        "hidden_act": "gelu",
        "layer_norm_eps": architecture.norm_eps,
        "image_size": architecture.native_size,
        "patch_size": architecture.patch_size,
        "num_channels": 3,
        "qkv_bias": architecture.qkv_bias[0],
        "use_swiglu_ffn": swiglu,
    }
    if architecture.family == "dinov2_with_registers":
        config["num_register_tokens"] = architecture.num_registers
    return config


FAMILY = Family(
    model_type="dinov2",
    model_class="Dinov2Model",
    config_class="Dinov2Config",
    blocks="encoder.layer",
    norm="layernorm",
    read=lambda config: _read(config, "dinov2", DEFAULTS),
    write=_write,
    hub_key=hub_key,
)
REGISTER_FAMILY = Family(
    model_type="dinov2_with_registers",
    model_class="Dinov2WithRegistersModel",
    config_class="Dinov2WithRegistersConfig",
    blocks="encoder.layer",
    norm="layernorm",
    read=lambda config: _read(config, "dinov2_with_registers", REGISTER_DEFAULTS),
    write=_write,
    hub_key=hub_key,
)


def _release(size: str, embed_dim: int, depth: int, num_heads: int, registers: int) -> Release:
    swiglu = size == "giant"
    architecture = Architecture(
        family="dinov2_with_registers" if registers else "dinov2",
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        patch_size=14,
        num_registers=registers,
        mlp="swiglu" if swiglu else "gelu",
        mlp_dim=swiglu_dim(embed_dim, 4) if swiglu else 4 * embed_dim,
        native_size=518,
    )
    return Release(
        architecture=architecture,
        hub_id=f"facebook/dinov2-with-registers-{size}" if registers else f"facebook/dinov2-{size}",
        meta_name=f"dinov2_vit{size[0]}14{'_reg' if registers else ''}",
    )


SMALL = _release("small", 384, 12, 6, 0)
BASE = _release("base", 768, 12, 12, 0)
LARGE = _release("large", 1024, 24, 16, 0)
GIANT = _release("giant", 1536, 40, 24, 0)
SMALL_REG = _release("small", 384, 12, 6, 4)
BASE_REG = _release("base", 768, 12, 12, 4)
LARGE_REG = _release("large", 1024, 24, 16, 4)
GIANT_REG = _release("giant", 1536, 40, 24, 4)
