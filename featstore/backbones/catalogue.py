"""The list of backbones: what each one is, where its weights are, what it was trained on; without torch."""

from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

from featstore.backbones import BACKBONES, BackboneSource, canonical_name
from featstore.backbones.architecture import Architecture
from featstore.backbones.family import Release
from featstore.backbones.source import INTERPOLATIONS, NORMS, RANDOM_ENDING, find_family, with_norm
from featstore.errors import ConfigError
from featstore.pretraining import TINY, UNSTATED, find_corpus


def entries() -> Iterator[tuple[str, Architecture, Release | None]]:
    """(name, facts, release) of every named backbone; the release is None where the weights come with the package."""
    for name, place in BACKBONES.items():
        yield name, *_entry(place)


def _entry(place: str) -> tuple[Architecture, Release | None]:
    found: Architecture | Release = resolve_name(place)
    return (found.architecture, found) if isinstance(found, Release) else (found, None)


def _where(name: str, release: Release | None) -> str:
    return release.hub_id if release is not None else "random" if name == "tiny-random" else "embedded"


def list_models() -> list[dict[str, Any]]:
    """Facts of every named backbone, one dict a row."""
    return [
        {
            "model": name,
            "weights": _where(name, release),
            "gated": release is not None and release.gated,
            "licence": _licence(release),
            "parameters": architecture.num_parameters(),
            **architecture.as_dict(),
        }
        for name, architecture, release in entries()
    ]


def _licence(release: Release | None) -> str:
    return "Apache-2.0" if release is None else release.licence or "not stated"


def pretraining_of_name(name: str) -> tuple[str, ...]:
    """What a named backbone was trained on; empty where nobody says, or where nothing was trained."""
    if name == "tiny":
        return TINY
    release = _entry(BACKBONES[name])[1]
    return release.pretraining if release is not None else ()


def known_name(source: BackboneSource) -> str | None:
    """The name in `BACKBONES` of a source that was asked for by it, or by its repository on the hub."""
    if source.listed is not None:
        return source.listed
    repo = source.weights.get("repo", "")
    for name, _, release in entries():
        if release is not None and repo and repo in (release.hub_id, *release.aliases):
            return name
    return None


def pretraining_of(source: BackboneSource) -> list[str] | None:
    """What the weights of a source were trained on, for the spec of a set; None where nobody says.

    A file given for a model's name has that model's training behind it at the least, and may have more. A folder that
    is called like a model says nothing. Of a fine-tuned network it is what the one before it was trained on; the data
    sets of its runs stand in `trained_on`.
    """
    if runs := source.weights.get("trained_on"):
        before: list[str] | None = runs[0]["started_from"]["pretraining"]
        return before
    kind, name = source.weights["kind"], known_name(source)
    if kind not in ("hub", "local", "embedded") or name is None:
        return None
    found = [*pretraining_of_name(name)]
    return [*found, *([UNSTATED] if kind == "local" else [])] if found else None


def explain_model(model: str) -> dict[str, Any]:
    """Everything that a user of one backbone should know, for `featstore models NAME`.

    Raises:
        UnknownNameError: no such model.
        ConfigError: a folder, a repository or a function that has no name here.
    """
    name = canonical_name(_listed_place(model))
    architecture, release = _entry(BACKBONES[name])
    family, native = find_family(architecture.family), architecture.native_size
    repo = _where(name, release)
    trained = pretraining_of_name(name)
    facts: dict[str, Any] = {
        "model": name,
        "aliases": [] if release is None else sorted({*filter(None, (repo, release.meta_name, *release.aliases))}),
        "weights": repo,
        "gated": release is not None and release.gated,
        "licence": _licence(release),
        "feature": "CLS token after the final norm" if release is None else release.feature,
        "cls": {"width": architecture.embed_dim, "from": architecture.summary},
        "patches": {"width": architecture.patch_width, "patch_size": architecture.patch_size},
        "registers": architecture.num_registers,
        "norm": None if not architecture.depth else "final" if architecture.final_norm else "none",
        "norms": [way for way in NORMS if _accepts(architecture, way)],
        "normalisation": {"mean": list(architecture.mean), "std": list(architecture.std)},
        "native_size": native,
        "sizes": [native] if architecture.fixed_size else f"multiples of {architecture.patch_size}",
        "pos_interp": [way for way in INTERPOLATIONS if way in family.interpolations],
        "attention": list(family.attention),
        "layers": architecture.depth,
        "parameters": architecture.num_parameters(),
        "gflops": round(architecture.gflops(native, native), 1),
        "pretraining": [
            {"name": item, "source": corpus.source if (corpus := find_corpus(item)) else ""} for item in trained
        ],
        "architecture": architecture.as_dict(),
        "fetch": f"featstore fetch {name}" if release is not None else None,
        "extract": _extract_line(name, architecture),
    }
    return facts


