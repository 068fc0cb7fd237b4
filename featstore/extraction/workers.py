"""Worker processes that decode: a codec that crashes or hangs costs its image, never the run.

Every worker is started afresh (never forked) and has a pipe of its own to one thread here, which hands it one image at
a time: no queue, lock or memory is shared, so the death of a worker, at whatever moment, leaves nothing locked. A
worker ends when its pipe closes, as it does when this process dies.
"""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from featstore.errors import FeatstoreError
from featstore.extraction.loader import Loaded, Sample, Several, load_images
from featstore.extraction.memory import FREE, Gate, Turn, decode_limit
from featstore.extraction.stages import Stage
from featstore.files import retry
from featstore.images import PreprocessSpec
from featstore.images.opening import OpenFiles
from featstore.inputs import Inputs
from featstore.store.commits import RowState

DECODE_SECONDS = 120.0  # for one image, reading it included
START_SECONDS = 120.0  # for a process to import what it needs, on a machine that is busy
TRIES = 2
EXIT_SECONDS = 20.0  # for a process that failed to come to its end
STARTS = 5  # of a process that signals end before it is ready
STEAL = 32  # samples of one file that must wait before a second worker opens that file too
CRASHED = "the decoder crashed"
# What a codec does to itself. Any other signal comes from outside, and says nothing about the image.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS}
_ORPHAN_SECONDS = 1.0  # between two looks of a worker whether its parent lives


@dataclass(slots=True)
class _Task:
    """One sample in some of the pool's preprocessings."""

    sample: Sample
    kinds: tuple[int, ...]
    future: "Future[Several]" = field(default_factory=Future)


class WorkerPool:
    """Decodes samples in `workers` processes; each keeps the files that it has open, see `OpenFiles`.

    Leaving the context ends the processes at once, whatever they are doing.
    """

    def __init__(
        self,
        inputs: Inputs,
        specs: PreprocessSpec | Sequence[PreprocessSpec],
        *,
        workers: int,
        decode_seconds: float = DECODE_SECONDS,
        clock: Stage | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._condition = threading.Condition()
        self._waiting: deque[_Task] = deque()
        self._closed = False
        self._clock = clock or Stage("decode")
        wanted = (specs,) if isinstance(specs, PreprocessSpec) else tuple(specs)
        gate = Gate(decode_limit()) if gate is None else gate
        self._workers = [_Worker(inputs, wanted, decode_seconds, gate) for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), name="decode", daemon=True) for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._closed = True
            self._waiting.clear()
            self._condition.notify_all()
        for worker in self._workers:
            worker.close()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.end()

    @property
    def pids(self) -> list[int]:
        """Processes that are running."""
        return [process.pid for worker in self._workers if (process := worker.process) is not None]

    @property
    def notes(self) -> list[str]:
        """What workers have to say about files that they could not copy."""
        return sorted({worker.note for worker in self._workers if worker.note is not None})

    def submit(self, sample: Sample, kinds: tuple[int, ...] = (0,)) -> "Future[Several]":
        """`load_images` of a sample in some preprocessings, in a worker; the future raises what that raises."""
        task = _Task(sample, kinds)
        with self._condition:
            self._waiting.append(task)
            self._condition.notify_all()
        return task.future

    def load(self, sample: Sample) -> Loaded:
        """`submit` in the first preprocessing, waited for."""
        images, state = self.submit(sample).result()
        return (images[0] if images else None), state

    def _serve(self, worker: "_Worker") -> None:
        while (task := self._take(worker)) is not None:
            started = time.perf_counter()
            try:
                found = worker.load(task.sample, task.kinds)
                self._clock.add(time.perf_counter() - started, 1)
                task.future.set_result(found)
            except BaseException as error:  # whatever it is, it belongs to who waits for the image
                task.future.set_exception(error)

    def _take(self, worker: "_Worker") -> _Task | None:
        """The next sample for a worker, of the file it has open if there is one; None when the pool is closed."""
        with self._condition:
            while not self._closed:
                chosen = self._choose(worker)
                if chosen is not None:
                    task = self._waiting[chosen]
                    del self._waiting[chosen]
                    worker.path = task.sample.path if task.sample.part else None
                    return task
                self._condition.wait()
            return None

    def _choose(self, worker: "_Worker") -> int | None:
        elsewhere = {other.path for other in self._workers if other is not worker} - {None, worker.path}
        counts: dict[str, int] = {}
        free: int | None = None
        for position, task in enumerate(self._waiting):
            sample = task.sample
            if sample.part and sample.path == worker.path:
                return position
            if not sample.part or sample.path not in elsewhere:
                free = position if free is None else free
            else:
                counts[sample.path] = counts.get(sample.path, 0) + 1
        if free is not None:
            return free
        many = {path for path, count in counts.items() if count >= STEAL}
        return next((at for at, task in enumerate(self._waiting) if task.sample.path in many), None)


