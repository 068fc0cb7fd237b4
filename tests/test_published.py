"""Presets of papers: what they settle, what contradicts them, what is said of them; `featstore intensities`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import register_pictures
from typer.testing import CliRunner

from cli.extract import _print_plan
from cli.intensities import intensities
from featstore.configs import RunConfig, SetConfig
from featstore.errors import ConfigError, UnknownNameError
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import describe_backbone, make_plan
from featstore.images import decode, preprocess, stack, to_pixels
from featstore.images import published as presets
from featstore.images.intensity import canonical_intensity
from featstore.images.published import PUBLISHED, Published, apply_published, deviations_of, published
from featstore.request import command_of, config_of
from featstore.store.catalog import Store
from featstore.store.layout import differences

RUN = RunConfig(device="cpu", dry_run=True)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_preset_can_be_used_and_says_what_deviates(name: str) -> None:
    preset = PUBLISHED[name]
    assert canonical_intensity(preset.intensity) == preset.intensity or preset.intensity.startswith("window:")
    settled = apply_published(SetConfig(model="tiny", published=name))
    assert (settled.intensity, settled.geometry, settled.dicom_mode) == (
        preset.intensity,
        preset.geometry,
        preset.dicom_mode,
    )
    assert settled.res == str(preset.sizes[0])
    assert (preset.mean is None) == (preset.std is None)
    assert all(sentence and not sentence.endswith(".") for sentence in preset.deviations)
    assert deviations_of(name, (preset.sizes[0], preset.sizes[0])) == preset.deviations


def test_equalisation_of_dinov3_cxr_is_global_and_not_clahe() -> None:
    preset = published("dinov3-cxr")
    assert preset.intensity == "minmax+equalise"
    assert (preset.mean, preset.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # [0, 1] and no ImageNet statistics


def test_dinov2_radiology_is_min_max_of_each_channel_and_imagenet_statistics() -> None:
    preset = published("dinov2-radiology")
    assert (preset.intensity, preset.geometry) == ("minmax-channels", "squash")
    assert preset.mean == (0.485, 0.456, 0.406)


def test_an_unknown_preset() -> None:
    with pytest.raises(
        UnknownNameError, match="--published: unknown preset 'dinov4'; known: ct-clip, dinov2-radiology, "
    ):
        apply_published(SetConfig(model="tiny", published="dinov4"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"intensity": "clahe"}, "has --intensity minmax.equalise, and --intensity native.clahe:2/8 contradicts it"),
        ({"geometry": "letterbox"}, "has --geometry spline, and --geometry letterbox contradicts it; leave one out"),
        ({"geometry": "hf"}, "--published dinov3-cxr has --geometry spline, and --geometry hf contradicts it"),
        ({"dicom_mode": "xrv"}, "has --dicom-mode raw_minmax, and --dicom-mode xrv contradicts it"),
        ({"decode": "scaled"}, "has --decode full, and --decode scaled contradicts it"),
    ],
)
def test_flags_that_contradict_a_preset(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_published(SetConfig(model="tiny", published="dinov3-cxr", **values))


def test_flags_that_agree_with_a_preset() -> None:
    config = SetConfig(model="tiny", published="ct-clip", intensity="window:0/2000", res="98")
    assert apply_published(config).intensity == "window:ct-clip"
    assert apply_published(config).res == "98"
    plain = SetConfig(model="tiny")
    assert apply_published(plain) is plain


@pytest.mark.parametrize("pixels", [(98, 98), (224, 512), (518, 518)])
def test_another_size_deviates_too(pixels: tuple[int, int]) -> None:
    said = deviations_of("dinov3-cxr", pixels)[-1]
    assert said == f"images are {pixels[0]}x{pixels[1]} pixels; published is 224 or 512 or 1024, square"


# Plans


@pytest.fixture
def store(tmp_path: Path, store_path: Path) -> Store:
    register_pictures(store_path, tmp_path / "data", 8)
    return Store(store_path)


def test_a_plan_follows_its_preset(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    config = SetConfig(model="tiny", published="dinov3-cxr")
    plan = make_plan(store, "pics", config, RUN)
    spec = plan.preprocess
    assert (spec.intensity, spec.geometry, spec.dicom_mode) == ("minmax+equalise", "spline", "raw_minmax")
    assert (spec.height, spec.width, spec.mean, spec.std) == (224, 224, (0.0,) * 3, (1.0,) * 3)
    assert plan.spec["published"] == {
        "name": "dinov3-cxr",
        "source": PUBLISHED["dinov3-cxr"].source,
        "deviations": list(PUBLISHED["dinov3-cxr"].deviations),
    }
    assert plan.name == "pics/tiny@224"
    _print_plan(plan, RUN)
    printed = capsys.readouterr().out
    assert "images after dinov3-cxr: intensity minmax+equalise, geometry spline, 224x224 pixels, mean (0.0" in printed
    assert "not as published" in printed
    assert all(f"  - {sentence}\n" in printed for sentence in PUBLISHED["dinov3-cxr"].deviations)


def test_the_model_normalises_where_the_preset_does_not_say(store: Store) -> None:
    plan = make_plan(store, "pics", SetConfig(model="tiny", published="dinov3-medical"), RUN)
    assert plan.preprocess.mean == plan.source.architecture.mean
    assert (plan.preprocess.height, plan.preprocess.width) == (252, 252)  # 256 on patch 14
    assert plan.spec["published"]["deviations"][-1] == "images are 252x252 pixels; published is 256, square"


def test_a_preset_is_no_part_of_the_identity(store: Store) -> None:
    named = make_plan(store, "pics", SetConfig(model="tiny", published="dinov2-radiology-brain"), RUN).spec
    typed = make_plan(store, "pics", SetConfig(model="tiny", intensity="brain-c", res="224"), RUN).spec
    assert named["fingerprint"] == typed["fingerprint"]
    assert "published" not in typed
    assert "published" not in named["identity"]


def test_as_published_is_said_where_nothing_deviates(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Published(title="t", source="s", intensity="minmax", sizes=(42,), deviations=())
    monkeypatch.setitem(presets.PUBLISHED, "exact", exact)
    plan = make_plan(store, "pics", SetConfig(model="tiny", published="exact"), RUN)
    assert plan.spec["published"]["deviations"] == []
    assert [note.split(":")[0] for note in plan.notes] == ["images as published by exact"]
    other = make_plan(store, "pics", SetConfig(model="tiny", published="exact", res="56"), RUN)
    assert other.notes[0].startswith("images after exact: ")


def test_the_request_of_a_preset_can_be_asked_again(store: Store) -> None:
    config = SetConfig(model="tiny", published="dinov3-cxr", compute_dtype="float32")
    spec = make_plan(store, "pics", config, RUN).spec
    assert config_of(spec) == config
    assert command_of(spec).endswith("--compute-dtype float32 --published dinov3-cxr")
    assert make_plan(store, "pics", config_of(spec), RUN).spec["fingerprint"] == spec["fingerprint"]


def test_intensities_make_other_sets_whose_difference_reads_well(store: Store) -> None:
    plain, clipped = (
        make_plan(store, "pics", SetConfig(model="tiny", res="42", intensity=text), RUN)
        for text in ("native", "percentile:1-99+clahe")
    )
    assert plain.folder != clipped.folder
    found = differences(plain.spec["identity"], clipped.spec["identity"])
    assert found == [("preprocess.intensity", "native", "percentile:1-99+clahe:2/8")]
    with pytest.raises(ConfigError, match="intensity must be steps"):
        make_plan(store, "pics", SetConfig(model="tiny", intensity="log"), RUN)


@pytest.mark.parametrize(
    "values", [{"intensity": "windows:0..80,40..120,90..250"}, {"published": "dinov3-cxr"}, {"published": "xrv"}]
)
def test_sets_are_extracted_with_it(store: Store, values: dict[str, Any]) -> None:
    """One channel or three: the network's input is that of `preprocess`, and no other than without."""
    config = SetConfig(model="tiny", res="42", dtype="float32", compute_dtype="float32", **values)
    run = RunConfig(batch_size=4, workers=1, device="cpu")
    plan = make_plan(store, "pics", config, run)
    assert extract(plan, run).failed == 0
    image = decode((Path(plan.manifest.root) / plan.manifest.column("path")[0]).read_bytes())
    batch = torch.from_numpy(stack([preprocess(image, plan.preprocess)], plan.preprocess))
    pixels = to_pixels(batch, plan.preprocess, device="cpu", dtype=torch.float32)
    network = plan.source.load(device="cpu", compute_dtype="float32", attention="sdpa")
    with torch.inference_mode():
        expected = network(pixels).cls[0].numpy()
    found = store.open(store.entries("pics")[0])
    np.testing.assert_allclose(found.load("cls")[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"intensity": "log"}, r"intensity must be steps joined by '\+' out of native, .*; got 'log'"),
        ({"published": "mine"}, "--published: unknown preset 'mine'; known: ct-clip, "),
    ],
)
def test_mistakes_are_said_before_a_backbone_is_looked_for(store: Store, values: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        describe_backbone(store, SetConfig(model="there-is-none", **values))


# The command


def run_command(*arguments: str) -> str:
    import typer

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(intensities)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0
    return result.output


def test_intensities_are_listed() -> None:
    text = run_command()
    for part in ("percentile:LOW-HIGH:volume", "lung", "-1350 to 150 (-600/1500)", "clahe[:CLIP/TILES]"):
        assert part in text
    for name, preset in PUBLISHED.items():
        assert f"  {name}: {preset.title}" in text
        assert all(f"not as published: {sentence}" in text for sentence in preset.deviations)


def test_intensities_as_json() -> None:
    found = json.loads(run_command("--json"))
    assert found["windows"]["amos"] == [-1024, 600]
    assert set(found["published"]) == set(PUBLISHED)
    assert found["published"]["xrv"]["mean"] is None
