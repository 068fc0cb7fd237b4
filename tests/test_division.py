"""Who does which piece: against brute force over every piece, and with ranks that die, freeze and come back."""

import random
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from featstore.extraction.division import DONE, HELPERS, SLOW, WAIT, Claim, Next, far_end, stripe, take_over

PATIENCE, PACE = 120.0, 10.0


def decide(
    left: list[int],
    claims: dict[int, list[Claim]],
    *,
    rank: int = 0,
    world: int = 4,
    now: float = 1000.0,
    pace: float | None = PACE,
) -> Next:
    return take_over(left, claims, owner=f"r{rank}", ranks=(rank, world), now=now, patience=PATIENCE, pace=pace)


def held_by(owner: str, since: float, seen: float, dead: bool = False) -> Claim:
    return Claim(owner, float(since), float(seen), dead)


def at_work(owner: str, since: float, now: float = 1000.0) -> Claim:
    return held_by(owner, since, now - 1)


@given(some.integers(0, 300), some.integers(1, 40))
def test_stripes_cover_every_piece_once(blocks: int, world: int) -> None:
    pieces = range(blocks)
    stripes = [stripe(pieces, rank, world) for rank in range(world)]
    assert sorted(piece for own in stripes for piece in own) == list(pieces)
    assert max(map(len, stripes)) - min(map(len, stripes)) <= 1
    assert all(own == sorted(own) for own in stripes)


@given(some.sets(some.integers(0, 60)), some.integers(1, 9))
def test_a_stripe_does_not_depend_on_what_is_left(left: set[int], world: int) -> None:
    for rank in range(world):
        assert stripe(sorted(left), rank, world) == [p for p in stripe(range(61), rank, world) if p in left]


@given(some.integers(1, 500), some.integers(0, 600))
def test_thieves_keep_to_the_half_that_the_owner_reaches_last(count: int, rank: int) -> None:
    assert count // 2 <= far_end(count, rank) < count


def test_thieves_of_one_stripe_spread_over_its_far_half() -> None:
    taken = Counter(far_end(100, rank) for rank in range(200))
    assert set(taken) == set(range(50, 100))
    assert max(taken.values()) <= 5
    few = sorted(far_end(100, rank) for rank in range(8))
    assert min(later - earlier for earlier, later in pairwise(few)) >= 3


@pytest.mark.parametrize("claimed", [False, True])
def test_two_thieves_differ(claimed: bool) -> None:
    """Both while several stripes are open and while one is."""
    for left in ([1, 5, 9, 2, 6, 10], [1, 5, 9, 13, 17]):
        claims = {piece: [held_by("gone", 0, 0)] for piece in left} if claimed else {}
        taken = [decide(left, claims, rank=rank).piece for rank in (0, 1)]
        assert len(set(taken)) == 2, (left, taken)


def test_the_longest_stripe_is_taken_from_first() -> None:
    assert decide([1, 2, 6, 10, 14], {}).piece in (10, 14)
    assert decide([1, 2, 6], {2: [at_work("r2", 990)]}).piece in (1, 6)  # lengths are of what is free


def test_the_order_in_which_pieces_are_named_changes_nothing() -> None:
    left = [3, 7, 11, 15, 19, 2, 6]
    for _ in range(20):
        random.Random(0).shuffle(left)
        assert decide(left, {}, rank=1) == decide(sorted(left), {}, rank=1)


@pytest.mark.parametrize("claim", [held_by("r1", 0, 1000, dead=True), held_by("r1", 0, 1000 - PATIENCE - 1)])
def test_what_the_dead_and_the_silent_were_at_is_taken(claim: Claim) -> None:
    assert decide([5], {5: [claim]}) == Next("take", 5)
    assert not decide([5], {5: [claim]}).helping


def test_free_pieces_come_before_silent_ones_and_those_before_help() -> None:
    silent, slow = [held_by("r1", 0, 0)], [at_work("r2", 0)]
    assert decide([3, 5, 6], {5: silent, 6: slow}) == Next("take", 3)
    assert decide([5, 6], {5: silent, 6: slow}) == Next("take", 5)
    assert decide([6], {6: slow}) == Next("take", 6, helping=True)


