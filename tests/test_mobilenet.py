"""Real MobileNetV2 weights as a local checkpoint: the features and probe results that were published with them."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float32
from PIL import Image

from featstore.backbones import describe
from featstore.backbones.tokens import Backbone
from featstore.images.preprocess import PreprocessSpec, preprocess, stack
from featstore.images.raster import decode

pytestmark = pytest.mark.realdata

PER_SET = 12
BATCH = 32
# set -> folder of its images
SETS = {"cxr": "cxr", "cxr-paed": "cxr-paed", "ct-head": "ct", "mri-slices": "mri"}
SPEC = PreprocessSpec(geometry="short", height=224, width=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def backbone(shared_data: Path) -> Backbone:
    weights = shared_data / "weights" / "mobilenet_v2_imagenet_fp16.safetensors"
    source = describe("mobilenetv2", weights=weights)
    assert source.name == "mobilenetv2"
    assert source.weights["kind"] == "local"
    return source.load(device="cpu", compute_dtype="float32")


def extract(backbone: Backbone, paths: Sequence[Path]) -> Float32[np.ndarray, "N 1280"]:
    """The networks' vectors of image files; the short side to 224, the middle square, x / 127.5 - 1."""
    rows = []
    mean, std = (torch.tensor(values)[:, None, None] for values in (SPEC.mean, SPEC.std))
    for start in range(0, len(paths), BATCH):
        planes = [preprocess(decode(path.read_bytes()), SPEC) for path in paths[start : start + BATCH]]
        pixels = torch.from_numpy(stack(planes, SPEC)).float().div(255).sub(mean).div(std)
        rows.append(backbone(pixels.expand(-1, 3, -1, -1)).cls.numpy())
    return np.concatenate(rows)


def as_published(path: Path) -> Float32[torch.Tensor, "1 3 224 224"]:
    """Pixels as those features were made."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = 224 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    values = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32)
    return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)[None]


def published(shared_data: Path, name: str) -> tuple[list[Path], Float32[np.ndarray, "N 1280"]]:
    """(image files, features) of a set, row by row."""
    with np.load(shared_data / "features" / f"{name}_mobilenetv2.npz") as file:
        return [shared_data / SETS[name] / path for path in file["path"]], file["features"].astype(np.float32)


def cosines(a: Float32[np.ndarray, "N D"], b: Float32[np.ndarray, "N D"]) -> Float32[np.ndarray, " N"]:
    products: Float32[np.ndarray, " N"] = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return products


@pytest.mark.parametrize(
    "name", [name if name.startswith("cxr") else pytest.param(name, marks=pytest.mark.slow) for name in SETS]
)
def test_features_are_the_published_ones(name: str, backbone: Backbone, shared_data: Path) -> None:
    paths, features = published(shared_data, name)
    rows = np.linspace(0, len(paths) - 1, PER_SET).astype(int)
    exact = np.concatenate([backbone(as_published(paths[row])).cls.numpy() for row in rows])
    assert cosines(exact, features[rows]).min() > 0.9999
    assert cosines(extract(backbone, [paths[row] for row in rows]), features[rows]).min() > 0.999


def test_torchvisions_padding_would_not_give_them(backbone: Backbone, shared_data: Path) -> None:
    """The trap itself: equal weights with the odd pixel on the other side give other features."""
    paths, features = published(shared_data, "cxr")
    strided = [module for module in backbone.network.modules() if type(module).__name__ == "SameConv2d"]  # type: ignore[attr-defined]
    assert len(strided) == 5
    symmetric = describe(
        "mobilenetv2", weights=shared_data / "weights" / "mobilenet_v2_imagenet_fp16.safetensors"
    ).load(device="cpu", compute_dtype="float32")
    for module in symmetric.network.modules():  # type: ignore[attr-defined]
        if type(module).__name__ == "SameConv2d":
            module.__class__, module.padding = torch.nn.Conv2d, (1, 1)
    assert cosines(extract(symmetric, paths[:6]), features[:6]).max() < 0.999


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metadata", "label", "reference", "tolerance"),
    [
        ("cxr", "cxr/metadata.csv", "view", 0.987, 0.005),
        ("cxr-paed", "cxr-paed/metadata.csv", "pneumonia", 0.981, 0.005),
        ("ct-head", "ct/head_metadata.csv", "hemorrhage", 0.851, 0.01),
        ("mri-slices", "mri/slices_metadata.csv", "label", 0.843, 0.01),
    ],
)
def test_probe_results_are_the_published_ones(
    name: str, metadata: str, label: str, reference: float, tolerance: float, backbone: Backbone, shared_data: Path
) -> None:
    """AUROC, and the balanced accuracy over the three kinds of tumour, of logistic regression on train and val."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    from sklearn.preprocessing import StandardScaler

    paths, features = published(shared_data, name)
    with open(shared_data / metadata, newline="") as file:
        rows = {shared_data / SETS[name] / row["path"]: row for row in csv.DictReader(file)}
    kept = list(range(len(paths)))
    if label == "view":
        kept = [at for at in kept if rows[paths[at]]["source"] == "nih" and rows[paths[at]]["view"] in ("AP", "PA")]
    found = extract(backbone, [paths[at] for at in kept])
    assert cosines(found, features[kept]).min() > 0.999
    targets = np.array([rows[paths[at]][label] for at in kept])
    test = np.array([rows[paths[at]]["split"] == "test" for at in kept])
    scale = StandardScaler().fit(found[~test])
    head = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000)
    head.fit(scale.transform(found[~test]), targets[~test])
    asked = scale.transform(found[test])
    if len(head.classes_) == 2:
        # With the classes swapped the area is the same.
        result = roc_auc_score(targets[test] == head.classes_[1], head.decision_function(asked))
    else:
        result = balanced_accuracy_score(targets[test], head.predict(asked))
    assert result == pytest.approx(reference, abs=tolerance)
