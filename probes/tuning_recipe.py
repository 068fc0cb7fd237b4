"""How a network is fine-tuned, as data: light, for the command line and for records."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from featstore.errors import ConfigError

Flip = Literal["off", "plain", "mapped", "auto"]
Crop = Literal["off", "0.75-1", "0.08-1"]
Interpolation = Literal["bilinear", "nearest"]
Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "constant"]
Keep = Literal["loss", "auroc", "last"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentRecipe:
    """What is done to training images on the device, drawn anew in every epoch.

    `flip`: mirror half of the images: `plain` whatever the labels say, `mapped` with labels of the left and the right
    swapped, `auto` plain where no label names a side, mapped where each has its counterpart, off otherwise. `degrees`:
    largest turn to either side, black outside; `nearest` is torchvision's default, as published. `crop`: share of the
    area, cut from the stored image and resized to its size (bicubic).
    """

    flip: Flip = "off"
    degrees: float = 0.0
    interpolation: Interpolation = "bilinear"
    crop: Crop = "off"

    def __post_init__(self) -> None:
        for name, allowed in (("flip", Flip), ("interpolation", Interpolation), ("crop", Crop)):
            if getattr(self, name) not in get_args(allowed):
                raise ConfigError(f"{name} is one of {', '.join(get_args(allowed))}; got {getattr(self, name)!r}")
        if not 0 <= self.degrees <= 180:
            raise ConfigError(f"degrees of turning lie between 0 and 180; got {self.degrees}")

    @property
    def changes(self) -> bool:
        """Whether anything is done at all."""
        return self.flip != "off" or self.degrees > 0 or self.crop != "off"


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimisation:
    """How steps are taken.

    `head_lr` is the head's rate where it is not that of the network. `warmup`: epochs of linear rise, within all
    epochs. `layer_decay`: factor of the rate from each block to the one below. `clip`: largest norm of the gradient.
    `ema`: decay of a moving average of the weights, which is then what is measured and kept.
    """

    optimizer: Optimizer = "adamw"
    lr: float = 1e-5
    head_lr: float | None = None
    weight_decay: float = 0.0
    momentum: float = 0.9
    layer_decay: float = 1.0
    schedule: Schedule = "cosine"
    warmup: float = 0.0
    clip: float | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        head_lr = self.lr if self.head_lr is None else self.head_lr
        for name, value, holds, must in (
            ("optimizer", self.optimizer, self.optimizer in get_args(Optimizer), "adamw or sgd"),
            ("schedule", self.schedule, self.schedule in get_args(Schedule), "cosine or constant"),
            ("the learning rate", self.lr, math.isfinite(self.lr) and self.lr > 0, "above 0"),
            ("the head's learning rate", self.head_lr, math.isfinite(head_lr) and head_lr > 0, "above 0"),
            ("weight decay", self.weight_decay, self.weight_decay >= 0, "at least 0"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("layer decay", self.layer_decay, 0 < self.layer_decay <= 1, "above 0 and at most 1"),
            ("warmup", self.warmup, self.warmup >= 0, "at least 0 epochs"),
            ("clip", self.clip, self.clip is None or self.clip > 0, "above 0"),
            ("ema", self.ema, self.ema is None or 0 < self.ema < 1, "above 0 and below 1"),
        ):
            if not holds:
                raise ConfigError(f"{name} must be {must}; got {value}")

    def factor(self, step: int, steps: int, per_epoch: int) -> float:
        """Share of the peak rate at a step (from 0) of all `steps`."""
        rise = min(steps, round(self.warmup * per_epoch))
        if step < rise:
            return (step + 1) / rise
        return 1.0 if self.schedule == "constant" else (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningRecipe:
    """A whole run.

    `stop_after`: the epoch behind which it ends, on the schedule of all `epochs`. `batch` counts the images of a step
    over all processes; `micro` those that go through one device at once (None: all of its share). `keep`: what
    validation measures, for the epoch that is kept, or the last one whatever it measures. `patience`: epochs without a
    better one after which it ends. `drop_last`: an epoch ends at the last whole batch. `seed` fixes the order, the
    augmentation, what is dropped, and the head's first weights.
    """

    epochs: int
    batch: int
    stop_after: int | None = None
    micro: int | None = None
    keep: Keep = "loss"
    patience: int | None = None
    class_weight: Literal["balanced"] | None = None
    precision: Precision = "float32"
    drop_last: bool = False
    seed: int = 0
    optimisation: Optimisation = field(default_factory=Optimisation)
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)

    def __post_init__(self) -> None:
        for name, value, holds, must in (
            ("epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("batch", self.batch, self.batch >= 1, "at least 1"),
            ("stop after", self.stop_after, self.stop_after is None or self.stop_after >= 1, "at least 1"),
            ("micro", self.micro, self.micro is None or self.micro >= 1, "at least 1"),
            ("keep", self.keep, self.keep in get_args(Keep), "loss, auroc or last"),
            ("patience", self.patience, self.patience is None or self.patience >= 1, "at least 1"),
            ("class weight", self.class_weight, self.class_weight in (None, "balanced"), "balanced, or none"),
            ("precision", self.precision, self.precision in get_args(Precision), "float32 or bfloat16"),
            ("seed", self.seed, self.seed >= 0, "at least 0"),
        ):
            if not holds:
                raise ConfigError(f"{name} must be {must}; got {value}")
        if self.optimisation.warmup > self.epochs:
            raise ConfigError(
                f"warmup of {self.optimisation.warmup:g} epochs must fit into the {self.epochs} of training; give a "
                "shorter one, or more epochs"
            )

    def as_dict(self) -> dict[str, Any]:
        """All of it, for records."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What of it decides about the result beyond rounding: all but how a batch is cut."""
        return {name: value for name, value in asdict(self).items() if name != "micro"}
