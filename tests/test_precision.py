"""The precision gate: what it measures in closed form, what it lets pass and what not, what a set's spec then holds."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import CONFIG, register_pictures
from torch import Tensor

from featstore.backbones.source import LoadOptions
from featstore.backbones.tokens import Tokens
from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.errors import ConfigError, WeightsError
from featstore.extraction import precision
from featstore.extraction.backbone import load_for_set
from featstore.extraction.plan import Plan, make_plan
from featstore.extraction.precision import (
    THRESHOLDS,
    THRESHOLDS_8_BIT,
    Thresholds,
    check_precision,
    full_float32,
    gate,
    measure_precision,
    sample_size,
    tf32_state,
    thresholds_of,
)
from featstore.extraction.reduce import Forward
from featstore.images import to_pixels
from featstore.register import register
from featstore.store.catalog import Store

RUN = RunConfig(batch_size=8, workers=2, device="cpu")


def random_forward(change: Callable[[Tensor], Tensor] = lambda values: values, *, layers: bool = False) -> Forward:
    """Tokens that follow from an image's first pixel, each array of them changed."""

    def forward(images: np.ndarray) -> Tokens:
        def draw(seed: int, count: int) -> Tensor:
            numbers = [int(image.flat[0]) for image in images]
            rows = [torch.randn(count, 6, generator=torch.Generator().manual_seed(seed + n)) for n in numbers]
            return change(torch.stack(rows))

        inner = {3: Tokens(cls=draw(5000, 1)[:, 0], registers=draw(0, 0), patches=draw(7000, 4))} if layers else {}
        return Tokens(cls=draw(0, 1)[:, 0], registers=draw(0, 0), patches=draw(1000, 4), layers=inner)

    return forward


def batches(*counts: int) -> list[np.ndarray]:
    numbers = iter(range(sum(counts)))
    return [np.full((count, 1, 2, 2), 0, np.uint8) + _column(numbers, count) for count in counts]


def _column(numbers: Any, count: int) -> np.ndarray:
    return np.array([next(numbers) for _ in range(count)], np.uint8)[:, None, None, None]


def turned(angle: float) -> Callable[[Tensor], Tensor]:
    """A rotation by `angle` in the first two dimensions of six, in which alone the tokens lie."""
    turn = torch.eye(6)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return lambda values: values @ turn.T


def flat(values: Tensor) -> Tensor:
    return values * torch.tensor([1.0, 1, 0, 0, 0, 0])


def test_equal_tokens_lose_nothing() -> None:
    found = measure_precision(random_forward(layers=True), random_forward(layers=True), batches(8, 4))
    assert set(found) == {"cls", "patches", "layers/3/cls", "layers/3/patches"}
    for name, one in found.items():
        assert one["rows"] == (12 if name.endswith("cls") else 48)
        assert one["norm_ratio"] == [1.0, 1.0]
        assert (one["not_finite"], one["relative_error"]) == (0, 0.0)
        assert one["cosine_worst"] == one["cosine_mean"] == pytest.approx(1, abs=1e-12)
        assert one["neighbours"] == {"k": 10, "among": 12, "overlap": 1.0}


@pytest.mark.parametrize("angle", [0.01, 0.5, 2.5])
def test_a_rotation_in_closed_form(angle: float) -> None:
    turn = turned(angle)
    found = measure_precision(random_forward(flat), random_forward(lambda values: turn(flat(values))), batches(5, 5))
    for one in found.values():
        assert one["cosine_worst"] == pytest.approx(math.cos(angle), abs=1e-6)
        assert one["cosine_mean"] == pytest.approx(math.cos(angle), abs=1e-6)
        assert one["relative_error"] == pytest.approx(2 * math.sin(angle / 2), rel=1e-5)
        assert one["norm_ratio"] == pytest.approx([1, 1], abs=1e-6)
        assert one["neighbours"]["overlap"] == 1  # turned as one


