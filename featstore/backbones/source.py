"""A backbone before it is loaded: its facts, the identity of its weights and how to get the network."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

from featstore.backbones.architecture import Architecture
from featstore.backbones.family import Family
from featstore.backbones.weights import WeightFiles, digest_files
from featstore.errors import ConfigError, UnknownNameError, WeightsError
from featstore.files import digest

if TYPE_CHECKING:
    import featstore.backbones.tokens

ATTENTION = ("sdpa", "eager")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
RANDOM_SCHEME = 1  # raise it whenever random_weights.py would give other numbers

FAMILIES = {
    "dinov2": "featstore.backbones.dinov2:FAMILY",
    "dinov2_with_registers": "featstore.backbones.dinov2:REGISTER_FAMILY",
    "dinov3_vit": "featstore.backbones.dinov3:FAMILY",
}

# Where they differ the network or the weights' shapes differ; mean and std come from preprocessor_config.json.
NOT_IN_CONFIG = ("mean", "std")


@dataclass(frozen=True, kw_only=True)
class BackboneSource:
    """Everything about a backbone that needs neither torch nor transformers.

    `name` stands in set names; `weights` says what the weights are, as JSON: `kind` (hub, local, random, embedded,
    function), `digest` and facts that do not depend on the machine; `origin` says it for people, with paths.
    `processor` is the checkpoint's own `preprocessor_config.json`.
    """

    name: str
    architecture: Architecture
    weights: dict[str, Any]
    origin: str
    random: bool = False
    pos_interp: Literal["hf"] = "hf"
    processor: dict[str, Any] | None = None
    loader: Callable[..., "featstore.backbones.tokens.Backbone"] = field(repr=False, compare=False)

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the tokens besides pixels and compute dtype; equal for equal bytes wherever they are."""
        return {
            "weights": self.weights["digest"],
            "architecture": self.architecture.as_dict(),
            "pos_interp": self.pos_interp,
        }

    def load(
        self, *, device: str, compute_dtype: str, attention: str = "sdpa"
    ) -> "featstore.backbones.tokens.Backbone":
        """The network on `device` (cpu, cuda, cuda:N), computing in float32, bfloat16 or float16.

        Raises:
            ConfigError: no such device name, compute dtype or attention.
            DeviceError: the device is absent, too small or without the compute dtype.
            WeightsError: the files do not fit the architecture.
        """
        if compute_dtype not in COMPUTE_DTYPES:
            raise ConfigError(f"compute dtype must be one of {', '.join(COMPUTE_DTYPES)}; got {compute_dtype!r}")
        if attention not in ATTENTION:
            raise ConfigError(f"attention must be one of {', '.join(ATTENTION)}; got {attention!r}")
        return self.loader(device=device, compute_dtype=compute_dtype, attention=attention)


def find_family(model_type: Any) -> Family:
    """The family of a `config.json`'s model type.

    Raises:
        UnknownNameError: a type that is not supported.
    """
    if model_type not in FAMILIES:
        raise UnknownNameError(
            f"config.json says model_type = {model_type!r}; supported: {', '.join(FAMILIES)}, "
            "and any other network as module:function"
        )
    family: Family = resolve_name(FAMILIES[model_type])
    return family


def read_architecture(config: dict[str, Any], processor: dict[str, Any] | None) -> Architecture:
    """Facts of a folder in the hub's format, with the mean and std of its own processor.

    Raises:
        UnknownNameError: a network of another type.
        WeightsError: fields that are malformed or not supported.
    """
    return with_processor(find_family(config.get("model_type")).read(config), processor)


def with_processor(architecture: Architecture, processor: dict[str, Any] | None) -> Architecture:
    """The architecture with `image_mean` and `image_std` of a `preprocessor_config.json`, where they stand in it."""
    if processor is None or "image_mean" not in processor or "image_std" not in processor:
        return architecture
    for key in ("image_mean", "image_std"):
        values = processor[key]
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, (int, float)) for v in values):
            raise WeightsError(f"preprocessor_config.json says {key} = {values!r}; it must be three numbers")
    red, green, blue = (float(value) for value in processor["image_mean"])
    red_std, green_std, blue_std = (float(value) for value in processor["image_std"])
    return replace(architecture, mean=(red, green, blue), std=(red_std, green_std, blue_std))


def check_same(name: str, expected: Architecture, config: dict[str, Any]) -> None:
    """Compare a folder's `config.json` with the architecture that a model's name promises.

    Raises:
        WeightsError: they differ; the message says where.
    """
    found = read_architecture(config, None)
    # With rotary positions the training size shapes no tensor and enters no computation.
    skipped = (*NOT_IN_CONFIG, "native_size") if expected.rope_theta is not None else NOT_IN_CONFIG
    differing = [
        f"{item.name} {getattr(found, item.name)!r} instead of {getattr(expected, item.name)!r}"
        for item in fields(Architecture)
        if item.name not in skipped and getattr(found, item.name) != getattr(expected, item.name)
    ]
    if differing:
        raise WeightsError(
            f"config.json is not that of {name}: {'; '.join(differing)}. "
            "Give the model that it is, or hf:DIR to take the folder's word"
        )


def from_files(
    name: str,
    architecture: Architecture,
    found: WeightFiles,
    *,
    weights: dict[str, Any],
    origin: str,
    digest_cache: Path | None,
) -> BackboneSource:
    """A source whose weights are files; `weights` gains their digest."""
    return BackboneSource(
        name=name,
        architecture=with_processor(architecture, found.processor),
        weights={**weights, "digest": digest_files(found.files, digest_cache)},
        origin=origin,
        processor=found.processor,
        loader=_FileLoader(found.files, with_processor(architecture, found.processor)),
    )


def from_seed(
    name: str, architecture: Architecture, seed: int, *, processor: dict[str, Any] | None = None
) -> BackboneSource:
    """A source of random weights.

    Raises:
        ConfigError: a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"the seed of random weights must be 0 or more; got {seed}")
    facts = {"kind": "random", "seed": seed, "scheme": RANDOM_SCHEME}
    return BackboneSource(
        name=name,
        architecture=architecture,
        weights={**facts, "digest": digest({**facts, "architecture": architecture.as_dict()})},
        origin=f"random weights, seed {seed}",
        random=True,
        processor=processor,
        loader=_SeedLoader(seed, architecture),
    )


@dataclass(frozen=True)
class _FileLoader:
    files: tuple[Path, ...]
    architecture: Architecture

    def __call__(self, **options: str) -> "featstore.backbones.tokens.Backbone":
        from featstore.backbones.network import load_files

        return load_files(self.files, self.architecture, find_family(self.architecture.family), **options)


@dataclass(frozen=True)
class _SeedLoader:
    seed: int
    architecture: Architecture

    def __call__(self, **options: str) -> "featstore.backbones.tokens.Backbone":
        from featstore.backbones.network import build_random

        return build_random(self.seed, self.architecture, find_family(self.architecture.family), **options)
