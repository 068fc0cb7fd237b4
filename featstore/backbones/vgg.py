"""VGG-19 with torchvision's ImageNet weights.

Source: Simonyan and Zisserman 2015, configuration E without batch norm; weights: torchvision's DEFAULT, IMAGENET1K_V1.
`cls` is what the last matrix but one gives after its ReLU (torchvision's network with `classifier[6]` an identity);
the patches are the last feature map, of another width. A map that is not 7 x 7 is averaged to it, as torchvision does;
timm's network runs the first matrix over the whole map instead, and so equals this one at 224 only.
"""

from typing import Any

from featstore.backbones.architecture import Architecture
from featstore.backbones.family import Dialect, Family, HubKey, Release
from featstore.backbones.feature_maps import call_for_map, split_map
from featstore.errors import WeightsError

# timm has the first matrix as a convolution over the whole 7 x 7 map, and so has the network here.
FIRST = "classifier.0.weight"

TIMM = {"classifier.0.": "pre_logits.fc1.", "classifier.3.": "pre_logits.fc2."}


def timm_key(live: str) -> HubKey:
    """Name in timm's files of a live parameter."""
    for ours, theirs in TIMM.items():
        live = live.replace(ours, theirs)
    return HubKey(live)


def _flat_first(network: Any, tensors: Any) -> None:
    # torchvision has the first matrix flat: the same numbers in the same order, in a shape that the loader refuses.
    if FIRST not in tensors.shapes:
        raise WeightsError(f"{tensors.origin} does not fit the model: tensors 1 missing ({FIRST})")
    matrix = network.get_parameter(FIRST)
    flat = (len(matrix), matrix[0].numel())
    matrix.copy_(tensors.read(HubKey(FIRST), flat, matrix.dtype).view(matrix.shape))


FAMILY = Family(
    model_type="vgg",
    build="featstore.backbones.convnets:build_vgg",
    call=call_for_map,
    split=split_map,
    dialects=(
        Dialect(name="timm", key=timm_key, ignored=(r"head\.fc\.",)),
        Dialect(
            name="torchvision",
            key=lambda live: HubKey("" if live == FIRST else live),
            optional=(FIRST,),
            ignored=(FIRST, r"classifier\.6\."),
            after=_flat_first,
        ),
    ),
    attention=(),
    gain=2**0.5,  # ReLU halves the second moment
)

VGG19 = Release(
    architecture=Architecture(
        family="vgg",
        embed_dim=4096,
        patch_dim=512,
        depth=0,
        patch_size=32,
        num_registers=0,
        native_size=224,
        summary="pool",
        variant="2-2-4-4-4",
        counts=(139_570_240, 39.255932928),
    ),
    hub_id="timm/vgg19.tv_in1k",
    files=("model.safetensors",),  # its config.json is timm's own
    licence="BSD-3-Clause",
    pretraining=("ImageNet-1k",),
    feature="output of the second fully connected layer after its ReLU (classifier[6] = identity)",
)