def test_other_lengths_show_in_the_norms_alone() -> None:
    scale = torch.linspace(0.5, 2.0, 4)[None, :, None]
    found = measure_precision(
        random_forward(), random_forward(lambda values: values * scale[:, : values.shape[1]]), batches(6)
    )
    assert found["patches"]["norm_ratio"] == pytest.approx([0.5, 2.0])
    assert found["patches"]["cosine_worst"] == pytest.approx(1)
    assert found["cls"]["relative_error"] == pytest.approx(0.5)


def test_a_constant_part_does_not_hide_an_error() -> None:
    plain, noisy = random_forward(lambda values: values + 1e3), random_forward(lambda values: 1.5 * values + 1e3)
    found = measure_precision(plain, noisy, batches(40))["patches"]
    assert found["cosine_worst"] > 0.99999
    assert found["relative_error"] == pytest.approx(0.5e-3, rel=0.1)
    assert found["spread_error"] == pytest.approx(0.5, rel=0.01)
    equal = random_forward(lambda values: values * 0 + 1)
    assert measure_precision(equal, equal, batches(3))["cls"]["spread_error"] is None


def test_one_bad_token_is_the_worst() -> None:
    def change(values: Tensor) -> Tensor:
        values = values.clone()
        if values.shape[1] == 4:
            values[2, 1] *= -1
        return values

    found = measure_precision(random_forward(), random_forward(change), batches(8))
    assert found["patches"]["cosine_worst"] == pytest.approx(-1)
    assert found["patches"]["cosine_mean"] == pytest.approx((31 - 1) / 32)
    assert found["cls"]["cosine_worst"] == pytest.approx(1)


def test_strangers_are_no_neighbours() -> None:
    found = measure_precision(
        random_forward(), random_forward(lambda values: (1e3 * values).sin()), batches(16, 16, 16)
    )
    assert found["cls"]["neighbours"]["overlap"] < 0.5
    assert (found["cls"]["neighbours"]["k"], found["cls"]["neighbours"]["among"]) == (10, 48)


def test_zeros_against_zeros_are_equal() -> None:
    zero = random_forward(lambda values: values * 0)
    assert measure_precision(zero, zero, batches(3))["patches"]["cosine_worst"] == 1
    assert measure_precision(random_forward(), zero, batches(3))["patches"]["cosine_worst"] == 0


def test_tokens_that_are_not_finite_are_counted() -> None:
    def change(values: Tensor) -> Tensor:
        values = values.clone()
        values[1, :1, 0] = float("inf")
        values[2] = float("nan")
        return values

    found = measure_precision(random_forward(), random_forward(change), batches(4))
    assert (found["patches"]["not_finite"], found["patches"]["rows"]) == (5, 16)
    assert found["patches"]["cosine_worst"] == pytest.approx(1)
    assert found["cls"]["neighbours"]["among"] == 2
    json.dumps(found, allow_nan=False)
    broken = measure_precision(random_forward(), random_forward(lambda values: values * float("nan")), batches(4))
    assert (broken["cls"]["not_finite"], broken["cls"]["cosine_worst"]) == (4, None)
    json.dumps(broken, allow_nan=False)


def test_a_reference_that_is_not_finite() -> None:
    with pytest.raises(WeightsError, match=r"cls: tokens of the network in float32 hold infinity or NaN; check"):
        measure_precision(random_forward(lambda values: values * float("nan")), random_forward(), batches(4))


def test_batches_may_be_cut_and_padded() -> None:
    sizes = []
    plain = random_forward()

    def small(images: np.ndarray) -> Tokens:
        sizes.append(len(images))
        return plain(images)

    def padded(images: np.ndarray) -> Tokens:
        return plain(np.concatenate([images, np.zeros((8 - len(images), *images.shape[1:]), images.dtype)]))

    expected = measure_precision(plain, random_forward(turned(0.3)), batches(8, 3))
    found = measure_precision(small, lambda images: _turn(padded(images)), batches(8, 3), reference_batch=3)
    assert sizes == [3, 3, 2, 3]
    assert found == expected
    assert set(measure_precision(plain, plain, batches(2), names={"cls"})) == {"cls"}


