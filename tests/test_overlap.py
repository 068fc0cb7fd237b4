"""Stages that run at once: the store holds what a plain loop gives, and they end together whatever happens."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from pictures import CONFIG, register_pictures, tree_bytes

from featstore.configs import RunConfig, SetConfig
from featstore.errors import StoreError
from featstore.extraction import creation, device, lane, pipeline
from featstore.extraction.lane import Lane
from featstore.extraction.loader import open_loader
from featstore.extraction.overlap import overlapped
from featstore.extraction.plan import Plan, make_plan
from featstore.images import to_pixels
from featstore.register import register
from featstore.store import commits
from featstore.store.catalog import Store

RUN = RunConfig(batch_size=8, workers=2, device="cpu")


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not set(threading.enumerate()) - before


class Stop(Exception):
    pass


def test_items_arrive_in_order_while_more_are_made() -> None:
    made: list[int] = []
    seen: list[tuple[int, int]] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    def consume(numbers: Iterator[int]) -> int:
        for number in numbers:
            time.sleep(0.002)
            seen.append((number, len(made)))
        return len(seen)

    assert overlapped(items(), consume, ahead=2) == 20
    assert [number for number, _ in seen] == list(range(20))
    assert all(ahead - number <= 2 + 2 for number, ahead in seen)  # two wait, one is in work, one is being made
    assert max(ahead - number for number, ahead in seen) > 1


def test_nothing_to_do() -> None:
    assert overlapped([], list, ahead=1) == []


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
def test_what_the_maker_raises_ends_the_consumer(kind: type[BaseException]) -> None:
    ended: list[str] = []

    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise kind("mine")

    def consume(numbers: Iterator[int]) -> None:
        try:
            for _ in numbers:
                pass
        finally:
            ended.append("cleaned up")

    with pytest.raises(kind, match="mine"):
        overlapped(items(), consume, ahead=2)
    assert ended == ["cleaned up"]


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("after", [1, 3, 50])
def test_what_the_consumer_raises_ends_the_maker(kind: type[BaseException], after: int) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    def consume(numbers: Iterator[int]) -> None:
        for count, _ in enumerate(numbers, 1):
            if count == after:
                raise kind("mine")

    with pytest.raises(kind, match="mine"):
        overlapped(items(), consume, ahead=2)
    assert len(made) <= after + 4


def test_a_consumer_that_has_enough_ends_the_maker() -> None:
    assert overlapped(iter(range(10**9)), lambda numbers: next(numbers), ahead=2) == 0


def pictures(store: Path, root: Path, count: int = 40) -> None:
    register_pictures(store, root, count)
    for number in (3, 17, 18, *range(24, 32)):
        (root / f"images/{number:05d}.png").write_bytes(b"broken")
    register(store, "pics", root, CONFIG)


def reference(plan: Plan) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """A plain loop: decode, forward, cast, one batch after the other; (first row, rows of every array)."""
    network = plan.source.load(device="cpu", compute_dtype="float32")
    blocks = Lane(plan, RUN, "cpu", network).blocks
    for block, groups in blocks.lacking().items():
        with open_loader(plan.manifest, plan.preprocess, blocks.cut(block, groups, 8), RUN) as loader:
            for batch in loader:
                pixels = torch.zeros((8, *batch.pixels.shape[1:]), dtype=torch.uint8)
                pixels[: len(batch.pixels)] = torch.from_numpy(batch.pixels)
                tokens = network(to_pixels(pixels, plan.preprocess, device="cpu", dtype=torch.float32), layers=(2,))
                rows = {
                    "cls": tokens.cls,
                    "mean_patch": tokens.patches.float().mean(1),
                    "patches": tokens.patches,
                    "layers/2/cls": tokens.layers[2].cls,
                }
                failed = [state.reason is not None for state in batch.states]
                found = {name: values[: len(failed)].half().numpy() for name, values in rows.items()}
                for values in found.values():
                    values[failed] = np.nan
                yield batch.job.rows[0], found


def test_the_store_holds_what_a_plain_loop_gives(tmp_path: Path, store_path: Path) -> None:
    pictures(store_path, tmp_path / "data")
    config = SetConfig(model="tiny", res="42", block_rows=16, tokens="cls,mean_patch,patches", layers="2")
    plan = make_plan(Store(store_path), "pics", config, RUN)
    pipeline.prepare(plan)
    expected = list(reference(plan))
    assert pipeline.extract(plan, RUN).failed == 11
    features = Store(store_path)["pics", "tiny@42"]
    for first, rows in expected:
        for name, values in rows.items():
            held = features.array(name).load()[first : first + len(values)]
            assert held.tobytes() == values.tobytes(), (name, first)


@pytest.mark.parametrize("stage", ["decode", "device", "download", "append", "commit", "advance"])
def test_what_any_stage_raises_stops_the_run(
    tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The original error, what is committed stays, and the same command goes on to the same bytes."""
    pictures(store_path, tmp_path / "data")
    config = SetConfig(model="tiny", res="42", block_rows=16)
    plan = make_plan(Store(store_path), "pics", config, RUN)
    advance: Any = lambda *_: None  # noqa: E731
    with monkeypatch.context() as patch:

        def third(real: Any) -> Any:
            calls: list[int] = []

            def broken(*args: Any, **options: Any) -> Any:
                calls.append(1)
                if len(calls) >= 3:
                    raise Stop(stage)
                return real(*args, **options)

            return broken

        if stage == "decode":
            from featstore.extraction import loader

            patch.setattr(loader, "stack", third(loader.stack))
        elif stage == "device":
            patch.setattr(creation, "to_pixels", third(to_pixels))
        elif stage == "download":
            patch.setattr(device.Landing, "wait", third(device.Landing.wait))
        elif stage == "append":
            patch.setattr(commits.BlockWriter, "append", third(commits.BlockWriter.append))
        elif stage == "commit":
            patch.setattr(commits.BlockWriter, "commit", third(commits.BlockWriter.commit))
        else:
            advance = third(advance)
        with pytest.raises(Stop, match=stage):
            pipeline.extract(plan, RUN, advance=advance)
    folder = Store(store_path)["pics", "tiny@42"].folder
    assert not list((folder / "attempts").glob("*"))
    again = pipeline.extract(make_plan(Store(store_path), "pics", config, RUN), RUN)
    assert again.blocks < 3 or stage in ("decode", "device")
    register(tmp_path / "other", "pics", tmp_path / "data", CONFIG)
    pipeline.extract(make_plan(Store(tmp_path / "other"), "pics", config, RUN), RUN)
    assert tree_bytes(folder) == tree_bytes(Store(tmp_path / "other")["pics", "tiny@42"].folder)


