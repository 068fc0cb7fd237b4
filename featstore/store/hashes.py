"""Hashes of the files behind samples, whoever took them, and the samples that are equal by them."""

from collections.abc import Iterator, Sequence

from featstore import files
from featstore.datasets.manifest import Manifest
from featstore.errors import CorruptError, IncompleteError
from featstore.objects import as_object
from featstore.store import commits, ledger
from featstore.store.catalog import Store

SURVEYS = "finetune/{}/surveys"  # in a store: pieces that name a manifest, its rows and the hashes of their files
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
        for row, value in _surveyed(store, manifest):
            found[row] = found[row] or value
    return found


def _surveyed(store: Store, manifest: Manifest) -> Iterator[tuple[int, str]]:
    """(row, hash) of images that were looked through before a network was trained on them."""
    if as_object(store.path) is not None:  # runs are never kept in a bucket
        return
    for path in sorted((store.path / SURVEYS.format(manifest.name)).glob("*/*.json")):
        try:
            body = files.unseal(path.read_bytes(), path)
        except CorruptError:  # its images are looked at again when they are trained on, and written in another
            continue
        if body.get("manifest") == manifest.digest:
            for row, value in zip(body["rows"], body["contents"], strict=True):
                if value and value != NO_CONTENT:
                    yield row, value


def equal_rows(hashes: Sequence[str | None], parts: Sequence[str | None]) -> list[list[int]]:
    """Rows that are the same part of files with the same bytes, two or more each; slices of one file are not equal."""
    held: dict[tuple[str, str], list[int]] = {}
    for row, (value, part) in enumerate(zip(hashes, parts)):
        if value is not None:
            held.setdefault((value, part or ""), []).append(row)
    return [rows for rows in held.values() if len(rows) > 1]