def _turn(tokens: Tokens) -> Tokens:
    turn = turned(0.3)
    return Tokens(cls=turn(tokens.cls[:, None])[:, 0], registers=tokens.registers, patches=turn(tokens.patches))


SOUND: dict[str, Any] = {
    "rows": 64,
    "not_finite": 0,
    "cosine_worst": 0.9999,
    "cosine_mean": 0.99998,
    "relative_error": 0.01,
    "norm_ratio": [0.999, 1.001],
    "neighbours": {"k": 10, "among": 64, "overlap": 0.99},
}


def check(thresholds: Thresholds = THRESHOLDS, weight_dtype: str = "same", **changes: Any) -> None:
    check_precision(
        {"cls": SOUND, "patches": {**SOUND, **changes}},
        thresholds,
        images=64,
        compute_dtype="float16",
        weight_dtype=weight_dtype,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cosine_worst": 0.5}, r"patches: worst cosine 0.5 below 0.99\. .*--min-cosine 0.5$"),
        ({"cosine_mean": 0.9}, r"patches: mean cosine 0.9 below 0.999\. .*--min-cosine 0.999$"),
        ({"norm_ratio": [0.4, 1.1]}, r"patches: a norm of 0.4 times that in float32, more than 0.05 away from 1"),
        ({"norm_ratio": [0.9, 1.2]}, r"patches: a norm of 1.2 times that in float32, more than 0.05 away from 1"),
        (
            {"neighbours": {"k": 10, "among": 64, "overlap": 0.25}},
            r"patches: 0.25 of the 10 nearest images in common, below 0.9",
        ),
        ({"cosine_worst": 0.7, "cosine_mean": 0.8}, r"worst cosine 0.7 below 0.99; patches: mean cosine 0.8 below"),
    ],
)
def test_what_fails_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check(**changes)
    assert str(caught.value).startswith("precision gate: float16 is too far from float32 on 64 images: patches: ")
    assert "Use --compute-dtype float32, or accept it, which the set then says" in str(caught.value)
    with pytest.raises(ConfigError, match=r"float16 with int8 weights is too far .* Use --weight-dtype same, or"):
        check(weight_dtype="int8", **changes)


def test_what_is_sound_passes() -> None:
    check()
    check(neighbours={"k": 10, "among": 31, "overlap": 0.1})  # too few to say
    check(thresholds_of("same", 0.5), cosine_worst=0.6, cosine_mean=0.7, norm_ratio=[0.1, 9.0])


def test_nothing_makes_up_for_infinity() -> None:
    broken = {**SOUND, **dict.fromkeys(("cosine_worst", "cosine_mean", "norm_ratio"))}
    with pytest.raises(ConfigError, match=r"infinity or NaN \(3 of 64 patches, on 64 images\); use --compute"):
        check(thresholds_of("same", -1.0), **{**broken, "not_finite": 3})
    with pytest.raises(ConfigError, match=r"infinity or NaN \(3 of 64 patches, on 64 images\); use --compute"):
        check(weight_dtype="int8", not_finite=3)


def test_thresholds() -> None:
    assert thresholds_of("same", None) == THRESHOLDS
    assert thresholds_of("fp8", None) == THRESHOLDS_8_BIT
    assert thresholds_of("fp8", 0.25) == Thresholds(cosine_worst=0.25)


@pytest.fixture
def pictures(tmp_path: Path, store_path: Path) -> Path:
    """A store with 20 registered pictures, 12 of them for training."""
    register_pictures(store_path, tmp_path / "data", 20)
    return store_path


def plan_of(store: Path, **options: Any) -> Plan:
    settings = {"model": "tiny", "res": "42", "compute_dtype": "bfloat16", **options}
    return make_plan(Store(store), "pics", SetConfig(**settings), RUN)


