"""Bags: heads against a loop by hand, padding, planted instances, units of a task, what a record says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probe_sets import with_volumes, write_set
from sklearn.metrics import roc_auc_score
from test_training_heads import weights

from cli.heads import mil
from featstore.errors import ConfigError, TaskError
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes import mil as module
from probes.configs import EvalConfig, TaskConfig
from probes.evaluation import evaluate_sets
from probes.mil import ArrayBags, MilHead, MILProbe, fit_mil
from probes.records import load_predictions
from probes.tasks import make_task
from probes.taskspec import TaskSpec
from probes.trained_config import MilConfig
from probes.training import Recipe, num_parameters, outputs
from probes.units import Units

POOLINGS = ("abmil", "mean", "max")


def bags_of(seed: int, count: int, *, width: int = 6, largest: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """(X, bags): bags of 1 to `largest` instances in mixed order."""
    rng = np.random.default_rng(seed)
    bags = rng.permutation(np.repeat(np.arange(count), rng.integers(1, largest + 1, count)))
    return rng.standard_normal((len(bags), width)).astype(np.float32), bags


def head_of(pooling: Any, width: int = 6, labels: int = 3, **options: Any) -> MilHead:
    config = MilConfig(pooling=pooling, **options)
    return MilHead(width, labels, config, torch.Generator().manual_seed(3)).eval()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("project", [0, 5])
def test_heads_are_the_formulas_bag_by_bag(pooling: str, project: int) -> None:
    head = head_of(pooling, project=project, **({"attention": 4} if pooling == "abmil" else {}))
    value = {name: tensor.double().numpy() for name, tensor in head.state_dict().items()}
    X, bags = bags_of(0, 20)
    units = Units.of(bags)
    found = outputs([head], ArrayBags(X, units, "cpu"), 7)[0].numpy()
    for number, name in enumerate(units.ids):
        h = X[bags == int(name)].astype(np.float64)
        if project:
            h = h @ value["project.weight"].T + value["project.bias"]
        if pooling == "abmil":
            gate = 1 / (1 + np.exp(-(h @ value["gate.weight"].T + value["gate.bias"])))
            scores = (np.tanh(h @ value["tanh.weight"].T + value["tanh.bias"]) * gate) @ value["score.weight"][0]
            share = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            pooled = share @ h
        else:
            pooled = h.mean(0) if pooling == "mean" else h.max(0)
        expected = value["classify.weight"] @ pooled + value["classify.bias"]
        np.testing.assert_allclose(found[number], expected, atol=2e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_changes_nothing(pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of(pooling)
    X, bags = bags_of(1, 30)
    source = ArrayBags(X, Units.of(bags), "cpu")
    alone = torch.cat([head(*source.batch(np.array([bag]))[0].inputs) for bag in range(30)])
    together = outputs([head], source, 30)[0]
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=0)
    [part] = source.batch(np.arange(30))
    values, real = part.inputs
    assert real.sum() == len(X)
    assert not real.all()
    filled = values.masked_fill(~real[..., None], 1e6)  # what stands in the padding cannot matter
    torch.testing.assert_close(head(filled, real), head(values, real), atol=0, rtol=0)
    monkeypatch.setattr(module, "PADDED_BYTES", 4 * 6 * 20)
    parts = source.batch(np.arange(30))
    assert len(parts) > 5
    assert sorted(np.concatenate([part.rows for part in parts])) == list(range(30))
    assert all(part.inputs[0].numel() <= 6 * 20 for part in parts)
    torch.testing.assert_close(outputs([head], source, 30)[0], alone, atol=2e-6, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_small_parts_train_as_whole_batches(pooling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X, bags = bags_of(2, 25)
    y = np.random.default_rng(0).integers(0, 2, (25, 2))
    recipe = Recipe(lr=(0.01,), epochs=3, batch=10)

    def fitted() -> np.ndarray:
        probe = MILProbe(recipe, MilConfig(pooling=pooling, project=4, dropout=0.0))
        return weights(probe.fit(X, bags, y, kind="multilabel").head_)

    whole = fitted()
    monkeypatch.setattr(module, "PADDED_BYTES", 4 * 6 * 20)
    np.testing.assert_allclose(fitted(), whole, atol=1e-5)


def test_bags_of_one_instance_pool_to_it() -> None:
    X = np.random.default_rng(0).standard_normal((12, 6)).astype(np.float32)
    for pooling in POOLINGS:
        head = head_of(pooling, project=5)
        found = outputs([head], ArrayBags(X, Units.of(np.arange(12)), "cpu"), 5)[0]
        torch.testing.assert_close(found, head.classify(head.project(torch.from_numpy(X))), atol=1e-6, rtol=0)


def planted(seed: int, count: int = 150) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(X, bags, y, key): half of the bags hold one instance that lies apart, among 20 or so."""
    rng = np.random.default_rng(seed)
    bags = np.repeat(np.arange(count), rng.integers(15, 26, count))
    X = rng.standard_normal((len(bags), 8)).astype(np.float32)
    y = rng.integers(0, 2, (count, 1))
    key = np.zeros(len(bags), bool)
    for bag in np.flatnonzero(y[:, 0]):
        key[rng.choice(np.flatnonzero(bags == bag))] = True
    X[key, :2] += 4
    return X, bags, y, key


