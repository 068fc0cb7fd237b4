"""Everything that says how a record came about, field by field, for telling two of them apart."""

from collections.abc import Sequence
from typing import Any

# What two records are compared for; anything else that differs is another protocol.
COMPARED = ("set", "features", "weights")
SEEDS = ("train_seed", "seed")  # options of heads that draw


def protocol_fields(record: dict[str, Any]) -> dict[str, Any]:
    """Set, data, task, probe and every option that was given."""
    fields = {
        "set": record["set"],
        "features": record["features"],
        "weights": record["weights"],
        "dataset": record["dataset"],
        "test data set": record["test"]["dataset"] if "test" in record else record["dataset"],
        "probe": record["probe"],
        "manifest": record["manifest"],
        "geometry": (record["preprocess"] or {}).get("geometry"),
        "compute dtype": record["compute_dtype"],
        **{f"task {name}": record["task"].get(name) for name in ("name", "digest", "kind", "labels", "unit", "pool")},
        "deviations": record["deviations"],
    }
    # An option that was not given stands for its default, also in records from before there was one.
    given = {name: value for name, value in record["config"]["head"].items() if value is not None}
    return fields | {f"option {name}": value for name, value in sorted(given.items())}


def without_seed(record: dict[str, Any]) -> dict[str, Any]:
    """The same but for the seed of what a head draws."""
    seeds = [f"option {name}" for name in SEEDS]
    return {name: value for name, value in protocol_fields(record).items() if name not in seeds}


def seed_of(record: dict[str, Any]) -> Any:
    """The seed of what a head draws; of a head that draws nothing that of its bootstrap."""
    head = record["config"]["head"]
    return next((head[name] for name in SEEDS if head.get(name) is not None), record["seed"])


def differing(a: dict[str, Any] | None, b: dict[str, Any] | None, files: Sequence[str] = ()) -> dict[str, Any]:
    """What differs between two records, and which of it is protocol; of a file (None) nothing is known."""
    if a is None or b is None:
        said = [f"{name} is a file of scores: how they were made is not known" for name in files]
        return {"differs": {}, "protocol_differs": said}
    own, other = protocol_fields(a), protocol_fields(b)
    differs = {name: [own.get(name), other.get(name)] for name in {**own, **other} if own.get(name) != other.get(name)}
    return {"differs": differs, "protocol_differs": [name for name in differs if name not in COMPARED]}
