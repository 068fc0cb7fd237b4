"""`timm:NAME`: any model of timm as a backbone, its facts measured on the meta device.

timm is an extra and imports torchvision, which in turn needs a torch of the very build that it was made for; it is
imported where a model is asked for, and nowhere else.
"""

import contextlib
import difflib
import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featstore.backbones.architecture import IMAGENET_MEAN, IMAGENET_STD, Architecture
from featstore.backbones.family import Dialect, Family, HubKey, KeyBias
from featstore.backbones.hub import fetch
from featstore.backbones.source import BackboneSource, from_files, from_seed, with_norm
from featstore.backbones.weights import find_files
from featstore.errors import ConfigError, UnknownNameError, WeightsError

PREFIX = "timm:"
NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)  # a model of timm, and a tag; timm also takes places on the hub

# num_classes=0 leaves the classifier out, which files have; the rest are counters and tables that the code computes.
IGNORED = (
    r"(head|head_dist|fc|classifier|last_linear)\.",
    r".*(num_batches_tracked|relative_position_index|attn_mask)$",
)

# Attention that does nothing to keys between their bias and the scores, but for a norm where there is one; of others
# (rotary positions, cosines, another order of heads) nothing is said.
PLAIN_ATTENTION = (
    "timm.layers.attention.Attention",
    "timm.models.swin_transformer.WindowAttention",
    "timm.layers.attention_pool.AttentionPoolLatent",
)


def from_timm(
    model: str,
    *,
    weights: Path | None = None,
    random_weights: int | None = None,
    revision: str | None = None,
    digest_cache: Path | None = None,
    pos_interp: str | None = None,
    norm: str | None = None,
) -> BackboneSource:
    """The source of `timm:NAME`, or `timm:NAME.TAG`; the arguments are those of `describe`.

    Weights come from the hub's `timm/NAME.TAG`, by default the tag that timm itself would take, or from a file or
    folder; mean, std and the native size from the `config.json` beside them, else from timm. `cls` is the first prefix
    token where the network has a class token, else what its head pools before the classifier; patches are what
    `forward_features` gives, without the prefix tokens.

    Raises:
        ConfigError: timm cannot be imported, or the network's features are no grid of tokens.
        UnknownNameError: timm has no such model.
        MissingWeightsError: the weights are not on this machine and cannot be had.
        WeightsError: they are those of another model, or damaged.
    """
    name = model.removeprefix(PREFIX)
    import_timm()
    from featstore.backbones.network import empty_parameters

    with empty_parameters():
        network = make_network(name)
    if random_weights is not None:
        architecture = with_norm(measure(name, network, network.pretrained_cfg), norm)
        return from_seed(name, architecture, random_weights, pos_interp=pos_interp)
    if weights is not None:
        found, facts, origin = find_files(weights.expanduser()), {"kind": "local"}, f"files in {weights}"
    else:
        name = _with_tag(name, network.pretrained_cfg)
        folder = fetch(f"timm/{name}", revision, model=f"{PREFIX}{name}")
        found = find_files(folder)
        facts = {"kind": "hub", "repo": f"timm/{name}", "revision": folder.name}
        origin = f"hub timm/{name} at {folder.name[:12]}, in {folder}"
    stated = network.pretrained_cfg if found.config is None else _read_config(name, network, found.config)
    architecture = with_norm(measure(name, network, stated), norm)
    return from_files(
        name, architecture, found, weights=facts, origin=origin, digest_cache=digest_cache, pos_interp=pos_interp
    )


def import_timm() -> Any:
    """The module `timm`.

    Raises:
        ConfigError: it is not installed, or it or its torchvision does not load.
    """
    if importlib.util.find_spec("timm") is None:
        raise ConfigError(
            "timm:NAME needs timm, which is not installed; where torch is one for GPUs, install it with "
            "pip install 'featstore[timm]'. Beside a CPU torch pip would exchange torch for one with CUDA: "
            "give hf:ID or a listed model there"
        )
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        import torch

        raise ConfigError(
            f"timm is installed but cannot be imported: {error}. It needs a torchvision made for this very torch "
            f"({torch.__version__}); the package index has torchvision for CUDA only, which does not load beside a CPU "
            "torch and breaks transformers too. Install torchvision from where this torch came from, or uninstall "
            "timm and torchvision and give hf:ID or a listed model"
        ) from error
    return timm


