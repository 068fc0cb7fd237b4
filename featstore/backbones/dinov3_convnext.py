"""DINOv3's ConvNeXts: sizes of the releases and keys of the hub's files and of Meta's own.

Source: Simeoni et al. 2025 (DINOv3): networks of convolutions distilled from the 7B vision transformer. What they call
CLS is the mean over space of the last feature map; it and the map's places pass the final norm alike, so the network
gives one sequence as a vision transformer does. An image of any multiple of 32 runs.
"""

import re

from featstore.backbones.convnext import DEFAULTS as CONVNEXT_DEFAULTS
from featstore.backbones.convnext import make, read_stages, write_stages
from featstore.backbones.family import Dialect, Family, HubKey, Release

# The defaults of transformers' own configuration class; the stem's squares of 4 pixels cannot be chosen.
DEFAULTS = {key: value for key, value in CONVNEXT_DEFAULTS.items() if key != "patch_size"} | {"layer_norm_eps": 1e-6}

DOWNSAMPLING = re.compile(r"stages\.(\d+)\.downsample_layers\.(\d+)\.")
BLOCK = re.compile(r"(stages\.\d+)\.layers\.(\d+)\.")
# Names within a block: the hub's against Meta's.
RENAMED = {
    "depthwise_conv.": "dwconv.",
    "layer_norm.": "norm.",
    "pointwise_conv1.": "pwconv1.",
    "pointwise_conv2.": "pwconv2.",
}


def hub_key(live: str) -> HubKey:
    """Name in the hub's files of a live parameter."""
    return HubKey(live.removeprefix("model."))


def meta_key(live: str) -> HubKey:
    """Name in Meta's files of a live parameter."""
    name = DOWNSAMPLING.sub(r"downsample_layers.\1.\2.", hub_key(live).name)
    name = BLOCK.sub(r"\1.\2.", name)
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return HubKey(name)


FAMILY = Family(
    model_type="dinov3_convnext",
    model_class="DINOv3ConvNextModel",
    config_class="DINOv3ConvNextConfig",
    read=lambda config: read_stages(config, "dinov3_convnext", DEFAULTS),
    write=write_stages,
    dialects=(
        Dialect(name="hub", key=hub_key),
        # Meta's list of norms per stage ends in the final one, which its files so have twice.
        Dialect(name="meta", key=meta_key, ignored=(r"norms\.3\.",)),
    ),
    attention=(),
)


def _release(size: str, depths: tuple[int, ...], widths: tuple[int, ...]) -> Release:
    return Release(
        architecture=make("dinov3_convnext", depths, widths, eps=1e-6),
        hub_id=f"facebook/dinov3-convnext-{size}-pretrain-lvd1689m",
        meta_name=f"dinov3_convnext_{size}",
        gated=True,
        licence="DINOv3 License",
        pretraining=("LVD-1689M",),
        feature="mean over space of the last feature map, after the final norm",
    )


TINY = _release("tiny", (3, 3, 9, 3), (96, 192, 384, 768))
SMALL = _release("small", (3, 3, 27, 3), (96, 192, 384, 768))
BASE = _release("base", (3, 3, 27, 3), (128, 256, 512, 1024))
LARGE = _release("large", (3, 3, 27, 3), (192, 384, 768, 1536))
