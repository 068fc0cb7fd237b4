"""Images looked through before they are trained on: which can be decoded, and the hashes of their files.

What is found is kept beside the runs, in pieces, so that a survey that was ended goes on, and a finished one takes no
time again. Images that failed are not kept: they are tried anew, as what they lacked may have been installed since.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from featstore import files
from featstore.configs import RunConfig, parse_share
from featstore.datasets.manifest import Manifest
from featstore.errors import CorruptError, FeatstoreError
from featstore.extraction.loader import Images
from featstore.extraction.stopping import Stop
from featstore.images import PreprocessSpec
from featstore.store.commits import RowState
from probes.tuning_ranks import Team
from probes.tuning_watch import Watch, check_asked

SIZE = 64  # images of a batch
PIECE = 1024  # images after which a piece is kept,
PIECE_SECONDS = 30.0  # or seconds
VERSION = 1  # raised whenever other images would be good, or hashes differ

Open = Callable[[Sequence[Int64[np.ndarray, "..."]]], AbstractContextManager[Images]]


class Kept:
    """Good images of a manifest under one preprocessing, row -> hash of the file, as sealed files in a folder.

    A piece names its rows, so that any number of processes and of tasks add to it.
    """

    def __init__(self, folder: Path | None, manifest: Manifest, preprocess: PreprocessSpec) -> None:
        key = files.digest([VERSION, manifest.digest, preprocess.as_dict()])
        self._folder, self._manifest = None if folder is None else folder / key[:24], manifest.digest

    def read(self) -> dict[int, RowState]:
        """All pieces; of one that is damaged the images are looked at again."""
        found: dict[int, RowState] = {}
        for path in sorted(self._folder.glob("*.json")) if self._folder is not None else ():
            try:
                body = files.unseal(path.read_bytes(), path)
            except CorruptError:
                continue
            found |= {row: RowState(content) for row, content in zip(body["rows"], body["contents"], strict=True)}
        return found

    def write(self, states: dict[int, RowState]) -> bool:
        """Add a piece: the good ones of `states`; whether there were any.

        Raises:
            StoreError: the folder cannot be written.
        """
        good = {row: state.content for row, state in sorted(states.items()) if state.reason is None}
        if self._folder is None or not good:
            return False
        # The manifest is what `featstore.store.hashes` finds them by.
        body = {"manifest": self._manifest, "rows": list(good), "contents": list(good.values())}
        with files.writing(self._folder):
            files.make_folder(self._folder)
        files.write_atomic(self._folder / f"{files.digest(body['rows'])[:24]}.json", files.sealed(body))
        return True


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
    found = {row: held[row] for row in rows.tolist() if row in held}
    left = np.array([row for row in rows.tolist() if row not in found], np.int64)
    if not len(left):
        return found
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
                piece |= states
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
    return found | {row: state for part in team.objects(own) for row, state in part.items()}
