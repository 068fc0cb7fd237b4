"""Independent truth for the solvers: scikit-learn's float64 optimum on twenty problems, and chance on random labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from probes.logistic import LogisticProbe

GAP = 1e-6  # relative, above scikit-learn's newton-cholesky in float64 at tol 1e-8


def features(rows: int, width: int, seed: int, decay: float = 0.5, offset: float = 0.0) -> np.ndarray:
    """Correlated features whose spectrum falls off, as those of frozen networks do."""
    random = np.random.default_rng(seed)
    spread = np.arange(1, width + 1) ** -decay
    mixing = np.linalg.qr(random.standard_normal((width, width)))[0]
    return ((random.standard_normal((rows, width)) * spread) @ mixing + offset).astype(np.float32)


def labels(X: np.ndarray, seed: int, share: float = 0.3, noise: float = 1.0, classes: int = 2) -> np.ndarray:
    """Classes that depend on the features, the last `share` of two classes positive."""
    random = np.random.default_rng(seed)
    scores = X @ random.standard_normal((X.shape[1], 1 if classes == 2 else classes))
    scores = scores / scores.std() + noise * random.standard_normal(scores.shape)
    if classes > 2:
        return np.asarray(scores.argmax(1))
    return (scores[:, 0] > np.quantile(scores[:, 0], 1 - share)).astype(np.int64)


def duplicated(X: np.ndarray) -> np.ndarray:
    """With every column twice and a constant one."""
    return np.hstack([X, X, np.ones((len(X), 1), X.dtype)])


# name -> (X, y, C, standardise, class weight)
def problems() -> dict[str, tuple[np.ndarray, np.ndarray, float, bool, Any]]:
    wide, tall, small = features(90, 300, 1), features(900, 40, 2), features(60, 5, 3)
    scaled, shifted = features(500, 30, 4) * 1e3, features(500, 30, 5, offset=50.0)
    steep, half = features(700, 64, 6, decay=1.5), features(400, 48, 7).astype(np.float16).astype(np.float32)
    return {
        "tall": (tall, labels(tall, 1), 1.0, False, None),
        "tall, weak penalty": (tall, labels(tall, 2), 1e4, False, None),
        "tall, strong penalty": (tall, labels(tall, 3), 1e-6, False, None),
        "tall, balanced": (tall, labels(tall, 4, share=0.05), 0.1, True, "balanced"),
        "tall, six positives": (tall, labels(tall, 5, share=0.007), 10.0, True, None),
        "wide": (wide, labels(wide, 6), 1.0, False, None),
        "wide, standardised": (wide, labels(wide, 7), 0.01, True, None),
        "wide, separable": (wide, labels(wide, 8, noise=0.0), 1e3, True, None),
        "small": (small, labels(small, 9), 1.0, True, None),
        "small, weak penalty": (small, labels(small, 10, noise=0.3), 1e5, True, None),
        "twice the columns": (duplicated(tall), labels(tall, 11), 1.0, True, None),
        "large scale": (scaled, labels(scaled, 12), 1e-3, False, None),
        "far from the origin": (shifted, labels(shifted, 13), 1.0, False, None),
        "steep spectrum": (steep, labels(steep, 14), 100.0, False, None),
        "float16 values": (half, labels(half, 15), 1.0, True, None),
        "three classes": (tall, labels(tall, 16, classes=3), 1.0, True, None),
        "eight classes, weak penalty": (tall, labels(tall, 17, classes=8), 100.0, True, None),
        "five classes, wide": (wide, labels(wide, 18, classes=5), 0.1, True, "balanced"),
    }


def objective(X: np.ndarray, y: np.ndarray, W: np.ndarray, b: np.ndarray, C: float, weights: np.ndarray) -> float:
    """0.5 ||W||^2 + C sum_i s_i loss_i in float64; W (D, 1) of two classes or (D, K)."""
    logits = X @ W + b
    if W.shape[1] == 1:
        loss = np.logaddexp(0, logits[:, 0]) - y * logits[:, 0]
    else:
        loss = -log_softmax(logits, axis=1)[np.arange(len(y)), y]
    return float(0.5 * (W**2).sum() + C * (weights * loss).sum())


def check_optimum(X: np.ndarray, y: np.ndarray, C: float, standardize: bool, class_weight: Any) -> None:
    """Our objective is at most GAP above scikit-learn's, both computed here."""
    probe = LogisticProbe(C=C, standardize=standardize, class_weight=class_weight).fit(X, y, kind="multiclass")
    mean, scale = X.astype(np.float64).mean(0), X.astype(np.float64).std(0)
    Z = (X - mean) / np.where(scale > 0, scale, 1.0) if standardize else X.astype(np.float64)
    classes = int(y.max()) + 1
    counts = np.bincount(y, minlength=classes)
    weights = (len(y) / (classes * counts))[y] if class_weight else np.ones(len(y))
    peer = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-8, max_iter=1000, class_weight=class_weight)
    peer.fit(Z, y)
    theirs = objective(Z, y, peer.coef_.T, peer.intercept_, C, weights)
    ours = objective(Z, y, probe.coef_[0], probe.intercept_[0], C, weights)
    assert probe.converged_.all()
    assert ours <= theirs * (1 + GAP)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "five classes, wide" else []) for name in problems()],
)
def test_the_optimum_is_reached(name: str) -> None:
    check_optimum(*problems()[name])


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "C"), [("cxr", 0.01), ("mri-slices", 1.0)])
def test_the_optimum_is_reached_on_real_features(name: str, C: float, shared_data: Path) -> None:
    with np.load(shared_data / "features" / f"{name}_mobilenetv2.npz", allow_pickle=False) as data:
        X, groups = data["features"].astype(np.float32), data["patient_id"]
    y = np.array([hash_of(str(group)) for group in groups]) % 2  # any label does: what counts is the spectrum
    check_optimum(X[:600], y[:600], C, True, None)


def hash_of(text: str) -> int:
    """A number that a text always has."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
