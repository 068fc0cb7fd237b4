"""Fixtures shared by all tests: real data when it is there, a fresh store, thread limits."""

import gc
import os
from pathlib import Path
from typing import Any

import pytest

# Two BLAS pools on few cores spin against each other; tests are small, one thread is fastest.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent

# Thousands of tests and a dozen large libraries are objects that stay: looked through again and again they would take a
# quarter of the time of collecting tests, and seconds whenever code under test collects garbage itself.
gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images, labels and weights beside the checkout; tests that need it skip without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data beside the checkout is absent")
    return folder


@pytest.fixture
def store_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store that FEATSTORE_HOME names."""
    path = tmp_path / "store"
    monkeypatch.setenv("FEATSTORE_HOME", str(path))
    return path


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of images in the order in which this process reads them."""
    from featstore.extraction import loader

    seen: list[str] = []
    original = loader.load_images

    def counted(inputs: Any, opened: Any, sample: Any, *more: Any) -> Any:
        seen.append(sample.path)
        return original(inputs, opened, sample, *more)

    monkeypatch.setattr(loader, "load_images", counted)
    return seen
