"""Presets as data, what flags change in them, and that every change is listed."""

from typing import Any

import pytest
from finetunes import request

from featstore.errors import ConfigError
from probes.finetune_fit import describe_augmentation
from probes.finetune_presets import FAIR_RATES, PRESETS, Settled


def settled(**options: Any) -> Settled:
    """A preset with nothing but what is given."""
    plain = dict.fromkeys(("method", "lr", "epochs", "batch", "seeds"))
    return request(**{**plain, **options}).settled


def test_chest_as_the_paper_has_it() -> None:
    found = settled(preset="chest")
    (rate,) = found.rates
    recipe = found.recipe(rate, 7)
    assert (found.method, rate, recipe.epochs, recipe.batch, recipe.drop_last) == ("full", (1e-5, None), 100, 30, True)
    how = recipe.optimisation
    assert (how.optimizer, how.weight_decay, how.schedule, how.warmup) == ("adamw", 0.0, "constant", 0.0)
    assert (how.clip, how.ema, recipe.patience) == (None, None, None)
    assert (recipe.keep, recipe.class_weight, recipe.seed) == ("loss", "balanced", 7)
    assert (recipe.augment.flip, recipe.augment.degrees, recipe.augment.interpolation) == ("plain", 7.0, "nearest")
    assert found.values["start"] == "random"
    assert found.deviations == found.preset.gaps
    asked = request(method=None, preset="chest", res=None)
    assert asked.published == "dinov3-cxr"
    assert describe_augmentation(found.values) == "mirrored (plain), turned by up to 7 degrees"


def test_lora_of_the_chest_paper() -> None:
    found = settled(preset="lora-chest")
    adapter = found.adapter(3)
    assert (found.method, found.rates) == ("lora", [(1e-4, None)])
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.bias, adapter.seed) == (16, 32.0, 0.05, "none", 3)
    assert found.values["batch"] == 16
    assert request(preset="lora-chest", method=None, res=None).set_config.res == "512"
    assert request(preset="lora-chest", method=None, res="224").set_config.res == "224"


@pytest.mark.parametrize(
    ("preset", "method"), [("radiology", "full"), ("lora-radiology", "lora"), ("bitfit-radiology", "bitfit")]
)
def test_radiology_as_its_code_has_it(preset: str, method: str) -> None:
    found = settled(preset=preset)
    assert found.method == method
    assert found.rates == [(1e-5, head) for head in (1e-3, 5e-3, 1e-2, 5e-2)]
    recipe = found.recipe(found.rates[1], 0)
    how = recipe.optimisation
    assert (how.optimizer, how.momentum, how.weight_decay, how.lr, how.head_lr) == ("sgd", 0.9, 0.0, 1e-5, 5e-3)
    assert (recipe.epochs, how.schedule, recipe.keep) == (10, "cosine", "auroc")
    assert (recipe.augment.crop, recipe.augment.flip) == ("0.75-1", "plain")
    assert found.values["refit"]
    adapter = found.adapter(0)
    if method == "lora":
        assert (adapter.r, adapter.alpha, adapter.dropout, adapter.bias) == (48, 16.0, 0.1, "lora_only")
        assert adapter.targets == "qkv,fc1,fc2"
    else:
        assert (adapter.r, adapter.targets) == (None, None)


@pytest.mark.parametrize("method", list(FAIR_RATES))
def test_fair_tries_three_rates_and_three_seeds(method: str) -> None:
    found = settled(method=method)
    assert len(found.rates) == 3
    assert list(found.seeds) == [0, 1, 2]
    assert (found.values["start"], found.precision) == ("linear", "float32")
    assert found.deviations == ()
    assert all(head is None for _, head in found.rates)
    assert found.recipe(found.rates[0], 0).augment.flip == "auto"


@pytest.mark.parametrize(
    ("options", "departure"),
    [
        ({"lr": "1e-4"}, "--lr 1e-4; chest has 1e-5"),
        ({"epochs": 5}, "--epochs 5; chest has 100"),
        ({"method": "lora"}, "--method lora; chest has full"),
        ({"drop_last": False}, "--drop-last no; chest has yes"),
        ({"flip": "off"}, "--flip off; chest has plain"),
        ({"ema": 0.99}, "--ema 0.99; chest has 0"),
        ({"seeds": 3}, "--seeds 3; chest has 1"),
        ({"start": "linear"}, "--start linear; chest has random"),
        ({"class_weight": "none"}, "--class-weight none; chest has balanced"),
        ({"head_lr": "1e-3"}, "--head-lr 1e-3; chest has none"),
    ],
)
def test_every_change_is_listed(options: dict[str, Any], departure: str) -> None:
    found = settled(preset="chest", **options)
    assert found.deviations == (departure, *found.preset.gaps)


def test_what_is_given_as_published_is_no_change() -> None:
    assert settled(preset="chest", lr="0.00001", epochs=100, method="full").deviations == PRESETS["chest"].gaps


def test_rates_of_the_network_and_the_head_are_crossed() -> None:
    found = settled(method="full", lr="1e-4,1e-5,1e-4", head_lr="1e-2,1e-3")
    assert found.rates == [(1e-5, 1e-3), (1e-5, 1e-2), (1e-4, 1e-3), (1e-4, 1e-2)]
    alone = settled(preset="radiology", method="linear-online")
    assert alone.rates == [(1e-3, None), (5e-3, None), (1e-2, None), (5e-2, None)]


def test_options_of_a_record_are_flat_and_whole() -> None:
    found = settled(method="lora", r=4, compute_dtype="bfloat16").options(2)
    assert all(isinstance(value, str | int | float | bool) for value in found.values())
    assert (found["train_seed"], found["r"], found["alpha"], found["compute_dtype"]) == (2, 4, 32.0, "bfloat16")
    assert "k" not in found
    assert settled(method="last-k").options(0)["k"] == 2


def test_images_of_a_preset_give_way_to_flags() -> None:
    assert request(preset="chest", method=None, published="none").published is None
    assert request(preset="chest", method=None, published="xrv").set_config.published == "xrv"
    assert request().published is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--method says what of the network trains beside the head: full, lora, bitfit, last-k, linear-online"),
        ({"method": "full", "r": 8}, "--r is a setting of lora, and the method is full; leave it out"),
        ({"method": "lora", "k": 2}, "--k is a setting of last-k, and the method is lora"),
        ({"preset": "lora-chest", "method": "full", "alpha": 8.0}, "--alpha is a setting of lora"),
        ({"method": "full", "lr": "0"}, "--lr takes positive numbers, comma-separated; got '0'"),
        ({"method": "full", "head_lr": "x"}, "--head-lr takes positive numbers"),
        ({"method": "full", "epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"method": "full", "seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"method": "full", "layer_decay": 2.0}, "layer decay must be above 0 and at most 1"),
        ({"method": "full", "ema": 1.0}, "ema must be above 0 and below 1"),
        ({"method": "lora", "dropout": 1.0}, "dropout must be at least 0 and below 1"),
        (
            {"method": "full", "keep": "last", "patience": 3},
            "--keep last trains to the last epoch, and --patience ends",
        ),
        ({"method": "linear-online", "lr": "1e-3", "head_lr": "1e-2"}, "at one rate: give --lr or --head-lr, not both"),
        ({"method": "linear-online", "layer_decay": 0.5}, "--layer-decay is of blocks that train, and linear-online"),
        (
            {"method": "full", "degrees": 0.0, "interpolation": "nearest"},
            "--interpolation is of turning, and no image is turned; give --degrees, or leave it out",
        ),
    ],
)
def test_what_cannot_be_is_said_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settled(**options)
