"""Several processes at one decoded cache: none waits in vain, none reads what another one takes away."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import CONFIG, register_pictures, tree_bytes, write_table
from PIL import Image

from featstore.configs import RunConfig, SetConfig
from featstore.errors import DecodeError, StoreError
from featstore.extraction import decoded_cache, loader, sharing
from featstore.extraction.claims import Claims
from featstore.extraction.decoded_cache import Cache, CachedImages, fill_cache, find_cache
from featstore.extraction.loader import Job
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import Plan, make_plan
from featstore.extraction.stopping import Stop
from featstore.images.opening import open_bytes
from featstore.register import register
from featstore.store import commits
from featstore.store.catalog import Store

TINY = SetConfig(model="tiny", res="42", block_rows=16)
RUN = RunConfig(batch_size=8, workers=2, device="cpu", decoded_cache=True)
COUNT, SIZE = 40, 8  # grey images, and rows of a block of the cache


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded_cache, "MAX_BLOCK", SIZE)
    monkeypatch.setattr(sharing, "SHORTEST", 0.01)  # help soon


@pytest.fixture
def pictures(tmp_path: Path, store_path: Path) -> Path:
    register_pictures(store_path, tmp_path / "data", COUNT)
    return tmp_path / "data"


def plan_of(store: Path, run: RunConfig = RUN) -> Plan:
    return make_plan(Store(store), "pics", TINY, run)


def cache_of(store: Path) -> Cache:
    plan = plan_of(store)
    return find_cache(store, plan.manifest, plan.preprocess)


def channels(store: Path) -> list[int]:
    """Channels of every cache there is."""
    specs = [entry.spec for entry in Store(store).entries("pics") if entry.spec["model"] == "decoded"]
    return sorted(spec["identity"]["channels"] for spec in specs)


def decoded_in(lines: list[str]) -> int:
    return int(lines[0].split(" images decoded")[0])


def pixels_of(store: Path) -> np.ndarray:
    return Store(store)["pics", "decoded@42"].array("pixels").load()


def add_colour(root: Path, store: Path) -> None:
    """One image in colour behind all others."""
    names = [f"images/{number:05d}.png" for number in range(COUNT + 1)]
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / names[-1])
    write_table(root, names)
    register(store, "pics", root, CONFIG)


def damage(root: Path, store: Path, rows: list[int]) -> None:
    for row in rows:
        (root / f"images/{row:05d}.png").write_bytes(b"no image")
    register(store, "pics", root, CONFIG)


def together(store: Path, world: int, **options: Any) -> list[tuple[Cache, list[str]]]:
    """What `fill_cache` returned to every rank; those that wait in vain are stopped after a while."""
    stop = Stop(40.0)
    found: dict[int, Any] = {}
    start = threading.Barrier(world)

    def go(rank: int) -> None:
        run = replace(RUN, rank=rank, world=world, **options)
        plan = plan_of(store, run)
        start.wait()
        try:
            found[rank] = fill_cache(plan, run, stop=stop)
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=go, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not stop.reason, "ranks waited for each other"
    for one in found.values():
        if isinstance(one, BaseException):
            raise one
    return [found[rank] for rank in range(world)]


def only_colour_is_left_out(store: Path) -> None:
    """Begin the coloured cache with the block of the coloured image alone."""

    def stop(images: int, failed: int) -> None:
        raise KeyboardInterrupt

    run = replace(RUN, rank=COUNT // SIZE, world=COUNT // SIZE + 1)
    with pytest.raises(KeyboardInterrupt):
        fill_cache(plan_of(store, run), run, advance=stop)
    assert channels(store) == [1, 3]
    assert len(cache_of(store).missing(retry_failed=False)) == COUNT


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", ["grey only", "grey and colour", "from nothing"])
def test_ranks_take_over_a_grey_cache(
    pictures: Path, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, case: str
) -> None:
    if case != "from nothing":
        fill_cache(plan_of(store_path), RUN)
    add_colour(pictures, store_path)
    if case == "grey only":
        only_colour_is_left_out(store_path)
    take = Claims.take

    def slow(claims: Claims, piece: int) -> bool:
        time.sleep(0.02)  # so that ranks come to their blocks at the same time
        return take(claims, piece)

    monkeypatch.setattr(Claims, "take", slow)
    found = together(store_path, world)
    assert [cache.channels for cache, _ in found] == [3] * world
    if case == "grey only":
        assert [decoded_in(lines) for _, lines in found] == [0] * world
    assert channels(store_path) == [3]
    folder = cache_of(store_path).folder
    assert not (folder / "claims").exists()
    assert [path for path in folder.parent.iterdir() if path.name.startswith("decoded")] == [folder]
    alone = tmp_path / "alone"
    register(alone, "pics", pictures, CONFIG)
    fill_cache(plan_of(alone), RUN)
    kept = {name: data for name, data in tree_bytes(folder).items() if not name.startswith("rows/")}
    single = tree_bytes(cache_of(alone).folder)
    assert {name: data for name, data in single.items() if name.startswith("data.zarr/pixels/c/")} == {
        name: data for name, data in kept.items() if name.startswith("data.zarr/pixels/c/")
    }


def interfere(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Let something happen before the third block is read from the grey cache."""
    read, blocks = CachedImages.read, set()

    def late(images: CachedImages, job: Job) -> Any:
        blocks.add(job.block)
        if len(blocks) == 3:
            monkeypatch.setattr(CachedImages, "read", read)
            act()
        return read(images, job)

    monkeypatch.setattr(CachedImages, "read", late)


