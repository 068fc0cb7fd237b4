"""What people see: sizes, tables, progress. Results go to stdout, the rest to stderr."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class Advance(Protocol):
    """Called with the images just done and how many of them failed; `note` says something more at the line's end."""

    def __call__(self, images: int, failed: int = 0) -> None: ...

    def note(self, text: str) -> None: ...


def size(num_bytes: float) -> str:
    """Decimal units with three digits: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(num_bytes) < 1000 or unit == "TB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable: TB ends the loop")


def duration(seconds: float) -> str:
    """Seconds as 12 s, 3 min 20 s, 2 h 5 min or 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def emit_json(value: Any) -> None:
    """One JSON document on stdout; NaN, which JSON lacks, becomes null."""
    print(json.dumps(_clean(value), indent=2, ensure_ascii=False, default=str))


def _clean(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value


def table(
    title: str, columns: list[str], rows: list[list[str]], *, right: tuple[str, ...] = (), rule: int | None = None
) -> None:
    """A rich table on stdout, as wide as it needs to be when nobody looks at a screen; a line above row `rule`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made: Table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for number, row in enumerate(rows):
        if number and number == rule:
            made.add_section()
        made.add_row(*row)
    console = Console(soft_wrap=False) if sys.stdout.isatty() else Console(width=200)
    console.print(made)


def some(names: Sequence[str], most: int) -> str:
    """Names in a line; of more than `most` the first ones and the count."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def say(text: str) -> None:
    """A line of the conversation, not of the result."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, unit: str = "images") -> Iterator[Advance]:
    """A live line with rate and ETA on a terminal; a plain line every few seconds elsewhere."""
    if sys.stderr.isatty():
        with _bar(label, total, unit) as advance:
            yield advance
    else:
        yield _Lines(label, total, unit)


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[bad]}"),
        TextColumn("{task.fields[stages]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as bar:
        task = bar.add_task(label, total=total, rate="", bad="", stages="")
        yield _Live(bar, task, unit)


class _Live:
    """The live line of a terminal."""

    def __init__(self, bar: Any, task: Any, unit: str) -> None:
        self._bar, self._task, self._unit, self._bad = bar, task, unit, 0

    def __call__(self, images: int, failed: int = 0) -> None:
        self._bad += failed
        self._bar.update(self._task, advance=images, bad=f"{self._bad} failed" if self._bad else "")
        speed = self._bar.tasks[self._task].speed
        self._bar.update(self._task, rate=f"{speed:.1f} {self._unit}/s" if speed else "")

    def note(self, text: str) -> None:
        self._bar.update(self._task, stages=text)


class _Lines:
    """A plain line every few seconds."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self._label, self._total, self._unit, self._note = label, total, unit, ""
        self._started = self._shown = time.monotonic()
        self._done = self._bad = 0

    def __call__(self, images: int, failed: int = 0) -> None:
        self._done, self._bad = self._done + images, self._bad + failed
        now = time.monotonic()
        pause = 5 if now - self._started < 60 else 30
        if now - self._shown < pause and (self._done < self._total or now - self._started <= 1):
            return
        self._shown = now
        rate = self._done / max(now - self._started, 1e-9)
        left = f", {duration((self._total - self._done) / rate)} left" if self._done < self._total else ""
        bad = f", {self._bad} failed" if self._bad else ""
        say(f"{self._label}: {self._done}/{self._total}, {rate:.1f} {self._unit}/s{left}{bad}{self._note}")

    def note(self, text: str) -> None:
        self._note = f"; {text}" if text else ""


@contextmanager
def megabytes(label: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Progress in megabytes for workers that count bytes."""
    done = 0
    with progress(label, max(1, num_bytes // 10**6), "MB") as advance:

        def count(more: int) -> None:
            nonlocal done
            before, done = done, done + more
            if done // 10**6 > before // 10**6:
                advance(done // 10**6 - before // 10**6)

        yield count


@contextmanager
def told(*names: str, speaks: bool = True) -> Iterator[None]:
    """Show on stderr what these loggers say of progress; of several processes only those that speak do."""

    class Line(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if speaks:
                say(record.getMessage())

    handler = Line()
    logs = [logging.getLogger(name) for name in names]
    before = [(log.level, log.propagate) for log in logs]
    for log in logs:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    try:
        yield
    finally:
        for log, (level, propagate) in zip(logs, before):
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate
