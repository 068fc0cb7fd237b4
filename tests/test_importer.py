"""Embeddings made elsewhere: what a file must hold, how its rows find their samples, which set they become."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_sets import contents, make_manifest, named

from featstore.datasets import manifest as manifests
from featstore.errors import ConfigError, ManifestError
from featstore.store import commits
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from featstore.store.importer import import_features
from featstore.store.verify import verify_set

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((12, 8)).astype(np.float32)
IDS = np.array(named(12))


def bring(tmp_path: Path, *, file: str = "f.npz", options: dict[str, Any] | None = None, **arrays: Any) -> FeatureSet:
    """Save arrays as an .npz, import it as demo/lab and open the set."""
    np.savez(tmp_path / file, **arrays)
    store, folder, _ = import_features(
        tmp_path / "store", tmp_path / file, dataset="demo", model="lab", **(options or {})
    )
    entry = next(entry for entry in store.entries() if entry.folder == folder)
    assert verify_set(store, entry, deep=True).ok
    return store.open(entry)


def register(tmp_path: Path, ids: list[str]) -> None:
    manifests.save(tmp_path / "store" / "datasets", make_manifest(ids))


@pytest.mark.parametrize(
    ("dtype", "stored"), [("f2", "float16"), ("f4", "float32"), ("f8", "float32"), (">f4", "float32")]
)
def test_rows_come_back_in_manifest_order(tmp_path: Path, dtype: str, stored: str) -> None:
    order = RNG.permutation(12)
    register(tmp_path, list(IDS))
    fs = bring(tmp_path, features=FEATURES[order].astype(dtype), ids=IDS[order])
    assert fs.cls.dtype == stored
    np.testing.assert_array_equal(fs.load("cls"), FEATURES.astype(stored))
    assert (fs.name, fs.summary()["weights"]) == ("demo/lab", "imported")
    assert fs.ok.all()


@pytest.mark.parametrize("ids", [IDS.astype("S"), np.arange(12), np.arange(12).astype(np.uint16)])
def test_a_data_set_that_is_not_registered_is_made_from_the_file(tmp_path: Path, ids: np.ndarray) -> None:
    texts = [value.decode() if isinstance(value, bytes) else str(value) for value in ids.tolist()]
    groups = np.array(["p1", "p2", ""] * 4)
    splits = np.array(["train", "valid", "test"] * 4)
    grade = np.arange(12.0)
    fs = bring(tmp_path, features=FEATURES, ids=ids, patient_id=groups, split=splits, grade=grade)
    assert fs.manifest.column("id") == texts
    assert fs.manifest.column("group") == ["p1", "p2", None] * 4
    assert fs.manifest.column("split") == ["train", "val", "test"] * 4
    assert fs.manifest.column("grade") == [str(value) for value in grade]
    assert fs.manifest.meta["adapter"] == "import"
    np.testing.assert_array_equal(fs.load("cls"), FEATURES)


def test_without_a_split_one_is_drawn_by_group(tmp_path: Path) -> None:
    fs = bring(tmp_path, features=FEATURES, id=IDS, patient_id=np.array(["a", "b", "c"] * 4))
    parts = {group: set() for group in "abc"}  # type: ignore[var-annotated]
    for group, split in zip(fs.manifest.column("group"), fs.manifest.column("split")):
        parts[group].add(split)
    assert all(len(found) == 1 for found in parts.values())


def test_samples_that_the_file_lacks_are_failed(tmp_path: Path) -> None:
    register(tmp_path, [*IDS, "extra", "more"])
    fs = bring(tmp_path, features=FEATURES, ids=IDS)
    assert fs.failures == {12: "not in the imported file", 13: "not in the imported file"}
    loaded = fs.load("cls")
    np.testing.assert_array_equal(loaded[:12], FEATURES)
    assert np.isnan(loaded[12:]).all()


def test_the_same_file_again_adds_nothing_and_other_features_make_another_set(tmp_path: Path) -> None:
    fs = bring(tmp_path, features=FEATURES, ids=IDS)
    before = contents(tmp_path / "store")
    order = RNG.permutation(12)
    assert bring(tmp_path, features=FEATURES[order], ids=IDS[order]).fingerprint == fs.fingerprint
    assert contents(tmp_path / "store") == before
    changed = FEATURES.copy()
    changed[3, 3] += 1
    prints = {fs.fingerprint}
    variants = {
        "other number": (changed, IDS),
        "other type": (FEATURES.astype("f2"), IDS),
        "fewer rows": (FEATURES[:11], IDS[:11]),
        "other owners": (FEATURES, IDS[::-1]),
    }
    for name, (features, ids) in variants.items():
        other = bring(tmp_path, features=features, ids=ids)
        assert other.fingerprint not in prints, name
        prints.add(other.fingerprint)
    np.testing.assert_array_equal(fs.load("cls"), FEATURES)


def test_a_grown_data_set_keeps_its_imported_set(tmp_path: Path) -> None:
    register(tmp_path, list(IDS))
    first = bring(tmp_path, features=FEATURES, ids=IDS)
    manifests.save(tmp_path / "store" / "datasets", make_manifest(["new", *IDS], sizes=[99, *range(100, 112)]))
    grown = bring(tmp_path, features=FEATURES, ids=IDS)
    assert grown.folder == first.folder
    assert grown.failures == {0: "not in the imported file"}
    np.testing.assert_array_equal(grown.load("cls")[1:], FEATURES)


def test_an_import_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(commits, "finish_block", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bring(tmp_path, features=FEATURES, ids=IDS)
    assert list((tmp_path / "store").rglob("*.intent"))
    np.testing.assert_array_equal(bring(tmp_path, features=FEATURES, ids=IDS).load("cls"), FEATURES)
    assert not list((tmp_path / "store").rglob("*.intent"))


def test_paths_match_samples_too(tmp_path: Path) -> None:
    register(tmp_path, list(IDS))
    np.testing.assert_array_equal(bring(tmp_path, features=FEATURES[::-1], path=IDS[::-1]).load("cls"), FEATURES)
    options = {"features_key": "x", "ids_key": "name"}
    assert bring(tmp_path, x=FEATURES, name=IDS, options=options).ok.all()


class Unpickled:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no features": (
        {"ids": IDS},
        r"needs an array 'features' \(--features-key\) and one of id, ids, path, paths .* it has ids",
    ),
    "no ids": ({"features": FEATURES}, r"one of id, ids, path, paths \(--ids-key\); it has features"),
    "objects": (
        {"features": FEATURES, "ids": np.array([Unpickled()] * 12)},
        "not an .npz of plain arrays .*; objects are never",
    ),
    "one axis": (
        {"features": FEATURES[0], "ids": IDS[:8]},
        r"floats of shape \(N, D\) with one id a row; got float32 \(8,\)",
    ),
    "integers": ({"features": FEATURES.astype(int), "ids": IDS}, r"floats of shape \(N, D\).* got int64"),
    "other length": ({"features": FEATURES[:5], "ids": IDS}, r"got float32 \(5, 8\) and 12 ids"),
    "empty": ({"features": FEATURES[:0], "ids": IDS[:0]}, r"got float32 \(0, 8\) and 0 ids"),
    "float ids": (
        {"features": FEATURES, "ids": np.arange(12.0)},
        "'ids' must be one text or integer a row; got float64",
    ),
    "two axes of ids": (
        {"features": FEATURES, "ids": IDS[:, None]},
        r"'ids' must be one text or integer a row; .* \(12, 1\)",
    ),
    "twice": (
        {"features": FEATURES, "ids": np.array(["a"] * 12)},
        "ids must be unique; 1 occur more than once, such as a",
    ),
    "blank": ({"features": FEATURES, "ids": np.array(["a", *[""] * 11])}, "every sample needs an id; row 2 has none"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_cannot_be_imported_are_told_and_leave_nothing(tmp_path: Path, case: str) -> None:
    arrays, message = BAD[case]
    with pytest.raises(ManifestError, match=message):
        bring(tmp_path, **arrays)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_rows_that_are_not_finite_are_named(tmp_path: Path, bad: float) -> None:
    features = FEATURES.astype(np.float64)
    features[[4, 7], 2] = bad
    message = r"2 rows hold NaN, infinity or a number beyond float32, such as row 5 \('s0004'\); leave samples without"
    with pytest.raises(ManifestError, match=message):
        bring(tmp_path, features=features, ids=IDS)


def test_unknown_ids_are_told(tmp_path: Path) -> None:
    register(tmp_path, list(IDS[:10]))
    message = r"2 of its 12 ids are no samples of 'demo': 's0010' is not, 's0000' would be; check --ids-key"
    with pytest.raises(ManifestError, match=message):
        bring(tmp_path, features=FEATURES, ids=IDS)


@pytest.mark.parametrize("model", ["../up", "a/b", "", ".hidden", "a@b"])
def test_names_that_cannot_be_part_of_a_sets_name_are_refused(tmp_path: Path, model: str) -> None:
    np.savez(tmp_path / "f.npz", features=FEATURES, ids=IDS)
    with pytest.raises(ConfigError, match=r"--model is letters, digits, .* for imported features, got '"):
        import_features(tmp_path / "store", tmp_path / "f.npz", dataset="demo", model=model)


def write_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, FEATURES)


def write_foreign(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("features", "text")


def write_truncated(path: Path) -> None:
    np.savez(path, features=FEATURES, ids=IDS)
    path.write_bytes(path.read_bytes()[:-30])


def write_damaged(path: Path) -> None:
    np.savez_compressed(path, features=FEATURES, ids=IDS)
    raw = bytearray(path.read_bytes())
    raw[200:210] = b"\0" * 10
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "write",
    [
        write_npy,
        write_foreign,
        write_truncated,
        write_damaged,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("x"),
    ],
    ids=["npy", "foreign", "truncated", "damaged", "empty", "text"],
)
def test_files_that_are_no_npz_are_told(tmp_path: Path, write: Any) -> None:
    write(tmp_path / "f.npz")
    with pytest.raises(
        ManifestError, match=r"f.npz: not an .npz of plain arrays \(.*\); (objects are never|save it by)"
    ):
        import_features(tmp_path / "store", tmp_path / "f.npz", dataset="demo", model="lab")


def test_an_absent_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"f.npz: no such file; import takes an .npz with features and ids"):
        import_features(tmp_path / "store", tmp_path / "f.npz", dataset="demo", model="lab")


def test_imports_stand_beside_each_other_in_the_listing(tmp_path: Path) -> None:
    bring(tmp_path, features=FEATURES, ids=IDS)
    bring(tmp_path, features=FEATURES + 1, ids=IDS)
    names = Store(tmp_path / "store").sets()
    assert len(names) == 2
    assert all(name.startswith("demo/lab-") for name in names)
