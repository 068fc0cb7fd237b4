"""What may import what, how long files and functions are, and how little `--help` loads."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from featstore.datasets import DATASETS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("featstore", "probes", "cli")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = ("torch", "transformers", "zarr", "sklearn", "faiss", "scipy", "pyarrow", "PIL")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text()) for path in SOURCES}


def imports(module: str) -> set[str]:
    """Our own modules that `module` imports anywhere, also inside functions, for types, or by a registry's text."""
    found: set[str] = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from featstore.store import ledger` is of a module, `from featstore.errors import X` of a name in one.
            found.update(name if name in MODULES else node.module for name in names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ":" in node.value:
            found.add(node.value.split(":")[0])
    return {name for name in found if name in MODULES}


GRAPH = {module: imports(module) for module in MODULES}


def below(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def crossings(sources: str, targets: tuple[str, ...], but: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{module} -> {target}"
        for module, found in GRAPH.items()
        if below(module, sources) and module not in but
        for target in sorted(found)
        if any(below(target, prefix) for prefix in targets)
    ]


def test_the_graph_is_read() -> None:
    assert "featstore.errors" in GRAPH["featstore.files"]
    assert "cli.main" in GRAPH["featstore.__main__"]
    assert "featstore.store.ledger" in GRAPH["featstore.store.features"]
    assert "featstore.datasets.chexpert" in GRAPH["featstore.datasets"]


def test_arrows_between_packages() -> None:
    assert crossings("featstore", ("probes", "cli"), but=("featstore.__main__",)) == []
    assert crossings("probes", ("cli",), but=("probes.__main__",)) == []


@pytest.mark.parametrize("package", ["featstore", "probes"])
def test_main_modules_only_call_the_command(package: str) -> None:
    assert GRAPH[f"{package}.__main__"] == {"cli.main"}
    assert len((ROOT / package / "__main__.py").read_text().splitlines()) <= 3


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("featstore.errors", set()),
        ("featstore.objects", {"featstore.errors"}),
        ("featstore.files", {"featstore.errors", "featstore.objects"}),
        ("featstore.records", {"featstore"}),
        ("featstore.configs", {"featstore.errors"}),
        ("featstore", {"featstore", "featstore.store.catalog", "featstore.store.features"}),
    ],
)
def test_the_bottom_rests_on_nothing_else(module: str, allowed: set[str]) -> None:
    assert GRAPH[module] <= allowed


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("datasets", ("backbones", "store", "extraction", "register")),
        ("images", ("datasets", "backbones", "store", "extraction", "register")),
        ("backbones", ("datasets", "store", "extraction", "register")),
        ("store", ("images", "backbones", "extraction", "register")),
        ("extraction", ("register",)),
    ],
)
def test_arrows_inside_featstore(package: str, forbidden: tuple[str, ...]) -> None:
    assert crossings(f"featstore.{package}", tuple(f"featstore.{name}" for name in forbidden)) == []


# What is tuned through the network starts at images.
TUNING = ("probes.adapters", "probes.tuning", "probes.finetune")


def test_probes_take_embeddings_not_images() -> None:
    found = crossings("probes", ("featstore.backbones", "featstore.extraction", "featstore.images"))
    assert [arrow for arrow in found if not arrow.startswith(TUNING)] == []


def test_packages_do_not_import_in_circles() -> None:
    def layer(module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[:2]) if parts[0] == "featstore" else parts[0]

    edges: dict[str, set[str]] = {}
    for module, found in GRAPH.items():
        if not module.endswith("__main__") and module != "featstore":  # the package's lazy names point upwards
            edges.setdefault(layer(module), set()).update(layer(target) for target in found if target != "featstore")
    left = {name: targets - {name} for name, targets in edges.items()}
    while leaves := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in leaves:
            del left[name]
    assert left == {}


def test_every_adapter_is_named_by_the_registry() -> None:
    """A file of datasets/ with a function that reads a root into a source is an adapter; the others serve them."""
    adapters = {
        f"{module}:{node.name}"
        for module in MODULES
        if module.startswith("featstore.datasets.")
        for node in MODULES[module].body
        if isinstance(node, ast.FunctionDef) and (node.name == "read" or node.name.startswith("read_"))
        if isinstance(node.returns, ast.Name) and node.returns.id == "Source"
    } - {"featstore.datasets.__init__:read_source"}
    assert adapters == set(DATASETS.values())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    assert "from __future__ import annotations" not in text
    for node in ast.walk(MODULES[module_name(path)]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{node.name} has {length} lines"
            positional = [
                arg.arg for arg in [*node.args.posonlyargs, *node.args.args] if arg.arg not in ("self", "cls")
            ]
            assert len(positional) <= 6, f"{node.name} has {len(positional)} positional arguments"


# --- what is loaded


def loaded(code: str, **environment: str) -> set[str]:
    """Top-level modules in `sys.modules` after running `code` in a fresh interpreter."""
    program = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
    program += "print('\\n', *sorted({name.split('.')[0] for name in sys.modules}), file=sys.__stderr__)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


LIGHT = (
    [
        "featstore",
        "featstore.errors",
        "featstore.files",
        "featstore.records",
        "featstore.configs",
        "featstore.datasets",
    ]
    + ["probes", "probes.configs", "cli.main", "cli.flags", "cli.extract", "cli.operations", "cli.probing"]
    + [
        "cli.running",
        "cli.plan",
        "cli.fewshot",
        "cli.comparing",
        "cli.finetune",
        "cli.heads",
        "cli.suite",
        "probes.fewshot_config",
        "probes.finetune_config",
    ]
)


def test_light_modules() -> None:
    found = loaded(f"import {', '.join(LIGHT)}")
    assert found >= {"featstore", "probes", "cli"}
    assert found.isdisjoint(HEAVY)


@pytest.mark.parametrize("command", ["featstore", "probes"])
def test_help_loads_nothing_heavy(command: str) -> None:
    found = loaded(f"import runpy; sys.argv = ['x', '--help']; runpy.run_module('{command}', run_name='__main__')")
    assert "typer" in found
    assert found.isdisjoint({*HEAVY, "numpy"})


@pytest.mark.parametrize("arguments", [["ls"], ["info", "x/m"]])
def test_listing_does_not_load_torch(arguments: list[str], filled_store: Path) -> None:
    code = f"import cli.main; sys.argv = ['featstore', *{arguments}]; cli.main.featstore()"
    found = loaded(code, FEATSTORE_HOME=str(filled_store))
    assert "pyarrow" in found
    assert found.isdisjoint({"torch", "transformers", "sklearn", "zarr", "faiss"})


@pytest.fixture(scope="module")
def filled_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np

    from featstore.store.importer import import_features

    folder = tmp_path_factory.mktemp("filled")
    np.savez(folder / "f.npz", features=np.ones((3, 2), np.float32), id=np.array(["a", "b", "c"]))
    import_features(folder / "store", folder / "f.npz", dataset="x", model="m")
    return folder / "store"


def cpu_seconds(*arguments: str) -> float:
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("package", ["featstore", "probes"])
def test_help_is_quick(package: str) -> None:
    # CPU time, since other work on the machine stretches the clock. The best of some runs counts: the first may
    # compile bytecode, and a shared core is a slow one.
    runs: list[float] = []
    while len(runs) < 6 and min(runs, default=1.0) >= 0.4:
        runs.append(cpu_seconds("-m", package, "--help"))
    assert min(runs) < 0.4, runs
