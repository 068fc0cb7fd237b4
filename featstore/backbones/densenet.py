"""DenseNet-201 with torchvision's ImageNet weights.

Source: Huang et al. 2017; weights: torchvision's DEFAULT, IMAGENET1K_V1, whose file has older names for the parts of a
layer (`norm.1`, `conv.1`) than the network. timm's names on the hub are the newer ones. `cls` is the mean over space of
the last feature map after its norm and ReLU, as the classifier gets it.
"""

import re

from featstore.backbones.architecture import Architecture
from featstore.backbones.family import Dialect, Family, HubKey, Release
from featstore.backbones.feature_maps import IGNORED, POOLED, call_for_map, split_map

PART = re.compile(r"(denselayer\d+\.)(norm|conv)([12])\.")


def old_key(live: str) -> HubKey:
    """Name in torchvision's file of a live parameter."""
    return HubKey(PART.sub(r"\1\2.\3.", live))


FAMILY = Family(
    model_type="densenet",
    build="featstore.backbones.convnets:build_densenet",
    call=call_for_map,
    split=split_map,
    dialects=(
        Dialect(name="timm", key=HubKey, ignored=IGNORED),
        Dialect(name="torchvision", key=old_key, ignored=IGNORED),
    ),
    attention=(),
    float32=(r".*norm\d?\.",),
    gain=2**0.5,  # ReLU halves the second moment
)

DENSENET201 = Release(
    architecture=Architecture(
        family="densenet",
        embed_dim=1920,
        depth=0,
        patch_size=32,
        num_registers=0,
        native_size=224,
        summary="pool",
        variant="6-12-48-32",
        counts=(18_092_928, 8.578891776),
    ),
    hub_id="timm/densenet201.tv_in1k",
    files=("model.safetensors",),  # its config.json is timm's own
    licence="BSD-3-Clause",
    pretraining=("ImageNet-1k",),
    feature=POOLED,
)
