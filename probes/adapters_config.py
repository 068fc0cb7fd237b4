"""Methods that change a network beside its head, and their settings; light, for the command line."""

from dataclasses import dataclass
from typing import Annotated, Any

from featstore.errors import ConfigError

METHODS = ("full", "lora", "bitfit", "last-k", "linear-online")
OWNERS = {"r": "lora", "alpha": "lora", "dropout": "lora", "bias": "lora", "targets": "lora", "k": "last-k"}
# As the chest recipe has it, on query and value.
LORA_DEFAULTS: dict[str, Any] = {"r": 16, "alpha": 32.0, "dropout": 0.05, "bias": "none"}
LAST_K = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Settings of the methods; one that belongs to another method than the chosen one is refused."""

    r: Annotated[int | None, "LoRA: rank of the adapters (default 16)"] = None
    alpha: Annotated[float | None, "LoRA: adapters count alpha / r (default 32)"] = None
    dropout: Annotated[float | None, "LoRA: of the adapters' input, in training (default 0.05)"] = None
    bias: Annotated[str | None, "LoRA: biases that train too: none, or lora_only for those of targets"] = None
    targets: Annotated[str | None, "LoRA: q,k,v,qkv,o,fc1,fc2,pointwise (default q,v; ConvNeXt fc1,fc2)"] = None
    k: Annotated[int | None, "last-k: blocks that train, with what stands behind them (default 2)"] = None
    batch_norm: Annotated[str, "running statistics: auto (they move in full, where there are any), frozen or train"] = (
        "auto"
    )
    seed: Annotated[int, "of the adapters' first weights"] = 0

    def __post_init__(self) -> None:
        for name, value, holds, must in (
            ("r", self.r, self.r is None or self.r >= 1, "at least 1"),
            ("alpha", self.alpha, self.alpha is None or self.alpha > 0, "above 0"),
            ("dropout", self.dropout, self.dropout is None or 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("bias", self.bias, self.bias in (None, "none", "lora_only"), "none or lora_only"),
            ("k", self.k, self.k is None or self.k >= 1, "at least 1"),
            ("batch_norm", self.batch_norm, self.batch_norm in ("auto", "frozen", "train"), "auto, frozen or train"),
            ("seed", self.seed, self.seed >= 0, "at least 0"),
        ):
            if not holds:
                raise ConfigError(f"{name.replace('_', ' ')} must be {must}; got {value!r}")