def run_gate(plan: Plan, *, batch_size: int = 8, said: list[str] | None = None) -> dict[str, Any] | None:
    backbone = load_for_set(plan.source, plan.spec["identity"], RUN, "cpu")

    def forward(images: np.ndarray) -> Tokens:
        assert len(images) == batch_size
        pixels = to_pixels(torch.from_numpy(images), plan.preprocess, device="cpu", dtype=backbone.dtype)
        return backbone(pixels, layers=plan.layers)

    lines: list[str] = [] if said is None else said
    return gate(plan, forward, RUN, device="cpu", batch_size=batch_size, say=lines.append)


def test_float32_needs_no_gate(pictures: Path) -> None:
    assert run_gate(plan_of(pictures, compute_dtype="float32")) is None


@pytest.mark.parametrize(
    ("compute_dtype", "weight_dtype", "least"),
    [
        ("bfloat16", "same", 0.9995),
        ("float16", "same", 0.99999),
        ("float32", "int8", 0.9998),
        ("bfloat16", "fp8", 0.999),
    ],
)
def test_sound_networks_pass(pictures: Path, compute_dtype: str, weight_dtype: str, least: float) -> None:
    said: list[str] = []
    plan = plan_of(
        pictures, compute_dtype=compute_dtype, weight_dtype=weight_dtype, tokens="cls,mean_patch,registers", layers="2"
    )
    found = run_gate(plan, said=said)
    assert found is not None
    kind = compute_dtype if weight_dtype == "same" else f"{compute_dtype} with {weight_dtype} weights"
    assert said == [f"pics/tiny@42: measuring {kind} against plain float32 on up to 64 images"]
    assert found["sample"] == {"images": 12, "seed": 0, "split": "train", "manifest": plan.manifest.short}
    layer = {"layers/2/cls", "layers/2/registers", "layers/2/patches"}
    assert set(found["arrays"]) == {"cls", "registers", "patches", *layer}
    assert found["arrays"]["patches"]["rows"] == 12 * 9
    assert all(least < one["cosine_worst"] < 0.9999999 for one in found["arrays"].values())
    assert found["thresholds"]["cosine_worst"] == thresholds_of(weight_dtype, None).cosine_worst
    assert found["asked"] is False
    assert found["tf32"] == tf32_state()
    assert found["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["device"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert run_gate(plan) == found  # seeded


def altered(plan: Plan, alter: Callable[[Any, LoadOptions], None]) -> Plan:
    """The plan with a network whose weights are changed after loading."""

    def loader(options: LoadOptions) -> Any:
        backbone = plan.source.loader(options)
        alter(backbone.network, options)  # type: ignore[attr-defined]
        return backbone

    return replace(plan, source=replace(plan.source, loader=loader))


def test_a_broken_network_fails(pictures: Path) -> None:
    def noise(network: Any, options: LoadOptions) -> None:
        if options.compute_dtype != "float32":
            weight = network.encoder.layer[1].mlp.fc1.weight
            weight += weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)

    plan = altered(plan_of(pictures), noise)
    with pytest.raises(ConfigError, match=r"precision gate: bfloat16 is too far from float32 on 12 images: cls: w"):
        run_gate(plan)
    asked = altered(plan_of(pictures, min_cosine=-0.5), noise)
    found = run_gate(asked)
    assert found is not None
    assert (found["asked"], found["thresholds"]["cosine_worst"]) == (True, -0.5)
    assert found["arrays"]["patches"]["cosine_worst"] < 0.99
    with pytest.raises(ConfigError, match=r"worst cosine 0\.\d+ below 0.999999"):
        run_gate(plan_of(pictures, min_cosine=0.999999))