def test_blocks_of_failed_images_hold_nan_in_every_type(tmp_path: Path, store_path: Path) -> None:
    pictures(store_path, tmp_path / "data")
    for dtype in ("float16", "float32", "bfloat16"):
        config = SetConfig(model="tiny", res="42", block_rows=8, dtype=dtype, name=dtype)  # type: ignore[arg-type]
        pipeline.extract(make_plan(Store(store_path), "pics", config, RUN), RUN)
        held = Store(store_path)["pics", f"{dtype}@42"].load().astype(np.float32)
        assert np.flatnonzero(np.isnan(held).all(1)).tolist() == [3, 17, 18, *range(24, 32)]
        assert np.isnan(held).any(1).sum() == 11


def test_int8_cannot_say_that_a_row_is_not_finite() -> None:
    rows = lane.Rows(device.Landing({}, {}), {}, [], [7, 8, 9], np.array([True, False, False]))
    rows._check_finite("patches", np.array([False, True, True]))
    with pytest.raises(StoreError, match=r"patches: row 9 holds infinity or NaN, which int8 cannot keep"):
        rows._check_finite("patches", np.array([False, True, False]))


def test_copies_run_on_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of events on a device with streams, which this machine need not have."""
    fake = FakeCuda()
    fake.install(monkeypatch)
    monkeypatch.setattr(device, "_pinned", lambda shape, dtype: torch.full(shape, 9, dtype=dtype))
    transfers = device.Transfers("cpu")
    transfers._is_cuda = True
    landings = []
    for number in range(4):
        images = transfers.upload(np.full((2, 1, 3, 3), number, np.uint8), 3)
        assert images.flatten(1)[:, 0].tolist() == [number, number, 0]
        landings.append(transfers.download({"cls": images.float().flatten(1)}))
    assert [landing.wait()["cls"][0, 0].item() for landing in landings] == [0, 1, 2, 3]
    assert (fake.sides, fake.unguarded) == (2, 0)
    # The ring's memory may be in use by what is queued already: no upload before that. An upload is waited for before
    # it is read, rows before they are fetched, and the host only for what it reads.
    assert fake.log[:7] == [
        "main records 1",
        "side0 waits for 1",
        "side0 records 2",
        "main waits for 2",
        "main records 3",
        "side1 waits for 3",
        "side1 records 4",
    ]
    assert fake.log.count("side0 waits for 1") == device.SLOTS  # every slot of the new ring
    # The fourth batch takes the first one's place when that was copied from and computed with.
    assert "host waits for 2" in fake.log
    assert "side0 waits for 3" in fake.log
    assert not {"side0 waits for 6", "side0 waits for 9"} & set(fake.log)


def test_the_rows_of_the_trial_live_until_they_are_copied(
    tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_pictures(store_path, tmp_path / "data", 8)
    plan = make_plan(Store(store_path), "pics", SetConfig(model="tiny", res="42"), RUN)
    pipeline.prepare(plan)
    worker = Lane(plan, RUN, "cpu", plan.source.load(device="cpu", compute_dtype="float32"))
    waited: list[set[str]] = []
    real = device.Landing.wait
    monkeypatch.setattr(device.Landing, "wait", lambda landing: (waited.append({*landing.rows}), real(landing))[1])
    worker.trial()
    assert waited == [{"cls", "mean_patch"}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_new_rings_wait_for_kernels_that_use_their_memory() -> None:
    """A long chain of products is queued, memory read behind it given back: the new ring takes it, and has to wait."""
    shape = (64, 3, 224, 224)
    pinned = [device._pinned(shape, torch.uint8) for _ in range(device.SLOTS)]
    del pinned  # torch keeps them: asking the system for such memory would wait for the device
    transfers = device.Transfers("cuda")
    numbers = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    expected = int(numbers.long().sum())
    chain = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    copies = [numbers.clone() for _ in range(device.SLOTS)]
    product = chain
    for _ in range(40):
        product = product @ chain
    sums = [copy.long().sum() for copy in copies]  # queued behind the chain
    del copies
    uploaded = [transfers.upload(np.full(shape, value, np.uint8), shape[0]).clone() for value in range(device.SLOTS)]
    torch.cuda.synchronize()
    assert [int(found) for found in sums] == [expected] * device.SLOTS
    assert [images.unique().tolist() for images in uploaded] == [[0], [1], [2]]
