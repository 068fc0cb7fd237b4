"""`probes linear --protocol`: presets as published, what is listed where they are left, one whole run by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probe_sets import two_label_store
from sklearn.metrics import accuracy_score, roc_auc_score

from featstore.errors import ConfigError, TaskError
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes.configs import EvalConfig, LinearConfig, TaskConfig
from probes.evaluation import evaluate_sets
from probes.linear import fit_linear
from probes.linear_protocols import PROTOCOLS, deviations, recipe_of
from probes.logistic import LogisticProbe
from probes.sgd import Recipe, batches, starts
from probes.tasks import choose_task, make_task

DINO_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


@pytest.fixture
def store(tmp_path: Path, store_path: Path) -> Store:
    return two_label_store(store_path, tmp_path / "x")


def run(store: Store, labels: str, head: LinearConfig, **reading: Any) -> dict[str, Any]:
    config = EvalConfig(dataset="x", labels=labels, features="cls", resamples=10)
    return evaluate_sets(store, "linear", config, head, reading=TaskConfig(**reading))[0]


def task_of(store: Store, *labels: str, **reading: Any) -> Any:
    features = store.set("x/m")
    return make_task(features, choose_task(features.manifest, labels=labels, reading=TaskConfig(**reading)))


def trained_by_hand(
    X: np.ndarray, y: np.ndarray, rates: tuple[float, ...], recipe: Recipe, *, outputs: int, loss: Any
) -> list[torch.nn.Linear]:
    """A linear layer for every learning rate, by autograd."""
    weights, biases = starts(recipe, 0, X.shape[1], len(rates), outputs)
    heads = []
    total, _ = recipe.steps(len(X))
    for number, rate in enumerate(rates):
        head = torch.nn.Linear(X.shape[1], outputs)
        with torch.no_grad():
            head.weight.copy_(weights[number].T)
            head.bias.copy_(biases[number])
        make = torch.optim.SGD if recipe.optimizer == "sgd" else torch.optim.AdamW
        more = {"momentum": 0.9} if recipe.optimizer == "sgd" else {"weight_decay": 0.0}
        optimizer = make(head.parameters(), lr=rate, **more)  # type: ignore[arg-type]
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        for _, batch in zip(range(total), batches(len(X), recipe)):
            optimizer.zero_grad()
            loss(head(torch.from_numpy(X[batch])), torch.from_numpy(y[batch])).backward()
            optimizer.step()
            if recipe.cosine:
                scheduler.step()
        heads.append(head)
    return heads


# --- presets, each value as the papers and their code have it


def test_presets_of_dinov2_and_dinov3() -> None:
    for name, blocks, avgpool in (("dinov2", (1, 4), (False, True)), ("dinov3", (1,), (True,))):
        preset = PROTOCOLS[name]
        assert (preset.rates, preset.scaled, preset.blocks, preset.avgpool) == (DINO_RATES, True, blocks, avgpool)
        assert (preset.classes_by, preset.one_logit, preset.refit) == ("accuracy", False, False)
        recipe = recipe_of(preset, LinearConfig(protocol=name))  # type: ignore[arg-type]
        assert (recipe.optimizer, recipe.batch, recipe.cosine, recipe.start) == ("sgd", 128, True, "normal")
        assert recipe.steps(50) == recipe.steps(10**6) == (12500, 1250)
    assert len(PROTOCOLS["dinov2"].rates) * 2 * 2 == 52


def test_preset_of_radiology() -> None:
    preset = PROTOCOLS["radiology"]
    assert (preset.rates, preset.scaled) == ((1e-3, 5e-3, 1e-2, 5e-2), False)
    assert (preset.blocks, preset.avgpool, preset.refit, preset.one_logit) == ((1, 4), (False, True), True, True)
    assert preset.classes_by == "auroc"
    recipe = recipe_of(preset, LinearConfig(protocol="radiology"))
    assert (recipe.optimizer, recipe.batch, recipe.cosine, recipe.start) == ("sgd", 128, True, "normal")
    assert recipe.steps(1280) == (100, 10)


def test_presets_of_medical_and_chest() -> None:
    medical, chest = PROTOCOLS["medical"], PROTOCOLS["chest"]
    recipe = recipe_of(medical, LinearConfig(protocol="medical"))
    assert (medical.rates, medical.blocks, medical.avgpool, medical.refit) == ((0.005,), (1,), (True,), False)
    assert (recipe.optimizer, recipe.batch, recipe.cosine, recipe.steps(10240)) == ("adamw", 1024, False, (500, 10))
    recipe = recipe_of(chest, LinearConfig(protocol="chest"))
    assert (chest.rates, chest.positives, chest.keep_best, chest.refit) == ((1e-5,), True, True, False)
    assert (recipe.optimizer, recipe.batch, recipe.cosine, recipe.steps(100)) == ("adamw", 30, False, (300, 3))


# --- one protocol from features to record, by hand


def test_the_chosen_head_is_the_one_trained_by_hand(store: Store) -> None:
    """Three classes with dinov2's recipe: scaled rates, accuracy on validation, scores of the test."""
    head = LinearConfig(protocol="dinov2", iterations=60, batch=32, lr="0.001,0.05,0.4")
    record = run(store, "kind", head)
    task = task_of(store, "kind")
    X, y = task.arrays("train", "cls")[:2]
    recipe = Recipe(batch=32, iterations=60)
    heads = trained_by_hand(
        X, y.astype(np.int64), (0.000125, 0.00625, 0.05), recipe, outputs=3, loss=torch.nn.functional.cross_entropy
    )
    X_val, y_val = task.arrays("val", "cls")[:2]
    quality = [accuracy_score(y_val, head(torch.from_numpy(X_val)).argmax(1)) for head in heads]
    best = int(np.argmax(quality))
    choices = record["choices"]
    assert choices["lr"] == (0.001, 0.05, 0.4)[best]
    assert choices["lr_scaled"] == pytest.approx((0.000125, 0.00625, 0.05)[best])
    assert choices["val_accuracy"] == {"last block": {"0.001": quality[0], "0.05": quality[1], "0.4": quality[2]}}
    assert choices["at_edge"] == {"lr": best != 1}
    assert choices["said"] == f"dinov2: lr={choices['lr']:g}" + ("*" if best != 1 else "")
    assert choices["steps"] == 60
    X_test, y_test = task.arrays("test", "cls")[:2]
    scores = torch.softmax(heads[best](torch.from_numpy(X_test)), 1).detach().numpy()
    expected = roc_auc_score(y_test, scores, multi_class="ovr")
    assert record["metrics"]["test"]["macro"]["auroc"] == pytest.approx(expected, abs=1e-6)
    final = float(
        torch.nn.functional.cross_entropy(heads[best](torch.from_numpy(X)), torch.from_numpy(y).long()).detach()
    )
    assert record["notes"][0] == f"60 steps of SGD on train: loss {final:.4g} there; no optimum was solved for"
    assert record["cost"]["trainable_parameters"] == 6 * 3 + 3


