"""Attention pooling: against torch's multi-head attention, on sets with and without reductions, planted patches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import register_pictures
from reduced import config, opened, run
from test_training_heads import weights
from torch import nn

from featstore.errors import IncompleteError, TaskError
from featstore.store.catalog import Store
from probes import attentive as module
from probes.attentive import AttentiveHead, AttentiveProbe, attention_heads, fit_attentive, normalised
from probes.configs import EvalConfig
from probes.evaluation import evaluate_sets
from probes.tasks import Task, make_task
from probes.taskspec import TaskSpec
from probes.trained_config import AttentiveConfig
from probes.training import Recipe, num_parameters

QUICK = AttentiveConfig(lr="1e-3,3e-3", epochs=3, batch=8, device="cpu")
KIND = TaskSpec(name="kind", labels=("kind",))


def random_head(width: int, heads: int, queries: int) -> AttentiveHead:
    """A head whose every parameter is random, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    head = AttentiveHead(width, heads, queries, 3, generator)
    for value in head.parameters():
        value.data.add_(torch.empty_like(value).normal_(0, 0.3, generator=generator))
    return head.eval()


@pytest.mark.parametrize(("heads", "queries"), [(1, 1), (4, 1), (3, 2), (12, 5)])
def test_head_is_multi_head_attention(heads: int, queries: int) -> None:
    width = 12
    head = random_head(width, heads, queries)
    reference = nn.MultiheadAttention(width, heads, batch_first=True)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([head.query.weight, head.key.weight, head.value.weight]))
        key_bias = torch.empty(width).normal_(generator=random)  # changes nothing
        reference.in_proj_bias.copy_(torch.cat([head.query.bias, key_bias, head.value.bias]))
        reference.out_proj.load_state_dict(head.output.state_dict())
        norm = nn.LayerNorm(width)
        norm.load_state_dict({"weight": head.scale, "bias": head.shift})
        x = torch.empty(5, 7, width).normal_(2, 3, generator=random)
        tokens = norm(x)
        pooled, shares = reference(head.queries.expand(5, -1, -1), tokens, tokens, average_attn_weights=True)
        expected = head.classify(head.norm(pooled.mean(1)))
        found = normalised(x, "cpu")
        torch.testing.assert_close(head(found), expected, atol=2e-5, rtol=0)
        own = head.weights(found).view(5, queries, heads, 7).mean(2)
        torch.testing.assert_close(own, shares, atol=1e-6, rtol=0)


def test_gradients_are_those_of_multi_head_attention() -> None:
    """Of a loss after both forms; the key's bias, which ours lacks, has none."""
    head = random_head(8, 2, 2)
    x = normalised(torch.empty(4, 6, 8).normal_(generator=torch.Generator().manual_seed(0)), "cpu")
    head(x).square().sum().backward()
    found = {name: value.grad.clone() for name, value in head.named_parameters() if value.grad is not None}
    head.zero_grad()
    tokens = x * head.scale + head.shift
    q, k, v = (part(rows) for part, rows in ((head.query, head.queries), (head.key, tokens), (head.value, tokens)))
    q, k, v = (rows.unflatten(-1, (2, 4)).transpose(-2, -3) for rows in (q, k, v))
    pooled = ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    head.classify(head.norm(head.output(pooled).mean(1))).square().sum().backward()
    assert found.keys() == dict(head.named_parameters()).keys()
    for name, value in head.named_parameters():
        assert value.grad is not None
        scale = float(value.grad.abs().max())
        torch.testing.assert_close(found[name], value.grad, atol=2e-5 * max(1, scale), rtol=1e-4)


@pytest.mark.parametrize(("width", "queries", "labels"), [(768, 1, 14), (64, 4, 2)])
def test_parameters(width: int, queries: int, labels: int) -> None:
    head = AttentiveHead(width, 1, queries, labels, torch.Generator())
    projections = 4 * width**2 + 3 * width
    assert num_parameters(head) == projections + queries * width + 4 * width + width * labels + labels


def test_default_heads() -> None:
    assert [attention_heads(width, None) for width in (1, 48, 64, 100, 384, 768, 4096)] == [1, 1, 1, 1, 6, 12, 64]
    assert attention_heads(48, 6) == 6
    with pytest.raises(TaskError, match="--heads must divide the width of the tokens, 48, got 5"):
        attention_heads(48, 5)


