"""What a manifest says of files that changed since the one before it."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from featstore.datasets import manifest as manifests
from featstore.datasets.contents import History
from featstore.datasets.manifest import (
    Manifest,
    build,
    check_unchanged,
    earlier,
    load,
    save,
    stat_files,
    table_digest,
)
from featstore.datasets.source import RESERVED, Source, build_table
from featstore.errors import ManifestError
from featstore.inputs import Inputs


def make_source(root: Path, names: list[str], *, write: bool = True, **columns: Any) -> Source:
    """A source of `names` as ids and paths below `root`; `columns` replace or follow the reserved ones."""
    if write:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(f"image {name}".encode())
    nothing = pa.nulls(len(names), pa.string())
    given: dict[str, Any] = {"id": names, "path": names, "split": ["train"] * len(names)} | columns
    data = {name: pa.array(given.pop(name), pa.string()) if name in given else nothing for name in RESERVED}
    return Source(
        table=pa.table({**data, **given}),
        root=root,
        adapter="table",
        default_task=None,
        tasks=(),
        label_columns=tuple(name for name in columns if name not in RESERVED),
        split_origin="table",
        groups_known=False,
        notes=("a note",),
    )


class Folder:
    """A folder of two files whose manifest is built again and again, each after the one before.

    `read` plays an extraction: from then on the bytes of a file are known. What else earlier manifests tell is kept as
    `earlier` finds it in a store.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before: Manifest | None = None
        self.known = History()
        make_source(root, ["a", "b"])
        self.time = 10**18
        for name in ("a", "b"):
            self.put(name, f"image {name}".encode())

    def put(self, name: str, data: bytes) -> None:
        self.time += 10**9
        (self.root / name).write_bytes(data)
        os.utime(self.root / name, ns=(self.time, self.time))

    def read(self, *names: str) -> None:
        for name in names or ("a", "b"):
            self.known.hashes.setdefault(name, set()).add(sha((self.root / name).read_bytes()))

    def register(self, *names: str, hash_all: bool = False) -> Manifest:
        source = make_source(self.root, list(names) or ["a", "b"], write=False)
        self.before = build(
            "x", source, before=self.before, gather=lambda ids: self.known, allow_missing=True, hash_all=hash_all
        )
        for name, content, held in zip(
            self.before.column("id"), self.before.column("content"), self.before.hashes(), strict=True
        ):
            self.known.hashes.setdefault(name, set()).update({content, held} - {None})
            self.known.stated |= {name} if content else set()
        return self.before


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_nothing_changed_is_the_same_manifest(folder: Folder) -> None:
    first = folder.register()
    assert folder.register().digest == first.digest
    assert folder.register().column("content") == [None, None]
    assert folder.register().hashes() == [None, None]


def test_rewritten_in_place_with_equal_size_is_seen_by_its_content(folder: Folder) -> None:
    first = folder.register()
    folder.read()
    folder.put("a", b"IMAGE a")
    second = folder.register()
    assert second.column("size") == first.column("size")
    assert second.column("content") == [sha(b"IMAGE a"), None]
    assert second.digest != first.digest
    # The hash stays, though nothing changed since: without it the digest would be the first one again.
    assert folder.register().digest == second.digest
    folder.put("a", b"image a")
    assert folder.register().column("content") == [sha(b"image a"), None], "once stated, always stated"


def test_a_touched_file_is_the_same_manifest_whether_or_not_its_bytes_are_known(folder: Folder) -> None:
    first = folder.register()
    folder.put("a", b"image a")
    assert folder.register().digest == first.digest, "nothing was computed from it"
    folder.read()
    folder.put("a", b"image a")
    second = folder.register()
    assert second.digest == first.digest
    assert second.hashes() == [sha(b"image a"), None], "what was read is kept"
    assert second.column("mtime_ns")[0] == folder.time
    folder.put("a", b"IMAGE a")
    assert folder.register().digest != first.digest


def test_an_edit_before_anything_was_read_changes_nothing(folder: Folder) -> None:
    first = folder.register()
    folder.put("a", b"IMAGE a")
    assert folder.register().digest == first.digest
    folder.read()
    folder.put("a", b"image a")
    assert folder.register().column("content") == [sha(b"image a"), None]


def test_a_hash_taken_at_registration_is_known_bytes(folder: Folder) -> None:
    first = folder.register()
    hashed = folder.register(hash_all=True)
    assert hashed.digest == first.digest, "whether hashes exist is no part of the digest"
    assert hashed.hashes() == [sha(b"image a"), sha(b"image b")]
    assert folder.register().hashes() == hashed.hashes(), "kept while size and time stay"
    folder.put("a", b"IMAGE a")
    assert folder.register().column("content") == [sha(b"IMAGE a"), None]


