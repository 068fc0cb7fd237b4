"""ConvNeXt: facts that it shares with DINOv3's, fields of `config.json`, and the supervised base network.

Source: Liu et al. 2022 (A ConvNet for the 2020s). Stages of blocks, each half as high and wide as the one before; a
block is a depthwise 7 x 7 convolution and two linear layers, the first four times as wide.
`cls` is transformers' `pooler_output`, the normed mean over space of the last feature map; the patches are that map as
transformers gives it, without a norm. The release was trained on ImageNet-22k and carries a classifier.
"""

from dataclasses import dataclass, replace
from typing import Any

from featstore.backbones.architecture import Architecture
from featstore.backbones.family import ConfigFields, Dialect, Family, HubKey, Release
from featstore.backbones.feature_maps import IGNORED, OUTSIDE, split_map
from featstore.errors import WeightsError

# The defaults of transformers' own configuration class, for fields that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "patch_size": 4,
    "hidden_sizes": [96, 192, 384, 768],
    "depths": [3, 3, 9, 3],
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
}
HALF = (0.5, 0.5, 0.5)  # the mean and std of transformers' image processor, where a folder does not state its own
KERNEL = 7  # of the depthwise convolution


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvNext(Architecture):
    """A ConvNeXt: blocks and channels of every stage, and the epsilon of the norms that its config.json states.

    `patch_size` is the stride of the last map: that of the stem, doubled by every later stage.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    norm_eps: float

    @property
    def stem(self) -> int:
        """Pixels of a side of the stem's squares."""
        return self.patch_size >> (len(self.depths) - 1)

    def num_parameters(self) -> int:
        """Every number in the weights, without a classifier."""
        total = 3 * self.stem**2 * self.widths[0] + 3 * self.widths[0]  # weights, bias, norm
        for depth, width in zip(self.depths, self.widths, strict=True):
            depthwise, norm, scale = (KERNEL**2 + 1) * width, 2 * width, width
            total += depth * (depthwise + norm + 8 * width**2 + 5 * width + scale)
        for before, after in zip(self.widths, self.widths[1:], strict=False):
            total += 2 * before + 4 * before * after + after
        return total + 2 * self.embed_dim

    def gflops(self, height: int, width: int) -> float:
        """GFLOP of one forward pass per image: 2 per multiply-add."""
        places = height * width / self.stem**2
        total = places * 3 * self.stem**2 * self.widths[0]
        for stage, (depth, channels) in enumerate(zip(self.depths, self.widths, strict=True)):
            if stage:
                places /= 4
                total += places * 4 * self.widths[stage - 1] * channels
            total += depth * places * (KERNEL**2 * channels + 8 * channels**2)
        return 2e-9 * total


def read_stages(config: dict[str, Any], family: str, defaults: dict[str, Any]) -> ConvNext:
    """The architecture in a `config.json`.

    Raises:
        WeightsError: fields that are malformed or not supported.
    """
    fields = ConfigFields(config, defaults)
    fields.require("num_channels", 3)
    fields.require("hidden_act", "gelu")
    depths, widths = (_counts(fields, name) for name in ("depths", "hidden_sizes"))
    if len(depths) != len(widths):
        raise WeightsError(
            f"config.json says {len(depths)} depths and {len(widths)} hidden_sizes; there must be one of each per stage"
        )
    if "num_stages" in config and config["num_stages"] != len(depths):
        raise WeightsError(f"config.json says num_stages = {config['num_stages']!r}, but depths has {len(depths)}")
    stem = fields.integer("patch_size") if "patch_size" in defaults else DEFAULTS["patch_size"]
    return make(
        family, depths, widths, stem=stem, eps=fields.number("layer_norm_eps"), native=fields.integer("image_size")
    )


def _counts(fields: ConfigFields, name: str) -> tuple[int, ...]:
    value = fields.values[name]
    good = isinstance(value, list) and value and all(type(count) is int and count > 0 for count in value)
    if not good:
        raise WeightsError(f"config.json says {name} = {value!r}; it must be a list of whole numbers above 0")
    return tuple(value)


def make(
    family: str, depths: tuple[int, ...], widths: tuple[int, ...], *, stem: int = 4, eps: float, native: int = 224
) -> ConvNext:
    """An architecture of stages."""
    return ConvNext(
        family=family,
        embed_dim=widths[-1],
        depth=0,
        patch_size=stem * 2 ** (len(depths) - 1),
        num_registers=0,
        native_size=native,
        summary="pool",
        depths=depths,
        widths=widths,
        norm_eps=eps,
    )


def write_stages(architecture: Architecture) -> dict[str, Any]:
    """The fields of a `config.json` from which transformers makes the network."""
    assert isinstance(architecture, ConvNext)
    return {
        "num_channels": 3,
        "hidden_sizes": list(architecture.widths),
        "depths": list(architecture.depths),
        "hidden_act": "gelu",
        "layer_norm_eps": architecture.norm_eps,
        "image_size": architecture.native_size,
    }


def _write(architecture: Architecture) -> dict[str, Any]:
    assert isinstance(architecture, ConvNext)
    stages = len(architecture.depths)
    return {**write_stages(architecture), "patch_size": architecture.stem, "num_stages": stages}


def _call(network: Any, pixels: Any, architecture: Architecture) -> Any:
    output = network(pixels)
    return output.pooler_output, output.last_hidden_state


FAMILY = Family(
    model_type="convnext",
    model_class="ConvNextModel",
    config_class="ConvNextConfig",
    read=lambda config: replace(read_stages(config, "convnext", DEFAULTS), mean=HALF, std=HALF),
    write=_write,
    call=_call,
    split=split_map,
    dialects=(Dialect(name="hub", key=HubKey, prefixes=("", "convnext."), ignored=IGNORED, outside=OUTSIDE),),
    attention=(),
)

BASE = Release(
    architecture=make("convnext", (3, 3, 27, 3), (128, 256, 512, 1024), eps=1e-12),
    hub_id="facebook/convnext-base-224-22k",
    licence="Apache-2.0",
    pretraining=("ImageNet-22k",),
    feature="mean over space of the last feature map, after the final norm (transformers' pooler_output)",
)