def test_a_planted_patch_is_found() -> None:
    def planted(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        X = rng.standard_normal((200, 16, 8)).astype(np.float32)
        y, place = rng.integers(0, 2, (200, 1)), rng.integers(0, 16, 200)
        X[np.flatnonzero(y), place[np.flatnonzero(y)], :2] += 4
        return X, y, place

    X, y, _ = planted(0)
    probe = AttentiveProbe(Recipe(lr=(0.01,), epochs=60, batch=32), heads=2).fit(X, y, kind="multilabel")
    other, truth, place = planted(1)
    right = (probe.predict_proba(other)[:, 0] > 0.5) == truth[:, 0]
    assert right.mean() > 0.85
    shares = probe.attention(other)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
    assert (shares.argmax(1) == place)[truth[:, 0] == 1].mean() > 0.8


@pytest.fixture
def pictures(tmp_path: Path, store_path: Path) -> Path:
    register_pictures(store_path, tmp_path / "data", 48)
    return store_path


def task_of(store: Path, steps: str) -> Task:
    run(store, config(steps))
    return make_task(opened(store, "pics/tiny@42"), KIND)


@pytest.mark.parametrize("steps", ["", "pool2", "pca:8", "pool2,int8"])
def test_fit_on_a_set_is_the_estimator_on_its_patches(
    pictures: Path, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(pictures, steps)
    monkeypatch.setattr(module, "PART_BYTES", 3000)  # a few rows in each part
    fitted = fit_attentive(task, "patches", QUICK)
    patches = task.features.patches.load().astype(np.float32)
    patches = patches.reshape(len(patches), -1, patches.shape[-1])
    rows = {split: task.index(split) for split in ("train", "val", "test")}
    y = {split: task.y[rows[split]] for split in rows}
    probe = AttentiveProbe(Recipe(lr=(0.001, 0.003), epochs=3, batch=8, weight_decay=0.01))
    held = (patches[rows["val"]], y["val"], np.ones(len(rows["val"]), bool))
    probe.fit(patches[rows["train"]], y["train"], kind="multiclass", num_classes=3, validation=held)
    assert fitted.choices["lr"] == probe.lr_
    assert fitted.choices["tokens"] == patches.shape[1]
    np.testing.assert_allclose(fitted.test_scores, probe.predict_proba(patches[rows["test"]]), atol=1e-4)
    assert fitted.num_parameters == num_parameters(probe.head_)
    again = fit_attentive(task, "patches", QUICK)
    np.testing.assert_array_equal(again.test_scores, fitted.test_scores)


def test_one_reading_serves_every_rate(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(pictures, "")
    read: list[int] = []
    batch = module.StoredTokens.batch

    def counted(self: Any, positions: np.ndarray) -> Any:
        read.append(len(positions))
        return batch(self, positions)

    monkeypatch.setattr(module.StoredTokens, "batch", counted)
    fit_attentive(task, "patches", QUICK)
    train, val, test = (len(task.index(split)) for split in ("train", "val", "test"))
    assert sum(read) == 3 * (train + val) + val + test


def test_record(pictures: Path) -> None:
    task_of(pictures, "")
    config = EvalConfig(dataset="pics", labels="kind", features="patches", resamples=50)
    [record] = evaluate_sets(Store(pictures), "attentive", config, QUICK)
    assert record["features"] == "patches"
    assert record["choices"]["heads"] == attention_heads(opened(pictures, "pics/tiny@42").patches.shape[-1], None)
    assert record["choices"]["said"].startswith("lr=")


def test_what_cannot_be_pooled(pictures: Path) -> None:
    run(pictures, config("", tokens="cls"))
    fs = opened(pictures, "pics/tiny@42")
    task = make_task(fs, KIND)
    line = r"has no patches, which patches is made of; run\n  featstore extract --dataset pics .*--tokens cls,patches"
    with pytest.raises(IncompleteError, match=line):
        fit_attentive(task, "patches", QUICK)
    with pytest.raises(TaskError, match="attentive pooling reads patch tokens, got features 'cls'"):
        fit_attentive(task, "cls", QUICK)
    averaged = make_task(fs, TaskSpec(name="kind", labels=("first",), unit="patient", pool="features"))
    with pytest.raises(TaskError, match="averages the features of each patient, and attentive pooling reads"):
        fit_attentive(averaged, "patches", QUICK)


def test_a_layer_of_one_token_trains() -> None:
    X = np.random.default_rng(0).standard_normal((20, 1, 6)).astype(np.float32)
    y = (X[:, 0, :1] > 0).astype(np.int8)
    probe = AttentiveProbe(Recipe(lr=(0.01,), epochs=2, batch=8)).fit(X, y, kind="multilabel")
    assert np.isfinite(weights(probe.head_)).all()
    np.testing.assert_allclose(probe.attention(X), 1, atol=1e-6)
