"""What a set needs on disk before its first row, or before rows of another manifest, can be written; no torch."""

from featstore import files
from featstore.extraction.plan import Plan, committed_contents
from featstore.store import commits, ledger
from featstore.store.layout import check_store


def is_prepared(plan: Plan) -> bool:
    """Whether the set knows every sample of the manifest already."""
    return ledger.rows_path(plan.folder, plan.manifest.short).is_file()


def prepare(plan: Plan) -> None:
    """Create the set, its arrays and rows on disk, and finish or sweep what killed writers left."""
    check_store(plan.folder.parents[2], create=True)
    files.create_exclusive(plan.folder / "spec.json", files.sealed(plan.spec))
    ledger.add_arrays(plan.folder, plan.arrays)
    ledger.add_rows(plan.folder, plan.manifest, lambda: committed_contents(plan.folder))
    book = ledger.read_ledger(plan.folder)
    ledger.write_metadata(plan.folder, plan.spec, book)
    commits.finish_intents(plan.folder, book, int(plan.spec["layout"]["block_rows"]))
    commits.sweep_attempts(plan.folder, older_than=commits.STALE_SECONDS)
