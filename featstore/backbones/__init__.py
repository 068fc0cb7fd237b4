"""Backbones by name: what each one is, where its weights are, and how to load it.

`describe` answers the first two without torch or transformers; `BackboneSource.load` does the third. A new model is one
line of `BACKBONES` and its facts in a file of this folder; a network that is not listed comes as `hf:DIR_OR_ID`, or as
`module:function` that returns a `featstore.backbones.tokens.Backbone`.
"""

import difflib
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from featstore.backbones.architecture import Architecture
from featstore.backbones.family import Release
from featstore.backbones.hub import fetch, find_cached
from featstore.backbones.source import (
    BackboneSource,
    check_same,
    from_facts,
    from_files,
    from_seed,
    read_architecture,
    with_norm,
)
from featstore.backbones.tiny import FOLDER as TINY_FOLDER
from featstore.backbones.weights import find_files, read_config, read_processor
from featstore.errors import ConfigError, MissingWeightsError, UnknownNameError

__all__ = ["BACKBONES", "BackboneSource", "canonical_name", "describe", "describe_facts"]

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
    "dinov3-large-sat": "featstore.backbones.dinov3:LARGE_SAT",
    "dinov3-7b-sat": "featstore.backbones.dinov3:VIT_7B_SAT",
    "dinov3-convnext-tiny": "featstore.backbones.dinov3_convnext:TINY",
    "dinov3-convnext-small": "featstore.backbones.dinov3_convnext:SMALL",
    "dinov3-convnext-base": "featstore.backbones.dinov3_convnext:BASE",
    "dinov3-convnext-large": "featstore.backbones.dinov3_convnext:LARGE",
    "vit-base": "featstore.backbones.vit:BASE",
    "vit-large": "featstore.backbones.vit:LARGE",
    "vit-large-in21k": "featstore.backbones.vit:LARGE_IN21K",
    "convnext-base": "featstore.backbones.convnext:BASE",
    "resnet50": "featstore.backbones.resnet:RESNET50",
    "resnet152": "featstore.backbones.resnet:RESNET152",
    "vgg19": "featstore.backbones.vgg:VGG19",
    "densenet201": "featstore.backbones.densenet:DENSENET201",
    "mobilenetv2": "featstore.backbones.mobilenet:MOBILENETV2",
    "mae-base": "featstore.backbones.mae:BASE",
    "mae-large": "featstore.backbones.mae:LARGE",
    "msn-large": "featstore.backbones.msn:LARGE",
    "clip-large": "featstore.backbones.clip:LARGE",
    "openclip-huge": "featstore.backbones.clip:HUGE",
    "sam-large": "featstore.backbones.sam:LARGE",
    "rad-dino": "featstore.backbones.dinov2:RAD_DINO",
    "biomedclip": "featstore.backbones.pathology:BIOMEDCLIP",
    "uni": "featstore.backbones.pathology:UNI",
    "conch": "featstore.backbones.pathology:CONCH",
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
            aliases |= dict.fromkeys(filter(None, (release.hub_id, release.meta_name, *release.aliases)), name)
    if model in aliases:
        return aliases[model]
    near = [name for name in BACKBONES if name.startswith(model) and model][:4]
    near = near or difflib.get_close_matches(model, [*BACKBONES, *aliases], n=3)
    raise UnknownNameError(
        f"unknown backbone {model!r}; "
        + (
            f"did you mean {' or '.join(near)}? `featstore models` lists all"
            if near
            else f"known: {', '.join(BACKBONES)}"
        )
        + "; or give hf:DIR_OR_ID, timm:NAME or module:function"
    )