def test_a_grey_cache_that_others_are_at_stays_until_the_last_is_done(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(plan_of(store_path), RUN)
    add_colour(pictures, store_path)
    seen: list[tuple[int, list[int]]] = []

    def act() -> None:
        cache, _ = fill_cache(plan_of(store_path), RUN)
        seen.append((len(cache.missing(retry_failed=False)), channels(store_path)))

    interfere(monkeypatch, act)
    cache, _ = fill_cache(plan_of(store_path), RUN)
    assert seen == [(0, [1, 3])]
    assert not len(cache.missing(retry_failed=False))
    assert channels(store_path) == [3]


@pytest.mark.parametrize("complete", [True, False])
def test_a_grey_cache_that_goes_while_it_is_read(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch, complete: bool
) -> None:
    fill_cache(plan_of(store_path), RUN)
    before = pixels_of(store_path)
    add_colour(pictures, store_path)
    name = Path(cache_of(store_path).folder).name

    def act() -> None:
        if complete:
            fill_cache(plan_of(store_path), RUN)
        Store(store_path).remove(f"pics/{name}")

    interfere(monkeypatch, act)
    cache, lines = fill_cache(plan_of(store_path), RUN)
    assert not len(cache.missing(retry_failed=False))
    assert channels(store_path) == [3]
    # The one in colour is decoded for either cache; besides it what the grey one has not given and nobody committed.
    assert decoded_in(lines) <= 2 if complete else decoded_in(lines) == COUNT - 2 * SIZE + 2
    np.testing.assert_array_equal(pixels_of(store_path)[:COUNT], np.broadcast_to(before, (COUNT, 3, 42, 42)))


def test_a_grey_cache_that_goes_while_it_is_written(pictures: Path, store_path: Path) -> None:
    add_colour(pictures, store_path)
    inner: list[list[int]] = []

    def meanwhile(images: int, failed: int) -> None:
        if not inner:  # between two blocks, neither of which is claimed
            inner.append([])
            fill_cache(plan_of(store_path), RUN)
            inner[0] += channels(store_path)

    cache, _ = fill_cache(plan_of(store_path), RUN, advance=meanwhile)
    assert inner == [[3]]
    assert cache.channels == 3
    assert channels(store_path) == [3]
    assert not len(cache.missing(retry_failed=False))


@pytest.mark.parametrize("gone", [True, False])
def test_removing_the_grey_cache_twice(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    fill_cache(plan_of(store_path), RUN)
    add_colour(pictures, store_path)
    remove = Store.remove

    def late(store: Store, selector: str) -> Any:
        if gone:
            remove(store, selector)
            return remove(store, selector)
        raise StoreError("cannot remove (Permission denied)")

    monkeypatch.setattr(Store, "remove", late)
    if gone:
        fill_cache(plan_of(store_path), RUN)
        assert channels(store_path) == [3]
        return
    with pytest.raises(StoreError, match="cannot remove"):
        fill_cache(plan_of(store_path), RUN)


@pytest.mark.parametrize("first", [0, 1])
def test_the_cache_is_filled_whole_without_take_over(pictures: Path, store_path: Path, first: int) -> None:
    for rank, blocks in ((first, 2 - first), (1 - first, 1 + first)):
        run = replace(RUN, rank=rank, world=2, take_over=False)
        summary = extract(plan_of(store_path, run), run)
        assert (summary.blocks, summary.taken_over) == (blocks, 0)
        assert not len(cache_of(store_path).missing(retry_failed=False))
    assert Store(store_path)["pics", "tiny@42"].ok.all()


def test_ranks_fill_the_cache_together_without_take_over(pictures: Path, store_path: Path) -> None:
    found = together(store_path, 2, take_over=False)
    assert sum(decoded_in(lines) for _, lines in found) < 2 * COUNT
    assert not len(cache_of(store_path).missing(retry_failed=False))


def failing_now(monkeypatch: pytest.MonkeyPatch, root: Path, rows: list[int]) -> None:
    """Images that cannot be decoded, for now."""
    good = {(root / f"images/{row:05d}.png").read_bytes() for row in rows}
    real = open_bytes

    def flaky(data: bytes, *more: Any) -> Any:
        if data in good:
            raise DecodeError("a bad moment")
        return real(data, *more)

    monkeypatch.setattr(loader, "open_bytes", flaky)


def test_every_rank_sees_what_decodes_now(pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failing_now(patch, pictures, [20])  # block 2 of the cache, of rank 0; block 1 of the set, of rank 1
        assert extract(plan_of(store_path), RUN).reasons == {"a bad moment": 1}
    run = replace(RUN, rank=1, world=2, retry_failed=True)
    summary = extract(plan_of(store_path, run), run)
    assert (summary.computed, summary.failed) == (16, 0)
    assert Store(store_path)["pics", "tiny@42"].ok.all()
    assert len(plan_of(store_path, replace(RUN, retry_failed=True)).todo) == 0


def test_ranks_try_again_together(pictures: Path, store_path: Path) -> None:
    damage(pictures, store_path, list(range(0, COUNT, SIZE)))
    fill_cache(plan_of(store_path), RUN)
    before = pixels_of(store_path)
    together(store_path, 2, retry_failed=True)
    assert not len(cache_of(store_path).missing(retry_failed=False))
    np.testing.assert_array_equal(pixels_of(store_path), before)
    assert not (cache_of(store_path).folder / "claims").exists()


def test_what_another_one_has_mended_meanwhile_is_not_tried_again(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing_now(patch, pictures, list(range(0, COUNT, SIZE)))
        fill_cache(plan_of(store_path), RUN)
    again = replace(RUN, retry_failed=True)
    inner: list[int] = []

    def meanwhile(images: int, failed: int) -> None:
        if not inner:
            inner.append(decoded_in(fill_cache(plan_of(store_path, again), again)[1]))

    lines = fill_cache(plan_of(store_path, again), again, advance=meanwhile)[1]
    assert (inner, decoded_in(lines)) == ([COUNT - SIZE], SIZE)
    assert not len(cache_of(store_path).missing(retry_failed=True))


def first_marker(cache: Cache) -> Path:
    (marker,) = Path(str(cache.folder)).glob("commits/*/00000000.json")
    return marker


def test_a_block_that_is_taken_back_is_waited_for(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(plan_of(store_path), RUN)
    cache = cache_of(store_path)
    [array] = [cache.array]
    commits.take_back(cache.folder, first_marker(cache).parent.name, [array], 0, SIZE)
    job = Job(0, tuple(range(SIZE)))
    with CachedImages([cache], ()) as images:
        assert isinstance(images, CachedImages)
        with monkeypatch.context() as patch:
            patch.setattr(decoded_cache, "BACK_SECONDS", 0.1)
            with pytest.raises(
                StoreError, match=r"block 0 was taken back, to be decoded again, and is not there after"
            ):
                images.read(job)
        later = threading.Timer(0.3, fill_cache, (plan_of(store_path), RUN))
        later.start()
        batch = images.read(job)
        later.join()
    np.testing.assert_array_equal(batch.pixels, pixels_of(store_path)[:SIZE])


def test_a_cache_that_is_removed_while_it_is_read(pictures: Path, store_path: Path) -> None:
    fill_cache(plan_of(store_path), RUN)
    with CachedImages([cache_of(store_path)], ()) as images:
        assert isinstance(images, CachedImages)
        Store(store_path).remove("pics/decoded@42")
        with pytest.raises(StoreError, match="removed while it was read; run the same command again"):
            images.read(Job(0, tuple(range(SIZE))))
