"""A task as data: which columns are labels, what their values mean, which rows train and test, per what unit."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from probes.policies import Policy

Kind = Literal["auto", "multilabel", "multiclass", "regression", "ordinal"]
Unit = Literal["image", "volume", "study", "patient"]
Pool = Literal["mean", "max", "features"]
Unlabelled = Literal["blank", "mask"]
PLAIN = Policy()  # uncertain and blank are masked


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """One fold of a cross-validation over all rows of a task, in place of its splits; see `probes.folds`.

    Fold `number` (from 0) of `of` is the test split. `column` names the folds, or `seed` deals them. `val` is the share
    of all groups that selects; without it the next fold does. The others train.
    """

    number: int
    of: int
    seed: int = 0
    column: str = ""
    val: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """Label noise of training rows: a positive flips with probability `ratio`, a negative with a quarter of it."""

    ratio: float
    seed: int = 42


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """A task by name; independent of any store.

    `labels` are columns of the manifest, or names that `merge` makes of several (1 where any of them is 1). `kind`
    "auto": one column with other values than 1, 0, -1 is multiclass, all else multilabel. `classes` are the values of
    a multiclass or ordinal column in order; rows with other values are masked. `unlabelled` "mask" takes a row that is
    blank in all label columns of the data set for one that nobody labelled, whatever a policy makes of a blank;
    "blank" reads its blanks as those of any other. `names` maps labels to the words that data sets share, for a test
    on another data set; other labels have the word of `probes.words`. `where` keeps rows whose column has one of the
    values; `without` leaves out rows by id. `split_column` is the column with train, val and test. `selection` says
    where validation rows come from: the official split, or a seeded share of the training groups (then an official
    validation split may be the test split). Scores of one `unit` are pooled (`mean`, `max`) before they are scored;
    "features" averages the features of its images first, so that a head sees units. `source` is the paper or release;
    `deviations` say what differs from it. `fold` and `noise` are asked for by options, never by a named task.
    """

    name: str
    labels: tuple[str, ...]
    train_policy: Policy = PLAIN
    eval_policy: Policy = PLAIN
    where: tuple[tuple[str, tuple[str, ...]], ...] = ()
    selection: Literal["official", "carve"] = "official"
    seed: int = 0
    kind: Kind = "auto"
    classes: tuple[str, ...] = ()
    merge: tuple[tuple[str, tuple[str, ...]], ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    without: tuple[str, ...] = ()
    split_column: str = "split"
    unit: Unit = "image"
    pool: Pool = "mean"
    source: str = ""
    deviations: tuple[str, ...] = ()
    unlabelled: Unlabelled = "blank"
    fold: Fold | None = None
    noise: Noise | None = None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; what came later is stated where it is not the default, so that old digests hold."""
        first = ("name", "labels", "train_policy", "eval_policy", "where", "selection", "seed")
        values = asdict(self) | {"train_policy": self.train_policy.as_dict(), "eval_policy": self.eval_policy.as_dict()}
        return {
            item.name: values[item.name]
            for item in fields(self)
            if item.name in first or getattr(self, item.name) != item.default
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "TaskSpec":
        """What `as_dict` gave, also after a turn through JSON."""
        found = {name: _tuples(value) for name, value in values.items()}
        for name, kind in (("train_policy", Policy), ("eval_policy", Policy), ("fold", Fold), ("noise", Noise)):
            if isinstance(found.get(name), dict):
                found[name] = kind(**{key: _tuples(value) for key, value in found[name].items()})
        return TaskSpec(**found)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
