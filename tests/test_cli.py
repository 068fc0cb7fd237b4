"""The commands as a user types them: what they print, their exit codes, and ten ways to use them wrongly."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import CONFIG, register_pictures
from typer.testing import CliRunner

from cli import main
from featstore.configs import RunConfig
from featstore.errors import DeviceError, StoreError
from featstore.register import register
from featstore.store.catalog import Store

ROOT = Path(__file__).resolve().parent.parent


def run(program: str, *arguments: str, store: Path, code: int = 0) -> str:
    """Run a command in this process; returns stdout (and stderr where it fails as expected)."""
    app = main._store_app() if program == "featstore" else main._probe_app()
    done = CliRunner().invoke(
        app, list(arguments), env={"FEATSTORE_HOME": str(store), "COLUMNS": "200"}, catch_exceptions=False
    )
    assert done.exit_code == code, done.output
    return str(done.stdout if code == 0 else done.output)


def run_process(program: str, *arguments: str, store: Path, code: int = 0) -> str:
    """The same in a process of its own, as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", program, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "FEATSTORE_HOME": str(store), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with 80 registered pictures and a tiny set of them."""
    root = tmp_path_factory.mktemp("cli")
    register_pictures(root / "store", root / "data", 80)
    asked = ("extract", "--dataset", "pics", "--model", "tiny", "--res", "42")
    output = run_process("featstore", *asked, store=root / "store")
    assert output.splitlines()[0] == f"store {root / 'store'}"
    assert "80 of 80 samples to do" in output
    assert "80 computed" in output
    return root / "store"


def test_second_extract_is_quick_and_does_nothing(store: Path) -> None:
    output = run("featstore", "extract", "--dataset", "pics", "--model", "tiny", "--res", "42", store=store)
    assert "complete: all 80 samples have cls, mean_patch; nothing to do" in output
    script = (
        "import sys; sys.argv = ['featstore', 'extract', '--dataset', 'pics', '--model', 'tiny', '--res', '42']\n"
        "from cli.main import featstore\n"
        "try: featstore()\n"
        "finally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "FEATSTORE_HOME": str(store)}
    )
    assert done.returncode == 0, done.stderr


def test_listing_commands_speak_json(store: Path) -> None:
    listing = json.loads(run("featstore", "ls", "--json", store=store))
    assert [row["set"] for row in listing["sets"]] == ["pics/tiny@42"]
    assert listing["datasets"][0]["samples"] == 80
    info = json.loads(run("featstore", "info", "pics/tiny@42", "--json", store=store))
    assert (info["ok"], info["failed"], info["pixels"]) == (80, 0, [42, 42])
    assert json.loads(run("featstore", "info", "pics", "--json", store=store))["columns"][0] == "id"
    assert [row["problems"] for row in json.loads(run("featstore", "verify", "--deep", "--json", store=store))] == [[]]
    models = json.loads(run("featstore", "models", "--json", store=store))
    assert {"dinov2-base-reg", "dinov3-7b", "tiny"} <= {row["model"] for row in models}
    assert set(json.loads(run("featstore", "datasets", "--json", store=store))) >= {
        "chexpert",
        "nih",
        "table",
        "folder",
    }
    assert json.loads(run("featstore", "explain", "pics/tiny@42", "--json", store=store))["model"] == "tiny"


def test_tables_for_people(store: Path) -> None:
    assert "pics/tiny@42" in run("featstore", "ls", store=store)
    assert "weights: embedded" in run("featstore", "info", "pics/tiny@42", store=store)
    assert "ok (1 blocks" in run("featstore", "verify", store=store)
    assert "facebook/dinov3-vit7b16-pretrain-lvd1689m" in run("featstore", "models", store=store)
    assert "train.csv" in run("featstore", "datasets", "chexpert", store=store)
    assert "fingerprint" in run("featstore", "explain", "pics/tiny@42", store=store)


def test_probes_rank_and_record(store: Path) -> None:
    output = run("probes", "knn", "--dataset", "pics", store=store)
    assert "tiny@42" in output
    assert "k 100, 200 left out: more than the 40 training rows" in output
    output = run("probes", "linear", "--dataset", "pics", "--labels", "first,second", "--features", "cls", store=store)
    assert "by label (test)" in output
    records = json.loads(run("probes", "results", "--json", store=store))
    assert {record["probe"] for record in records} == {"knn", "linear"}
    assert all(record["metrics"]["test"]["macro"]["auroc"] > 0.7 for record in records)
    assert all(Path(record["file"]).with_suffix(".parquet").is_file() for record in records)
    assert "val AUROC" in run("probes", "results", "--probe", "knn", store=store)


