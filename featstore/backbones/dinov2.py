"""DINOv2 with and without registers: sizes of the releases, fields of `config.json`, keys of the hub's files.

Source: Oquab et al. 2023 (DINOv2), Darcet et al. 2023 (registers); sizes as in the releases' own `config.json`.
The two differ in more than registers: transformers resizes the position table with antialiasing only in the second.
"""

from dataclasses import replace
from typing import Any

from featstore.backbones.architecture import Architecture, VisionTransformer
from featstore.backbones.family import SEPARATE_KEYS, ConfigFields, Dialect, Family, HubKey, Release
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

# The hub's names against those of Meta's own checkpoints, which keep query, key and value in one tensor.
META_NAMES = (
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    (".attention.output.dense.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    (".mlp.weights_in.", ".mlp.w12."),
    (".mlp.weights_out.", ".mlp.w3."),
    ("layernorm.", "norm."),
)
META_THIRDS = (
    (".attention.attention.query.", 0),
    (".attention.attention.key.", 1),
    (".attention.attention.value.", 2),
)
TIMM_NAMES = (("register_tokens", "reg_token"), (".mlp.w12.", ".mlp.fc1."), (".mlp.w3.", ".mlp.fc2."))


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


def meta_key(live: str) -> HubKey:
    """Name in Meta's own checkpoints of a live parameter."""
    name, part, parts = hub_key(live)
    for projection, third in META_THIRDS:
        if projection in name:
            name, part, parts = name.replace(projection, ".attn.qkv."), third, 3
    for hub, meta in META_NAMES:
        name = name.replace(hub, meta)
    return HubKey(name, part, parts)


def timm_key(live: str) -> HubKey:
    """Name in timm's copies of the releases of a live parameter."""
    key = meta_key(live)
    for meta, timm in TIMM_NAMES:
        key = key._replace(name=key.name.replace(meta, timm))
    return key


def timm_register_key(live: str) -> HubKey:
    """As `timm_key`; the position table has another shape there and is left to `fill_timm_positions`."""
    key = timm_key(live)
    return HubKey("pos_embed with CLS") if key.name == "pos_embed" else key


def fill_timm_positions(network: Any, tensors: Any) -> None:
    """The table of patches out of a file of timm's, which has added the position of CLS to CLS."""
    import torch

    table = network.embeddings.position_embeddings
    patches = tensors.read(HubKey("pos_embed"), (1, table.shape[1] - 1, table.shape[2]), table.dtype)
    with torch.no_grad():
        table[:, 1:] = patches.to(table.device)


def resize_positions(network: Any, way: str) -> None:
    """Let a network of transformers resize its position table as Meta's code does."""
    from featstore.backbones.meta_positions import positions_method

    assert way == "meta"
    network.embeddings.interpolate_pos_encoding = positions_method(network.embeddings)


def _read(config: dict[str, Any], family: str, defaults: dict[str, Any]) -> VisionTransformer:
    fields = ConfigFields(config, defaults)
    fields.require("num_channels", 3)
    fields.require("hidden_act", "gelu")  # SwiGLU ignores it, and its releases say gelu too
    embed_dim, ratio, swiglu = fields.integer("hidden_size"), fields.integer("mlp_ratio"), fields.flag("use_swiglu_ffn")
    return VisionTransformer(
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
    assert isinstance(architecture, VisionTransformer)
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


# Whole classifiers put the family's name before the network.
HUB, REGISTER_HUB = (
    Dialect(name="hub", key=hub_key, prefixes=("", prefix), outside=(r"classifier\.",))
    for prefix in ("dinov2.", "dinov2_with_registers.")
)
# Checkpoints of training hold the backbone beside its heads.
META_HEADS = (r"dino_head\.", r"ibot_head\.", r"linear_head\.")
META = Dialect(name="meta", key=meta_key, prefixes=("", "backbone."), outside=META_HEADS, meta=True)
# timm's own code resizes positions with antialiasing whatever the release; here they are resized as the hub's are.
TIMM = Dialect(name="timm", key=timm_key)
TIMM_REGISTERS = Dialect(
    name="timm",
    key=timm_register_key,
    optional=(*META.optional, r"embeddings\.position_embeddings$"),
    ignored=(*META.ignored, "pos_embed$"),
    after=fill_timm_positions,
)

FAMILY = Family(
    model_type="dinov2",
    model_class="Dinov2Model",
    config_class="Dinov2Config",
    blocks="encoder.layer",
    norm="layernorm",
    read=lambda config: _read(config, "dinov2", DEFAULTS),
    write=_write,
    dialects=(HUB, META, TIMM),
    key_biases=(SEPARATE_KEYS,),
    interpolations=("hf", "meta"),
    resize_positions=resize_positions,
)
REGISTER_FAMILY = Family(
    model_type="dinov2_with_registers",
    model_class="Dinov2WithRegistersModel",
    config_class="Dinov2WithRegistersConfig",
    blocks="encoder.layer",
    norm="layernorm",
    read=lambda config: _read(config, "dinov2_with_registers", REGISTER_DEFAULTS),
    write=_write,
    dialects=(REGISTER_HUB, META, TIMM_REGISTERS),
    key_biases=(SEPARATE_KEYS,),
)


def _release(size: str, embed_dim: int, depth: int, num_heads: int, registers: int) -> Release:
    swiglu = size == "giant"
    architecture = VisionTransformer(
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
        licence="Apache-2.0",
        pretraining=("LVD-142M",),
    )


SMALL = _release("small", 384, 12, 6, 0)
BASE = _release("base", 768, 12, 12, 0)
LARGE = _release("large", 1024, 24, 16, 0)
GIANT = _release("giant", 1536, 40, 24, 0)
SMALL_REG = _release("small", 384, 12, 6, 4)
BASE_REG = _release("base", 768, 12, 12, 4)
LARGE_REG = _release("large", 1024, 24, 16, 4)
GIANT_REG = _release("giant", 1536, 40, 24, 4)
# DINOv2-B trained on with chest X-rays, at its native size and in their own mean and std.
RAD_DINO = replace(
    BASE,
    architecture=replace(BASE.architecture, mean=(0.5307,) * 3, std=(0.2583,) * 3),
    hub_id="microsoft/rad-dino",
    meta_name="",
    licence="MIT (MSRLA in older copies); for research, not for clinical practice",
    # LVD-142M through the weights that training began with.
    pretraining=("LVD-142M", "BRAX", "CheXpert", "MIMIC-CXR", "NIH ChestX-ray14", "PadChest"),
)
