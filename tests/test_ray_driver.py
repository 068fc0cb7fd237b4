"""The driver of `--engine ray` and its actors, as threads: what is handed out, counted, lost and ended."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_ray import FakeRay, Handle
from pictures import CONFIG, register_pictures, tree_bytes

from featstore import files, records
from featstore.configs import RunConfig, SetConfig
from featstore.errors import ConfigError, FeatstoreError, ManifestError, Stopped, StoreError
from featstore.extraction import loader, ray_actor, ray_engine
from featstore.extraction.pipeline import Hooks, Summary, extract, extract_sets
from featstore.extraction.plan import make_plan
from featstore.extraction.ray_engine import choose_shape, run_on_ray
from featstore.extraction.ray_fleet import Shape
from featstore.extraction.ray_queue import Handout
from featstore.extraction.stopping import Stop
from featstore.register import register
from featstore.store.catalog import Store

TINY = SetConfig(model="tiny", res="42", block_rows=16)
LOCAL = RunConfig(batch_size=8, workers=1, device="cpu")
RAY = replace(LOCAL, engine="ray", actors=3)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    found = FakeRay()
    monkeypatch.setattr(ray_engine, "import_ray", lambda: found)
    return found


def on_ray(store: Path, config: SetConfig = TINY, run: RunConfig = RAY, **hooks: Any) -> Summary:
    [summary] = run_on_ray([make_plan(Store(store), "pics", config, run)], run, Hooks(**hooks))
    return summary


def alone(store: Path, other: Path, config: SetConfig = TINY, run: RunConfig = LOCAL) -> dict[str, bytes]:
    """The set as one process makes it, in another store with the same manifest."""
    shutil.copytree(store / "datasets", other / "datasets")
    extract(make_plan(Store(other), "pics", config, run), run)
    return tree_bytes(folder_of(other))


def folder_of(store: Path) -> Path:
    return Path(str(Store(store)["pics", "tiny@42"].folder))


def break_files(store: Path, root: Path, numbers: list[int]) -> None:
    for path in [sorted((root / "images").iterdir())[number] for number in numbers]:
        path.write_bytes(b"broken")
    register(store, "pics", root, CONFIG)


def test_actors_write_the_bytes_of_one_process(fake: FakeRay, tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 150)
    break_files(store_path, tmp_path / "data", [3, 70, 149])
    expected = alone(store_path, tmp_path / "alone")
    told: list[tuple[int, int]] = []
    summary = on_ray(store_path, advance=lambda *done: told.append(done))
    assert tree_bytes(folder_of(store_path)) == expected
    assert (summary.computed, summary.failed, summary.blocks) == (150, 3, 10)
    assert [sum(done) for done in zip(*told)] == [150, 3]
    assert sum(summary.reasons.values()) == 3
    assert (summary.batch_size, summary.micro_batch, summary.device) == (8, 8, "cpu")
    assert len(fake.actors) == 3
    assert summary.stages["device"]["workers"] == 3
    assert not list((store_path / "cache" / "ray").iterdir())
    assert on_ray(store_path).computed == 0


@pytest.mark.slow
def test_dead_actors_are_replaced_and_may_write_late(fake: FakeRay, tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 200)
    expected = alone(store_path, tmp_path / "alone")
    done = [0]

    def kill(images: int, failed: int) -> None:
        done[0] += images
        if len(fake.actors) < 3 + done[0] // 30:
            next(handle for handle in fake.actors if not handle.dead).die()

    summary = on_ray(store_path, advance=kill)
    assert tree_bytes(folder_of(store_path)) == expected
    assert summary.how["actors_died"] >= 4
    assert summary.computed == 200
    assert done[0] == 200


def test_actors_that_only_die_end_the_run(fake: FakeRay, tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 40)
    fake.started = Handle.die
    with pytest.raises(
        FeatstoreError, match=r"10 Ray actors died one after another .* it was dead before; if they ran"
    ):
        on_ray(store_path)


def test_too_many_failures_over_all_actors(fake: FakeRay, tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 100)
    break_files(store_path, tmp_path / "data", list(range(0, 100, 10)))
    with pytest.raises(FeatstoreError, match=r"images could not be decoded, more than --max-failed 5% allows"):
        on_ray(store_path, run=replace(RAY, max_failed="5%"))
    on_ray(store_path, run=replace(RAY, max_failed="10%"))  # of all images, not of those that are left
    features = Store(store_path)["pics", "tiny@42"]
    assert (len(features.failures), int(features.pending().sum())) == (10, 0)


def test_failures_of_earlier_runs_count_over_all_actors(fake: FakeRay, tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 60)
    break_files(store_path, tmp_path / "data", list(range(0, 60, 10)))
    assert on_ray(store_path).failed == 6
    register_pictures(store_path, tmp_path / "data", 80)
    break_files(store_path, tmp_path / "data", list(range(0, 80, 10)))
    with pytest.raises(FeatstoreError, match=r"6 images could not be decoded, more than --max-failed 7% allows"):
        on_ray(store_path, run=replace(RAY, max_failed="7%"))
    assert int(Store(store_path)["pics", "tiny@42"].pending().sum()) == 20
    with pytest.raises(FeatstoreError, match=r"8 images could not be decoded, more than --max-failed 9% allows"):
        on_ray(store_path, run=replace(RAY, max_failed="9%"))


def test_changed_files_end_the_run(fake: FakeRay, tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 40)
    (tmp_path / "data" / "images" / "00021.png").unlink()
    with pytest.raises(ManifestError, match=r"1 files changed since registration, such as images/00021.png"):
        on_ray(store_path)


def test_a_request_to_stop_ends_cleanly(fake: FakeRay, tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 200)
    stop = Stop()
    with pytest.raises(Stopped, match=r"enough; what is committed stays, the same command goes on") as found:
        on_ray(store_path, advance=lambda *_: stop.ask("enough", 130), stop=stop)
    assert found.value.code == 130
    left = make_plan(Store(store_path), "pics", TINY, RAY).todo
    assert 0 < len(left) < 200
    expected = alone(store_path, tmp_path / "alone")
    on_ray(store_path)
    assert tree_bytes(folder_of(store_path)) == expected


@pytest.mark.slow
def test_several_sets_and_a_decoded_cache(fake: FakeRay, tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 60)
    configs = [TINY, replace(TINY, res="56"), replace(TINY, block_rows=32, name="wide")]
    other = tmp_path / "other"
    shutil.copytree(store_path / "datasets", other / "datasets")
    run = replace(RAY, decoded_cache=True)
    extract_sets(
        [make_plan(Store(other), "pics", config, LOCAL) for config in configs], replace(LOCAL, decoded_cache=True)
    )
    summaries = run_on_ray([make_plan(Store(store_path), "pics", config, run) for config in configs], run, Hooks())
    assert [summary.computed for summary in summaries] == [60, 60, 60]
    assert _without_runs(other) == _without_runs(store_path)


def _without_runs(store: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree_bytes(store / "sets").items() if "/runs/" not in name}


@pytest.mark.slow
def test_failed_images_are_tried_again(
    fake: FakeRay, tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = register_pictures(store_path, tmp_path / "data", 60).column("path")
    expected = alone(store_path, tmp_path / "alone")
    real = loader.load_images

    def broken(inputs: Any, opened: Any, sample: Any, *more: Any) -> Any:
        images, state = real(inputs, opened, sample, *more)
        return ([], replace(state, reason="no reader today")) if sample.path == names[20] else (images, state)

    monkeypatch.setattr(loader, "load_images", broken)
    assert on_ray(store_path).failed == 1
    again = on_ray(store_path, run=replace(RAY, retry_failed=True))
    assert (again.computed, again.failed) == (16, 1)  # it fails as before
    assert np.isnan(Store(store_path)["pics", "tiny@42"].load()[20]).all()
    monkeypatch.setattr(loader, "load_images", real)
    again = on_ray(store_path, run=replace(RAY, retry_failed=True))
    assert (again.computed, again.failed) == (16, 0)
    assert tree_bytes(folder_of(store_path)) == expected


def test_a_store_that_actors_do_not_see(
    fake: FakeRay, tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_pictures(store_path, tmp_path / "data", 20)
    monkeypatch.setattr(ray_actor, "VISIBLE_SECONDS", 0.1)

    def hide(handle: Handle) -> None:
        for path in (store_path / "cache" / "ray").iterdir():
            path.unlink(missing_ok=True)

    fake.started = hide
    with pytest.raises(StoreError, match=r"sees another store here than the driver, .* a shared folder, or s3://"):
        on_ray(store_path)


def test_other_versions_are_refused(
    fake: FakeRay, tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_pictures(store_path, tmp_path / "data", 20)
    monkeypatch.setattr(records, "versions", lambda: {"featstore": "0.0.1", "torch": "2.0"})
    plans = [make_plan(Store(store_path), "pics", TINY, RAY)]
    driver = {"featstore": "9", "torch": "2.0"}
    order = ray_actor.Order(plans=plans, run=RAY, token=store_path, world=1, versions=driver)
    with pytest.raises(ConfigError, match=r"must have the driver's versions; .* has featstore 0.0.1 \(driver: 9\)"):
        ray_actor.check_machine(order)


def test_images_that_a_machine_does_not_have(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 20)
    plans = [make_plan(Store(store_path), "pics", TINY, RAY)]
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    token = store_path / "token"
    token.touch()
    order = ray_actor.Order(plans=plans, run=RAY, token=token, world=1, versions=records.versions())
    with pytest.raises(ManifestError, match=r"has no .*data, where the images are; --engine ray needs them"):
        ray_actor.check_machine(order)


def test_what_cannot_run_on_ray(tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_pictures(store_path, tmp_path / "data", 20)
    with pytest.raises(ConfigError, match=r"--device cuda:1: Ray gives every actor a GPU of its own"):
        ray_engine.check_shareable(store_path, replace(RAY, device="cuda:1"))
    with monkeypatch.context() as patch:
        launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        for name, value in ({"TORCHELASTIC_RUN_ID": "x"} | launched).items():
            patch.setenv(name, value)
        with pytest.raises(ConfigError, match=r"started by one process; leave torchrun away"):
            ray_engine.check_shareable(store_path, RAY)
    with monkeypatch.context() as patch:
        patch.setattr(files, "commit_mode", lambda _: "single")
        with pytest.raises(StoreError, match=r"takes one writer at a time .* are several"):
            ray_engine.check_shareable(store_path, RAY)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs the package ray; pip install 'featstore\[ray\]'"):
        on_ray(store_path)


@pytest.mark.parametrize(
    ("resources", "device", "actors", "shape"),
    [
        ({"CPU": 8.0}, "auto", None, Shape("cpu", 4, 2, 0)),
        ({"CPU": 8.0}, "auto", 6, Shape("cpu", 6, 1, 0)),
        ({"CPU": 1.0}, "cpu", None, Shape("cpu", 1, 1, 0)),
        ({"CPU": 64.0, "GPU": 8.0}, "auto", None, Shape("cuda", 8, 1, 1)),
        ({"CPU": 64.0, "GPU": 8.0}, "cuda", 3, Shape("cuda", 3, 1, 1)),
        ({"CPU": 64.0, "GPU": 8.0}, "cpu", None, Shape("cpu", 10, 2, 0)),
        ({"CPU": 4.0}, "cuda", None, Shape("cuda", 1, 1, 1)),  # GPUs are still to come
    ],
)
def test_what_an_actor_takes(resources: dict[str, float], device: str, actors: int | None, shape: Shape) -> None:
    run = RunConfig(engine="ray", device=device, actors=actors)
    assert choose_shape(resources, run, most=10) == shape


def test_a_handout_hands_every_piece_to_one_actor() -> None:
    handout = Handout(patience=100.0)
    handout.add((0, unit) for unit in range(20))
    for actor in range(3):
        handout.join(actor)
    given: list[tuple[int, int]] = []
    now = 0.0
    while not handout.is_done:
        for actor in range(3):
            now += 0.5
            handout.commit(actor, list(handout._holders[actor].held)[:1], now)
            given += handout.next_for(actor, now)
    assert sorted(given) == [(0, unit) for unit in range(20)]


def test_pieces_of_the_dead_go_back_and_last_if_they_kill() -> None:
    handout = Handout(patience=100.0)
    handout.add((0, unit) for unit in range(6))
    handout.join(0)
    first = handout.next_for(0, 0.0)
    assert first == [(0, 0), (0, 1)]
    handout.lose(0)
    handout.join(1)
    rest: list[tuple[int, int]] = []
    while not handout.is_done:
        rest += (given := handout.next_for(1, 1.0))
        handout.commit(1, given, 2.0)
    assert rest == [(0, unit) for unit in (2, 3, 4, 5, 0, 1)]
    assert handout.returned == 2


def test_idle_actors_get_what_was_not_begun_then_what_is_late() -> None:
    handout = Handout(patience=100.0)
    handout.add((0, unit) for unit in range(2))
    handout.join(0)
    assert len(handout.next_for(0, 0.0)) == 2
    assert handout.wanted_back(0) == []
    handout.join(1)
    assert handout.next_for(1, 1.0) == []
    assert handout.wanted_back(0) == [(0, 1)]
    assert handout.wanted_back(0) == []  # it is asked once
    handout.hand_back(0, [(0, 1)])
    assert handout.next_for(1, 1.0) == [(0, 1)]
    assert handout.commit(1, [(0, 1)], 4.0) == [(0, 1)]  # 3 s are usual
    assert handout.next_for(1, 5.9) == []
    assert handout.next_for(1, 6.1) == [(0, 0)]
    assert handout.doubled == 1
    assert handout.commit(1, [(0, 0)], 7.0) == [(0, 0)]
    assert handout.is_done
    assert handout.commit(0, [(0, 0)], 8.0) == []  # a late commit counts nothing


def test_silent_actors_lose_their_pieces_and_may_come_back() -> None:
    handout = Handout(patience=100.0, double=False)
    handout.add([(0, 0), (0, 1)])
    handout.join(0)
    handout.join(1)
    assert handout.next_for(0, 0.0) == [(0, 0), (0, 1)]
    assert handout.next_for(1, 500.0) == []  # nothing is doubled
    handout.silence(0)
    handout.silence(0)
    assert handout.returned == 2
    assert handout.next_for(1, 500.0) == [(0, 0), (0, 1)]
    handout.hear(0)
    assert handout.commit(0, [(0, 0)], 501.0) == [(0, 0)]
    assert handout.commit(1, [(0, 0), (0, 1)], 502.0) == [(0, 1)]
    assert handout.is_done
