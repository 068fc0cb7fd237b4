"""Imported, random and real weights never share a name: by extraction, rename, move or merge, in every direction."""

import shutil
from pathlib import Path

import pytest
from tiny_sets import CLS, make_manifest, make_spec_of, named, prepare, write_missing

from cli.maintenance import mv
from featstore import files
from featstore.backbones import describe
from featstore.backbones.catalogue import check_new_name, check_set_name
from featstore.backbones.tiny import FOLDER as TINY_FOLDER
from featstore.configs import SetConfig
from featstore.errors import ConfigError
from featstore.extraction.plan import check_name
from featstore.store.catalog import Store
from featstore.store.kinds import SAID, Kind, kind_of
from featstore.store.merge import merge
from featstore.store.moving import move_set, rename_set

KINDS: tuple[Kind, ...] = ("imported", "random", "real")
PAIRS = [(a, b) for a in KINDS for b in KINDS if a != b]
MANIFEST = make_manifest(named(20))


def new_set(root: Path, kind: Kind, model: str) -> Path:
    """A whole set of `demo` whose numbers are said to come from there."""
    spec = make_spec_of(model=model, weights=f"of {kind} {model}")
    spec["weights"] = {"kind": {"imported": "imported", "random": "random", "real": "hub"}[kind], "model": "net"}
    spec["random_weights"] = kind == "random"
    folder = prepare(root, spec, MANIFEST, [CLS])
    write_missing(folder, 1, block_rows=16)
    return folder


def names(root: Path) -> list[tuple[str, str]]:
    return sorted((entry.name, kind_of(entry.spec)) for entry in Store(root).entries())


@pytest.mark.parametrize(("held", "coming"), PAIRS)
def test_a_rename_does_not_mix_kinds(held: Kind, coming: Kind, tmp_path: Path) -> None:
    new_set(tmp_path, held, "a")
    new_set(tmp_path, coming, "b")
    before = names(tmp_path)
    with pytest.raises(
        ConfigError, match=f"a: demo/a@42 in .* holds {SAID[held]}, these are of {SAID[coming]}; choose another name"
    ):
        rename_set(Store(tmp_path).entry("demo/b"), "demo/a")
    assert names(tmp_path) == before
    rename_set(Store(tmp_path).entry("demo/b"), "demo/c")
    rename_set(Store(tmp_path).entry("demo/c"), "demo/c")  # its own name is no other's
    assert names(tmp_path) == sorted([("demo/a@42", held), ("demo/c@42", coming)])


@pytest.mark.parametrize("kind", ["imported", "real"])
def test_a_rename_does_not_say_random(kind: Kind, tmp_path: Path) -> None:
    new_set(tmp_path, kind, "a")
    with pytest.raises(ConfigError, match="a-random: names that end in -random are those of random weights; choose an"):
        rename_set(Store(tmp_path).entry("demo/a"), "demo/a-random")
    new_set(tmp_path, "random", "b")
    rename_set(Store(tmp_path).entry("demo/b"), "demo/b-random")
    assert names(tmp_path) == [("demo/a@42", kind), ("demo/b-random@42", "random")]


