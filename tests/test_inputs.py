"""Paths of files and of members: both parts stay below the root; a file is what a manifest says it is."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from featstore.datasets.source import check_inside
from featstore.errors import ManifestError
from featstore.extraction.loader import Sample, load_image
from featstore.images import PreprocessSpec
from featstore.images.opening import OpenFiles
from featstore.inputs import HASH_HEX, Inputs
from featstore.packs import split_member

SPEC = PreprocessSpec(geometry="squash", height=4, width=4, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_a_file_is_read_hashed_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"abc" * 1000)
    inputs = Inputs(tmp_path)
    assert inputs.stat("a.png") == (3000, (tmp_path / "a.png").stat().st_mtime_ns)
    assert inputs.read("a.png") == b"abc" * 1000
    assert inputs.read("a.png", first=4) == b"abca"
    assert inputs.hash("a.png") == hashlib.sha256(b"abc" * 1000).hexdigest()[:HASH_HEX]
    assert inputs.local("a.png") == inputs.beside("a.png") == tmp_path / "a.png"
    assert inputs.unstaged == 0
    assert inputs.staging_note() is None
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="folder is a folder"):
        inputs.stat("folder")


def test_companions_count_for_size_time_and_hash(tmp_path: Path) -> None:
    def sha(*pieces: bytes) -> bytes:
        return hashlib.sha256(b"".join(pieces)).digest()

    def put(name: str, data: bytes) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, ns=(10**18 + len(data),) * 2)

    put("p.hdr", b"head")
    put("p.img", b"pixels")
    put("z.hdr", b"head")
    put("z.img.gz", b"squeezed")
    put("v.mhd", b"NDims = 3\r\nElementDataFile = volume 1.raw\r\n")
    put("volume 1.raw", b"r" * 100)
    put("s.mrxs", b"slide")
    put("s/b", b"second")
    put("s/a", b"1st")
    inputs = Inputs(tmp_path)
    wanted = {"p.hdr": ["p.img"], "z.hdr": ["z.img.gz"], "v.mhd": ["volume 1.raw"], "s.mrxs": ["s/a", "s/b"]}
    for path, others in wanted.items():
        data, rest = (tmp_path / path).read_bytes(), [(tmp_path / other).read_bytes() for other in others]
        assert inputs.stat(path) == (
            len(data) + sum(map(len, rest)),
            10**18 + max(len(data), *map(len, rest)),
        )
        assert inputs.hash(path) == inputs.hash_of(path, data) == sha(sha(data), *map(sha, rest)).hex()[:HASH_HEX]
        assert inputs.read(path) == data
        assert inputs.size_of(path, data) == inputs.stat(path)[0]
    before = inputs.hash("p.hdr")
    put("p.img", b"pixelS")
    assert inputs.hash("p.hdr") != before
    (tmp_path / "p.img").unlink()
    assert inputs.stat("p.hdr")[0] == 4
    assert inputs.hash("p.hdr") == sha(b"head").hex()[:HASH_HEX], "without a companion, the file itself"


@pytest.mark.parametrize("name", ["LOCAL", "LIST", "../secret.raw", "a/b.raw", "slice%03d.raw", "gone.raw", ".."])
def test_data_of_a_metaimage_that_is_not_one_file_beside_it_is_no_companion(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.raw").write_bytes(b"secret")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.raw").write_bytes(b"b")
    text = f"NDims = 3\nElementDataFile = {name}\n".encode()
    (tmp_path / "a" / "v.mhd").write_bytes(text)
    inputs = Inputs(tmp_path)
    assert inputs.stat("a/v.mhd")[0] == len(text)
    assert inputs.hash("a/v.mhd") == hashlib.sha256(text).hexdigest()[:HASH_HEX]


def test_the_loader_checks_and_hashes_the_data_beside_a_header(tmp_path: Path) -> None:
    (tmp_path / "v.mhd").write_bytes(b"NDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = v.raw\n")
    (tmp_path / "v.raw").write_bytes(bytes(8))
    inputs, found = Inputs(tmp_path), []
    for part in (None, "axis=axial&index=1"):
        for data in (bytes(8), bytes(7) + b"\1"):
            (tmp_path / "v.raw").write_bytes(data)
            sample = Sample("v.mhd", part, inputs.stat("v.mhd")[0])
            _, state = load_image(inputs, OpenFiles(), sample, SPEC)
            assert state.content == inputs.hash("v.mhd")
            found.append(state.content)
    assert len(set(found)) == 2
    (tmp_path / "v.raw").write_bytes(bytes(9))
    for part in (None, "axis=axial&index=1"):
        with pytest.raises(ManifestError, match=f"v.mhd: {sample.size + 1} bytes, {sample.size} at registration"):
            load_image(inputs, OpenFiles(), replace(sample, part=part), SPEC)


def test_files_without_companions_cost_no_look_at_the_disk(tmp_path: Path) -> None:
    data = b"abc"
    for path in ("a.png", "v.nii.gz", "v.mha", "x.img"):  # none of which is there
        assert Inputs(tmp_path).hash_of(path, data) == hashlib.sha256(data).hexdigest()[:HASH_HEX]


def test_a_path_is_split_at_its_first_mark() -> None:
    assert split_member("a/b.png") is None
    assert split_member("a/b!c.png") is None
    assert split_member("x.zip!/a/b.png") == ("x.zip", "a/b.png")
    assert split_member("x.zip!/a!/b.png") == ("x.zip", "a!/b.png")


@pytest.mark.parametrize("path", ["a.zip!/b.png", "d/a.tar!/b/c.png", "a.parquet!/image/7", "a!b/c.png", "a..b/c.png"])
def test_paths_that_stay_inside(path: str) -> None:
    check_inside(Path("root"), path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../x.zip!/a.png", r"climbs with '\.\.'"),
        ("x.zip!/../a.png", r"climbs with '\.\.'"),
        ("x.zip!/a/..", r"climbs with '\.\.'"),
        ("/x.zip!/a.png", "is absolute"),
        ("x.zip!//etc/passwd", "is absolute"),
        ("x.zip!/C:/a.png", "is absolute"),
        ("x.zip!/", "must name a file below"),
        ("!/a.png", "must name a file below"),
        ("x.zip!/a\\b.png", "holds a backslash"),
        ("x.zip!/a\x00", "must name a file below"),
    ],
)
def test_both_parts_of_a_member_stay_inside(path: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        check_inside(Path("root"), path)
