"""Options of `probes finetune`; a field is a flag. Light, for the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from featstore.configs import (
    DecodeMode,
    DicomMode,
    Fit,
    Geometry,
    Norm,
    PosInterp,
    RunConfig,
    SetConfig,
    parse_seconds,
    parse_share,
)
from featstore.errors import ConfigError
from probes.configs import SubjectConfig, parse_numbers
from probes.tuning_recipe import Crop, Flip, Interpolation, Keep, Optimizer, Precision, Schedule

Method = Literal["full", "lora", "bitfit", "last-k", "linear-online"]
PresetName = Literal["fair", "chest", "radiology", "lora-chest", "lora-radiology", "bitfit-radiology"]
Start = Literal["linear", "random"]


def flag_of(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def _at_least(config: object, least: dict[str, int]) -> None:
    for name, low in least.items():
        given = getattr(config, name)
        if given is not None and not given >= low:
            raise ConfigError(f"{flag_of(name)} must be at least {low}, got {given:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneData(SubjectConfig):
    """What is trained on and evaluated, and how its numbers are bounded."""

    model: Annotated[str, "backbone, as in featstore extract: dinov3-base, tiny, hf:FOLDER, timm:NAME, module:function"]
    features: Annotated[
        str | None, "what the head reads: cls, mean_patch, cls+mean_patch, mean_all, last4; default: the preset's"
    ] = None
    seed: Annotated[int, "seed of the bootstrap"] = 0
    resamples: Annotated[int, "bootstrap resamples (by patient) for the intervals"] = 1000

    def __post_init__(self) -> None:
        SubjectConfig.__post_init__(self)  # super() does not know a class that slots made again
        if self.features is not None and (not self.features.strip() or "," in self.features):
            raise ConfigError(
                f"--features names what one head reads, parts joined by +, and got {self.features!r}; run the command "
                "once for each"
            )
        if "," in self.model or "@" in self.model:
            raise ConfigError(f"--model names one backbone, and --res its size; got {self.model!r}")
        if self.resamples < 2:
            raise ConfigError(f"--resamples must be at least 2, got {self.resamples}")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """The backbone that training starts from, as `featstore extract` describes it."""

    res: Annotated[str | None, "input size in pixels: 512, or 384x512; default: the preset's, else the native size"] = (
        None
    )
    weights: Annotated[Path | None, "folder, .safetensors, or Meta's .pth, to load instead of the hub's"] = None
    random_weights: Annotated[int | None, "seed: start from reproducible random weights; the record says so"] = None
    revision: Annotated[str | None, "branch, tag or commit of the hub's weights; default: the newest"] = None
    norm: Annotated[Norm | None, "tokens after the network's final norm, or before it (none)"] = None
    pos_interp: Annotated[PosInterp | None, "resize learned positions as transformers (hf) or as Meta's code does"] = (
        None
    )
    name: Annotated[str | None, "model part of the name in tables; default: the backbone's name"] = None

    def __post_init__(self) -> None:
        if self.res is not None and "," in self.res:
            raise ConfigError(f"--res is one size, 224 or 384x512; got {self.res!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagesConfig:
    """How files become pixels, with the same defaults as sets of features, so that both arms see the same images."""

    geometry: Annotated[Geometry, "squash, letterbox, dino, short, hf or spline, as in featstore extract"] = "squash"
    fit: Annotated[Fit, "for sizes that the patch does not divide: nearest, floor, tokens, strict"] = "nearest"
    intensity: Annotated[str, "values to grey levels: native, minmax, window:40/400, ... (`featstore intensities`)"] = (
        "native"
    )
    dicom_mode: Annotated[DicomMode, "DICOM: standard, raw_minmax (stored values), xrv"] = "standard"
    decode: Annotated[DecodeMode, "full, or scaled: large JPEGs at 1/2, 1/4, 1/8, at least twice the size asked"] = (
        "full"
    )
    published: Annotated[
        str | None, "images as a paper has them (`featstore intensities`); default: the preset's; none: as flags say"
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """What of the network trains beside the head."""

    method: Annotated[
        Method | None,
        "full; lora: low-rank adapters; bitfit: biases; last-k: the last blocks; linear-online: the head alone",
    ] = None
    r: Annotated[int | None, "LoRA: rank of the adapters; default: 16"] = None
    alpha: Annotated[float | None, "LoRA: adapters count alpha / r; default: 32"] = None
    dropout: Annotated[float | None, "LoRA: of the adapters' input, in training; default: 0.05"] = None
    bias: Annotated[Literal["none", "lora_only"] | None, "LoRA: biases of targets train too; default: none"] = None
    targets: Annotated[
        str | None, "LoRA: q,k,v,qkv,o,fc1,fc2,pointwise, or names; default: q,v, where there are none fc1,fc2"
    ] = None
    k: Annotated[int | None, "last-k: blocks that train, with what stands behind them; default: 2"] = None
    batch_norm: Annotated[
        Literal["auto", "frozen", "train"] | None,
        "running statistics; default: auto, they move in full alone, where weights hold any",
    ] = None
    drop_path: Annotated[float | None, "share of images that skip the last block in training, rising from 0"] = None
    stretch_positions: Annotated[bool | None, "DINOv3: stretch positions at random in training"] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepsConfig:
    """How it is trained; what is not given is the preset's."""

    preset: Annotated[
        PresetName, "fair: equal for every arm; the others as published, with what differs listed (see above)"
    ] = "fair"
    lr: Annotated[str | None, "peak learning rate(s) of the network, comma-separated; validation chooses"] = None
    head_lr: Annotated[str | None, "that of the head where it is another; of several each is tried with each --lr"] = (
        None
    )
    epochs: Annotated[int | None, "passes over the training images, at most"] = None
    batch: Annotated[int | None, "images of a step, over all processes"] = None
    optimizer: Annotated[Optimizer | None, "adamw, or sgd with momentum 0.9"] = None
    weight_decay: Annotated[float | None, "of matrices, not of biases and norms"] = None
    schedule: Annotated[Schedule | None, "of the rate: cosine to 0, or constant"] = None
    warmup: Annotated[float | None, "epochs of linear rise before that"] = None
    keep: Annotated[Keep | None, "weights of the epoch, and the rate, with the best validation loss or AUROC"] = None
    patience: Annotated[int | None, "stop after this many epochs without a better one; 0: never"] = None
    class_weight: Annotated[
        Literal["none", "balanced"] | None, "balanced: pos_weight of labels, n / (K n_class) of classes"
    ] = None

    def __post_init__(self) -> None:
        for name in ("lr", "head_lr"):
            if getattr(self, name) is not None:
                parse_numbers(getattr(self, name), flag_of(name))
        _at_least(self, {"epochs": 1, "batch": 1, "weight_decay": 0, "warmup": 0, "patience": 0})


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """What is done to training images, anew in every epoch."""

    flip: Annotated[
        Flip | None,
        "mirror half of them: off, plain, mapped (labels of left and right swap), auto (mapped or off where labels "
        "name sides)",
    ] = None
    degrees: Annotated[float | None, "turn them by up to this much to either side"] = None
    interpolation: Annotated[Interpolation | None, "of turning: bilinear, or nearest as published"] = None
    crop: Annotated[Crop | None, "cut a share of the area and resize it: off, 0.75-1, 0.08-1"] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialsConfig:
    """What is repeated and how runs begin and end; what is not given is the preset's."""

    layer_decay: Annotated[float | None, "factor of the learning rate from each block to the one below; 1: none"] = None
    clip: Annotated[float | None, "largest norm of the gradient; 0: no limit"] = None
    ema: Annotated[float | None, "decay of a moving average of the weights, which then counts; 0: none"] = None
    drop_last: Annotated[bool | None, "leave the last batch of an epoch out where it is not full"] = None
    start: Annotated[
        Start | None, "the head starts from a linear probe fitted on the frozen network's features (LP-FT), or random"
    ] = None
    refit: Annotated[bool | None, "train the choice again on train + val and test that; val shows the one before"] = (
        None
    )
    seeds: Annotated[int | None, "repetitions; the first chooses the rates for all; a record each"] = None
    train_seed: Annotated[int, "the first of the seeds: first weights, order, augmentation, dropout"] = 0
    compute_dtype: Annotated[
        Precision, "bfloat16: autocast, after a short run has shown the same loss and scores as float32"
    ] = "float32"

    def __post_init__(self) -> None:
        _at_least(self, {"clip": 0, "ema": 0, "seeds": 1, "train_seed": 0})


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkConfig:
    """How it is computed: nothing here changes a number beyond rounding."""

    device: Annotated[str, "auto, cpu, cuda or cuda:1"] = "auto"
    micro: Annotated[int | None, "images that go through a device at once; gradients of a step add up"] = None
    checkpointing: Annotated[bool, "compute blocks twice instead of keeping their activations: less memory"] = False
    workers: Annotated[int | None, "threads that read and decode; default: one per core"] = None
    decoded_cache: Annotated[bool, "keep the resized images in the store, so that every epoch decodes nothing"] = False
    from_cache: Annotated[bool, "last-k, linear-online: keep what the frozen blocks give; no augmentation then"] = False
    shard: Annotated[
        bool | None, "cut the network over the processes of torchrun (FSDP2); default: from 1e9 parameters"
    ] = None
    max_failed: Annotated[str, "stop when more than this share of the images cannot be decoded: 1% or 0.01"] = "100%"
    time_budget: Annotated[
        str | None, "end with a checkpoint and status 75 when this time is up: 3h50m; the same command goes on"
    ] = None
    runs: Annotated[Path | None, "folder of checkpoints and trained weights; default: STORE/finetune"] = None
    dry_run: Annotated[bool, "say what would be trained and stop"] = False

    def __post_init__(self) -> None:
        _at_least(self, {"micro": 1})
        parse_share(self.max_failed)
        if self.time_budget is not None:
            parse_seconds(self.time_budget)
        assert self.run is not None  # its own checks

    @property
    def run(self) -> RunConfig:
        """The same for the parts of extraction that images come through."""
        return RunConfig(
            device=self.device,
            workers=self.workers,
            decoded_cache=self.decoded_cache,
            max_failed=self.max_failed,
            time_budget=self.time_budget,
            memory="resident",
            compile="off",
        )


def set_config(
    data: FinetuneData, network: NetworkConfig, images: ImagesConfig, *, published: str | None, precision: Precision
) -> SetConfig:
    """The set whose images and starting network these are: its identity says what is trained on and from what.

    Raises:
        ConfigError: flags that contradict each other.
    """
    return SetConfig(
        model=data.model,
        res=network.res,
        weights=network.weights,
        random_weights=network.random_weights,
        revision=network.revision,
        norm=network.norm,
        pos_interp=network.pos_interp,
        name=network.name,
        geometry=images.geometry,
        fit=images.fit,
        intensity=images.intensity,
        dicom_mode=images.dicom_mode,
        decode=images.decode,
        published=published,
        compute_dtype=precision,
    )