class _Worker:
    """One process, replaced when it ends; used by one thread."""

    def __init__(self, inputs: Inputs, specs: tuple[PreprocessSpec, ...], decode_seconds: float, gate: Gate) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.path: str | None = None
        self.note: str | None = None
        self._inputs, self._specs, self._seconds = inputs, specs, decode_seconds
        self._gate = gate
        self._pipe: Connection | None = None
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """End the process, and start none any more; the thread that waits for it sees the pipe close."""
        with self._lock:
            self._closed = True
            if self.process is not None:
                self.process.kill()

    def load(self, sample: Sample, kinds: tuple[int, ...]) -> Several:
        """The sample's image in some preprocessings; one that ends the process is tried once more.

        Raises:
            FeatstoreError: the process was ended from outside, as the system does when memory runs out, twice.
        """
        crashes = 0
        signals: list[int] = []
        while crashes < TRIES:
            try:
                pipe = self._running()
                pipe.send((sample, kinds))
                found = self._reply(pipe)
                if found is not None:
                    return found
                self.end()
                return [], RowState(self._content(sample), f"decoding took more than {self._seconds:g} s")
            except (EOFError, ConnectionError):
                code = self.end(EXIT_SECONDS)
                if code is None or not _from_outside(code):
                    crashes += 1
                    continue
                signals.append(-code)
                if len(signals) == TRIES and not self._closed:
                    raise FeatstoreError(f"a worker process was {_ended(code)}; what is committed stays") from None
        return [], RowState(self._content(sample), CRASHED)

    def _reply(self, pipe: Connection) -> Several | None:
        """What the process made of an image, None where it takes too long; it may ask for memory first.

        Raises:
            FeatstoreError: the loader was closed while it waited for that.
        """
        with Turn(self._gate) as turn:
            while pipe.poll(self._seconds):
                message = pipe.recv()
                if not isinstance(message, int):
                    return self._receive(pipe, *message)
                turn.take(message)
                pipe.send(True)
            return None

    def _receive(self, pipe: Connection, found: Any, forms: list[tuple[Any, str]], note: str | None) -> Several:
        self.note = note
        if isinstance(found, BaseException):
            raise found
        images = []
        for shape, dtype in forms:
            image: np.ndarray = np.empty(shape, dtype)
            pipe.recv_bytes_into(image.reshape(-1).view(np.uint8).data)
            images.append(image)
        return images, found

    def _content(self, sample: Sample) -> str:
        return retry(lambda: self._inputs.hash(sample.path))

    def _running(self) -> Connection:
        """The pipe of a process that is ready.

        Raises:
            FeatstoreError: none can be started.
        """
        if self.process is not None and self.process.poll() is None and self._pipe is not None:
            return self._pipe
        for _ in range(STARTS):
            pipe, code = self._begin()
            if pipe is not None:
                return pipe
            if code is None or code >= 0:
                break  # its own doing, and not a signal that hit it by chance
        if code is not None and code < 0:
            raise FeatstoreError(f"a worker process did not start: {_ended(code)}")
        raise FeatstoreError(
            "a worker process did not start "
            f"({'it took too long' if code is None else f'exit status {code}'}); its message stands above; "
            "use --worker-type thread"
        )

    def _begin(self) -> tuple[Connection | None, int | None]:
        """(pipe of a new process that is ready, None), or (None, exit status)."""
        self.end()
        with self._lock:
            if self._closed:
                raise FeatstoreError("the worker processes are closed")
            here, there = Pipe()
            try:
                self.process, self._pipe = _start(there), here
            finally:
                there.close()
        try:
            here.send((self._inputs, self._specs, self._seconds))
            if here.poll(START_SECONDS) and here.recv() == "ready":
                return here, None
            self.end()
            return None, None
        except (EOFError, ConnectionError):
            return None, self.end(EXIT_SECONDS)

    def end(self, grace: float = 0.0) -> int | None:
        """End the process if there is one.

        One whose pipe closed by itself is about to end, and its own status says why: it is given `grace` seconds, and
        that status is returned; None where it had to be ended.
        """
        with self._lock:
            process, pipe = self.process, self._pipe
            self.process = self._pipe = None
        if pipe is not None:
            pipe.close()
        if process is None:
            return None
        if grace:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=grace)
        process.kill()
        process.wait()
        return None


