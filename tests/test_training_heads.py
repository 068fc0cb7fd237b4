"""Heads trained by gradient: the loop against torch's own, its choices, what a record of `probes mlp` says."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import probe_conformance as conformance
import pytest
import torch
from test_evaluation import evaluation, write_data
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from featstore.configs import RegisterConfig
from featstore.errors import ConfigError, DeviceError, IncompleteError, TaskError
from featstore.register import register
from featstore.store.catalog import Store
from featstore.store.importer import import_features
from probes import training
from probes.configs import TaskConfig
from probes.evaluation import evaluate_sets
from probes.mlp import MlpHead, MLPProbe
from probes.records import load_predictions
from probes.trained import Moments, choose, moments
from probes.trained_config import AttentiveConfig, MilConfig, MlpConfig
from probes.training import Dropout, Recipe, Targets, Validation, Vectors, balance, linear, train

CONFIG = RegisterConfig(
    table=Path("table.csv"), id_column="name", group_column="patient", split_column="split", label_columns="a,b,kind"
)
QUICK = MlpConfig(lr="3e-3,1e-2", epochs=8, batch=32, hidden=16, dropout=0.1, device="cpu")


def rows(seed: int = 0, count: int = 90, width: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(X, y, mask): three labels, the features tell two, a fifth of the entries is masked."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((count, width)).astype(np.float32)
    y = (X[:, :3] * [2, 1, 0] + rng.standard_normal((count, 3)) > 0.3).astype(np.int8)
    return X, y, rng.random((count, 3)) < 0.8


def make(generator: torch.Generator) -> nn.Module:
    return MlpHead(7, 5, 3, 0.0, generator)


def recipe(**options: Any) -> Recipe:
    return Recipe(**{"lr": (0.01,), "epochs": 4, "batch": 20, "weight_decay": 0.05, **options})


def weights(head: nn.Module) -> np.ndarray:
    return torch.cat([value.detach().flatten() for value in head.state_dict().values()]).numpy()


class ByHand:
    """AdamW and SGD as their papers and torch's pages state them, in float64."""

    def __init__(self, optimizer: str, parameters: list[nn.Parameter]) -> None:
        self.optimizer, self.parameters, self.steps = optimizer, parameters, 0
        self.values = [value.detach().double() for value in parameters]
        self.first = [torch.zeros_like(value) for value in self.values]
        self.second = [torch.zeros_like(value) for value in self.values]

    def step(self, lr: float) -> None:
        self.steps += 1
        for number, parameter in enumerate(self.parameters):
            assert parameter.grad is not None
            gradient, value = parameter.grad.double(), self.values[number]
            if self.optimizer == "adamw":
                self.first[number] = 0.9 * self.first[number] + 0.1 * gradient
                self.second[number] = 0.999 * self.second[number] + 0.001 * gradient**2
                mean = self.first[number] / (1 - 0.9**self.steps)
                square = self.second[number] / (1 - 0.999**self.steps)
                value = value - lr * 0.05 * value - lr * mean / (square.sqrt() + 1e-8)
            else:
                self.first[number] = 0.9 * self.first[number] + gradient + 0.05 * value
                value = value - lr * self.first[number]
            self.values[number] = value
            parameter.data = value.float()


class ByTorch:
    """torch's own, whose import takes 5 to 12 s."""

    def __init__(self, optimizer: str, parameters: list[nn.Parameter]) -> None:
        if optimizer == "adamw":
            self.solver: torch.optim.Optimizer = torch.optim.AdamW(parameters, 0.01, weight_decay=0.05)
        else:
            self.solver = torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=0.05)

    def step(self, lr: float) -> None:
        self.solver.param_groups[0]["lr"] = lr
        self.solver.step()


