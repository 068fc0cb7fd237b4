"""Files that hold the rest of a sample: the .img of a NIfTI .hdr, the data of a MetaImage .mhd, the folder of a .mrxs.

They are told by the sample's suffix alone, so that other files cost no look at the disk.
"""

import os
import re
import stat
from pathlib import Path

_HEADER_BYTES = 65536  # a MetaImage names its data in its last line, long before that
_DATA_FILE = re.compile(rb"(?m)^[ \t\r]*ElementDataFile[ \t]*=[ \t]*([^\r\n]+?)[ \t\r]*$")

Facts = dict[str, os.stat_result]  # by path relative to the root


def companions(root: str, path: str) -> Facts:
    """The files that belong to `path` (below `root`, which ends with a slash), in order; those that are there."""
    name = path.lower()
    if name.endswith((".hdr", ".hdr.gz")):
        stem = path[: -len(".gz")] if name.endswith(".gz") else path
        stem = stem.removesuffix(".hdr")
        return dict(list(_present(root, [f"{stem}.img", f"{stem}.img.gz"]).items())[:1])
    if name.endswith(".mhd"):
        data = _data_file(Path(root + path))
        return {} if data is None else _present(root, [os.path.join(os.path.dirname(path), data)])
    if name.endswith(".mrxs"):
        return _files_of(root, path[: -len(".mrxs")])
    return {}


def _present(root: str, paths: list[str]) -> Facts:
    found: Facts = {}
    for path in paths:
        try:
            facts = os.stat(root + path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_ISREG(facts.st_mode):
            found[path] = facts
    return found


def _data_file(header: Path) -> str | None:
    """The name of a file beside a MetaImage's header that holds its samples; None where there is none to follow."""
    try:
        with header.open("rb") as file:
            found = _DATA_FILE.search(file.read(_HEADER_BYTES))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    name = "LOCAL" if found is None else found[1].decode("latin-1")
    outside = name in ("LOCAL", "LIST", ".", "..") or re.search(r"[%/\\\0]", name)  # as the decoder refuses them
    return None if outside else name


def _files_of(root: str, folder: str) -> Facts:
    try:
        with os.scandir(root + folder) as entries:
            found = {f"{folder}/{entry.name}": entry.stat() for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return dict(sorted(found.items()))


__all__ = ["Facts", "companions"]
