"""`merge`: what another machine extracted of a set comes into the set of this store, block by block.

A block that the target lacks is filled from the rows of the source that hold the same samples, read with their
checksums verified, and committed as any writer commits. So a merge that is killed leaves nothing half, two merges may
race, and what is committed stays as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Int64

from featstore import files
from featstore.datasets import manifest as manifests
from featstore.errors import ConfigError, CorruptError, ManifestError, UnknownNameError
from featstore.objects import Place
from featstore.store import commits, ledger
from featstore.store.catalog import Entry, Store
from featstore.store.commits import HASH_HEX, BlockWriter, Commit, RowState
from featstore.store.diff import as_tokens, parity_limit, parity_of, row_differences
from featstore.store.kinds import SAID, check_arrival, kind_of
from featstore.store.layout import ArraySpec, check_current, check_store, read_spec, set_folder
from featstore.store.owners import OwnedSet
from featstore.store.packed import BEGUN, SEALED

PIECE_BYTES = 32 * 2**20
NO_CONTENT = "0" * HASH_HEX


@dataclass(slots=True)
class Merged:
    """What a merge did to one set: blocks that came, that both had, and rows of the source that found no whole block.

    `conflicts` says, block by block, where both stores hold other numbers or read other image files.
    """

    name: str
    copied: int = 0
    rows: int = 0
    equal: int = 0
    within_parity: int = 0
    failed_here_only: int = 0
    left: int = 0
    conflicts: list[str] = field(default_factory=list)


def merge(
    source: Store,
    target: Place,
    selectors: list[str],
    *,
    keep: Literal["target"] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Merged]:
    """Bring the committed blocks of the source's sets (all, or those named) into the store `target`.

    `advance` is told the number of blocks dealt with. With `keep="target"` blocks that differ stay as they are.

    Raises:
        ConfigError: both stores are the same, or a set would share its name with sets of another kind of weights.
        CorruptError: both have a block with other numbers (nothing is written then), or the source is damaged.
        SchemaError: one of the stores is of an older schema.
    """
    if source.path == target:
        raise ConfigError(f"{target}: source and target of a merge are the same store; name the other one")
    entries = [source.entry(selector) for selector in selectors] or source.entries()
    for entry in entries:
        check_current(entry.spec["schema"], f"{entry.full_name} in {source.path}")
    _check_names(entries, target)
    check_store(target, create=True)
    results = [Merged(entry.full_name) for entry in entries]
    for entry, result in zip(entries, results):
        if _is_there(entry, target):
            _Pair(entry, target).compare(result)
    _refuse(results, keep)
    for entry, result in zip(entries, results):
        _prepare(source, entry, target)
        _Pair(entry, target).bring(result, advance)
        _bring_runs(entry.folder, set_folder(target, entry.spec))
    _refuse(results, keep)
    return results


def _check_names(entries: list[Entry], target: Place) -> None:
    """Imported, random and real weights share no name in the target, nor among what comes.

    Raises:
        ConfigError: they would.
    """
    there, arriving = Store(target), dict[tuple[str, str], Entry]()
    for entry in entries:
        if entry.is_decoded or (set_folder(target, entry.spec) / "spec.json").is_file():
            continue  # what stands there already gets no new name
        rename = f"rename one of them first: `featstore mv {entry.full_name} {entry.dataset}/NEW`"
        check_arrival(there, entry, str(entry.spec["model"]), rename)
        other = arriving.setdefault((entry.dataset, str(entry.spec["model"])), entry)
        kind, held = kind_of(entry.spec), kind_of(other.spec)
        if held != kind:
            raise ConfigError(
                f"{entry.full_name} holds {SAID[kind]} and {other.full_name} {SAID[held]} under one name; {rename}"
            )


def num_blocks(store: Store, selectors: list[str]) -> int:
    """Blocks of the sets that a merge will look at, all array groups counted."""
    entries = [store.entry(selector) for selector in selectors] or store.entries()
    books = [(ledger.read_ledger(entry.folder), int(entry.spec["layout"]["block_rows"])) for entry in entries]
    return sum(len(book.groups) * len(book.blocks(size)) for book, size in books)


def _is_there(entry: Entry, target: Place) -> bool:
    """Whether the target has the set.

    Raises:
        ConfigError: what stands in its place is another set.
    """
    folder = set_folder(target, entry.spec)
    if not (folder / "spec.json").is_file():
        return False
    held = read_spec(folder)["fingerprint"]
    if held != entry.spec["fingerprint"]:
        raise ConfigError(
            f"{folder} is the set of another fingerprint ({held[:16]}..., the source has "
            f"{entry.spec['fingerprint'][:16]}...); extract one of them under another --name"
        )
    if any((folder / name).is_file() for name in (BEGUN, SEALED)):
        raise ConfigError(
            f"{folder} is archived and takes no rows; run `featstore unarchive` first, or merge into another store"
        )
    ours, theirs = OwnedSet(folder), OwnedSet(entry.folder)
    for name in sorted(ours.book.arrays.keys() & theirs.book.arrays.keys()):
        pair = [side.reduction(name) for side in (ours, theirs)]
        values = [reduction.parameters if reduction is not None else {} for reduction in pair]
        if any(not np.array_equal(values[0][key], values[1].get(key, np.empty(0))) for key in values[0]):
            raise ConfigError(
                f"{entry.full_name}: the two stores fitted other parameters to reduce {name}, so their rows do not go "
                "together; extract both parts from one copy of the set's folder (spec.json and reductions)"
            )
    return True


def _refuse(results: list[Merged], keep: str | None) -> None:
    found = [text for result in results for text in result.conflicts]
    if found and keep is None:
        raise CorruptError(
            f"{len(found)} blocks hold other numbers in the two stores:\n  " + "\n  ".join(found[:10]) + "\nfind out "
            "which is right (`featstore recheck`); --keep target leaves those of the target and merges the rest"
        )


class _Pair:
    """One set of the source and the same set of the target."""

    def __init__(self, entry: Entry, target: Place):
        self.name = entry.full_name
        self.dataset, self.datasets = entry.dataset, target / "datasets"
        self.source, self.target = OwnedSet(entry.folder), OwnedSet(set_folder(target, entry.spec))
        self.tolerance = parity_of(entry.spec)

    def compare(self, result: Merged) -> None:
        """Look at the blocks that the target has already; writes nothing."""
        for group in self.target.book.groups:
            for block, start, stop in self.target.book.blocks(self.target.block_rows):
                if self.target.commit(group, block) is not None:
                    self._compare_block(group, block, range(start, stop), result)

    def bring(self, result: Merged, advance: Callable[[int], None]) -> None:
        """Fill every block of the target that lacks a commit and whose rows the source has."""
        left: set[int] = set()
        for group, arrays in self.target.book.groups.items():
            for block, start, stop in self.target.book.blocks(self.target.block_rows):
                if self.target.commit(group, block) is None:
                    rows, states = self._match(group, block, range(start, stop))
                    if states is not None:
                        self._fill(arrays, (group, block, start, stop), rows, states, result)
                    else:
                        left.update(rows[rows >= 0].tolist())
                advance(1)
        result.left = len(left)

    @cached_property
    def _same_rows(self) -> bool:
        """Whether equal row numbers mean equal samples throughout."""
        names = {path.name for side in (self.source, self.target) for path in (side.folder / "rows").glob("*.parquet")}
        both = [[side.folder / "rows" / name for side in (self.source, self.target)] for name in sorted(names)]
        return all(a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes() for a, b in both)

    def _match(self, group: str, block: int, wanted: range) -> tuple[Int64[np.ndarray, " K"], list[RowState] | None]:
        """(committed row of the source for each row, -1 without one; their states if every row has one)."""
        arrays = [array.name for array in self.target.book.groups[group]]
        rows = np.full(len(wanted), -1, np.int64)
        theirs = self._same_block(group, block, wanted)
        if theirs is not None:
            return np.array(wanted), [RowState(theirs.content(row), theirs.failed.get(row)) for row in wanted]
        if any(name not in self.source.book.arrays for name in arrays):
            return rows, None
        groups = list(dict.fromkeys(self.source.book.group_of(name) for name in arrays))
        states: list[RowState] = []
        for place, row in enumerate(wanted):
            owner = self.target.owners.get(row)
            found: dict[int, RowState] = {}
            for candidate in self._candidates(row, owner):
                known = [self.source.state(name, candidate) for name in groups]
                # Two groups may have been computed from different states of a file.
                if known[0] is not None and all(state == known[0] for state in known):
                    found[candidate] = known[0]
            expected = self._expected(row, owner)
            if expected is not None:
                found = {row: state for row, state in found.items() if state.content in (expected, NO_CONTENT)}
            if len(found) == 1:
                ((rows[place], state),) = found.items()
                states.append(state)
        return rows, states if len(states) == len(wanted) else None

    def _same_block(self, group: str, block: int, wanted: range) -> Commit | None:
        """The source's commit of the same rows, where no file content speaks against it."""
        names = [[array.name for array in side.book.groups.get(group, [])] for side in (self.source, self.target)]
        theirs = self.source.commit(group, block) if names[0] == names[1] else None
        if theirs is None or (theirs.start, theirs.stop) != (wanted.start, wanted.stop) or not self._same_rows:
            return None
        ours = [self.target.commit(name, block) for name in self.target.book.groups]
        return theirs if all(other is None or other.contents == theirs.contents for other in ours) else None

    def _candidates(self, row: int, owner: tuple[str, int] | None) -> list[int]:
        if self.source.owners.get(row) == owner and (self._same_rows or owner is None):
            return [row]
        return [] if owner is None else self.source.rows_of.get(owner, [])

    def _expected(self, row: int, owner: tuple[str, int] | None) -> str | None:
        """Content hash that the target's row must have, where a commit of another group or a manifest says so."""
        for group in self.target.book.groups:
            state = self.target.state(group, row)
            if state is not None and state.content != NO_CONTENT:
                return state.content
        return None if owner is None else self._stated.get(row)

    @cached_property
    def _stated(self) -> dict[int, str]:
        """Row -> content hash that a manifest of the target states."""
        found: dict[int, str] = {}
        for path in sorted((self.target.folder / "rows").glob("*.parquet")):
            manifest = manifests.load(self.datasets, self.dataset, path.stem)
            contents = manifest.column("content")
            if any(contents):
                rows = ledger.read_rows(self.target.folder, path.stem).tolist()
                found.update({row: content for row, content in zip(rows, contents) if content is not None})
        return found

    def _fill(
        self,
        arrays: list[ArraySpec],
        where: tuple[str, int, int, int],
        rows: Int64[np.ndarray, " K"],
        states: list[RowState],
        result: Merged,
    ) -> None:
        group, block, start, stop = where
        step = _step(arrays)
        with BlockWriter(self.target.folder, group, arrays, block, start, stop, self.target.block_rows) as writer:
            for first in range(0, len(rows), step):
                piece = rows[first : first + step]
                values = {array.name: self.source.read(array.name, piece) for array in arrays}
                writer.append(values, states[first : first + step])
            won = writer.commit()
        if won:
            result.copied += 1
            result.rows += len(rows)
        else:  # somebody else committed other bytes meanwhile
            self.target.forget(group, block)
            self._compare_block(group, block, range(start, stop), result)

    def _compare_block(self, group: str, block: int, wanted: range, result: Merged) -> None:
        """A block that the target has: whether the source's rows of it say the same."""
        there = self.source.book.arrays
        arrays = [array for array in self.target.book.groups[group] if array.name in there]
        if not arrays:
            return
        held = self.target.commit(group, block)
        assert held is not None
        theirs = self.source.commit(group, block) if group in self.source.book.groups else None
        if theirs == held and all(self.source.owners.get(row) == self.target.owners.get(row) for row in wanted):
            result.equal += 1
            return
        rows, others = self._pairs(arrays, wanted)
        if not len(rows):
            return
        states = [(self.target.state(group, int(a)), self._source_state(arrays, int(b))) for a, b in zip(rows, others)]
        kinds = [_kind(ours, other) for ours, other in states]
        foreign = kinds.count("other file")
        if foreign:
            text = f"{foreign} rows, such as {self.target.owners.get(int(rows[kinds.index('other file')]))}"
            result.conflicts.append(f"{self.name} {group} block {block}: {text}, were read from other image bytes")
            return
        result.failed_here_only += kinds.count("failed here")
        good = np.array([kind == "both" for kind in kinds])
        worst, limit = self._worst(arrays, rows[good], others[good])
        if worst > limit:
            result.conflicts.append(
                f"{self.name} {group} block {block}: relative difference {worst:.2g}, more than {limit:.2g}"
            )
        elif worst > 0:
            result.within_parity += 1
        else:
            result.equal += 1

    def _pairs(self, arrays: list[ArraySpec], wanted: range) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " K"]]:
        """Rows of the target and committed rows of the source that hold the same sample in all these arrays."""
        found = []
        for row in wanted:
            owner = self.target.owners.get(row)
            known = [c for c in self._candidates(row, owner) if self._source_state(arrays, c) is not None]
            expected = self._expected(row, owner)
            exact = [c for c in known if (state := self._source_state(arrays, c)) and state.content == expected]
            if exact or len(known) == 1:
                found.append((row, (exact or known)[0]))
        pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def _source_state(self, arrays: list[ArraySpec], row: int) -> RowState | None:
        groups = {self.source.book.group_of(array.name) for array in arrays}
        states = [self.source.state(group, row) for group in sorted(groups)]
        return None if any(state is None for state in states) else states[0]

    def _worst(
        self, arrays: list[ArraySpec], rows: Int64[np.ndarray, " K"], others: Int64[np.ndarray, " K"]
    ) -> tuple[float, float]:
        """(largest relative difference, what is allowed), of the array in which they come closest or cross."""
        found, step = [(0.0, self.tolerance)], _step(arrays)
        for first in range(0, len(rows), step):
            for array in arrays:
                reduction = self.target.reduction(array.name)
                a, b = (
                    as_tokens(side.read(array.name, picked[first : first + step]), reduction)
                    for side, picked in ((self.target, rows), (self.source, others))
                )
                found.append((float(row_differences(a, b).max()), parity_limit(self.tolerance, a, reduction)))
        return max(found, key=lambda pair: pair[0] / pair[1])


