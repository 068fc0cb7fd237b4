"""ResNet-50 and ResNet-152 with torchvision's second ImageNet weights.

Source: He et al. 2016; the stride of a stage sits in its 3 x 3 convolution, as in torchvision and in transformers.
Weights: torchvision's DEFAULT, which is IMAGENET1K_V2 for both. The hub has them under timm's names, which for this
network are torchvision's own. `cls` is the mean over space of the last feature map, as the classifier gets it.
"""

import re
from dataclasses import replace
from typing import Any

from featstore.backbones.architecture import Architecture
from featstore.backbones.family import ConfigFields, Dialect, Family, HubKey, Release
from featstore.backbones.feature_maps import IGNORED, OUTSIDE, POOLED, call_for_map, split_map
from featstore.errors import WeightsError

# The defaults of transformers' own configuration class, for fields that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
HALF = (0.5, 0.5, 0.5)  # the mean and std of transformers' image processor, where a folder does not state its own
BLOCK = re.compile(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(.+)")


def hub_key(live: str) -> HubKey:
    """Name in files of transformers' ResNet of a live parameter."""
    found = BLOCK.fullmatch(live)
    if found is None:  # the stem: conv1, bn1
        kind, _, rest = live.partition("1.")
        return HubKey(f"embedder.embedder.{'convolution' if kind == 'conv' else 'normalization'}.{rest}")
    stage, block, part, number, rest = found.groups()
    place = f"encoder.stages.{int(stage) - 1}.layers.{block}."
    if part == "downsample.":
        return HubKey(f"{place}shortcut.{('convolution', 'normalization')[int(number)]}.{rest}")
    kind = "convolution" if part == "conv" else "normalization"
    return HubKey(f"{place}layer.{int(number) - 1}.{kind}.{rest}")


def _counts(depths: tuple[int, ...]) -> tuple[int, float]:
    """Parameters, and GFLOP of one image at 224."""
    places = 112**2
    parameters, products, before = 3 * 49 * 64 + 128, places * 3 * 49 * 64, 64
    places //= 4
    for stage, depth in enumerate(depths):
        inner = 64 * 2**stage
        for block in range(depth):
            shrink = 4 if stage and not block else 1  # the first 1 x 1 convolution still sees the larger map
            shortcut = 0 if block else 4 * before * inner
            parameters += before * inner + 9 * inner**2 + 4 * inner**2 + shortcut
            parameters += 12 * inner + (0 if block else 8 * inner)  # norms
            products += places * before * inner
            places //= shrink
            products += places * (13 * inner**2 + shortcut)
            before = 4 * inner
    return parameters, 2e-9 * products


def _make(depths: tuple[int, ...]) -> Architecture:
    return Architecture(
        family="resnet",
        embed_dim=2048,
        depth=0,
        patch_size=32,
        num_registers=0,
        native_size=224,
        summary="pool",
        variant="-".join(map(str, depths)),
        counts=_counts(depths),
    )


def _read(config: dict[str, Any]) -> Architecture:
    fields = ConfigFields(config, DEFAULTS)
    for name, supported in DEFAULTS.items():
        if name != "depths":
            fields.require(name, supported)
    depths = fields.values["depths"]
    if not isinstance(depths, list) or len(depths) != 4 or not all(type(n) is int and n > 0 for n in depths):
        raise WeightsError(f"config.json says depths = {depths!r}; it must be four whole numbers above 0")
    return replace(_make(tuple(depths)), mean=HALF, std=HALF)


FAMILY = Family(
    model_type="resnet",
    build="featstore.backbones.convnets:build_resnet",
    read=_read,
    call=call_for_map,
    split=split_map,
    dialects=(
        Dialect(name="torchvision", key=HubKey, ignored=IGNORED),
        Dialect(name="hub", key=hub_key, prefixes=("", "resnet."), ignored=IGNORED, outside=OUTSIDE),
    ),
    attention=(),
    float32=(r"(.*\.)?bn\d\.", r".*downsample\.1\."),
    gain=0.9,  # measured: without trained norms every block adds to the signal, and 50 of them overflow at sqrt(2)
)


def _release(size: int, depths: tuple[int, ...]) -> Release:
    return Release(
        architecture=_make(depths),
        hub_id=f"timm/resnet{size}.tv2_in1k",
        files=("model.safetensors",),  # its config.json is timm's own
        licence="BSD-3-Clause",
        pretraining=("ImageNet-1k",),
        feature=POOLED,
    )


RESNET50 = _release(50, (3, 4, 6, 3))
RESNET152 = _release(152, (3, 8, 36, 3))
