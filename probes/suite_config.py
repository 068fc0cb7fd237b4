"""Options of `probes all`; a field is a flag."""

from dataclasses import dataclass
from typing import Annotated, Any

from featstore.errors import ConfigError, UnknownNameError
from probes import PROBES


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteConfig:
    """Which probes one pass makes, and beside which baselines."""

    probes: Annotated[str, "probes to run, comma-separated; each with its own default options"] = "knn,linear,fewshot"
    shots: Annotated[str | None, "few-shot budgets, as in `probes fewshot`; default: 1,2,4,8,16"] = None
    repeats: Annotated[int | None, "few-shot draws of each size; default: 100"] = None
    metadata: Annotated[
        str | None,
        "columns of the metadata baseline: age,sex,view by whatever name the data set has, or any other; '' for none; "
        "default: those of age, sex and view that there are and that are no labels",
    ] = None
    again: Annotated[bool, "compute every record again, also those that are there with equal options"] = False

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("--probes names no probe; leave it out, or give some such as knn,linear")
        known = (*PROBES, "fewshot")
        wrong = [name for name in self.names if name not in known]
        if wrong:
            raise UnknownNameError(f"unknown probe {wrong[0]!r}; --probes takes {', '.join(sorted(known))}")
        for flag, given in (("--shots", self.shots), ("--repeats", self.repeats)):
            if given is not None and "fewshot" not in self.names:
                raise ConfigError(f"{flag} belongs to the probe fewshot, which --probes {self.probes} leaves out")

    @property
    def budgets(self) -> dict[str, Any]:
        """Options of the few-shot probe."""
        return {
            "shots": self.shots if self.shots is not None else "1,2,4,8,16",
            "repeats": self.repeats if self.repeats is not None else 100,
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The probes, in the order asked for."""
        return tuple(dict.fromkeys(name.strip() for name in self.probes.split(",") if name.strip()))

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Columns of the metadata baseline; None for the default."""
        if self.metadata is None:
            return None
        return tuple(dict.fromkeys(name.strip() for name in self.metadata.split(",") if name.strip()))
