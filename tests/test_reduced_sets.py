"""Reduced sets: failed images, overflow, parity, reading; one pass over the images for all arrays; the commands."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import CONFIG, register_pictures, tree_bytes, write_pictures, write_table
from reduced import RUN, config, opened, run

from featstore.errors import ConfigError, StoreError
from featstore.extraction import creation, lane, reduce
from featstore.extraction.creation import load_backbone
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.extraction.reduce import Reducer
from featstore.images import to_pixels
from featstore.register import register
from featstore.store.catalog import Store
from featstore.store.diff import as_tokens, parity_limit, row_differences
from featstore.store.reductions import Reduction


@pytest.fixture
def pictures(tmp_path: Path, store_path: Path) -> Path:
    """Root of 40 registered pictures: two full blocks of 16 and one of 8."""
    register_pictures(store_path, tmp_path / "data", 40)
    return tmp_path / "data"


@pytest.mark.parametrize("steps", ["pool2", "pca:8", "int8"])
def test_failed_rows(pictures: Path, store_path: Path, steps: str) -> None:
    paths = sorted((pictures / "images").iterdir())
    bad = [0, 5, *range(16, 24), 39]  # 16 to 23: a whole batch
    for row in bad:
        paths[row].write_bytes(b"not an image")
    register(store_path, "pics", pictures, CONFIG)
    summary = run(store_path, config(steps))
    assert summary.failed == len(bad)
    fs = opened(store_path)
    values = fs.patches.load()
    assert np.isnan(values[bad]).all()
    assert np.isfinite(values[fs.ok]).all()
    assert np.isnan(fs.patches[[39, 1, 0]]).all((1, 2)).tolist() == [True, False, True]
    assert np.isnan(fs.patches.restore(values)[bad]).all()
    if steps == "int8":
        assert not fs.patches.stored.gather(bad).any()
    train = np.flatnonzero(np.array(fs.manifest.column("split")) == "train")
    assert fs.spec["reduction"]["sample"]["images"] == len(set(train.tolist()) - set(bad))


def test_one_image_fits_and_measures(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 1)
    run(store_path, config("pca:4,int8"))
    held = opened(store_path).spec["reduction"]
    facts = held["sample"]
    assert (facts["images"], facts["same_images"], facts["split"]) == (1, True, "all")
    assert held["arrays"]["patches"]["neighbours_images"] == {"among": 1, "k": 0, "overlap": None}
    assert held["arrays"]["patches"]["neighbours_tokens"]["k"] == 8


def test_nothing_to_fit_on(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 3)
    for path in (tmp_path / "data/images").iterdir():
        path.write_bytes(b"broken")
    register(store_path, "pics", tmp_path / "data", CONFIG)
    with pytest.raises(ConfigError, match=r"--reduce int8 is fitted and measured on a sample, and no image of pics"):
        run(store_path, config("int8"))
    assert not (store_path / "sets").exists()


def test_too_many_components(pictures: Path, store_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--reduce pca:193: tokens of this network have 192 dimensions; ask for fewer"
    ):
        make_plan(Store(store_path), "pics", config("pca:193"), RUN)
    with pytest.raises(ConfigError, match=r"--reduce pca:192 needs at least 192 tokens .*, the sample has 90"):
        run(store_path, config("pca:192"))


@pytest.mark.parametrize(
    ("steps", "factor", "message"),
    [
        ("pool2", 1e6, r"patches: the reduced sample does not fit float16; store float32 \(--dtype float32\)"),
        ("pca:8", 1e6, r"patches: the reduced sample does not fit float16"),
        ("int8", 1e6, r"patches: int8 would decode to values of .*, more than float16 holds; decode to float32"),
        ("int8", np.inf, r"patches: tokens of the sample hold infinity or NaN; check the weights"),
    ],
)
def test_overflow_in_the_sample(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch, steps: str, factor: float, message: str
) -> None:
    real = reduce.patches_of
    monkeypatch.setattr(reduce, "patches_of", lambda tokens, name: real(tokens, name) * factor)
    with pytest.raises(StoreError, match=message):
        run(store_path, config(steps))
    assert not list(store_path.glob("sets/*/*/spec.json"))


@pytest.mark.parametrize(
    ("steps", "factor", "message"),
    [
        ("int8", np.inf, r"patches: row 0 holds infinity or NaN, which int8 cannot keep; nothing of this block is"),
        ("pca:8", 1e6, r"patches: row 0 does not fit float16.*--dtype float32"),
    ],
)
def test_overflow_after_the_sample(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch, steps: str, factor: float, message: str
) -> None:
    real = lane.pick
    monkeypatch.setattr(lane, "pick", lambda tokens, name: real(tokens, name) * (factor if name != "cls" else 1))
    with pytest.raises(StoreError, match=message):
        run(store_path, config(steps))
    assert opened(store_path).pending().all()


def test_float32_sets_decode_to_float32(pictures: Path, store_path: Path) -> None:
    run(store_path, config("int8", dtype="float32", name="full"))
    run(store_path, config("int8", dtype="bfloat16", name="brain"))
    run(store_path, config("pca:8", dtype="bfloat16", name="axes"))
    for name in ("full", "brain"):
        assert opened(store_path, f"pics/{name}@42").patches.load().dtype == np.float32
    axes = opened(store_path, "pics/axes@42").patches
    assert np.isfinite(axes.restore(axes.load())).all()


# reading


@pytest.mark.parametrize("steps", ["pool2", "pool4", "int8", "pool2,int8"])
def test_mean_all_weighs_pooled_cells(pictures: Path, store_path: Path, steps: str) -> None:
    tokens = "cls,registers,patches"
    run(store_path, config("", tokens=tokens, dtype="float32", name="exact"))
    run(store_path, config(steps, tokens=tokens))
    wanted = opened(store_path, "pics/exact@42").load("mean_all")
    np.testing.assert_allclose(opened(store_path).load("mean_all"), wanted, atol=5e-2 if "int8" in steps else 1e-3)


def test_mean_all_needs_every_dimension(pictures: Path, store_path: Path) -> None:
    run(store_path, config("pca:8", tokens="cls,registers,patches"))
    with pytest.raises(ConfigError, match=r"mean_all needs every token, and pics/tiny@42:patches keeps 8 principal"):
        opened(store_path).load("mean_all")
    assert opened(store_path).load("cls+patches").shape == (40, 192 + 9 * 8)


def test_parity_is_looked_at_in_tokens(pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_off(steps: str) -> None:
        def stop(images: int, failed: int, seen: list[int] = []) -> None:  # noqa: B006
            seen.append(images)
            if len(seen) == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(store_path, config(steps, tokens="patches", name=steps.replace(":", "")), advance=stop)

    real = to_pixels
    for steps in ("int8", "pca:8", "pool2"):
        broken_off(steps)
        monkeypatch.setattr(creation, "to_pixels", lambda *args, **options: real(*args, **options) * 1.2)
        with pytest.raises(ConfigError, match=r"recomputing committed rows of patches gives a relative difference of"):
            run(store_path, config(steps, tokens="patches", name=steps.replace(":", "")))
        # Rounding of another kernel passes: a thousandth of a percent moves some numbers by a step of int8.
        monkeypatch.setattr(creation, "to_pixels", lambda *args, **options: real(*args, **options) * (1 + 1e-5))
        assert run(store_path, config(steps, tokens="patches", name=steps.replace(":", ""))).computed == 24
        monkeypatch.setattr(creation, "to_pixels", real)


def test_the_limit_of_int8_covers_what_a_small_difference_does() -> None:
    rng = np.random.default_rng(0)
    tokens = (rng.standard_normal((4, 30, 50)) * 2).astype(np.float32)
    offset, scale = reduce.int8_scale(tokens.reshape(-1, 50))
    reduction = Reduction(
        steps=("int8",), grid=(5, 6), dim=50, dtype="float32", parameters={"offset": offset, "scale": scale}
    )
    noise = rng.standard_normal(tokens.shape).astype(np.float32)
    held = Reducer(reduction, "cpu")(torch.from_numpy(tokens)).numpy()
    for limit in (5e-3, 2e-2, 5e-2):
        moved = tokens + noise * np.float32(2 * limit * 0.999)
        fresh = Reducer(reduction, "cpu")(torch.from_numpy(moved)).numpy()
        before, after = as_tokens(held, reduction), as_tokens(fresh, reduction)
        found = row_differences(before, after).max()
        allowed = parity_limit(limit, before, reduction)
        assert limit < found <= allowed < 1.5 * found
    assert parity_limit(0.1, before, None) == 0.1


# one pass over the images for all groups that lack them


def test_blocks_that_several_groups_lack_take_one_forward_pass(
    pictures: Path, store_path: Path, tmp_path: Path
) -> None:
    first, both = config(""), config("", tokens="cls,registers,patches", layers="2")
    run(store_path, first)
    run(store_path, both)
    names = [f"images/{number:05d}.png" for number in range(40)] + write_pictures(pictures, 20, start=40)
    write_table(pictures, names)
    register(store_path, "pics", pictures, CONFIG)
    plan = make_plan(Store(store_path), "pics", both, RUN)
    network = load_backbone(plan, RUN, "cpu")

    class Counting:
        architecture, device, dtype = network.architecture, network.device, network.dtype
        batches = 0

        def __call__(self, pixels: Any, *, layers: tuple[int, ...] = ()) -> Any:
            self.batches += 1
            return network(pixels, layers=layers)

    counting = Counting()
    seen: list[int] = []
    summary = extract(plan, RUN, backbone=counting, advance=lambda images, failed: seen.append(images))
    # Three batches for 20 images, and the two groups' guards; it was six, one pass for each group.
    assert (summary.computed, summary.blocks, sum(seen), counting.batches) == (20, 4, 20, 3 + 2)
    # The same rows, each group in a pass of its own.
    other = tmp_path / "other"
    register(other, "pics", pictures, CONFIG)
    extract(make_plan(Store(other), "pics", both, RUN), RUN)
    for name in ("cls", "patches", "registers", "layers/2/cls"):
        a, b = (opened(path).array(name).load() for path in (store_path, other))
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=4e-3)


def test_bytes_do_not_depend_on_the_passes(pictures: Path, store_path: Path, tmp_path: Path) -> None:
    more = config("", tokens="cls,patches,mean_patch")
    other = tmp_path / "other"
    register(other, "pics", pictures, CONFIG)
    calls: list[int] = []

    def stop(images: int, failed: int) -> None:
        calls.append(images)
        if len(calls) == 3:  # the first block is committed
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(store_path, config("", tokens="cls"), advance=stop)
    # Now `cls` lacks two blocks and the new group lacks three.
    assert run(store_path, more).blocks == 2 + 3
    run(other, config("", tokens="cls"))
    run(other, more)
    assert tree_bytes(opened(store_path).folder) == tree_bytes(opened(other).folder)


def test_a_group_may_hold_layers_that_are_not_asked_for(pictures: Path, store_path: Path) -> None:
    run(store_path, config("", layers="2"))
    write_table(pictures, [f"images/{n:05d}.png" for n in range(40)] + write_pictures(pictures, 3, start=40))
    register(store_path, "pics", pictures, CONFIG)
    assert run(store_path, config("", tokens="cls")).computed == 3
    assert np.isfinite(opened(store_path).array("layers/2/patches").load()).all()


# as a user does it


def test_the_commands(
    tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cli import main

    register_pictures(store_path, tmp_path / "data", 60)

    def command(program: str, line: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [program, *line.split()])
        with pytest.raises(SystemExit) as left:
            getattr(main, program)()
        output = capsys.readouterr()
        assert (left.value.code or 0) == code, output
        return output.out + (output.err if code else "")

    ask = "extract --dataset pics --model tiny --res 42 --tokens cls,patches --reduce"
    output = command("featstore", f"{ask} int8,pool2")
    assert "a grid of 3x3 becomes 2x2 by pool2" in output
    assert "60 computed" in output
    info = json.loads(command("featstore", "info pics/tiny@42 --json"))
    assert info["reduction"]["steps"] == ["pool2", "int8"]
    assert 0 < info["reduction"]["patches"]["relative_error"] < 1
    assert "cls" in command("probes", "knn --dataset pics --model tiny --features cls --k 3")
    output = command("featstore", f"{ask} pool2,pool4", code=2)
    assert "error: --reduce takes at most one pool, one pca:K and one int8; got 'pool2,pool4'" in output
