"""Small sets with reduced patches, for the tests of reductions."""

from pathlib import Path
from typing import Any

import numpy as np

from featstore.configs import RunConfig, SetConfig
from featstore.extraction.pipeline import Summary, extract
from featstore.extraction.plan import make_plan
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet

RUN = RunConfig(batch_size=8, workers=2, device="cpu")


def config(steps: str, **options: Any) -> SetConfig:
    return SetConfig(
        **{"model": "tiny", "res": "42", "block_rows": 16, "tokens": "cls,patches", **options}, reduce=steps
    )


def run(store: Path, settings: SetConfig, **options: Any) -> Summary:
    return extract(make_plan(Store(store), "pics", settings, RUN), RUN, **options)


def opened(store: Path, name: str = "pics/tiny@42") -> FeatureSet:
    return Store(store).open(Store(store).entry(name))


def exact_patches(store: Path, res: str = "42") -> np.ndarray:
    """Every patch token in float32, from a set without reductions."""
    run(store, config("", dtype="float32", res=res, name="exact"))
    return opened(store, f"pics/exact@{res}").patches.load()
