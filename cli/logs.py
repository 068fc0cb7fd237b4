"""`--log-json`: progress, stage rates and results of a pass, one JSON object a line."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.errors import StoreError

if TYPE_CHECKING:
    from featstore.extraction.distributed import Ranks
    from featstore.extraction.passes import Pass
    from featstore.extraction.plan import Plan
    from featstore.extraction.sharing import Sharing

SHOWN = 5.0  # seconds between two lines


class PassLog:
    """Lines of JSON about one pass."""

    def __init__(self, write: Callable[[dict[str, Any]], None], total: int) -> None:
        self._write, self._total = write, total
        self._done = self._failed = 0
        self._started = time.monotonic()
        self._shown = 0.0
        self._facts: Callable[[], dict[str, Any]] = dict

    def watch(self, work: "Pass", sharing: "Sharing") -> None:
        """What lines say beside counts from now on."""
        self._started = time.monotonic()
        self._facts = lambda: {
            "units": len(work.units),
            "taken_over": sharing.taken_over,
            "stages": work.stages.facts(),
        }

    def advance(self, images: int, failed: int) -> None:
        """Count images, and write a line now and then."""
        from featstore import records

        self._done, self._failed = self._done + images, self._failed + failed
        now = time.monotonic()
        if now - self._shown < SHOWN and self._done < self._total:
            return
        self._shown = now
        rate = self._done / max(now - self._started, 1e-9)
        self._write(
            {
                "event": "progress",
                "done": self._done,
                "total": self._total,
                "failed": self._failed,
                "images_per_second": round(rate, 3),
                "eta_seconds": round(max(0, self._total - self._done) / rate, 1) if rate else None,
                "peak_memory_bytes": records.peak_memory_bytes(),
                **self._facts(),
            }
        )

    def result(self, found: dict[str, Any]) -> None:
        """The end of one set."""
        self._write({"event": "result", **found})


@contextmanager
def pass_log(path: Path | None, plans: "list[Plan]", ranks: "Ranks", total: int) -> Iterator[PassLog]:
    """The log of --log-json; each line is written at once, so that several processes may share the file.

    Raises:
        StoreError: it cannot be written.
    """
    from featstore import records

    names = [plan.name for plan in plans]
    with _opened(path) as file:

        def write(facts: dict[str, Any]) -> None:
            if file is not None:
                line = {"time": records.utc_now(), "sets": names, "rank": ranks.rank, "world": ranks.world, **facts}
                with _writable(path):
                    file.write(json.dumps(line, default=str).encode() + b"\n")

        write({"event": "start", "total": total})
        try:
            yield PassLog(write, total)
        except BaseException as error:
            write({"event": "error", "error": f"{type(error).__name__}: {error}"})
            raise


@contextmanager
def _writable(path: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"--log-json {path}: {error.strerror}; name a file that can be written") from error


@contextmanager
def _opened(path: Path | None) -> Iterator[FileIO | None]:
    with ExitStack() as stack:
        file = None
        if path is not None:
            with _writable(path):
                file = stack.enter_context(open(path, "ab", buffering=0))
        yield file
