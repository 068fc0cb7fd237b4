"""MobileNetV2 of width 1.0 at 224, with Google's ImageNet weights.

Source: Sandler et al. 2018. These weights were trained with TensorFlow's padding, which puts the odd pixel of a
convolution of stride 2 at the bottom and right, and with pixels from -1 to 1 (x / 127.5 - 1). So they run here, by
whatever names a file calls them: with torchvision's symmetric padding 250 sample images lost 11 points of top-1.

torchvision's own weights of this network were trained with that other padding and ImageNet's mean; they are not these.
Google's come under torchvision's names with the norms folded into biases (running variance 1), so a file with those
names and living statistics is refused instead of giving features that are a little wrong.
"""

import re
from typing import Any

from featstore.backbones.architecture import Architecture
from featstore.backbones.family import ConfigFields, Dialect, Family, HubKey, Release
from featstore.backbones.feature_maps import IGNORED, OUTSIDE, POOLED, call_for_map, split_map
from featstore.errors import WeightsError

# What a config.json must say, where it says something; the values are also the defaults of transformers.
DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "depth_multiplier": 1.0,
    "depth_divisible_by": 8,
    "min_depth": 8,
    "expand_ratio": 6.0,
    "output_stride": 32,
    "first_layer_is_expansion": True,
    "finegrained_output": True,
    "hidden_act": "relu6",
    "tf_padding": True,
    "layer_norm_eps": 0.001,
}
TORCHVISION_EPS = 1e-5
FOLDED = 1e-4  # how far from 1 a variance may be that says nothing
KINDS = ("convolution", "normalization")
OUTER = re.compile(r"features\.(0|18)\.([01])\.(.+)")
INNER = re.compile(r"features\.(\d+)\.conv\.(\d)\.(?:([01])\.)?(.+)")


def hub_key(live: str) -> HubKey:
    """Name in the hub's files of a live parameter."""
    found = OUTER.fullmatch(live)
    if found is not None:
        place = "conv_stem.first_conv" if found[1] == "0" else "conv_1x1"
        return HubKey(f"{place}.{KINDS[int(found[2])]}.{found[3]}")
    found = INNER.fullmatch(live)
    assert found is not None, live
    block, position, kind, rest = int(found[1]), int(found[2]), found[3], found[4]
    expanding = block > 1  # the first block has no expansion, so its parts stand one earlier
    place = f"layer.{block - 2}" if expanding else "conv_stem"
    if kind is not None:
        part = ("expand_1x1", "conv_3x3")[position + (not expanding)]
        return HubKey(f"{place}.{part}.{KINDS[int(kind)]}.{rest}")
    return HubKey(f"{place}.reduce_1x1.{KINDS[position - 1 - expanding]}.{rest}")


def _folded_norms(network: Any, tensors: Any) -> None:
    for module in network.modules():
        if hasattr(module, "running_var"):
            if float((module.running_var + TORCHVISION_EPS - 1).abs().max()) > FOLDED:
                raise WeightsError(
                    f"{tensors.origin} has torchvision's names and running statistics: these are weights of "
                    "torchvision's own training, with other padding and another mean. Give Google's "
                    f"({MOBILENETV2.hub_id}), or such a network as module:function"
                )
            module.eps = TORCHVISION_EPS


def _read(config: dict[str, Any]) -> Architecture:
    fields = ConfigFields(config, DEFAULTS)
    for name, supported in DEFAULTS.items():
        fields.require(name, supported)
    return ARCHITECTURE


ARCHITECTURE = Architecture(
    family="mobilenet_v2",
    embed_dim=1280,
    depth=0,
    patch_size=32,
    num_registers=0,
    native_size=224,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    summary="pool",
    counts=(2_223_872, 0.598988544),
)

FAMILY = Family(
    model_type="mobilenet_v2",
    build="featstore.backbones.convnets:build_mobilenet",
    read=_read,
    call=call_for_map,
    split=split_map,
    dialects=(
        Dialect(name="hub", key=hub_key, prefixes=("", "mobilenet_v2."), ignored=IGNORED, outside=OUTSIDE),
        Dialect(name="torchvision", key=HubKey, ignored=IGNORED, after=_folded_norms),
    ),
    attention=(),
    gain=1.2,  # measured: more of it, and the blocks that add to each other amplify rounding
    float32=(r".*\.\d+\.1\.", r"features\.1\.conv\.2\.", r"features\.\d+\.conv\.3\."),
)

MOBILENETV2 = Release(
    architecture=ARCHITECTURE,
    hub_id="google/mobilenet_v2_1.0_224",
    licence="Apache-2.0",
    pretraining=("ImageNet-1k",),
    feature=POOLED,
)
