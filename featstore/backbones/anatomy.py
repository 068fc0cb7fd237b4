"""Which parts of a network are its blocks, how deep a parameter lies, and which matrices play which role.

Names are those that are live; they differ between transformers' versions, timm and hand-written networks, so they are
found by how such networks are usually built, and what is not found is an error for those that ask for it.
"""

import re
from collections.abc import Sequence

from torch import nn

from featstore.backbones.family import Family
from featstore.errors import ConfigError

# Modules that repeat, the more particular first: ConvNeXt (transformers, timm), Swin, EfficientNet, DenseNet, ResNet,
# vision transformers, and plain sequences (MobileNetV2, VGG), whose first part is their stem.
PLAIN = re.compile(r"(.*\.)?(features|classifier)\.\d+")
BLOCKS = (
    re.compile(r"(.*\.)?stages\.\d+\.(layers|blocks)\.\d+"),
    re.compile(r"(.*\.)?layers\.\d+\.blocks\.\d+"),
    re.compile(r"(.*\.)?blocks\.\d+\.\d+"),
    re.compile(r"(.*\.)?denseblock\d+\.denselayer\d+"),
    re.compile(r"(.*\.)?layer\d+\.\d+"),
    re.compile(r"(.*\.)?(blocks|resblocks|layers|layer)\.\d+"),
    PLAIN,
)

# Role -> ends of the names of modules that play it. Gated networks have two matrices before the product (`fc1` is both)
# and one behind it; DINOv2's giant has them as w12 and w3 in Meta's code, weights_in and weights_out in old
# transformers.
ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query"),
    "k": ("k_proj", "key"),
    "v": ("v_proj", "value"),
    "qkv": ("qkv",),
    "o": ("o_proj", "out_proj", "attn.proj", "attention.output.dense"),
    "fc1": (
        *("fc1", "up_proj", "gate_proj", "lin1", "w12", "w1", "w2", "weights_in", "intermediate.dense"),
        *("fc1_g", "fc1_x", "pointwise_conv1", "pwconv1"),
    ),
    "fc2": ("fc2", "down_proj", "lin2", "w3", "weights_out", "output.dense", "pointwise_conv2", "pwconv2"),
}
POINTWISE = "pointwise"  # every 1 x 1 convolution
FUSED = ("q", "k", "v")


def find_blocks(network: nn.Module, path: str = "") -> tuple[str, ...]:
    """Names of the modules that repeat, from the input to the output; `path` is that of their list, where it is known.

    Empty where none are found.
    """
    if path:
        return tuple(f"{path}.{name}" for name, _ in network.get_submodule(path).named_children())
    names = [name for name, module in network.named_modules() if next(module.parameters(), None) is not None]
    for pattern in BLOCKS:
        found = [name for name in names if pattern.fullmatch(name)]
        if len(found) > 1:
            return tuple(found[1:] if pattern is PLAIN else found)
    return ()


