"""The loop against a plain one written with torch alone; masks, weights, pieces, averages, choice of the epoch."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from tuning import fresh
from tuning_runs import FAST, FEATURES, LABELS, adapted_of, equal, pictures, task_of, tune, weights_of

from featstore.errors import ConfigError, TaskError, WeightsError
from featstore.images import stack, to_pixels
from probes import tuning_loop
from probes.adapters import adapt
from probes.metrics import auroc
from probes.tasks import Task
from probes.taskspec import TaskSpec
from probes.tuning_images import epoch_order, split_images
from probes.tuning_loop import Run
from probes.tuning_model import Average, Tuned, make_head, start_head
from probes.tuning_recipe import AugmentRecipe, Optimisation, TuningRecipe
from probes.tuning_run import LinearStart

CLASSES = TaskSpec(name="kinds", labels=("kind",), kind="multiclass")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def task(store: Path) -> Task:
    return task_of(store, LABELS)


def pixels_of(task: Task, split: str) -> torch.Tensor:
    held = split_images(task, split)
    with held.images.open([held.rows]) as batches:
        (batch,) = batches
    spec = held.images.preprocess
    return to_pixels(torch.from_numpy(stack(list(batch.pixels), spec)), spec, device="cpu", dtype=torch.float32)


def reference(task: Task, recipe: TuningRecipe) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Full fine-tuning in a dozen lines, over whole batches."""
    adapted = adapted_of(task, "full")
    head = make_head(adapted, FEATURES, 2, recipe.seed)
    how = recipe.optimisation
    rules: Any = {"adamw": torch.optim.AdamW, "sgd": lambda groups: torch.optim.SGD(groups, momentum=how.momentum)}
    decayed = [value for value in adapted.parameters.values() if value.squeeze().ndim > 1]
    others = [value for value in adapted.parameters.values() if value.squeeze().ndim <= 1]
    optimizer = rules[how.optimizer](
        [
            {"params": decayed, "lr": how.lr, "weight_decay": how.weight_decay},
            {"params": others, "lr": how.lr, "weight_decay": 0.0},
            {"params": [head.weight], "lr": how.head_lr, "weight_decay": how.weight_decay},
            {"params": [head.bias], "lr": how.head_lr, "weight_decay": 0.0},
        ]
    )
    data = {split: (pixels_of(task, split), split_images(task, split)) for split in ("train", "val")}
    positive = (data["train"][1].y == 1) & data["train"][1].mask
    counts = data["train"][1].mask.sum(0)
    weight = torch.tensor((counts - positive.sum(0)) / positive.sum(0)) if recipe.class_weight else None

    def loss(split: str, rows: np.ndarray) -> tuple[torch.Tensor, float]:
        images, labels = data[split]
        logits = head(adapted.trainable.features(images[torch.from_numpy(rows)], FEATURES))
        y, mask = torch.tensor(labels.y[rows]).double(), torch.tensor(labels.mask[rows])
        each = nn.functional.binary_cross_entropy_with_logits(logits.double(), y, pos_weight=weight, reduction="none")
        return each[mask].sum(), float(mask.sum())

    curves: tuple[list[float], list[float]] = ([], [])
    steps, done = recipe.epochs * math.ceil(24 / recipe.batch), 0
    for epoch in range(recipe.epochs):
        order, total, entries = epoch_order(24, recipe.seed, epoch), 0.0, 0.0
        for start in range(0, 24, recipe.batch):
            value, count = loss("train", order[start : start + recipe.batch])
            optimizer.zero_grad()
            (value / count).backward()
            for name, parameter in adapted.parameters.items():
                if name.endswith(("k_proj.bias", "key.bias")):  # softmax ignores it, and what it has is rounding
                    parameter.grad.zero_()  # type: ignore[union-attr]
            for group, peak in zip(optimizer.param_groups, (how.lr, how.lr, how.head_lr, how.head_lr)):
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * done / steps))
            optimizer.step()
            done, total, entries = done + 1, total + value.item(), entries + count
        with torch.no_grad():
            value, count = loss("val", np.arange(12))
        curves[0].append(total / entries)
        curves[1].append(value.item() / count)
    return *curves, weights_of(adapted)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("micro", [None, 3])
