"""From a hub id to a folder on this machine, or to a message that says how to get one.

Asked in this order: the hub's cache, whether there is a network at all, then the hub, once. The loading functions of
transformers, without a network, try again for half a minute and then blame something else.
"""

import contextlib
import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from featstore.backbones.reachable import SECONDS, is_reachable
from featstore.backbones.weights import find_files
from featstore.errors import ConfigError, MissingWeightsError, WeightsError

# The hub's own rules: word characters at both ends, no -- or .., at most 96 characters, no .git.
HUB_ID = re.compile(r"(?!.*(?:--|\.\.))\w(?:[\w.-]*\w)?/\w(?:[\w.-]{0,94}\w)?(?<!\.git)", re.ASCII)
CONFIGS = ("config.json", "preprocessor_config.json")
# Forms of weights by their names in a cache, and by patterns on the hub; a later one only where the earlier are absent.
CHOICES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
PATTERNS = ("*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What somebody wants of the hub, as the advice names it.

    `model` is what `--model` takes. `gated` says that the hub asks for a licence to be accepted. With `weights` False
    only the JSON files are wanted. `fetching` says that `featstore fetch` asks, which only gets files.
    """

    repo: str
    model: str
    revision: str | None = None
    gated: bool = False
    weights: bool = True
    fetching: bool = False


def fetch(
    repo: str,
    revision: str | None = None,
    *,
    model: str = "",
    gated: bool = False,
    weights: bool = True,
    files: tuple[str, ...] = (),
    fetching: bool = False,
) -> Path:
    """Folder of a hub repository, from the cache if it is there, else downloaded; named by its commit.

    Weights are safetensors, else `pytorch_model.bin`, in one file or in shards; `files` are their names where they have
    others. The other arguments are those of `Asked`; `fetching` also says that the hub was found not to answer.

    Raises:
        ConfigError: `repo` cannot be a hub id.
        MissingWeightsError: not in the cache and not to be had, with the steps that help.
    """
    from huggingface_hub import constants

    if not HUB_ID.fullmatch(repo):
        raise ConfigError(f"{repo!r} is neither a folder on this machine nor a hub id of the form OWNER/NAME")
    asked = Asked(
        repo=repo, model=model or f"hf:{repo}", revision=revision, gated=gated, weights=weights, fetching=fetching
    )
    reason = "not in this machine's cache"
    if _cache_folder(repo).is_dir():
        cached, problem = _look_in_cache(repo, revision, weights, files)
        if cached is not None:
            return cached
        reason = f"not whole in this machine's cache ({problem or _other_revisions(asked)})"
    if constants.HF_HUB_OFFLINE or fetching or not is_reachable(constants.ENDPOINT):
        raise MissingWeightsError(_advice(asked, f"{reason}, and the hub cannot be reached: {_silence(asked)}"))
    folder, problem = _download_one_form(asked, files)
    if problem is not None:
        raise MissingWeightsError(_advice(asked, f"the hub does not have them all: {problem}"))
    return folder


def find_cached(repo: str, revision: str | None = None, *, files: tuple[str, ...] = ()) -> Path | None:
    """The folder of a repository that is whole in the hub's cache, weights included, else None; nobody is asked."""
    if not HUB_ID.fullmatch(repo) or not _cache_folder(repo).is_dir():
        return None
    return _look_in_cache(repo, revision, True, files)[0]


def _cache_folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _look_in_cache(
    repo: str, revision: str | None, weights: bool, files: tuple[str, ...]
) -> tuple[Path | None, str | None]:
    """(the snapshot in the cache where it is whole, else what it lacks)."""
    problem = None
    for names in ((files,) if files else CHOICES) if weights else ((),):
        cached = _look_up(repo, revision, [*CONFIGS, *names])
        found = _problem(cached, weights, files) if cached is not None else None
        if cached is not None and found is None:
            return cached, None
        problem = problem or found
    return None, problem


def _silence(asked: Asked) -> str:
    """Why there is no hub."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1 forbids to ask it"
    if asked.fetching:
        return f"{constants.ENDPOINT} does not answer"
    return (
        f"{constants.ENDPOINT} did not answer within {SECONDS} s (`featstore fetch` waits longer, HF_HUB_OFFLINE=1 not "
        "even that)"
    )


def _other_revisions(asked: Asked) -> str:
    """What a cache has of a repository that is not the revision asked for."""
    folder = _cache_folder(asked.repo)
    there = sorted(path.name for path in (folder / "snapshots").glob("*") if path.is_dir())
    if not there or asked.revision in there or (folder / "refs" / (asked.revision or "main")).is_file():
        return "nothing whole is there"
    lacking = f"not {asked.revision}" if asked.revision else "and not which of them is main"
    return f"it has {', '.join(there[:MOST_NAMED])}, {lacking}: --revision {there[0]} takes that one"


def _download_one_form(asked: Asked, files: tuple[str, ...]) -> tuple[Path, str | None]:
    """(the snapshot with the first form of weights that the repository has, what it still lacks)."""
    wanted = (files or PATTERNS[:1]) if asked.weights else ()
    folder = download(asked, ["*.json", *wanted])
    problem = _problem(folder, asked.weights, files)
    for i, pattern in enumerate(PATTERNS[1:], start=1):
        there = any(next(folder.glob(earlier), None) for earlier in PATTERNS[:i])
        if problem is None or there or files or not asked.weights:
            break
        folder = download(replace(asked, revision=folder.name), ["*.json", pattern])
        problem = _problem(folder, asked.weights, files)
    return folder, problem


def _look_up(repo: str, revision: str | None, needed: list[str]) -> Path | None:
    """The snapshot in the cache; nothing is written, so the cache may belong to somebody else.

    `needed` are asked for by name: other programs fetch less, and a repository has weights in several formats.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=needed, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def download(asked: Asked, wanted: list[str]) -> Path:
    """The files `wanted` of a repository, in the hub's cache; what is there already is not fetched again.

    Raises:
        MissingWeightsError: not to be had, with the steps that help.
    """
    from huggingface_hub import snapshot_download

    with explained(asked):
        return Path(snapshot_download(asked.repo, revision=asked.revision, allow_patterns=wanted))


@contextlib.contextmanager
def explained(asked: Asked) -> Iterator[None]:
    """Within it what the hub's client raises becomes a message that says what to do.

    Raises:
        MissingWeightsError: the hub says no, cannot be read, or the disk of the cache is full.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The class that connection errors share: of httpx or httpx2, as huggingface_hub's version has it.
    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError
        reason = "its licence is not accepted by this account"
        raise MissingWeightsError(_advice(replace(asked, gated=True), reason)) from error
    except RepositoryNotFoundError as error:
        raise MissingWeightsError(
            f"the hub has no repository {asked.repo!r}, or it is private and this account may not see it; "
            f"check the name, log in with `hf auth login`, or give a folder: {_given(asked)}"
        ) from error
    except RevisionNotFoundError as error:
        raise MissingWeightsError(
            f"hub repository {asked.repo!r} has no revision {asked.revision!r}; "
            "give a branch, tag or commit that it has"
        ) from error
    except (OSError, transport_error) as error:  # proxy, time-out, server down, disk full
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise MissingWeightsError(
                f"no room for {asked.repo} in the hub's cache {constants.HF_HUB_CACHE} ({error.strerror}); make room "
                "there, or point HF_HOME at a larger disk, and run the same line again: what has arrived stays"
            ) from error
        cause = error.__cause__ or error  # huggingface_hub speaks of its cache, the cause of the network
        reason = f"the hub could not be read ({type(cause).__name__}: {(str(cause).splitlines() or [''])[0]})"
        raise MissingWeightsError(_advice(asked, reason)) from error


def _problem(folder: Path, weights: bool, files: tuple[str, ...]) -> str | None:
    """What a snapshot lacks: a cache may hold only what another program once asked for."""
    if not weights:
        return None if (folder / "config.json").is_file() else "no config.json"
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        return f"no {', '.join(absent)} in {folder}"
    if files:
        return None  # whether they are whole is looked at when they are opened
    try:
        find_files(folder)
    except (MissingWeightsError, WeightsError) as error:
        return str(error)
    return None


def _given(asked: Asked) -> str:
    """How a folder is given for what was asked."""
    return "--model hf:DIR" if asked.model.startswith("hf:") else f"--model {asked.model} --weights DIR"


def _advice(asked: Asked, reason: str) -> str:
    from huggingface_hub import constants

    licence = (
        f"accept the licence on the hub's page of {asked.repo}, log in with `hf auth login`, then "
        if asked.gated
        else ""
    )
    which = f" --revision {asked.revision}" if asked.revision else ""
    lines = [
        f"no {'weights' if asked.weights else 'config.json'} from {asked.repo}: {reason}. To get them:",
        f"  - on a machine with network: {licence}run `featstore fetch {asked.model}{which}` or "
        f"`hf download {asked.repo}{which}`; here give the folder that it prints: {_given(asked)}",
        f"  - or point HF_HOME at a cache that has them (this one is {constants.HF_HUB_CACHE})",
    ]
    if asked.weights and not asked.fetching:
        lines.append("  - or try everything without weights: --random-weights 0")
    return "\n".join(lines)