def test_radiology_trains_the_choice_again_on_train_and_val(store: Store) -> None:
    head = LinearConfig(protocol="radiology", batch=32, lr="0.05", head_seed=4)
    record = run(store, "a", head)
    task = task_of(store, "a")
    (X, y), (X_val, y_val), (X_test, y_test) = (task.arrays(split, "cls")[:2] for split in ("train", "val", "test"))
    recipe = Recipe(batch=32, epochs=10, sampling="epochs", seed=4)
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    first = trained_by_hand(X, y.astype(np.float32), (0.05,), recipe, outputs=1, loss=loss)[0]
    val = roc_auc_score(y_val[:, 0], first(torch.from_numpy(X_val)).detach()[:, 0])
    assert record["metrics"]["val"]["macro"]["auroc"] == pytest.approx(val, abs=1e-9)
    both, labels = np.concatenate([X, X_val]), np.concatenate([y, y_val]).astype(np.float32)
    again = trained_by_hand(both, labels, (0.05,), recipe, outputs=1, loss=loss)[0]
    test = roc_auc_score(y_test[:, 0], again(torch.from_numpy(X_test)).detach()[:, 0])
    assert record["metrics"]["test"]["macro"]["auroc"] == pytest.approx(test, abs=1e-9)
    assert record["notes"][1] == (
        "val is scored, and the head chosen, with train alone; tested after training it on train and val"
    )
    assert "60 steps of SGD on train and val" in record["notes"][2]  # 192 rows, 6 batches, 10 epochs
    assert record["choices"]["steps"] == 50


def test_two_classes_are_one_label_in_radiology_and_two_in_dinov2(store: Store) -> None:
    one = run(store, "pair", LinearConfig(protocol="radiology", lr="0.05"))
    two = run(store, "pair", LinearConfig(protocol="dinov2", lr="0.05", iterations=50))
    assert one["cost"]["trainable_parameters"] == 7
    assert two["cost"]["trainable_parameters"] == 14
    for record in (one, two):
        assert record["metrics"]["test"]["macro"]["auroc"] > 0.6


