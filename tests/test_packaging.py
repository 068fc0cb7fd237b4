"""The wheel holds the product and nothing else, and works away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    call = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_packages_and_the_tiny_network(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"featstore", "probes", "cli"}
    assert any(name.endswith("tiny_weights/model.safetensors") for name in names)
    assert not [name for name in names if "test" in name.split("/")[0] or "benchmark" in name]
    assert wheel.stat().st_size < 5e6


def test_wheel_imports_and_helps_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = "import featstore; print(featstore.__file__); from cli.main import probes; probes()"
    done = subprocess.run(
        [sys.executable, "-c", program, "knn", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "k nearest neighbours" in done.stdout


@pytest.mark.slow
def test_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    from pictures import register_pictures

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    register_pictures(tmp_path / "store", tmp_path / "data", 12)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "FEATSTORE_HOME": str(tmp_path / "store")}
    for arguments in (
        ["featstore", "extract", "--model", "tiny", "--res", "42"],
        ["probes", "knn", "--dataset", "pics"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
    where = subprocess.run(
        [sys.executable, "-c", "import featstore; print(featstore.__file__)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert where.stdout.startswith(str(tmp_path / "site"))


def test_constraints_are_names_and_versions_only() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line and "/" not in line and "+" not in line for line in lines)
    assert "torch==2.13.0" in lines


SLOW = ("decode", "extract", "precision", "probes", "store", "suite")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in ("extract", "decode", "store", "probes", "precision", "suite")
    ],
)
def test_benchmarks_run(name: str, tmp_path: Path) -> None:
    call = [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob(f"{name}-*.json"))) == 1
    assert done.stdout.count("\n") == 1
