"""Which sets and features are evaluated: the complete ones, and the features asked for or fitting the probe."""

import logging
from typing import Any

from featstore.errors import ConfigError, IncompleteError, TaskError, UnknownNameError
from featstore.request import command_of
from featstore.store.catalog import Entry, Store
from featstore.store.features import FeatureSet
from featstore.store.layout import set_name
from probes.configs import DataConfig, LinearConfig
from probes.trained_config import AttentiveConfig, MlpConfig

DEFAULT_FEATURES = ("cls+mean_patch", "cls")
CANDIDATES = ("cls", "mean_patch", "cls+mean_patch", "last4")  # of --choose-features
TOKEN_MEAN = "mean_all"
PATCHES = "patches"


def complete_sets(store: Store, config: DataConfig) -> list[FeatureSet]:
    """The chosen sets that have every row of the manifest; others are named with the command that completes them.

    Augmented views are never among them.

    Raises:
        TaskError: a view is asked for. UnknownNameError: no such set. IncompleteError: none has every row.
    """
    entries = store.find(config.dataset, config.model)
    views = [entry for entry in entries if entry.is_view]
    if views:  # found under their whole name alone
        raise TaskError(
            f"{views[0].name} holds augmented copies of the images, which heads may be trained on and which are never "
            f"evaluated; name its plain set, --model {set_name(views[0].spec).partition('~')[0]}"
        )
    if not entries:
        model, _, resolution = (config.model or "dinov3-base@512").partition("@")
        line = f"featstore extract --dataset {config.dataset} --model {model}" + (
            f" --res {resolution}" if resolution else ""
        )
        have = ", ".join(entry.name for entry in store.find(config.dataset)) or "none"
        raise UnknownNameError(
            f"no set of {config.dataset!r} matches {config.model or 'any model'!r}; it has {have}; run\n  {line}"
        )
    complete, lines = [], []
    for entry in entries:
        features_set = _open_complete(store, entry, config.manifest)
        if features_set is None:
            lines.append(f"  {command_of(entry.spec, store.open(entry, manifest=config.manifest).arrays)}")
        else:
            complete.append(features_set)
    if lines:
        text = (
            f"{len(lines)} of {len(entries)} sets of {config.dataset!r} lack rows of this manifest; run\n"
            + "\n".join(lines)
        )
        if not complete or config.model:
            raise IncompleteError(text)
        logging.getLogger(__name__).warning(text)
    return complete


def with_token_mean(sets: list[FeatureSet], features: str | None) -> list[FeatureSet]:
    """Of several sets those that have the features asked for: networks that pool have no mean over all tokens.

    They are named and passed over, unless nothing else would be left: then the error says why.
    """
    pooled = [
        item.name
        for item in sets
        if TOKEN_MEAN in feature_names(features or "")
        and item.spec["identity"].get("architecture", {}).get("summary") == "pool"
    ]
    if not pooled or len(pooled) == len(sets):
        return sets
    logging.getLogger(__name__).warning(
        "skipped, no CLS token to take a mean_all with: %s; --features cls+mean_patch has them", ", ".join(pooled)
    )
    return [item for item in sets if item.name not in pooled]


def with_patches(sets: list[FeatureSet], features: str | None, head: Any) -> list[FeatureSet]:
    """Of several sets those with patches, where the head reads them and no features are named; others are passed over.

    They are named with the line that adds patches, unless nothing else would be left: then the error says so.
    """
    if features is not None or not isinstance(head, AttentiveConfig):
        return sets
    lacking = [item for item in sets if PATCHES not in item.arrays]
    if not lacking or len(lacking) == len(sets):
        return sets
    lines = "\n".join(f"  {command_of(item.spec, {*item.arrays, PATCHES})}" for item in lacking)
    logging.getLogger(__name__).warning("skipped, no patches: %d of %d sets; run\n%s", len(lacking), len(sets), lines)
    return [item for item in sets if PATCHES in item.arrays]


def _open_complete(store: Store, entry: Entry, manifest: str | None) -> FeatureSet | None:
    features_set = store.open(entry, manifest=manifest)
    try:
        return None if features_set.pending().any() else features_set
    except IncompleteError:
        return None


def choose_features(features_set: FeatureSet, asked: str | None, head: Any = None) -> list[str]:
    """The features asked for, comma-separated, those that the head or its protocol reads, or the set's defaults."""
    if asked is not None:
        return feature_names(asked)
    if isinstance(head, AttentiveConfig):
        return [PATCHES]
    if isinstance(head, LinearConfig | MlpConfig) and head.protocol is not None:
        from probes.linear_protocols import protocol_features

        return [protocol_features(features_set, head.protocol)]
    return [name for name in DEFAULT_FEATURES if all(part in features_set.arrays for part in name.split("+"))] or [
        "cls"
    ]


def feature_names(asked: str) -> list[str]:
    """`cls,cls+mean_patch` as names, each once."""
    return list(dict.fromkeys(name.strip() for name in asked.split(",") if name.strip()))


def feature_candidates(features_set: FeatureSet, asked: str | None) -> tuple[str, ...]:
    """What `--choose-features` chooses from: the features asked for, or all of `CANDIDATES` that the set has.

    Raises:
        ConfigError: fewer than two.
    """
    if asked is not None:
        names = feature_names(asked)
    else:
        names = [name for name in CANDIDATES if _has(features_set, name)]
    if len(names) < 2:
        raise ConfigError(
            f"--choose-features needs two features or more, {features_set.name} gives {', '.join(names) or 'none'}; "
            f"name them with --features, or extract more of {', '.join(CANDIDATES)}"
        )
    return tuple(names)


def _has(features_set: FeatureSet, features: str) -> bool:
    try:
        return all(part in features_set.arrays for part in features_set.parts(features))
    except (ConfigError, UnknownNameError):
        return False
