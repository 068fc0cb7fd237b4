"""Quotas and inodes: what the commands and attributes of file systems say, and what `featstore doctor` makes of it."""

import os
from pathlib import Path
from typing import Any

import pytest

from featstore.doctor import folders, quotas
from featstore.doctor.findings import Finding

QUOTA = """Disk quotas for user me (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
server:/home 900000 1000000 1100000 0 4000 0 5000 0
/dev/sda1 2000000* 1000000 3000000 500 10 0 0 0
/dev/sdb1 5 0 0 0 5 0 0 0
"""
LUSTRE = """/lustre/project/of/a/long/name
 1048576 0 2097152 - 900 1000 0 -
"""


def program(folder: Path, name: str, text: str, status: int = 0) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho \"$0 $@\" >> {folder}/calls\ncat <<'END'\n{text}END\nexit {status}\n")
    path.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def found(name: str, folder: Path) -> Finding:
    return next(probe for probe in folders.PROBES if probe.name == name)(folder)


def test_the_lower_limit_counts() -> None:
    (home,) = quotas.parse_quota(QUOTA, "server:/home", "quota")
    assert home == quotas.Quota(1024 * 100000, 1000, "quota")
    (above,) = quotas.parse_quota(QUOTA, "/dev/sda1", "quota")
    assert above == quotas.Quota(-1024 * 1000000, None, "quota")
    assert quotas.parse_quota(QUOTA, "/dev/sdb1", "quota") == [], "no limit is no quota"
    assert quotas.parse_quota("Disk quotas for user me (uid 1000): none\n", "", "quota") == []
    assert quotas.parse_quota(LUSTRE, "", "lfs") == [quotas.Quota(1024 * 1048576, 100, "lfs")]


def test_user_and_group_are_asked(path: Path, tmp_path: Path) -> None:
    program(path, "quota", QUOTA, status=1)
    assert len(quotas.find_quotas(tmp_path, "nfs4", "server:/home") or []) == 2
    program(path, "lfs", LUSTRE)
    assert [item.source for item in quotas.find_quotas(tmp_path, "lustre", "x@tcp:/l") or []] == ["lfs", "lfs"]
    calls = (path / "calls").read_text().splitlines()
    assert [call.split()[1:] for call in calls[:2]] == [["-w", "-p", "-u"], ["-w", "-p", "-g"]]
    assert calls[2].split()[1:] == ["quota", "-q", "-u", str(os.getuid()), str(tmp_path)]


def test_nobody_to_ask(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas.shutil, "which", lambda _: None)
    assert quotas.find_quotas(tmp_path, "ext4", "/dev/sda1") is None
    item = found("quota", tmp_path)
    assert (item.state, item.value) == ("ok", "unknown")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(path))
    program(path, "quota", "", status=1)  # its cat is not found either: it says nothing
    assert quotas.find_quotas(tmp_path, "ext4", "/dev/sda1") is None


def test_a_command_that_hangs_is_left(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "COMMAND_SECONDS", 0.1)
    (path / "quota").write_text("#!/bin/sh\nexec sleep 20\n")
    (path / "quota").chmod(0o755)
    assert quotas.find_quotas(tmp_path, "nfs", "s:/x") is None


def test_attributes_of_ceph_on_the_folder_or_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"ceph.quota.max_bytes": 1000, "ceph.dir.rbytes": 400, "ceph.quota.max_files": 0, "ceph.dir.rfiles": 7}

    def attribute(place: Any, name: str) -> bytes:
        if Path(place) != tmp_path:
            raise OSError(61, "No data available")
        return str(values[name]).encode()

    monkeypatch.setattr(os, "getxattr", attribute)
    assert quotas.find_quotas(tmp_path / "a" / "b", "ceph", "mon:/") == [
        quotas.Quota(600, None, f"ceph quota of {tmp_path}")
    ]


@pytest.mark.parametrize(
    ("quota", "state", "value"),
    [
        ([], "ok", "none"),
        ([quotas.Quota(5 * 10**9, 10**6, "quota")], "ok", "5.0 GB, 1000000 files"),
        ([quotas.Quota(5 * 10**9, None, "a"), quotas.Quota(10**8, None, "b")], "degraded", "0.1 GB"),
        ([quotas.Quota(None, 9_999, "quota")], "degraded", "9999 files"),
    ],
)
def test_what_the_doctor_says_of_quotas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: list[quotas.Quota], state: str, value: str
) -> None:
    monkeypatch.setattr(quotas, "find_quotas", lambda *_: quota)
    item = found("quota", tmp_path)
    assert (item.state, item.value) == (state, value)


class Facts:
    f_bavail, f_frsize = 10**9, 4096

    def __init__(self, files: int, free: int):
        self.f_files, self.f_favail = files, free


@pytest.mark.parametrize(
    ("files", "free", "state", "value"),
    [
        (0, 0, "ok", "uncounted"),
        (10**6, 10**5, "ok", "100000 of 1000000 free"),
        (10**6, 5, "degraded", "5 of 1000000 free"),
    ],
)
def test_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, free: int, state: str, value: str) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: Facts(files, free))
    item = found("inodes", tmp_path)
    assert (item.state, item.value) == (state, value)
    assert found("space", tmp_path).value == "4096.0 GB"


def test_the_device_of_a_mount() -> None:
    table = "22 27 0:21 / / rw - ext4 /dev/vda rw\n30 22 0:25 / /mnt rw - nfs4 host:/x rw,vers=4.2\n"
    assert folders.mounted_device(Path("/mnt/s"), table) == "host:/x"
    assert folders.mounted_device(Path("/a"), table) == "/dev/vda"
