"""Labels that nothing tells: every probe scores 0.5 within its noise, with 20 seeds of labels on a set of features."""

from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
from probe_sets import with_patches, write_set

import probes
from featstore.store.features import FeatureSet
from probes import PROBES
from probes.configs import KnnConfig, LinearConfig
from probes.fewshot import fit_fewshot
from probes.fewshot_config import FewShotConfig
from probes.metrics import auroc
from probes.trained_config import AttentiveConfig, MilConfig, MlpConfig

SEEDS = 20
SIZES = {"train": 240, "val": 120, "test": 200}
HEADS: dict[str, tuple[str, Any]] = {
    "knn": ("knn", KnnConfig()),
    "knn mlknn": ("knn", KnnConfig(vote="mlknn")),
    "knn loo": ("knn", KnnConfig(select="loo")),
    "knn refit": ("knn", KnnConfig(refit=True)),
    "linear": ("linear", LinearConfig()),
    "linear balanced": ("linear", LinearConfig(class_weight="balanced")),
    "linear refit": ("linear", LinearConfig(C="0.001,0.1,10", refit=True)),
    **{
        f"linear {protocol}": ("linear", LinearConfig(protocol=protocol, iterations=20, lr="0.01,0.1"))
        for protocol in ("dinov2", "dinov3", "radiology", "medical", "chest")
    },
    "mlp": ("mlp", MlpConfig(lr="1e-3,1e-2", epochs=3, batch=64, hidden=16, device="cpu")),
    "mlp chest": ("mlp", MlpConfig(protocol="chest", lr="1e-3", epochs=3, hidden=16, device="cpu")),
    "attentive": ("attentive", AttentiveConfig(lr="1e-3,1e-2", epochs=2, device="cpu")),
    **{
        f"mil {pooling}": ("mil", MilConfig(pooling=pooling, lr="1e-3,1e-2", epochs=3, project=8, device="cpu"))
        for pooling in ("abmil", "mean", "max")
    },
}
FEWSHOT = {
    "logistic": FewShotConfig(shots="8", repeats=20),
    "logistic inner": FewShotConfig(shots="8", repeats=2, select="inner"),
    "ncm": FewShotConfig(shots="8", repeats=20, head="ncm"),
    "ridge": FewShotConfig(shots="8", repeats=20, head="ridge"),
    "knn": FewShotConfig(shots="8", repeats=20, head="knn"),
}


@pytest.fixture(scope="module")
def chance(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    """Features of patients with two images each, and 20 label columns drawn without looking at them."""
    root = tmp_path_factory.mktemp("chance")
    random = np.random.default_rng(11)
    size = sum(SIZES.values())
    patients = np.arange(size) // 2
    X = random.standard_normal((size, 12)) + 0.7 * random.standard_normal((size, 12))[patients]
    columns: dict[str, list[Any]] = {
        "part": [split for split, count in SIZES.items() for _ in range(count)],
        "pid": [f"p{number}" for number in patients],
    }
    for seed in range(SEEDS):
        labels = (np.random.default_rng(seed).random(size) < 0.3).astype(int)
        columns[f"l{seed}"] = [str(value) for value in labels]
    return write_set(root / "store", root / "data", columns, X)


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    """Units of three images that are alike, and labels of units."""
    root = tmp_path_factory.mktemp("bags")
    random = np.random.default_rng(12)
    size = sum(SIZES.values()) // 2
    X = random.standard_normal((3 * size, 12)) + np.repeat(random.standard_normal((size, 12)), 3, 0)
    columns: dict[str, list[Any]] = {
        "part": [split for split, count in SIZES.items() for _ in range(3 * count // 2)],
        "pid": [f"p{row // 3}" for row in range(3 * size)],
        "stud": [f"s{row // 3}" for row in range(3 * size)],
    }
    for seed in range(SEEDS):
        labels = (np.random.default_rng(seed).random(size) < 0.3).astype(int)
        columns[f"l{seed}"] = [str(value) for value in np.repeat(labels, 3)]
    return write_set(root / "store", root / "data", columns, X)


@pytest.fixture(scope="module")
def patches(chance: FeatureSet) -> FeatureSet:
    """The same labels on patches of noise."""
    return with_patches(chance)


def names() -> list[str]:
    return [f"l{seed}" for seed in range(SEEDS)]


def check_chance(values: list[float]) -> None:
    """The mean is within three standard errors of 0.5, and the values do vary."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    assert len(values) == SEEDS
    assert 0 < error < 0.03
    assert abs(np.mean(values) - 0.5) < 3 * error


@pytest.mark.parametrize("name", HEADS)
def test_random_labels_give_chance(name: str, request: pytest.FixtureRequest) -> None:
    probe, config = HEADS[name]
    source, features, unit = {"attentive": ("patches", "patches", "image"), "mil": ("bags", "cls", "study")}.get(
        probe, ("chance", "cls", "image")
    )
    task = probes.task(request.getfixturevalue(source), labels=names(), unit=unit)
    fitted = resolve_name(PROBES[probe])(task, features, config)
    truth = task.truth("test")
    check_chance([auroc(truth.y[:, column], fitted.test_scores[:, column]) for column in range(SEEDS)])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "inner" in name else []) for name in FEWSHOT]
)
def test_random_labels_give_chance_with_few_shots(chance: FeatureSet, name: str) -> None:
    curve = fit_fewshot(probes.task(chance, labels=names()), "cls", FEWSHOT[name])
    check_chance(curve.per_label["auroc"][0].mean(0).tolist())


def test_the_check_can_fail() -> None:
    with pytest.raises(AssertionError):
        check_chance([0.5 + 0.02 * number for number in range(SEEDS)])
    with pytest.raises(AssertionError):
        check_chance([0.5] * SEEDS)
