"""Vision transformers trained on medical images and published with timm's key names: BiomedCLIP, UNI, CONCH.

Sources: Zhang et al. 2023 (BiomedCLIP), Chen et al. 2024 (UNI), Lu et al. 2024 (CONCH); sizes, key names, mean and std
as in the checkpoints and code that the authors publish. All three have a plain ViT of timm as trunk, which is what
transformers calls DINOv2 with registers, with 0 of them: positions are resized bicubically with antialiasing in both.
BiomedCLIP and CONCH leave the text tower in the file and make `cls` of the trunk's tokens with a head of their own.
"""

import re
from typing import Any

from featstore.backbones.architecture import Architecture, VisionTransformer
from featstore.backbones.dinov2 import hub_key
from featstore.backbones.family import SEPARATE_KEYS, Dialect, Family, HubKey, KeyBias, Release

# As OpenAI's CLIP; CONCH's own code and the preprocessing that BiomedCLIP's files state have the same.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Names in the hub's DINOv2 files against timm's.
TIMM = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"layernorm\.", "norm."),
)
QKV = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)")
POOL_PROJECTION = re.compile(r"pool\.(query|key|value)_projection\.(weight|bias)")
THIRDS = {"query": 0, "key": 1, "value": 2}  # order in a tensor that holds all three


def trunk_key(live: str) -> HubKey:
    """Name in timm's ViT of a parameter of transformers' DINOv2 with registers."""
    name = hub_key(live).name
    if found := QKV.fullmatch(name):
        block, piece, kind = found.groups()
        return HubKey(f"blocks.{block}.attn.qkv.{kind}", THIRDS[piece], 3)
    for pattern, replacement in TIMM:
        name, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            break
    return HubKey(name)


def biomedclip_key(live: str) -> HubKey:
    """Name in BiomedCLIP's file of a parameter of `pathology_networks.ProjectedTrunk`."""
    if live.startswith("trunk."):
        key = trunk_key(live.removeprefix("trunk."))
        return key._replace(name=f"visual.trunk.{key.name}")
    if live.startswith("head.norm."):
        return HubKey(live.replace("head.norm.", "visual.trunk.norm."))
    return HubKey(live.replace("head.projection.", "visual.head.proj."))


def conch_key(live: str) -> HubKey:
    """Name in CONCH's file of a parameter of `pathology_networks.PooledTrunk`."""
    if live.startswith(("trunk.", "head.norm.")):
        return biomedclip_key(live)
    name = live.removeprefix("head.")
    if found := POOL_PROJECTION.fullmatch(name):
        piece, kind = found.groups()
        if kind == "bias":
            return HubKey("visual.attn_pool_contrast.attn.in_proj_bias", THIRDS[piece], 3)
        return HubKey(f"visual.attn_pool_contrast.attn.{piece[0]}_proj_weight")
    for ours, theirs in (
        ("pool.query_norm.", "attn_pool_contrast.ln_q."),
        ("pool.context_norm.", "attn_pool_contrast.ln_k."),
        ("pool.output.", "attn_pool_contrast.attn.out_proj."),
        ("pool.query", "attn_pool_contrast.query"),
        ("pooled_norm.", "ln_contrast."),
    ):
        if name.startswith(ours):
            return HubKey("visual." + name.replace(ours, theirs, 1))
    raise AssertionError(live)


def run_head(network: Any, pixels: Any, architecture: Architecture) -> Any:
    """(cls, patches) of a network with a head."""
    return network(pixels)


def finish_head(head: Any, sequence: Any) -> Any:
    """(cls, patches) of a block's output: the head contains the final norm."""
    return head(sequence)


def split_head(tokens: Any, architecture: Architecture) -> tuple[Any, Any, Any]:
    """What a head returns, with no registers."""
    cls, patches = tokens
    return cls, cls[:, None][:, :0], patches


NO_REGISTERS = (r".*register_tokens$",)  # the network has the tensor, of 0 tokens

UNI_FAMILY = Family(
    model_type="uni",
    build="featstore.backbones.pathology_networks:build_trunk",
    blocks="encoder.layer",
    norm="layernorm",
    dialects=(Dialect(name="timm", key=trunk_key, optional=NO_REGISTERS, ignored=(r"head\.",)),),
    key_biases=(SEPARATE_KEYS,),
)
BIOMEDCLIP_FAMILY = Family(
    model_type="biomedclip",
    build="featstore.backbones.pathology_networks:build_projected",
    blocks="trunk.encoder.layer",
    norm="head",
    call=run_head,
    finish=finish_head,
    split=split_head,
    dialects=(
        Dialect(name="open_clip", key=biomedclip_key, optional=NO_REGISTERS, ignored=(r"text\.", r"logit_scale$")),
    ),
    key_biases=(SEPARATE_KEYS,),
)
CONCH_FAMILY = Family(
    model_type="conch",
    build="featstore.backbones.pathology_networks:build_pooled",
    blocks="trunk.encoder.layer",
    norm="head",
    call=run_head,
    finish=finish_head,
    split=split_head,
    dialects=(
        Dialect(
            name="coca",
            key=conch_key,
            prefixes=("", "module."),
            optional=NO_REGISTERS,
            # The projection into the space of texts and the queries of the caption come after what is taken here.
            ignored=(
                r"text\.",
                r"text_decoder\.",
                r"logit_scale$",
                r"visual\.proj_contrast$",
                r"visual\.(attn_pool|ln)_caption\.",
            ),
        ),
    ),
    key_biases=(SEPARATE_KEYS, KeyBias(r"head\.pool\.key_projection\.bias")),
)

BIOMEDCLIP = Release(
    architecture=VisionTransformer(
        family="biomedclip",
        embed_dim=512,
        patch_dim=768,
        depth=12,
        num_heads=12,
        patch_size=16,
        num_registers=0,
        mlp="gelu",
        mlp_dim=3072,
        native_size=224,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        counts=(86_191_872, 0.0),
    ),
    hub_id="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
    files=("open_clip_pytorch_model.bin",),
    licence="MIT",
    pretraining=("PMC-15M",),
    feature="CLS token after the final norm, projected to 512 without bias: open_clip's encode_image, not normalised",
)
UNI = Release(
    architecture=VisionTransformer(
        family="uni",
        embed_dim=1024,
        depth=24,
        num_heads=16,
        patch_size=16,
        num_registers=0,
        mlp="gelu",
        mlp_dim=4096,
        native_size=224,
        counts=(303_350_784, 0.0),
    ),
    hub_id="MahmoodLab/UNI",
    gated=True,
    files=("pytorch_model.bin",),
    licence="CC-BY-NC-ND-4.0: no commercial use, no changed copies; given by the authors on request",
    pretraining=("Mass-100K",),
)
CONCH = Release(
    architecture=VisionTransformer(
        family="conch",
        embed_dim=512,
        patch_dim=768,
        depth=12,
        num_heads=12,
        patch_size=16,
        num_registers=0,
        mlp="gelu",
        mlp_dim=3072,
        native_size=448,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        summary="pool",
        counts=(87_567_104, 0.0),
    ),
    hub_id="MahmoodLab/CONCH",
    aliases=("MahmoodLab/conch",),
    gated=True,
    files=("pytorch_model.bin",),
    licence="CC-BY-NC-ND-4.0: no commercial use, no changed copies; given by the authors on request",
    pretraining=("CONCH-1.17M",),
    feature="attention pool over all trunk tokens and its norm, without the projection into the space of texts: "
    "encode_image(proj_contrast=False, normalize=False) of its README",
)
