"""Ways to fine-tune by name, as data: the fair default and published recipes, and what of a request departs from them.

Sources: Tayebi Arasteh et al. 2025, arXiv 2510.07191, and its code (chest); Baharoon et al. 2023, arXiv 2312.02366,
and its code (radiology). What they leave open, or do otherwise than it can be done here, stands in `gaps`.
"""

from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

from featstore.errors import ConfigError
from probes.adapters_config import LAST_K, LORA_DEFAULTS, METHODS, OWNERS, AdapterConfig
from probes.configs import parse_numbers
from probes.finetune_config import AugmentConfig, MethodConfig, StepsConfig, TrialsConfig, flag_of
from probes.tuning_recipe import AugmentRecipe, Optimisation, TuningRecipe

# Three rates for each method, around what is usual for it.
FAIR_RATES = {
    "full": "1e-5,3e-5,1e-4",
    "last-k": "1e-5,3e-5,1e-4",
    "lora": "1e-4,3e-4,1e-3",
    "bitfit": "1e-4,3e-4,1e-3",
    "linear-online": "1e-4,1e-3,1e-2",
}
RATES = ("lr", "head_lr")
NO_LIMIT = ("patience", "clip", "ema")  # 0 stands for none
PUBLISHED_SEEDS = "one run is trained: published are single runs, and their seeds are not stated"


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One way to fine-tune. `values` are options by name; what is absent there is that of `PLAIN`.

    `images` is the preset of `featstore extract --published` that it was published on. `token_mean`: the head reads the
    mean over all tokens where the network has a CLS token. `is_published`: it stands in a paper.
    """

    name: str
    title: str
    values: dict[str, Any]
    method: str | None = None
    images: str | None = None
    res: str | None = None
    token_mean: bool = False
    features: str = "cls"
    is_published: bool = True
    gaps: tuple[str, ...] = ()


PLAIN: dict[str, Any] = {
    "head_lr": None,
    "optimizer": "adamw",
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup": 0.0,
    "keep": "loss",
    "patience": 0,
    "class_weight": "none",
    "flip": "off",
    "degrees": 0.0,
    "interpolation": "bilinear",
    "crop": "off",
    "layer_decay": 1.0,
    "clip": 0.0,
    "ema": 0.0,
    "drop_last": False,
    "start": "random",
    "refit": False,
    "seeds": 1,
    "batch_norm": "auto",
    "drop_path": 0.0,
    "stretch_positions": False,
}
_CHEST: dict[str, Any] = {
    "lr": "1e-5",
    "epochs": 100,
    "batch": 30,
    "class_weight": "balanced",
    "flip": "plain",
    "degrees": 7.0,
    "interpolation": "nearest",
    "drop_last": True,
}
_RADIOLOGY: dict[str, Any] = {
    "lr": "1e-5",
    "head_lr": "1e-3,5e-3,1e-2,5e-2",
    "epochs": 10,
    "batch": 128,
    "optimizer": "sgd",
    "schedule": "cosine",
    "keep": "auroc",
    "flip": "plain",
    "crop": "0.75-1",
    "refit": True,
}
_CHEST_GAPS = (
    "the head's first weights are N(0, 0.01^2); published: uniform within 1 / sqrt(D), torch's default",
    PUBLISHED_SEEDS,
)
_RADIOLOGY_GAPS = (
    "each learning rate of the head is trained on a network of its own; published: all heads at once on one network, "
    "which the sum of their losses trains",
    "the head reads one choice of features; published: heads on the last 1 or 4 blocks, with and without the mean "
    "patch, are among those that validation chooses from",
    "validation chooses an epoch too; published: a setting",
    "a column of two classes has two logits and cross-entropy; published: one, with binary cross-entropy",
    PUBLISHED_SEEDS,
)

PRESETS: dict[str, Preset] = {
    "fair": Preset(
        name="fair",
        title="equal for every method: three rates chosen on validation, three seeds, head from the linear probe",
        is_published=False,
        features="cls+mean_patch",
        values={
            "epochs": 20,
            "batch": 32,
            "weight_decay": 0.01,
            "schedule": "cosine",
            "warmup": 1.0,
            "patience": 5,
            "flip": "auto",
            "degrees": 7.0,
            "clip": 1.0,
            "start": "linear",
            "seeds": 3,
        },
    ),
    "chest": Preset(
        name="chest",
        title="DINOv3 on chest radiographs: AdamW 1e-5, pos_weight, mirrored and turned, lowest validation loss of 100",
        method="full",
        images="dinov3-cxr",
        token_mean=True,
        values=_CHEST,
        gaps=_CHEST_GAPS,
    ),
    "lora-chest": Preset(
        name="lora-chest",
        title="the same with LoRA on query and value: r 16, alpha 32, dropout 0.05, AdamW 1e-4, batch 16, 512 pixels",
        method="lora",
        images="dinov3-cxr",
        res="512",
        token_mean=True,
        values={**_CHEST, "lr": "1e-4", "batch": 16, **LORA_DEFAULTS},
        gaps=_CHEST_GAPS,
    ),
    "radiology": Preset(
        name="radiology",
        title="DINOv2 on radiology: SGD 1e-5, four rates of the head, 10 epochs, trained again on train + val",
        method="full",
        images="dinov2-radiology",
        values=_RADIOLOGY,
        gaps=_RADIOLOGY_GAPS,
    ),
    "lora-radiology": Preset(
        name="lora-radiology",
        title="the same with LoRA on qkv, fc1, fc2 and their biases: r 48, alpha 16, dropout 0.1",
        method="lora",
        images="dinov2-radiology",
        values={
            **_RADIOLOGY,
            "r": 48,
            "alpha": 16.0,
            "dropout": 0.1,
            "bias": "lora_only",
            "targets": "qkv,fc1,fc2",
        },
        gaps=_RADIOLOGY_GAPS,
    ),
    "bitfit-radiology": Preset(
        name="bitfit-radiology",
        title="the same with biases alone",
        method="bitfit",
        images="dinov2-radiology",
        values=_RADIOLOGY,
        gaps=_RADIOLOGY_GAPS,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A request with everything decided but what depends on the network and the task.

    `values` are the options of the method, of steps, augmentation and trials, each with its value; `deviations` say
    what is not the preset's, and of a published one what never is here.
    """

    preset: Preset
    method: str
    values: dict[str, Any]
    train_seed: int
    precision: str
    deviations: tuple[str, ...] = field(default=())

    @property
    def rates(self) -> list[tuple[float, float | None]]:
        """(rate of the network, rate of the head, None where it is the same), each combination once."""
        lrs = _rates(self.values["lr"])
        heads = _rates(self.values["head_lr"]) if self.values["head_lr"] is not None else (None,)
        if self.method == "linear-online":  # nothing else trains
            return [(rate, None) for rate in (lrs if heads == (None,) else heads) if rate is not None]
        return list(product(lrs, heads))

    @property
    def seeds(self) -> range:
        """Seeds of the repetitions."""
        return range(self.train_seed, self.train_seed + int(self.values["seeds"]))

    def recipe(
        self, rate: tuple[float, float | None], seed: int, *, micro: int | None = None, stop_after: int | None = None
    ) -> TuningRecipe:
        """How one run is trained.

        Raises:
            ConfigError: values that cannot be.
        """
        chosen = self.values
        none = {name: chosen[name] or None for name in NO_LIMIT}
        how = Optimisation(
            optimizer=chosen["optimizer"],
            lr=rate[0],
            head_lr=rate[1],
            weight_decay=chosen["weight_decay"],
            layer_decay=chosen["layer_decay"],
            schedule=chosen["schedule"],
            warmup=chosen["warmup"],
            clip=none["clip"],
            ema=none["ema"],
        )
        return TuningRecipe(
            epochs=chosen["epochs"],
            batch=chosen["batch"],
            micro=micro,
            stop_after=stop_after,
            keep=chosen["keep"],
            patience=none["patience"],
            class_weight="balanced" if chosen["class_weight"] == "balanced" else None,
            precision=self.precision,  # type: ignore[arg-type]
            drop_last=chosen["drop_last"],
            seed=seed,
            optimisation=how,
            augment=self.augment,
        )

    @property
    def augment(self) -> AugmentRecipe:
        """What is done to training images."""
        return AugmentRecipe(**{item.name: self.values[item.name] for item in fields(AugmentConfig)})

    def adapter(self, seed: int) -> AdapterConfig:
        """The settings of the method."""
        given = {name: self.values.get(name) for name in OWNERS}
        return AdapterConfig(**given, batch_norm=self.values["batch_norm"], seed=seed)

    def options(self, seed: int) -> dict[str, Any]:
        """Everything that a record states of how it was trained, flat; `train_seed` is that of this run."""
        return {
            "preset": self.preset.name,
            "method": self.method,
            **{name: value for name, value in self.values.items() if value is not None},
            "compute_dtype": self.precision,
            "train_seed": seed,
        }