def test_python_api(store: Path) -> None:
    import featstore
    import probes

    features = featstore.open(store)["pics", "tiny@42"]
    assert features.cls[[5, 0, 5]].dtype == np.float16
    assert features.load("cls+mean_patch").shape == (80, 384)
    assert features.rows.num_rows == 80
    assert featstore.open(store).sets() == ["pics/tiny@42"]
    assert "pics/tiny@42" in features._repr_html_()
    task = probes.task(features, labels=["first", "second"])
    X, y, mask, groups, ids = task.arrays("train", features="cls")
    assert X.shape == (40, 192)
    assert y.shape == mask.shape == (40, 2)
    assert len(groups) == len(ids) == 40
    rows = task.index("test")
    perfect = task.evaluate(task.y[rows].astype(np.float64), resamples=50)
    assert perfect["macro"]["auroc"] == 1.0


def test_explain_and_rm(store: Path) -> None:
    run("featstore", "extract", "--dataset", "pics", "--model", "tiny-random", "--res", "42", store=store)
    assert "RANDOM" in run("featstore", "ls", store=store)
    assert "weights" in run("featstore", "explain", "pics/tiny@42", "pics/tiny-random@42", store=store)
    ranked = run("probes", "knn", "--dataset", "pics", store=store)
    assert "RANDOM WEIGHTS" in ranked
    assert "removed" in run("featstore", "rm", "pics/tiny-random@42", "--yes", store=store)
    assert Store(store).sets() == ["pics/tiny@42"]


def test_dry_run_writes_nothing(store: Path) -> None:
    before = sorted(store.rglob("*"))
    output = run(
        "featstore", "extract", "--model", "tiny", "--res", "98", "--tokens", "cls,patches", "--dry-run", store=store
    )
    assert re.search(r"80 of 80 samples to do: .* in 3 files, .* TFLOP, about", output)
    assert "dry run, nothing written" in output
    assert sorted(store.rglob("*")) == before


@pytest.mark.slow  # five processes
def test_one_data_set_that_cannot_be_measured_leaves_the_others_alone(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name in ("aaa", "pics", "zzz"):
        register_pictures(store, tmp_path / name, 4, name)
    for path in (tmp_path / "aaa/images").iterdir():
        path.write_bytes(b"broken")
    register(store, "aaa", tmp_path / "aaa", CONFIG)
    asked = ("--model", "tiny", "--res", "42", "--weight-dtype", "int8")
    error = r"error: 1 of 3 sets failed, the others are done: aaa/tiny@42: .*no image of aaa could be decoded: nothing"
    text = run("featstore", "extract", *asked, store=store, code=2)
    assert re.search(error, text)
    assert "pics/tiny@42: 4 computed" in text
    assert "zzz/tiny@42: 4 computed" in text
    assert "float16 (in float32, int8 weights)" in run("featstore", "ls", store=store)
    again = run("featstore", "extract", *asked, "--json", store=store, code=2)
    found = json.loads(again[again.index("[\n") : again.index("\n]") + 2])  # progress stands around it
    assert [(item["set"], "error" in item) for item in found] == [
        ("aaa/tiny@42", True),
        ("pics/tiny@42", False),
        ("zzz/tiny@42", False),
    ]
    alone = run("featstore", "extract", "--dataset", "aaa", *asked, store=store, code=2)
    assert re.search(r"error: float32 with int8 weights is compared .* no image of aaa could be decoded", alone)
    assert "sets failed" not in alone
    assert not (store / "sets/aaa").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("gone"), DeviceError("full"), StoreError("locked")])
def test_what_concerns_every_set_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    from cli import running

    calls: list[list[int]] = []

    def broken(runs: object, group: list[int]) -> dict[str, object]:
        calls.append(group)
        raise error

    monkeypatch.setattr(running._Runs, "_groups", lambda _: [[0], [1]])
    monkeypatch.setattr(running._Runs, "_pass", broken)
    with pytest.raises(type(error)):
        running.run_plans(["a", "b"], RunConfig(), quiet=True)  # type: ignore[list-item]
    assert calls == [[0]]