def test_patience_is_kept_to_the_second() -> None:
    assert decide([5], {5: [held_by("r1", 995, 1000 - PATIENCE)]}) == WAIT
    assert decide([5], {5: [held_by("r1", 995, 999.9 - PATIENCE)]}) == Next("take", 5)


def test_help_begins_beyond_slow_times_the_pace() -> None:
    assert decide([5], {5: [at_work("r1", 1000 - SLOW * PACE)]}) == WAIT
    assert decide([5], {5: [at_work("r1", 999.9 - SLOW * PACE)]}) == Next("take", 5, helping=True)


def test_without_a_pace_help_waits_for_twice_the_patience() -> None:
    assert decide([5], {5: [at_work("r1", 1000 - SLOW * PATIENCE)]}, pace=None) == WAIT
    assert decide([5], {5: [at_work("r1", 999 - SLOW * PATIENCE)]}, pace=None).helping


def test_the_one_that_has_been_at_it_for_longest_is_helped() -> None:
    claims = {5: [at_work("r1", 700)], 6: [at_work("r2", 600)], 7: [at_work("r3", 800)]}
    assert decide([5, 6, 7], claims) == Next("take", 6, helping=True)


def test_no_more_than_helpers_are_at_one_piece() -> None:
    crowd = [at_work(f"r{rank}", 0) for rank in range(1, 1 + HELPERS)]
    assert decide([5], {5: crowd}) == WAIT
    crowd[0] = held_by("r1", 0, 0)  # silent ones do not count
    assert decide([5], {5: crowd}) == Next("take", 5, helping=True)


def test_it_waits_for_its_own_and_is_done_when_nothing_is_left() -> None:
    assert decide([4, 8], {4: [at_work("r0", 0)], 8: [at_work("r0", 0)]}) == WAIT
    assert decide([], {4: [at_work("r1", 0)]}) == DONE


def test_it_never_doubles_its_own_piece() -> None:
    claims = {5: [at_work("r1", 0), at_work("r0", 10)]}
    assert decide([5], claims) == WAIT
    assert decide([5], {5: [held_by("r1", 0, 0), at_work("r0", 0)]}) == WAIT


claim = some.builds(
    Claim,
    some.sampled_from([f"r{n}" for n in range(6)]),
    since=some.floats(0, 1000),
    seen=some.floats(0, 1000),
    dead=some.booleans(),
)


@settings(max_examples=300)
@given(
    left=some.sets(some.integers(0, 30)),
    claims=some.dictionaries(some.integers(0, 30), some.lists(claim, max_size=3), max_size=20),
    rank=some.integers(0, 5),
    pace=some.none() | some.floats(0.1, 100),
)
def test_every_decision_is_allowed(
    left: set[int], claims: dict[int, list[Claim]], rank: int, pace: float | None
) -> None:
    """What may be taken at all, in words of its own: piece by piece."""
    owner, found = f"r{rank}", decide(sorted(left), claims, rank=rank, world=6, pace=pace)
    heard = {piece: [c for c in claims.get(piece, []) if not c.dead and c.seen >= 1000 - PATIENCE] for piece in left}
    foreign = {piece for piece in left if all(c.owner != owner for c in claims.get(piece, []))}
    open_ones = {piece for piece in foreign if not heard[piece]}
    late = {
        piece
        for piece in foreign - open_ones
        if len(heard[piece]) < HELPERS and 1000 - min(c.since for c in heard[piece]) > SLOW * (pace or PATIENCE)
    }
    assert (found == DONE) == (not left)
    assert (found == WAIT) == (bool(left) and not open_ones and not late)
    if found.what == "take":
        assert found.piece in (late if found.helping else open_ones)
        assert found.helping == (not open_ones)
        if not found.helping and any(not claims.get(piece) for piece in open_ones):
            assert not claims.get(found.piece)


