"""The commands in real processes that need not import anything: forked by a small server that did so once.

As a script it is the server: a line of JSON names the arguments, where the output goes, and a place at which the
process sends itself a signal (the n-th call of a function), so that a kill hits the same moment on any machine.
"""

import atexit
import faulthandler
import functools
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = {
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "COLUMNS": "200",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # a thread that no fork should meet
}  # fmt: skip
PATIENCE = 120.0  # seconds until a process is given up
HUNG = PATIENCE - 10
WAIT = 1.05  # seconds; longer than the smallest time budget
# What the command imports on its way.
IMPORTED = (
    "cli.extract",
    "cli.running",
    "featstore.extraction.single",
    "cli.finetune",
    "probes.finetune",
    "probes.finetune_table",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
)


class At(NamedTuple):
    """The `call`-th call of `function` in `module`, where the process sends itself a signal (0: waits for a while)."""

    module: str
    function: str
    call: int
    number: int = signal.SIGKILL


class Ended(NamedTuple):
    """Exit status as `subprocess` has it, and what was printed."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        assert self.code == 0, self.out + self.err
        found: list[dict[str, Any]] = json.loads(self.out)
        return found


class Child:
    """One forked process."""

    def __init__(self, server: "Commands", pid: int, folder: Path) -> None:
        self.pid = pid
        self._server, self._folder = server, folder

    def poll(self) -> int | None:
        return self._server.ask({"poll": self.pid})["code"]

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    @property
    def err(self) -> str:
        return (self._folder / "err").read_text()

    def end(self, seconds: float = PATIENCE) -> Ended:
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no end within {seconds:g} s; it had said: {self.err}")
            time.sleep(0.01)
        return Ended(code, (self._folder / "out").read_text(), self.err)


class Commands:
    """The server, and what it forked; `folder` takes the output."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **ALWAYS, "PYTHONPATH": str(ROOT)},
        )

    def ask(self, question: dict[str, Any], seconds: float = PATIENCE) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        assert select.select([self._process.stdout], [], [], seconds)[0], "the server does not answer"
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(
        self,
        given: list[str],
        *,
        program: str = "probes",
        at: At | None = None,
        environment: dict[str, str] | None = None,
    ) -> Child:
        self._number += 1
        place = self._folder / f"output-{self._number}"
        place.mkdir(parents=True)
        question = {
            "program": program,
            "arguments": given,
            "place": str(place),
            "at": at,
            "environment": environment or {},
        }
        return Child(self, self.ask(question)["pid"], place)

    def run(self, given: list[str], *, at: At | None = None) -> Ended:
        return self.start(given, at=at).end()

    def team(self, given: list[str], world: int, *, at: dict[int, At] | None = None) -> list[Child]:
        """Processes that believe that torchrun started them; `at` by rank."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        children = []
        for rank in range(world):
            numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
            environment = {name: str(number) for name, number in numbers.items()}
            environment |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            children.append(self.start(given, at=(at or {}).get(rank), environment=environment))
        return children

    def close(self) -> None:
        """End the server and what still runs."""
        self._process.communicate(timeout=60)


@functools.cache
def shared() -> Commands:
    """One server for all modules of tests, until the end of them."""
    folder = tempfile.TemporaryDirectory()
    server = Commands(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(server.close)
    return server


# The server


def _arm(at: At) -> None:
    """Send this process a signal at a call of a function."""
    place: Any = importlib.import_module(at.module)
    *owners, name = at.function.split(".")
    for owner in owners:
        place = getattr(place, owner)
    real, calls = getattr(place, name), []

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == at.call:
            if at.number:
                os.kill(os.getpid(), at.number)
            else:
                time.sleep(WAIT)
        return real(*given, **options)

    setattr(place, name, counted)


def _command(question: dict[str, Any]) -> None:
    """Be the command in a forked process."""
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(question["environment"])
        place = Path(question["place"])
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.dump_traceback_later(HUNG, file=2)  # where it stands is said before a test gives it up
        if question["at"] is not None:
            _arm(At(*question["at"]))
        sys.argv = [question["program"], *question["arguments"]]
        main = importlib.import_module("cli.main")
        try:
            getattr(main, question["program"])()
        except SystemExit as ended:
            code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for pytest
    for name in IMPORTED:
        importlib.import_module(name)
    ended: dict[int, int] = {}
    living: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if (pid := question.get("poll")) is not None:
            if pid in living:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    living.remove(pid)
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = {"code": ended.get(pid)}
        else:
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _command(question)
            living.add(pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid in living:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # unloading all that was imported takes seconds


if __name__ == "__main__":
    _serve()
