"""The decoded cache: equal sets, nothing decoded twice, and a set of its own kind."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pictures import CONFIG, register_pictures, tree_bytes, write_pictures, write_table
from PIL import Image

from cli.extract import check_space
from cli.extract import extract as extract_command
from cli.running import run_plans
from featstore.configs import RunConfig, SetConfig
from featstore.errors import ConfigError, FeatstoreError, ManifestError, StoreError
from featstore.extraction import decoded_cache, loader
from featstore.extraction.decoded_cache import Cache, fill_cache, find_cache
from featstore.extraction.pipeline import Summary, extract
from featstore.extraction.plan import Plan, make_plan
from featstore.extraction.recheck import recheck
from featstore.images import PreprocessSpec
from featstore.inputs import Inputs
from featstore.register import register
from featstore.store.archive import archive_set
from featstore.store.catalog import Store
from featstore.store.gc import plan_gc
from featstore.store.verify import verify_set

TINY = SetConfig(model="tiny", res="42", block_rows=16)
OTHER = replace(TINY, name="other", random_weights=1)
RUN = RunConfig(batch_size=8, workers=2, device="cpu")
CACHED = replace(RUN, decoded_cache=True)


def plan_of(store: Path, config: SetConfig = TINY, run: RunConfig = RUN) -> Plan:
    return make_plan(Store(store), "pics", config, run)


def extracted(store: Path, config: SetConfig = TINY, run: RunConfig = CACHED) -> Summary:
    return extract(plan_of(store, config, run), run)


def bytes_of(store: Path, name: str) -> dict[str, bytes]:
    return tree_bytes(Store(store)["pics", name].folder)


def cache_of(store: Path) -> Cache:
    plan = plan_of(store)
    return find_cache(store, plan.manifest, plan.preprocess)


def decoded_in(lines: list[str]) -> int:
    return int(lines[0].split(" images decoded")[0])


def caches(store: Path) -> list[int]:
    """Channels of every cache there is."""
    specs = [entry.spec for entry in Store(store).entries("pics") if entry.spec["model"] == "decoded"]
    return sorted(spec["identity"]["channels"] for spec in specs)


def damage(root: Path, store: Path, rows: list[int]) -> None:
    paths = sorted((root / "images").iterdir())
    for row in rows:
        paths[row].write_bytes(b"no image")
    register(store, "pics", root, CONFIG)


def paint(root: Path, store: Path, rows: list[int]) -> None:
    """Make some pictures coloured."""
    paths = sorted((root / "images").iterdir())
    for row in rows:
        Image.fromarray(np.random.default_rng(row).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(paths[row])
    register(store, "pics", root, CONFIG)


@pytest.fixture
def pictures(tmp_path: Path, store_path: Path) -> Path:
    register_pictures(store_path, tmp_path / "data", 50)
    return tmp_path / "data"


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def poison() -> None:
        def refuse(*_: Any) -> None:
            raise AssertionError("an image was decoded")

        monkeypatch.setattr(loader, "load_images", refuse)

    return poison


@pytest.mark.parametrize("case", ["grey", "damaged", "coloured", "all"])
def test_sets_are_equal_with_and_without(pictures: Path, store_path: Path, tmp_path: Path, case: str) -> None:
    if case in ("damaged", "all"):
        damage(pictures, store_path, [0, 24, *range(32, 40), 49])
    if case in ("coloured", "all"):
        paint(pictures, store_path, [3, 47])
    other = tmp_path / "other"
    shutil.copytree(store_path / "datasets", other / "datasets")
    plain, cached = extracted(store_path, run=RUN), extracted(other)
    assert (plain.computed, plain.failed, plain.reasons) == (cached.computed, cached.failed, cached.reasons)
    assert bytes_of(store_path, "tiny@42") == bytes_of(other, "tiny@42")
    held = Store(other)["pics", "decoded@42"]
    assert held.array("pixels").shape == (50, 3 if case in ("coloured", "all") else 1, 42, 42)
    assert verify_set(Store(other), Store(other).entry("pics/decoded@42"), deep=True).ok


def test_a_second_backbone_decodes_nothing(
    pictures: Path, store_path: Path, no_decoding: Callable[[], None], tmp_path: Path
) -> None:
    damage(pictures, store_path, [7])
    assert "50 images decoded into pics/decoded@42" in extracted(store_path).notes[0]
    assert cache_of(store_path).new_bytes(retry_failed=False) == 0
    no_decoding()
    assert extracted(store_path, OTHER).notes[0].startswith("0 images decoded")
    assert Store(store_path)["pics", "other@42"].failures == Store(store_path)["pics", "tiny@42"].failures


def test_the_command_counts_what_it_decoded(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes: list[int] = []
    original = decoded_cache.fill_cache

    def counted(*given: Any, **options: Any) -> Any:
        passes.append(1)
        return original(*given, **options)

    monkeypatch.setattr(decoded_cache, "fill_cache", counted)
    for config, count in ((TINY, 50), (OTHER, 0)):
        (found,) = run_plans([plan_of(store_path, config)], CACHED, quiet=False)
        assert found["notes"] == [f"{count} images decoded into pics/decoded@42, from which all are read"]
        assert found["notes"][0] in capsys.readouterr().out
    assert len(passes) == 2
    assert run_plans([plan_of(store_path)], CACHED, quiet=True)[0]["samples"] == 0


def test_models_share_pixels_whatever_their_mean_and_std(store_path: Path, pictures: Path) -> None:
    manifest = plan_of(store_path).manifest
    half, third = (
        PreprocessSpec(geometry="squash", height=28, width=28, mean=(value,) * 3, std=(value,) * 3)
        for value in (0.5, 0.3)
    )
    assert find_cache(store_path, manifest, half).folder == find_cache(store_path, manifest, third).folder
    for other in ({"geometry": "letterbox"}, {"intensity": "minmax"}, {"width": 42}, {"decode": "scaled"}):
        changed: PreprocessSpec = replace(half, **other)
        assert find_cache(store_path, manifest, changed).folder != find_cache(store_path, manifest, half).folder


def test_colour_takes_over_what_the_grey_cache_holds(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded_cache, "MAX_BLOCK", 16)
    monkeypatch.setattr(decoded_cache, "BATCH", 8)
    paint(pictures, store_path, [40])
    decoded: list[int] = []
    original = loader.load_images

    def counted(*given: Any) -> Any:
        decoded.append(1)
        return original(*given)

    monkeypatch.setattr(loader, "load_images", counted)
    plan = plan_of(store_path)
    cache, _ = fill_cache(plan, CACHED)
    assert cache.channels == 3
    assert [entry.spec["identity"]["channels"] for entry in Store(store_path).entries("pics")] == [3]
    # The grey pass decodes all 50 and commits 32 of them; only the block of the coloured image is decoded again.
    assert len(decoded) <= 50 + 18
    pixels = Store(store_path)["pics", "decoded@42"].array("pixels").load()
    assert (pixels[:40] == pixels[:40, :1]).all()
    assert not (pixels[40] == pixels[40, :1]).all()
    coloured = Image.open(sorted((pictures / "images").iterdir())[40])
    assert abs(pixels[40].mean((1, 2)) - np.asarray(coloured).mean((0, 1))).max() < 1


def test_a_grown_data_set_decodes_what_is_new(pictures: Path, store_path: Path) -> None:
    extracted(store_path)
    write_table(pictures, write_pictures(pictures, 70))
    register(store_path, "pics", pictures, CONFIG)
    assert "20 images decoded" in extracted(store_path).notes[0]
    assert Store(store_path)["pics", "tiny@42"].ok.all()


def test_an_image_rewritten_in_place_is_not_served_from_the_cache(pictures: Path, store_path: Path) -> None:
    extracted(store_path)
    path = sorted((pictures / "images").iterdir())[5]
    shutil.copy(sorted((pictures / "images").iterdir())[6], path)
    with pytest.raises(ManifestError, match="register"):
        extracted(store_path, OTHER)
    register(store_path, "pics", pictures, CONFIG)
    assert "1 images decoded" in extracted(store_path, OTHER).notes[0]
    pixels = Store(store_path)["pics", "decoded@42"].array("pixels").load()
    np.testing.assert_array_equal(pixels[5], pixels[6])


def test_an_interrupted_pass_goes_on(pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_cache, "MAX_BLOCK", 16)
    monkeypatch.setattr(decoded_cache, "BATCH", 8)

    def stop(images: int, failed: int, seen: list[int] = []) -> None:  # noqa: B006
        seen.append(images)
        if sum(seen) > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_cache(plan_of(store_path), CACHED, advance=stop)
    assert decoded_in(fill_cache(plan_of(store_path), CACHED)[1]) == 18  # two blocks stood
    assert not (Store(store_path).entry("pics/decoded@42").folder / "attempts").exists()


def test_failed_images_are_tried_again_on_request(pictures: Path, store_path: Path) -> None:
    damage(pictures, store_path, [7])
    extracted(store_path)
    again = replace(CACHED, retry_failed=True)
    assert "50 images decoded" in extracted(store_path, run=again).notes[0]


def test_too_many_failures_stop_the_decoding(pictures: Path, store_path: Path) -> None:
    damage(pictures, store_path, [0, 1, 2])
    with pytest.raises(FeatstoreError, match="more than --max-failed 1% allows"):
        fill_cache(plan_of(store_path), replace(CACHED, max_failed="1%"))


def test_floats_cannot_be_cached(pictures: Path, store_path: Path) -> None:
    plan = plan_of(store_path)
    floats = replace(plan, preprocess=replace(plan.preprocess, quantise="none"))
    with pytest.raises(ConfigError, match="keeps 8-bit images"):
        fill_cache(floats, CACHED)


def test_decoded_images_pass_for_no_embeddings(pictures: Path, store_path: Path) -> None:
    extracted(store_path)
    store = Store(store_path)
    assert [entry.name for entry in store.find("pics")] == ["pics/tiny@42"]
    assert [entry.name for entry in store.find("pics", "decoded")] == ["pics/decoded@42"]
    listed = {row["set"]: row for row in store.summaries()}
    assert listed["pics/decoded@42"]["weights"] == "decoded"
    with pytest.raises(ConfigError, match="holds decoded images, which no backbone made"):
        recheck(store["pics", "decoded@42"], RUN)
    assert plan_gc(store, stale=True) == []
    folder = store.remove("pics/decoded@42")
    assert not folder.exists()
    assert len(plan_of(store_path).todo) == 0


def test_damaged_pixels_are_never_served(pictures: Path, store_path: Path) -> None:
    extracted(store_path)
    folder = Store(store_path).entry("pics/decoded@42").folder / "data.zarr" / "pixels" / "c"
    shard = next(path for path in folder.rglob("*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    with pytest.raises(FeatstoreError, match="checksum"):
        extracted(store_path, OTHER)


@pytest.mark.parametrize(("change", "archived"), [("removed", False), ("labels", False), ("labels", True)])
def test_a_manifest_with_nothing_new_is_served(
    pictures: Path, store_path: Path, no_decoding: Callable[[], None], change: str, archived: bool
) -> None:
    extracted(store_path)
    folder = Store(store_path).entry("pics/decoded@42").folder
    if archived:
        archive_set(folder)
    before = tree_bytes(folder)
    names = sorted(f"images/{path.name}" for path in (pictures / "images").iterdir())
    if change == "removed":
        (pictures / names.pop(5)).unlink()
    write_table(pictures, names)
    if change == "labels":
        table = (pictures / "table.csv").read_text()
        (pictures / "table.csv").write_text(table.replace(",a,", ",z,"))
    manifest, _ = register(store_path, "pics", pictures, CONFIG)
    no_decoding()
    summary = extracted(store_path, OTHER)
    assert (summary.computed, summary.failed) == (len(names), 0)
    assert decoded_in(summary.notes) == 0
    after = tree_bytes(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {f"rows/{manifest.short}.parquet", f"rows/{manifest.short}.json"}
    kept = [row for row in range(50) if change == "labels" or row != 5]
    other, tiny = (Store(store_path)["pics", name] for name in ("other@42", "decoded@42"))
    assert other.ok.all()
    assert len(tiny.array("pixels").load()) == len(kept)


def test_colour_takes_over_from_a_grey_cache_that_does_not_know_the_manifest(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(decoded_cache, "MAX_BLOCK", 16)
    monkeypatch.setattr(decoded_cache, "BATCH", 8)
    extracted(store_path)
    write_table(pictures, write_pictures(pictures, 52))
    paint(pictures, store_path, [50])
    original = decoded_cache._Filling.fill

    def killed(self: Any, *given: Any) -> None:
        if self.cache.channels == 3:
            raise KeyboardInterrupt
        original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(decoded_cache._Filling, "fill", killed)
        with pytest.raises(KeyboardInterrupt):
            fill_cache(plan_of(store_path, OTHER), CACHED)
    assert caches(store_path) == [1, 3]
    write_table(pictures, [*write_pictures(pictures, 50), "images/00050.png", *write_pictures(pictures, 3, start=51)])
    register(store_path, "pics", pictures, CONFIG)
    summary = extracted(store_path, OTHER)
    assert (summary.computed, summary.failed) == (54, 0)
    assert decoded_in(summary.notes) < 54 - 32
    assert caches(store_path) == [3]
    plain = tmp_path / "plain"
    shutil.copytree(store_path / "datasets", plain / "datasets")
    extracted(plain, OTHER, RUN)
    stored = [Store(path)["pics", "other@42"].array("cls").load() for path in (store_path, plain)]
    np.testing.assert_array_equal(*stored)


def test_a_grey_cache_that_holds_more_stays(pictures: Path, store_path: Path) -> None:
    extracted(store_path)
    names = sorted(f"images/{path.name}" for path in (pictures / "images").iterdir())
    (pictures / names.pop(5)).unlink()
    write_table(pictures, names)
    paint(pictures, store_path, [])
    new = write_pictures(pictures, 1, start=60)
    write_table(pictures, [*names, *new])
    paint(pictures, store_path, [49])
    lines = fill_cache(plan_of(store_path), CACHED)[1]
    assert caches(store_path) == [1, 3]
    assert "this grey cache stays, as it holds images that the one in colour lacks" in lines[-1]
    name = lines[-1].split(":")[0]
    assert f"`featstore rm {name}`" in lines[-1]
    Store(store_path).remove(name)
    assert caches(store_path) == [3]
    assert fill_cache(plan_of(store_path), CACHED)[1] == [
        "0 images decoded into pics/decoded@42, from which all are read"
    ]


def dry_run(store: Path, capsys: pytest.CaptureFixture[str], config: SetConfig = TINY, **options: Any) -> Any:
    capsys.readouterr()
    run = replace(CACHED, dry_run=True, **options)
    extract_command(dataset="pics", **asdict(config), **asdict(run), store=str(store), json=True)
    return json.loads(capsys.readouterr().out)[0]


def test_a_dry_run_counts_what_the_cache_may_take(
    pictures: Path, store_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = 42 * 42
    assert dry_run(store_path, capsys)["decoded_bytes"] == 50 * 3 * pixels  # the upper bound
    assert dry_run(store_path, capsys, decoded_cache=False)["decoded_bytes"] == 0
    check_space(store_path, [plan_of(store_path)], CACHED, quiet=True)
    narrow = replace(CACHED, max_bytes=str(plan_of(store_path).new_bytes + 50 * 3 * pixels - 1))
    with pytest.raises(ConfigError, match=r"at most .* are to be written, more than --max-bytes"):
        check_space(store_path, [plan_of(store_path)], narrow, quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
        with pytest.raises(StoreError, match=r"at most .* are to be written and 1 B are free"):
            check_space(store_path, [plan_of(store_path)], CACHED, quiet=True)
    extracted(store_path)
    write_table(pictures, write_pictures(pictures, 70))
    register(store_path, "pics", pictures, CONFIG)
    found = dry_run(store_path, capsys)
    assert (found["todo"], found["decoded_bytes"]) == (20, 20 * pixels)


def said(store: Path, capsys: pytest.CaptureFixture[str], run: RunConfig = CACHED) -> str:
    capsys.readouterr()
    extract_command(dataset="pics", **asdict(TINY), **asdict(run), store=str(store), json=False)
    return capsys.readouterr().out


def test_the_plan_says_what_will_be_decoded(
    pictures: Path, store_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(pictures, store_path, [7])
    assert "at most 265 kB to be kept beside it, a third of that if all are grey" in said(store_path, capsys)
    assert "decoded images: all there, nothing is decoded" in said(store_path, capsys)
    again = replace(CACHED, retry_failed=True)
    printed = said(store_path, capsys, again)
    assert "88.2 kB more in pics/decoded@42; the first one in colour makes all of it three times as large" in printed
    assert "all there" not in printed
    assert "50 images decoded into" in printed


def test_a_complete_set_gets_its_cache(
    pictures: Path, store_path: Path, capsys: pytest.CaptureFixture[str], no_decoding: Callable[[], None]
) -> None:
    extracted(store_path, run=RUN)
    found = dry_run(store_path, capsys)
    assert (found["todo"], found["bytes"], found["decoded_bytes"]) == (0, 0, 50 * 3 * 42 * 42)
    printed = said(store_path, capsys)
    assert "nothing to compute" in printed
    assert "50 images decoded into pics/decoded@42\n" in printed
    assert not len(cache_of(store_path).missing(retry_failed=False))
    no_decoding()
    summary = extracted(store_path)
    assert (summary.computed, summary.notes) == (0, [])
    assert extracted(store_path, OTHER).computed == 50


def test_a_complete_set_gets_its_cache_from_python(pictures: Path, store_path: Path) -> None:
    extracted(store_path, run=RUN)
    assert extracted(store_path).notes == ["50 images decoded into pics/decoded@42"]


def test_notes_on_copies_are_kept(
    pictures: Path, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Inputs, "staging_note", lambda _: "3 files were not copied")
    notes = extracted(store_path, run=replace(CACHED, stage=tmp_path / "stage")).notes
    assert notes[1:] == ["3 files were not copied"]
