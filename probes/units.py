"""Units of evaluation: images of one volume, study or patient gathered, so that each counts once.

"mean" and "max" pool the scores of a head that was fitted on images; "features" averages the features first.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

from featstore.datasets.manifest import Manifest
from featstore.errors import TaskError
from probes.labels import TargetKind
from probes.taskspec import TaskSpec

PLURALS = {"image": "images", "volume": "volumes", "study": "studies", "patient": "patients"}
CHUNK_BYTES = 1 << 28  # of float64 while features are averaged


@dataclass(frozen=True)
class Units:
    """Rows gathered by unit, in order of each unit's first row.

    `number` is the unit of every row, `first` the first row of every unit, `ids` their names.
    """

    number: Int[np.ndarray, " n"]
    first: Int[np.ndarray, " U"]
    ids: tuple[str, ...]

    @classmethod
    def of(cls, ids: Shaped[np.ndarray, " n"]) -> "Units":
        """Gather rows by the id of their unit."""
        names, first, number = np.unique(ids, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return cls(rank[number], first[order], tuple(str(name) for name in names[order]))

    @property
    def sizes(self) -> Int[np.ndarray, " U"]:
        """Rows of each unit."""
        return np.bincount(self.number, minlength=len(self.first))

    def _runs(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " U"]]:
        """Rows in order of their unit, and where each unit starts."""
        starts = np.cumsum(self.sizes) - self.sizes
        return np.argsort(self.number, kind="stable"), starts

    def pool(self, scores: Float[np.ndarray, "... n L"], how: Literal["mean", "max"]) -> Float[np.ndarray, "... U L"]:
        """Mean (in float64) or maximum of the scores of each unit's rows, column by column."""
        order, starts = self._runs()
        rows = scores[..., order, :]
        if not len(starts):
            return rows.astype(np.float64)
        if how == "max":
            return np.asarray(np.maximum.reduceat(rows, starts, axis=-2), dtype=np.float64)
        totals = np.add.reduceat(rows.astype(np.float64), starts, axis=-2)
        return np.asarray(totals / self.sizes[:, None])

    def mean(self, features: Num[np.ndarray, "n D"]) -> Float[np.ndarray, "U D"]:
        """Mean of each unit's features, summed in float64."""
        order, starts = self._runs()
        result = np.empty((len(starts), features.shape[1]))
        width = max(1, CHUNK_BYTES // (8 * max(1, len(order))))
        for start in range(0, features.shape[1], width):
            part = features[:, start : start + width][order].astype(np.float64)
            result[:, start : start + width] = np.add.reduceat(part, starts, axis=0) / self.sizes[:, None]
        return result

    def labels(
        self, y: Num[np.ndarray, "n ..."], mask: Bool[np.ndarray, "n ..."], kind: TargetKind, unit: str
    ) -> tuple[Num[np.ndarray, "U ..."], Bool[np.ndarray, "U ..."]]:
        """(y, mask) of each unit from its labelled rows; masked where it has none.

        multilabel: positive if any labelled row is.

        Raises:
            TaskError: rows of one unit say different classes, numbers or ranks.
        """
        order, starts = self._runs()
        valid = np.logical_or.reduceat(mask[order], starts, axis=0)
        if kind == "multilabel":
            positive = np.logical_or.reduceat(((y == 1) & mask)[order], starts, axis=0)
            return positive.astype(y.dtype), valid
        above = np.inf if y.dtype.kind == "f" else np.iinfo(np.int64).max
        low = np.minimum.reduceat(np.where(mask, y, above)[order], starts, axis=0)
        high = np.maximum.reduceat(np.where(mask, y, -above)[order], starts, axis=0)
        differ = ((low != high) & valid).reshape(len(starts), -1).any(1)
        if differ.any():
            what = {"multiclass": "classes", "regression": "numbers", "ordinal": "ranks"}[kind]
            raise TaskError(
                f"{int(differ.sum())} of {len(starts)} {PLURALS[unit]} hold images of different {what}, "
                "so they have no label of their own; use --unit image, or a task whose label belongs to the whole"
            )
        return np.where(valid, low, 0).astype(y.dtype), valid


def unit_ids(manifest: Manifest, spec: TaskSpec, used: Bool[np.ndarray, " N"]) -> Shaped[np.ndarray, " N"] | None:
    """Id of the unit of every row ('' where not `used`); None where every image is its own.

    An id that several patients share (as `study1`) counts once for each.

    Raises:
        TaskError: rows without an id; the message says which column it is.
    """
    if spec.unit == "image":
        return None
    column = {"volume": "volume", "study": "study", "patient": "group"}[spec.unit]
    values = manifest.place("volume") if spec.unit == "volume" else manifest.column(column)
    missing = sum(value is None or value == "" for value, keep in zip(values, used) if keep)
    if missing:
        raise TaskError(
            f"unit {spec.unit!r} needs an id of every sample, but {missing} of {int(used.sum())} have none "
            f"in the column {column!r} of data set {manifest.name!r}; "
            f"register it with its {spec.unit} ids, or use --unit image"
        )
    if column == "group":
        return np.array([str(value) if keep else "" for value, keep in zip(values, used)])
    owners: dict[str, set[str | None]] = {}
    groups = manifest.column("group")
    for value, group, keep in zip(values, groups, used):
        if keep:
            owners.setdefault(str(value), set()).add(group)
    return np.array(
        [
            "" if not keep else str(value) if len(owners[str(value)]) == 1 else f"{group}/{value}"
            for value, group, keep in zip(values, groups, used)
        ]
    )