def test_one_instance_of_a_bag_is_found() -> None:
    X, bags, y, _ = planted(0)
    other, other_bags, other_y, key = planted(1)
    area = {}
    for pooling in POOLINGS:
        config = MilConfig(pooling=pooling, project=16 if pooling == "abmil" else 0, scaling="none")
        probe = MILProbe(Recipe(lr=(0.01,), epochs=15, batch=16), config).fit(X, bags, y, kind="multilabel")
        area[pooling] = roc_auc_score(other_y[:, 0], probe.predict_proba(other, other_bags)[:, 0])
        if pooling != "max":
            shares = probe.attention(other, other_bags)
            np.testing.assert_allclose(np.bincount(other_bags, shares), 1, atol=1e-6)
            sizes = np.bincount(other_bags)[other_bags]
            if pooling == "mean":
                np.testing.assert_allclose(shares, 1 / sizes, rtol=1e-6)
            else:
                assert np.median(shares[key] * sizes[key]) > 3, "the odd instance gets no attention"
        else:
            with pytest.raises(TaskError, match="a maximum takes each column from another instance"):
                probe.attention(other, other_bags)
    assert area["abmil"] > 0.95
    assert area["max"] > 0.95
    assert area["mean"] < min(area["abmil"], area["max"]) - 0.03


@pytest.mark.parametrize("pooling", POOLINGS)
def test_parameters(pooling: Any) -> None:
    head = MilHead(768, 2, MilConfig(pooling=pooling), torch.Generator())
    expected = {
        "abmil": 768 * 512 + 512 + 2 * (512 * 128 + 128) + 128 + 512 * 2 + 2,
        "mean": 768 * 2 + 2,
        "max": 768 * 2 + 2,
    }
    assert num_parameters(head) == expected[pooling]


@pytest.fixture
def volumes(tmp_path: Path, store_path: Path) -> FeatureSet:
    """36 volumes of one to five slices; a failed slice in three of them, and one volume of failed slices only."""
    rng = np.random.default_rng(0)
    number = np.repeat(np.arange(36), rng.integers(2, 6, 36))
    number = np.append(number, [36, 36])
    y = rng.integers(0, 2, 37)
    features = rng.standard_normal((len(number), 5)).astype(np.float32)
    features[:, 0] += 2 * y[number]
    part = np.array(["train", "train", "val", "test"])[np.arange(37) % 4]
    columns: dict[str, list[Any]] = {
        "part": part[number].tolist(),
        "pid": [f"p{n // 1}" for n in number],
        "volume": [f"v{n:02d}" for n in number],
        "a": [str(y[n]) for n in number],
        "kind": ["xyz"[n % 3] for n in number],
        "age": [str(n) for n in number],
    }
    first = np.searchsorted(number, [0, 1, 2])
    failed = (*first.tolist(), len(number) - 2, len(number) - 1)
    return with_volumes(write_set(store_path, tmp_path / "x", columns, features, failed=failed))


QUICK = MilConfig(lr="3e-3,1e-2", epochs=6, batch=4, project=8, attention=4, dropout=0.0, device="cpu")


