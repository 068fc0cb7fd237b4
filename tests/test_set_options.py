"""Options that choose another network or another view of it: what they change in a set's identity, name and numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import register_pictures

from featstore.configs import RunConfig, SetConfig, parse_window
from featstore.errors import ConfigError
from featstore.extraction.backbone import load_for_set, resolve_compile
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import Plan, image_gflops, make_plan
from featstore.extraction.recheck import recheck
from featstore.images import to_pixels
from featstore.store.catalog import Store
from featstore.store.layout import differences

RUN = RunConfig(batch_size=4, workers=2, device="cpu")


@pytest.fixture
def pictures(tmp_path: Path, store_path: Path) -> Path:
    register_pictures(store_path, tmp_path / "data", 6)
    return store_path


def plan_of(store: Path, **options: Any) -> Plan:
    given = {"model": "tiny", "res": "84", "block_rows": 16, **options}
    return make_plan(Store(store), "pics", SetConfig(**given), RUN)


def test_plain_sets_keep_their_identity(pictures: Path) -> None:
    identity = plan_of(pictures).spec["identity"]
    assert identity.keys() == {
        "weights", "architecture", "preprocess", "pos_interp", "stored_dtype", "reductions", "compute_dtype", "schema"
    }  # fmt: skip
    assert identity["architecture"].keys() == {
        "family", "embed_dim", "depth", "num_heads", "patch_size", "num_registers", "mlp", "mlp_dim", "native_size",
        "mean", "std", "norm_eps", "qkv_bias", "rope_theta",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"window": "42"}, ["window"]),
        ({"norm": "none"}, ["architecture.final_norm"]),
        ({"norm": "final"}, []),
        ({"weight_dtype": "int8"}, ["weight_dtype"]),
        ({"random_weights": 3}, ["weights"]),
    ],
)
def test_what_an_option_changes(pictures: Path, options: dict[str, Any], changed: list[str]) -> None:
    plain, other = (plan.spec["identity"] for plan in (plan_of(pictures), plan_of(pictures, **options)))
    assert [key for key, _, _ in differences(plain, other)] == changed


def test_position_interpolation_is_identity_where_it_matters(pictures: Path) -> None:
    sets = {
        way: plan_of(pictures, model="dinov2-small", random_weights=0, res="56", pos_interp=way)
        for way in (None, "hf", "meta")
    }
    assert sets[None].spec["fingerprint"] == sets["hf"].spec["fingerprint"] != sets["meta"].spec["fingerprint"]
    assert sets["meta"].spec["identity"]["pos_interp"] == "meta"


def test_random_weights_have_a_name_of_their_own(pictures: Path) -> None:
    assert plan_of(pictures).name == "pics/tiny@84"
    assert plan_of(pictures, random_weights=0).name == "pics/tiny-random@84"
    assert plan_of(pictures, model="tiny-random").name == "pics/tiny-random@84"
    assert plan_of(pictures, random_weights=0).spec["weights"]["model"] == "tiny"


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("512", (512, 512)), ("512/256", (512, 256)), (" 14/14 ", (14, 14))]
)
def test_window_texts(text: str | None, expected: tuple[int, int] | None) -> None:
    assert parse_window(text) == expected


@pytest.mark.parametrize("text", ["", "0", "512/0", "512/513", "512x512", "a"])
def test_windows_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match="--window is a size in pixels such as 512, or 512/256"):
        SetConfig(model="tiny", window=text)


def test_other_values_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="--min-cosine must lie between -1 and 1, got 2"):
        SetConfig(model="tiny", min_cosine=2.0)
    with pytest.raises(ConfigError, match="--tokens-per-batch must be at least 1, got 0"):
        RunConfig(tokens_per_batch=0)
    with pytest.raises(ConfigError, match="--tokens-per-batch and --batch-size exclude each other"):
        RunConfig(tokens_per_batch=4096, batch_size=4)


def test_windows_that_do_not_fit_are_told_at_once(pictures: Path) -> None:
    with pytest.raises(ConfigError, match="--window 40/40: size and stride must be multiples of the patch size 14"):
        plan_of(pictures, window="40")
    with pytest.raises(ConfigError, match="--window 98: images of 84x84 are smaller than one window"):
        plan_of(pictures, window="98")


def test_networks_of_one_size(pictures: Path) -> None:
    sam = {"model": "sam-large", "random_weights": 0}
    assert plan_of(pictures, **sam, res=None).preprocess.height == 1024
    with pytest.raises(ConfigError, match="takes images of 1024 x 1024 pixels only, not 512 x 512; leave --res out"):
        plan_of(pictures, **sam, res="512")
    assert plan_of(pictures, **sam, res="2048", window="1024").preprocess.height == 2048
    with pytest.raises(ConfigError, match="takes images of 1024 x 1024 pixels only, not 512 x 512"):
        plan_of(pictures, **sam, res="2048", window="512")


def test_networks_without_inner_layers(pictures: Path) -> None:
    with pytest.raises(ConfigError, match="--layers -1: resnet50-random has no inner layers of tokens; leave it out"):
        plan_of(pictures, model="resnet50", random_weights=0, res="96", layers="-1")


def test_widths_of_cls_and_patches_may_differ(pictures: Path) -> None:
    plan = plan_of(pictures, model="vgg19", random_weights=0, res="96", tokens="cls,mean_patch,patches")
    assert {array.name: array.row_shape for array in plan.arrays} == {
        "cls": (4096,),
        "mean_patch": (512,),
        "patches": (9, 512),
    }


def test_work_of_windows(pictures: Path) -> None:
    source = plan_of(pictures).source
    whole, part = source.architecture.gflops(84, 84), source.architecture.gflops(42, 42)
    assert image_gflops(source, (84, 84), None) == whole
    assert image_gflops(source, (84, 84), (42, 42)) == pytest.approx(4 * part)
    assert image_gflops(source, (84, 98), (42, 28)) == pytest.approx(3 * 3 * part)
    assert plan_of(pictures, window="42").gflop == pytest.approx(6 * 4 * part)


def test_windowed_set_holds_the_tokens_of_its_windows(pictures: Path) -> None:
    config = SetConfig(
        model="tiny", res="84", window="42", block_rows=16, dtype="float32", tokens="cls,patches", layers="2"
    )
    plan = make_plan(Store(pictures), "pics", config, RUN)
    assert extract(plan, RUN).failed == 0
    features = Store(pictures)["pics", "tiny@84"]
    from featstore.extraction.loader import Job, Loader

    with Loader(plan.manifest, plan.preprocess, [Job(0, (3,))], workers=1) as loader:
        batch = next(iter(loader))
    pixels = to_pixels(torch.from_numpy(batch.pixels), plan.preprocess, device="cpu", dtype=torch.float32)
    network = plan.source.load(device="cpu", compute_dtype="float32")
    quarters = [network(pixels[:, :, y : y + 42, x : x + 42], layers=(2,)) for y in (0, 42) for x in (0, 42)]
    mean = torch.stack([part.cls[0] for part in quarters]).mean(0)
    np.testing.assert_allclose(features.array("cls")[3], mean.numpy(), atol=1e-5)
    grid = features.array("patches")[3].reshape(6, 6, -1)
    np.testing.assert_allclose(grid[:3, 3:], quarters[1].patches[0].reshape(3, 3, -1).numpy(), atol=1e-5)
    inner = features.array("layers/2/patches")[3].reshape(6, 6, -1)
    np.testing.assert_allclose(inner[3:, :3], quarters[2].layers[2].patches[0].reshape(3, 3, -1).numpy(), atol=1e-5)
    assert recheck(features, RUN, rows=3).ok


def test_set_before_the_norm_holds_the_last_block(pictures: Path) -> None:
    config = SetConfig(model="tiny", res="42", norm="none", block_rows=16, dtype="float32", layers="-1")
    plan = make_plan(Store(pictures), "pics", config, RUN)
    extract(plan, RUN)
    features = Store(pictures)["pics", "tiny@42"]
    np.testing.assert_array_equal(features.array("layers/4/cls").load(), features.array("cls").load())
    normed = make_plan(Store(pictures), "pics", SetConfig(model="tiny", res="42", block_rows=16, dtype="float32"), RUN)
    extract(normed, RUN)
    norm = load_for_set(normed.source, normed.spec["identity"], RUN, "cpu").network.layernorm  # type: ignore[attr-defined]
    other = Store(pictures)["pics", f"tiny@42-{normed.spec['fingerprint'][:8]}"]
    raw = torch.from_numpy(features.array("cls").load())
    np.testing.assert_allclose(other.array("cls").load(), norm(raw).detach().numpy(), atol=1e-5)
    assert recheck(features, RUN, rows=2).ok


@pytest.mark.parametrize(
    ("run", "device", "expected"),
    [
        (RunConfig(), "cpu", "off"),
        (RunConfig(), "cuda:1", "on"),
        (RunConfig(memory="stream"), "cuda", "off"),
        (RunConfig(compile="off"), "cuda", "off"),
        (RunConfig(compile="graphs"), "cuda", "graphs"),
        (RunConfig(compile="on"), "cpu", "on"),
    ],
)
def test_compile_is_on_where_it_pays(pictures: Path, run: RunConfig, device: str, expected: str) -> None:
    assert resolve_compile(run, device, plan_of(pictures).source) == expected
