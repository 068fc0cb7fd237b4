"""Members of archives, read in place: zip, tar, parquet; what is refused, and why; indexes kept and shared."""

import hashlib
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featstore import files, pack_index, packs
from featstore.datasets.manifest import MISSING, stat_files
from featstore.errors import DecodeError, ManifestError
from featstore.inputs import Inputs
from featstore.packs import list_members, open_pack

MEMBERS = {
    "train/a.png": bytes(range(256)) * 40,
    "b.png": np.random.default_rng(0).bytes(70_000),
    "röntgen/ü 1.png": b"x",
    "empty.png": b"",
    "x/" * 60 + "long.png": b"a long name" * 9,
}


def write_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("train")
        for number, (name, data) in enumerate(MEMBERS.items()):
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED)
    return path


def write_deflated(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in MEMBERS.items():
            archive.writestr(name, data)
    return path


def write_zip64(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in MEMBERS.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(data)
    return path


def write_prefixed(path: Path) -> Path:
    """A zip behind other bytes, as self-extracting ones are, and with a comment; its magic is another."""
    path.write_bytes(b"PK\x03\x04" + b"#" * 1000 + write_zip(path).read_bytes())
    return path


def write_extracting(path: Path) -> Path:
    """A zip behind a program that unpacks it."""
    path.write_bytes(b"MZ" + b"\x90" * 5000 + write_zip(path).read_bytes())
    return path


def write_tar(path: Path, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        folder = tarfile.TarInfo("train")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in MEMBERS.items():
            add(archive, f"./{name}", data)
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    item = tarfile.TarInfo(name)
    item.size, item.type, item.linkname = len(data), kind, link
    archive.addfile(item, io.BytesIO(data))


WRITERS: dict[str, Callable[[Path], Path]] = {
    "zip": write_zip,
    "deflated": write_deflated,
    "zip64": write_zip64,
    "prefixed": write_prefixed,
    "extracting": write_extracting,
    "pax": write_tar,
    "gnu": lambda path: write_tar(path, tarfile.GNU_FORMAT),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_members_are_read_as_they_were_written(tmp_path: Path, kind: str) -> None:
    archive = WRITERS[kind](tmp_path / "in.pack")
    assert list_members(archive) == list(MEMBERS)
    inputs = Inputs(tmp_path)
    time = archive.stat().st_mtime_ns
    for name, data in MEMBERS.items():
        path = f"in.pack!/{name}"
        assert inputs.stat(path) == (len(data), time)
        assert inputs.read(path) == data
        assert inputs.hash(path) == hashlib.sha256(data).hexdigest()[:32]
        for first in (0, 1, 1024, 65_536, 10**6):
            assert inputs.read(path, first=first) == data[:first]
        assert inputs.beside(path) is None
        with pytest.raises(
            DecodeError, match="lies in an archive, and files of this kind are read from a file of their"
        ):
            inputs.local(path)


def test_image_columns_of_parquet_are_members(tmp_path: Path) -> None:
    values = [np.random.default_rng(row).bytes(row * 7) for row in range(25)]
    hub = [None if row == 3 else {"bytes": value, "path": f"{row}.png"} for row, value in enumerate(values)]
    table = pa.table({"plain": pa.array(values, pa.binary()), "a/image": hub, "label": list(range(25))})
    pq.write_table(table, tmp_path / "part.parquet", row_group_size=4)
    inputs = Inputs(tmp_path)
    names = list_members(tmp_path / "part.parquet")
    assert names == [f"{column}/{row}" for column in ("plain", "a/image") for row in range(25)]
    for row in [*range(25), 0, 24, 12]:
        for column in ("plain", "a/image"):
            path = f"part.parquet!/{column}/{row}"
            if column == "a/image" and row == 3:
                with pytest.raises(DecodeError, match="archive member is null"):
                    inputs.stat(path)
                continue
            assert inputs.stat(path)[0] == len(values[row])
            assert inputs.read(path) == values[row]
            assert inputs.read(path, first=5) == values[row][:5]
    for absent in ("plain/25", "label/0", "plain", "plain/-1", "plain/01"):
        with pytest.raises(FileNotFoundError, match="the archive has no member"):
            inputs.read(f"part.parquet!/{absent}")


def test_missing_archives_and_members_are_missing_files(tmp_path: Path) -> None:
    write_zip(tmp_path / "in.zip")
    (tmp_path / "folder!").mkdir()
    (tmp_path / "folder!" / "a.png").write_bytes(b"abc")
    paths = ["gone.zip!/a.png", "in.zip!/gone.png", "in.zip!/train", "in.zip!/b.png", "folder!/a.png", "in.zip/b!/c"]
    assert stat_files(tmp_path, paths)[0] == [MISSING, MISSING, MISSING, 70_000, 3, MISSING]
    assert Inputs(tmp_path).read("folder!/a.png") == b"abc"


def test_archives_that_allow_no_random_access_are_refused(tmp_path: Path) -> None:
    for mode, name in (("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")):
        with tarfile.open(tmp_path / "x.tar", f"w:{mode}") as archive:
            add(archive, "a.png", b"abc")
        with pytest.raises(ManifestError, match=rf"compressed as a whole \({name}\), .* as a zip or as a plain tar"):
            list_members(tmp_path / "x.tar")
        with pytest.raises(ManifestError, match="compressed as a whole"):
            stat_files(tmp_path, ["x.tar!/a.png"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"no zip, tar or parquet file that can be read"),
        (b"neither", r"no zip, tar or parquet file that can be read"),
        (b"PK\x03\x04 and no more", r"damaged zip \("),
        (b"PAR1 and no more", r"not a readable Parquet file \(\w+\)"),
    ],
)
def test_what_is_no_archive(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ManifestError, match=message):
        list_members(tmp_path / "x")


def test_a_damaged_header_in_the_middle_of_a_tar_is_not_its_end(tmp_path: Path) -> None:
    data = bytearray(write_tar(tmp_path / "x.tar", tarfile.GNU_FORMAT).read_bytes())
    at = data.index(b"./b.png")
    data[at + 1] ^= 1
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ManifestError, match=f"damaged tar, no header at byte {at}; copy or download it again"):
        list_members(tmp_path / "x.tar")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_concatenated_tars_are_refused(tmp_path: Path, form: int) -> None:
    first = write_tar(tmp_path / "a.tar", form).read_bytes()
    (tmp_path / "x.tar").write_bytes(first * 2)
    message = f"concatenated archive, another tar starts at byte {len(first)}; join tars with `tar -A`, or unpack it"
    with pytest.raises(ManifestError, match=message):
        list_members(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(first + b"\0" * 10**6)
    assert list_members(tmp_path / "x.tar") == list(MEMBERS)
    (tmp_path / "x.tar").write_bytes(first + b"a signature")
    assert list_members(tmp_path / "x.tar") == list(MEMBERS), "what follows is no archive"


def test_a_tar_whose_last_member_is_a_zip_is_a_tar(tmp_path: Path) -> None:
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=form) as archive:
            add(archive, "inner.zip", write_zip(tmp_path / "x.zip").read_bytes())
        assert list_members(tmp_path / "x.tar") == ["inner.zip"]


def test_a_cut_tar_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", tarfile.GNU_FORMAT).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: whole.index(b"./b.png") + 5000])
    with pytest.raises(ManifestError, match=r"no zip, tar or parquet file that can be read \(unexpected end of data\)"):
        list_members(tmp_path / "x.tar")


def test_a_stored_member_of_two_sizes_is_refused(tmp_path: Path) -> None:
    data = bytearray(write_zip(tmp_path / "x.zip").read_bytes())
    entry = data.index(b"train/a.png", data.index(b"PK\x01\x02")) - 46
    data[entry + 24] ^= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(DecodeError, match="archive member is stored, with two different sizes; copy or download"):
        Inputs(tmp_path).read("x.zip!/train/a.png")


def test_links_devices_and_doubled_names_of_a_tar_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        add(archive, "link.png", kind=tarfile.SYMTYPE, link="../secret")
        add(archive, "hard.png", kind=tarfile.LNKTYPE, link="/etc/passwd")
        add(archive, "pipe.png", kind=tarfile.FIFOTYPE)
        for data in (b"one", b"two"):
            add(archive, "twice.png", data)
        add(archive, "good.png", b"good")
        add(archive, "../up.png", b"up")
    for name in ("link", "hard", "pipe"):
        with pytest.raises(DecodeError, match="archive member is a link or device, which are not followed"):
            Inputs(tmp_path).read(f"x.tar!/{name}.png")
    with pytest.raises(ManifestError, match=r"twice.png: archive member stands in the archive more than once; repack"):
        stat_files(tmp_path, ["x.tar!/twice.png"])
    assert Inputs(tmp_path).read("x.tar!/good.png") == b"good"
    assert sorted(list_members(tmp_path / "x.tar"))[0] == "../up.png", "listed, so that whoever asks is told"


def patched(path: Path, change: Callable[[bytearray, int, int], None]) -> Inputs:
    """A zip of one deflated member; `change(bytes, local header, directory entry)`."""
    with zipfile.ZipFile(path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"0123456789" * 200)
    data = bytearray((path / "x.zip").read_bytes())
    change(data, data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02"))
    (path / "x.zip").write_bytes(data)
    return Inputs(path)


def set_size(size: int) -> Callable[[bytearray, int, int], None]:
    def change(data: bytearray, _: int, entry: int) -> None:
        data[entry + 24 : entry + 28] = size.to_bytes(4, "little")

    return change


def set_byte(place: int, value: int, *, local: bool = False) -> Callable[[bytearray, int, int], None]:
    def change(data: bytearray, head: int, entry: int) -> None:
        data[(head if local else entry) + place] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_byte(8, 1), "archive member is encrypted; decrypt the archive first"),
        (set_byte(10, 14), "archive member is compressed by another method than deflate"),
        (set_byte(41, 0o120 << 1), "archive member is a link or device"),
        (set_size(100), "inflates to more than the 100 bytes that the archive says"),
        (set_size(2001), "archive member holds 2000 bytes where the archive says 2001"),
        (set_size(2**31), "says it holds 2147483648 bytes, more than .* bytes can inflate to"),
        (set_size(2**32 - 1), "says it is larger than 4 GiB|can inflate to|damaged zip"),
        (set_byte(16, 0), "archive member does not match its checksum"),
        (set_byte(36, 0xFF, local=True), "compressed bytes cannot be inflated"),
        (set_byte(3, 0, local=True), "has no header where the archive's directory says"),
    ],
)
def test_zip_members_that_cannot_be_trusted(
    tmp_path: Path, change: Callable[[bytearray, int, int], None], message: str
) -> None:
    inputs = patched(tmp_path, change)
    with pytest.raises((DecodeError, ManifestError), match=message):
        inputs.read("x.zip!/a.png")