@pytest.mark.parametrize("rule", [ByHand, pytest.param(ByTorch, marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_loop_is_a_plain_torch_loop(rule: Any, optimizer: str, schedule: str) -> None:
    X, y, mask = rows()
    weight = balance("multilabel", y, mask, 3)
    asked = recipe(optimizer=optimizer, schedule=schedule)
    [found] = train(make, Vectors(X, "cpu"), Targets.of("multilabel", y, mask, "cpu", weight), asked)

    positive = [((y[:, label] == 1) & mask[:, label]).sum() for label in range(3)]
    negative = [((y[:, label] == 0) & mask[:, label]).sum() for label in range(3)]
    pos_weight = torch.tensor([n / p for n, p in zip(negative, positive)], dtype=torch.float32)
    head = make(torch.Generator().manual_seed(0))
    solver, step = rule(optimizer, list(head.parameters())), 0
    for epoch in range(4):
        order = np.random.default_rng([0, epoch]).permutation(len(X))
        for first in range(0, len(X), 20):
            part = order[first : first + 20]
            logits, valid = head(torch.from_numpy(X[part])), torch.from_numpy(mask[part])
            true = torch.from_numpy(y[part]).float()
            each = binary_cross_entropy_with_logits(logits, true, pos_weight=pos_weight, reduction="none")
            head.zero_grad()
            each[valid].mean().backward()
            share = (1 + np.cos(np.pi * step / 20)) / 2 if schedule == "cosine" else 1.0
            solver.step(0.01 * share)
            step += 1
    np.testing.assert_allclose(weights(found.head), weights(head), atol=2e-6)
    assert found.epoch == found.epochs == 4
    assert not np.allclose(weights(found.head), weights(make(torch.Generator().manual_seed(0))), atol=1e-3)


def test_classes_are_weighted_as_torch_weights_them() -> None:
    rng = np.random.default_rng(0)
    y, mask = rng.choice(3, 50, p=[0.6, 0.3, 0.1]), rng.random(50) < 0.8
    logits = torch.from_numpy(rng.standard_normal((50, 3)).astype(np.float32))
    weight = balance("multiclass", y, mask, 3)
    counts = np.bincount(y[mask])
    np.testing.assert_allclose(weight, mask.sum() / (3 * counts))
    targets = Targets.of("multiclass", np.where(mask, y, -1), mask, "cpu", weight)
    all_rows = np.arange(50)
    expected = cross_entropy(logits[mask], torch.from_numpy(y[mask]), torch.from_numpy(weight).float())
    found = targets.loss(logits, all_rows) / targets.size(all_rows)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_a_label_without_positives_weighs_one() -> None:
    y = np.array([[0, 1], [0, 0], [0, 0]])
    np.testing.assert_array_equal(balance("multilabel", y, np.ones((3, 2), bool), 2), [1, 2])


def test_rates_beside_each_other_lead_where_they_lead_alone() -> None:
    X, y, mask = rows()
    source, targets = Vectors(X, "cpu"), Targets.of("multilabel", y, mask, "cpu")

    def dropping(generator: torch.Generator) -> nn.Module:
        return MlpHead(7, 5, 3, 0.4, generator)

    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    both = train(dropping, source, targets, recipe(lr=(0.003, 0.01)))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    torch.manual_seed(1)
    for item in both:
        [alone] = train(dropping, source, targets, recipe(lr=(item.lr,)))
        np.testing.assert_array_equal(weights(item.head), weights(alone.head))
    [other] = train(dropping, source, targets, recipe(lr=(0.01,), seed=1))
    assert not np.allclose(weights(both[1].head), weights(other.head))


def test_rows_in_parts_are_rows_at_once() -> None:
    X, y, mask = rows()
    targets = Targets.of("multilabel", y, mask, "cpu")

    class InParts(Vectors):
        slow = True  # and read ahead by a thread

        def batch(self, positions: np.ndarray) -> list[training.Part]:
            return [
                part for cut in np.array_split(positions[::-1].copy(), 3) for part in super(InParts, self).batch(cut)
            ]

    [whole] = train(make, Vectors(X, "cpu"), targets, recipe())
    [parts] = train(make, InParts(X, "cpu"), targets, recipe())
    np.testing.assert_allclose(weights(parts.head), weights(whole.head), atol=2e-6)
    a, b = (training.outputs([whole.head], source(X, "cpu"), 20)[0] for source in (Vectors, InParts))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_warm_up_and_schedule() -> None:
    asked = recipe(epochs=10, warmup=2)
    factors = [asked.factor(step, 100) for step in range(100)]
    np.testing.assert_allclose(factors[:20], np.arange(1, 21) / 20)
    np.testing.assert_allclose(factors[20:], (1 + np.cos(np.pi * np.arange(80) / 80)) / 2)
    flat = recipe(epochs=10, schedule="constant")
    assert {flat.factor(step, 100) for step in range(100)} == {1.0}


def test_the_best_epoch_is_kept_and_patience_ends() -> None:
    X, y, mask = rows()
    held = rows(seed=5, count=60)
    source, targets = Vectors(X, "cpu"), Targets.of("multilabel", y, mask, "cpu")
    check = Vectors(held[0], "cpu"), Targets.of("multilabel", held[1], held[2], "cpu")
    asked = recipe(lr=(0.05,), epochs=25)
    [found] = train(make, source, targets, asked, Validation(*check, lambda _: 0.0))
    best = int(np.argmin(found.val_loss))
    assert found.epoch == best + 1 < 25 == found.epochs, "the test needs overfitting"
    logits = training.outputs([found.head], check[0], 20)[0]
    every = np.arange(60)
    assert float(check[1].loss(logits, every)) / check[1].size(every) == pytest.approx(found.val_loss[best], rel=1e-6)
    [early] = train(make, source, targets, recipe(lr=(0.05,), epochs=25, patience=3), Validation(*check, lambda _: 0.0))
    waited = next(e for e in range(25) if e - int(np.argmin(found.val_loss[: e + 1])) >= 3) + 1
    assert early.epochs == waited < 25
    # By quality: the first epoch of the highest, of equals the one with the lowest loss.
    values = iter([0.5, 0.9, 0.9, 0.7])
    [by] = train(make, source, targets, recipe(keep="auroc"), Validation(*check, lambda _: next(values)))
    assert by.epoch == 2 + int(by.val_loss[2] < by.val_loss[1])
    assert by.val_quality == [0.5, 0.9, 0.9, 0.7]


def test_drop_last_leaves_out_the_incomplete_batch() -> None:
    X, y, mask = rows(count=50)
    seen: list[int] = []

    class Counting(Vectors):
        def batch(self, positions: np.ndarray) -> list[training.Part]:
            seen.append(len(positions))
            return super().batch(positions)

    targets = Targets.of("multilabel", y, mask, "cpu")
    train(make, Counting(X, "cpu"), targets, recipe(epochs=1, drop_last=True))
    assert seen == [20, 20]
    seen.clear()
    train(make, Counting(X, "cpu"), targets, recipe(epochs=1))
    assert seen == [20, 20, 10]


def test_divergence_is_said_and_not_chosen() -> None:
    X, y, mask = rows()
    X = X * 1e15
    source, targets = Vectors(X, "cpu"), Targets.of("multilabel", y, mask, "cpu")

    def plain(generator: torch.Generator) -> nn.Module:
        return linear(7, 3, generator)

    check = Validation(source, targets, lambda _: 0.0)
    asked = recipe(lr=(1e-38, 1e30), optimizer="sgd", epochs=2, weight_decay=0.0)
    small, large = train(plain, source, targets, asked, check)
    assert large.diverged
    assert not small.diverged
    assert choose([small, large]) == 0
    with pytest.raises(TaskError, match="left the finite numbers in its first epoch at every rate"):
        train(plain, source, targets, recipe(lr=(1e30,), optimizer="sgd"), check)


def test_equal_rates_take_the_smaller() -> None:
    X, y, mask = rows()
    heads = train(make, Vectors(X, "cpu"), Targets.of("multilabel", y, mask, "cpu"), recipe(lr=(0.001, 0.01), epochs=1))
    for item in heads:
        item.best = (-0.5,)
    assert choose(heads) == 0


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    layer = Dropout(0.3, torch.Generator().manual_seed(0))
    ones = torch.ones(400, 500)
    dropped = layer(ones)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7], rel=1e-6)
    # Five standard errors of a share of 200,000 draws.
    assert abs(float((dropped == 0).float().mean()) - 0.3) < 5 * (0.3 * 0.7 / 200_000) ** 0.5
    assert torch.equal(layer.eval()(ones), ones)


def test_starting_weights_are_spread_as_torch_spreads_its_own() -> None:
    ours = linear(400, 300, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    theirs = nn.Linear(400, 300)
    for a, b in ((ours.weight.detach(), theirs.weight.detach()), (ours.bias.detach(), theirs.bias.detach())):
        assert float(a.abs().max()) == pytest.approx(float(b.abs().max()), rel=0.05)
        assert float(a.std()) == pytest.approx(float(b.std()), rel=0.1)


def test_moments_of_columns() -> None:
    X = np.random.default_rng(0).standard_normal((1000, 3)) * [1, 50, 0] + [1e4, 0, 3]
    mean, scale = moments(X)
    np.testing.assert_allclose(mean, X.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scale, [X[:, 0].std(), X[:, 1].std(), 1], rtol=1e-9)
    found = Moments(3)
    for part in np.array_split(X, 7):
        found.add(part)
    np.testing.assert_allclose(found.finish(), (mean, scale), rtol=1e-9, atol=1e-12)


def test_progress_is_told_on_long_work(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y, mask = rows()
    monkeypatch.setattr(training, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(training, "SHOWN_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "probes.training"):
        train(make, Vectors(X, "cpu"), Targets.of("multilabel", y, mask, "cpu"), recipe(lr=(0.1, 0.2)))
    assert len(caplog.messages) == 4 * 5
    assert caplog.messages[0].startswith("training 2 heads, epoch 1/4: ")
    assert caplog.messages[-1].endswith(" rows/s, 0 s left")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="device is cpu or cuda, got 'tpu'"):
        training.check_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="--device cuda needs a CUDA device and there is none"):
        training.check_device("cuda")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (MlpConfig, {"lr": "0"}, "--lr takes positive numbers"),
        (MlpConfig, {"epochs": 0}, "--epochs must be at least 1, got 0"),
        (MlpConfig, {"weight_decay": -1.0}, "--weight-decay must be at least 0"),
        (MlpConfig, {"warmup": 50}, "--warmup 50 leaves nothing of --epochs 50"),
        (MlpConfig, {"hidden": 0}, "--hidden must be at least 1, got 0"),
        (MlpConfig, {"dropout": 1.0}, "--dropout must be from 0 to below 1, got 1.0"),
        (AttentiveConfig, {"heads": 0}, "--heads must be at least 1, got 0"),
        (AttentiveConfig, {"queries": 0}, "--queries must be at least 1, got 0"),
        (MilConfig, {"project": -1}, r"--project must be 0 \(none\) or a width, got -1"),
        (MilConfig, {"pooling": "mean", "attention": 8}, "--attention belongs to --pooling abmil, not mean"),
        (MilConfig, {"pooling": "max", "dropout": 0.1}, "--dropout acts on projected instances"),
    ],
)
def test_options_that_cannot_be_used(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_the_protocol_settles_what_was_not_given() -> None:
    chest = MlpConfig(protocol="chest")
    names = ("epochs", "optimizer", "weight_decay", "schedule", "keep", "class_weight", "scaling", "hidden", "dropout")
    assert chest.rates == (1e-5,)
    assert [chest.settled(name) for name in names] == [
        100, "adamw", 0.0, "constant", "loss", "balanced", "none", 512, 0.3,
    ]  # fmt: skip
    assert len(MlpConfig().rates) == len(AttentiveConfig().rates) == len(MilConfig().rates) == 3


def test_parameters_of_the_head() -> None:
    head = MlpHead(4096, 512, 14, 0.3, torch.Generator())
    assert training.num_parameters(head) == 2 * 4096 + 4096 * 512 + 512 + 2 * 512 + 512 * 14 + 14
    kinds = [type(layer).__name__ for layer in head.layers]
    assert kinds == ["LayerNorm", "Linear", "GELU", "LayerNorm", "Dropout", "Linear"]


def test_estimator_errors() -> None:
    X, y, _ = rows()
    with pytest.raises(ConfigError, match="of 2 learning rates validation chooses"):
        MLPProbe(recipe(lr=(0.1, 0.2))).fit(X, y, kind="multilabel")
    with pytest.raises(ConfigError, match="class_weight is None or 'balanced', got 'all'"):
        MLPProbe(recipe(), class_weight="all")
    probe = MLPProbe(recipe(lr=(0.001, 0.01)), class_weight="balanced", hidden=4)
    probe.fit(X, y, kind="multilabel", validation=(X, y, np.ones(y.shape, bool)))
    losses = [min(item.val_loss) for item in probe.trained_]
    assert probe.lr_ == (0.001, 0.01)[int(np.argmin(losses))]
    one_class = MLPProbe(recipe(), hidden=4).fit(X, y[:, 0].astype(np.int64), kind="multiclass")
    np.testing.assert_allclose(one_class.predict_proba(X).sum(1), 1)


@pytest.mark.parametrize("check", conformance.CHECKS)
@pytest.mark.parametrize(
    "case", [name for name in conformance.CASES if name.split("-")[0] in ("mlp", "attentive", "mil")]
)
def test_conformance(case: str, check: Any) -> None:
    check(conformance.CASES[case])


@pytest.fixture
def data(tmp_path: Path, store_path: Path) -> tuple[Store, np.ndarray]:
    features = write_data(tmp_path / "data", 450)
    register(store_path, "synth", tmp_path / "data", CONFIG)
    return import_features(store_path, tmp_path / "data" / "features.npz", dataset="synth", model="given")[0], features


@pytest.mark.parametrize("labels", ["a,b", "kind", "a"])
def test_record_of_mlp(data: tuple[Store, np.ndarray], labels: str) -> None:
    store, features = data
    [record] = evaluate_sets(store, "mlp", evaluation(labels=labels), QUICK)
    assert record["metrics"]["val"]["macro"]["auroc"] > 0.6
    assert record["metrics"]["test"]["macro"]["auroc"] > 0.55
    choices = record["choices"]
    best = min(choices["val_loss"], key=lambda rate: choices["val_loss"][rate])
    assert float(best) == choices["lr"]
    assert choices["at_edge"]
    assert choices["said"] == f"lr={choices['lr']:g}, epoch {choices['epoch']}*"
    assert choices["val_auroc"][best] == pytest.approx(record["metrics"]["val"]["macro"]["auroc"])
    assert choices["training"]["lr"] == [0.003, 0.01]
    num_labels = len(record["task"]["labels"])
    assert record["cost"]["trainable_parameters"] == 2 * 12 + 12 * 16 + 16 + 2 * 16 + 16 * num_labels + num_labels
    assert record["deviations"] == []

    # The same head, fitted by hand on the rows of the manifest.
    manifest = store.manifest("synth")
    split = np.array(manifest.column("split"))
    X = {name: features[split == name] for name in ("train", "val", "test")}
    y, mask = {}, {}
    for name in X:
        columns = [np.array(manifest.column(label))[split == name] for label in labels.split(",")]
        if labels == "kind":
            y[name], mask[name] = np.searchsorted(["x", "y", "z"], columns[0]), np.ones(len(columns[0]), bool)
        else:
            y[name] = np.stack([column == "1" for column in columns], 1).astype(np.int8)
            mask[name] = np.stack([np.array([value is not None for value in column]) for column in columns], 1)
    asked = recipe(lr=(0.003, 0.01), epochs=8, batch=32, weight_decay=0.01)
    probe = MLPProbe(asked, hidden=16, dropout=0.1)
    kind: Any = "multiclass" if labels == "kind" else "multilabel"
    probe.fit(X["train"], y["train"], mask["train"], kind=kind, validation=(X["val"], y["val"], mask["val"]))
    assert probe.lr_ == choices["lr"]
    table = load_predictions(record).to_pydict()
    order = {name: row for row, name in enumerate(table["id"])}
    ids = [order[name] for name in np.array(manifest.column("id"))[split == "test"]]
    columns = "xyz" if labels == "kind" else labels.split(",")
    found = np.stack([np.array(table[f"score:{name}"], float)[ids] for name in columns], 1)
    np.testing.assert_allclose(found, probe.predict_proba(X["test"]), atol=1e-6)
    again = evaluate_sets(store, "mlp", evaluation(labels=labels), QUICK)[0]
    assert again["metrics"]["test"]["macro"] == record["metrics"]["test"]["macro"]


def test_deviations_of_the_protocol_are_listed(data: tuple[Store, np.ndarray]) -> None:
    store, _ = data
    head = MlpConfig(protocol="chest", epochs=2, hidden=8, device="cpu")
    [record] = evaluate_sets(store, "mlp", evaluation(labels="a,b", features="cls"), head)
    found = record["choices"]["protocol_deviations"]
    assert record["deviations"] == found
    for text in (
        "backbone given in place of dinov3-7b",
        "features cls in place of mean_all, the mean over CLS, registers and patches",
        "epochs 2 in place of 100",
        "hidden 8 in place of 512",
    ):
        assert text in found
        assert f"deviates from protocol chest: {text}" in record["notes"]
    assert any("masked label entries in training" in text for text in found)
    assert not any(
        text.startswith(("lr ", "scaling ", "batch 30 in", "weight decay", "class weight")) for text in found
    )
    assert record["choices"]["scaling"] == "none"


def test_what_mlp_cannot_fit(data: tuple[Store, np.ndarray]) -> None:
    store, _ = data
    with pytest.raises(TaskError, match="is regression, and `probes mlp` trains heads of labels and classes"):
        evaluate_sets(store, "mlp", evaluation(labels="a"), QUICK, reading=TaskConfig(kind="regression"))
    with pytest.raises(
        IncompleteError, match=r"has no mean_patch, which mean_patch is made of; run\n  featstore import"
    ):
        evaluate_sets(store, "mlp", evaluation(labels="a", features="mean_patch"), QUICK)
