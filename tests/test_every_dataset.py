"""Every adapter registers its miniature, a backbone runs over it, and a probe (or the masks) can be read."""

from pathlib import Path

import numpy as np
import pytest
from miniatures import WRITERS

from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.datasets import DATASETS, GENERATED
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store.catalog import Store
from probes.configs import EvalConfig, KnnConfig
from probes.evaluation import evaluate_sets

ADAPTERS = sorted(set(DATASETS) - set(GENERATED))


def test_every_adapter_has_a_miniature() -> None:
    assert sorted(WRITERS) == ADAPTERS


# One of each kind of input each time; all of them with the full counts.
QUICK = ("camelyon17", "chexpert", "ct-rate", "folder", "nih", "table", "vindr-cxr")


@pytest.mark.parametrize(
    "adapter", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in ADAPTERS]
)
def test_register_extract_probe(adapter: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    made = WRITERS[adapter](tmp_path / "data")
    manifest, _ = register(tmp_path / "store", "mine", made.root, RegisterConfig(adapter=adapter, **made.config))
    assert len(manifest) == made.samples
    store = Store(tmp_path / "store")
    config, run = SetConfig(model="tiny", res="28", compute_dtype="float32"), RunConfig(device="cpu", workers=1)
    summary = extract(make_plan(store, "mine", config, run), run)
    assert summary.computed == made.samples
    assert summary.reasons == {}
    features = store.set("mine/tiny@28")
    assert np.isfinite(features.load("cls+mean_patch")).all()
    for task in made.tasks or ([None] if made.labels else []):
        records = evaluate_sets(
            store,
            "knn",
            EvalConfig(dataset="mine", task=task, labels=made.labels, features="cls", resamples=10),
            KnnConfig(k="1,3"),
        )
        assert len(records) == 1
    if made.masks:
        from featstore.images.masks import read_masks

        rows = [row for row, path in enumerate(manifest.column("mask_path")) if path is not None][:8]
        assert rows
        preprocess = make_plan(store, "mine", config, run).preprocess
        masks = read_masks(manifest, np.array(rows), preprocess)
        assert masks.shape == (len(rows), 28, 28)
        assert masks.max() > 0, "no mask shows anything"
    assert made.tasks or made.labels or made.masks or adapter == "nih"
