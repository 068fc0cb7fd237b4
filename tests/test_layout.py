"""Where a store is, what it refuses, how a set is named and cut into blocks."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_sets import make_spec_of

from featstore import files
from featstore.errors import ConfigError, CorruptError, SchemaError, StoreError
from featstore.store import layout
from featstore.store.layout import ArraySpec


def test_the_store_is_the_argument_or_the_environment_or_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATSTORE_HOME", str(tmp_path / "home"))
    assert layout.store_path(tmp_path / "given") == tmp_path / "given"
    assert layout.store_path() == tmp_path / "home"
    monkeypatch.delenv("FEATSTORE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert layout.store_path().name == "featstore"


def test_the_mark_is_written_once_and_checked(tmp_path: Path) -> None:
    root = tmp_path / "store"
    layout.check_store(root)
    assert not root.exists()
    layout.check_store(root, create=True)
    mark = (root / "store.json").stat()
    layout.check_store(root, create=True)
    assert (root / "store.json").stat().st_mtime_ns == mark.st_mtime_ns
    layout.check_store(root)


def test_a_store_of_another_schema_is_refused_even_if_sealed_otherwise(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"schema": 3, "seal": "other"}')
    message = "this store has schema 3, this version of featstore reads schemas 1 to 2 and writes 2; use the version"
    with pytest.raises(SchemaError, match=message):
        layout.check_store(tmp_path)
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(CorruptError, match=r"store.json: not a sealed JSON file"):
        layout.check_store(tmp_path)


def test_a_set_of_another_schema_is_refused(tmp_path: Path) -> None:
    spec = {**make_spec_of(), "schema": 3}
    spec["identity"] = {**spec["identity"], "schema": 3}
    (tmp_path / "spec.json").write_bytes(files.sealed(spec))
    with pytest.raises(SchemaError, match=r"spec.json: this set has schema 3, this version of featstore reads schemas"):
        layout.read_spec(tmp_path)


def test_a_damaged_spec_is_told(tmp_path: Path) -> None:
    data = files.sealed(make_spec_of())
    (tmp_path / "spec.json").write_bytes(data)
    assert layout.read_spec(tmp_path) == make_spec_of()
    (tmp_path / "spec.json").write_bytes(data.replace(b"float16", b"float32"))
    with pytest.raises(CorruptError, match=r"spec.json: content does not match its digest"):
        layout.read_spec(tmp_path)


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(
        StoreError, match="a store is a folder, this is a file; pass another --store or set FEATSTORE_HOME"
    ):
        layout.check_store(tmp_path / "store")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_store_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(StoreError, match=rf"store.json: cannot write \({os.strerror(code)}\).* another --store"):
        layout.check_store(tmp_path / "new", create=True)
    layout.check_store(tmp_path / "new")


@given(st.floats(1e-3, 1e7), st.integers(1, 2**34))
def test_block_rows_is_the_largest_power_of_two_within_the_bounds(gflop: float, num_bytes: int) -> None:
    rows = layout.block_rows(gflop, num_bytes)
    assert rows in {2**k for k in range(8, 15)}
    fits = [r for r in (2**k for k in range(8, 15)) if r * gflop <= 1e5 and r * num_bytes <= 4 * 2**30]
    assert rows == max(fits, default=256)


@pytest.mark.parametrize("rows", [0, -4, 3, 48])
def test_block_rows_by_hand_must_be_a_power_of_two(rows: int) -> None:
    with pytest.raises(ConfigError, match=rf"--block-rows must be a power of two \(16, 256, 4096, ...\), got {rows}"):
        layout.check_block_rows(rows)
    assert layout.check_block_rows(64) == 64


@given(st.sampled_from(sorted(layout.ITEMSIZE)), st.lists(st.integers(1, 3000), max_size=2), st.integers(0, 14))
def test_shards_and_chunks_divide_a_block(dtype: str, shape: list[int], power: int) -> None:
    array = ArraySpec(name="x", row_shape=(*shape, 8), dtype=dtype)
    shard, chunk = array.layout(2**power)
    assert 2**power % shard == 0 == shard % chunk
    assert ArraySpec.from_dict(array.as_dict()) == array


def test_only_identity_makes_the_fingerprint(tmp_path: Path) -> None:
    spec, other = make_spec_of(), make_spec_of(block_rows=64, model="renamed")
    assert spec["fingerprint"] == other["fingerprint"] != make_spec_of(weights="v")["fingerprint"]
    assert layout.set_folder(tmp_path, spec) == tmp_path / "sets" / "demo" / f"tiny@42-{spec['fingerprint'][:8]}"
    assert layout.set_name({**spec, "resolution": ""}) == "tiny"


def test_differences_names_the_leaves() -> None:
    assert layout.differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}) == [
        ("a.c", 2, 4),
        ("d", 3, None),
        ("e", None, 5),
    ]
