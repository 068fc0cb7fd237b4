"""Real radiographs beside the checkout, fine-tuned by every method as a user would; learning against frozen.

One rate, few epochs and a third of the images where numbers are not the point: about two minutes on an idle core.
"""

import csv
from pathlib import Path
from typing import Any

import pytest

from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store.catalog import Store
from probes.compare import compare
from probes.finetune import evaluate_finetune
from probes.paired import Criteria

pytestmark = [pytest.mark.realdata, pytest.mark.slow]
COMMON: dict[str, Any] = {
    "dataset": "x", "labels": "pneumonia", "model": "tiny", "res": "56", "lr": "3e-4", "epochs": 2, "batch": 32,
    "resamples": 200, "workers": 1, "decoded_cache": True,
}  # fmt: skip
METHODS = ("linear-online", "full", "lora", "bitfit", "last-k")
EVERY = 8  # of the images of the small set
# What `linear-online` trains of `tiny`: a head on CLS and the mean patch, 2 x 192 numbers and a bias.
HEAD = 2 * 192 + 1


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Store:
    """All images as `x`, and every eighth as `few`."""
    folder = tmp_path_factory.mktemp("real")
    columns: dict[str, Any] = {"group_column": "patient_id", "split_column": "split", "label_columns": "pneumonia"}
    images = shared_data / "cxr-paed"
    register(folder / "store", "x", images, RegisterConfig(table=Path("metadata.csv"), **columns))
    with (images / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[::EVERY]
    with (folder / "few.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    register(folder / "store", "few", images, RegisterConfig(table=folder / "few.csv", **columns))
    return Store(folder / "store")


def tune(store: Store, **options: Any) -> dict[str, Any]:
    from finetunes import request

    (record,) = evaluate_finetune(store, request(**{**COMMON, **options}))
    test = record["metrics"]["test"]
    print(record["choices"]["method"], test["macro"]["auroc"], test["intervals"]["macro"]["auroc"], record["cost"])
    return record


def auroc(record: dict[str, Any]) -> float:
    return float(record["metrics"]["test"]["macro"]["auroc"])


@pytest.fixture(scope="module")
def mobile(shared_data: Path) -> dict[str, Any]:
    """MobileNetV2 as ImageNet left it, whose batch norms hold no statistics."""
    weights = shared_data / "weights" / "mobilenet_v2_imagenet_fp16.safetensors"
    return {"model": "mobilenetv2", "weights": weights, "res": "64", "features": "cls"}


@pytest.fixture(scope="module")
def full(store: Store, mobile: dict[str, Any]) -> dict[str, Any]:
    """All of it trained, with everything but the rate and the length as the fair preset has it."""
    return tune(store, method="full", **mobile)


def test_training_beats_the_frozen_network_of_imagenet(
    store: Store, mobile: dict[str, Any], full: dict[str, Any]
) -> None:
    frozen = tune(store, method="linear-online", **mobile)
    folder = store.path / "results"
    found = compare(full["id"], frozen["id"], Criteria(num_resamples=500), store=store, folder=folder)
    assert found["price"]["unequal"] == []  # the same images, rate, epochs, seed and augmentation
    delta = found["result"]["macro"]["delta"]
    assert delta["low"] > 0.005  # not by chance of the patients
    assert delta["value"] > 0.02
    assert found["price"]["verdict"].startswith("A has the better auroc")


def test_norms_without_statistics_would_ruin_the_network(
    store: Store, mobile: dict[str, Any], full: dict[str, Any]
) -> None:
    """Why the default keeps them: statistics of the batch make another network of folded norms, in the first step."""
    assert full["choices"]["training"]["adapter"]["batch_norm"] == "frozen"
    note = "batch norms stay frozen: 52 of 52 hold no statistics"
    assert [text for text in full["notes"] if text.startswith(note)]
    assert auroc(full) > 0.95
    moved = tune(store, method="full", batch_norm="train", **mobile)
    assert [text for text in moved["notes"] if text.startswith("batch norms move although 52 of 52")]
    assert auroc(moved) < auroc(full) - 0.1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_at_the_size_of_the_images(method: str, store: Store, tmp_path: Path) -> None:
    record = tune(store, dataset="few", method=method, res="224", epochs=1, runs=tmp_path)
    assert record["set"] == "few/tiny@224"
    assert auroc(record) > 0.85  # of 33 images; the tiny network has seen such images, and the head starts from that
    trained = record["cost"]["trainable_parameters"]
    assert trained == HEAD if method == "linear-online" else trained > 2 * HEAD
    assert record["cost"]["seconds"] > 0
    bounds = record["metrics"]["test"]["intervals"]["macro"]["auroc"]
    assert 0.5 < bounds["low"] <= auroc(record) <= bounds["high"] <= 1


def test_random_weights_are_named_as_such(store: Store) -> None:
    record = tune(store, method="full", random_weights=0, epochs=1)
    assert record["random_weights"]
    assert record["set"] == "x/tiny-random@56"
    assert auroc(record) > 0.85


def test_adapters_of_a_convolutional_network_make_features(store: Store, mobile: dict[str, Any]) -> None:
    record = tune(store, dataset="few", method="lora", epochs=1, **mobile)
    assert auroc(record) > 0.85
    tuned = Path(record["choices"]["weights"])
    config = SetConfig(model="mobilenetv2", weights=tuned, res="64", name="mobilenetv2-lora", compute_dtype="float32")
    plan = make_plan(store, "few", config, RunConfig(device="cpu"))
    assert plan.spec["fingerprint"] != record["fingerprint"]
    assert extract(plan, RunConfig(device="cpu")).computed == 135