def test_sizes_above_the_limit_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_index, "MAX_MEMBER", 1000)
    inputs = patched(tmp_path, lambda *_: None)
    with pytest.raises(DecodeError, match="says it is larger than"):
        inputs.stat("x.zip!/a.png")


def test_sparse_members_are_refused() -> None:
    with pytest.raises(DecodeError, match="archive member is a sparse file; repack the archive without --sparse"):
        pack_index.Index.make(["a"], sizes=[1], states=[pack_index.SPARSE]).row("a")


def test_a_new_archive_under_the_same_name_is_indexed_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    for data in (b"one", b"three"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.png", data)
        assert Inputs(tmp_path).read("x.zip!/a.png") == data


def test_threads_share_one_index_and_one_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_deflated(tmp_path / "x.zip")
    built = []
    real = packs.index_zip
    monkeypatch.setattr(packs, "index_zip", lambda path: built.append(path) or real(path))
    names = [name for name in MEMBERS for _ in range(20)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: Inputs(tmp_path).read(f"x.zip!/{name}"), names))
    assert found == [MEMBERS[name] for name in names]
    assert len(built) == 1


def test_descriptors_go_with_their_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "MAX_PACKS", 2)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            add(archive, "a", b"abc")
        assert open_pack(tmp_path / f"{number}.tar").read("a") == b"abc"
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_long_indexes_are_kept_and_damaged_ones_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(pack_index, "KEPT_FROM", len(MEMBERS))
    archive = write_tar(tmp_path / "x.tar")
    built = []
    real = packs.index_tar
    monkeypatch.setattr(packs, "index_tar", lambda path: built.append(path) or real(path))

    def names() -> list[str]:
        packs._slots.clear()
        assert Inputs(tmp_path).read("x.tar!/b.png") == MEMBERS["b.png"]
        return list_members(archive)

    assert names() == names() == list(MEMBERS)
    assert len(built) == 1
    (kept,) = (tmp_path / "cache" / "indexes").iterdir()
    whole = kept.read_bytes()
    for damage in (b"", whole[:100], whole[: len(whole) // 2], whole.replace(b"train", b"brain"), zlib.compress(whole)):
        kept.write_bytes(damage)
        assert names() == list(MEMBERS)
    assert len(built) == 6
    (tmp_path / "cache" / "indexes" / kept.name).unlink()
    (tmp_path / "cache" / "indexes").rmdir()
    (tmp_path / "cache" / "indexes").write_bytes(b"in the way")
    assert names() == list(MEMBERS), "a cache that cannot be written is no error"