def _kind(ours: RowState | None, theirs: RowState | None) -> str:
    assert ours is not None
    assert theirs is not None
    if NO_CONTENT not in (ours.content, theirs.content) and ours.content != theirs.content:
        return "other file"
    if ours.reason is None and theirs.reason is None:
        return "both"
    return "failed here" if theirs.reason is None else "failed"


def _step(arrays: list[ArraySpec]) -> int:
    """Rows of a piece, all arrays of a group together."""
    return max(1, PIECE_BYTES // sum(array.row_bytes for array in arrays))


def _prepare(store: Store, entry: Entry, target: Place) -> None:
    """Make the target know the source's manifests, arrays and rows, in the order of the extraction."""
    folder = set_folder(target, entry.spec)
    mapped = sorted((entry.folder / "rows").glob("*.parquet"))
    current = store.manifest(entry.dataset).short
    # The current manifest first: a target without the data set calls it current too.
    for path in sorted(mapped, key=lambda item: item.stem != current):
        bring_manifest(store.datasets_folder, target / "datasets", entry.dataset, path.stem)
    # What describes reduced arrays must be there before they are.
    for path in sorted((entry.folder / "reductions").glob("*")):
        files.create_exclusive(folder / "reductions" / path.name, path.read_bytes())
    files.create_exclusive(folder / "spec.json", (entry.folder / "spec.json").read_bytes())
    # Blocks of another size are other blocks, whatever numbers they have.
    same_blocks = read_spec(folder)["layout"] == read_spec(entry.folder)["layout"]
    if same_blocks and _follow_ledger(entry.folder, folder) and _same_mappings(mapped, folder):
        for path in mapped:
            there = folder / "rows" / path.name
            files.create_exclusive(there, path.read_bytes())
            ledger.seal_rows(there)
    else:
        for arrays in ledger.read_ledger(entry.folder).groups.values():
            ledger.add_arrays(folder, [replace(array, shard_rows=0, chunk_rows=0) for array in arrays])
        for path in mapped:
            manifest = manifests.load(target / "datasets", entry.dataset, path.stem)
            ledger.add_rows(folder, manifest, lambda: committed_contents(folder))
    book = ledger.read_ledger(folder)
    spec = read_spec(folder)
    ledger.write_metadata(folder, spec, book)
    commits.finish_intents(folder, book, int(spec["layout"]["block_rows"]))
    commits.sweep_attempts(folder, older_than=commits.STALE_SECONDS)


def _bring_runs(source: Place, target: Place) -> None:
    """How the source's blocks were computed."""
    for path in sorted((source / "runs").glob("*.json")):
        data = path.read_bytes()
        files.unseal(data, path)
        files.create_exclusive(target / "runs" / path.name, data)


def bring_manifest(source: Place, target: Place, name: str, short: str) -> None:
    """Copy one manifest; what the target calls current stays.

    Raises:
        ManifestError: it is damaged in the source, or the target has another one whose digest begins alike.
    """
    wanted = manifests.load(source, name, short)
    for _ in range(3):  # two merges from different sources may mix the two files of one manifest for a moment
        try:
            held = manifests.load(target, name, short)
        except (ManifestError, UnknownNameError):
            home = target / name / short
            for file in ("manifest.parquet", "source.toml"):
                files.write_atomic(home / file, (source / name / short / file).read_bytes())
            files.create_exclusive(target / name / "current", short.encode() + b"\n")
            continue
        if held.digest != wanted.digest:
            raise ManifestError(
                f"data set {name!r}: the manifests {short} of the two stores have different digests; register one of "
                "them under another name"
            )
        return
    raise ManifestError(f"{target / name / short}: the manifest copied does not read back; run the merge again")


def _follow_ledger(source: Place, target: Place) -> bool:
    """Append the source's entries to the target's, as long as those before are the same."""
    number = 0
    while (theirs := ledger.entry_path(source, number)).is_file():
        ours, data = ledger.entry_path(target, number), theirs.read_bytes()
        files.unseal(data, theirs)
        if not files.create_exclusive(ours, data) and ours.read_bytes() != data:
            return False
        number += 1
    return True


def _same_mappings(mapped: list[Place], folder: Place) -> bool:
    """Whether the mappings that both sets have are the same; with equal ledgers the others can then be copied."""
    pairs = [(path, folder / "rows" / path.name) for path in mapped]
    return all(not there.is_file() or there.read_bytes() == path.read_bytes() for path, there in pairs)


def committed_contents(folder: Place) -> dict[int, str]:
    """Content hash of every committed row of a set."""
    found: dict[int, str] = {}
    for group in ledger.read_ledger(folder).groups:
        for block in sorted(commits.committed_blocks(folder, group)):
            commit = commits.read_commit(folder, group, block)
            for row in range(commit.start, commit.stop):
                found.setdefault(row, commit.content(row))
    return found
