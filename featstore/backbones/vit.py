"""Supervised vision transformers, and what networks built like them share: fields of `config.json`, keys, counts.

Source: Dosovitskiy et al. 2021 (ViT), Steiner et al. 2022 (AugReg). The pooler of transformers is left out: many
checkpoints have none, and transformers then makes up random weights. Positions are resized by bicubic interpolation
without antialiasing, as in transformers and in timm 0.6; timm has antialiased since.

The two large releases are easily taken for one another: `google/vit-large-patch16-224` was pre-trained on ImageNet-21k
AND fine-tuned on ImageNet-1k, only `google/vit-large-patch16-224-in21k` is pre-trained and nothing else.
"""

import re
from dataclasses import replace
from typing import Any

from featstore.backbones.architecture import Architecture, VisionTransformer
from featstore.backbones.family import SEPARATE_KEYS, ConfigFields, Dialect, Family, HubKey, Release

HALF = (0.5, 0.5, 0.5)
IMAGENET = "ImageNet-1k"
IMAGENET_21K = "ImageNet-21k"
BEFORE_NORM = "CLS token before the final norm (hidden_states[-1]), as Baharoon et al. take it"

# The defaults of transformers' own configuration class, for fields that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}

# Live names of transformers 5 against those of the files.
RENAMED = (
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
TIMM_RENAMED = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("layers.", "blocks."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.o_proj.", ".attn.proj."),
    ("layernorm.", "norm."),
)
# timm keeps query, key and value in one tensor.
THIRDS = ((".attention.q_proj.", 0), (".attention.k_proj.", 1), (".attention.v_proj.", 2))


def hub_key(live: str) -> HubKey:
    """Name in the hub's files of a live parameter."""
    for new, old in RENAMED:
        live = live.replace(new, old)
    return HubKey(re.sub(r"^layers\.", "encoder.layer.", live))


def timm_key(live: str) -> HubKey:
    """Name in timm's files of a live parameter."""
    part, parts = 0, 1
    for new, third in THIRDS:
        if new in live:
            live, part, parts = live.replace(new, ".attn.qkv."), third, 3
    for new, old in TIMM_RENAMED:
        live = live.replace(new, old)
    return HubKey(live, part, parts)


def call(network: Any, pixels: Any, architecture: Architecture) -> Any:
    """Final sequence (B, 1 + P, D), positions resized where the image is not of the training size."""
    return network(pixels, interpolate_pos_encoding=True).last_hidden_state


def num_parameters(facts: VisionTransformer) -> int:
    """Every number in the weights of a network without pooler, mask token and layer scales."""
    dim = facts.embed_dim
    attention = 4 * dim**2 + (sum(facts.qkv_bias) + 1) * dim
    feed_forward = 2 * dim * facts.mlp_dim + facts.mlp_dim + dim
    norms = 4 * dim
    patch_projection = 3 * facts.patch_size**2 * dim + dim
    cls_and_positions = (2 + (facts.native_size // facts.patch_size) ** 2) * dim
    return facts.depth * (attention + feed_forward + norms) + patch_projection + cls_and_positions + 2 * dim


def counted(facts: VisionTransformer, parameters: int) -> VisionTransformer:
    """The facts with their counts."""
    return replace(facts, counts=(parameters, facts.gflops(facts.native_size, facts.native_size)))


def read_config(
    config: dict[str, Any], family: str, defaults: dict[str, Any], *, final_norm: bool = True
) -> VisionTransformer:
    """Facts from the fields that ViT, MAE and MSN share, with the mean and std of the image processor they share."""
    fields = ConfigFields(config, defaults)
    fields.require("num_channels", 3)
    fields.require("hidden_act", "gelu")
    facts = VisionTransformer(
        family=family,
        embed_dim=fields.integer("hidden_size"),
        depth=fields.integer("num_hidden_layers"),
        num_heads=fields.integer("num_attention_heads"),
        patch_size=fields.integer("patch_size"),
        num_registers=0,
        mlp="gelu",
        mlp_dim=fields.integer("intermediate_size"),
        native_size=fields.integer("image_size"),
        norm_eps=fields.number("layer_norm_eps"),
        mean=HALF,
        std=HALF,
        qkv_bias=(fields.flag("qkv_bias"),) * 3,
        final_norm=final_norm,
    )
    return counted(facts, num_parameters(facts))


def write_config(architecture: Architecture) -> dict[str, Any]:
    """The fields that ViT, MAE and MSN share."""
    assert isinstance(architecture, VisionTransformer)
    return {
        "hidden_size": architecture.embed_dim,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.num_heads,
        "intermediate_size": architecture.mlp_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": architecture.norm_eps,
        "image_size": architecture.native_size,
        "patch_size": architecture.patch_size,
        "num_channels": 3,
        "qkv_bias": architecture.qkv_bias[0],
    }


# Whole models put "vit." before the network; heads that the tokens do not depend on stand outside. `decoder.0.` is the
# one layer that predicts pixels in SimMIM; MAE's decoder has other names.
HUB = Dialect(
    name="hub",
    key=hub_key,
    prefixes=("", "vit."),
    ignored=(r"pooler\.", r"classifier\.", r".*mask_token$"),
    outside=(r"pooler\.", r"classifier\.", r"decoder\.0\."),
)
TIMM = Dialect(name="timm", key=timm_key, ignored=(r"head\.", r"pre_logits\."))

FAMILY = Family(
    model_type="vit",
    model_class="ViTModel",
    config_class="ViTConfig",
    model_options={"add_pooling_layer": False},
    blocks="layers",
    norm="layernorm",
    read=lambda config: read_config(config, "vit", DEFAULTS),
    write=write_config,
    call=call,
    dialects=(HUB, TIMM),
    key_biases=(SEPARATE_KEYS,),
)


def sized(
    family: str,
    size: str,
    *,
    norm_eps: float,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    final_norm: bool,
) -> VisionTransformer:
    """A network of patches of 16 x 16 pixels, trained at 224, of size base or large."""
    embed_dim, depth, num_heads = {"base": (768, 12, 12), "large": (1024, 24, 16)}[size]
    facts = VisionTransformer(
        family=family,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        patch_size=16,
        num_registers=0,
        mlp="gelu",
        mlp_dim=4 * embed_dim,
        native_size=224,
        norm_eps=norm_eps,
        mean=mean,
        std=std,
        final_norm=final_norm,
    )
    return counted(facts, num_parameters(facts))


BASE = Release(
    architecture=sized("vit", "base", norm_eps=1e-6, mean=HALF, std=HALF, final_norm=True),
    hub_id="timm/vit_base_patch16_224.augreg_in21k",
    aliases=("vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224_in21k"),
    licence="Apache-2.0",
    files=("model.safetensors",),  # its config.json is timm's own
    pretraining=(IMAGENET_21K,),
)
_LARGE = sized("vit", "large", norm_eps=1e-12, mean=HALF, std=HALF, final_norm=False)
LARGE = Release(
    architecture=_LARGE,
    hub_id="google/vit-large-patch16-224",
    licence="Apache-2.0",
    pretraining=(IMAGENET_21K, IMAGENET),
    feature=f"{BEFORE_NORM}; pre-trained on ImageNet-21k AND fine-tuned on ImageNet-1k",
)
LARGE_IN21K = Release(
    architecture=_LARGE,
    hub_id="google/vit-large-patch16-224-in21k",
    licence="Apache-2.0",
    pretraining=(IMAGENET_21K,),
    feature=f"{BEFORE_NORM}; pre-trained on ImageNet-21k only, not fine-tuned",
)