def test_probe_extracts_what_it_misses(store: Path) -> None:
    text = run_process("probes", "knn", "--dataset", "pics", "--model", "tiny@56", store=store, code=2)
    assert (
        "no set of 'pics' matches 'tiny@56'; it has pics/tiny@42; run\n"
        "  featstore extract --dataset pics --model tiny --res 56" in text
    )
    assert "tiny@56" in run("probes", "knn", "--dataset", "pics", "--model", "tiny@56", "--extract", store=store)


WRONG = [
    (("featstore", "extract", "--model", "dinov4"), r"unknown backbone 'dinov4'; did you mean"),
    (
        ("featstore", "extract", "--model", "dinov3-7b", "--res", "512"),
        r"no weights from facebook/dinov3-vit7b16.*--weights DIR",
    ),
    (("featstore", "extract", "--model", "tiny", "--dataset", "nope"), r"unknown data set 'nope'; registered: pics"),
    (("featstore", "extract", "--model", "tiny", "--res", "big"), r"big"),
    (("featstore", "extract", "--model", "tiny", "--block-rows", "100"), r"must be a power of two"),
    (
        ("featstore", "extract", "--model", "tiny", "--max-bytes", "1kB", "--res", "98"),
        r"more than --max-bytes 1kB; keep fewer --tokens",
    ),
    (("featstore", "extract", "--model", "tiny", "--device", "cuda:9", "--res", "98"), r"no CUDA device"),
    (("featstore", "register", "new", "no/such/folder"), r"no such folder"),
    (("featstore", "register", "new"), r"needs the folder of its images"),
    (("featstore", "info", "pics/other"), r"no set 'pics/other'.*pics/tiny@42"),
    (("featstore", "rm", "pics", "--yes"), r"still has \d sets"),
    (("featstore", "import", "no.npz", "--dataset", "x", "--name", "y"), r"no such file"),
    (
        ("probes", "linear", "--dataset", "pics", "--labels", "nothing"),
        r"has no column 'nothing'; its columns: id, path",
    ),
    (
        ("probes", "linear", "--dataset", "pics", "--task", "chexpert-6"),
        r"unknown task 'chexpert-6'; known: chexpert-5",
    ),
    (("probes", "linear", "--dataset", "pics", "--labels", "first,kind"), r"must be 0, 1, -1 or blank"),
    (("probes", "knn", "--dataset", "pics", "--k", "4000"), r"k=4000 neighbours asked of a bank with 40 rows"),
    (("probes", "knn", "--dataset", "pics", "--where", "kind=a"), r"no label has both classes in train"),
    (("probes", "knn", "--dataset", "pics", "--k", "2.5"), r"--k takes whole numbers, got '2.5'"),
    (("probes", "linear", "--dataset", "pics", "--C", "-1"), r"--C takes positive numbers"),
    (("probes", "knn", "--dataset", "pics", "--features", "patches"), r"has no 'patches'; it has cls, mean_patch"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments[1:5]) for arguments, _ in WRONG])
def test_wrong_usage_gives_one_clear_message(store: Path, arguments: tuple[str, ...], message: str) -> None:
    output = run(*arguments, store=store, code=2)
    assert re.search(message, output, re.DOTALL), output
    assert output.count("error:") == 1


def test_store_of_another_schema(store: Path, tmp_path: Path) -> None:
    from featstore import files

    (tmp_path / "store.json").write_bytes(files.sealed({"schema": 99, "format": "featstore"}))
    assert "schema 99" in run_process("featstore", "ls", store=tmp_path, code=2)


def test_root_that_moved(tmp_path: Path) -> None:
    register_pictures(tmp_path / "store", tmp_path / "data", 8)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    output = run("featstore", "extract", "--model", "tiny", store=tmp_path / "store", code=2)
    assert "is gone; if it moved, run `featstore register pics NEW_ROOT`" in output


def test_every_command_has_help() -> None:
    from cli import comparing, demo, extract, fewshot, finetune, heads, operations, plan, probing, suite

    for module in (extract, plan, operations, demo, probing, heads, suite, fewshot, finetune, comparing):
        for name, command in module.COMMANDS.items():
            assert command.__doc__, name
            assert len(command.__doc__.strip()) > 30, name
