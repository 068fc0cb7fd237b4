"""What differs between families of networks, as data: names, fields of `config.json`, keys of files, shapes of outputs.

No file of a family imports torch, so that names, facts and identities cost nothing; the functions that run a network
get it and its tensors as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from featstore.backbones.architecture import Architecture
from featstore.errors import WeightsError


class HubKey(NamedTuple):
    """Where a live parameter stands in files: tensor `name`, cut along axis 0 into `parts`, piece `part`."""

    name: str
    part: int = 0
    parts: int = 1


class KeyBias(NamedTuple):
    """Biases of attention keys that softmax ignores: piece `part` of `parts` along axis 0, of live names `names`.

    Scores q . (k + b) = q . k + q . b: the bias adds the same number to all scores of a query, and softmax does not
    change. So it is only where nothing comes after the bias that depends on the key's position (rotary embeddings) or
    on the key itself (a norm of keys). `names` is a regular expression for whole names; `where` is asked of the module
    that holds the projection, in families whose networks differ in that.
    """

    names: str
    part: int = 0
    parts: int = 1
    where: Callable[[Any], bool] | None = None


# Whose blocks have a matrix for the keys alone: transformers' present name of it, and that of older versions.
SEPARATE_KEYS = KeyBias(r".*\.(k_proj|key)\.bias")


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """Key names of one kind of checkpoint.

    `key` maps the name of a live parameter, which differs between versions of transformers, to that of the files, which
    does not; a file may put one of `prefixes` before all of them. `optional` and `ignored` are regular expressions that
    match the start of a name (without the prefix): live parameters that a file need not have, and tensors of a file
    that the tokens do not depend on (heads, text towers, mask tokens). `outside` are those of whole names that may
    stand beside a prefix; what is named nowhere is an error, because it may tell of another network.
    `after(network, tensors)` is called once all parameters are in place; `tensors` is a
    `featstore.backbones.tensors.Tensors`. `meta` says that positions are to be resized as Meta's own code does it,
    unless the user says otherwise.
    """

    name: str
    key: Callable[[str], HubKey]
    prefixes: tuple[str, ...] = ("",)
    optional: tuple[str, ...] = (r".*mask_token$",)
    ignored: tuple[str, ...] = (r".*mask_token$",)
    outside: tuple[str, ...] = ()
    after: Callable[[Any, Any], None] | None = None
    meta: bool = False


def last_hidden_state(network: Any, pixels: Any, architecture: Architecture) -> Any:
    """The default of `Family.call`."""
    return network(pixels).last_hidden_state


def split_tokens(sequence: Any, architecture: Architecture) -> tuple[Any, Any, Any]:
    """The default of `Family.split`: CLS, registers, patches stand in this order in a sequence (B, N, D)."""
    first_patch = 1 + architecture.num_registers
    return sequence[:, 0], sequence[:, 1:first_patch], sequence[:, first_patch:]


def norm_all(norm: Any, sequence: Any) -> Any:
    """The default of `Family.finish`: the final norm over every token."""
    return norm(sequence)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One kind of network.

    `build` names a function (`module:function`) that gets an `Architecture` and returns the network; where it is empty
    the network is `model_class` of transformers, made from a `config_class` with `model_options`. `read` and `write`
    turn the fields of a `config.json` into an `Architecture` and back; what they do not name has no influence on the
    tokens; families without a `config.json` have none of the two.

    `blocks` and `norm` are attribute paths to the list of blocks and the final norm. `call(network, pixels,
    architecture)` gives the final sequence, after the norm; `finish(norm, sequence)` makes of a block's output what the
    network makes of the last block's; `split(sequence, architecture)` gives (cls (B, D), registers (B, R, D), patches
    (B, P, E)). `prepare(network, architecture)` is called on a new network before its weights are filled in.

    `dialects` are the kinds of checkpoints, the hub's own first. `attention` are the kernels that can be chosen; empty
    where the network has no attention or does not route it. `float32` are regular expressions of live names that stay
    in float32 whatever the compute dtype is. `key_biases` are those that no token depends on. `gain` scales the
    deviation of random matrices, so that signals keep their size through activations that halve them. `interpolations`
    are the ways of resizing positions that differ for this family; `resize_positions(network, way)` sets another one
    than the first.
    """

    model_type: str
    model_class: str = ""
    config_class: str = ""
    model_options: dict[str, Any] = field(default_factory=dict)
    build: str = ""
    read: Callable[[dict[str, Any]], Architecture] | None = None
    write: Callable[[Architecture], dict[str, Any]] | None = None
    blocks: str = ""
    norm: str = ""
    call: Callable[[Any, Any, Architecture], Any] = last_hidden_state
    finish: Callable[[Any, Any], Any] = norm_all
    split: Callable[[Any, Architecture], tuple[Any, Any, Any]] = split_tokens
    prepare: Callable[[Any, Architecture], None] | None = None
    dialects: tuple[Dialect, ...]
    attention: tuple[str, ...] = ("sdpa", "eager", "xformers", "flash")
    float32: tuple[str, ...] = ()
    key_biases: tuple[KeyBias, ...] = ()
    gain: float = 1.0
    interpolations: tuple[str, ...] = ("hf",)
    resize_positions: Callable[[Any, str], None] | None = None

    def hub_key(self, live: str) -> HubKey:
        """Name in the hub's files of a live parameter."""
        return self.dialects[0].key(live)


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A published network: its facts and where its weights are.

    `meta_name` and `aliases` are other names of it. `gated` means that the hub asks for a licence first, and `licence`
    says in a few words what it allows. `files` are the hub's weight files where they are not safetensors with a
    `config.json`. `pretraining` names the data sets it was trained on, as far as they are published, and `feature` what
    `cls` is, with its source.
    """

    architecture: Architecture
    hub_id: str
    meta_name: str = ""
    aliases: tuple[str, ...] = ()
    gated: bool = False
    licence: str = ""
    files: tuple[str, ...] = ()
    pretraining: tuple[str, ...] = ()
    feature: str = "CLS token after the final norm"


class ConfigFields:
    """The fields of a `config.json`, with transformers' defaults for the absent ones."""

    def __init__(self, config: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.values = {**defaults, **{key: config[key] for key in defaults if key in config}}

    def require(self, field: str, supported: Any) -> None:
        """Raise `WeightsError` unless the field has the one value that is supported."""
        if self.values[field] != supported:
            raise WeightsError(
                f"config.json says {field} = {self.values[field]!r}, which is not supported; it must be {supported!r}"
            )

    def integer(self, field: str) -> int:
        """A positive whole number (0 for registers); two equal ones, as in [14, 14], count as one."""
        value = self.values[field]
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        lowest = 0 if field == "num_register_tokens" else 1
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < lowest:
            raise WeightsError(f"config.json says {field} = {value!r}; it must be one whole number >= {lowest}")
        return int(value)

    def number(self, field: str) -> float:
        """A positive number."""
        value = self.values[field]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise WeightsError(f"config.json says {field} = {value!r}; it must be a number above 0")
        return float(value)

    def flag(self, field: str) -> bool:
        """True or false."""
        value = self.values[field]
        if not isinstance(value, bool):
            raise WeightsError(f"config.json says {field} = {value!r}; it must be true or false")
        return value