@pytest.mark.parametrize(("held", "coming"), PAIRS)
def test_a_move_to_another_store_does_not_mix_kinds(held: Kind, coming: Kind, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    new_set(there, held, "a")
    new_set(here, coming, "a")
    store = Store(here)
    with pytest.raises(ConfigError, match=rf"holds {SAID[held]}, these are .*; rename it first: `featstore mv demo/a@"):
        move_set(store, store.entry("demo/a"), there)
    assert (names(here), names(there)) == ([("demo/a@42", coming)], [("demo/a@42", held)])
    rename_set(store.entry("demo/a"), "demo/b")
    move_set(store, store.entry("demo/b"), there)
    assert names(there) == sorted([("demo/a@42", held), ("demo/b@42", coming)])


@pytest.mark.parametrize(("held", "coming"), PAIRS)
def test_a_merge_does_not_mix_kinds(held: Kind, coming: Kind, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    new_set(there, held, "b")
    new_set(here, "real", "a")
    new_set(here, coming, "b")
    advice = r"rename one of them first: `featstore mv demo/b@42-\w+ demo/NEW`"
    with pytest.raises(ConfigError, match=f"holds {SAID[held]}, these are of {SAID[coming]}; {advice}"):
        merge(Store(here), there, [])
    assert names(there) == [("demo/b@42", held)]  # nothing came of the set before it either
    merge(Store(here), there, ["demo/a"])
    rename_set(Store(here).entry("demo/b"), "demo/c")
    merge(Store(here), there, [])
    merge(Store(here), there, [])  # what is there already is no other set
    assert names(there) == sorted([("demo/a@42", "real"), ("demo/b@42", held), ("demo/c@42", coming)])


def test_a_merge_does_not_mix_what_comes(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    new_set(here, "real", "a")
    new_set(here, "imported", "a")  # of a store from before names were watched
    with pytest.raises(ConfigError, match=r"demo/a@42-\w+ holds .* and demo/a@42-\w+ .* under one name; rename one of"):
        merge(Store(here), there, [])
    assert not there.exists()
    new_set(tmp_path / "old", "imported", "x-random")
    with pytest.raises(ConfigError, match="x-random: names that end in -random are those of random weights; rename"):
        merge(Store(tmp_path / "old"), there, [])
    assert not there.exists()


# Names that the user gives


def test_a_folder_called_random_holds_real_weights(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY_FOLDER, tmp_path / "net-random")
    source, store = describe(f"hf:{folder}"), Store(tmp_path / "store")
    with pytest.raises(ConfigError, match="net-random: names that end in -random are those of random weights; give an"):
        check_name(store, "x", SetConfig(model=f"hf:{folder}", res="42"), source)
    check_name(store, "x", SetConfig(model=f"hf:{folder}", res="42", name="net"), source)
    check_name(store, "x", SetConfig(model="tiny-random", res="42"), describe("tiny-random"))
    check_name(store, "x", SetConfig(model=f"hf:{folder}", res="42"), describe(f"hf:{folder}", random_weights=0))


@pytest.mark.parametrize(
    ("model", "seed", "name", "whose"),
    [
        ("dinov2-base", 0, "dinov2-base", "a backbone of this package"),
        ("dinov2-base", 0, "DINOv2_vitb14", "another name of the backbone dinov2-base"),
        ("tiny", None, "dinov3-7b", "a backbone of this package"),
        ("tiny", 1, "dinov2-base-random", "the backbone dinov2-base with random weights"),
        (f"hf:{TINY_FOLDER}", None, "uni", "a backbone of this package"),
    ],
)
def test_another_backbones_name_is_not_free(model: str, seed: int | None, name: str, whose: str) -> None:
    with pytest.raises(ConfigError, match=f"--name {name}: {name} is {whose}, .*; choose another name, or leave"):
        check_set_name(name, describe(model, random_weights=seed))


@pytest.mark.parametrize(
    ("model", "seed", "name"),
    [
        ("tiny", None, "tiny"),
        ("tiny", 3, "tiny-random"),
        ("tiny-random", None, "tiny-random"),
        ("dinov2-base", 0, "dinov2-base-random"),
        ("dinov2-base", 0, "dinov2_vitb14-random"),
        ("dinov2-base", 0, "mine"),
        ("tiny", None, "mine"),
    ],
)
def test_its_own_name_and_new_ones_are_free(model: str, seed: int | None, name: str) -> None:
    check_set_name(name, describe(model, random_weights=seed))


def test_renames_do_not_take_a_backbones_name(tmp_path: Path) -> None:
    folder = new_set(tmp_path, "imported", "a")
    with pytest.raises(ConfigError, match=r"uni is a backbone of this package, .*; choose another name"):
        mv("demo/a", "demo/uni", store=str(tmp_path))
    assert names(tmp_path) == [("demo/a@42", "imported")]
    spec = files.unseal((folder / "spec.json").read_bytes(), folder / "spec.json")
    real = {**spec, "model": "mine", "weights": {"kind": "hub", "repo": "facebook/dinov2-base", "model": "dinov2-base"}}
    check_new_name("dinov2-base", real)
    check_new_name("dinov2_vitb14", real)
    with pytest.raises(ConfigError, match="vit-base is a backbone of this package"):
        check_new_name("vit-base", real)
    random = {**real, "weights": {"kind": "random", "model": "dinov2-base"}, "random_weights": True}
    check_new_name("dinov2-base-random", random)
    with pytest.raises(ConfigError, match="dinov2-base is a backbone of this package"):
        check_new_name("dinov2-base", random)
