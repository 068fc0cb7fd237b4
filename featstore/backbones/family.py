"""What differs between families of networks in transformers, as data: names, fields of `config.json`, keys of files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from featstore.backbones.architecture import Architecture
from featstore.errors import WeightsError


class HubKey(NamedTuple):
    """Where a live parameter stands in the hub's files: tensor `name`, cut along axis 0 into `parts`, piece `part`."""

    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One network class of transformers.

    `blocks` and `norm` are attribute paths to the list of blocks and the final norm, `computed` the modules that hold
    computed numbers and no weights. `read` and `write` turn the fields of a `config.json` into an `Architecture` and
    back; what they do not name has no influence on the tokens. `hub_key` maps names of live parameters, which differ
    between versions of transformers, to those of the hub's files, which do not.
    """

    model_type: str
    model_class: str
    config_class: str
    blocks: str
    norm: str
    computed: tuple[str, ...] = ()
    read: Callable[[dict[str, Any]], Architecture]
    write: Callable[[Architecture], dict[str, Any]]
    hub_key: Callable[[str], HubKey]


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A published network: its facts and where its weights are. `gated` means that the hub asks for a licence first."""

    architecture: Architecture
    hub_id: str
    meta_name: str
    gated: bool = False


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
