"""Backbones by name: what each one is, where its weights are, and how to load it.

`describe` answers the first two without torch or transformers; `BackboneSource.load` does the third. A new model is one
line of `BACKBONES` and its facts in a file of this folder; a network that is not listed comes as `hf:DIR_OR_ID`, or as
`module:function` that returns a `featstore.backbones.tokens.Backbone`.
"""

import difflib
from pathlib import Path
from pkgutil import resolve_name

from featstore.backbones.architecture import Architecture
from featstore.backbones.family import Release
from featstore.backbones.hub import fetch
from featstore.backbones.source import (
    BackboneSource,
    check_same,
    find_family,
    from_files,
    from_seed,
    read_architecture,
)
from featstore.backbones.tiny import FOLDER as TINY_FOLDER
from featstore.backbones.weights import find_files, read_config, read_processor
from featstore.errors import ConfigError, MissingWeightsError, UnknownNameError

__all__ = ["BACKBONES", "BackboneSource", "canonical_name", "describe"]

BACKBONES: dict[str, str] = {
    "dinov2-small": "featstore.backbones.dinov2:SMALL",
    "dinov2-base": "featstore.backbones.dinov2:BASE",
    "dinov2-large": "featstore.backbones.dinov2:LARGE",
    "dinov2-giant": "featstore.backbones.dinov2:GIANT",
    "dinov2-small-reg": "featstore.backbones.dinov2:SMALL_REG",
    "dinov2-base-reg": "featstore.backbones.dinov2:BASE_REG",
    "dinov2-large-reg": "featstore.backbones.dinov2:LARGE_REG",
    "dinov2-giant-reg": "featstore.backbones.dinov2:GIANT_REG",
    "dinov3-small": "featstore.backbones.dinov3:SMALL",
    "dinov3-small-plus": "featstore.backbones.dinov3:SMALL_PLUS",
    "dinov3-base": "featstore.backbones.dinov3:BASE",
    "dinov3-large": "featstore.backbones.dinov3:LARGE",
    "dinov3-huge-plus": "featstore.backbones.dinov3:HUGE_PLUS",
    "dinov3-7b": "featstore.backbones.dinov3:VIT_7B",
    "tiny": "featstore.backbones.tiny:ARCHITECTURE",
    "tiny-random": "featstore.backbones.tiny:ARCHITECTURE",
}


def canonical_name(model: str) -> str:
    """The name in `BACKBONES` of a model given by that name, its hub id or Meta's name.

    Raises:
        UnknownNameError: none of these; the message names the nearest ones.
    """
    if model in BACKBONES:
        return model
    aliases: dict[str, str] = {}
    for name, place in BACKBONES.items():
        release = resolve_name(place)
        if isinstance(release, Release):
            aliases |= {release.hub_id: name, release.meta_name: name}
    if model in aliases:
        return aliases[model]
    near = difflib.get_close_matches(model, [*BACKBONES, *aliases], n=3)
    raise UnknownNameError(
        f"unknown backbone {model!r}; {'did you mean ' + ' or '.join(near) + '? ' if near else ''}"
        f"known: {', '.join(BACKBONES)}; or give hf:DIR_OR_ID or module:function"
    )


def describe(
    model: str,
    *,
    weights: Path | None = None,
    random_weights: int | None = None,
    revision: str | None = None,
    digest_cache: Path | None = None,
) -> BackboneSource:
    """Everything about a backbone but the network itself.

    Args:
        model: a name of `BACKBONES`, a hub id or Meta's name of one, `hf:DIR_OR_ID`, or `module:function`.
        weights: folder in the hub's format or one `.safetensors` file, instead of the hub.
        random_weights: seed of random weights, instead of any files.
        revision: branch, tag or commit on the hub.
        digest_cache: JSON file that remembers digests of large files.

    Raises:
        UnknownNameError: no such model, or a folder with a network of another type.
        ConfigError: options that exclude each other.
        MissingWeightsError: the weights are not on this machine and cannot be had.
        WeightsError: they are not those of the model, or damaged.
    """
    if weights is not None and random_weights is not None:
        raise ConfigError("weights from a file and random weights exclude each other; give one of the two")
    if revision is not None and (weights is not None or random_weights is not None):
        raise ConfigError("a revision is one of the hub's; it does not go with weights from a file or random weights")
    if model.startswith("hf:"):
        if weights is not None:
            raise ConfigError(f"{model!r} names its weights already; leave --weights out or give the model's name")
        return _describe_hf(model.removeprefix("hf:"), random_weights, revision, digest_cache)
    if ":" in model:
        if weights is not None or random_weights is not None or revision is not None:
            raise ConfigError(f"{model!r} brings its own weights; leave weights, random weights and revision out")
        from featstore.backbones.custom import from_function

        return from_function(model)
    return _describe_known(canonical_name(model), weights, random_weights, revision, digest_cache)


def _describe_known(
    name: str, weights: Path | None, random_weights: int | None, revision: str | None, digest_cache: Path | None
) -> BackboneSource:
    entry = resolve_name(BACKBONES[name])
    architecture: Architecture = entry.architecture if isinstance(entry, Release) else entry
    if revision is not None and not isinstance(entry, Release):
        raise ConfigError(f"{name} comes with the package and has no revisions; leave --revision out")
    if name == "tiny-random":
        if weights is not None or random_weights is not None:
            raise ConfigError("tiny-random has the random weights of seed 0; for others give the model tiny")
        random_weights = 0
    if random_weights is not None:
        return from_seed(name, architecture, random_weights)
    facts: dict[str, str]
    if weights is not None:
        found = find_files(weights.expanduser())
        facts, origin = {"kind": "local"}, f"files in {weights}"
    elif isinstance(entry, Release):
        folder = fetch(entry.hub_id, revision, gated=entry.gated)
        found = find_files(folder)
        facts, origin = _hub_facts(entry.hub_id, folder)
    else:
        found = find_files(TINY_FOLDER)
        facts, origin = {"kind": "embedded"}, "embedded in the package, for demonstration only"
    if found.config is not None:
        check_same(name, architecture, found.config)
    return from_files(name, architecture, found, weights=facts, origin=origin, digest_cache=digest_cache)


def _describe_hf(
    place: str, random_weights: int | None, revision: str | None, digest_cache: Path | None
) -> BackboneSource:
    folder = Path(place).expanduser()
    if folder.is_file():
        raise ConfigError(
            f"hf:{place} is a file and does not say what model it is; give the name and --weights {place}"
        )
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(f"hf:{place} is a folder on this machine and has no revisions; leave --revision out")
        name, facts, origin = folder.resolve().name, {"kind": "local"}, f"folder {folder}"
    elif place.startswith(("/", ".", "~")):
        raise MissingWeightsError(f"hf:{place}: there is no such folder on this machine")
    else:
        folder = fetch(place, revision, weights=random_weights is None)
        name = place.rpartition("/")[2]
        facts, origin = _hub_facts(place, folder)
    config = read_config(folder)
    find_family(config.get("model_type"))  # before anything is said about its files
    if random_weights is not None:
        processor = read_processor(folder)
        return from_seed(name, read_architecture(config, processor), random_weights, processor=processor)
    found = find_files(folder)
    architecture = read_architecture(config, found.processor)
    return from_files(name, architecture, found, weights=facts, origin=origin, digest_cache=digest_cache)


def _hub_facts(repo: str, folder: Path) -> tuple[dict[str, str], str]:
    commit = folder.name
    return {"kind": "hub", "repo": repo, "revision": commit}, f"hub {repo} at {commit[:12]}, in {folder}"
