"""Files edited, touched, moved and extracted in any order: no row of other bytes is ever served for a manifest."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sets import CLS, make_spec_of

from featstore import files
from featstore.configs import RegisterConfig
from featstore.datasets.manifest import MISSING, check_unchanged
from featstore.errors import ManifestError
from featstore.extraction.plan import committed_contents
from featstore.images import PreprocessSpec
from featstore.register import register
from featstore.store import commits, ledger
from featstore.store.catalog import Store
from featstore.store.commits import BlockWriter, RowState
from featstore.store.hashes import NO_CONTENT, read_surveys, surveys_folder
from featstore.store.layout import set_folder
from probes.tuning_survey import Kept

PIXELS = PreprocessSpec(height=28, width=28, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), geometry="squash")


class World:
    """A data set of three files, a store with two sets, and what the bytes were whenever a manifest was made."""

    IDS = ("a.png", "b.png", "c.png")

    def __init__(self, base: Path) -> None:
        self.store_path, self.root = base / "store", base / "root0"
        self.roots = 0
        self.clock = 10**18
        self.meant: dict[str, dict[str, str]] = {}
        self.pending: list[tuple[Path, list[tuple[int, int, int]], dict[int, RowState]]] = []
        self.looking: list[tuple[Kept, dict[int, RowState], Callable[[], None]]] = []
        for name in self.IDS:
            self.write(name, "0")
        self.register(False)

    def write(self, name: str, letter: str) -> None:
        self.root.mkdir(exist_ok=True)
        self.clock += 10**9
        (self.root / name).write_text(f"{name}{letter}")
        os.utime(self.root / name, ns=(self.clock, self.clock))

    def touch(self, name: str) -> None:
        if (self.root / name).exists():
            self.clock += 10**9
            os.utime(self.root / name, ns=(self.clock, self.clock))

    def hide(self, name: str, letter: str) -> None:
        """Other bytes of equal size behind an unchanged time; whoever registers next hashes everything.

        Not while a run goes on: nothing on the disk could tell which of them it has read.
        """
        path = self.root / name
        if not self.pending and not self.looking and path.exists() and path.stat().st_size == len(f"{name}{letter}"):
            time_ns = path.stat().st_mtime_ns
            path.write_text(f"{name}{letter}")
            os.utime(path, ns=(time_ns, time_ns))
            self.register(True)

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def copy(self) -> None:
        self.roots += 1
        old, self.root = self.root, self.root.with_name(f"root{self.roots}")
        self.root.mkdir()
        for path in sorted(old.iterdir()):
            shutil.copyfile(path, self.root / path.name)
            self.touch(path.name)

    def bytes_now(self) -> dict[str, str]:
        return {name: sha(self.root / name) for name in self.IDS if (self.root / name).exists()}

    def register(self, hashed: bool) -> None:
        if self.root.is_dir() and any(self.root.iterdir()):
            made, _ = register(self.store_path, "mine", self.root, RegisterConfig(hash=hashed))
            self.meant[made.short] = self.bytes_now()

    def start(self, which: int) -> None:
        """What a run does before it commits: check the files, map the samples to rows, read what is missing."""
        manifest = Store(self.store_path).manifest("mine")
        try:
            check_unchanged(manifest, np.arange(len(manifest)))
        except ManifestError:
            return
        spec = make_spec_of(block_rows=2, dataset="mine", weights=str(which))
        folder = set_folder(self.store_path, spec)
        files.create_exclusive(folder / "spec.json", files.sealed(spec))
        ledger.add_arrays(folder, [CLS])
        rows = ledger.add_rows(folder, manifest, lambda: committed_contents(folder)).tolist()
        ledger.write_metadata(folder, spec, ledger.read_ledger(folder))
        now = {name: sha(manifest.root / name) for name in manifest.column("id")}
        states = {row: RowState(now[sample]) for row, sample in zip(rows, manifest.column("id"))}
        blocks = [item for item in ledger.read_ledger(folder).blocks(2) if not {*range(*item[1:])}.isdisjoint(rows)]
        self.pending.append((folder, blocks, states))

    def finish(self, num_blocks: int) -> None:
        """The oldest run commits its first blocks, and dies before the others."""
        if not self.pending:
            return
        folder, blocks, states = self.pending.pop(0)
        for block, start, stop in blocks[:num_blocks]:
            if block in commits.committed_blocks(folder, "cls"):
                continue
            with BlockWriter(folder, "cls", [CLS], block, start, stop, 2) as writer:
                held = [states.get(row, RowState(NO_CONTENT, "left")) for row in range(start, stop)]
                values = np.array([np.full(8, np.nan if item.reason else 1.0) for item in held], np.float16)
                writer.append({"cls": values}, held)
                writer.commit()

    def look(self) -> None:
        """What a training does before it trains: check the files, say that they are read, read them."""
        manifest = Store(self.store_path).manifest("mine")
        rows = np.arange(len(manifest))
        try:
            check_unchanged(manifest, rows)
        except ManifestError:
            return
        kept = Kept(surveys_folder(self.store_path, "mine"), manifest, PIXELS)
        left = [row for row in rows.tolist() if row not in kept.read()]
        done = kept.announce(np.array(left, np.int64))
        states = {row: RowState(sha(manifest.root / manifest.column("id")[row])) for row in left}
        self.looking.append((kept, states, done))

    def see(self, count: int) -> None:
        """The oldest look writes what it has found of its first images, and dies before the others."""
        if self.looking:
            kept, states, done = self.looking.pop(0)
            kept.write(dict(list(states.items())[:count]))
            if count >= len(states):
                done()

    def check(self) -> None:
        """What a set serves for a manifest was computed from the bytes that the manifest was last made from.

        And what was trained on under a manifest are those bytes.
        """
        for piece in read_surveys(Store(self.store_path), "mine").pieces:
            for sample, content in zip(piece.ids, piece.contents, strict=True):
                assert content in (None, self.meant[piece.manifest[:8]][sample]), (piece.manifest[:8], sample)
        for path in (self.store_path / "sets").glob("*/*/rows/*.parquet"):
            ids, sizes, rows = ledger.read_mapping(path)
            held = committed_contents(path.parent.parent)
            for sample, size, row in zip(ids, sizes, rows.tolist(), strict=True):
                if size != MISSING and held.get(row, NO_CONTENT) != NO_CONTENT:
                    assert held[row] == self.meant[path.stem][sample], (path.stem, sample)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


names = st.sampled_from(World.IDS)


events = st.one_of(
    st.tuples(st.just("write"), names, st.sampled_from(["0", "1", "1", "2", "longer"])),
    st.tuples(st.just("touch"), names),
    st.tuples(st.just("hide"), names, st.sampled_from(["0", "1", "2"])),
    st.tuples(st.just("remove"), names),
    st.tuples(st.just("copy")),
    st.tuples(st.just("register"), st.booleans()),
    st.tuples(st.just("register"), st.just(False)),
    st.tuples(st.just("start"), st.integers(0, 1)),
    st.tuples(st.just("finish"), st.integers(0, 3)),
    st.tuples(st.just("finish"), st.just(9)),
    st.tuples(st.just("look")),
    st.tuples(st.just("see"), st.integers(0, 3)),
    st.tuples(st.just("see"), st.just(3)),
)


def play(history: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as base:
        world = World(Path(base))
        for name, *values in history:
            getattr(world, name)(*values)
        world.check()
        world.register(False)  # and so that what the last manifest is served is looked at too
        world.start(0)
        world.finish(9)
        world.look()
        while world.looking:
            world.see(3)
        world.check()


@settings(max_examples=8, deadline=None)
@given(st.lists(events, min_size=4, max_size=10))
def test_no_row_of_other_bytes_is_ever_served_for_a_manifest(history: list[tuple[Any, ...]]) -> None:
    play(history)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(events, min_size=4, max_size=24))
def test_no_row_of_other_bytes_is_ever_served_for_a_manifest_full(history: list[tuple[Any, ...]]) -> None:
    play(history)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def digests(world: World) -> str:
    world.register(False)
    return Store(world.store_path).manifest("mine").short


def compute(world: World) -> int:
    """Extract set 0; returns how many rows it has then, those of older bytes included."""
    world.start(0)
    world.finish(9)
    world.check()
    return sum(len(held) for held in map(committed_contents, (world.store_path / "sets").glob("*/*")))


def test_touched_and_copied_files_leave_digest_and_rows_as_they_were(world: World) -> None:
    first = digests(world)
    assert compute(world) == 3
    world.touch("a.png")
    assert digests(world) == first
    world.copy()
    assert digests(world) == first
    assert compute(world) == 3
    assert Store(world.store_path).manifest("mine").root == world.root


def test_an_edit_of_equal_size_after_extraction_recomputes_that_row_alone(world: World) -> None:
    first = digests(world)
    compute(world)
    world.write("b.png", "1")
    second = digests(world)
    assert second != first
    assert compute(world) == 4
    world.touch("b.png")
    assert digests(world) == second
    world.write("b.png", "0")
    assert digests(world) not in (first, second), "the row of the first manifest is another than the latest of its size"


def test_an_edit_before_extraction_leaves_the_digest(world: World) -> None:
    first = digests(world)
    world.write("b.png", "1")
    assert digests(world) == first
    assert compute(world) == 3


def test_two_roots_with_other_bytes_in_turn_have_two_manifests(world: World) -> None:
    first = digests(world)
    compute(world)
    one = world.root
    world.copy()
    world.write("a.png", "1")
    two = world.root
    seen = []
    for root in (two, one, two, one):
        world.root = root
        seen.append(digests(world))
        compute(world)
    assert seen[0] == seen[2]
    assert seen[1] == seen[3]
    assert len({first, *seen}) == 3


def test_what_a_run_may_be_about_to_commit_is_in_doubt(world: World) -> None:
    first = digests(world)
    world.start(0)
    world.write("a.png", "1")
    assert digests(world) != first
    world.finish(9)
    world.check()


def test_damaged_sets_put_every_changed_file_in_doubt(world: World) -> None:
    first = digests(world)
    compute(world)
    for path in (world.store_path / "sets").glob("*/*/ledger/000001.json"):
        path.write_text("{")
    assert digests(world) == first, "nobody asks while files are as they were"
    world.touch("a.png")
    assert digests(world) != first
    assert Store(world.store_path).manifest("mine").column("content") == [sha(world.root / "a.png"), None, None]
