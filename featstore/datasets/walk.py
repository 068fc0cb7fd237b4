"""One walk over the folders below a root: every adapter that looks for files sees the same ones, in the same order."""

import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from featstore.errors import ManifestError


def find_files(root: Path, suffixes: Collection[str] = ()) -> list[str]:
    """Relative POSIX paths of the files below `root`, sorted; hidden files and folders (`._*` too) are left out.

    `suffixes` keeps names that end in one of them, in lower case with their dot (".nii.gz" too); none keeps all. Links
    to folders are followed, each folder is read once.

    Raises:
        ManifestError: a folder cannot be read, or a name is not UTF-8.
    """
    found = []
    seen = set()
    endings = tuple(suffixes)
    for folder, folders, names in os.walk(root, onerror=_stop, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was walked already, or around in a circle
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for name in names:
            if not name.startswith(".") and (not endings or name.lower().endswith(endings)):
                found.append(prefix + name)
    odd = [path for path in found if not _is_text(path)]
    if odd:
        raise ManifestError(f"{len(odd)} file names are not UTF-8, such as {odd[0]!r}; rename them")
    return sorted(found)


def stem(path: str) -> str:
    """The name of a file without its folder and last suffix."""
    return Path(path).stem


def by_stem(paths: Iterable[str], *, prefer: Collection[str] = (), key: Callable[[str], str] = stem) -> dict[str, str]:
    """The one path of each name, by `key` of the path.

    `prefer` are regular expressions, searched in "/" + path whatever its case, that tell the folders a release
    documents: of several paths of one name those stay that match the first expression, then the second and so on.

    Raises:
        ManifestError: two paths of one name are left, so that one would silently stand for the other.
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(key(path), []).append(path)
    left = {name: _preferred(several, prefer) if len(several) > 1 else several for name, several in found.items()}
    twice = [several for several in left.values() if len(several) > 1]
    if twice:
        raise ManifestError(
            f"{len(twice)} names stand for more than one file, such as {twice[0][0]} and {twice[0][1]}; keep one of "
            "them below the root"
        )
    return {name: several[0] for name, several in left.items()}


def _preferred(paths: list[str], prefer: Collection[str]) -> list[str]:
    for expression in prefer:
        paths = [path for path in paths if re.search(expression, f"/{path}", re.IGNORECASE)] or paths
    return paths


def _stop(error: OSError) -> None:
    # os.walk would pass over the folder, and its files would be absent without a word.
    raise ManifestError(f"{error.filename}: cannot be read ({error.strerror}); every folder below the root must be")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