def hide(folder: Folder, name: str, data: bytes) -> None:
    """Other bytes of the same size, and the time is put back."""
    facts = (folder.root / name).stat()
    assert facts.st_size == len(data)
    (folder.root / name).write_bytes(data)
    os.utime(folder.root / name, ns=(facts.st_mtime_ns, facts.st_mtime_ns))


def test_hashing_again_finds_other_bytes_of_equal_size_and_time(folder: Folder) -> None:
    first = folder.register(hash_all=True)
    assert first.meta["notes"] == ["a note"]
    assert folder.register(hash_all=True).meta["notes"] == ["a note"]
    hide(folder, "a", b"IMAGE a")
    assert folder.register().digest == first.digest, "nobody looked"
    second = folder.register(hash_all=True)
    assert second.column("content") == [sha(b"IMAGE a"), None]
    assert second.hashes() == [sha(b"IMAGE a"), sha(b"image b")]
    assert second.digest != first.digest
    told = "1 samples have the same size and time, other bytes than before; they are computed again"
    assert second.meta["notes"] == ["a note", told]
    third = folder.register(hash_all=True)
    assert third.digest == second.digest, "stated once, and counted once"
    assert third.meta["notes"] == ["a note"]
    hide(folder, "a", b"image a")
    assert folder.register(hash_all=True).column("content") == [sha(b"image a"), None]


def test_hashing_finds_other_bytes_than_those_that_were_computed(folder: Folder) -> None:
    first = folder.register()
    folder.read()
    assert folder.register(hash_all=True).digest == first.digest
    folder.before = first
    hide(folder, "b", b"IMAGE b")
    second = folder.register(hash_all=True)
    assert second.column("content") == [None, sha(b"IMAGE b")]
    assert len(second.meta["notes"]) == 2


def test_the_data_beside_a_header_is_watched(tmp_path: Path) -> None:
    for name in ("p", "q"):
        (tmp_path / f"{name}.hdr").write_bytes(b"equal headers")
        (tmp_path / f"{name}.img").write_bytes(f"pixels of {name}".encode())
    source = make_source(tmp_path, ["p.hdr", "q.hdr"], write=False)
    first = build("x", source, hash_all=True)
    assert first.column("size") == [24, 24]
    assert len(set(first.hashes())) == 2
    (tmp_path / "q.img").write_bytes(b"PIXELS of q")
    os.utime(tmp_path / "q.img", ns=(2 * 10**18, 2 * 10**18))
    with pytest.raises(ManifestError, match=r"1 files changed since registration, such as q\.hdr"):
        check_unchanged(first, np.arange(2, dtype=np.int64))
    known = History(hashes=dict(zip(["p.hdr", "q.hdr"], ({value} for value in first.hashes() if value))))
    second = build("x", source, before=first, gather=lambda ids: known)
    assert [content is None for content in second.column("content")] == [True, False]


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_files_are_found_alike_by_one_thread_and_by_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    monkeypatch.setattr(manifests, "_LOCAL_SECONDS", limit)
    monkeypatch.setattr(manifests, "_PROBED", 3)
    names = [f"{number}" for number in range(10)]
    make_source(tmp_path, names)
    sizes, _ = stat_files(tmp_path, [*names, "gone", *names])
    assert sizes == [7] * 10 + [manifests.MISSING] + [7] * 10
    assert stat_files(tmp_path, []) == ([], [])


def test_a_size_that_comes_back_does_not_bring_the_old_digest_back(folder: Folder) -> None:
    first = folder.register()
    folder.read()
    folder.put("a", b"another size")
    second = folder.register()
    folder.put("a", b"other a")  # as long as the first
    third = folder.register()
    assert third.column("size") == first.column("size")
    assert len({first.digest, second.digest, third.digest}) == 3
    assert third.column("content") == [sha(b"other a"), None]


def test_a_sample_that_comes_back_does_not_bring_the_old_digest_back(folder: Folder) -> None:
    first = folder.register()
    folder.read()
    folder.register("b")
    assert folder.register().digest == first.digest, "it came back as it was"
    folder.register("b")
    folder.put("a", b"other a")
    third = folder.register()
    assert third.digest != first.digest
    assert third.column("content") == [sha(b"other a"), None]


