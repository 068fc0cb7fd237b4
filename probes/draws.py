"""The table of resamples that a task's models share: how often each group (patient) was drawn.

Whoever resamples the same groups with the same seed has the same table, and its digest says so; two results with one
digest are paired resample by resample.
"""

import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt8

from featstore import files
from featstore.errors import ConfigError, CorruptError, TaskError
from featstore.objects import Place


def draw_counts(groups: np.ndarray, *, num_resamples: int = 1000, seed: int = 0) -> UInt8[np.ndarray, "B G"]:
    """How often each group (in sorted order of its id) stands in each resample of all groups with replacement.

    The first resamples of a longer table equal a shorter one of the same seed.

    Raises:
        ConfigError: fewer than one resample.
    """
    if num_resamples < 1:
        raise ConfigError(f"num_resamples must be at least 1, got {num_resamples}")
    num_groups = len(np.unique(groups))
    generator = np.random.default_rng(seed)
    # A byte is enough: a group is drawn about once, and more than 255 times with probability below 1e-500.
    counts = np.zeros((num_resamples, num_groups), np.uint8)
    for row in counts if num_groups else ():
        row[:] = np.bincount(generator.integers(0, num_groups, num_groups), minlength=num_groups)
    return counts


@dataclass(frozen=True)
class Draws:
    """A table of resamples: row b says how often each of `groups` (sorted, unique) stands in resample b."""

    groups: Shaped[np.ndarray, " G"]
    counts: UInt8[np.ndarray, "B G"]
    seed: int

    @classmethod
    def of(cls, groups: Shaped[np.ndarray, " N"], *, num_resamples: int = 1000, seed: int = 0) -> "Draws":
        """Draw from the different values of `groups`; their order and number of rows do not matter.

        Raises:
            ConfigError: fewer than one resample.
        """
        names = np.unique(groups)
        return cls(names, draw_counts(names, num_resamples=num_resamples, seed=seed), seed)

    @property
    def digest(self) -> str:
        """Of the groups and of every count."""
        names = files.digest([str(name) for name in self.groups.tolist()])
        return files.digest([names, files.digest(self.counts.tobytes()), list(self.counts.shape)])

    def columns(
        self, groups: Shaped[np.ndarray, " N"], used: Bool[np.ndarray, " N"] | None = None
    ) -> Int[np.ndarray, " N"]:
        """Column of `counts` of every row; 0 for rows that are not `used`.

        Raises:
            TaskError: the group of a used row was not drawn from.
        """
        used = np.ones(len(groups), dtype=bool) if used is None else used
        columns = np.zeros(len(groups), np.int64)
        found = np.searchsorted(self.groups, groups[used])
        known = found < len(self.groups)
        known[known] = self.groups[found[known]] == groups[used][known]
        if not known.all():
            missing = groups[used][~known]
            raise TaskError(
                f"{len(np.unique(missing))} groups, such as {str(missing[0])!r}, are not in the table of resamples; "
                "make one from the groups of these rows"
            )
        columns[used] = found
        return columns

    def write(self, path: Place) -> None:
        """Keep the table, for tools that cannot draw it again; read it with `Draws.read` or `numpy.load`."""
        sink = io.BytesIO()
        names = np.array([str(name) for name in self.groups.tolist()], dtype=np.str_)
        np.savez_compressed(sink, groups=names, counts=self.counts, seed=self.seed, digest=self.digest)
        files.write_atomic(path, sink.getvalue())

    @classmethod
    def read(cls, path: Place) -> "Draws":
        """A table that was kept; group ids are text.

        Raises:
            CorruptError: the counts or groups do not match the digest beside them.
        """
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as kept:
            table = cls(kept["groups"], kept["counts"], int(kept["seed"]))
            digest = str(kept["digest"])
        if table.digest != digest:
            raise CorruptError(f"{path}: the table of resamples does not match its digest; draw it again")
        return table
