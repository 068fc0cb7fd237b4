"""Which pieces of a run are handed to which actor of a Ray cluster, and which are handed out again; arithmetic alone.

A piece is a unit of a pass, as (pass, unit). Each actor holds a few, so that it never idles. Those of a dead one go
back. At the end, when nothing is left to hand out, an idle actor gets what another one holds and has not begun, and
then doubles what somebody has been at for too long: of two actors at one piece the first commit decides.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from featstore.extraction.division import HELPERS, SLOW

Piece = tuple[int, int]

HELD_SECONDS = 10.0  # of work that an actor holds, so that it is never out of it between two reports
HELD_LEAST, HELD_MOST = 2, 16  # pieces; a dead actor's are done again
SAMPLES = 101  # latest durations from which the usual one is taken
SHORTEST = 2.0  # seconds that no piece is called late before: shorter ones are noise


@dataclass(slots=True)
class Holder:
    """What one actor has been given and has not committed, in the order in which it comes to it."""

    held: dict[Piece, float] = field(default_factory=dict)  # piece -> when it was given
    moved: float = 0.0  # when it last committed something
    asked: set[Piece] = field(default_factory=set)  # pieces that it is to hand back
    silent: bool = False

    def since(self, piece: Piece) -> float:
        """Since when it can have been at a piece."""
        return max(self.held[piece], self.moved)


class Handout:
    """The pieces of a run and who holds them; `now` is in seconds on any clock.

    `double` says whether late pieces are given to a second actor; `patience` is when one is late whose usual duration
    is not known yet.
    """

    def __init__(self, *, patience: float, double: bool = True):
        self.patience, self.double = patience, double
        self.doubled = 0
        self.returned = 0  # pieces of dead or silent actors
        self._lost: dict[Piece, int] = {}  # piece -> how often it was lost
        self._waiting: list[Piece] = []
        self._done: set[Piece] = set()
        self._known: set[Piece] = set()
        self._holders: dict[int, Holder] = {}
        self._seconds: deque[float] = deque(maxlen=SAMPLES)

    @property
    def is_done(self) -> bool:
        """Whether every piece is committed."""
        return len(self._done) == len(self._known)

    @property
    def usual(self) -> float | None:
        """Seconds that an actor is at a piece, as a median; None before the first."""
        return statistics.median(self._seconds) if self._seconds else None

    @property
    def known(self) -> frozenset[Piece]:
        """All pieces of the run."""
        return frozenset(self._known)

    def is_committed(self, piece: Piece) -> bool:
        """Whether a piece is done."""
        return piece in self._done

    def add(self, pieces: Iterable[Piece]) -> None:
        """Pieces to be done; known ones stay what they are."""
        new = [piece for piece in pieces if piece not in self._known]
        self._known.update(new)
        self._waiting = sorted([*self._waiting, *new], key=self._rank)

    def join(self, actor: int) -> None:
        """An actor is there to be given pieces."""
        self._holders[actor] = Holder()

    def holds(self, actor: int) -> int:
        """How many pieces an actor has."""
        return len(self._holders[actor].held)

    def commit(self, actor: int, pieces: Iterable[Piece], now: float) -> list[Piece]:
        """Pieces that an actor found or made committed; returns those that nobody had reported before."""
        holder = self._holders[actor]
        ours = [piece for piece in pieces if piece in holder.held]
        new = [piece for piece in pieces if piece not in self._done]
        if ours:
            began = holder.since(ours[0])
            self._seconds += [max(now - began, 0.0) / len(ours)] * len(ours)
            holder.moved = now
        for piece in ours:
            del holder.held[piece]
        self._known.update(new)
        self._done.update(new)
        gone = set(new)
        self._waiting = [piece for piece in self._waiting if piece not in gone]
        return new

    def hand_back(self, actor: int, pieces: Iterable[Piece]) -> None:
        """Pieces that an actor had not begun and gives back."""
        holder = self._holders[actor]
        for piece in pieces:
            if holder.held.pop(piece, None) is not None:
                self._put_back(piece)
        holder.asked.clear()

    def lose(self, actor: int) -> None:
        """An actor is dead: its pieces are anybody's."""
        holder = self._holders.pop(actor, None)
        for piece in holder.held if holder is not None else ():
            self._lost[piece] = self._lost.get(piece, 0) + 1
            self.returned += self._put_back(piece)

    def silence(self, actor: int) -> None:
        """An actor has not been heard of: its pieces are anybody's, though it may commit them still."""
        holder = self._holders[actor]
        if not holder.silent:
            holder.silent = True
            self.returned += sum(self._put_back(piece) for piece in holder.held)

    def hear(self, actor: int) -> None:
        """An actor has been heard of."""
        self._holders[actor].silent = False

    def next_for(self, actor: int, now: float) -> list[Piece]:
        """Pieces for an actor that was just heard of: enough to keep it busy, fewer when the end is near."""
        holder = self._holders[actor]
        room = self._share() - len(holder.held)
        given: list[Piece] = []
        idler = any(
            not other.held and not other.silent for name, other in self._holders.items() if name != actor
        )  # it is served before anybody gets a second piece of the last ones
        few = len(self._waiting) <= len(self._holders)
        if few and idler and holder.held:
            room = 0
        while self._waiting and len(given) < room:
            given.append(self._waiting.pop(0))
        if not given and not holder.held and not self._waiting:
            given = self._help(actor, now)
        for piece in given:
            holder.held[piece] = now
        return given

    def wanted_back(self, actor: int) -> list[Piece]:
        """Pieces that an actor is to hand back, if it has not begun them: others are idle."""
        holder = self._holders[actor]
        idle = sum(not other.held and not other.silent for other in self._holders.values())
        if self._waiting or not idle or len(holder.held) < HELD_LEAST or holder.asked:
            return []
        most = max((len(other.held) for other in self._holders.values() if not other.silent), default=0)
        if len(holder.held) < most:
            return []
        last = list(holder.held)[-max(1, len(holder.held) // 2) :]
        holder.asked.update(last)
        return last

    def _share(self) -> int:
        usual = self.usual
        enough = HELD_LEAST if usual is None else math.ceil(HELD_SECONDS / max(usual, 1e-3))
        fair = len(self._waiting) // (2 * max(1, len(self._holders)))
        return max(min(enough, HELD_MOST, fair), HELD_LEAST)

    def _help(self, actor: int, now: float) -> list[Piece]:
        """The piece that others have been at for longest, if that is too long."""
        if not self.double:
            return []
        usual = self.usual
        slow = SLOW * self.patience if usual is None else max(SHORTEST, SLOW * usual)
        held: dict[Piece, list[float]] = {}
        for name, other in self._holders.items():
            if name != actor:
                for piece in other.held:
                    held.setdefault(piece, []).append(other.since(piece))
        late = [
            (min(since), piece)
            for piece, since in held.items()
            if piece not in self._done and len(since) < HELPERS and now - min(since) > slow
        ]
        if not late:
            return []
        self.doubled += 1
        return [min(late)[1]]

    def _put_back(self, piece: Piece) -> bool:
        """Whether a piece waits for another actor now: not if it is done, waits already, or somebody is at it."""
        alive = any(piece in other.held for other in self._holders.values() if not other.silent)
        if piece in self._done or piece in self._waiting or alive:
            return False
        self._waiting = sorted([*self._waiting, piece], key=self._rank)
        return True

    def _rank(self, piece: Piece) -> tuple[int, Piece]:
        """Ascending, those that were lost before last: one that kills whoever takes it must not hold up the others."""
        return (self._lost.get(piece, 0), piece)
