"""Which piece a rank does next: of its own stripe, then what nobody has come to, then what others are stuck on.

Pieces are the numbered blocks of a set; piece `b` belongs to rank `b % world`. A rank that is done with its stripe
takes over what is left. What is being done is told by claims, which only save work: two ranks at one piece are
harmless, because the first commit of a block decides. This module is arithmetic, so that the simulation of hundreds of
GPUs (benchmarks/simulate_cluster.py) and the real thing decide alike; the store's side of it is `extraction.claims`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

SLOW = 2.0  # times the usual duration after which an idle rank doubles a piece that somebody is at
GOLDEN = 0.6180339887498949  # the golden ratio without its 1
HELPERS = 2  # ranks at one piece, at most, while all of them are heard of


@dataclass(frozen=True, slots=True)
class Claim:
    """Somebody is at a piece since `since`, last heard of at `seen` (seconds on one clock); `dead` if that is known."""

    owner: str
    since: float
    seen: float
    dead: bool = False

    def is_over(self, now: float, patience: float) -> bool:
        """Whether its owner is dead, or silent for more than `patience` seconds."""
        return self.dead or now - self.seen > patience


@dataclass(frozen=True, slots=True)
class Next:
    """What a rank that looked at everything does: `take` a piece, `wait` for others and look again, or it is `done`."""

    what: Literal["take", "wait", "done"]
    piece: int = -1
    helping: bool = False  # somebody else, who was heard of lately, is at it


WAIT, DONE = Next("wait"), Next("done")


def stripe(pieces: Sequence[int], rank: int, world: int) -> list[int]:
    """The pieces of a rank: by their numbers, never by what is left, which a late starter would see otherwise."""
    return [piece for piece in pieces if piece % world == rank]


def far_end(count: int, rank: int) -> int:
    """Which of `count` free pieces of a stripe, ascending, `rank` takes: one of the half that its owner reaches last.

    Ranks that look at the same moment see the same stripe as the longest; were all to take its last piece, all but one
    would come too late. Multiples of the golden ratio lie far apart from each other however many ranks there are.
    """
    return count - 1 - int(rank * GOLDEN % 1.0 * ((count + 1) // 2))


def take_over(
    left: Sequence[int],
    claims: Mapping[int, Sequence[Claim]],
    *,
    owner: str,
    ranks: tuple[int, int],
    now: float,
    patience: float,
    pace: float | None,
) -> Next:
    """What rank `ranks[0]` of `ranks[1]` does when its stripe is done and `left` are the pieces not committed yet.

    Free pieces come first, from the far end of the longest stripe, which its own rank reaches last; then those whose
    ranks are silent; then, to help, the one that somebody has been at for longest, if that is `SLOW` times `pace`
    (seconds a piece, None where this rank has not measured any).
    """
    mine = {piece for piece, held in claims.items() if any(claim.owner == owner for claim in held)}
    others = [piece for piece in left if piece not in mine]
    if not others:
        return WAIT if left else DONE  # own pieces are on their way to the disk
    living: dict[int, list[Claim]] = {}
    silent: list[int] = []
    free: dict[int, list[int]] = defaultdict(list)
    rank, world = ranks
    for piece in sorted(others):
        held = claims.get(piece, ())
        alive = [claim for claim in held if not claim.is_over(now, patience)]
        if alive:
            living[piece] = alive
        elif held:
            silent.append(piece)
        else:
            free[piece % world].append(piece)
    if free:
        # Ranks that become idle together begin at different stripes.
        longest = max(free, key=lambda owner_rank: (len(free[owner_rank]), -((owner_rank - rank) % world)))
        return Next("take", free[longest][far_end(len(free[longest]), rank)])
    if silent:
        return Next("take", silent[rank % len(silent)])
    slow = SLOW * (patience if pace is None else pace)
    late = [
        (min(claim.since for claim in alive), piece)
        for piece, alive in living.items()
        if len(alive) < HELPERS and now - min(claim.since for claim in alive) > slow
    ]
    if late:
        return Next("take", min(late)[1], helping=True)
    return WAIT
