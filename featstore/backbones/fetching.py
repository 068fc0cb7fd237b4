"""`fetch`: weights downloaded ahead for machines without a network, checked against the hub's sizes and digests."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from featstore.backbones import BACKBONES, canonical_name, describe, hub
from featstore.backbones.digests import blob_digest, sha256
from featstore.backbones.family import Release
from featstore.backbones.reachable import PATIENT_SECONDS, is_reachable
from featstore.errors import ConfigError, MissingWeightsError, WeightsError


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is to be fetched: `model` as `extract --model` takes it, `repo` on the hub, `files` as `Release.files`."""

    model: str
    repo: str
    gated: bool = False
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """What is there now: the snapshot's folder, its commit, and size in bytes and SHA-256 of each file.

    The SHA-256 is None for small files, of which the hub keeps none. `checked` says that sizes and digests are those
    that the hub states; without a network they are those that the cache states.
    """

    target: Target
    commit: str
    folder: Path
    cache: Path
    files: dict[str, tuple[int, str | None]]
    checked: bool

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(size for size, _ in self.files.values())

    @property
    def shared_line(self) -> str:
        """The command for a machine that sees this cache."""
        return (
            f"HF_HUB_CACHE={self.cache} HF_HUB_OFFLINE=1 featstore extract --model {self.target.model} "
            f"--revision {self.commit}"
        )

    @property
    def copied_lines(self) -> tuple[str, str]:
        """The command that copies the folder, links followed and times kept, and the one for the other machine."""
        run = f"--model {self.target.model} --weights DIR"
        if self.target.model.startswith("hf:"):
            run = "--model hf:DIR"
        return f"rsync -aL {self.folder}/ HOST:DIR/", f"HF_HUB_OFFLINE=1 featstore extract {run}"


def find_target(model: str) -> Target:
    """What to fetch for a name of `BACKBONES`, a hub id or Meta's name of one, `hf:OWNER/NAME` or `timm:NAME.TAG`.

    Raises:
        ConfigError: the model has no weights on the hub.
        UnknownNameError: no such model.
    """
    if model.startswith("hf:"):
        place = model.removeprefix("hf:")
        if Path(place).expanduser().exists() or place.startswith(("/", ".", "~")):
            raise ConfigError(f"{model!r} is a folder on this machine, not a hub id; there is nothing to fetch")
        for name, target in BACKBONES.items():
            release = _release(target)
            if release is not None and release.hub_id == place:
                return Target(model=name, repo=place, gated=release.gated, files=release.files)
        return Target(model=model, repo=place)
    if model.startswith("timm:"):
        name = model.removeprefix("timm:")
        if "." not in name:  # timm itself would choose one
            raise ConfigError(f"{model!r}: say which weights, NAME.TAG, such as timm:vit_base_patch16_224.augreg_in21k")
        return Target(model=model, repo=f"timm/{name}")
    if ":" in model:
        raise ConfigError(f"{model!r} brings its own weights; fetch takes a model's name or hf:OWNER/NAME")
    name = canonical_name(model)
    release = _release(BACKBONES[name])
    if release is None or not release.hub_id:
        raise ConfigError(f"{name} has no weights on the hub: there is nothing to fetch")
    return Target(model=name, repo=release.hub_id, gated=release.gated, files=release.files)


def _release(place: str) -> Release | None:
    try:
        entry = resolve_name(place)
    except (ImportError, AttributeError):  # a family that is not installed here
        return None
    return entry if isinstance(entry, Release) else None