def make_network(name: str) -> Any:
    """timm's network without a classifier, for any image size if its class can.

    Raises:
        ConfigError: timm cannot be imported.
        UnknownNameError: it has no such model.
    """
    timm = import_timm()
    if not NAME.fullmatch(name) or not timm.is_model(name):
        near = " or ".join(difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3))
        raise UnknownNameError(
            f"timm {timm.__version__} has no model {name!r}; {f'did you mean {near}? ' if near else ''}"
            "timm.list_models() lists all"
        )
    try:
        try:
            network = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
        except TypeError:  # not an argument of this class
            network = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise UnknownNameError(f"timm {timm.__version__} has no model {name!r}: {error}") from error
    return network.eval()


def _with_tag(name: str, cfg: dict[str, Any]) -> str:
    tag = cfg.get("tag")
    return f"{name}.{tag}" if tag and "." not in name else name


def _read_config(name: str, network: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The `pretrained_cfg` of a folder in timm's format, over what timm says of the model.

    Raises:
        WeightsError: it is the folder of another model.
    """
    found, wanted = config.get("architecture"), name.partition(".")[0]
    if found != wanted:
        raise WeightsError(
            f"config.json says architecture = {found!r}, not {wanted!r}; give timm:{found or 'NAME'} if it is that"
        )
    if config.get("model_args"):
        raise WeightsError(
            f"config.json says model_args = {config['model_args']!r}, another network than timm's {wanted}; "
            "build it in a function of your own and give module:function"
        )
    cfg = config.get("pretrained_cfg", {})
    if not isinstance(cfg, dict):
        raise WeightsError(f"config.json says pretrained_cfg = {cfg!r}; it must be an object")
    return {**network.pretrained_cfg, **cfg}


def _three(cfg: dict[str, Any], key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    values = cfg.get(key, default)
    if (
        not isinstance(values, (list, tuple))
        or len(values) != 3
        or not all(isinstance(v, (int, float)) for v in values)
    ):
        raise WeightsError(f"timm's configuration says {key} = {values!r}; it must be three numbers")
    return float(values[0]), float(values[1]), float(values[2])


def measure(name: str, network: Any, cfg: dict[str, Any]) -> Architecture:
    """Facts of a network of timm, from one pass on the meta device; it stays there.

    Raises:
        ConfigError: its features are no grid of tokens over a square RGB image.
        WeightsError: mean, std or size of its configuration are malformed.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    channels, size, width = (int(value) for value in _three(cfg, "input_size", (3.0, 224.0, 224.0)))
    if channels != 3 or size != width:
        raise ConfigError(
            f"timm:{name} takes images of {channels} x {size} x {width}, not square RGB images; "
            "give module:function for it"
        )
    network.to("meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        cls, registers, patches = _parts(name, network, torch.empty(1, 3, size, size, device="meta"))
    side = math.isqrt(patches.shape[1])
    if side == 0 or side**2 != patches.shape[1] or size % side:
        raise ConfigError(
            f"timm:{name} gives {patches.shape[1]} patch tokens for {size} x {size} pixels, which is no grid of whole "
            "patches; give module:function for it"
        )
    patch = size // side
    return Architecture(
        family="timm",
        variant=name,
        embed_dim=cls.shape[1],
        patch_dim=None if patches.shape[2] == cls.shape[1] else patches.shape[2],
        depth=0,
        patch_size=patch,
        num_registers=registers.shape[1],
        native_size=size,
        mean=_three(cfg, "mean", IMAGENET_MEAN),
        std=_three(cfg, "std", IMAGENET_STD),
        summary="token" if _has_class_token(network) else "pool",
        fixed_size=not _takes(name, network, 2 * size, size, patch),
        counts=(sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops() / 1e9),
    )


def _takes(name: str, network: Any, height: int, width: int, patch: int) -> bool:
    """Whether the network gives a token per patch at another size than its own."""
    import torch

    try:
        with torch.inference_mode():
            patches = _parts(name, network, torch.empty(1, 3, height, width, device="meta"))[2]
    except (AssertionError, RuntimeError, ValueError):  # as the networks say it, each its own way
        return False
    return bool(patches.shape[1] == (height // patch) * (width // patch))


def _has_class_token(network: Any) -> bool:
    return bool(getattr(network, "num_prefix_tokens", 0)) and getattr(network, "cls_token", None) is not None


def _parts(name: str, network: Any, pixels: Any) -> tuple[Any, Any, Any]:
    """(cls (B, D), registers (B, R, E), patches (B, P, E)) of images."""
    features = network.forward_features(pixels)
    if getattr(features, "ndim", 0) not in (3, 4):
        raise ConfigError(
            f"timm:{name} gives {type(features).__name__} as features, not tokens or a map; give module:function for it"
        )
    if features.ndim == 4:
        last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
        tokens, prefix = (features if last else features.permute(0, 2, 3, 1)).flatten(1, 2), 0
    else:
        tokens, prefix = features, getattr(network, "num_prefix_tokens", 0)
    first = int(_has_class_token(network))
    cls = tokens[:, 0] if first else network.forward_head(features, pre_logits=True)
    if getattr(cls, "ndim", 0) != 2:
        raise ConfigError(f"timm:{name} pools no one vector per image; give module:function for it")
    registers = tokens[:, first:prefix] if prefix > first else cls.new_empty(len(cls), 0, cls.shape[1])
    return cls, registers, tokens[:, prefix:]


def call(network: Any, pixels: Any, architecture: Architecture) -> tuple[Any, Any, Any]:
    """The `Family.call` of timm's networks.

    Raises:
        ConfigError: the network does not take images of this size.
    """
    height, width = pixels.shape[2:]
    rows, columns = architecture.grid(height, width)
    with _size_errors(architecture, height, width):
        parts = _parts(architecture.variant, network, pixels)
        found = parts[2].shape[1]
        if found != rows * columns:
            raise AssertionError(f"it gives {found} patch tokens, not {rows} x {columns}")
    return parts


@contextlib.contextmanager
def _size_errors(architecture: Architecture, height: int, width: int) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise ConfigError(
            f"timm:{architecture.variant} does not take images of {height} x {width} pixels ({error}); "
            f"its own size is {architecture.native_size} x {architecture.native_size}"
        ) from error


def split(tokens: tuple[Any, Any, Any], architecture: Architecture) -> tuple[Any, Any, Any]:
    """The `Family.split` of timm's networks: `call` has done it."""
    return tokens


def _leaves_keys(attention: Any) -> bool:
    """The `KeyBias.where` of timm's networks."""
    from torch import nn

    kind = type(attention)
    if f"{kind.__module__}.{kind.__qualname__}" not in PLAIN_ATTENTION:
        return False
    return isinstance(getattr(attention, "k_norm", None) or nn.Identity(), nn.Identity)


def build_network(architecture: Architecture) -> Any:
    """The network of an architecture that `measure` gave."""
    return make_network(architecture.variant)


FAMILY = Family(
    model_type="timm",
    build="featstore.backbones.timm_models:build_network",
    call=call,
    split=split,
    dialects=(Dialect(name="timm", key=HubKey, ignored=IGNORED),),
    attention=(),
    key_biases=(
        KeyBias(r"(.*\.)?qkv\.bias", 1, 3, _leaves_keys),
        KeyBias(r"(.*\.)?kv\.bias", 0, 2, _leaves_keys),
    ),
    gain=math.sqrt(2),  # most are made of convolutions with ReLU, which halves the second moment
)
