"""What is left of a quota: by the attributes of Ceph, or by the command that the file system's own client brings."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

COMMAND_SECONDS = 10.0  # a server that does not answer must not hold up the others' probes
_CEPH = (("ceph.quota.max_bytes", "ceph.dir.rbytes"), ("ceph.quota.max_files", "ceph.dir.rfiles"))


@dataclass(frozen=True, slots=True)
class Quota:
    """What may still be written under one quota; None: no limit."""

    bytes: int | None
    files: int | None
    source: str


def find_quotas(folder: Path, kind: str, device: str) -> list[Quota] | None:
    """The quotas that hold for a folder on a file system of this kind and device; None where nobody can be asked.

    Lustre is asked by `lfs quota` for user and group, everything else by `quota` (of local disks and NFS).
    """
    found = _of_ceph(folder) if kind.startswith(("ceph", "fuse.ceph")) else []
    if found:
        return found
    if kind == "lustre":
        commands = [["lfs", "quota", "-q", flag, str(number), str(folder)] for flag, number in _owners()]
        device = ""
    else:
        commands = [["quota", "-w", "-p", flag] for flag in ("-u", "-g")]
    if shutil.which(commands[0][0]) is None:
        return None
    answers = [answer for command in commands if (answer := _ask(command)) is not None]
    if not answers:
        return None
    return [quota for answer in answers for quota in parse_quota(answer, device, commands[0][0])]


def _owners() -> list[tuple[str, int]]:
    return [("-u", os.getuid()), ("-g", os.getgid())]


def _of_ceph(folder: Path) -> list[Quota]:
    found = []
    for place in (folder, *folder.parents):
        left: list[int | None] = []
        for limit_name, used_name in _CEPH:
            try:
                limit, used = (int(os.getxattr(place, name)) for name in (limit_name, used_name))
            except (OSError, ValueError):
                limit = used = 0
            left.append(limit - used if limit else None)
        if left != [None, None]:
            found.append(Quota(left[0], left[1], f"ceph quota of {place}"))
    return found


def _ask(command: list[str]) -> str | None:
    """What a command prints; None where it cannot be run. An exit status above 0 only says that a limit is passed."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.stdout or done.returncode == 0 else None


def parse_quota(text: str, device: str, source: str) -> list[Quota]:
    """Quotas of one device ('' for all) in what `quota -w` and `lfs quota -q` print.

    A line is: device, KiB used, soft and hard limit, time of grace, files used, soft and hard limit, time of grace. A
    `*` marks what is above the soft limit, a limit of 0 is none. The lower limit counts: of both, or the one there is.
    """
    found = []
    before: list[str] = []
    for line in text.splitlines():
        words = before + line.split()
        before = words if len(words) == 1 else []  # `lfs` breaks the line behind a long name
        if len(words) < 9 or not all(re.fullmatch(r"\[?\d+\]?\*?", words[i]) for i in (1, 2, 3, 5, 6, 7)):
            continue
        if device and words[0] != device:
            continue
        numbers = [int(re.sub(r"\D", "", words[i])) for i in (1, 2, 3, 5, 6, 7)]
        size, count = _left(*numbers[:3]), _left(*numbers[3:])
        if size is not None or count is not None:
            found.append(Quota(None if size is None else 1024 * size, count, source))
    return found


def _left(used: int, soft: int, hard: int) -> int | None:
    limits = [limit for limit in (soft, hard) if limit]
    return min(limits) - used if limits else None
