"""The very recipe files, run without Slurm: what stands in PATH as srun, scontrol and apptainer notes its calls."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pictures import register_pictures, tree_bytes

from cli import main

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
SBATCH = sorted(RECIPES.glob("*.sbatch"))
ARGUMENTS = ["--dataset", "pics", "--model", "tiny", "--res", "42", "--block-rows", "4", "--batch-size", "4"]
BIN = Path(sys.executable).parent

FAKES = {
    # Options with their values in one word, then the command.
    "srun": 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": 'if [ "$1" = show ]; then printf "localhost\\nother\\n"; fi\n',
    "apptainer": 'while [ "$1" != image.sif ]; do shift; done\nshift\nexec "$@"\n',
    # Names its process, and lives until a signal, or ends with a status.
    "featstore": """echo $$ > "$CALLS.pid"
trap 'exit 75' USR1
trap 'exit 143' TERM
[ -n "$STATUS" ] && exit "$STATUS"
: > "$CALLS.up"
while :; do sleep 0.02; done
""",
    "torchrun": 'while [ "$1" != bash ]; do shift; done\nexec "$@"\n',
}


class Cluster:
    """A folder of programs before all others in PATH, and what was called."""

    def __init__(self, folder: Path, *programs: str):
        self.folder = folder
        self.log = folder / "calls"
        (folder / "bin").mkdir()
        for name in programs:
            path = folder / "bin" / name
            path.write_text(f'#!/bin/bash\necho {name} "$@" >> "$CALLS"\n{FAKES[name]}')
            path.chmod(0o755)

    def start(self, recipe: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
        for left in self.folder.glob("calls.*"):
            left.unlink()
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{BIN}:{os.environ['PATH']}",
            "CALLS": str(self.log),
            "USER": "me",
            "OMP_NUM_THREADS": "1",
            "FEATSTORE_HOME": str(self.folder / "store"),
            "SLURM_TMPDIR": str(self.folder / "local"),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NNODES": "1",
            "IMAGE": "image.sif",
            **array(0, 1),
            **variables,
        }
        return subprocess.Popen(
            ["bash", str(RECIPES / recipe), *arguments],
            env=environment,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, recipe: str, *arguments: str, **variables: str) -> tuple[int, str]:
        process = self.start(recipe, *arguments, **variables)
        output = process.communicate(timeout=300)[0]
        return process.returncode, output

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


def array(task: int, count: int, first: int = 0) -> dict[str, str]:
    """What Slurm tells one task of an array without gaps."""
    return of_array(first + task, list(range(first, first + count)))


def of_array(number: int, numbers: list[int]) -> dict[str, str]:
    """What Slurm tells the task of one of these numbers."""
    return {
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_ARRAY_TASK_MIN": str(min(numbers)),
        "SLURM_ARRAY_TASK_MAX": str(max(numbers)),
        "SLURM_ARRAY_TASK_COUNT": str(len(numbers)),
    }


def wait_for(found: object, what: str = "") -> None:
    end = time.monotonic() + 120
    while not found():  # type: ignore[operator]
        assert time.monotonic() < end, what
        time.sleep(0.02)


# --- the shell's part


@pytest.fixture
def faked(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, *FAKES)


@pytest.mark.parametrize("recipe", SBATCH, ids=lambda path: path.stem)
def test_every_recipe_asks_slurm_for_its_signal(recipe: Path) -> None:
    text = recipe.read_text()
    assert text.startswith("#!/bin/bash\n")
    options = re.findall(r"^#SBATCH (--\S+)", text, re.MULTILINE)
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append", "--time=04:00:00"} <= set(options)
    header = text[: text.index("budget=")]
    assert all(line.startswith("#") or not line for line in header.splitlines()), "Slurm stops reading at a command"
    assert subprocess.run(["bash", "-n", str(recipe)], capture_output=True).stderr == b""


@pytest.mark.parametrize("recipe", SBATCH, ids=lambda path: path.stem)
def test_commands_parse_as_typed(faked: Cluster, recipe: Path) -> None:
    import typer

    assert faked.run(recipe.name, *ARGUMENTS, STATUS="0")[0] == 0
    call = next(call for call in faked.calls if call.startswith("featstore extract --dataset"))
    app = typer.main.get_command(main._store_app())
    found = app.commands["extract"].make_context("extract", call.split()[2:])  # type: ignore[attr-defined]
    assert found.params["time_budget"] == "3h50m"
    assert str(found.params["stage"]) == str(faked.folder / "local" / "featstore-me")
    assert "requeue" not in " ".join(faked.calls)


@pytest.mark.parametrize(("first", "task", "rank"), [(0, 0, 0), (0, 2, 2), (1, 0, 0), (5, 2, 2)])
def test_an_array_may_begin_with_any_number(faked: Cluster, first: int, task: int, rank: int) -> None:
    for recipe in ("array.sbatch", "apptainer.sbatch"):
        faked.run(recipe, STATUS="0", **array(task, 3, first))
        assert f"--rank {rank} --world 3" in faked.calls[-1]


@pytest.mark.parametrize("numbers", [[3, 7, 9], list(range(0, 32, 4))], ids=["3,7,9", "0-31:4"])
def test_an_array_may_have_gaps(faked: Cluster, numbers: list[int]) -> None:
    from featstore.extraction.distributed import find_ranks

    for recipe in ("array.sbatch", "apptainer.sbatch"):
        ranks = []
        for number in (numbers[0], numbers[1], numbers[-1]):
            assert faked.run(recipe, STATUS="0", **of_array(number, numbers))[0] == 0
            found = re.search(r"--rank (\d+) --world (\d+)", faked.calls[-1])
            assert found is not None
            ranks.append(find_ranks(int(found[1]), int(found[2]), {}))
        assert [item.rank for item in ranks] == [0, numbers[1] - numbers[0], numbers[-1] - numbers[0]]
        assert {item.world for item in ranks} == {numbers[-1] - numbers[0] + 1}


@pytest.mark.parametrize("recipe", SBATCH, ids=lambda path: path.stem)
@pytest.mark.parametrize(("status", "again"), [("0", False), ("2", False), ("75", True)])
def test_the_exit_status_decides_on_the_requeue(faked: Cluster, recipe: Path, status: str, again: bool) -> None:
    code, output = faked.run(recipe.name, STATUS=status, SLURM_RESTART_COUNT="3")
    assert code == int(status)
    assert ("scontrol requeue 4711" in faked.calls) == again
    assert ("requeued after turn 3" in output) == again
    assert not list(faked.folder.glob(".featstore-requeue*"))


@pytest.mark.parametrize("recipe", ["array.sbatch", "apptainer.sbatch"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143)])
def test_signals_reach_the_command(faked: Cluster, recipe: str, number: int, code: int) -> None:
    process = faked.start(recipe)
    wait_for((faked.folder / "calls.up").exists)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert ("scontrol requeue 4711" in faked.calls) == (code == 75)
    with pytest.raises(ProcessLookupError):
        os.kill(int((faked.folder / "calls.pid").read_text()), 0)


def test_a_signal_before_the_command_listens_is_a_requeue(faked: Cluster) -> None:
    path = faked.folder / "bin" / "featstore"
    path.write_text('#!/bin/bash\n: > "$CALLS.up"\nexec sleep 30\n')
    process = faked.start("array.sbatch")
    wait_for((faked.folder / "calls.up").exists)
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert (process.returncode, faked.calls) == (138, ["scontrol requeue 4711"])


def test_the_container_gets_what_it_needs(faked: Cluster) -> None:
    faked.run("apptainer.sbatch", "--dataset", "x", STATUS="0", HF_HOME="/hub", BIND="/data:/data:ro")
    call = next(call for call in faked.calls if call.startswith("apptainer"))
    stage = faked.folder / "local" / "featstore-me"
    assert stage.is_dir()
    store = faked.folder / "store"
    assert call.startswith(
        f"apptainer exec --nv --cleanenv --env FEATSTORE_HOME={store} --bind {store},{stage},/hub,/data:/data:ro "
        "--env HF_HOME=/hub image.sif featstore extract --dataset x"
    )


def test_the_definition_installs_what_the_package_is_made_of() -> None:
    text = (RECIPES / "featstore.def").read_text()
    sections = re.findall(r"^%(\w+)", text, re.MULTILINE)
    assert sections == ["files", "post", "environment", "runscript", "test"]
    copied = re.findall(r"^    (\S+) /opt/featstore/$", text, re.MULTILINE)
    assert all((ROOT / name).exists() for name in copied)
    extras = re.search(r"/opt/featstore\[([a-z,]+)\]", text)
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras[1].split(","))


# --- with the real command


@pytest.fixture
def store(tmp_path: Path) -> Path:
    register_pictures(tmp_path / "store", tmp_path / "data", 42)
    return tmp_path / "store"


def of_one_process(store: Path, tmp_path: Path) -> dict[str, bytes]:
    """The set as one process without any recipe makes it."""
    other = tmp_path / "other"
    shutil.copytree(store, other)
    subprocess.run(
        [sys.executable, "-m", "featstore", "extract", *ARGUMENTS, "--store", str(other)],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return tree_bytes(the_set(other))


def the_set(store: Path) -> Path:
    (folder,) = (store / "sets" / "pics").glob("*@42-*")
    return folder


def num_committed(store: Path) -> int:
    return len(list((store / "sets" / "pics").glob("*@42-*/commits/*/*.json")))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["array.sbatch", "apptainer.sbatch"])
def test_an_array_in_any_order_gives_the_same_bytes(store: Path, tmp_path: Path, recipe: str) -> None:
    cluster = Cluster(tmp_path, "scontrol", "apptainer")
    tasks = [0, 1, 2]
    random.Random(recipe).shuffle(tasks)
    for task in tasks:
        code, output = cluster.run(recipe, *ARGUMENTS, **array(task, 3))
        assert code == 0, output
    assert tree_bytes(the_set(store)) == of_one_process(store, tmp_path)
    assert not cluster.log.exists() or not any(call.startswith("scontrol") for call in cluster.calls)
    assert list((tmp_path / "local").rglob("*.safetensors")), "weights are read from the local disk"


@pytest.mark.slow
def test_torchrun_gives_the_same_bytes(store: Path, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "srun", "scontrol")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    code, output = cluster.run("torchrun.sbatch", *ARGUMENTS, SLURM_GPUS_ON_NODE="2", RDZV_PORT=str(port))
    assert code == 0, output
    assert any("torchrun --nnodes 1 --nproc-per-node 2 --rdzv-backend c10d" in call for call in cluster.calls)
    assert tree_bytes(the_set(store)) == of_one_process(store, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["array.sbatch", "torchrun.sbatch"])
def test_a_signal_in_mid_run_is_a_requeue_and_the_next_turn_finishes(store: Path, tmp_path: Path, recipe: str) -> None:
    cluster = Cluster(tmp_path, "srun", "scontrol")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        variables = {"RDZV_PORT": str(found.getsockname()[1]), "SLURM_GPUS_ON_NODE": "2"}
    (tmp_path / "lab.py").write_text(SLOW)
    arguments = [*ARGUMENTS, "--model", "lab:slow"]
    variables["PYTHONPATH"] = str(tmp_path)
    process = cluster.start(recipe, *arguments, **variables)
    wait_for(lambda: num_committed(store) >= 2 or process.poll() is not None)
    sent = time.monotonic()
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert "scontrol requeue 4711" in cluster.calls
    assert time.monotonic() - sent < 30
    assert num_committed(store) < 11
    assert not list(the_set(store).glob("attempts/*/*"))
    code, output = cluster.run(recipe, *arguments, **variables)
    assert code == 0, output
    assert num_committed(store) == 11
    assert cluster.calls.count("scontrol requeue 4711") == 1


SLOW = """
import time
from featstore.backbones import describe

class Slow:
    def __init__(self, inner):
        self.inner = inner
        self.architecture, self.device, self.dtype = inner.architecture, inner.device, inner.dtype
        self.weights_digest = "slow"

    def __call__(self, pixels, *, layers=()):
        time.sleep(0.5)
        return self.inner(pixels, layers=layers)

def slow(device, compute_dtype, attention):
    return Slow(describe("tiny").load(device=device, compute_dtype=compute_dtype, attention=attention))
"""