def test_a_file_that_comes_back_is_hashed(folder: Folder) -> None:
    first = folder.register()
    folder.read()
    (folder.root / "a").unlink()
    assert folder.register().column("size") == [manifests.MISSING, 7]
    folder.put("a", b"image a")
    assert folder.register().digest == first.digest
    folder.put("a", b"other a")
    third = folder.register()
    assert third.digest != first.digest
    assert third.column("content") == [sha(b"other a"), None]


def test_another_path_of_equal_size_and_time_is_compared_by_its_bytes(tmp_path: Path) -> None:
    source = make_source(tmp_path, ["one", "two"], id=["s", "t"])
    for name in ("one", "two"):
        os.utime(tmp_path / name, ns=(1, 1))
    first = build("x", source)
    swapped = make_source(tmp_path, ["two", "one"], write=False, id=["s", "t"])
    known = History(hashes={"s": {sha(b"image one")}, "t": {sha(b"image two")}})
    second = build("x", swapped, before=first, gather=lambda ids: known)
    assert second.column("content") == [sha(b"image two"), sha(b"image one")]


def test_a_sample_that_was_extracted_as_another_part_is_refused(tmp_path: Path) -> None:
    def source(*parts: str) -> Source:
        plain = make_source(tmp_path, ["a", "b"])
        reserved = {"id": pa.array(["s", "t"]), "path": pa.array(["a", "a"]), "part": pa.array(parts)}
        table = build_table(pa.table({"n": [1, 2]}), reserved)
        return replace(plain, table=table, label_columns=())

    first = build("x", source("frame=0", "frame=1"))
    known = History(parts={"s": {"frame=0"}, "t": {"frame=1"}})
    assert build("x", source("frame=0", "frame=1"), before=first, gather=lambda ids: known).digest == first.digest
    with pytest.raises(ManifestError, match="1 samples, such as t, are another part of their file than"):
        build("x", source("frame=0", "frame=2"), before=first, gather=lambda ids: known)
    build("x", source("frame=0", "frame=2"), before=first, gather=lambda ids: History())
    save(tmp_path / "datasets", first)
    told = earlier(tmp_path / "datasets", "x", pa.array(["s", "t", "u"]), {first.short})
    assert told.parts == known.parts, "as a manifest on disk has them"
    (tmp_path / "datasets" / "x" / first.short / "source.toml").unlink()
    assert earlier(tmp_path / "datasets", "x", pa.array(["s"]), {first.short}).parts == {}


def test_files_that_change_while_they_are_hashed(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Inputs.hash

    def edit(self: Inputs, path: str) -> str:
        value = real(self, path)
        folder.put("b", b"edited meanwhile")
        return value

    monkeypatch.setattr(Inputs, "hash", edit)
    with pytest.raises(ManifestError, match="1 files changed while they were read, such as b; register when nothing"):
        folder.register(hash_all=True)


def test_a_column_called_hash_is_renamed_whether_or_not_files_are_hashed(tmp_path: Path) -> None:
    source = make_source(tmp_path, ["a"], hash=["md5"])
    plain, hashed = build("x", source), build("x", source, hash_all=True)
    assert plain.digest == hashed.digest
    assert plain.column("source_hash") == hashed.column("source_hash") == ["md5"]
    assert hashed.hashes() == [sha(b"image a")]
    save(tmp_path / "datasets", hashed)
    assert load(tmp_path / "datasets", "x").hashes() == hashed.hashes()
    assert table_digest(load(tmp_path / "datasets", "x").table) == plain.digest
    # In manifests of before, a column of that name was the source's, and the digest covers it.
    unmarked = [pa.table({"id": ["a"], "hash": [value]}) for value in ("1", "2")]
    assert table_digest(unmarked[0]) != table_digest(unmarked[1])


def test_new_samples_are_not_read(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.register("a")
    monkeypatch.setattr(Inputs, "hash", lambda self, path: pytest.fail(f"{path} was read"))
    assert folder.register("a", "b").column("content") == [None, None]


def test_check_unchanged_stops_at_size_time_and_root(folder: Folder) -> None:
    result = folder.register()
    both = np.arange(2, dtype=np.int64)
    check_unchanged(result, both)
    (folder.root / "b").write_bytes(b"image!")
    check_unchanged(result, both[:1])
    check_unchanged(result, both[:0])
    with pytest.raises(ManifestError, match="1 files changed since registration, such as b; run `featstore register x"):
        check_unchanged(result, both)
    folder.put("b", b"image b")
    with pytest.raises(ManifestError, match="1 files changed since registration, such as b"):
        check_unchanged(result, both)
    folder.root.rename(folder.root.with_name("moved"))
    with pytest.raises(ManifestError, match="is gone; if it moved, run `featstore register x NEW_ROOT`"):
        check_unchanged(result, both)