def _from_outside(code: int) -> bool:
    """Whether an exit status is that of a process which a signal of somebody else ended."""
    return code < 0 and -code not in CRASHES


def _ended(code: int) -> str:
    return f"ended by signal {-code}, as when memory runs out; use fewer --workers"


def _start(pipe: Connection) -> "subprocess.Popen[bytes]":
    # Not by multiprocessing: that runs the caller's main module again, which a script without a guard does not survive.
    number = pipe.fileno()
    os.set_inheritable(number, True)
    paths = os.pathsep.join(path for path in sys.path if path)
    single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "featstore.extraction.workers", str(number)],
        stdin=subprocess.DEVNULL,
        pass_fds=(number,),
        env={**os.environ, **single, "PYTHONPATH": paths},
        process_group=0,  # Ctrl-C is for the process that started it
    )


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_ORPHAN_SECONDS)
    os._exit(1)


class _Asking:
    """The gate of the process that this one works for; waiting there is no time of decoding."""

    def __init__(self, pipe: Connection, watch: Callable[[], None]):
        self._pipe = pipe
        self._watch = watch

    def take(self, need: int) -> None:
        """Wait until so many bytes may be taken."""
        if need <= FREE:
            return
        faulthandler.cancel_dump_traceback_later()
        try:
            self._pipe.send(need)
            self._pipe.recv()
        except (EOFError, ConnectionError):
            raise SystemExit(1) from None  # nobody is there any more
        self._watch()

    def give(self, need: int) -> None:
        """Seen over there by the answer."""


def serve(pipe: Connection) -> None:
    """What a worker process does until its pipe closes."""
    inputs, specs, seconds = pipe.recv()
    # What decoding imports, before the first image: the time of that one is limited too.
    import pyarrow  # noqa: F401
    import torch

    import featstore.images.raster
    import featstore.images.resize  # noqa: F401

    torch.set_num_threads(1)
    pipe.send("ready")
    opened = OpenFiles()
    with open(os.devnull, "w") as nowhere:
        # Ends this process even where a decoder holds the interpreter and its parent is gone.
        watch = partial(faulthandler.dump_traceback_later, seconds + 10, exit=True, file=nowhere)
        gate = _Asking(pipe, watch)
        while True:
            try:
                sample, kinds = pipe.recv()
            except (EOFError, ConnectionError):
                return
            watch()
            images: list[np.ndarray] = []
            reply: Any
            try:
                images, reply = load_images(inputs, opened, sample, [specs[kind] for kind in kinds], gate)
            except (FeatstoreError, OSError, MemoryError) as error:
                reply = error
            except Exception as error:  # a mistake of ours: it stops the run over there
                reply = RuntimeError(f"{type(error).__name__} while decoding {sample.path}: {error}")
            faulthandler.cancel_dump_traceback_later()
            pipe.send((reply, [(image.shape, image.dtype.str) for image in images], inputs.staging_note()))
            for image in images:
                pipe.send_bytes(np.ascontiguousarray(image).reshape(-1).view(np.uint8).data)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # schedulers signal all processes of a job
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    os.dup2(2, 1)  # what libraries print is no result
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
