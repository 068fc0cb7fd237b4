"""Hashes of the files behind samples, whoever took them, and the samples that are equal by them."""

from collections.abc import Sequence
from dataclasses import dataclass

from featstore import files
from featstore.datasets.manifest import Manifest
from featstore.errors import CorruptError, IncompleteError
from featstore.objects import Place, as_object
from featstore.store import commits, ledger
from featstore.store.catalog import Store

RUNS, SURVEYS = "finetune", "surveys"  # in a store: of each data set, what was trained on it, and on which bytes
NO_CONTENT = "0" * commits.HASH_HEX  # rows whose bytes were never read


def file_hashes(store: Store, manifest: Manifest) -> list[str | None]:
    """Content hash of each sample's file: of registration, else of any set or training for which its bytes were read.

    Raises:
        CorruptError: what a set keeps of them is damaged.
    """
    found = [taken or stated for taken, stated in zip(manifest.hashes(), manifest.column("content"))]
    for entry in store.entries(manifest.name):
        open_rows = [row for row, value in enumerate(found) if value is None]
        if not open_rows:
            break
        try:
            rows = ledger.read_rows(entry.folder, manifest.short)
        except IncompleteError:  # made for another manifest
            continue
        held: dict[int, str] = {}
        for group in ledger.read_ledger(entry.folder).groups:
            for commit in commits.read_commits(entry.folder, group).values():
                held.update((row, commit.content(row)) for row in range(commit.start, commit.stop))
        for row in open_rows:
            value = held.get(int(rows[row]))
            if value is not None and value != NO_CONTENT:
                found[row] = value
    if None in found:
        for piece in read_surveys(store, manifest.name).pieces:
            if piece.manifest == manifest.digest:
                for row, value in zip(piece.rows, piece.contents):
                    found[row] = found[row] or value
    return found


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a survey: images that training has read, or is about to; `contents` are None where nobody knows them."""

    manifest: str  # digest
    rows: list[int]
    ids: list[str]
    contents: list[str | None]


@dataclass(frozen=True, slots=True)
class Surveys:
    """All that is kept of the images that networks were trained on; `is_whole`: no part of it is damaged or gone."""

    pieces: list[Piece]
    is_whole: bool


def surveys_folder(root: Place, name: str) -> Place:
    """Where a store keeps what became of a data set's images in training."""
    return root / RUNS / name / SURVEYS


def read_surveys(store: Store, name: str) -> Surveys:
    """What looks through a data set's images have found before a network was trained on them."""
    folder = surveys_folder(store.path, name)
    pieces, is_whole = [], True
    for path in sorted(folder.glob("*/*.json")):
        try:
            body = files.unseal(path.read_bytes(), path)
            contents = [None if value == NO_CONTENT else value for value in body["contents"]]
            pieces.append(Piece(body["manifest"], body["rows"], body["ids"], contents))
        except FileNotFoundError:  # what was in it is in another one by now
            continue
        except (CorruptError, KeyError):  # its images are looked at again when they are trained on
            is_whole = False
    return Surveys(pieces, is_whole and (bool(pieces) or not _was_trained_on(store, name)))


def _was_trained_on(store: Store, name: str) -> bool:
    if as_object(store.path) is not None:  # runs are never kept in a bucket
        return False
    return any(path.is_dir() and path.name != SURVEYS for path in (store.path / RUNS / name).glob("*"))


def equal_rows(hashes: Sequence[str | None], parts: Sequence[str | None]) -> list[list[int]]:
    """Rows that are the same part of files with the same bytes, two or more each; slices of one file are not equal."""
    held: dict[tuple[str, str], list[int]] = {}
    for row, (value, part) in enumerate(zip(hashes, parts)):
        if value is not None:
            held.setdefault((value, part or ""), []).append(row)
    return [rows for rows in held.values() if len(rows) > 1]