def test_overflow_of_float16_fails(pictures: Path) -> None:
    def grow(network: Any, options: LoadOptions) -> None:
        for layer in network.encoder.layer:  # the same function, with activations beyond 65504
            layer.mlp.fc2.weight *= 2.0**18
            layer.mlp.fc2.bias *= 2.0**18
            layer.layer_scale2.lambda1 /= 2.0**18

    message = (
        r"in float16 tokens that are finite in float32 hold infinity or NaN \(.* cls, .* patches, on 12 images\); "
        "use --compute-dtype bfloat16 or float32"
    )
    with pytest.raises(ConfigError, match=message):
        run_gate(altered(plan_of(pictures, compute_dtype="float16", min_cosine=-1.0), grow))
    assert run_gate(altered(plan_of(pictures), grow)) is not None  # the range of bfloat16 is that of float32


def test_equal_images_count_once(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 20)
    paths = sorted((tmp_path / "data/images").iterdir())
    for path in paths[1:]:
        path.write_bytes(paths[0].read_bytes())
    register(store_path, "pics", tmp_path / "data", CONFIG)
    found = run_gate(plan_of(store_path))
    assert found is not None
    assert found["sample"]["images"] == 1
    assert found["arrays"]["cls"]["neighbours"] == {"k": 0, "among": 1, "overlap": None}


def test_nothing_to_compare(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 3)
    for path in (tmp_path / "data/images").iterdir():
        path.write_bytes(b"broken")
    register(store_path, "pics", tmp_path / "data", CONFIG)
    with pytest.raises(ConfigError, match=r"no image of pics could be decoded: nothing can be measured, and no"):
        run_gate(plan_of(store_path))


def test_the_sample_is_bounded_by_its_cost(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample_size(plan_of(pictures), "cpu") == 64
    large = plan_of(pictures, model="dinov3-large", res="512", random_weights=0)
    gflops = large.source.architecture.gflops(512, 512)
    assert sample_size(large, "cpu") == max(2, int(2000 / gflops)) == 2
    assert sample_size(large, "cuda:1") == 64
    middle = plan_of(pictures, model="dinov2-base", res="224", random_weights=0)
    monkeypatch.setitem(precision.GFLOP, "cpu", 5.5 * middle.source.architecture.gflops(224, 224))
    assert sample_size(middle, "cpu") == 5


def test_float32_is_what_it_says() -> None:
    before = tf32_state()
    assert before == {"matmul": False, "cudnn": True, "precision": "highest"}
    torch.set_float32_matmul_precision("high")
    try:
        assert tf32_state() == {"matmul": True, "cudnn": True, "precision": "high"}
        with full_float32():
            assert tf32_state()["precision"] == "highest"
        assert tf32_state()["precision"] == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert tf32_state() == before


def test_flags_that_torch_refuses_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixed:
        @property
        def allow_tf32(self) -> bool:
            raise RuntimeError("you have used mix of the legacy and new APIs")

    monkeypatch.setattr(torch.backends.cuda, "matmul", Mixed())
    assert tf32_state()["matmul"] is None


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("compute_dtype", "weight_dtype"),
    [
        ("bfloat16", "same"),
        pytest.param("float16", "same", marks=pytest.mark.slow),
        pytest.param("bfloat16", "int8", marks=pytest.mark.slow),
        pytest.param("bfloat16", "fp8", marks=pytest.mark.slow),
    ],
)
def test_real_images(shared_data: Path, store_path: Path, compute_dtype: str, weight_dtype: str) -> None:
    """Measured on 64 of them: worst patch 0.99987, 0.999997, 0.99985 and 0.9997; nearest images 0.99 and more."""
    register(store_path, "pics", shared_data / "cxr-paed/images/normal", RegisterConfig())
    found = run_gate(plan_of(store_path, res="98", compute_dtype=compute_dtype, weight_dtype=weight_dtype))
    assert found is not None
    assert found["sample"]["images"] == 64
    assert all(one["cosine_worst"] > 0.999 for one in found["arrays"].values())
    assert all(one["neighbours"]["overlap"] > 0.95 for one in found["arrays"].values())
