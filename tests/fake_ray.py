"""What the driver uses of Ray, by threads of this process: its logic without the seconds that real workers take."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class DiedError(Exception):
    """The actor is dead."""


class OtherError(Exception):
    """Nothing raises it."""


ERRORS = SimpleNamespace(
    RayActorError=DiedError,
    WorkerCrashedError=OtherError,
    NodeDiedError=OtherError,
    OutOfMemoryError=OtherError,
    ObjectLostError=OtherError,
    RuntimeEnvSetupError=OtherError,
)

OPENING = threading.Lock()


@dataclass
class Method:
    handle: "Handle"
    name: str

    def options(self, **_: Any) -> "Method":
        return self

    def remote(self, *given: Any) -> "futures.Future[Any]":
        return self.handle.call(self.name, *given)


class Handle:
    """One actor. When it is killed calls under way fail, though what they do goes on: late, as on a lost machine."""

    def __init__(self, made: Any):
        self.made = made
        self.dead = False
        self.calls: list[futures.Future[Any]] = []
        self.lock = threading.Lock()

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)

    def call(self, name: str, *given: Any) -> "futures.Future[Any]":
        answer: futures.Future[Any] = futures.Future()
        if self.dead:
            answer.set_exception(DiedError("it was dead before"))
            return answer

        def work() -> None:
            try:
                # Networks are not loaded by several threads at once; real actors are processes.
                with OPENING if name == "open" else contextlib.nullcontext():
                    found = getattr(self.made, name)(*given)
            except BaseException as error:
                self._settle(answer, error, failed=True)
            else:
                self._settle(answer, found)

        self.calls.append(answer)
        threading.Thread(target=work, daemon=True).start()
        return answer

    def _settle(self, answer: "futures.Future[Any]", value: Any, *, failed: bool = False) -> None:
        with self.lock:
            if answer.done():
                return
            if failed:
                answer.set_exception(value)
            else:
                answer.set_result(value)

    def die(self) -> None:
        self.dead = True
        for call in self.calls:
            self._settle(call, DiedError("killed by the test"), failed=True)


@dataclass
class FakeRay:
    """A cluster; `actors` are all that were ever started, `started` is called with each."""

    cpus: int = 6
    actors: list[Handle] = field(default_factory=list)
    started: Callable[[Handle], None] = lambda _: None
    exceptions: Any = field(default_factory=lambda: ERRORS)

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)}

    def put(self, value: Any) -> Any:
        return value

    def get(self, call: "futures.Future[Any]") -> Any:
        return call.result()

    def wait(self, calls: "Sequence[futures.Future[Any]]", *, num_returns: int, timeout: float) -> tuple[Any, Any]:
        done, left = futures.wait(calls, timeout=timeout, return_when=futures.FIRST_COMPLETED)
        return [call for call in calls if call in done], left

    def remote(self, **_: Any) -> Any:
        def make(cls: type) -> Any:
            def start(*given: Any) -> Handle:
                handle = Handle(cls(*given))
                self.actors.append(handle)
                self.started(handle)
                return handle

            made = SimpleNamespace(remote=start)
            return SimpleNamespace(options=lambda **_: made)

        return make

    def kill(self, handle: Handle) -> None:
        handle.die()
        handle.made.sync([], [], "killed")
