"""What `diff` says of two sets, against numbers computed here from the rows themselves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sets import CLS, PATCHES, make_manifest, make_spec_of, named, prepare, values_of, write_block, writer_of

from cli import exchange
from featstore.errors import ConfigError, IncompleteError
from featstore.store import diff as diffs
from featstore.store.catalog import Store
from featstore.store.commits import RowState
from featstore.store.diff import ArrayDiff, SetDiff, diff_sets, parity_of, row_cosines, row_differences
from featstore.store.features import FeatureSet
from featstore.store.layout import ArraySpec

GROUP = "cls+patches"


def make(root: Path, ids: list[str], blocks: list[int], **options: Any) -> FeatureSet:
    """A set of these samples whose blocks are committed with the values of seed 1, times `scale`."""
    scale, noise, failed = options.pop("scale", 1.0), options.pop("noise", 0.0), options.pop("failed", ())
    arrays = options.pop("arrays", [CLS, PATCHES])
    folder = prepare(root, make_spec_of(**options), make_manifest(ids, sizes=[1] * len(ids)), arrays)
    group = "+".join(array.name for array in arrays)
    for block in blocks:
        with writer_of(folder, group, block) as writer:
            rng = np.random.default_rng(5)
            rows = {array.name: values_of(array, writer.start, writer.stop, 1) * scale for array in arrays}
            rows = {
                name: (values * (1 + noise * rng.standard_normal(values.shape))).astype(values_of(CLS, 0, 1, 1).dtype)
                for name, values in rows.items()
            }
            states = [RowState("0" * 32, "bad" if row in failed else None) for row in range(writer.start, writer.stop)]
            for row in failed:
                if writer.start <= row < writer.stop:
                    for values in rows.values():
                        values[row - writer.start] = np.nan
            writer.append(rows, states)
            writer.commit()
    return Store(root)["demo", "tiny"]


def by_name(found: SetDiff) -> dict[str, ArrayDiff]:
    return {array.name: array for array in found.arrays}


def test_equal_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffs, "PIECE_BYTES", 100)  # a few rows a piece
    a, b = (make(tmp_path / name, named(19), [0, 1]) for name in "ab")
    seen: list[int] = []
    found = diff_sets(a, b, advance=seen.append)
    assert (found.verdict, found.common, found.num_only_first, found.num_only_second) == ("equal", 19, 0, 0)
    assert sum(seen) == 2 * 19
    assert len(seen) > 4
    for array in found.arrays:
        assert (array.rows, array.identical, array.max_relative, array.verdict) == (19, 19, 0.0, "equal")
        assert array.min_cosine == pytest.approx(1)
        assert array.worst is None


@pytest.mark.parametrize(("noise", "verdict"), [(1e-3, "within parity"), (3e-2, "different")])
def test_numbers_are_those_of_the_rows(
    tmp_path: Path, noise: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffs, "PIECE_BYTES", 100)
    a, b = make(tmp_path / "a", named(19), [0, 1]), make(tmp_path / "b", named(19), [0, 1], noise=noise)
    found = diff_sets(a, b)
    assert found.verdict == verdict
    for name in ("cls", "patches"):
        x, y = (item.load(name).astype(np.float64).reshape(19, -1) for item in (a, b))
        relative = [np.sqrt(((p - q) ** 2).sum() / (p**2).sum()) for p, q in zip(x, y)]
        cosine = [(p @ q) / np.sqrt((p @ p) * (q @ q)) for p, q in zip(x, y)]
        array = by_name(found)[name]
        assert array.max_relative == pytest.approx(max(relative))
        assert array.mean_relative == pytest.approx(np.mean(relative))
        assert array.worst == f"s{int(np.argmax(relative)):04d}"
        assert (array.min_cosine, array.mean_cosine) == (pytest.approx(min(cosine)), pytest.approx(np.mean(cosine)))
        assert array.identical == int((x == y).all(1).sum())
        assert (array.verdict, array.tolerance) == (verdict, 5e-3)


def test_samples_are_matched_by_id_across_manifests(tmp_path: Path) -> None:
    a = make(tmp_path / "a", named(16), [0])
    b = make(tmp_path / "b", [*named(3, 100), *named(13)], [0])  # s0000 stands in row 3
    found = diff_sets(a, b)
    assert (found.common, found.num_only_first, found.num_only_second) == (13, 3, 3)
    assert (found.only_first, found.only_second) == (["s0013", "s0014", "s0015"], ["s0100", "s0101", "s0102"])
    assert found.verdict == "different"
    x, y = a.load("cls")[:13], b.load("cls")[3:]
    assert by_name(found)["cls"].max_relative == pytest.approx(row_differences(x, y).max())
    again = diff_sets(make(tmp_path / "c", [*named(3, 100), *named(13)], [0]), b)
    assert again.verdict == "equal"


def test_only_rows_that_both_have_are_compared(tmp_path: Path) -> None:
    a = make(tmp_path / "a", named(40), [0, 1, 2], failed=(3,))
    b = make(tmp_path / "b", named(40), [0, 1], failed=(5,))
    found = diff_sets(a, b)
    assert (found.failed_in_one, found.pending_in_one, found.verdict) == (2, 8, "different")
    assert [(array.rows, array.verdict) for array in found.arrays] == [(30, "equal")] * 2
    same = diff_sets(a, make(tmp_path / "c", named(40), [0, 1, 2], failed=(3,)))
    assert (same.failed_in_one, same.pending_in_one, same.verdict) == (0, 0, "equal")


def test_arrays_on_one_side_or_of_another_shape_are_told(tmp_path: Path) -> None:
    wide = ArraySpec(name="cls", row_shape=(12,), dtype="float16")
    a, b = make(tmp_path / "a", named(5), [0]), make(tmp_path / "b", named(5), [0], arrays=[wide])
    found = by_name(diff_sets(a, b))
    assert found["cls"].problem == "rows have shapes (8,) and (12,)"
    assert found["patches"].problem == "only in the first set"
    assert by_name(diff_sets(b, a))["patches"].problem == "only in the second set"
    assert {array.verdict for array in found.values()} == {"different"}


def test_nothing_to_compare_is_told(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", named(40), [0]), make(tmp_path / "b", named(40), [1])
    with pytest.raises(IncompleteError, match="40 samples in common, none of them extracted in both"):
        diff_sets(a, b)


def test_tolerance_follows_the_compute_dtype(tmp_path: Path) -> None:
    a = make(tmp_path / "a", named(5), [0])
    b = make(tmp_path / "b", named(5), [0], compute_dtype="bfloat16", noise=1e-2)
    assert (parity_of(a.spec), parity_of(b.spec)) == (5e-3, 5e-2)
    assert (diff_sets(a, b).verdict, diff_sets(a, b).tolerance) == ("within parity", 5e-2)


def test_rows_that_are_not_finite_are_infinitely_far() -> None:
    good, bad = np.ones((2, 3), np.float32), np.array([[1, 1, 1], [1, np.nan, 1]], np.float32)
    assert row_differences(good, bad).tolist() == [0, np.inf]
    assert row_differences(bad, good).tolist() == [0, np.inf]
    assert row_cosines(np.zeros((1, 3)), np.zeros((1, 3))).tolist() == [1.0]
    assert row_cosines(np.array([[1.0, 0]]), np.array([[0, 2.0]])).tolist() == [0.0]


def test_seeds_differ(tmp_path: Path) -> None:
    """Other rows throughout: the cosine says so too."""
    a = make(tmp_path / "a", named(16), [0])
    folder = prepare(tmp_path / "b", make_spec_of(), make_manifest(named(16), sizes=[1] * 16), [CLS, PATCHES])
    write_block(folder, GROUP, 0, 2)
    found = by_name(diff_sets(a, Store(tmp_path / "b")["demo", "tiny"]))["cls"]
    assert found.min_cosine < 0
    assert found.max_relative > 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, noise in (("a", 0.0), ("b", 1e-3), ("c", 3e-2)):
        make(tmp_path / name, named(19), [0, 1], noise=noise)
    exchange.diff("demo/tiny", other=str(tmp_path / "b"), store=str(tmp_path / "a"))
    printed = capsys.readouterr().out
    assert ": within parity\n  19 samples in both\n" in printed
    with pytest.raises(SystemExit) as stopped:
        exchange.diff("demo/tiny", "demo/tiny@42", other=str(tmp_path / "c"), store=str(tmp_path / "a"), json=True)
    assert stopped.value.code == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "different"
    with pytest.raises(ConfigError, match="diff needs a second set, or --other STORE with the same set in another"):
        exchange.diff("demo/tiny", store=str(tmp_path / "a"))


def test_the_command_says_what_is_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", named(16), [0], failed=(2,))
    make(tmp_path / "b", named(33, 1), [0], arrays=[CLS])
    with pytest.raises(SystemExit):
        exchange.diff("demo/tiny", other=str(tmp_path / "b"), store=str(tmp_path / "a"))
    printed = capsys.readouterr().out
    for text in ("15 samples in both", "1 samples only in the first, such as s0000", "18 samples only in the second"):
        assert text in printed
    assert "1 samples failed in one only" in printed
    assert "only in the first set" in printed
