"""What backbones were trained on, and what a record says of a data set that may be among it."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featstore.backbones import BACKBONES, describe
from featstore.backbones.catalogue import entries, pretraining_of, pretraining_of_name
from featstore.backbones.tiny import FOLDER as TINY_FOLDER
from featstore.datasets import DATASETS
from featstore.pretraining import ANYTHING, CORPORA, RENDERED, SAME_IMAGES, find_corpus, overlap, overlap_of_set
from featstore.store.importer import import_features
from probes.configs import EvalConfig, KnnConfig
from probes.evaluation import evaluate_sets

CHEST = ("MIMIC-CXR", "CheXpert", "NIH ChestX-ray14", "PadChest", "BRAX")


@pytest.mark.parametrize(
    ("trained", "family", "answer"),
    [
        (CHEST, "nih", "yes"),
        (CHEST, "rsna", "yes"),  # its images are ChestX-ray14's
        (CHEST, "vindr-cxr", "no"),
        (CHEST, "camelyon16", "no"),
        ((*CHEST, "LVD-142M"), "chexpert", "yes"),
        ((*CHEST, "LVD-142M"), "vindr-cxr", "unknown"),  # a crawl of the web lies below
        (("ImageNet-1k",), "chexpert", "no"),
        (("ImageNet-1k", "SA-1B"), "kvasir-capsule", "no"),
        (("SAT-493M",), "camelyon17", "no"),
        (("Mass-100K",), "camelyon17", "no"),
        (("CONCH-1.17M",), "camelyon17", "unknown"),
        (("PMC-15M",), "nih", "unknown"),
        (("LVD-1689M",), "nih", "unknown"),
        (("WIT-400M",), "nih", "unknown"),
        (("LAION-2B",), "nih", "unknown"),
        (("Something new",), "nih", "unknown"),
        (("imagenet 1K", "nih chestx_ray14"), "nih", "yes"),  # the spelling does not matter
        (None, "nih", "unknown"),
        ((), "nih", "unknown"),
        (("ImageNet-1k",), "folder", "unknown"),  # which may hold anything
        (("LVD-142M",), "phantom", "no"),  # nobody has seen what is rendered here
        (None, "phantom", "no"),
    ],
)
def test_overlap(trained: tuple[str, ...] | None, family: str, answer: str) -> None:
    assert overlap(trained, family) == answer


def test_the_table_speaks_of_families_that_there_are() -> None:
    named = {family for corpus in CORPORA.values() for family in corpus.holds}
    named |= {*SAME_IMAGES, *(other for others in SAME_IMAGES.values() for other in others), *ANYTHING, *RENDERED}
    assert named <= {*DATASETS, "import"}
    assert all(corpus.source for corpus in CORPORA.values())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_says_what_it_was_trained_on(name: str) -> None:
    trained = pretraining_of_name(name)
    assert trained or name == "tiny-random"
    assert [item for item in trained if find_corpus(item) is None] == []


def test_a_result_rests_on_all_its_data_sets() -> None:
    facts = {"pretraining": ["MIMIC-CXR"]}
    assert overlap_of_set(facts, ["chexpert", "mimic-cxr"], random=False) == "yes"
    assert overlap_of_set(facts, ["chexpert", "nih"], random=False) == "no"
    assert overlap_of_set(facts, ["chexpert", "folder"], random=False) == "unknown"
    assert overlap_of_set(facts, ["mimic-cxr"], random=True) == "no"
    assert overlap_of_set({}, ["chexpert"], random=False) == "unknown"  # a set from before there were these facts


def test_facts_go_with_the_weights_not_with_the_name(tmp_path: Path) -> None:
    assert overlap(pretraining_of(describe("tiny")), "nih") == "yes"
    assert pretraining_of(describe("tiny-random")) is None
    assert pretraining_of(describe(f"hf:{TINY_FOLDER}")) is None  # a folder says nothing of its training
    named = shutil.copytree(TINY_FOLDER, tmp_path / "tiny")
    assert pretraining_of(describe(f"hf:{named}")) is None  # whatever it is called
    hub = replace(describe("tiny"), listed=None, weights={"kind": "hub", "repo": "google/vit-large-patch16-224"})
    assert pretraining_of(hub) == ["ImageNet-21k", "ImageNet-1k"]
    assert pretraining_of(replace(hub, weights={"kind": "hub", "repo": "lab/x"})) is None
    for _, _, release in entries():
        for place in () if release is None else (release.hub_id, *release.aliases):
            assert pretraining_of(replace(hub, weights={"kind": "hub", "repo": place})) == [*release.pretraining]
    # A file under a model's name may have been trained further, on anything.
    local = pretraining_of(describe("tiny", weights=TINY_FOLDER))
    assert overlap(local, "nih") == "yes"
    assert overlap(local, "vindr-cxr") == "unknown"


def test_records_state_it(tmp_path: Path, store_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "features": rng.normal(size=(40, 4)).astype(np.float32),
        "ids": np.array([f"s{i}" for i in range(40)]),
        "label": np.array(["a", "b"] * 20),
        "split": np.array(["train"] * 20 + ["val"] * 10 + ["test"] * 10),
    }
    np.savez(tmp_path / "f.npz", **arrays)
    store = import_features(store_path, tmp_path / "f.npz", dataset="x", model="m")[0]
    config = EvalConfig(dataset="x", labels="label", resamples=2)
    (record,) = evaluate_sets(store, "knn", config, KnnConfig(k="3"))
    assert record["pretraining_overlap"] == "unknown"
