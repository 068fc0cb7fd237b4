"""A backbone before it is loaded: its facts, the identity of its weights and how to get the network."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from featstore.backbones.architecture import Architecture, VisionTransformer
from featstore.backbones.digests import digest_files
from featstore.backbones.family import Family
from featstore.backbones.weights import WeightFiles
from featstore.errors import ConfigError, MissingWeightsError, UnknownNameError, WeightsError
from featstore.files import digest
from featstore.pretraining import runs_behind

if TYPE_CHECKING:
    import featstore.backbones.tokens

ATTENTION = ("sdpa", "eager", "xformers", "flash")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
MEMORY = ("auto", "resident", "stream", "shard")
WEIGHT_DTYPES = ("same", "int8", "fp8")
COMPILE = ("off", "on", "graphs")
INTERPOLATIONS = ("hf", "meta")
NORMS = ("final", "none")
RANDOM_ENDING = "-random"  # of the sets of random weights
RESCALE_TOLERANCE = 1e-6  # relative; 1/255 has been written with fewer digits
RANDOM_SCHEME = 1  # raise it whenever random_weights.py would give other numbers

FAMILIES = {
    "dinov2": "featstore.backbones.dinov2:FAMILY",
    "dinov2_with_registers": "featstore.backbones.dinov2:REGISTER_FAMILY",
    "dinov3_vit": "featstore.backbones.dinov3:FAMILY",
    "dinov3_convnext": "featstore.backbones.dinov3_convnext:FAMILY",
    "vit": "featstore.backbones.vit:FAMILY",
    "vit_mae": "featstore.backbones.mae:FAMILY",
    "vit_msn": "featstore.backbones.msn:FAMILY",
    "clip_vision_model": "featstore.backbones.clip:FAMILY",
    "sam_vision_model": "featstore.backbones.sam:FAMILY",
    "convnext": "featstore.backbones.convnext:FAMILY",
    "biomedclip": "featstore.backbones.pathology:BIOMEDCLIP_FAMILY",
    "uni": "featstore.backbones.pathology:UNI_FAMILY",
    "conch": "featstore.backbones.pathology:CONCH_FAMILY",
    "resnet": "featstore.backbones.resnet:FAMILY",
    "vgg": "featstore.backbones.vgg:FAMILY",
    "densenet": "featstore.backbones.densenet:FAMILY",
    "mobilenet_v2": "featstore.backbones.mobilenet:FAMILY",
    "timm": "featstore.backbones.timm_models:FAMILY",
}
# Model types of whole models whose image tower is a family of its own.
TOWERS = {"clip": "clip_vision_model", "sam": "sam_vision_model"}

# Where they differ the network or the weights' shapes differ; mean and std come from preprocessor_config.json.
NOT_IN_CONFIG = ("mean", "std", "counts", "final_norm")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How a network is loaded; nothing here but the compute dtype and the weight dtype is part of identity.

    `memory`: whole on the device, a block at a time (`stream`), or cut over the processes of a group (`shard`); `auto`
    streams what does not fit. `weight_dtype`: the type in which the matrices are kept, `same` as they compute.
    `compile`: blocks through torch.compile, `graphs` with CUDA graphs.
    """

    device: str
    compute_dtype: str
    attention: str = "sdpa"
    memory: str = "auto"
    weight_dtype: str = "same"
    compile: str = "off"

    def __post_init__(self) -> None:
        for field_name, allowed in (
            ("compute_dtype", COMPUTE_DTYPES),
            ("attention", ATTENTION),
            ("memory", MEMORY),
            ("weight_dtype", WEIGHT_DTYPES),
            ("compile", COMPILE),
        ):
            value = getattr(self, field_name)
            if value not in allowed:
                raise ConfigError(f"{field_name.replace('_', ' ')} must be one of {', '.join(allowed)}; got {value!r}")


