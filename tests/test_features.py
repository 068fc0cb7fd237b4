"""A set as it is read: numpy's indexing on disk, states of rows, pooling."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sets import (
    CLS,
    PATCHES,
    make_manifest,
    make_spec_of,
    named,
    prepare,
    states_of,
    values_of,
    write_block,
    write_missing,
    writer_of,
)

from featstore.datasets.manifest import Manifest
from featstore.errors import ConfigError, IncompleteError, UnknownNameError
from featstore.store import features as module
from featstore.store.commits import RowState
from featstore.store.features import FeatureSet, RowArray
from featstore.store.layout import ArraySpec

COUNT = 21
ROWS = np.random.default_rng(0).permutation(np.r_[0:13, 16:24])  # manifest row -> row of the arrays


@pytest.fixture(scope="module")
def permuted(tmp_path_factory: pytest.TempPathFactory) -> RowArray:
    """`patches` of a manifest that lists its samples in another order than they were computed in, with a gap."""
    root = tmp_path_factory.mktemp("set")
    spec = make_spec_of(block_rows=8)
    names, sizes = [f"s{row}" for row in range(24)], list(range(100, 124))
    first = make_manifest(names[:13], sizes=sizes[:13])
    folder = prepare(root, spec, first, [PATCHES])
    mixed = make_manifest([names[row] for row in ROWS], sizes=[sizes[row] for row in ROWS])
    prepare(root, spec, mixed, [PATCHES])
    write_missing(folder, 1, block_rows=8)
    return FeatureSet(folder, mixed).patches


@pytest.fixture(scope="module")
def matrix(permuted: RowArray) -> np.ndarray:
    rows: np.ndarray = values_of(PATCHES, 0, 24, 1)[permuted.rows]
    return rows


def test_load_and_array_follow_the_manifest(permuted: RowArray, matrix: np.ndarray) -> None:
    assert not np.array_equal(permuted.rows, np.sort(permuted.rows))
    np.testing.assert_array_equal(permuted.load(verify=True), matrix)
    np.testing.assert_array_equal(np.asarray(permuted), matrix)
    assert np.asarray(permuted, dtype=np.float64).dtype == np.float64
    assert (permuted.shape, permuted.dtype, len(permuted)) == ((COUNT, 3, 8), np.float16, COUNT)
    assert repr(permuted) == "<demo/tiny@42:patches (21, 3, 8) float16>"
    with pytest.raises(ValueError, match="always copied into memory; drop copy=False"):
        np.array(permuted, copy=False)


slices = st.slices(COUNT)
firsts = (
    st.integers(-COUNT, COUNT - 1)
    | slices
    | st.lists(st.integers(-COUNT, COUNT - 1), max_size=6)
    | st.lists(st.booleans(), min_size=COUNT, max_size=COUNT).map(np.array)
    | st.lists(st.integers(-COUNT, COUNT - 1), min_size=6, max_size=6).map(lambda rows: np.array(rows).reshape(2, 3))
)
seconds = st.integers(-3, 2) | st.slices(3) | st.lists(st.integers(-3, 2), min_size=2, max_size=2) | st.just(...)
keys = (
    firsts
    | st.just(...)
    | st.tuples(firsts)
    | st.tuples(firsts, seconds)
    | st.tuples(st.just(...), seconds.filter(lambda k: k is not ...))
)
deep_keys = st.tuples(firsts, st.integers(-3, 2) | st.slices(3), st.slices(8) | st.integers(-8, 7))


@settings(max_examples=300, deadline=None)
@given(keys | deep_keys)
def test_indexing_is_that_of_numpy(permuted: RowArray, matrix: np.ndarray, key: Any) -> None:
    if isinstance(key, list) and not key:
        assert permuted[key].shape == (0, 3, 8)
        return
    try:
        wanted = matrix[key]
    except IndexError:
        with pytest.raises(IndexError):
            permuted[key]
        return
    np.testing.assert_array_equal(permuted[key], wanted)


@pytest.mark.parametrize(
    "key", [COUNT, -COUNT - 1, [COUNT], np.ones(COUNT + 1, bool), (slice(None), 3), 1.5, "cls", None]
)
def test_wrong_indices_are_index_errors(permuted: RowArray, key: Any) -> None:
    with pytest.raises(IndexError):
        permuted[key]


def test_contiguous_rows_are_read_as_a_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_manifest(named(20))
    folder = prepare(tmp_path, make_spec_of(), manifest, [CLS])
    write_missing(folder, 1, block_rows=16)
    array = FeatureSet(folder, manifest).cls

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(type(array.array), "gather", never)
    np.testing.assert_array_equal(array.load(), values_of(CLS, 0, 20, 1))


def half_done(tmp_path: Path) -> FeatureSet:
    """40 samples in blocks of 16: the first committed with two failures, the second not in `patches`, the third not."""
    manifest = make_manifest(named(40))
    folder = prepare(tmp_path, make_spec_of(), manifest, [CLS])
    prepare(tmp_path, make_spec_of(), manifest, [PATCHES])
    for group in ("cls", "patches"):
        with writer_of(folder, group, 0) as writer:
            rows = {array.name: values_of(array, 0, 16, 1).copy() for array in writer.arrays}
            states = states_of(16, 1)
            for row in (3, 5):
                rows[group][row] = np.nan
                states[row] = RowState("0" * 32, "not an image")
            writer.append(rows, states)
            writer.commit()
    write_block(folder, "cls", 1, 1)
    return FeatureSet(folder, manifest)


def test_states_say_what_became_of_each_sample(tmp_path: Path) -> None:
    fs = half_done(tmp_path)
    wanted = ["ok"] * 16 + ["pending"] * 24
    wanted[3] = wanted[5] = "failed"
    assert fs.rows.column("state").to_pylist() == wanted
    assert fs.rows.column("reason").to_pylist() == ["not an image" if state == "failed" else None for state in wanted]
    assert fs.failures == {3: "not an image", 5: "not an image"}
    assert fs.ok.tolist() == [state == "ok" for state in wanted]
    assert fs.pending("cls").sum() == 8
    summary = fs.summary()
    assert [summary[key] for key in ("samples", "ok", "failed", "pending")] == [40, 14, 2, 24]
    assert summary["arrays"] == {"cls": [8], "patches": [3, 8]}
    np.testing.assert_array_equal(fs.cls[:32][fs.ok[:32]], values_of(CLS, 0, 32, 1)[fs.ok[:32]])
    message = (
        "demo/tiny@42:cls: 8 of the rows asked for are not extracted yet; run the same `featstore extract` again, or"
    )
    with pytest.raises(IncompleteError, match=message):
        fs.cls.load()
    with pytest.raises(IncompleteError, match="1 of the rows asked for"):
        fs.cls[39]


def test_a_set_that_is_open_sees_new_commits_and_their_failures(tmp_path: Path) -> None:
    fs = half_done(tmp_path)
    assert fs.failures.keys() == {3, 5}
    for group in ("cls", "patches"):
        with writer_of(fs.folder, group, 2) as writer:
            rows = {array.name: values_of(array, 32, 40, 1).copy() for array in writer.arrays}
            rows[group][0] = np.nan
            writer.append(rows, [RowState("0" * 32, "late"), *states_of(7, 1)])
            writer.commit()
    assert fs.failures == {3: "not an image", 5: "not an image", 32: "late"}
    assert fs.ok[32:].tolist() == [False] + [True] * 7
    assert fs.rows.column("state").to_pylist()[32] == "failed"


def test_names_that_a_set_does_not_have_are_told(tmp_path: Path) -> None:
    fs = half_done(tmp_path)
    with pytest.raises(UnknownNameError, match=r"demo/tiny@42 has no 'mean_patch'; it has cls, patches; .* adds more"):
        fs.load()
    with pytest.raises(AttributeError, match="a feature set has no attribute 'embeddings'; arrays: cls, mean_patch"):
        _ = fs.embeddings
    (fs.folder / "data.zarr" / "cls" / "zarr.json").unlink()
    with pytest.raises(IncompleteError, match=r"demo/tiny@42:cls has no zarr.json yet; run the same"):
        _ = fs.cls


def test_html_is_escaped(tmp_path: Path) -> None:
    manifest = make_manifest(named(3))
    folder = prepare(tmp_path, make_spec_of(model="<b>&x"), manifest, [CLS])
    text = FeatureSet(folder, manifest)._repr_html_()
    assert "<b>" not in text
    assert text.count("&lt;b&gt;&amp;x") == 2
    assert "pending" in text
    assert repr(FeatureSet(folder, manifest)) == "<FeatureSet demo/<b>&x@42 3 samples: cls>"


@pytest.mark.parametrize("num_registers", [0, 2])
@pytest.mark.parametrize("pool_bytes", [1, 2000, 2**30])
def test_mean_all_is_the_mean_over_all_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_registers: int, pool_bytes: int
) -> None:
    monkeypatch.setattr(module, "POOL_BYTES", pool_bytes)
    registers = ArraySpec(name="registers", row_shape=(2, 8), dtype="float16")
    arrays = [CLS, registers, PATCHES][:: 1 if num_registers else 2]
    manifest = make_manifest(named(37))
    folder = prepare(tmp_path, make_spec_of(architecture={"num_registers": num_registers}), manifest, arrays)
    write_missing(folder, 1, block_rows=16)
    parts = [values_of(array, 0, 37, 1).reshape(37, -1, 8).astype(np.float64) for array in arrays]
    found = FeatureSet(folder, manifest).load("mean_all", verify=True)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.concatenate(parts, axis=1).mean(1), rtol=1e-5, atol=1e-6)


def test_mean_all_asks_for_the_registers_that_the_model_has(tmp_path: Path) -> None:
    manifest = make_manifest(named(3))
    folder = prepare(tmp_path, make_spec_of(architecture={"num_registers": 4}), manifest, [CLS, PATCHES])
    write_missing(folder, 1, block_rows=16)
    with pytest.raises(UnknownNameError, match="has no 'registers'"):
        FeatureSet(folder, manifest).load("mean_all")


def test_mean_all_needs_a_token_that_is_not_pooled(tmp_path: Path) -> None:
    manifest = make_manifest(named(3))
    facts = {"num_registers": 0, "summary": "pool"}
    folder = prepare(tmp_path, make_spec_of(architecture=facts), manifest, [CLS, PATCHES])
    write_missing(folder, 1, block_rows=16)
    with pytest.raises(ConfigError, match=r"mean_all is the mean over CLS, .* no CLS token: its cls is what it pools"):
        FeatureSet(folder, manifest).load("mean_all")


def test_joined_features_stand_side_by_side(tmp_path: Path) -> None:
    manifest = make_manifest(named(20))
    folder = prepare(tmp_path, make_spec_of(), manifest, [CLS, PATCHES])
    write_missing(folder, 1, block_rows=16)
    wanted = np.concatenate([values_of(CLS, 0, 20, 1), values_of(PATCHES, 0, 20, 1).reshape(20, -1)], axis=1)
    np.testing.assert_array_equal(FeatureSet(folder, manifest).load("cls+patches"), wanted)


def test_an_empty_selection_and_no_samples(tmp_path: Path) -> None:
    manifest = make_manifest(named(5))
    folder = prepare(tmp_path, make_spec_of(), manifest, [CLS])
    write_missing(folder, 1, block_rows=16)
    none = Manifest(name="demo", table=manifest.table.slice(0, 0), digest="0" * 64, meta={})
    prepare(tmp_path, make_spec_of(), none, [CLS])
    fs = FeatureSet(folder, none)
    assert fs.load("cls").shape == (0, 8)
    assert fs.summary()["samples"] == len(fs) == 0
    assert FeatureSet(folder, manifest).cls[[]].shape == (0, 8)
