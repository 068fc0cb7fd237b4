"""Which tensor of a checkpoint is which parameter: the dialect that fits, and what is missing or left over."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from featstore.backbones.family import Dialect, Family, HubKey
from featstore.backbones.tensors import Tensors
from featstore.errors import WeightsError

NAMED_KEYS = 3  # of those that do not fit, in a message


@dataclass(frozen=True, slots=True)
class Match:
    """The place of every live parameter in a checkpoint, the ones that it may lack left out."""

    dialect: Dialect
    keys: Mapping[str, HubKey]


def _any(patterns: Collection[str], name: str) -> bool:
    return any(re.match(pattern, name) for pattern in patterns)


def _try(dialect: Dialect, prefix: str, live: Collection[str], names: Collection[str]) -> tuple[dict[str, HubKey], ...]:
    """(keys that are there, keys that are missing), by live name."""
    there: dict[str, HubKey] = {}
    missing: dict[str, HubKey] = {}
    for name in live:
        key = dialect.key(name)
        key = key._replace(name=prefix + key.name)
        if key.name in names:
            there[name] = key
        elif not _any(dialect.optional, name):
            missing[name] = key
    return there, missing


def _may_stay(dialect: Dialect, prefix: str, name: str) -> bool:
    if name.startswith(prefix):
        return _any(dialect.ignored, name.removeprefix(prefix))
    return _any(dialect.outside, name)


def match(family: Family, live: Collection[str], tensors: Tensors) -> Match:
    """Find the dialect in which a checkpoint speaks.

    Args:
        live: names of the network's parameters and of the buffers that belong to its weights.

    Raises:
        WeightsError: parameters without a tensor, or tensors that belong to no parameter; in words of the dialect that
            comes nearest.
    """
    hub = family.dialects[0]
    if tensors.shapes is None:
        return Match(hub, {name: hub.key(name) for name in live})
    names = tensors.shapes.keys()
    trials = [(dialect, prefix) for dialect in family.dialects for prefix in dialect.prefixes]
    found = [(len(_try(dialect, prefix, live, names)[1]), dialect, prefix) for dialect, prefix in trials]
    _, dialect, prefix = min(found, key=lambda trial: trial[0])  # the first of equally good ones
    there, missing = _try(dialect, prefix, live, names)
    used = {key.name for key in there.values()}
    # A prefix sets a part of a larger model apart; the rest must be of a model that has such a part.
    left = [name for name in names if name not in used and not _may_stay(dialect, prefix, name)]
    problems = []
    if missing:
        problems.append(_count([key.name for key in missing.values()], "missing"))
    if left:
        problems.append(_count(left, "left over"))
    if problems:
        raise WeightsError(f"{tensors.origin} does not fit the model: tensors {'; '.join(problems)}")
    return Match(dialect, there)


def check_shapes(match: Match, shapes: Mapping[str, tuple[int, ...]], tensors: Tensors) -> None:
    """Compare the shapes of live parameters with those of the checkpoint.

    Raises:
        WeightsError: some differ.
    """
    from featstore.backbones.tensors import fitting

    if tensors.shapes is None:
        return
    wrong = []
    for live, key in match.keys.items():
        stored, wanted = tensors.shapes[key.name], shapes[live]
        cut = stored if key.parts == 1 or not stored else (stored[0] // key.parts, *stored[1:])
        if not fitting(cut, wanted):
            wrong.append(key.name)
    if wrong:
        raise WeightsError(f"{tensors.origin} does not fit the model: tensors {_count(wrong, 'of another shape')}")


def _count(keys: Collection[str], what: str) -> str:
    some = sorted(set(keys))
    return f"{len(some)} {what} ({', '.join(some[:NAMED_KEYS])}{', ...' if len(some) > NAMED_KEYS else ''})"
