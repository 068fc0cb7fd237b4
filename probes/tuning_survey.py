"""Images looked through before they are trained on: which can be decoded, and the hashes of their files.

What is found is kept in the store, in pieces, so that a survey that was ended goes on, and a finished one takes no time
again. Images that failed are tried anew, as what they lacked may have been installed since. Registration knows from the
pieces which bytes were trained on: files with others become another manifest.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
from jaxtyping import Int64

from featstore import files
from featstore.configs import RunConfig, parse_share
from featstore.datasets.manifest import Manifest
from featstore.errors import CorruptError, FeatstoreError
from featstore.extraction.loader import Images
from featstore.extraction.stopping import Stop
from featstore.images import PreprocessSpec
from featstore.objects import Place
from featstore.store.commits import RowState
from probes.tuning_ranks import Team
from probes.tuning_watch import Watch, check_asked

SIZE = 64  # images of a batch
PIECE = 1024  # images after which a piece is kept,
PIECE_SECONDS = 30.0  # or seconds
VERSION = 2  # raised whenever other images would be good, or hashes differ

Open = Callable[[Sequence[Int64[np.ndarray, "..."]]], AbstractContextManager[Images]]


class Kept:
    """Good images of a manifest under one preprocessing, row -> hash of the file, as sealed files in a folder.

    A piece names its rows, so that any number of processes and of tasks add to it. `featstore.store.hashes` reads them
    too. `trusted`: what is kept need not be looked at again.
    """

    def __init__(
        self, folder: Place | None, manifest: Manifest, preprocess: PreprocessSpec, *, trusted: bool = True
    ) -> None:
        key = files.digest([VERSION, manifest.digest, preprocess.as_dict()])
        self._folder, self._manifest = None if folder is None else folder / key[:24], manifest
        self.trusted = trusted

    def read(self) -> dict[int, RowState]:
        """All pieces; of one that is damaged the images are looked at again, as are files that changed since."""
        found: dict[int, RowState] = {}
        times, hashes = None, None
        for path in sorted(self._folder.glob("*.json")) if self._folder is not None else ():
            try:
                body = files.unseal(path.read_bytes(), path)
            except (CorruptError, FileNotFoundError):
                continue
            failed = set(body["failed"])
            # Registration knows of other bytes by these pieces: this is for those that no store could take.
            if times is None or hashes is None:
                times, hashes = self._manifest.column("mtime_ns"), self._manifest.hashes()
            for row, content, time_ns in zip(body["rows"], body["contents"], body["times"], strict=True):
                if content is not None and row not in failed and (time_ns == times[row] or content == hashes[row]):
                    found[row] = RowState(content)
        return found

    def announce(self, rows: Int64[np.ndarray, " n"]) -> Callable[[], None]:
        """Tell those who register files meanwhile that these are about to be read; returns what takes that back.

        Raises:
            StoreError: the folder cannot be written.
        """
        if self._folder is None or not len(rows):
            return lambda: None
        path = self._put("read", rows.tolist(), [None] * len(rows), [])
        return lambda: path.unlink(missing_ok=True)

    def write(self, states: dict[int, RowState]) -> bool:
        """Add a piece; whether there were good ones among `states`.

        Raises:
            StoreError: the folder cannot be written.
        """
        if self._folder is None or not states:
            return False
        rows = sorted(states)
        failed = [row for row in rows if states[row].reason is not None]
        self._put("found", rows, [states[row].content for row in rows], failed)
        return len(failed) < len(rows)

    def _put(self, kind: str, rows: list[int], contents: Sequence[str | None], failed: list[int]) -> Place:
        assert self._folder is not None
        picked = self._manifest.table.select(["id", "mtime_ns"]).take(rows)
        body = {
            "manifest": self._manifest.digest,
            "rows": rows,
            "ids": picked.column("id").to_pylist(),
            "contents": contents,
            "times": picked.column("mtime_ns").to_pylist(),
            "failed": failed,
        }
        path = self._folder / f"{kind}-{files.digest([rows, contents])[:24]}.json"
        with files.writing(self._folder):
            files.make_folder(self._folder)
        files.write_atomic(path, files.sealed(body))
        return path


class Failures:
    """Failed images against `--max-failed` of all that are looked at; `before` are those of earlier surveys."""

    def __init__(self, run: RunConfig, total: int, before: dict[int, str]) -> None:
        self._share, self._asked, self._total = parse_share(run.max_failed), run.max_failed, total
        self._before = before
        self.count = len(before)

    def add(self, failed: int, own: dict[int, RowState], team: Team) -> None:
        """Count failures of the whole team; all its processes make the same calls.

        Raises:
            FeatstoreError: they are too many.
        """
        self.count += failed
        if self.count > self._share * self._total:
            mine = [state.reason for state in own.values() if state.reason is not None]
            reasons = Counter([*self._before.values(), *(why for part in team.objects(mine) for why in part)])
            raise FeatstoreError(
                f"{self.count} of the {self._total} images of the task could not be decoded, more than --max-failed "
                f"{self._asked} allows; the last reason: {list(reasons)[-1]}; allow more, or see to the cause"
            )


def look_through(
    open_images: Open,
    rows: Int64[np.ndarray, " n"],
    kept: Kept,
    failures: Failures,
    team: Team,
    *,
    stop: Stop | None = None,
) -> dict[int, RowState]:
    """Decode each of these samples once, unless it is kept already, and say what became of all of them.

    The processes of a team share the work, and all return the same.

    Raises:
        FeatstoreError: too many failures.
        Stopped: asked to end; what was found is kept.
    """
    held: dict[int, RowState] = team.objects(kept.read() if team.writes else None)[0]
    found = {row: held[row] for row in rows.tolist() if row in held} if kept.trusted else {}
    left = np.array([row for row in rows.tolist() if row not in found], np.int64)
    if not len(left):
        return found
    done = kept.announce(np.setdiff1d(left, list(held))) if team.writes else None
    team.wait()  # nothing is read before
    mine = left[team.rank :: team.world]
    jobs = [mine[start : start + SIZE] for start in range(0, len(mine), SIZE)]
    rounds = -(-len(left[:: team.world]) // SIZE)  # the first process has as many rows as any
    own: dict[int, RowState] = {}
    piece: dict[int, RowState] = {}
    since = time.monotonic()
    with Watch("images looked at", len(left), team, stop) as watch, open_images(jobs) as images:
        batches = iter(images)
        try:
            for number in range(rounds):
                batch = next(batches) if number < len(jobs) else None
                states = {} if batch is None else dict(zip(batch.job.rows, batch.states))
                own |= states
                piece |= {row: state for row, state in states.items() if held.get(row) != state}
                asked, failed = watch.step(len(states), sum(state.reason is not None for state in states.values()))
                failures.add(failed, own, team)
                if len(piece) >= PIECE or time.monotonic() - since >= PIECE_SECONDS:
                    if kept.write(piece):
                        watch.kept()
                    piece, since = {}, time.monotonic()
                if number + 1 < rounds:  # else it is done
                    check_asked(asked, stop)
        finally:
            if kept.write(piece):
                watch.kept()
    found |= {row: state for part in team.objects(own) for row, state in part.items()}
    if done is not None:
        done()
    return found
