"""What heads of a published protocol read: the last blocks that a set holds, and its augmented views."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import register_pictures
from probe_sets import two_label_store
from test_linear_protocols import Described, task_of

from featstore.configs import RunConfig, SetConfig
from featstore.errors import ConfigError, IncompleteError, UnknownNameError
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes.configs import LinearConfig
from probes.linear import fit_linear
from probes.linear_protocols import PROTOCOLS, head_columns, protocol_features
from probes.sgd import Recipe, batches, starts
from probes.tasks import choose_task, make_task


@pytest.fixture
def store(tmp_path: Path, store_path: Path) -> Store:
    return two_label_store(store_path, tmp_path / "x")


def test_the_grid_reads_what_the_features_hold(store: Store) -> None:
    wide = Described({"cls": 4, "mean_patch": 5}, store.set("x/m"))
    dinov2 = PROTOCOLS["dinov2"]
    assert head_columns(dinov2, wide, "last4+mean_patch", 21) == {
        "last block": slice(12, 16),
        "last block + mean patch": slice(12, 21),
        "last 4 blocks": slice(0, 16),
        "last 4 blocks + mean patch": slice(0, 21),
    }
    assert head_columns(dinov2, wide, "cls+mean_patch", 9) == {
        "last block": slice(0, 4),
        "last block + mean patch": slice(0, 9),
    }
    assert head_columns(dinov2, wide, "last4", 16) == {"last block": slice(12, 16), "last 4 blocks": slice(0, 16)}
    assert head_columns(PROTOCOLS["dinov3"], wide, "cls+mean_patch", 9) == {"last block + mean patch": slice(0, 9)}
    for name in ("cls", "mean_all", "layers/3/cls"):
        assert head_columns(PROTOCOLS["dinov3"], wide, name, 4) == {name: slice(0, 4)}


def compute(store: Path, config: SetConfig) -> None:
    settings = RunConfig(device="cpu", workers=1)
    extract(make_plan(Store(store), "pics", config, settings), settings)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("last")
    register_pictures(root / "store", root / "data", 48)
    compute(root / "store", SetConfig(model="tiny", res="42"))
    return root / "store"


def test_last_blocks_are_named_with_the_command_that_adds_them(pictures: Path) -> None:
    features = Store(pictures).set("pics/tiny@42")
    assert protocol_features(features, "dinov2") == "cls+mean_patch"
    assert protocol_features(features, "dinov3") == "cls+mean_patch"
    assert protocol_features(features, "chest") == "mean_patch"
    task = make_task(features, choose_task(features.manifest, labels=("kind",)))
    left = fit_linear(task, "cls+mean_patch", LinearConfig(protocol="dinov2", iterations=5))
    command = (
        "featstore extract --dataset pics --model tiny --res 42 --tokens cls --layers 1,2,3 --compute-dtype float32"
    )
    assert left.choices["protocol_deviations"][0] == (
        "heads left out of the grid, whose features are not read: last 4 blocks, last 4 blocks + mean patch; "
        f"to add them: {command}"
    )
    with pytest.raises(
        UnknownNameError, match="has no layers/1/cls, layers/2/cls, layers/3/cls, which last4 needs; run"
    ) as found:
        features.load("last4+mean_patch")
    assert str(found.value).splitlines()[1].strip() == command
    with pytest.raises(ConfigError, match="last5 asks for 5 blocks and the network has 4"):
        features.load("last5")
    words = shlex.split(command)[4:]
    options: dict[str, Any] = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2])}
    compute(pictures, SetConfig(**options))
    features = Store(pictures).set("pics/tiny@42")
    arrays = [
        features.array(name).load() for name in ("layers/1/cls", "layers/2/cls", "layers/3/cls", "cls", "mean_patch")
    ]
    np.testing.assert_array_equal(features.load("last4+mean_patch"), np.concatenate(arrays, 1))
    np.testing.assert_array_equal(features.load("last2"), np.concatenate(arrays[2:4], 1))
    assert protocol_features(features, "radiology") == "last4+mean_patch"
    task = make_task(features, choose_task(features.manifest, labels=("kind",)))
    whole = fit_linear(task, "last4+mean_patch", LinearConfig(protocol="dinov2", iterations=20))
    assert sorted(whole.choices["val_accuracy"]) == [
        "last 4 blocks", "last 4 blocks + mean patch", "last block", "last block + mean patch",
    ]  # fmt: skip
    assert not any("grid" in text for text in whole.choices["protocol_deviations"])


def test_imported_features_know_no_blocks(store: Store) -> None:
    with pytest.raises(ConfigError, match="last4 is the CLS tokens of the last 4 blocks, and no blocks of tokens are"):
        store.set("x/m").load("last4")


class View(FeatureSet):
    """An augmented copy: a set with other features of the same rows."""

    name = "x/m~dino1"
    ok = None  # type: ignore[assignment]

    def __init__(self, plain: FeatureSet, number: int, failed: int | None = None) -> None:
        self.values = plain.load("cls") + np.float32(number + 1)
        self.ok = plain.ok.copy()
        if failed is not None:
            self.ok[failed] = False

    def load(self, features: str = "cls", *, verify: bool = False) -> np.ndarray:
        assert features == "cls"
        return np.asarray(self.values)


def test_heads_are_trained_on_views_and_scored_on_the_images(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(store, "a")
    asked: list[Any] = []

    def views_of(found: Store, features: FeatureSet, recipe: Any) -> list[Any]:
        asked.append((found.path, features.name, recipe))
        return [View(features, number) for number in range(3)]

    monkeypatch.setattr("probes.sgd_fit.views_of", views_of)
    fitted = fit_linear(task, "cls", LinearConfig(protocol="radiology", views=2, lr="0.05", batch=50))
    assert asked == [(store.path, "x/m", "radiology")]
    X, y = (np.concatenate(pair) for pair in zip(*(task.arrays(split, "cls")[:2] for split in ("train", "val"))))
    seen = np.concatenate([X + 1, X + 2])
    recipe = Recipe(batch=50, sampling="epochs")
    weights, biases = starts(recipe, 0, 6, 1, 1)
    weight, bias = weights[0].clone().requires_grad_(), biases[0].clone().requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr=0.05, momentum=0.9)
    total = recipe.steps(len(X))[0]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    for _, index in zip(range(total), batches(len(X), recipe, views=2)):
        optimizer.zero_grad()
        logits = torch.from_numpy(seen[index]) @ weight + bias
        labels = torch.from_numpy(y[index % len(X)]).float()
        torch.nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
    expected = torch.sigmoid(torch.from_numpy(task.arrays("test", "cls")[0]) @ weight + bias).detach()
    np.testing.assert_allclose(fitted.test_scores, expected, atol=1e-5)
    assert any(
        text.startswith("2 augmented views of each row, which is trained on 10 times")
        for text in fitted.choices["protocol_deviations"]
    )
    monkeypatch.setattr("probes.sgd_fit.views_of", lambda *_: [View(task.features, 0, failed=0)])
    with pytest.raises(IncompleteError, match=r"x/m~dino1: 1 train images failed that its plain set has"):
        fit_linear(task, "cls", LinearConfig(protocol="radiology", views=1))


def test_missing_views_are_named_with_the_command_that_makes_them(pictures: Path) -> None:
    features = Store(pictures).set("pics/tiny@42")
    task = make_task(features, choose_task(features.manifest, labels=("kind",)))
    text = r"has 0 complete augmented views \(radiology\) of 3 asked for; run\n  featstore extract .*--views 3"
    with pytest.raises(IncompleteError, match=text):
        fit_linear(task, "cls+mean_patch", LinearConfig(protocol="radiology", views=3))