def describe(
    model: str,
    *,
    weights: Path | None = None,
    random_weights: int | None = None,
    revision: str | None = None,
    digest_cache: Path | None = None,
    pos_interp: str | None = None,
    norm: str | None = None,
) -> BackboneSource:
    """Everything about a backbone but the network itself.

    Args:
        model: a name of `BACKBONES`, a hub id or Meta's name of one, `hf:DIR_OR_ID`, or `module:function`.
        weights: folder as the hub has it, or one `.safetensors` file or Meta's `.pth`, instead of the hub.
        random_weights: seed of random weights, instead of any files.
        revision: branch, tag or commit on the hub.
        digest_cache: JSON file that remembers digests of large files.
        pos_interp: how positions are resized, `hf` or `meta`; default: as the checkpoint's own code does it.
        norm: tokens after the `final` norm or before it (`none`); default: as published for the model.

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
            named = "the model's name"
            if (weights.expanduser() / "config.json").is_file():  # of a run of fine-tuning, say
                named = f"--model hf:{weights} in place of both"
            raise ConfigError(f"{model!r} names its weights already; leave --weights out or give {named}")
        return _describe_hf(
            model,
            random_weights=random_weights,
            revision=revision,
            digest_cache=digest_cache,
            pos_interp=pos_interp,
            norm=norm,
        )
    if model.startswith("timm:"):
        from featstore.backbones.timm_models import from_timm

        return from_timm(
            model,
            weights=weights,
            random_weights=random_weights,
            revision=revision,
            digest_cache=digest_cache,
            pos_interp=pos_interp,
            norm=norm,
        )
    if ":" in model:
        if weights is not None or random_weights is not None or revision is not None:
            raise ConfigError(f"{model!r} brings its own weights; leave weights, random weights and revision out")
        if pos_interp is not None or norm is not None:
            raise ConfigError(f"{model!r} is its own network: --pos-interp and --norm are not for it")
        from featstore.backbones.custom import from_function

        return from_function(model)
    name = canonical_name(model)
    source = _describe_known(
        name,
        weights=weights,
        random_weights=random_weights,
        revision=revision,
        digest_cache=digest_cache,
        pos_interp=pos_interp,
        norm=norm,
    )
    return replace(source, listed=name)


def describe_facts(
    model: str,
    *,
    weights: Path | None = None,
    random_weights: int | None = None,
    revision: str | None = None,
    digest_cache: Path | None = None,
    pos_interp: str | None = None,
    norm: str | None = None,
) -> BackboneSource:
    """`describe` for work on another machine: where the weights are not on this one, facts alone, nothing downloaded.

    Then `known` is False. Of a repository that is not listed the hub's cache, or the hub, must have `config.json`.

    Raises:
        FeatstoreError: as `describe`.
    """
    place = _place_on_hub(model) if weights is None and random_weights is None else None
    if place is None or find_cached(place[0], revision, files=place[1]) is not None:
        return describe(
            model,
            weights=weights,
            random_weights=random_weights,
            revision=revision,
            digest_cache=digest_cache,
            pos_interp=pos_interp,
            norm=norm,
        )
    repo, _, listed = place
    if model.startswith("timm:"):
        from featstore.backbones.timm_models import from_timm

        measured = from_timm(model, random_weights=0, pos_interp=pos_interp, norm=norm)
        return from_facts(measured.model, measured.architecture, repo, pos_interp=pos_interp)
    name, processor = repo.rpartition("/")[2], None
    if listed is not None:
        architecture: Architecture = resolve_name(BACKBONES[listed]).architecture
        name = name if model.startswith("hf:") else listed
    else:
        folder = fetch(repo, revision, weights=False)
        processor = read_processor(folder)
        architecture = read_architecture(read_config(folder), processor)
    source = from_facts(name, with_norm(architecture, norm), repo, processor=processor, pos_interp=pos_interp)
    return source if model.startswith("hf:") else replace(source, listed=listed)


def _place_on_hub(model: str) -> tuple[str, tuple[str, ...], str | None] | None:
    """(repository, names of its weight files where they are unusual, name in `BACKBONES`); None: its own weights."""
    plain = model.removeprefix("hf:")
    if model.startswith("timm:"):
        return f"timm/{model.removeprefix('timm:')}", (), None
    given = plain != model and ("/" not in plain or plain.startswith(("/", ".", "~")) or Path(plain).exists())
    if given or ":" in plain:
        return None
    try:
        name = canonical_name(plain)
    except UnknownNameError:
        if plain == model:
            raise
        return plain, (), None
    entry = resolve_name(BACKBONES[name])
    if not isinstance(entry, Release):
        return None
    if plain == model:
        return entry.hub_id, entry.files, name
    return plain, (), None if entry.files else name  # as `hf:` it has the usual names of files, or is not read


def _describe_known(
    name: str,
    *,
    weights: Path | None,
    random_weights: int | None,
    revision: str | None,
    digest_cache: Path | None,
    pos_interp: str | None,
    norm: str | None,
) -> BackboneSource:
    entry = resolve_name(BACKBONES[name])
    architecture: Architecture = with_norm(entry.architecture if isinstance(entry, Release) else entry, norm)
    if revision is not None and not isinstance(entry, Release):
        raise ConfigError(f"{name} comes with the package and has no revisions; leave --revision out")
    if name == "tiny-random":
        if weights is not None or random_weights is not None:
            raise ConfigError("tiny-random has the random weights of seed 0; for others give the model tiny")
        random_weights = 0
    if random_weights is not None:
        return from_seed(name, architecture, random_weights, pos_interp=pos_interp)
    facts: dict[str, str]
    files = entry.files if isinstance(entry, Release) else ()
    if weights is not None:
        found = find_files(weights.expanduser(), files)
        facts, origin = {"kind": "local"}, f"files in {weights}"
    elif isinstance(entry, Release):
        folder = fetch(entry.hub_id, revision, model=name, gated=entry.gated, files=files)
        found = find_files(folder, files)
        facts, origin = _hub_facts(entry.hub_id, folder)
    else:
        found = find_files(TINY_FOLDER)
        facts, origin = {"kind": "embedded"}, "embedded in the package, for demonstration only"
    # A folder of timm's or open_clip's has a config.json of another kind, which says nothing that is asked here.
    if found.config is not None and not _is_foreign(found.config, files):
        check_same(name, architecture, found.config)
    return from_files(
        name, architecture, found, weights=facts, origin=origin, digest_cache=digest_cache, pos_interp=pos_interp
    )


def _is_foreign(config: dict[str, Any], files: tuple[str, ...]) -> bool:
    return "model_type" not in config and (bool(files) or not {"architecture", "model_cfg"}.isdisjoint(config))


def _describe_hf(
    model: str,
    *,
    random_weights: int | None,
    revision: str | None,
    digest_cache: Path | None,
    pos_interp: str | None,
    norm: str | None,
) -> BackboneSource:
    place = model.removeprefix("hf:")
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
    read_architecture(config, None)  # before anything is said about its files
    if random_weights is not None:
        processor = read_processor(folder)
        architecture = with_norm(read_architecture(config, processor), norm)
        return from_seed(name, architecture, random_weights, processor=processor, pos_interp=pos_interp)
    found = find_files(folder)
    architecture = with_norm(read_architecture(config, found.processor), norm)
    return from_files(
        name, architecture, found, weights=facts, origin=origin, digest_cache=digest_cache, pos_interp=pos_interp
    )


def _hub_facts(repo: str, folder: Path) -> tuple[dict[str, str], str]:
    commit = folder.name
    return {"kind": "hub", "repo": repo, "revision": commit}, f"hub {repo} at {commit[:12]}, in {folder}"
