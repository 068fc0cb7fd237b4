"""From a hub id to a folder on this machine, or to a message that says how to get one.

Asked in this order: the hub's cache, whether there is a network at all, then the hub, once. The loading functions of
transformers, without a network, try again for half a minute and then blame something else.
"""

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

from featstore.backbones.weights import find_files
from featstore.errors import ConfigError, MissingWeightsError, WeightsError

# The hub's own rules: word characters at both ends, no -- or .., at most 96 characters, no .git.
HUB_ID = re.compile(r"(?!.*(?:--|\.\.))\w(?:[\w.-]*\w)?/\w(?:[\w.-]{0,94}\w)?(?<!\.git)", re.ASCII)
CONFIG_ONLY = ["*.json"]
WITH_WEIGHTS = ["*.json", "*.safetensors"]
CONNECT_SECONDS = 5


def fetch(repo: str, revision: str | None = None, *, gated: bool = False, weights: bool = True) -> Path:
    """Folder of a hub repository, from the cache if it is there, else downloaded; named by its commit.

    `gated` says that the hub asks for a licence to be accepted, for the advice given offline. With `weights` False only
    the JSON files are fetched.

    Raises:
        ConfigError: `repo` cannot be a hub id.
        MissingWeightsError: not in the cache and not to be had, with the steps that help.
    """
    from huggingface_hub import constants

    if not HUB_ID.fullmatch(repo):
        raise ConfigError(f"{repo!r} is neither a folder on this machine nor a hub id of the form OWNER/NAME")
    patterns = WITH_WEIGHTS if weights else CONFIG_ONLY
    reason = "not in this machine's cache"
    if (Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}").is_dir():
        cached = _look_up(repo, revision, patterns)
        problem = _problem(cached, weights) if cached is not None else reason
        if cached is not None and problem is None:
            return cached
        reason = f"not whole in this machine's cache ({problem})"
    if constants.HF_HUB_OFFLINE or not _is_reachable(constants.ENDPOINT):
        reason = f"{reason}, and the hub cannot be reached"
        raise MissingWeightsError(_advice(repo, reason, gated=gated, weights=weights))
    folder = _download(repo, revision, patterns, gated=gated)
    problem = _problem(folder, weights)
    if problem is not None:
        raise MissingWeightsError(
            _advice(repo, f"the hub does not have them all: {problem}", gated=gated, weights=weights)
        )
    return folder


def _look_up(repo: str, revision: str | None, patterns: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _is_reachable(endpoint: str) -> bool:
    """Whether the hub accepts connections: without a network the answer takes no time, and its client half a second."""
    if any(name.lower().endswith("_proxy") for name in os.environ):
        return True  # only the client knows the way
    parts = urlsplit(endpoint)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _download(repo: str, revision: str | None, patterns: list[str], *, gated: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The class that connection errors share: of httpx or httpx2, as huggingface_hub's version has it.
    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]
    weights = patterns == WITH_WEIGHTS
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError
        reason = "its licence is not accepted by this account"
        raise MissingWeightsError(_advice(repo, reason, gated=True, weights=weights)) from error
    except RepositoryNotFoundError as error:
        raise MissingWeightsError(
            f"the hub has no repository {repo!r}, or it is private and this account may not see it; "
            "check the name, log in with `hf auth login`, or give a folder: --weights DIR"
        ) from error
    except RevisionNotFoundError as error:
        raise MissingWeightsError(
            f"hub repository {repo!r} has no revision {revision!r}; give a branch, tag or commit that it has"
        ) from error
    except (OSError, transport_error) as error:  # proxy, time-out, server down, disk full
        cause = error.__cause__ or error  # huggingface_hub speaks of its cache, the cause of the network
        reason = f"the hub could not be read ({type(cause).__name__}: {(str(cause).splitlines() or [''])[0]})"
        raise MissingWeightsError(_advice(repo, reason, gated=gated, weights=weights)) from error


def _problem(folder: Path, weights: bool) -> str | None:
    """What a snapshot lacks: a cache may hold only what another program once asked for."""
    if not weights:
        return None if (folder / "config.json").is_file() else "no config.json"
    try:
        find_files(folder)
    except (MissingWeightsError, WeightsError) as error:
        return str(error)
    return None


def _advice(repo: str, reason: str, *, gated: bool, weights: bool) -> str:
    from huggingface_hub import constants

    licence = f"accept the licence on the hub's page of {repo}, log in with `hf auth login`, then " if gated else ""
    lines = [
        f"no {'weights' if weights else 'config.json'} from {repo}: {reason}. To get them:",
        f"  - on a machine with network: {licence}run `hf download {repo}`; "
        "here give the folder that it prints: --weights DIR",
        f"  - or point HF_HOME at a cache that has them (this one is {constants.HF_HUB_CACHE})",
    ]
    if weights:
        lines.append("  - or try everything without weights: --random-weights 0")
    return "\n".join(lines)
