"""Options of `probes fewshot`; a field is a flag."""

from dataclasses import dataclass
from typing import Annotated, Literal

from featstore.errors import ConfigError
from probes.configs import DataConfig, parse_numbers

Head = Literal["logistic", "ncm", "ridge", "knn"]
Scaling = Literal["standardize", "none", "unit", "centred"]
Sampling = Literal["random", "first", "systematic"]
Select = Literal["fixed", "inner", "val"]
DEFAULT_SCALING: dict[str, Scaling] = {"logistic": "standardize", "ridge": "standardize", "ncm": "none", "knn": "unit"}


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotData(DataConfig):
    """What few-shot curves are drawn of."""

    seed: Annotated[int, "seed of the table of shots"] = 0
    allow_leak: Annotated[bool, "go on although a patient or an image stands in two splits; the record says so"] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotConfig:
    """How many labels a head sees, how they are drawn, and which head it is."""

    shots: Annotated[str, "shots: of each label n positives and n negatives, of each class n; '' for none"] = (
        "1,2,4,8,16"
    )
    percent: Annotated[str, "also this share of the training patients or samples, with all their labels: 1,10,100"] = ""
    repeats: Annotated[
        int | None, "draws of each size, all solved together; default: 100, of a published sampling 1"
    ] = None
    head: Annotated[Head, "logistic, ncm (nearest class mean), ridge, knn"] = "logistic"
    by: Annotated[
        Literal["patient", "sample"], "what a shot is: a sample, or a patient with all its samples of that class"
    ] = "sample"
    sampling: Annotated[
        Sampling, "random; or as published, without repeats: first patients of each class, or systematic (all classes)"
    ] = "random"
    select: Annotated[
        Select, "fixed strength; inner folds of the shots over the grid; val: by validation, recorded as label budget"
    ] = "fixed"
    C: Annotated[str | None, "logistic: inverse strength (default 1), or the grid of inner and val (45 values)"] = None
    alpha: Annotated[str | None, "ridge: strength (default 1), or the grid of inner and val (41 values)"] = None
    scaling: Annotated[
        Scaling | None,
        "standardize (by all training features, no labels), none, unit (L2), centred (train mean off, then L2); "
        "default: standardize for logistic and ridge, none for ncm, unit for knn",
    ] = None
    k: Annotated[int | None, "knn: neighbours that vote; default: all shots"] = None
    temperature: Annotated[float | None, "knn: sharpness of the vote (default 0.07)"] = None

    def __post_init__(self) -> None:
        counts = parse_numbers(self.shots, "--shots") if self.shots else ()
        if any(value != int(value) for value in counts):
            raise ConfigError(f"--shots takes whole numbers, got {self.shots!r}")
        if any(value > 100 for value in self.percents):
            raise ConfigError(f"--percent takes numbers up to 100, got {self.percent!r}")
        if not counts and not self.percents:
            raise ConfigError("--shots and --percent are both empty; give one")
        if self.repeats is None:  # a record says what was done
            object.__setattr__(self, "repeats", 100 if self.sampling == "random" else 1)
        if self.num_repeats < 1:
            raise ConfigError(f"--repeats must be at least 1, got {self.repeats}")
        self._check_head()
        if self.sampling != "random":
            if self.percents:
                raise ConfigError(f"--percent is drawn at random; leave --sampling {self.sampling} to --shots")
            if self.by != ("patient" if self.sampling == "first" else "sample"):
                unit = "patients, --by patient" if self.sampling == "first" else "samples, --by sample"
                raise ConfigError(f"--sampling {self.sampling} takes {unit}")
            if self.num_repeats > 1:
                raise ConfigError(
                    f"--sampling {self.sampling} draws without chance, once; leave --repeats {self.repeats} out"
                )

    def _check_head(self) -> None:
        for flag, value, head in (
            ("--C", self.C, "logistic"),
            ("--alpha", self.alpha, "ridge"),
            ("--k", self.k, "knn"),
            ("--temperature", self.temperature, "knn"),
        ):
            if value is not None and self.head != head:
                raise ConfigError(f"{flag} belongs to --head {head}, not {self.head}")
        if self.select != "fixed" and self.head not in ("logistic", "ridge"):
            raise ConfigError(f"--select {self.select} has nothing to choose for --head {self.head}; leave it out")
        values = [parse_numbers(text, flag) for text, flag in ((self.C, "--C"), (self.alpha, "--alpha")) if text]
        if self.select == "fixed" and any(len(item) > 1 for item in values):
            raise ConfigError("several strengths need --select inner or --select val; give one value")
        if self.k is not None and self.k < 1:
            raise ConfigError(f"--k must be at least 1, got {self.k}")
        if self.temperature is not None and self.temperature <= 0:
            raise ConfigError(f"--temperature must be above 0, got {self.temperature}")

    @property
    def counts(self) -> tuple[int, ...]:
        """Shots asked for, ascending."""
        return tuple(sorted({int(value) for value in parse_numbers(self.shots, "--shots")})) if self.shots else ()

    @property
    def percents(self) -> tuple[float, ...]:
        """Percentages asked for, ascending."""
        return tuple(sorted(set(parse_numbers(self.percent, "--percent")))) if self.percent else ()

    @property
    def num_repeats(self) -> int:
        """Draws of each size; one where nothing is drawn by chance."""
        assert self.repeats is not None  # filled in by __post_init__
        return self.repeats

    @property
    def space(self) -> Scaling:
        """The scaling of the features."""
        return self.scaling or DEFAULT_SCALING[self.head]

    @property
    def strengths(self) -> tuple[float, ...] | None:
        """Strengths asked for in ascending order; None for the default."""
        text, flag = (self.C, "--C") if self.head == "logistic" else (self.alpha, "--alpha")
        return None if text is None else tuple(sorted(set(parse_numbers(text, flag))))