def test_chest_weighs_positives_and_keeps_the_best_epoch(store: Store) -> None:
    task = task_of(store, "a", "b")
    fitted = fit_linear(task, "cls", LinearConfig(protocol="chest", lr="0.2", iterations=60, batch=20))
    X, y, mask = task.arrays("train", "cls")[:3]
    X_val, y_val, mask_val = task.arrays("val", "cls")[:3]
    positives = ((y == 1) & mask).sum(0)
    weight = torch.tensor((mask.sum(0) - positives) / positives).float()

    def loss(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return _masked(logits, torch.from_numpy(y)[rows], torch.from_numpy(mask)[rows])

    def _masked(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        each = [
            torch.nn.functional.binary_cross_entropy_with_logits(
                logits[mask[:, c], c], y[mask[:, c], c].float(), pos_weight=weight[c]
            )
            for c in range(2)
        ]
        return (each[0] + each[1]) / 2

    recipe = Recipe(optimizer="adamw", batch=20, cosine=False, sampling="whole batches", start="uniform")
    per_epoch = len(X) // 20
    losses, scores = [], []
    for epochs in range(1, -(-60 // per_epoch) + 1):
        steps = min(60, epochs * per_epoch)
        rows = np.arange(len(X))
        head = trained_by_hand(X, rows, (0.2,), replace(recipe, iterations=steps), outputs=2, loss=loss)[0]
        logits = head(torch.from_numpy(X_val)).detach()
        losses.append(float(_masked(logits, torch.from_numpy(y_val), torch.from_numpy(mask_val))))
        scores.append(torch.sigmoid(logits).numpy())
    assert fitted.choices["epoch"] == np.argmin(losses) + 1
    np.testing.assert_allclose(fitted.val_scores, scores[int(np.argmin(losses))], atol=1e-4)
    assert f"weights of epoch {fitted.choices['epoch']} kept" in fitted.notes[0]


def test_features_averaged_and_scores_pooled_per_unit(store: Store) -> None:
    head = LinearConfig(protocol="radiology", lr="0.05")
    averaged = run(store, "a", head, unit="study", pool="features")
    pooled = run(store, "a", head, unit="study", pool="mean")
    assert averaged["task"]["splits"] == pooled["task"]["splits"]
    text = "mean of the scores of images per study; published: features are averaged before the head (--pool features)"
    assert text in pooled["choices"]["protocol_deviations"]
    assert not any("per study" in found for found in averaged["choices"]["protocol_deviations"])
    other = run(store, "a", LinearConfig(protocol="dinov3", iterations=5), unit="study", pool="features")
    assert "features averaged per study" in other["choices"]["protocol_deviations"]


def test_standardised_features_are_those_of_the_training_rows(store: Store) -> None:
    task = task_of(store, "a")
    fitted = fit_linear(task, "cls", LinearConfig(protocol="dinov3", iterations=30, lr="0.1", standardize=True))
    X, y = task.arrays("train", "cls")[:2]
    mean, scale = X.astype(np.float64).mean(0), X.astype(np.float64).std(0)
    head = trained_by_hand(
        ((X - mean) / scale).astype(np.float32),
        y.astype(np.float32),
        (0.05,),
        Recipe(iterations=30),
        outputs=1,
        loss=torch.nn.functional.binary_cross_entropy_with_logits,
    )[0]
    test = ((task.arrays("test", "cls")[0] - mean) / scale).astype(np.float32)
    np.testing.assert_allclose(fitted.test_scores, torch.sigmoid(head(torch.from_numpy(test))).detach(), atol=1e-5)
    assert "standardised features" in fitted.choices["protocol_deviations"]


def test_test_labels_never_touch_the_choice(store: Store) -> None:
    task = task_of(store, "a", "b")
    flipped = replace(task, y=np.where((task.role == "test")[:, None], 1 - task.y, task.y))
    for name in ("dinov3", "radiology", "chest"):
        head = LinearConfig(protocol=name, iterations=20, batch=20)
        honest, other = fit_linear(task, "cls", head), fit_linear(flipped, "cls", head)
        assert honest.choices == other.choices
        np.testing.assert_array_equal(honest.test_scores, other.test_scores)


def test_random_labels_choose_nothing(store: Store) -> None:
    """Labels drawn without the features: test AUROC one half over 20 seeds, choice and refit included."""
    task = task_of(store, "a")
    areas = []
    for seed in range(20):
        random = np.random.default_rng(seed).integers(0, 2, task.y.shape)
        task.y[:], task.y_train[:] = random, random
        fitted = fit_linear(task, "cls", LinearConfig(protocol="radiology", iterations=20))
        truth = task.truth("test")
        areas.append(roc_auc_score(truth.y[:, 0], fitted.test_scores[:, 0]))
    assert abs(np.mean(areas) - 0.5) <= 3 * np.std(areas, ddof=1) / np.sqrt(20)


# --- deviations


def test_everything_that_is_not_as_published_is_listed(store: Store) -> None:
    head = LinearConfig(
        protocol="dinov2", lr="0.1,0.2", batch=16, iterations=9, optimizer="adamw", standardize=True, refit=True
    )
    record = run(store, "a,b", head)
    masked = record["num_masked"]["train"]
    assert masked > 0
    assert record["choices"]["protocol_deviations"] == [
        "heads left out of the grid, whose features are not read: last block + mean patch, last 4 blocks, last 4 "
        "blocks + mean patch",
        "preprocessing of imported features unknown",
        "features of the images as they are; published: random resized crop to 224 and mirroring, drawn anew each time",
        *([] if store.set("x/m").spec["identity"]["stored_dtype"] == "float32" else ["features rounded to float16 in "
          "the store; published heads read what the network gives"]),
        "standardised features",
        "the choice is trained again on train and val; published: on train alone",
        "learning rates 0.1, 0.2 in place of 1e-05, 2e-05, 5e-05, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, "
        "0.02, 0.05, 0.1",
        "batches of 16 in place of 128",
        "9 training steps in place of 10 x 1250",
        "optimiser adamw in place of sgd",
        "labels, each with its own cross-entropy, chosen by macro AUROC; published: one of several classes",
        f"{masked} masked label entries of the training rows have no loss; the protocol has none",
    ]  # fmt: skip
    assert record["deviations"] == record["choices"]["protocol_deviations"]
    assert "deviates from protocol dinov2: batches of 16 in place of 128" in record["notes"]


def test_what_a_paper_does_not_state_is_listed(store: Store) -> None:
    medical = run(store, "kind", LinearConfig(protocol="medical", iterations=5))["choices"]["protocol_deviations"]
    assert "optimiser and schedule are not stated: AdamW without weight decay, constant learning rate" in medical
    assert "softmax over classes; published: cross-entropy of labels" in medical
    assert "5 training steps in place of 50 epochs" in medical
    chest = run(store, "a", LinearConfig(protocol="chest", iterations=5))["choices"]["protocol_deviations"]
    assert "features cls in place of the mean over all tokens (CLS, registers, patches)" in chest
    assert "the backbone is frozen; published: all of its weights are trained with the head" in chest
    assert any(text.startswith("rows to train, choose and test on are this task's (split: ") for text in chest)


class Described(FeatureSet):
    """A feature set that is known by its spec and the shapes of its arrays alone."""

    def __init__(self, shapes: dict[str, int], like: FeatureSet, **identity: Any) -> None:
        images = {"geometry": "dino", "height": 224, "width": 224, "intensity": "native"}
        images |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        self.shapes, self.manifest = shapes, like.manifest
        self.spec = {"identity": {"stored_dtype": "float32", "preprocess": images, **identity}}

    @property
    def arrays(self) -> list[str]:
        return list(self.shapes)

    def array(self, name: str) -> Any:
        return np.zeros((1, self.shapes[name]))


def test_as_published_is_said_where_nothing_deviates(store: Store) -> None:
    task = task_of(store, "kind")
    known = replace(task, features=Described({"cls": 4, "mean_patch": 4}, task.features))
    config = LinearConfig(protocol="dinov3", views=12)
    heads = {"last block + mean patch": slice(0, 8)}
    assert deviations(PROTOCOLS["dinov3"], known, config, heads=heads, masked=0, passes=12.0) == []
    found = deviations(PROTOCOLS["dinov3"], known, config, heads=heads, masked=0, passes=20.0)
    assert found == ["12 augmented views of each row, which is trained on 20 times; published: drawn anew each time"]


def test_images_of_another_geometry_or_preset_are_listed(store: Store) -> None:
    task, heads = task_of(store, "kind"), {"last block + mean patch": slice(0, 8)}
    squashed = Described({"cls": 4}, task.features)
    squashed.spec["identity"]["preprocess"] |= {"geometry": "squash", "height": 98, "mean": [0.5] * 3}
    config = LinearConfig(protocol="dinov3", views=1)
    found = deviations(PROTOCOLS["dinov3"], replace(task, features=squashed), config, heads=heads, masked=0, passes=1.0)
    assert found == [
        "geometry squash at 98x224 in place of short side 256, centre crop 224",
        "mean [0.5, 0.5, 0.5] and std [0.229, 0.224, 0.225] in place of ImageNet's",
    ]
    config = LinearConfig(protocol="radiology", views=1)
    other = replace(task, features=squashed)
    found = deviations(PROTOCOLS["radiology"], other, config, heads={"cls": slice(0, 8)}, masked=0, passes=1.0)
    assert (
        "images: geometry squash at 98x224, intensity native; published: featstore extract --published dinov2-radiology"
        in found
    )
    squashed.spec["published"] = {
        "name": "dinov2-radiology",
        "deviations": ["the resize is antialiased; theirs is not", "its kNN resized to 256 and cropped 224"],
    }
    found = deviations(PROTOCOLS["radiology"], other, config, heads={"cls": slice(0, 8)}, masked=0, passes=1.0)
    assert [text for text in found if text.startswith("images: ")] == [
        "images: the resize is antialiased; theirs is not"
    ]


# --- what is refused


def test_numbers_have_no_protocol(store: Store) -> None:
    for label, reading in (("age", {"kind": "regression"}), ("kind", {"kind": "ordinal", "classes": "x,y,z"})):
        with pytest.raises(TaskError, match="is of numbers or ranks, and --protocol dinov3 trains heads for labels"):
            run(store, label, LinearConfig(protocol="dinov3"), **reading)


def test_heads_that_all_run_away(store: Store) -> None:
    task = task_of(store, "a")
    with pytest.raises(TaskError, match="no head of protocol radiology has a finite validation score; lower --lr"):
        fit_linear(task, "cls", LinearConfig(protocol="radiology", lr="1e39", iterations=30))
    fitted = fit_linear(task, "cls", LinearConfig(protocol="radiology", lr="0.01,1e39", iterations=30))
    assert fitted.choices["diverged"] == ["last block lr=1e+39"]
    assert "ran away, not chosen from: last block lr=1e+39" in fitted.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 2}, "--views belongs to --protocol, which trains step by step"),
        ({"iterations": 5}, "--iterations belongs to --protocol"),
        ({"lr": "0.1"}, "--lr belongs to --protocol"),
        ({"batch": 5}, "--batch belongs to --protocol"),
        ({"optimizer": "sgd"}, "--optimizer belongs to --protocol"),
        ({"head_seed": 0}, "--head-seed belongs to --protocol"),
        ({"protocol": "dinov2", "C": "1"}, "--C has no place in --protocol dinov2: its heads have no penalty"),
        ({"protocol": "dinov2", "alpha": "1"}, "--alpha has no place in --protocol dinov2: its heads have no penalty"),
        ({"protocol": "chest", "class_weight": "positives"}, "--class-weight has no place in --protocol chest"),
        ({"protocol": "chest", "refit": True}, "--refit has no place in --protocol chest: it keeps the epoch"),
        ({"protocol": "medical", "views": 2}, "--views has no place in --protocol medical: the paper does not say"),
        ({"protocol": "chest", "views": 0}, "--views must be at least 1, got 0"),
        ({"protocol": "chest", "iterations": 0}, "--iterations must be at least 1, got 0"),
        ({"protocol": "chest", "batch": -1}, "--batch must be at least 1, got -1"),
        ({"protocol": "chest", "head_seed": -1}, "--head-seed must be 0 or more, got -1"),
        ({"protocol": "chest", "lr": "0"}, "--lr takes positive numbers, comma-separated; got '0'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LinearConfig(**options)


def test_standardising_is_the_default_without_a_protocol_alone() -> None:
    assert LinearConfig().standardize is True
    assert LinearConfig(standardize=False).standardize is False
    assert LinearConfig(protocol="dinov2").standardize is False
    assert LinearConfig(protocol="dinov2", standardize=True).standardize is True


def test_class_weight_of_positives(store: Store) -> None:
    """Negatives / positives for the positives of each label, in the default logistic regression."""
    record = run(store, "a", LinearConfig(C="0.1", class_weight="positives"))
    task = task_of(store, "a")
    X, y = task.arrays("train", "cls")[:2]
    probe = LogisticProbe(C=0.1, class_weight="positives").fit(X, y, kind="multilabel")
    scores = probe.probabilities(task.arrays("test", "cls")[0], 0)
    truth = task.truth("test")
    assert record["metrics"]["test"]["macro"]["auroc"] == pytest.approx(roc_auc_score(truth.y[:, 0], scores[:, 0]))
    with pytest.raises(TaskError, match="is of classes, which have no positives to weigh; use --class-weight balanced"):
        run(store, "kind", LinearConfig(class_weight="positives"))
