"""DINOv3 vision transformers: sizes of the releases, fields of `config.json`, keys of the hub's files.

Source: Simeoni et al. 2025 (DINOv3); sizes as in the releases' own `config.json`. Positions are rotary, so an image of
any multiple of 16 runs without a resized table; four registers stand between CLS and the patches.
"""

import re
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from featstore.backbones.architecture import Architecture, VisionTransformer
from featstore.backbones.dinov2 import META_HEADS
from featstore.backbones.family import ConfigFields, Dialect, Family, HubKey, Release
from featstore.errors import WeightsError

SATELLITE_MEAN = (0.430, 0.411, 0.296)
SATELLITE_STD = (0.213, 0.156, 0.143)
PERIODS = "rope_embed.periods"  # of the rotary positions, in Meta's files

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


# The hub's names against those of Meta's own checkpoints, which keep query, key and value in one tensor; and against
# those of timm's copies.
META_NAMES = (
    ("embeddings.register_tokens", "storage_tokens"),
    ("embeddings.patch_embeddings.", "patch_embed.proj."),
    ("embeddings.", ""),
    ("layer.", "blocks."),
    (".attention.o_proj.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
)
META_PLAIN = ((".mlp.up_proj.", ".mlp.fc1."), (".mlp.down_proj.", ".mlp.fc2."))
META_GATED = ((".mlp.gate_proj.", ".mlp.w1."), (".mlp.up_proj.", ".mlp.w2."), (".mlp.down_proj.", ".mlp.w3."))
META_THIRDS = ((".attention.q_proj.", 0), (".attention.k_proj.", 1), (".attention.v_proj.", 2))
TIMM_NAMES = (
    ("storage_tokens", "reg_token"),
    (".ls1.gamma", ".gamma_1"),
    (".ls2.gamma", ".gamma_2"),
    (".mlp.w1.", ".mlp.fc1_g."),
    (".mlp.w2.", ".mlp.fc1_x."),
    (".mlp.w3.", ".mlp.fc2."),
)
TIMM_BIASES = ((".attention.q_proj.bias", ".attn.q_bias"), (".attention.v_proj.bias", ".attn.v_bias"))


def hub_key(live: str) -> HubKey:
    """Name in the hub's files of a live parameter."""
    return HubKey(live.removeprefix("model."))


def meta_key(live: str, *, gated: bool) -> HubKey:
    """Name in Meta's own checkpoints of a live parameter, in networks whose feed-forward part is gated or plain."""
    name, part, parts = hub_key(live)
    for projection, third in META_THIRDS:
        if projection in name:
            name, part, parts = name.replace(projection, ".attn.qkv."), third, 3
    for hub, meta in (*META_NAMES, *(META_GATED if gated else META_PLAIN)):
        name = name.replace(hub, meta)
    return HubKey(name, part, parts)


def timm_key(live: str, *, gated: bool, biased: bool) -> HubKey:
    """Name in timm's copies of the releases of a live parameter.

    timm has each size with the biases of query and value, and without where training left them zero.
    """
    for hub, timm in TIMM_BIASES:
        if hub in live:
            name = hub_key(live).name.replace(hub, timm).replace("layer.", "blocks.")
            return HubKey(name if biased else f"no {name}")
    key = meta_key(live, gated=gated)
    for meta, timm in TIMM_NAMES:
        key = key._replace(name=key.name.replace(meta, timm))
    return key


def follow_meta(network: Any, tensors: Any) -> None:
    """Take the periods of the rotary positions from a checkpoint of Meta's, where they may have been rounded.

    Raises:
        WeightsError: biases of query, key and value that are masked otherwise than in the releases.
    """
    import torch

    for name in tensors.shapes or ():
        if re.fullmatch(r"(backbone\.)?rope_embed\.periods", name):
            for owner, frequencies in network.named_buffers():
                if owner.endswith("inv_freq"):
                    periods = tensors.read(HubKey(name), tuple(frequencies.shape), torch.float32)
                    frequencies.copy_(1 / periods)
        elif re.fullmatch(r"(backbone\.)?blocks\.\d+\.attn\.qkv\.bias", name):
            length = tensors.shapes[name][0]
            bias = tensors.read(HubKey(name), (length,), torch.float32)
            kept = torch.ones(length)
            if f"{name}_mask" in tensors.shapes:
                kept = tensors.read(HubKey(f"{name}_mask"), (length,), torch.float32)
            third = length // 3
            whole = torch.cat((kept[:third], kept[-third:]))
            if bool((bias * kept)[third:-third].any()) or bool((whole != 1).any()):
                raise WeightsError(
                    f"{tensors.origin}: {name} must be zero for the key and whole for query and value, as in the "
                    "releases, it is not; give another checkpoint"
                )


def _read(config: dict[str, Any]) -> VisionTransformer:
    fields = ConfigFields(config, DEFAULTS)
    gated = fields.flag("use_gated_mlp")
    fields.require("num_channels", 3)
    fields.require("hidden_act", "silu" if gated else "gelu")
    fields.require("proj_bias", True)
    fields.require("mlp_bias", True)
    return VisionTransformer(
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
    assert isinstance(architecture, VisionTransformer)
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


# The hub's own files have no periods; those of a network that was trained on from Meta's checkpoint do.
HUB = Dialect(name="hub", key=hub_key, ignored=(r".*mask_token$", r"rope_embed\.periods$"), after=follow_meta)
# `local_cls_norm` was only used on the small crops of training.
META, GATED_META = (
    Dialect(
        name="meta",
        key=partial(meta_key, gated=gated),
        prefixes=("", "backbone."),
        outside=META_HEADS,
        ignored=(r"mask_token$", r"rope_embed\.periods$", r"blocks\.\d+\.attn\.qkv\.bias_mask$", r"local_cls_norm\."),
        after=follow_meta,
        meta=True,
    )
    for gated in (False, True)
)
TIMM = tuple(
    Dialect(
        name="timm",
        key=partial(timm_key, gated=gated, biased=biased),
        optional=(r".*mask_token$",) if biased else (r".*mask_token$", r".*\.attention\.[qv]_proj\.bias$"),
    )
    for biased in (True, False)
    for gated in (False, True)
)

FAMILY = Family(
    model_type="dinov3_vit",
    model_class="DINOv3ViTModel",
    config_class="DINOv3ViTConfig",
    blocks="model.layer",
    norm="norm",
    read=_read,
    write=_write,
    dialects=(HUB, META, GATED_META, *TIMM),
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
    architecture = VisionTransformer(
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
        licence="DINOv3 License, to be accepted on the hub",
        pretraining=("LVD-1689M",),
    )


def _of_satellites(release: Release) -> Release:
    """The same network, trained on satellite images: normalised with their own mean and std."""
    return replace(
        release,
        architecture=replace(release.architecture, mean=SATELLITE_MEAN, std=SATELLITE_STD),
        hub_id=release.hub_id.replace("lvd1689m", "sat493m"),
        meta_name=f"{release.meta_name}_sat493m",
        pretraining=("SAT-493M",),
    )


SMALL = _release("dinov3_vits16", 384, 12, 6, 1536, mlp="gelu")
SMALL_PLUS = _release("dinov3_vits16plus", 384, 12, 6, 1536, mlp="swiglu")
BASE = _release("dinov3_vitb16", 768, 12, 12, 3072, mlp="gelu")
LARGE = _release("dinov3_vitl16", 1024, 24, 16, 4096, mlp="gelu")
HUGE_PLUS = _release("dinov3_vith16plus", 1280, 32, 20, 5120, mlp="swiglu")
VIT_7B = _release("dinov3_vit7b16", 4096, 40, 32, 8192, mlp="swiglu", query_and_value_bias=False)
LARGE_SAT = _of_satellites(LARGE)
VIT_7B_SAT = _of_satellites(VIT_7B)