def _listed_place(model: str) -> str:
    """A listed backbone's name for its hub id after `hf:`, any other name as it is."""
    place = model.removeprefix("hf:")
    for name, _, release in entries():
        if release is not None and place != model and place in (release.hub_id, *release.aliases):
            return name
    if ":" in model:
        raise ConfigError(
            f"{model}: only networks that have a name here are explained (`featstore models` lists them); "
            f"`featstore extract --dataset NAME --model {model} --dry-run` says what this one would do"
        )
    return model


def _accepts(architecture: Architecture, norm: str) -> bool:
    try:
        with_norm(architecture, norm)
    except ConfigError:
        return False
    return True


def _extract_line(name: str, architecture: Architecture) -> str:
    size = architecture.native_size // architecture.patch_size * architecture.patch_size
    if architecture.family.startswith("dinov3"):  # whose positions and training go far beyond 224
        size = 512
    return f"featstore extract --dataset NAME --model {name} --res {size}"


def owners() -> dict[str, str]:
    """Names that sets of a backbone would have, in lower case -> the name in `BACKBONES` of that backbone."""
    found = {name.lower(): name for name in BACKBONES}
    for name, _, release in entries():
        if release is not None:
            for other in (release.hub_id, release.meta_name, *release.aliases):
                found.setdefault(other.rpartition("/")[2].lower(), name)
    found.pop("", None)
    return found


def _check_free(name: str, own: tuple[str, ...], advice: str) -> None:
    """Refuse a backbone's name, or that of its random weights, to anything but those of `own`.

    Raises:
        ConfigError: it is one.
    """
    lower, known = name.lower(), owners()
    owner = known.get(lower)
    random = owner is None
    if random:
        owner = known.get(lower.removesuffix(RANDOM_ENDING))
    if owner is None or name in own or (f"{owner}{RANDOM_ENDING}" if random else owner) in own:
        return
    whose = f"another name of the backbone {owner}"
    if random:
        whose = f"the backbone {owner} with random weights"
    elif owner == lower:
        whose = "a backbone of this package"
    raise ConfigError(
        f"--name {name}: {name} is {whose}, and its sets would look like what this package extracts; {advice}"
    )


def check_import_name(name: str) -> None:
    """Refuse a name for imported features that a backbone's sets have.

    Raises:
        ConfigError: it is one.
    """
    _check_free(name, (), f"choose another name, such as {name}-imported")


def check_set_name(name: str, source: BackboneSource) -> None:
    """Refuse a name that the user chose for a new set where it is that of another backbone, or hides random weights.

    Raises:
        ConfigError: it is.
    """
    own = [source.name]
    known = known_name(source)
    if known is not None:
        own.append(f"{known}{RANDOM_ENDING}" if source.random else known)
    _check_free(name, tuple(own), "choose another name, or leave --name out")


def check_new_name(name: str, spec: dict[str, Any]) -> None:
    """Refuse a new name for a set that is there, by the same rules as for a new one.

    Raises:
        ConfigError: it is that of another backbone.
    """
    facts = spec["weights"]
    own = [_plain(str(facts[key])) for key in ("model", "repo") if key in facts]
    own += [known for item in own if (known := owners().get(item.lower())) is not None]
    if spec["random_weights"]:
        own = [item if item.endswith(RANDOM_ENDING) else f"{item}{RANDOM_ENDING}" for item in own]
    _check_free(name, (*own, str(spec["model"])), "choose another name")


def _plain(model: str) -> str:
    return model.rpartition("/")[2].rpartition(":")[2]
