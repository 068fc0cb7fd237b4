"""Options of the probes; a field is a flag."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from featstore.errors import ConfigError


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Comma-separated positive numbers.

    Raises:
        ConfigError: anything else, or none.
    """
    try:
        numbers = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) <= 0:
        raise ConfigError(f"{option} takes positive numbers, comma-separated; got {text!r}")
    return numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """What is evaluated: data, labels, features."""

    dataset: Annotated[str, "registered data set"]
    model: Annotated[str | None, "set or sets to evaluate: MODEL, MODEL@RES; default: every set of the data set"] = None
    task: Annotated[str | None, "named task, such as chexpert-5; default: the data set's own"] = None
    labels: Annotated[str, "label columns: one categorical, or several of 0/1/-1/blank"] = ""
    where: Annotated[str, "keep rows by column: source=nih,view=AP|PA"] = ""
    features: Annotated[
        str | None, "cls, mean_patch, cls+mean_patch, mean_all, ...; default: cls+mean_patch and cls"
    ] = None
    manifest: Annotated[str | None, "digest of an older manifest of the data set; default: the current one"] = None
    resamples: Annotated[int, "bootstrap resamples (by patient) for the intervals"] = 1000
    seed: Annotated[int, "seed of the bootstrap"] = 0
    allow_leak: Annotated[bool, "go on although a patient stands in two splits; the record says so"] = False
    results: Annotated[Path | None, "folder of the records; default: STORE/results"] = None

    def __post_init__(self) -> None:
        if self.task and self.labels:
            raise ConfigError("--task and --labels exclude each other; give one")
        if self.resamples < 2:
            raise ConfigError(f"--resamples must be at least 2, got {self.resamples}")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnConfig:
    """k nearest neighbours with the DINO vote."""

    k: Annotated[str | None, "neighbour counts to choose from; default: 10,20,100,200 up to the bank's size"] = None
    temperature: Annotated[float, "sharpness of the vote, > 0"] = 0.07

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"--temperature must be above 0, got {self.temperature}")
        if self.k is not None and any(value != int(value) for value in parse_numbers(self.k, "--k")):
            raise ConfigError(f"--k takes whole numbers, got {self.k!r}")

    @property
    def counts(self) -> tuple[int, ...] | None:
        """The counts asked for, or None for the default."""
        return None if self.k is None else tuple(int(value) for value in parse_numbers(self.k, "--k"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """Logistic regression at scikit-learn's objective."""

    C: Annotated[
        str | None, "inverse strength(s) of the L2 penalty, as in scikit-learn; default: 45 values, 1e-6 to 1e5"
    ] = None
    standardize: Annotated[bool, "scale features by the training rows' mean and deviation"] = True
    class_weight: Annotated[Literal["none", "balanced"], "weight of the classes in the loss"] = "none"
    refit: Annotated[bool, "choose by group-wise 5-fold out-of-fold scores, then fit on train + val"] = False

    def __post_init__(self) -> None:
        if self.C is not None:
            parse_numbers(self.C, "--C")

    @property
    def grid(self) -> tuple[float, ...] | None:
        """The values asked for in ascending order, or None for the default."""
        return None if self.C is None else tuple(sorted(parse_numbers(self.C, "--C")))