@pytest.mark.parametrize("labels", [("a",), ("kind",)])
def test_fit_on_a_set_is_the_estimator_on_its_rows(volumes: FeatureSet, labels: tuple[str, ...]) -> None:
    task = make_task(volumes, TaskSpec(name="t", labels=labels, unit="volume"))
    fitted = fit_mil(task, "cls", QUICK)
    manifest, ok = volumes.manifest, volumes.ok
    split = np.array(manifest.column("split"))
    X, names = volumes.load("cls").astype(np.float32), np.array(manifest.column("volume"))
    column = np.array(manifest.column(labels[0]))
    parts: dict[str, Any] = {}
    for part in ("train", "val", "test"):
        rows = (split == part) & ok
        first = Units.of(names[rows]).first
        if labels == ("a",):
            y = (column[rows][first] == "1").astype(np.int8)[:, None]
        else:
            y = np.searchsorted(["x", "y", "z"], column[rows][first])
        parts[part] = (X[rows], names[rows], y, np.ones(y.shape, bool))
    probe = MILProbe(Recipe(lr=(0.003, 0.01), epochs=6, batch=4, weight_decay=0.01), QUICK)
    kind: Any = task.kind
    probe.fit(*parts["train"], kind=kind, validation=parts["val"])
    assert fitted.choices["lr"] == probe.lr_
    np.testing.assert_allclose(fitted.test_scores, probe.predict_proba(*parts["test"][:2]), atol=1e-5)
    np.testing.assert_allclose(fitted.val_scores, probe.predict_proba(*parts["val"][:2]), atol=1e-5)
    outputs_ = len(task.labels)
    assert fitted.num_parameters == 5 * 8 + 8 + 2 * (8 * 4 + 4) + 4 + 8 * outputs_ + outputs_
    # Volumes 0 and 1 train, 2 is of validation; the volume of failed slices alone is nowhere.
    assert "instances that failed and are left out of their bags: train 2, val 1" in fitted.notes
    sizes = {part: entry["bags"] for part, entry in fitted.choices["bags"].items()}
    assert sizes == {"train": 18, "val": 9, "test": 9}
    assert fitted.choices["bags"]["train"]["failed_instances"] == 2


def test_records_of_volumes(volumes: FeatureSet, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featstore.datasets.manifest.Manifest.place", lambda self, name: self.column(name))
    config = EvalConfig(dataset="x", labels="a", resamples=50)
    [record] = evaluate_sets(
        Store(store_path), "mil", config, replace(QUICK, epochs=40), reading=TaskConfig(unit="volume")
    )
    assert record["task"]["splits"] == {"train": 18, "val": 9, "test": 9}
    assert record["choices"]["pooling"] == "abmil"
    assert len(load_predictions(record)) == 18
    assert record["metrics"]["val"]["macro"]["auroc"] > 0.6


def test_what_cannot_be_a_bag(volumes: FeatureSet) -> None:
    with pytest.raises(TaskError, match=r"counts images, and a bag is the images of one .* pass --unit volume"):
        fit_mil(make_task(volumes, TaskSpec(name="t", labels=("a",))), "cls", QUICK)
    names = tuple(f"l{number}" for number in range(9))
    task = make_task(volumes, TaskSpec(name="labels:" + "+".join(names), labels=("a",)))
    task = replace(task, spec=replace(task.spec, labels=names))
    with pytest.raises(TaskError, match="task 'l0, l1 and 7 more labels' counts images"):
        fit_mil(task, "cls", QUICK)
    numbers = make_task(volumes, TaskSpec(name="t", labels=("age",), kind="regression", unit="volume"))
    with pytest.raises(TaskError, match="is regression, and `probes mil` trains heads of labels and classes"):
        fit_mil(numbers, "cls", QUICK)
    with pytest.raises(ConfigError, match="--pool max pools scores or features, and a bag's head does that"):
        mil(**{**_flags(mil), "dataset": "x", "pool": "max"})


def _flags(command: Any) -> dict[str, Any]:
    """Every flag of a command at its default."""
    import inspect

    return {
        name: item.default
        for name, item in inspect.signature(command).parameters.items()
        if item.default is not inspect.Parameter.empty
    }


def test_masked_bags_and_errors() -> None:
    X, bags = bags_of(4, 20)
    y = np.random.default_rng(0).integers(0, 2, (20, 2))
    mask = np.ones((20, 2), bool)
    units = Units.of(bags)
    mask[3] = False
    X[units.number == 3] = np.nan
    recipe = Recipe(lr=(0.01,), epochs=2, batch=8)
    probe = MILProbe(recipe).fit(X, bags, y, mask, kind="multilabel")
    kept = units.number != 3
    again = MILProbe(recipe).fit(X[kept], bags[kept], np.delete(y, 3, 0), kind="multilabel")
    np.testing.assert_array_equal(weights(probe.head_), weights(again.head_))
    with pytest.raises(TaskError, match="labels of 20 rows have 2 axes and 20 rows"):
        MILProbe(recipe).fit(X, bags, y[:5], kind="multilabel")