@dataclass(frozen=True, kw_only=True)
class BackboneSource:
    """Everything about a backbone that needs neither torch nor transformers.

    `model` is the network's own name; `name` stands in set names, where random weights say so; `weights` says what the
    weights are, as JSON: `kind` (hub, local, random, embedded, function), `digest` and facts that do not depend on the
    machine, such as `trained_on`, the runs of `probes finetune` behind it; `origin` says it for people, with paths.
    `processor` is the checkpoint's own `preprocessor_config.json`; `listed` the name in `BACKBONES` that was asked for,
    None for a folder, a hub id or a function, whatever they are called. `known` is False where the weights are not at
    hand: the digest is a placeholder, and nothing can be loaded.
    """

    model: str
    architecture: Architecture
    weights: dict[str, Any]
    origin: str
    random: bool = False
    pos_interp: str = "hf"
    processor: dict[str, Any] | None = None
    listed: str | None = None
    known: bool = True
    loader: Callable[[LoadOptions], "featstore.backbones.tokens.Backbone"] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """Of sets: the last part of a function's or a path's name; random weights never share one with real ones.

        Nor do those of a fine-tuned network with those it came from: `tiny-lora-seed0-3fa9c1`.
        """
        if runs := self.weights.get("trained_on"):
            return f"{runs[-1]['name']}-{self.weights['digest'][:6]}"
        plain = self.model.rpartition("/")[2].rpartition(":")[2]
        return f"{plain}{RANDOM_ENDING}" if self.random and not plain.endswith(RANDOM_ENDING) else plain

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the tokens besides pixels and compute dtype; equal for equal bytes wherever they are."""
        return {
            "weights": self.weights["digest"],
            "architecture": self.architecture.as_dict(),
            "pos_interp": self.pos_interp,
        }

    def load(
        self,
        *,
        device: str,
        compute_dtype: str,
        attention: str = "sdpa",
        memory: str = "auto",
        weight_dtype: str = "same",
        compile: str = "off",
    ) -> "featstore.backbones.tokens.Backbone":
        """The network on `device` (cpu, cuda, cuda:N), computing in float32, bfloat16 or float16; see `LoadOptions`.

        Raises:
            ConfigError: no such device name or option, or one that the network cannot have.
            DeviceError: the device is absent, too small or without the compute dtype.
            WeightsError: the files do not fit the architecture.
        """
        return self.loader(
            LoadOptions(
                device=device,
                compute_dtype=compute_dtype,
                attention=attention,
                memory=memory,
                weight_dtype=weight_dtype,
                compile=compile,
            )
        )


def find_family(model_type: Any) -> Family:
    """The family of a `config.json`'s model type.

    Raises:
        UnknownNameError: a type that is not supported.
    """
    name = TOWERS.get(model_type, model_type) if isinstance(model_type, str) else None
    if name not in FAMILIES:
        readable = [known for known, place in FAMILIES.items() if resolve_name(place).read is not None]
        raise UnknownNameError(
            f"config.json says model_type = {model_type!r}; supported: {', '.join([*readable, *TOWERS])}, "
            "and any other network as module:function"
        )
    family: Family = resolve_name(FAMILIES[name])
    return family


def read_architecture(config: dict[str, Any], processor: dict[str, Any] | None) -> Architecture:
    """Facts of a folder in the hub's format, with the mean and std of its own processor.

    Raises:
        UnknownNameError: a network of another type.
        WeightsError: fields that are malformed or not supported.
    """
    family = find_family(config.get("model_type"))
    if family.read is None:
        raise UnknownNameError(
            f"config.json says model_type = {config.get('model_type')!r}, whose folders are not read; "
            "give the model's name"
        )
    return with_processor(family.read(config), processor)


def with_processor(architecture: Architecture, processor: dict[str, Any] | None) -> Architecture:
    """The architecture with mean and std of a `preprocessor_config.json`, where they stand in it.

    Ours are of values x / 255, and x * f of the file's `rescale_factor` f is normalised to the same numbers:
    (x f - m) / s = (x / 255 - m / 255 f) / (s / 255 f).

    Raises:
        WeightsError: they are no numbers.
    """
    if processor is None:
        return architecture
    mean, std = architecture.mean, architecture.std
    if not _does(processor, "do_normalize"):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif "image_mean" in processor and "image_std" in processor:
        mean, std = _three(processor, "image_mean"), _three(processor, "image_std")
    scale = _scale_of(processor)
    if scale != 1:
        mean = (mean[0] / scale, mean[1] / scale, mean[2] / scale)
        std = (std[0] / scale, std[1] / scale, std[2] / scale)
    return replace(architecture, mean=mean, std=std)


def _does(processor: dict[str, Any], step: str) -> bool:
    value = processor.get(step)
    return True if value is None else bool(value)


def _three(processor: dict[str, Any], key: str) -> tuple[float, float, float]:
    values = processor[key]
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, (int, float)) for v in values):
        raise WeightsError(f"preprocessor_config.json says {key} = {values!r}; it must be three numbers")
    return float(values[0]), float(values[1]), float(values[2])


def _scale_of(processor: dict[str, Any]) -> float:
    """What 255 becomes before it is normalised; 1 in nearly every file."""
    if not _does(processor, "do_rescale"):
        return 255.0
    factor = processor.get("rescale_factor")
    if factor is None:
        return 1.0
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
        raise WeightsError(f"preprocessor_config.json says rescale_factor = {factor!r}; it must be a number above 0")
    scale = 255.0 * factor
    return 1.0 if abs(scale - 1) <= RESCALE_TOLERANCE else scale


def check_same(name: str, expected: Architecture, config: dict[str, Any]) -> None:
    """Compare a folder's `config.json` with the architecture that a model's name promises.

    Raises:
        WeightsError: they differ; the message says where.
    """
    found = read_architecture(config, None)
    # With rotary positions the training size shapes no tensor and enters no computation, nor does it in convolutions.
    learned = isinstance(expected, VisionTransformer) and expected.rope_theta is None
    skipped = NOT_IN_CONFIG if learned else (*NOT_IN_CONFIG, "native_size")
    differing = [
        f"{item.name} {getattr(found, item.name, None)!r} instead of {getattr(expected, item.name)!r}"
        for item in fields(expected)
        if item.name not in skipped and getattr(found, item.name, None) != getattr(expected, item.name)
    ]
    if differing:
        raise WeightsError(
            f"config.json is not that of {name}: {'; '.join(differing)}. "
            "Give the model that it is, or hf:DIR to take the folder's word"
        )


def choose_interpolation(family: Family, asked: str | None, *, meta_files: bool) -> str:
    """How positions are resized: as asked, else as the checkpoint's own code does it.

    Raises:
        ConfigError: no such way, or one that makes no difference for this family.
    """
    if asked is None:
        return "meta" if meta_files and "meta" in family.interpolations else "hf"
    if asked not in INTERPOLATIONS:
        raise ConfigError(f"--pos-interp must be one of {', '.join(INTERPOLATIONS)}; got {asked!r}")
    if asked not in family.interpolations:
        raise ConfigError(
            f"--pos-interp {asked}: {family.model_type} has no position table that Meta's code resizes otherwise than "
            "transformers; leave it out"
        )
    return asked


def with_norm(architecture: Architecture, norm: str | None) -> Architecture:
    """The architecture with its tokens taken after the final norm or before it.

    Raises:
        ConfigError: no such choice, or a network without inner layers.
    """
    if norm is None:
        return architecture
    if norm not in NORMS:
        raise ConfigError(f"--norm must be one of {', '.join(NORMS)}; got {norm!r}")
    if not architecture.depth or not find_family(architecture.family).norm:
        raise ConfigError(f"--norm {norm}: {architecture.family} has no final norm over tokens; leave it out")
    if norm == "none" and architecture.patch_dim is not None:
        raise ConfigError(
            f"--norm none: {architecture.family} makes cls of its tokens after the final norm; leave --norm out"
        )
    return replace(architecture, final_norm=norm == "final")


def from_files(
    model: str,
    architecture: Architecture,
    found: WeightFiles,
    *,
    weights: dict[str, Any],
    origin: str,
    digest_cache: Path | None,
    pos_interp: str | None = None,
) -> BackboneSource:
    """A source whose weights are files; `weights` gains their digest, and the fine-tuning runs behind local ones.

    Raises:
        WeightsError: facts of a run that are about other weights.
    """
    facts = with_processor(architecture, found.processor)
    way = choose_interpolation(find_family(facts.family), pos_interp, meta_files=found.meta)
    held = digest_files(found.files, digest_cache)
    runs = runs_behind(found.files[0], held) if weights["kind"] == "local" else []
    return BackboneSource(
        model=model,
        architecture=facts,
        weights={**weights, "digest": held, **({"trained_on": runs} if runs else {})},
        origin=origin,
        processor=found.processor,
        pos_interp=way,
        loader=FileLoader(found.files, facts, way),
    )


def from_seed(
    model: str,
    architecture: Architecture,
    seed: int,
    *,
    processor: dict[str, Any] | None = None,
    pos_interp: str | None = None,
) -> BackboneSource:
    """A source of random weights.

    Raises:
        ConfigError: a negative seed.
    """
    if seed < 0:
        raise ConfigError(f"the seed of random weights must be 0 or more; got {seed}")
    way = choose_interpolation(find_family(architecture.family), pos_interp, meta_files=False)
    facts = {"kind": "random", "seed": seed, "scheme": RANDOM_SCHEME}
    return BackboneSource(
        model=model,
        architecture=architecture,
        weights={**facts, "digest": digest({**facts, "architecture": architecture.as_dict()})},
        origin=f"random weights, seed {seed}",
        random=True,
        processor=processor,
        pos_interp=way,
        loader=_SeedLoader(seed, architecture, way),
    )


def from_facts(
    model: str,
    architecture: Architecture,
    repo: str,
    *,
    processor: dict[str, Any] | None = None,
    pos_interp: str | None = None,
) -> BackboneSource:
    """A source whose weights on the hub are not at hand: enough to foretell work and bytes, nothing to load."""
    way = choose_interpolation(find_family(architecture.family), pos_interp, meta_files=False)
    return BackboneSource(
        model=model,
        architecture=architecture,
        weights={"kind": "hub", "repo": repo, "revision": "0" * 40, "digest": "0" * 64},  # as long as the real ones
        origin=f"hub {repo}, weights not at hand",
        processor=processor,
        pos_interp=way,
        known=False,
        loader=_NoLoader(repo),
    )


@dataclass(frozen=True)
class _NoLoader:
    repo: str

    def __call__(self, options: LoadOptions) -> "featstore.backbones.tokens.Backbone":
        raise MissingWeightsError(
            f"the weights of {self.repo} must be at hand to load the network, and only its facts were asked for; "
            "describe it with its weights"
        )


@dataclass(frozen=True)
class FileLoader:
    """Loads a network from its weight files; `files` may be copies of those that were digested."""

    files: tuple[Path, ...]
    architecture: Architecture
    pos_interp: str

    def __call__(self, options: LoadOptions) -> "featstore.backbones.tokens.Backbone":
        from featstore.backbones.digests import reading_lock
        from featstore.backbones.network import load_network
        from featstore.backbones.tensors import open_files

        family = find_family(self.architecture.family)
        with reading_lock(self.files):  # the first process of a node fills the page cache for the others
            return load_network(open_files(self.files), self.architecture, family, self.pos_interp, options)


@dataclass(frozen=True)
class _SeedLoader:
    seed: int
    architecture: Architecture
    pos_interp: str

    def __call__(self, options: LoadOptions) -> "featstore.backbones.tokens.Backbone":
        from featstore.backbones.network import load_network
        from featstore.backbones.tensors import RandomTensors

        family = find_family(self.architecture.family)
        return load_network(RandomTensors(self.seed, family), self.architecture, family, self.pos_interp, options)