def _rates(text: str) -> tuple[float, ...]:
    return tuple(sorted(set(parse_numbers(text, "--lr"))))


def settle(method: MethodConfig, steps: StepsConfig, augment: AugmentConfig, trials: TrialsConfig) -> Settled:
    """The preset with what flags change in it, and a sentence for each change.

    Raises:
        ConfigError: no method, or a setting of another one.
    """
    preset = PRESETS[steps.preset]
    what = method.method or preset.method
    if what is None:
        raise ConfigError(f"--method says what of the network trains beside the head: {', '.join(METHODS)}")
    own = {name: value for name, value in preset.values.items() if OWNERS.get(name, what) == what}
    values: dict[str, Any] = {**PLAIN, **_defaults_of(what), **own}
    departures = []
    if preset.method is not None and what != preset.method:
        departures.append(f"--method {what}; {preset.name} has {preset.method}")
    for config in (method, steps, augment, trials):
        for item in fields(config):
            given = getattr(config, item.name)
            if item.name in ("method", "preset", "train_seed", "compute_dtype") or given is None:
                continue
            if OWNERS.get(item.name, what) != what:
                raise ConfigError(
                    f"{flag_of(item.name)} is a setting of {OWNERS[item.name]}, and the method is {what}; leave it out"
                )
            if not _same(item.name, given, values.get(item.name)):
                departures.append(
                    f"{flag_of(item.name)} {_said(given)}; {preset.name} has {_said(values.get(item.name))}"
                )
            values[item.name] = given
    _refuse_idle(what, values, steps, augment, trials)
    if steps.warmup is None:  # the preset's own gives way to fewer epochs; one that was asked for must fit
        values["warmup"] = min(values["warmup"], values["epochs"])
    if values["keep"] == "last":
        if steps.patience:
            raise ConfigError("--keep last trains to the last epoch, and --patience ends before; leave one of them out")
        values["patience"] = 0
    found = Settled(
        preset=preset,
        method=what,
        values=values,
        train_seed=trials.train_seed,
        precision=trials.compute_dtype,
        deviations=(*departures, *preset.gaps),
    )
    found.recipe(found.rates[0], 0)  # whatever cannot be is said before anything is read
    found.adapter(0)
    return found


def _refuse_idle(
    method: str, values: dict[str, Any], steps: StepsConfig, augment: AugmentConfig, trials: TrialsConfig
) -> None:
    """Refuse what was asked for and would change nothing."""
    if method == "linear-online":
        if steps.lr is not None and steps.head_lr is not None:
            raise ConfigError("linear-online trains the head alone, at one rate: give --lr or --head-lr, not both")
        if trials.layer_decay is not None:
            raise ConfigError("--layer-decay is of blocks that train, and linear-online trains none; leave it out")
    if augment.interpolation is not None and not values["degrees"]:
        raise ConfigError("--interpolation is of turning, and no image is turned; give --degrees, or leave it out")


def _defaults_of(method: str) -> dict[str, Any]:
    found: dict[str, Any] = {"lr": FAIR_RATES[method]}
    if method == "lora":
        found |= LORA_DEFAULTS
    return found | ({"k": LAST_K} if method == "last-k" else {})


def _same(name: str, given: Any, value: Any) -> bool:
    if name in RATES:
        return value is not None and _rates(given) == _rates(value)
    return bool(given == value)


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
