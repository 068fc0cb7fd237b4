"""Runs of one configuration that differ in their seed: named together and checked, or found beside a record."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from featstore.errors import ConfigError, TaskError
from featstore.objects import Place, parse_place
from probes.protocol import seed_of, without_seed
from probes.records import float_or_nan, load_records
from probes.score_tables import ScoreTable

__all__ = ["check_seeds", "common", "names_of", "seed_of", "seed_spread"]


def names_of(text: str) -> list[str]:
    """Names separated by commas, which the path of a file may hold too.

    Raises:
        ConfigError: no name, or one of them twice.
    """
    if "," not in text or parse_place(text).is_file():
        return [text]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"records of several seeds are named once each, as in A1,A2,A3; got {text!r}")
    return names


def check_seeds(side: str, records: Sequence[dict[str, Any] | None]) -> None:
    """Several runs are records of one configuration, each with a seed of its own.

    Raises:
        TaskError: otherwise.
    """
    if len(records) < 2:
        return
    known = [record for record in records if record is not None]
    if len(known) < len(records):
        raise TaskError(f"{side} names several runs, which must be records: of a file of scores no seed is known")
    first = without_seed(known[0])
    for record in known[1:]:
        other = without_seed(record)
        differs = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if differs:
            raise TaskError(
                f"{side} names several runs, which may differ in their seed alone; {record['id']} differs from "
                f"{known[0]['id']} in {', '.join(differs)}"
            )
    seeds = [seed_of(record) for record in known]
    if len(set(seeds)) < len(seeds):
        raise TaskError(
            f"{side} names {len(seeds)} runs of the seeds {', '.join(map(str, seeds))}; give one of each seed"
        )


def common(tables: Sequence[ScoreTable]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(samples, labels) that all tables have, in the order of the first.

    Raises:
        TaskError: none.
    """
    ids = set.intersection(*(set(table.ids) for table in tables))
    labels = set.intersection(*(set(table.labels) for table in tables))
    if not ids or not labels:
        raise TaskError(f"no {'label' if ids else 'sample'} is in all {len(tables)} runs")
    kept = tuple(name for name in tables[0].ids if name in ids)
    return kept, tuple(label for label in tables[0].labels if label in labels)


def seed_spread(record: dict[str, Any], folder: Place, metric: str) -> dict[str, Any] | None:
    """Test values of the records that differ from this one in their seed only; None where there is no other.

    `{"metric", "seeds": {seed: value}, "mean", "sd", "min", "max"}`; the latest record of each seed counts.
    """
    own = without_seed(record)
    alike = load_records(folder, dataset=record["dataset"], probe=record["probe"], fingerprint=record["fingerprint"])
    seeds = {
        str(seed_of(other)): float_or_nan(other["metrics"]["test"]["macro"].get(metric))
        for other in alike
        if without_seed(other) == own
    }
    if len(seeds) < 2:
        return None
    values = np.array(list(seeds.values()))
    return {
        "metric": metric,
        "seeds": seeds,
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)),
        "min": float(values.min()),
        "max": float(values.max()),
    }
