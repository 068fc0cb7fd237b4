"""Extraction end to end: numbers, resume, growth, failures, changed files."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from pictures import CONFIG, register_pictures, tree_bytes, write_pictures, write_table
from PIL import Image

from featstore.backbones import devices
from featstore.configs import RunConfig, SetConfig
from featstore.errors import ConfigError, DeviceError, FeatstoreError, IncompleteError, ManifestError, StoreError
from featstore.extraction import lane
from featstore.extraction.batching import default_batch_size
from featstore.extraction.loader import Job, Loader
from featstore.extraction.pipeline import Summary, choose_device, extract
from featstore.extraction.plan import make_plan
from featstore.images import to_pixels
from featstore.register import register
from featstore.store.catalog import Store
from featstore.store.verify import verify_set

TINY = SetConfig(model="tiny", res="42", block_rows=16)
RUN = RunConfig(batch_size=8, workers=2, device="cpu")


def run(store: Path, config: SetConfig = TINY, settings: RunConfig = RUN, dataset: str = "pics") -> Summary:
    return extract(make_plan(Store(store), dataset, config, settings), settings)


@pytest.fixture
def pictures(tmp_path: Path, store_path: Path) -> Path:
    """Root of 50 registered pictures: three full blocks of 16 and one of 2."""
    register_pictures(store_path, tmp_path / "data", 50)
    return tmp_path / "data"


def test_tokens_in_the_store_are_those_of_the_network(pictures: Path, store_path: Path) -> None:
    config = SetConfig(
        model="tiny", res="42", block_rows=16, tokens="cls,mean_patch,registers,patches", layers="2", dtype="float32"
    )
    run(store_path, config)
    plan = make_plan(Store(store_path), "pics", config, RUN)
    network = plan.source.load(device="cpu", compute_dtype="float32", attention="sdpa")
    features = Store(store_path)["pics", "tiny@42"]
    assert features.arrays[:4] == ["cls", "mean_patch", "registers", "patches"]
    for row in (0, 17, 49):
        image = torch.from_numpy(np.array(Image.open(pictures / features.manifest.column("path")[row])))[None, None]
        resized = torch.nn.functional.interpolate(image, (42, 42), mode="bicubic", antialias=True)
        pixels = (resized.float() / 255).expand(-1, 3, -1, -1)
        mean, std = (
            torch.tensor(values).view(1, 3, 1, 1)
            for values in (plan.source.architecture.mean, plan.source.architecture.std)
        )
        with torch.inference_mode():
            tokens = network((pixels - mean) / std, layers=(2,))
        for name, expected in (
            ("cls", tokens.cls),
            ("mean_patch", tokens.patches.mean(1)),
            ("registers", tokens.registers),
            ("patches", tokens.patches),
            ("layers/2/cls", tokens.layers[2].cls),
        ):
            np.testing.assert_allclose(features.array(name)[row], expected[0].numpy(), atol=2e-5, err_msg=name)
    group = zarr.open_group(features.folder / "data.zarr", mode="r")
    np.testing.assert_array_equal(group["patches"][40:], features.patches[40:])  # type: ignore[index]


def test_second_run_does_nothing(pictures: Path, store_path: Path) -> None:
    first = run(store_path)
    assert (first.computed, first.failed, first.blocks) == (50, 0, 4)
    before = {path: path.stat().st_mtime_ns for path in store_path.rglob("*")}
    assert run(store_path).computed == 0
    assert {path: path.stat().st_mtime_ns for path in store_path.rglob("*")} == before


@pytest.mark.parametrize("batch_size", [1, 3, 16, 64])
def test_batch_size_changes_rounding_only(pictures: Path, store_path: Path, tmp_path: Path, batch_size: int) -> None:
    run(store_path)
    other = tmp_path / "other"
    shutil.copytree(store_path / "datasets", other / "datasets")
    run(other, settings=RunConfig(batch_size=batch_size, device="cpu"))
    a, b = (Store(path)["pics", "tiny@42"].load().astype(np.float32) for path in (store_path, other))
    np.testing.assert_allclose(a, b, atol=4e-3)


def test_interrupted_run_gives_the_same_bytes(pictures: Path, store_path: Path, tmp_path: Path) -> None:
    run(store_path)
    other = tmp_path / "other"
    shutil.copytree(store_path / "datasets", other / "datasets")

    class Stop(Exception):
        pass

    for limit in (20, 12, 4):

        def stop(images: int, failed: int, seen: list[int] = [], limit: int = limit) -> None:  # noqa: B006
            seen.append(images)
            if sum(seen) > limit:
                raise Stop

        with pytest.raises(Stop):
            extract(make_plan(Store(other), "pics", TINY, RUN), RUN, advance=stop)
        with pytest.raises(IncompleteError, match=r"rows asked for are not extracted yet"):
            Store(other)["pics", "tiny@42"].load()
    run(other)
    a, b = (Store(path)["pics", "tiny@42"].folder for path in (store_path, other))
    assert tree_bytes(a) == tree_bytes(b)
    assert not (b / "attempts").exists()


def test_corrupt_files_keep_their_rows(pictures: Path, store_path: Path) -> None:
    paths = sorted((pictures / "images").iterdir())
    bad = [0, 24, *range(32, 40), 49]  # first, middle, a whole batch, last
    for row in bad:
        paths[row].write_bytes([b"", b"not an image", paths[row].read_bytes()[:60]][row % 3])
    register(store_path, "pics", pictures, CONFIG)
    summary = run(store_path)
    assert (summary.computed, summary.failed) == (50, len(bad))
    features = Store(store_path)["pics", "tiny@42"]
    assert sorted(features.failures) == bad
    assert np.flatnonzero(~features.ok).tolist() == bad
    assert np.isnan(features.load()[bad]).all()
    assert np.isfinite(features.load()[features.ok]).all()
    states = features.rows.column("state").to_pylist()
    assert [row for row, state in enumerate(states) if state == "failed"] == bad
    assert features.rows.column("id").to_pylist() == features.manifest.column("id")
    assert verify_set(Store(store_path), Store(store_path).entry("pics/tiny@42"), deep=True).ok


def test_retry_failed_computes_mended_blocks_again(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featstore.errors import DecodeError
    from featstore.extraction import loader
    from featstore.images.decoded import Opened

    real = loader.open_bytes
    broken = (pictures / "images/00020.png").read_bytes()

    def open_bytes(data: bytes, path: Path | None) -> Opened:
        if data == broken:
            raise DecodeError("no decoder for this yet")
        return real(data, path)

    monkeypatch.setattr(loader, "open_bytes", open_bytes)
    assert run(store_path).failed == 1
    monkeypatch.setattr(loader, "open_bytes", real)
    assert run(store_path).computed == 0
    again = run(store_path, settings=RunConfig(batch_size=8, device="cpu", retry_failed=True))
    assert (again.computed, again.failed) == (16, 0)
    assert Store(store_path)["pics", "tiny@42"].ok.all()


def test_grown_data_set_computes_only_what_is_new(pictures: Path, store_path: Path) -> None:
    run(store_path)
    old = Store(store_path)["pics", "tiny@42"]
    held = old.load()
    committed = {path: path.stat() for path in (old.folder / "data.zarr").rglob("c/*/*") if path.is_file()}
    names = [f"images/{number:05d}.png" for number in range(50)] + write_pictures(pictures, 9, start=50)
    write_table(pictures, names)
    register(store_path, "pics", pictures, CONFIG)
    summary = run(store_path)
    assert (summary.computed, summary.blocks) == (9, 1)
    grown = Store(store_path)["pics", "tiny@42"]
    assert grown.cls.shape == (59, 192)
    np.testing.assert_array_equal(grown.load()[:50], held)
    assert np.isfinite(grown.load()).all()
    for path, stat in committed.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    np.testing.assert_array_equal(Store(store_path).set("pics/tiny@42", manifest=old.manifest.short).load(), held)


def test_rows_that_vanished_stay_for_old_manifests(pictures: Path, store_path: Path) -> None:
    run(store_path)
    old = Store(store_path)["pics", "tiny@42"].manifest
    write_table(pictures, [f"images/{number:05d}.png" for number in range(50) if number % 5])
    register(store_path, "pics", pictures, CONFIG)
    assert run(store_path).computed == 0
    assert len(Store(store_path)["pics", "tiny@42"].load()) == 40
    assert len(Store(store_path).set("pics/tiny@42", manifest=old.short).load()) == 50


def test_rewritten_file_is_a_new_row(pictures: Path, store_path: Path) -> None:
    run(store_path)
    held = Store(store_path)["pics", "tiny@42"].load()
    path = pictures / "images/00007.png"
    Image.open(pictures / "images/00008.png").save(path)
    register(store_path, "pics", pictures, CONFIG)
    assert run(store_path).computed == 1
    fresh = Store(store_path)["pics", "tiny@42"].load()
    changed = np.flatnonzero((fresh != held).any(1))
    assert changed.tolist() == [7]


@pytest.mark.parametrize("change", ["size", "time", "gone", "root"])
def test_changed_files_stop_the_run(pictures: Path, store_path: Path, change: str) -> None:
    path = pictures / "images/00007.png"
    if change == "size":
        path.write_bytes(path.read_bytes() + b" ")
    elif change == "time":
        os.utime(path, (time.time() + 100, time.time() + 100))
    elif change == "gone":
        path.unlink()
    else:
        pictures.rename(pictures.with_name("moved"))
    expected = (
        r"its root .* is gone" if change == "root" else r"1 files changed since registration, such as images/00007.png"
    )
    with pytest.raises(ManifestError, match=expected):
        run(store_path)
    assert not (store_path / "sets").exists()


def test_file_that_changes_under_way_stops_the_run(pictures: Path, store_path: Path) -> None:
    plan = make_plan(Store(store_path), "pics", TINY, RUN)
    (pictures / "images/00003.png").write_bytes(b"longer or shorter than it was")
    loader = Loader(plan.manifest, plan.preprocess, [Job(0, (3,))], workers=1)
    with loader, pytest.raises(ManifestError, match=r"29 bytes, \d+ at registration"):
        list(loader)
    (pictures / "images/00003.png").unlink()
    loader = Loader(plan.manifest, plan.preprocess, [Job(0, (3,))], workers=1)
    with loader, pytest.raises(ManifestError, match=r"gone since registration"):
        list(loader)


def test_missing_files_fail_where_that_was_allowed(pictures: Path, store_path: Path) -> None:
    from dataclasses import replace

    (pictures / "images/00011.png").unlink()
    register(store_path, "pics", pictures, replace(CONFIG, allow_missing=True))
    assert run(store_path).reasons == {"the file was missing at registration": 1}


def test_loader_keeps_order_and_slots(pictures: Path, store_path: Path) -> None:
    plan = make_plan(Store(store_path), "pics", TINY, RUN)
    (pictures / "images/00003.png").write_bytes(b"x" * plan.manifest.column("size")[3])
    jobs = [Job(0, (5, 3, 4)), Job(0, (0,)), Job(1, (3, -1))]
    with Loader(plan.manifest, plan.preprocess, jobs, workers=3) as loader:
        batches = list(loader)
    assert [batch.job for batch in batches] == jobs
    assert [[state.reason is None for state in batch.states] for batch in batches] == [
        [True, False, True],
        [True],
        [False, False],
    ]
    assert not batches[0].pixels[1].any()
    alone = Loader(plan.manifest, plan.preprocess, [Job(0, (5,))], workers=1)
    np.testing.assert_array_equal(next(iter(alone)).pixels[0], batches[0].pixels[0])


def test_more_tokens_join_the_same_set(pictures: Path, store_path: Path) -> None:
    run(store_path)
    folder = Store(store_path)["pics", "tiny@42"].folder
    before = tree_bytes(folder)
    more = SetConfig(model="tiny", res="42", tokens="cls,patches")
    plan = make_plan(Store(store_path), "pics", more, RUN)
    assert plan.folder == folder
    assert plan.new_bytes == 50 * 9 * 192 * 2
    assert run(store_path, more).blocks == 4
    features = Store(store_path)["pics", "tiny@42"]
    assert features.arrays == ["cls", "mean_patch", "patches"]
    np.testing.assert_allclose(
        features.patches[:].astype(np.float32).mean(1), features.mean_patch[:].astype(np.float32), atol=2e-3
    )
    after = tree_bytes(folder)
    assert all(after[name] == data for name, data in before.items() if not name.endswith("zarr.json"))


def test_overflow_stops_before_the_commit(pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    real = lane.pick
    monkeypatch.setattr(lane, "pick", lambda tokens, name: real(tokens, name) * 1e6)
    with pytest.raises(StoreError, match=r"cls: row 0 does not fit float16.*--dtype float32"):
        run(store_path)
    features = Store(store_path)["pics", "tiny@42"]
    assert features.pending().all()
    assert run(store_path, SetConfig(model="tiny", res="42", dtype="float32")).computed == 50


def test_bfloat16_sets(pictures: Path, store_path: Path) -> None:
    run(store_path, SetConfig(model="tiny", res="42", dtype="float32", name="full"))
    run(store_path, SetConfig(model="tiny", res="42", dtype="bfloat16", name="half"))
    full, half = (Store(store_path)["pics", name].load().astype(np.float32) for name in ("full", "half"))
    np.testing.assert_allclose(half, full, rtol=2**-8, atol=1e-6)


def test_compute_dtype_stays_with_the_set(pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featstore.extraction import plan as planning

    run(store_path, SetConfig(model="tiny", res="42", compute_dtype="bfloat16"))
    held = make_plan(Store(store_path), "pics", SetConfig(model="tiny", res="42"), RUN)
    assert (held.spec["identity"]["compute_dtype"], len(held.todo)) == ("bfloat16", 0)
    run(store_path, SetConfig(model="tiny", res="42", compute_dtype="float32"))
    with pytest.raises(ConfigError, match=r"there are sets of 'pics' in bfloat16 and float32; say which"):
        make_plan(Store(store_path), "pics", SetConfig(model="tiny", res="42"), RUN)
    monkeypatch.setattr(planning, "cuda_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # The second card is of another kind: the one that is asked for counts, not the current one.
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: device.index == 1)
    for device, dtype in (("auto", "float32"), ("cuda", "float32"), ("cuda:1", "bfloat16")):
        fresh = make_plan(Store(store_path), "pics", SetConfig(model="tiny", res="56"), RunConfig(device=device))
        assert fresh.spec["identity"]["compute_dtype"] == dtype


def test_sets_of_other_names_do_not_decide_the_compute_dtype(pictures: Path, store_path: Path) -> None:
    run(store_path, SetConfig(model="tiny", res="42", compute_dtype="bfloat16", name="half"))
    for name in ("one", "two"):
        run(store_path, SetConfig(model="tiny", res="42", name=name))
    for name in (None, "one"):
        plan = make_plan(Store(store_path), "pics", SetConfig(model="tiny", res="42", name=name), RUN)
        assert plan.spec["identity"]["compute_dtype"] == "float32"


def test_failures_count_once_and_retry_keeps_what_stands(pictures: Path, store_path: Path) -> None:
    (pictures / "images/00020.png").write_bytes(b"broken")
    register(store_path, "pics", pictures, CONFIG)
    run(store_path)
    run(store_path, SetConfig(model="tiny", res="42", tokens="patches"))
    names = [f"images/{number:05d}.png" for number in range(50)] + write_pictures(pictures, 4, start=50)
    (pictures / names[-1]).write_bytes(b"broken too")
    write_table(pictures, names)
    register(store_path, "pics", pictures, CONFIG)
    both = SetConfig(model="tiny", res="42", tokens="cls,mean_patch,patches")
    summary = run(store_path, both, RunConfig(batch_size=8, device="cpu", max_failed="25%"))
    assert (summary.computed, summary.failed) == (4, 1)
    with pytest.raises(FeatstoreError, match=r"more than --max-failed 0 allows"):
        run(store_path, TINY, RunConfig(batch_size=8, device="cpu", retry_failed=True, max_failed="0"))
    assert not Store(store_path)["pics", "tiny@42"].pending().any()


def test_identity_ignores_how_and_sees_what(pictures: Path, store_path: Path) -> None:
    def fingerprint(config: SetConfig, settings: RunConfig = RUN) -> str:
        return str(make_plan(Store(store_path), "pics", config, settings).spec["fingerprint"])

    base = fingerprint(TINY)
    same = [
        (TINY, RunConfig(device="cpu")),
        (SetConfig(model="tiny", res="42", tokens="patches"), RUN),
        (SetConfig(model="tiny", res="42", name="x"), RUN),
    ]
    assert all(fingerprint(*pair) == base for pair in same)
    others = [
        SetConfig(model="tiny", res="56"),
        SetConfig(model="tiny", res="42", geometry="letterbox"),
        SetConfig(model="tiny", res="42", dtype="float32"),
        SetConfig(model="tiny", res="42", compute_dtype="bfloat16"),
        SetConfig(model="tiny", res="42", random_weights=0),
        SetConfig(model="tiny", res="42", random_weights=1),
    ]
    found = [fingerprint(config) for config in others]
    assert len({base, *found}) == len(others) + 1


def test_sizes_that_the_patch_does_not_divide(pictures: Path, store_path: Path) -> None:
    def size(res: str, fit: str) -> list[int]:
        config = SetConfig(model="tiny", res=res, fit=fit)  # type: ignore[arg-type]
        plan = make_plan(Store(store_path), "pics", config, RUN)
        assert ("is no multiple of the patch size 14" in " ".join(plan.notes)) == (
            plan.preprocess.height != int(res.split("x")[0])
        )
        return [plan.preprocess.height, plan.preprocess.width]

    assert size("512", "nearest") == [518, 518]
    assert size("512", "floor") == [504, 504]
    assert size("512", "tokens") == [448, 448]
    assert size("56x98", "strict") == [56, 98]
    with pytest.raises(ConfigError, match="14"):
        size("512", "strict")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SetConfig(model="tiny", res="42", layers="5"), r"--layers 5: tiny has blocks 1 to 4"),
        (
            SetConfig(model="dinov2-small", random_weights=0, tokens="registers"),
            r"dinov2-small-random has no register tokens",
        ),
        (
            SetConfig(model="dinov2-small", random_weights=0, geometry="hf"),
            r"--geometry hf needs the checkpoint's preprocessor_config.json",
        ),
        (
            SetConfig(model="tiny", res="42", geometry="hf"),
            r"the checkpoint's processor makes 224x224 images, --res says 42",
        ),
    ],
)
def test_requests_that_cannot_be(pictures: Path, store_path: Path, config: SetConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(Store(store_path), "pics", config, RUN)


def test_block_size_of_a_set_stays(pictures: Path, store_path: Path) -> None:
    run(store_path)
    with pytest.raises(ConfigError, match=r"has 16 rows per block, which stays; leave --block-rows 32 out"):
        make_plan(Store(store_path), "pics", SetConfig(model="tiny", res="42", block_rows=32), RUN)


def test_nothing_registered(store_path: Path) -> None:
    from featstore.extraction.plan import registered_datasets

    with pytest.raises(ConfigError, match=r"no data set is registered in .*; start with `featstore register"):
        registered_datasets(Store(store_path), None)


def test_data_sets_without_files_are_left_out(pictures: Path, store_path: Path, tmp_path: Path) -> None:
    from featstore.extraction.plan import registered_datasets
    from featstore.store.importer import import_features

    np.savez(tmp_path / "given.npz", features=np.ones((9, 4), np.float32), ids=np.array([f"i{n}" for n in range(9)]))
    import_features(store_path, tmp_path / "given.npz", dataset="given", model="m")
    assert registered_datasets(Store(store_path), None) == ["pics"]
    with pytest.raises(ConfigError, match=r"data set 'given' has no image files \(imported features only\)"):
        registered_datasets(Store(store_path), "given")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(DeviceError, match=r"--device cuda: this machine or this build of torch has no CUDA device"):
        choose_device("cuda")
    assert [default_batch_size(tokens, "cpu") for tokens in (54, 257, 1029, 100_000)] == [64, 8, 2, 1]
    assert default_batch_size(201, "cuda") == 256


def test_hf_geometry_runs(pictures: Path, store_path: Path) -> None:
    run(store_path, SetConfig(model="tiny", geometry="hf"))
    features = Store(store_path)["pics", "tiny@224"]
    assert features.summary()["geometry"] == "hf"
    assert features.ok.all()


def test_gray_and_colour_in_one_batch_give_the_same_numbers(tmp_path: Path, store_path: Path) -> None:
    root = tmp_path / "data"
    names = write_pictures(root, 8)
    for name in names[::2]:
        Image.open(root / name).convert("RGB").save(root / name)
    write_table(root, names)
    register(store_path, "mixed", root, CONFIG)
    register_pictures(store_path, tmp_path / "gray", 8, "gray")
    run(store_path, dataset="mixed")
    run(store_path, dataset="gray")
    a, b = (Store(store_path)[name, "tiny@42"].load() for name in ("mixed", "gray"))
    np.testing.assert_array_equal(a, b)


def test_pixels_are_normalised_once(pictures: Path, store_path: Path) -> None:
    plan = make_plan(Store(store_path), "pics", TINY, RUN)
    batch = torch.full((1, 1, 42, 42), 128, dtype=torch.uint8)
    pixels = to_pixels(batch, plan.preprocess, device="cpu", dtype=torch.float32)
    expected = (128 / 255 - np.array(plan.source.architecture.mean)) / np.array(plan.source.architecture.std)
    np.testing.assert_allclose(pixels[0, :, 0, 0].numpy(), expected, atol=1e-6)
