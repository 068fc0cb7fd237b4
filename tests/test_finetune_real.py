"""Real radiographs beside the checkout, fine-tuned by every method as a user would; learning against frozen."""

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
    "dataset": "x", "labels": "pneumonia", "model": "tiny", "res": "56", "lr": "3e-4", "epochs": 3, "batch": 32,
    "resamples": 100, "workers": 2, "decoded_cache": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Store:
    path = tmp_path_factory.mktemp("real") / "store"
    config = RegisterConfig(
        table=Path("metadata.csv"), group_column="patient_id", split_column="split", label_columns="pneumonia"
    )
    register(path, "x", shared_data / "cxr-paed", config)
    return Store(path)


def tune(store: Store, **options: Any) -> dict[str, Any]:
    from finetunes import request

    (record,) = evaluate_finetune(store, request(**{**COMMON, **options}))
    test = record["metrics"]["test"]
    print(record["choices"]["method"], test["macro"]["auroc"], test["intervals"]["macro"]["auroc"], record["cost"])
    return record


def test_training_beats_the_frozen_network_of_imagenet(store: Store, shared_data: Path) -> None:
    weights = shared_data / "weights" / "mobilenet_v2_imagenet_fp16.safetensors"
    options: dict[str, Any] = {"model": "mobilenetv2", "weights": weights, "res": "64", "features": "cls"}
    options["batch_norm"] = "frozen"  # 60 steps move running statistics by chance
    frozen, full = (tune(store, method=method, **options) for method in ("linear-online", "full"))
    found = compare(frozen["id"], full["id"], Criteria(num_resamples=100), store=store, folder=store.path / "results")
    assert found["price"]["unequal"] == []
    assert full["metrics"]["test"]["macro"]["auroc"] > frozen["metrics"]["test"]["macro"]["auroc"]


def test_random_weights_are_named_as_such(store: Store) -> None:
    record = tune(store, method="full", random_weights=0, epochs=1)
    assert record["random_weights"]
    assert record["set"] == "x/tiny-random@56"
    assert record["metrics"]["test"]["macro"]["auroc"] > 0.85


@pytest.mark.parametrize("method", ["lora", "bitfit", "last-k"])
def test_other_methods_on_weights_that_have_seen_radiographs(method: str, store: Store) -> None:
    assert tune(store, method=method)["metrics"]["test"]["macro"]["auroc"] > 0.93


def test_mobilenet_of_imagenet(store: Store, shared_data: Path) -> None:
    weights = shared_data / "weights" / "mobilenet_v2_imagenet_fp16.safetensors"
    options: dict[str, Any] = {"model": "mobilenetv2", "weights": weights, "res": "96", "features": "cls"}
    record = tune(store, method="lora", **options)
    assert record["metrics"]["test"]["macro"]["auroc"] > 0.9
    tuned = Path(record["choices"]["weights"])
    config = SetConfig(model="mobilenetv2", weights=tuned, res="96", name="mobilenetv2-lora", compute_dtype="float32")
    plan = make_plan(store, "x", config, RunConfig(device="cpu"))
    assert plan.spec["fingerprint"] != record["fingerprint"]
    assert extract(plan, RunConfig(device="cpu")).computed == 1080