def test_the_same_as_a_plain_loop(optimizer: Any, micro: int | None, task: Task, tmp_path: Path) -> None:
    how = Optimisation(optimizer=optimizer, lr=1e-4, head_lr=1e-2, weight_decay=0.1)
    recipe = TuningRecipe(epochs=2, batch=10, micro=micro, class_weight="balanced", optimisation=how)
    train, val, weights = reference(task, recipe)
    result, adapted = tune(task, tmp_path, recipe)
    np.testing.assert_allclose(result.history["train_loss"], train, atol=2e-5)
    np.testing.assert_allclose(result.history["val_loss"], val, atol=2e-5)
    if result.progress.chosen == 2:
        found = weights_of(adapted)
        assert max(float((found[name] - value).abs().max()) for name, value in weights.items()) < 5e-5
    best = split_images(task, "val")
    score = np.mean([auroc(best.y[m, i], result.val_scores[m, i]) for i, m in enumerate(best.mask.T)])
    assert 0 <= score <= 1


def test_every_method_learns(task: Task, tmp_path: Path) -> None:
    recipe = replace(FAST, epochs=3, optimisation=replace(FAST.optimisation, lr=3e-4))
    counts = {}
    for method in ("full", "lora", "bitfit", "last-k", "linear-online"):
        result, _ = tune(
            task, tmp_path / method, recipe, method=method, settings={"dropout": 0.0} if method == "lora" else {}
        )
        losses = result.history["train_loss"]
        assert losses[-1] < losses[0]
        counts[method] = result.num_trainable
        assert result.cost["trainable_parameters"] == result.num_trainable
        assert result.cost["images_per_second"] > 0
        assert result.cost["gpu_seconds"] == 0.0
    assert (
        counts["linear-online"] == 2 * 384 + 2 < counts["bitfit"] < counts["lora"] < counts["last-k"] < counts["full"]
    )


def test_classes_checkpointing_and_bf16_learn(store: Path, tmp_path: Path) -> None:
    task = task_of(store, CLASSES)
    recipe = replace(FAST, epochs=3, keep="auroc", precision="bfloat16", class_weight="balanced")
    result, _ = tune(task, tmp_path, recipe)
    np.testing.assert_allclose(result.test_scores.sum(1), 1)
    assert result.history["train_loss"][-1] < result.history["train_loss"][0]
    assert len(result.history["val_auroc"]) == 3
    chosen = result.history["val_auroc"]
    assert chosen[result.progress.chosen - 1] == max(chosen)