def fetch_model(
    model: str,
    revision: str | None = None,
    *,
    digest_cache: Path | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Fetched:
    """Download what `model` needs into the hub's cache, or what of it is missing there, and check every byte.

    Without a network, what the cache has is checked. `advance(done, total)` is told of the bytes hashed.

    Raises:
        ConfigError, UnknownNameError: see `find_target`.
        MissingWeightsError: not to be had, with the steps that help.
        WeightsError: the files are damaged, or not those of the model.
    """
    from huggingface_hub import constants

    target = find_target(model)
    cache = Path(constants.HF_HUB_CACHE)
    if not hub.HUB_ID.fullmatch(target.repo):
        raise ConfigError(f"{target.repo!r} is no hub id of the form OWNER/NAME")
    online = not constants.HF_HUB_OFFLINE and is_reachable(constants.ENDPOINT, PATIENT_SECONDS)
    if online:
        commit, listed = _listing(target, revision)
        _check_room(target, cache, commit, listed)
        folder = hub.download(_asked(target, revision), list(listed))
        if folder.name != commit:  # the branch moved meanwhile
            return fetch_model(model, revision, digest_cache=digest_cache, advance=advance)
    else:
        folder = hub.fetch(
            target.repo, revision, model=target.model, gated=target.gated, files=target.files, fetching=True
        )
        listed = _cached(folder, target.files)
    _check_bytes(folder, listed, advance)
    if not model.startswith("timm:"):  # which needs timm, and a machine that only fetches may lack it
        describe(target.model, revision=folder.name, digest_cache=digest_cache)  # is it the model that it should be?
    sizes = {name: ((folder / name).stat().st_size, digest) for name, (_, digest) in listed.items()}
    return Fetched(target=target, commit=folder.name, folder=folder, cache=cache, files=sizes, checked=online)


def _asked(target: Target, revision: str | None) -> hub.Asked:
    return hub.Asked(repo=target.repo, model=target.model, revision=revision, gated=target.gated, fetching=True)


def _listing(target: Target, revision: str | None) -> tuple[str, dict[str, tuple[int | None, str | None]]]:
    """(commit, size and SHA-256 by name of the files to fetch) as the hub states them."""
    from huggingface_hub import HfApi

    with hub.explained(_asked(target, revision)):
        info: Any = HfApi().model_info(target.repo, revision=revision, files_metadata=True)
    every = {item.rfilename: (item.size, item.lfs.sha256 if item.lfs is not None else None) for item in info.siblings}
    return str(info.sha), {name: every[name] for name in choose_files(list(every), target.files)}


def choose_files(names: list[str], files: tuple[str, ...]) -> list[str]:
    """Of a repository's files those that a model needs: its configuration and one form of its weights.

    Raises:
        MissingWeightsError: there is no such weight file.
    """
    if not files:
        files = (
            _whole_or_shards(names, "model", ".safetensors")
            or tuple(name for name in names if name.endswith(".safetensors") and "/" not in name)
            or _whole_or_shards(names, "pytorch_model", ".bin")
        )
    absent = [name for name in files if name not in names]
    if absent or not files:
        raise MissingWeightsError(
            f"the hub's repository has no {', '.join(absent) or '.safetensors file and no pytorch_model.bin'}, it has "
            f"{', '.join(name for name in names if not name.endswith('.json'))}; give another --revision, or convert "
            "the weights and give their folder: --weights DIR"
        )
    return [name for name in names if name in files or (name.endswith(".json") and "/" not in name)]


def _whole_or_shards(names: list[str], stem: str, suffix: str) -> tuple[str, ...]:
    """One file, or the shards that an index names, of one form of weights; empty where the repository has neither."""
    if f"{stem}{suffix}" in names:
        return (f"{stem}{suffix}",)
    if f"{stem}{suffix}.index.json" not in names:
        return ()
    return tuple(name for name in names if fnmatch(name, f"{stem}-*-of-*{suffix}") and "/" not in name)


def _cached(folder: Path, files: tuple[str, ...]) -> dict[str, tuple[int | None, str | None]]:
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {name: (None, blob_digest(folder / name)) for name in choose_files(names, files)}


def _check_room(target: Target, cache: Path, commit: str, listed: dict[str, tuple[int | None, str | None]]) -> None:
    """Raise `MissingWeightsError` where the disk is too small, before hours of downloading."""
    snapshot = cache / f"models--{target.repo.replace('/', '--')}" / "snapshots" / commit
    needed = sum(size or 0 for name, (size, _) in listed.items() if not (snapshot / name).exists())
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise MissingWeightsError(
            f"{target.repo} needs {needed / 1e9:.1f} GB more in the hub's cache {cache}, where {free / 1e9:.1f} GB are "
            "free; make room there, or point HF_HOME at a larger disk"
        )


def _check_bytes(
    folder: Path, listed: dict[str, tuple[int | None, str | None]], advance: Callable[[int, int], None]
) -> None:
    """Compare sizes and digests with those stated.

    Raises:
        WeightsError: a file differs.
    """
    large = [name for name, (_, digest) in listed.items() if digest is not None]
    total, done = sum((folder / name).stat().st_size for name in large), 0
    for name, (size, digest) in listed.items():
        path = folder / name
        found = path.stat().st_size
        if size is not None and found != size:
            raise WeightsError(f"{path} has {found} bytes, the hub's has {size}; {_remove(path)}")
        if digest is not None:
            actual = sha256(path)
            if actual != digest:
                raise WeightsError(f"{path} has the SHA-256 {actual}, it should be {digest}; {_remove(path)}")
            done += found
            advance(done, total)


def _remove(path: Path) -> str:
    return f"remove {path.resolve()} and run the same line again"
