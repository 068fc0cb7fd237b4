"""Options of the heads that are trained by gradient (`mlp`, `attentive`, `mil`); a field is a flag."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from featstore.errors import ConfigError
from probes.configs import parse_numbers

Scaling = Literal["standardize", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How a head is trained; what is None has the default of its probe, or of the protocol asked for."""

    lr: Annotated[str | None, "peak learning rate(s), comma-separated; of several one is chosen on validation"] = None
    epochs: Annotated[int | None, "passes over the training rows, at most"] = None
    batch: Annotated[int | None, "images or bags a step"] = None
    optimizer: Annotated[Literal["adamw", "sgd"] | None, "default: adamw; sgd has momentum 0.9"] = None
    weight_decay: Annotated[float | None, "as the optimizer's, >= 0"] = None
    schedule: Annotated[Literal["cosine", "constant"] | None, "of the learning rate; default: cosine, to 0"] = None
    warmup: Annotated[int | None, "epochs of linear rise before that; default: 0"] = None
    keep: Annotated[
        Literal["loss", "auroc"] | None, "weights of the epoch, and the rate, with the best validation loss or AUROC"
    ] = None
    patience: Annotated[int | None, "stop after this many epochs without a better one; default: never"] = None
    class_weight: Annotated[
        Literal["none", "balanced"] | None, "balanced: pos_weight of labels, n / (K n_class) of classes; default: none"
    ] = None
    train_seed: Annotated[int, "seed of starting weights, order and dropout"] = 0
    device: Annotated[Literal["cpu", "cuda"] | None, "where; default: a GPU if there is one"] = None

    DEFAULTS: ClassVar[dict[str, Any]] = {
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "schedule": "cosine",
        "warmup": 0,
        "keep": "loss",
        "class_weight": "none",
    }

    def __post_init__(self) -> None:
        if self.lr is not None:
            parse_numbers(self.lr, "--lr")
        least = {"epochs": 1, "batch": 1, "warmup": 0, "patience": 1, "train_seed": 0, "weight_decay": 0}
        for name, low in least.items():
            given = getattr(self, name)
            if given is not None and not given >= low:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {low}, got {given}")
        if self.settled("warmup") >= self.settled("epochs"):
            raise ConfigError(
                f"--warmup {self.settled('warmup')} leaves nothing of --epochs {self.settled('epochs')}; lower it"
            )

    @property
    def defaults(self) -> dict[str, Any]:
        """What stands for an option that was not given."""
        return {"lr": "0.001", "epochs": 50, "batch": 256, **TrainingConfig.DEFAULTS}

    def settled(self, name: str) -> Any:
        """The value of an option, given or by default."""
        given = getattr(self, name)
        return self.defaults.get(name) if given is None else given

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates, ascending."""
        return tuple(sorted(set(parse_numbers(self.settled("lr"), "--lr"))))


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpConfig(TrainingConfig):
    """A head with one hidden layer on vectors.

    Source of `chest` and of the layers: Tayebi Arasteh et al. 2025, arXiv 2510.07191, and its code (the frozen 7B).
    """

    protocol: Annotated[
        Literal["chest"] | None, "as published for the frozen 7B: AdamW at 1e-5, pos_weight, 100 epochs, mean_all"
    ] = None
    scaling: Annotated[
        Scaling | None, "of the features by the training rows: standardize (default), or none (the protocol's)"
    ] = None
    hidden: Annotated[int | None, "width of the hidden layer; default: 512"] = None
    dropout: Annotated[float | None, "share of the hidden layer that is dropped in training; default: 0.3"] = None

    CHEST: ClassVar[dict[str, Any]] = {
        "lr": "1e-5",
        "epochs": 100,
        "batch": 30,
        "optimizer": "adamw",
        "weight_decay": 0.0,
        "schedule": "constant",
        "warmup": 0,
        "keep": "loss",
        "class_weight": "balanced",
        "scaling": "none",
    }

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        _check_width("--hidden", self.hidden)
        _check_share("--dropout", self.dropout)

    @property
    def defaults(self) -> dict[str, Any]:
        layers = {"hidden": 512, "dropout": 0.3}
        if self.protocol == "chest":
            return MlpConfig.CHEST | layers
        own = {"lr": "1e-4,3e-4,1e-3", "epochs": 50, "batch": 256, "scaling": "standardize"}
        return TrainingConfig.DEFAULTS | own | layers


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentiveConfig(TrainingConfig):
    """Attention pooling over patch tokens, then a linear layer."""

    heads: Annotated[int | None, "attention heads, a divisor of the tokens' width; default: 64 columns each"] = None
    queries: Annotated[int, "learned queries, whose outputs are averaged"] = 1

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        _check_width("--heads", self.heads)
        _check_width("--queries", self.queries)

    @property
    def defaults(self) -> dict[str, Any]:
        return TrainingConfig.DEFAULTS | {"lr": "1e-4,3e-4,1e-3", "epochs": 20, "batch": 64}


@dataclass(frozen=True, kw_only=True, slots=True)
class MilConfig(TrainingConfig):
    """Multiple-instance heads: the images of one unit are a bag with one label."""

    pooling: Annotated[
        Literal["abmil", "mean", "max"], "how a bag becomes a vector: gated attention, mean or maximum of instances"
    ] = "abmil"
    project: Annotated[
        int | None, "width of a learned linear projection of instances, 0 for none; default: 512 with abmil, else 0"
    ] = None
    attention: Annotated[int | None, "abmil: width of the gated attention; default: 128"] = None
    dropout: Annotated[float | None, "share of the projected instances' columns dropped in training; default: 0.25"] = (
        None
    )
    scaling: Annotated[Scaling | None, "of the features by the training instances: standardize (default) or none"] = (
        None
    )

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        _check_width("--attention", self.attention)
        _check_share("--dropout", self.dropout)
        if self.project is not None and self.project < 0:
            raise ConfigError(f"--project must be 0 (none) or a width, got {self.project}")
        if self.attention is not None and self.pooling != "abmil":
            raise ConfigError(f"--attention belongs to --pooling abmil, not {self.pooling}")
        if self.dropout is not None and not self.settled("project"):
            raise ConfigError("--dropout acts on projected instances; give --project a width too, or leave it out")

    @property
    def defaults(self) -> dict[str, Any]:
        own = {"lr": "1e-4,3e-4,1e-3", "epochs": 50, "batch": 16, "scaling": "standardize", "attention": 128}
        return TrainingConfig.DEFAULTS | own | {"project": 512 if self.pooling == "abmil" else 0, "dropout": 0.25}


def _check_width(flag: str, given: int | None) -> None:
    if given is not None and given < 1:
        raise ConfigError(f"{flag} must be at least 1, got {given}")


def _check_share(flag: str, given: float | None) -> None:
    if given is not None and not 0 <= given < 1:
        raise ConfigError(f"{flag} must be from 0 to below 1, got {given}")
