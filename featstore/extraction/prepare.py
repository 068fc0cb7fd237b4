"""What a set needs on disk before its first row, or before rows of another manifest, can be written; no torch."""

from typing import Any

from featstore import files
from featstore.datasets.manifest import Manifest
from featstore.extraction.claims import sweep_claims
from featstore.extraction.plan import Plan, committed_contents
from featstore.objects import Place
from featstore.store import commits, ledger
from featstore.store.layout import ArraySpec, check_store


def is_prepared(plan: Plan) -> bool:
    """Whether the set knows every sample of the manifest already."""
    return ledger.rows_path(plan.folder, plan.manifest.short).is_file()


def prepare(plan: Plan) -> None:
    """Create the set, its arrays and rows on disk, and finish or sweep what killed writers left."""
    prepare_set(plan.folder, plan.spec, plan.arrays, plan.manifest)


def prepare_set(folder: Place, spec: dict[str, Any], arrays: list[ArraySpec], manifest: Manifest) -> None:
    """`prepare` for a set of any kind."""
    check_store(folder.parents[2], create=True)
    files.create_exclusive(folder / "spec.json", files.sealed(spec))
    ledger.add_arrays(folder, arrays)
    ledger.add_rows(folder, manifest, lambda: committed_contents(folder))
    book = ledger.read_ledger(folder)
    ledger.write_metadata(folder, spec, book)
    commits.finish_intents(folder, book, int(spec["layout"]["block_rows"]))
    commits.sweep_attempts(folder, older_than=commits.STALE_SECONDS)
    sweep_claims(folder)