def test_the_head_starts_from_a_fitted_probe(task: Task, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weight, bias, mean = generator.normal(size=(2, 384)), generator.normal(size=2), generator.normal(size=384)
    scale = generator.uniform(0.5, 2, size=384)
    adapted = adapted_of(task, "linear-online")
    head = make_head(adapted, FEATURES, 2, 0)
    assert float(head.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert not head.bias.detach().any()
    start_head(head, weight, bias, mean, scale)
    rows = generator.normal(size=(5, 384))
    found = head(torch.from_numpy(rows.astype(np.float32))).detach().numpy()
    np.testing.assert_allclose(found, (rows - mean) / scale @ weight.T + bias, atol=1e-4)
    with pytest.raises(
        ConfigError, match=r"the fitted probe has weights \(2, 3\) and biases \(2,\), the head \(2, 384\)"
    ):
        start_head(head, weight[:, :3], bias)
    # A run that hardly moves gives the probe's scores.
    still = replace(FAST, epochs=1, optimisation=Optimisation(lr=1e-9))
    start = LinearStart(weight / 50, bias / 50, mean, scale)
    result, adapted = tune(task, tmp_path, still, method="linear-online", start=start)
    with torch.no_grad():
        features = adapted.trainable.features(pixels_of(task, "test"), FEATURES).double().numpy()
    logits = (features - mean) / scale @ (weight / 50).T + bias / 50
    np.testing.assert_allclose(result.test_scores, 1 / (1 + np.exp(-logits)), atol=1e-4)


def test_the_average_is_the_closed_form() -> None:
    adapted = adapt(fresh("dinov2"), "bitfit")
    model = Tuned(adapted, "cls", make_head(adapted, "cls", 2, 0))
    average = Average(model, 0.9)
    first = {name: value.detach().clone() for name, value in model.trained().items()}
    with torch.no_grad():
        for value in model.trained().values():
            value.add_(1)
    average.add()
    average.add()
    for name, value in average.values.items():
        assert torch.allclose(value, first[name] + 1 - 0.81, atol=1e-6)
    moved = {name: value.detach().clone() for name, value in model.trained().items()}
    with average.shown():
        assert equal({name: value.detach() for name, value in model.trained().items()}, average.values)
    assert equal({name: value.detach() for name, value in model.trained().items()}, moved)


def test_the_average_is_measured_and_kept(task: Task, tmp_path: Path) -> None:
    slow = replace(FAST, optimisation=replace(FAST.optimisation, ema=0.999))
    plain, _ = tune(task, tmp_path / "plain", FAST, method="bitfit")
    averaged, _ = tune(task, tmp_path / "averaged", slow, method="bitfit")
    assert averaged.history["train_loss"] == plain.history["train_loss"]  # it changes no step
    assert averaged.history["val_loss"][0] > plain.history["val_loss"][0]  # and lags behind


def test_it_ends_early_and_keeps_the_best(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(FAST, epochs=9, keep="auroc", patience=2)
    qualities, kept = iter([0.6, 0.8, 0.8, *[0.7] * 6]), []
    judge = Run._judge

    def judging(self: Run) -> None:
        object.__setattr__(self.data, "quality", lambda _: next(qualities))
        judge(self)
        kept.append(weights_of(self.model.adapted))

    monkeypatch.setattr(Run, "_judge", judging)
    result, adapted = tune(task, tmp_path, recipe, method="bitfit")
    assert result.history["val_auroc"][:2] == [0.6, 0.8]
    losses = result.history["val_loss"]
    chosen = 3 if losses[2] < losses[1] else 2  # of equals the one of the lower loss
    assert result.progress.chosen == chosen
    assert len(losses) == chosen + 2
    assert equal(weights_of(adapted), kept[chosen - 1])


def test_a_loss_that_is_not_finite_ends_the_run(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wild = replace(FAST, optimisation=Optimisation(optimizer="sgd", lr=1e30))
    with pytest.raises(TaskError, match="left the finite numbers in epoch 1 before anything was measured; lower the"):
        tune(task, tmp_path / "a", wild)
    count, loss = [0], tuning_loop._loss

    def breaking(*arguments: Any) -> torch.Tensor:
        count[0] += 1
        return loss(*arguments) * (math.nan if count[0] == 5 else 1.0)

    monkeypatch.setattr(tuning_loop, "_loss", breaking)
    result, _ = tune(task, tmp_path / "b", replace(FAST, epochs=4), method="bitfit")
    assert result.progress.chosen == 1
    assert "training left the finite numbers in epoch 2; epoch 1 is kept" in result.notes
    again, _ = tune(task, tmp_path / "b", replace(FAST, epochs=4), method="bitfit")
    np.testing.assert_array_equal(again.test_scores, result.test_scores)


def test_mirrored_images_bring_their_labels(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a step is that of the swapped labels, in any cut of the batch."""
    object.__setattr__(task, "labels", ("x_left", "x_right"))
    recipe = replace(FAST, epochs=1, micro=3, augment=AugmentRecipe(flip="mapped"))
    seen: list[Any] = []
    plan = Run._plan

    def planning(self: Run, batch: Any) -> Any:
        step = plan(self, batch)
        seen.append((self, step))
        return step

    monkeypatch.setattr(Run, "_plan", planning)
    try:
        tune(task, tmp_path, recipe, method="linear-online")
    finally:
        object.__setattr__(task, "labels", ("first", "second"))
    mirrored_rows = 0
    for run, step in seen:
        split, augmenter = run.data.train, run.data.augmenter
        for place, row in enumerate(step.batch.tolist()):
            mirrored = augmenter.draw([split.ids[row]], 0, (42, 42)).mirrored[0]
            mirrored_rows += int(mirrored)
            mask = split.mask[row][::-1] if mirrored else split.mask[row]
            y = split.y[row][::-1] if mirrored else split.y[row]
            np.testing.assert_array_equal(step.targets.mask[place].numpy() > 0, mask)
            np.testing.assert_array_equal(step.targets.y[place].numpy()[mask], y[mask])
    assert 4 < mirrored_rows < 20


def test_progress_is_shown(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tuning_loop, "SHOWN_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="probes.tuning_loop"):
        tune(task, tmp_path, replace(FAST, epochs=1), method="linear-online")
    assert "epoch 1/1, step 1/3: " in caplog.text
    assert " images/s, at most " in caplog.text
    assert "epoch 1/1: train loss " in caplog.text


def test_weights_of_something_else_are_refused() -> None:
    adapted = adapt(fresh("dinov2"), "bitfit")
    model = Tuned(adapted, "cls", make_head(adapted, "cls", 2, 0))
    held = model.snapshot()
    model.restore(held)
    with pytest.raises(WeightsError, match=r"1 tensors do not fit \(head.bias, ...\); give the model and the method"):
        model.restore({name: value for name, value in held.items() if name != "head.bias"})
    with pytest.raises(WeightsError, match="1 tensors do not fit"):
        model.restore({**held, "head.bias": torch.zeros(3)})