class Ranks:
    """Processes in rounds: each does a piece in so many rounds, may die, freeze and come back under another name."""

    def __init__(self, blocks: int, world: int, seed: int, faults: float) -> None:
        self.rng, self.world, self.faults, self.blocks = random.Random(seed), world, faults, blocks
        self.claims: dict[int, list[Claim]] = defaultdict(list)
        self.computed: Counter[int] = Counter()
        self.committed: set[int] = set()
        self.at: dict[int, tuple[int, int]] = {}  # rank -> piece, rounds to go
        self.away: dict[int, tuple[int, bool]] = {}  # rank -> rounds to go, frozen
        self.lives = [0] * world
        self.now = 0
        self.over: set[int] = set()

    def owner(self, rank: int) -> str:
        return f"{rank}.{self.lives[rank]}"

    def beat(self, rank: int) -> None:
        for piece, held in self.claims.items():
            self.claims[piece] = [
                held_by(c.owner, c.since, self.now, c.dead) if c.owner == self.owner(rank) else c for c in held
            ]

    def choose(self, rank: int) -> None:
        left = [piece for piece in range(self.blocks) if piece not in self.committed]
        for piece in stripe(left, rank, self.world):
            if all(c.dead or self.now - c.seen > 9 for c in self.claims[piece]):
                return self.take(rank, piece)
        found = take_over(
            left,
            self.claims,
            owner=self.owner(rank),
            ranks=(rank, self.world),
            now=float(self.now),
            patience=9.0,
            pace=3.0,
        )
        if found.what == "take":
            self.take(rank, found.piece)
        elif found == DONE:
            self.over.add(rank)
        return None

    def take(self, rank: int, piece: int) -> None:
        self.claims[piece].append(held_by(self.owner(rank), self.now, self.now))
        self.at[rank] = (piece, self.rng.randint(1, 5))

    def fault(self, rank: int) -> None:
        frozen = self.rng.random() < 0.5
        self.away[rank] = (self.rng.randint(1, 40), frozen)
        if not frozen:
            known = self.rng.random() < 0.5  # on the same machine
            for piece, held in self.claims.items():
                self.claims[piece] = [
                    held_by(c.owner, c.since, c.seen, c.dead or (known and c.owner == self.owner(rank))) for c in held
                ]
            self.at.pop(rank, None)
            self.lives[rank] += 1

    def step(self) -> None:
        self.now += 1
        for rank in self.rng.sample(range(self.world), self.world):
            if rank in self.away:
                rounds, frozen = self.away.pop(rank)
                if rounds > 1:
                    self.away[rank] = (rounds - 1, frozen)
                continue
            if rank in self.over:
                continue
            if self.rng.random() < self.faults:
                self.fault(rank)
                continue
            self.beat(rank)
            if rank not in self.at:
                self.choose(rank)
                continue
            piece, rounds = self.at[rank]
            self.at[rank] = (piece, rounds - 1)
            if rounds == 1:
                del self.at[rank]
                self.computed[piece] += 1
                self.committed.add(piece)
                self.claims.pop(piece, None)


@settings(max_examples=60, deadline=None)
@given(some.integers(1, 50), some.integers(1, 8), some.integers(0, 10**6))
def test_without_faults_every_piece_is_computed_once(blocks: int, world: int, seed: int) -> None:
    """Whatever the order of the ranks in every round, as long as nobody is beyond twice the pace (6 rounds)."""
    ranks = Ranks(blocks, world, seed, faults=0)
    while len(ranks.over) < world:
        ranks.step()
    assert ranks.computed == dict.fromkeys(range(blocks), 1)


@settings(max_examples=100, deadline=None)
@given(some.integers(1, 40), some.integers(1, 8), some.integers(0, 10**6), some.sampled_from([0.02, 0.1, 0.3]))
def test_with_ranks_that_die_and_freeze_everything_gets_done(blocks: int, world: int, seed: int, faults: float) -> None:
    ranks = Ranks(blocks, world, seed, faults)
    for _ in range(20000):
        ranks.step()
        if len(ranks.over) == world:
            break
    assert ranks.committed == set(range(blocks))
    assert len(ranks.over) == world