def depths_of(names: Sequence[str], blocks: Sequence[str]) -> dict[str, int]:
    """Depth of each parameter: 0 before the blocks, 1..L in them, L + 1 behind them; `names` in the network's order.

    What stands between two blocks (a ConvNeXt's downsampling) counts with the block that it feeds.

    Raises:
        ConfigError: no blocks are known.
    """
    if not blocks:
        raise ConfigError(
            "the blocks of this network must be known for that, and no list of blocks was found under the usual names "
            "(blocks, layers, layer, stages, features); use a method that needs none: full, bitfit or linear-online"
        )
    number = {block: place for place, block in enumerate(blocks, start=1)}
    own = [next((number[part] for part in _prefixes(name) if part in number), None) for name in names]
    first = next(place for place, depth in enumerate(own) if depth is not None)
    following = len(blocks) + 1
    depths: dict[str, int] = {}
    for place in reversed(range(len(names))):
        found = own[place]
        following = found if found is not None else following
        depths[names[place]] = following if place >= first else 0
    return {name: depths[name] for name in names}


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def find_targets(network: nn.Module, blocks: Sequence[str], targets: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(names of the modules within the blocks that `targets` mean, notes about what that is).

    `targets` are roles joined by commas (q, k, v, qkv, o, fc1, fc2, pointwise), or names as they end in this network.
    `qkv` of three matrices is all three; of one matrix for query, key and value `q` or `v` is the whole of it, because
    an adapter of low rank cannot be kept to a third of its rows.

    Raises:
        ConfigError: a target that matches nothing; the message says what there is.
    """
    inside = {
        name: module
        for name, module in network.named_modules()
        if any(part in blocks for part in (*_prefixes(name), name))
        and (isinstance(module, nn.Linear) or _is_pointwise(module))
    }
    chosen: dict[str, None] = {}
    notes: list[str] = []
    for target in targets.replace(" ", "").split(","):
        found = [name for name in inside if _ends(name, (target,))]
        if not found:
            role = next((role for role, ends in ROLES.items() if target == role or target in ends), target)
            found = _of_role(inside, role)
            fused = [] if found or role not in FUSED else _of_role(inside, "qkv")
            if fused:
                notes.append(f"{target}: query, key and value are one matrix here, which is adapted as a whole")
            found = found or fused
        if not found:
            raise ConfigError(f"--targets {target} matches nothing; this network has {_there(inside)}")
        chosen |= dict.fromkeys(found)
    return tuple(name for name in inside if name in chosen), tuple(dict.fromkeys(notes))


def matrices_of(block: nn.Module, role: str) -> list[nn.Module]:
    """The matrices of a block that play a role by themselves, none where there are none; no adapted ones."""
    inside: dict[str, nn.Module] = {n: module for n, module in block.named_modules() if isinstance(module, nn.Linear)}
    return [inside[name] for name in _of_role(inside, role)]


def find_key_biases(network: nn.Module, family: Family | None) -> dict[str, slice]:
    """Biases of keys that softmax ignores, or the part of a bias along axis 0, by name (see `family.KeyBias`).

    Empty for an own network, of which this is not known.
    """
    found: dict[str, slice] = {}
    for name, parameter in network.named_parameters():
        attention, _, _ = name.removesuffix(".bias").rpartition(".")
        for each in () if family is None else family.key_biases:
            if not re.fullmatch(each.names, name):
                continue
            if each.where is None or each.where(network.get_submodule(attention)):
                size = len(parameter) // each.parts
                found[name] = slice(each.part * size, (each.part + 1) * size)
    return found


def usual_targets(network: nn.Module, blocks: Sequence[str]) -> str:
    """The targets where none are asked for: query and value, else both matrices of a block, else 1 x 1 convolutions.

    Source: Hu et al. 2021 (LoRA), section 4.2, adapts query and value; ConvNeXt has neither.

    Raises:
        ConfigError: the network has nothing that could be adapted.
    """
    for targets in ("q,v", "fc1,fc2", POINTWISE):
        try:
            find_targets(network, blocks, targets)
        except ConfigError:
            continue
        return targets
    raise ConfigError(
        "LoRA needs matrices or 1 x 1 convolutions within blocks, and this network has none; use full, bitfit or last-k"
    )


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def _ends(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _of_role(inside: dict[str, nn.Module], role: str) -> list[str]:
    if role == "qkv" and not any(_ends(name, ROLES["qkv"]) for name in inside):
        return [name for part in FUSED for name in _of_role(inside, part)]
    if role == POINTWISE:
        return [name for name, module in inside.items() if isinstance(module, nn.Conv2d)]
    if role not in ROLES:
        return []
    attention = role == "fc2"  # transformers' old `output.dense` names a matrix of the attention too
    found = [name for name in inside if _ends(name, ROLES[role])]
    return [name for name in found if not (attention and _ends(name, ROLES["o"]))]


def _there(inside: dict[str, nn.Module]) -> str:
    roles = [role for role in (*ROLES, POINTWISE) if _of_role(inside, role)]
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in inside if not name.rpartition(".")[2].isdigit()))
    said = [f"the roles {', '.join(roles)}"] if roles else []
    said += [f"modules ending in {', '.join(ends)}"] if ends else []
    return " and ".join(said) or "no matrices and no 1 x 1 convolutions in its blocks"
