"""Patch tokens stored smaller: the steps against brute force, the loss recomputed, who settles the parameters."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import CONFIG, register_pictures, tree_bytes, write_pictures, write_table
from reduced import RUN, config, exact_patches, opened, run
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from featstore import files
from featstore.configs import SetConfig, parse_reduce
from featstore.errors import ConfigError, CorruptError, UnknownNameError
from featstore.extraction import creation, reduce
from featstore.extraction.claims import Claims
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan, reduced_arrays
from featstore.extraction.reduce import Reducer
from featstore.register import register
from featstore.store import reductions
from featstore.store.catalog import Store
from featstore.store.reductions import Reduction


@pytest.fixture
def pictures(tmp_path: Path, store_path: Path) -> Path:
    """Root of 40 registered pictures: two full blocks of 16 and one of 8."""
    register_pictures(store_path, tmp_path / "data", 40)
    return tmp_path / "data"


# the steps, against independent computations


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", ()),
        ("int8", ("int8",)),
        ("int8, pool2", ("pool2", "int8")),
        ("pca:64,int8,pool4", ("pool4", "pca:64", "int8")),
    ],
)
def test_steps_come_in_one_order(text: str, steps: tuple[str, ...]) -> None:
    assert parse_reduce(text) == steps


@pytest.mark.parametrize("text", ["pool3", "pca", "pca:0", "pca:-2", "INT8", "pool2;int8", "zip"])
def test_unknown_steps(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--reduce takes pool2 or pool4, pca:K \(K components\) and int8"):
        config(text)


@pytest.mark.parametrize("text", ["pool2,pool4", "int8,int8", "pca:8,pca:9"])
def test_one_step_of_a_kind(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--reduce takes at most one pool, one pca:K and one int8; got"):
        config(text)


def test_reductions_need_patches() -> None:
    with pytest.raises(ConfigError, match=r"--reduce pool2 makes patch tokens smaller, and --tokens cls keeps none"):
        config("pool2", tokens="cls")


def pooled_by_loops(patches: np.ndarray, grid: tuple[int, int], cell: int) -> np.ndarray:
    tokens = patches.reshape(grid[0], grid[1], -1).astype(np.float64)
    found = []
    for top in range(0, grid[0], cell):
        for left in range(0, grid[1], cell):
            members = [
                tokens[row, column]
                for row in range(top, min(top + cell, grid[0]))
                for column in range(left, min(left + cell, grid[1]))
            ]
            found.append(sum(members) / len(members))
    return np.array(found)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 5), (4, 8), (1, 7), (6, 3)])
@pytest.mark.parametrize("cell", [2, 4])
def test_pooling_averages_what_is_in_a_cell(grid: tuple[int, int], cell: int) -> None:
    patches = np.random.default_rng(0).standard_normal((2, grid[0] * grid[1], 5)).astype(np.float32)
    reduction = Reduction(steps=(f"pool{cell}",), grid=grid, dim=5, dtype="float16")
    pooled = Reducer(reduction, "cpu")(torch.from_numpy(patches)).numpy()
    assert pooled.shape[1:] == reduction.row_shape
    sizes = reduction.cell_sizes
    assert sizes.sum() == grid[0] * grid[1]
    for image, whole in zip(pooled, patches):
        np.testing.assert_allclose(image, pooled_by_loops(whole, grid, cell), atol=1e-6)
        np.testing.assert_allclose(sizes @ image / sizes.sum(), whole.mean(0), atol=1e-6)
        spread = reduction.spread(image).reshape(*grid, 5)
        for row, column in np.ndindex(grid):
            kept = image[(row // cell) * reduction.kept_grid[1] + column // cell]
            np.testing.assert_array_equal(spread[row, column], kept)


def test_principal_axes_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    tokens = (rng.standard_normal((300, 12)) @ rng.standard_normal((12, 12)) + 5).astype(np.float32)
    mean, axes = reduce.principal_axes(tokens, 7)
    theirs = PCA(7, svd_solver="full").fit(tokens.astype(np.float64))
    signs = np.sign((axes * theirs.components_).sum(1))
    np.testing.assert_allclose(axes, theirs.components_ * signs[:, None], atol=1e-5)
    np.testing.assert_allclose(mean, theirs.mean_, atol=1e-5)
    assert (np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1) > 0).all()
    reduction = Reduction(
        steps=("pca:7",), grid=(3, 100), dim=12, dtype="float32", parameters={"mean": mean, "axes": axes}
    )
    found = Reducer(reduction, "cpu")(torch.from_numpy(tokens)[None]).numpy()[0]
    np.testing.assert_allclose(found, theirs.transform(tokens) * signs, atol=1e-4)
    wanted = theirs.inverse_transform(theirs.transform(tokens))
    np.testing.assert_allclose(reduction.restore(found), wanted, atol=1e-4)


def test_as_many_axes_as_dimensions_lose_nothing() -> None:
    tokens = np.random.default_rng(1).standard_normal((50, 6)).astype(np.float32)
    mean, axes = reduce.principal_axes(tokens, 6)
    np.testing.assert_allclose((tokens - mean) @ axes.T @ axes + mean, tokens, atol=1e-5)
    with pytest.raises(ConfigError, match=r"--reduce pca:6 needs at least 6 tokens to be fitted on, the sample has 5"):
        reduce.principal_axes(tokens[:5], 6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_int8_is_within_half_a_step_and_cut_off_at_the_ends(seed: int, spread: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((1, 40, 4)) * spread * np.array([1, 10, 100, 0]) + shift).astype(np.float32)
    offset, scale = reduce.int8_scale(values[0])
    reduction = Reduction(
        steps=("int8",), grid=(5, 8), dim=4, dtype="float32", parameters={"offset": offset, "scale": scale}
    )
    reducer = Reducer(reduction, "cpu")
    stored = reducer(torch.from_numpy(values)).numpy()
    assert stored.dtype == np.int8
    rounding = 4 * np.finfo(np.float32).eps * np.abs(values).max()
    assert (np.abs(reduction.decode(stored)[0] - values[0]) <= scale * 0.5001 + rounding).all()
    outside = torch.from_numpy(values + 1e4 * np.array([1, 10, -100, 1], np.float32) * np.float32(spread))
    assert set(np.unique(reducer(outside).numpy()[..., :3])) <= {-127, 127}


def test_decoding_in_pieces_is_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    stored = rng.integers(-127, 128, (7, 3, 5), dtype=np.int8)
    scale, offset = rng.random((2, 5), np.float32)
    reduction = Reduction(
        steps=("int8",), grid=(1, 3), dim=5, dtype="float16", parameters={"offset": offset, "scale": scale}
    )
    whole = reduction.decode(stored)
    np.testing.assert_array_equal(whole, (stored * scale + offset).astype(np.float16))
    monkeypatch.setattr(reductions, "PIECE_BYTES", 80)
    np.testing.assert_array_equal(reduction.decode(stored), whole)


# sets on disk


@pytest.mark.parametrize("steps", ["pool2", "pool4", "pca:16", "int8", "pool2,int8", "pool2,pca:16,int8"])
@pytest.mark.parametrize("res", ["42", "42x70"])
def test_a_reader_gets_what_the_steps_leave(pictures: Path, store_path: Path, steps: str, res: str) -> None:
    exact = exact_patches(store_path, res)
    grid = (3, 3) if res == "42" else (3, 5)
    run(store_path, config(steps, res=res))
    fs = opened(store_path, f"pics/tiny@{res}")
    reduction = fs.reduction("patches")
    assert reduction is not None
    wanted = exact.astype(np.float64)
    if reduction.cell > 1:
        wanted = np.array([pooled_by_loops(image, grid, reduction.cell) for image in exact])
    tolerance = np.full(wanted.shape[-1], 2e-3)
    found = fs.patches.load(verify=True)
    if reduction.components:
        parameters = reduction.parameters
        assert found.shape[-1] == 16
        values = (wanted - parameters["mean"]) @ parameters["axes"].T.astype(np.float64)
        back = fs.array("patches").restore(found)
        assert back.shape[1:] == (wanted.shape[1], 192)
        np.testing.assert_allclose(back, found @ parameters["axes"] + parameters["mean"], atol=1e-2)
        wanted, tolerance = values, np.full(16, 1e-2)
    if reduction.is_int8:
        tolerance = tolerance + 0.51 * reduction.parameters["scale"]
        ends = reduction.parameters["offset"] + np.outer([-127, 127], reduction.parameters["scale"])
        wanted = wanted.clip(*ends)
    assert (np.abs(found - wanted) <= tolerance).all()
    assert found.dtype == fs.patches.dtype == np.dtype(np.float16)
    assert fs.patches.shape == found.shape
    np.testing.assert_array_equal(fs.patches[[5, -1, 5]], found[[5, -1, 5]])
    np.testing.assert_array_equal(fs.patches[7, 0, 3:], found[7, 0, 3:])
    stored = fs.patches.stored
    assert stored.dtype == (np.int8 if reduction.is_int8 else np.float16)
    plain = zarr.open_array(fs.folder / "data.zarr" / "patches", mode="r")
    np.testing.assert_array_equal(plain[:40], stored.read(0, 40))
    assert fs.cls.reduction is None
    np.testing.assert_array_equal(fs.cls.restore(fs.cls[:3]), fs.cls[:3].astype(np.float32))


@pytest.mark.parametrize("steps", ["pool2", "pca:16", "int8", "pool2,pca:16,int8"])
def test_the_loss_is_what_numpy_finds(pictures: Path, store_path: Path, steps: str) -> None:
    exact = exact_patches(store_path)
    run(store_path, config(steps))
    fs = opened(store_path)
    held = fs.spec["reduction"]
    assert held["sample"] == {
        "images": 20,
        "fitted_on": 10,
        "measured_on": 10,
        "same_images": False,
        "split": "train",
        "manifest": fs.manifest.short,
    }
    train = np.flatnonzero(np.array(fs.manifest.column("split")) == "train")
    measured = np.random.default_rng(0).permutation(train)[10:]
    patches = fs.patches
    back = patches.restore(patches[measured])
    reduction = fs.reduction("patches")
    assert reduction is not None
    rows = np.arange(9) // 3 // reduction.cell * reduction.kept_grid[1] + np.arange(9) % 3 // reduction.cell
    a, b = exact[measured].astype(np.float64), back[:, rows].astype(np.float64)
    loss = held["arrays"]["patches"]
    assert loss["relative_error"] == pytest.approx(np.sqrt(((a - b) ** 2).mean() / (a**2).mean()), rel=1e-3)
    cosines = np.array(
        [cosine_similarity(x[None], y[None])[0, 0] for x, y in zip(a.reshape(-1, 192), b.reshape(-1, 192))]
    )
    assert loss["cosine_mean"] == pytest.approx(cosines.mean(), abs=1e-5)
    assert loss["cosine_worst"] == pytest.approx(cosines.min(), abs=1e-4)
    near = [
        NearestNeighbors(n_neighbors=9, metric="cosine").fit(rows.mean(1)).kneighbors(return_distance=False)
        for rows in (a, b)
    ]
    assert loss["neighbours_images"]["k"] == 9  # of ten images: all the others
    assert np.mean([len({*x} & {*y}) / 9 for x, y in zip(*near)]) == loss["neighbours_images"]["overlap"] == 1
    assert (loss["neighbours_tokens"]["k"], loss["neighbours_tokens"]["among"]) == (10, 90)
    assert loss["bytes_per_row"] == patches.stored.dtype.itemsize * int(np.prod(patches.shape[1:]))
    assert loss["full_bytes_per_row"] == 9 * 192 * 2
    if reduction.is_int8:
        levels = Reducer(reduction, "cpu")
        cut = levels.levels(levels.floats(torch.from_numpy(exact[measured]))).abs() > 127
        assert loss["saturated"] == pytest.approx(float(cut.float().mean()), abs=1e-6)


def test_neighbours_in_common_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((60, 8))
    back = exact + 0.4 * rng.standard_normal((60, 8))
    near = [
        NearestNeighbors(n_neighbors=10, metric="cosine").fit(rows).kneighbors(return_distance=False)
        for rows in (exact, back)
    ]
    wanted = np.mean([len({*x} & {*y}) / 10 for x, y in zip(*near)])
    found = reduce.neighbour_overlap(exact, back)
    assert 0.2 < wanted < 0.95
    assert (found["k"], found["among"], found["overlap"]) == (10, 60, pytest.approx(wanted, abs=1e-6))
    assert reduce.neighbour_overlap(exact[:1], back[:1]) == {"k": 0, "among": 1, "overlap": None}


def test_parameters_are_named_by_their_content(pictures: Path, store_path: Path) -> None:
    run(store_path, config("int8"))
    fs = opened(store_path)
    name = fs.spec["reduction"]["parameters"]
    path = fs.folder / "reductions" / f"{name}.safetensors"
    assert files.digest(path.read_bytes()) == name
    assert fs.spec["identity"]["reductions"] == {"steps": ["int8"], "sample": 256, "seed": 0}
    assert files.digest(fs.spec["identity"]) == fs.fingerprint
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptError, match=r"safetensors: content does not match its digest; restore it from a copy"):
        _ = opened(store_path).patches
    path.unlink()
    with pytest.raises(CorruptError, match=r"safetensors: missing, and without it the reduced rows mean nothing"):
        _ = opened(store_path).patches
    assert np.isfinite(opened(store_path).cls.load()).all()


def test_identity_and_names(pictures: Path, store_path: Path) -> None:
    names = ["", "pool2", "int8", "pool2,int8", "int8,pool2"]
    specs = [make_plan(Store(store_path), "pics", config(steps), RUN).spec for steps in names]
    assert specs[0]["identity"]["reductions"] == {}
    assert len({spec["fingerprint"] for spec in specs}) == 4
    assert specs[3] == specs[4]
    for steps in names[:2]:
        run(store_path, config(steps))
    with pytest.raises(UnknownNameError, match=r"reductions"):
        Store(store_path).entry("pics/tiny@42")


def test_the_plan_counts_reduced_bytes(pictures: Path, store_path: Path) -> None:
    def bytes_of(steps: str) -> int:
        return make_plan(Store(store_path), "pics", config(steps, tokens="patches"), RUN).new_bytes

    assert bytes_of("") == 40 * 9 * 192 * 2
    assert bytes_of("pool2") == 40 * 4 * 192 * 2
    assert bytes_of("pool2,pca:8,int8") == 40 * 4 * 8
    run(store_path, config("pool2,pca:8,int8"))
    assert opened(store_path).summary()["bytes"] == 40 * (192 * 2 + 4 * 8)


def test_the_block_size_does_not_depend_on_the_arrays_asked_for(pictures: Path, store_path: Path) -> None:
    def rows(tokens: str, steps: str) -> int:
        plan = make_plan(Store(store_path), "pics", config(steps, tokens=tokens, res="518", block_rows=None), RUN)
        return int(plan.spec["layout"]["block_rows"])

    assert rows("patches", "int8") == rows("cls,patches", "int8") == rows("mean_patch,patches", "int8")
    assert rows("cls", "") <= rows("cls,patches", "pool4,int8")


def test_notes_say_what_was_done(pictures: Path, store_path: Path) -> None:
    plan = make_plan(Store(store_path), "pics", config("pool2,int8"), RUN)
    assert plan.notes == ["a grid of 3x3 becomes 2x2 by pool2: the last cells average the patches that are left"]
    assert reduced_arrays([], ("pool2",), (4, 6), 8) == ([], [])
    said: list[str] = []
    summary = extract(plan, RUN, say=said.append)
    assert said == ["pics/tiny@42: fitting and measuring pool2,int8 on up to 256 images"]
    loss = opened(store_path).summary()["reduction"]["patches"]
    assert opened(store_path).summary()["reduction"]["steps"] == ["pool2", "int8"]
    assert summary.notes == [
        "patches reduced by pool2,int8: 768 instead of 3456 bytes a row (22.2%); relative error "
        f"{loss['relative_error']:.3g}, cosine {loss['cosine_mean']:.4f} (worst {loss['cosine_worst']:.4f}), "
        f"{loss['neighbours_tokens']['overlap']:.3f} of 10 neighbours kept, {loss['saturated']:.2%} cut off"
    ]
    assert run(store_path, config("pool2,int8")).notes == []


@pytest.mark.parametrize("steps", ["pca:16", "pool2,int8"])
def test_resumed_bytes_are_those_of_an_undisturbed_run(
    pictures: Path, store_path: Path, tmp_path: Path, steps: str
) -> None:
    import shutil

    class Stop(Exception):
        pass

    run(store_path, config(steps))
    other = tmp_path / "other"
    shutil.copytree(store_path / "datasets", other / "datasets")
    for limit in (20, 12):

        def stop(images: int, failed: int, seen: list[int] = [], limit: int = limit) -> None:  # noqa: B006
            seen.append(images)
            if sum(seen) > limit:
                raise Stop

        with pytest.raises(Stop):
            run(other, config(steps), advance=stop)
    run(other, config(steps))
    assert tree_bytes(opened(store_path).folder) == tree_bytes(opened(other).folder)


def test_a_second_creator_takes_the_parameters_of_the_first(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = make_plan(Store(store_path), "pics", config("int8"), RUN)
    real, calls = reduce.draw_sample, []
    # A claim is a hint: without it what the first one settled stands too.
    monkeypatch.setattr(Claims, "is_free", lambda *_: True)
    monkeypatch.setattr(Claims, "take", lambda *_: True)

    def draw_late(*args: Any, **options: Any) -> Any:
        calls.append(1)
        monkeypatch.setattr(reduce, "draw_sample", real)
        run(store_path, config("int8"))  # the first one is done while the second still measures
        sample = real(*args, **options)
        return replace(sample, fit=sample.fit[:3])

    monkeypatch.setattr(reduce, "draw_sample", draw_late)
    extract(late, RUN)
    assert calls == [1]
    fs = opened(store_path)
    assert fs.spec["reduction"]["sample"]["fitted_on"] == 10
    assert [path.stem for path in (fs.folder / "reductions").iterdir()] == [fs.spec["reduction"]["parameters"]]
    assert np.isfinite(fs.patches.load()).all()


def test_one_creator_measures_and_the_others_wait(
    pictures: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(creation, "LOOK", 0.01)
    plan = make_plan(Store(store_path), "pics", config("int8"), RUN)
    real, calls = reduce.draw_sample, []
    place = store_path / "cache" / f"creating-{plan.folder.name}"

    def draw(*args: Any, **options: Any) -> Any:
        calls.append(1)
        assert list(place.glob("*.*"))
        return real(*args, **options)

    monkeypatch.setattr(reduce, "draw_sample", draw)
    with Claims(place, patience=60.0) as other:
        other.take(creation.CREATION)
        waiting = threading.Thread(target=extract, args=(plan, RUN))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert not plan.folder.exists()
    waiting.join(120)
    assert not waiting.is_alive()
    assert calls == [1]
    assert not place.exists()
    assert opened(store_path).spec["reduction"]["sample"]["fitted_on"] == 10


def test_grown_sets_and_added_layers_keep_their_parameters(pictures: Path, store_path: Path) -> None:
    run(store_path, config("pca:8,int8"))
    old = opened(store_path)
    held, spec = old.patches.load(), (old.folder / "spec.json").read_bytes()
    names = [f"images/{number:05d}.png" for number in range(40)] + write_pictures(pictures, 7, start=40)
    write_table(pictures, names)
    register(store_path, "pics", pictures, CONFIG)
    summary = run(store_path, config("pca:8,int8"))
    assert (summary.computed, summary.notes) == (7, [])
    np.testing.assert_array_equal(opened(store_path).patches.load()[:40], held)
    summary = run(store_path, config("pca:8,int8", layers="2"))
    assert [note.split(":")[0] for note in summary.notes] == ["layers/2/patches reduced by pca"]
    fs = opened(store_path)
    assert (fs.folder / "spec.json").read_bytes() == spec
    first, added = fs.reduction("patches"), fs.reduction("layers/2/patches")
    assert first is not None
    assert added is not None
    assert not np.allclose(first.parameters["axes"], added.parameters["axes"])
    exact = SetConfig(model="tiny", res="42", tokens="patches", layers="2", dtype="float32", name="exact")
    run(store_path, exact)
    wanted = opened(store_path, "pics/exact@42").array("layers/2/patches").load()
    back = fs.array("layers/2/patches").restore(fs.array("layers/2/patches").load())
    error = np.sqrt(((back - wanted) ** 2).mean() / (wanted**2).mean())
    assert error == pytest.approx(added.loss["relative_error"], rel=0.2)
    assert set(fs.summary()["reduction"]) == {"steps", "patches", "layers/2/patches"}
    assert run(store_path, config("pca:8,int8", layers="2")).computed == 0
    reductions.added_path(fs.folder, "layers/2/patches").unlink()
    with pytest.raises(
        CorruptError, match=r"layers/2/patches is reduced by pca:8,int8, and nothing says how: .*missing"
    ):
        opened(store_path).array("layers/2/patches")


def test_parameters_that_came_second_are_removed_unless_named(pictures: Path, store_path: Path) -> None:
    run(store_path, config("int8"))
    fs = opened(store_path)
    reduction = fs.reduction("patches")
    assert reduction is not None
    other = replace(reduction, parameters={"offset": reduction.parameters["offset"] + 1})
    lost = reductions.write_parameters(fs.folder, {"layers/1/patches": other})
    assert lost is not None
    description = files.sealed({"parameters": lost, "arrays": {}})
    files.create_exclusive(reductions.added_path(fs.folder, "layers/1/patches"), description)
    reductions.drop_unnamed(fs.folder, fs.spec, lost)
    assert reductions.parameters_path(fs.folder, lost).exists()
    reductions.added_path(fs.folder, "layers/1/patches").unlink()
    reductions.drop_unnamed(fs.folder, fs.spec, lost)
    assert not reductions.parameters_path(fs.folder, lost).exists()
    reductions.drop_unnamed(fs.folder, fs.spec, fs.spec["reduction"]["parameters"])
    assert np.isfinite(fs.patches.load()).all()
