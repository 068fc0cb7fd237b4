"""`register`: run an adapter, freeze its source as the current manifest of a name."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from featstore import files
from featstore.configs import RegisterConfig
from featstore.datasets import GENERATED, choose_adapter, manifest, parse_options, read_source
from featstore.datasets.contents import MISSING, History
from featstore.datasets.manifest import Manifest
from featstore.errors import ConfigError, ManifestError, StoreError, UnknownNameError
from featstore.objects import Place, as_object
from featstore.store import commits, ledger
from featstore.store.catalog import Store
from featstore.store.hashes import NO_CONTENT, read_surveys
from featstore.store.layout import check_store

if TYPE_CHECKING:
    import pyarrow as pa


def register(
    store_path: Place,
    name: str,
    root: Path | None,
    config: RegisterConfig,
    *,
    advance: Callable[[int, int], None] | None = None,
) -> tuple[Manifest, Manifest | None]:
    """Register or re-register a data set; returns the new current manifest and the one before, if any.

    `advance` is told how many files were just hashed, and of how many.

    Raises:
        ManifestError, ConfigError: see the adapters and `manifest.build`.
    """
    manifest.check_name(name)
    adapter = choose_adapter(name, config.adapter, config.table)
    store = Store(store_path)
    if root is None:
        if adapter not in GENERATED:
            raise ConfigError(
                f"`featstore register {name}` needs the folder of its images: featstore register {name} ROOT"
            )
        # Images lie on a disk, also where what is made of them does not.
        root = (store.path if as_object(store.path) is None else files.user_cache()) / "generated" / name
    options = {**config.options(adapter), **parse_options(adapter, config.option)}
    check_store(store.path, create=True)
    source = read_source(adapter, root, **options)
    try:
        before = store.manifest(name)
    except UnknownNameError:
        before = None
    except ManifestError:
        before = None  # damaged, and registering is what mends it: no file is taken for what it was
    result = manifest.build(
        name,
        source,
        allow_missing=config.allow_missing,
        before=before,
        gather=lambda ids: history(store, name, ids),
        hash_all=config.hash,
        advance=advance,
    )
    manifest.save(store.datasets_folder, result)
    return result, before


def history(store: Store, name: str, ids: "pa.Array") -> History:
    """What manifests, sets and trainings of a data set say of the earlier bytes of these samples.

    A sample that is mapped to a row which nobody has computed yet is in doubt, unless something else tells what it was:
    a run that is still going may be about to commit it. So is one that a training was about to read.
    """
    folders = [path.parent for path in sorted((store.path / "sets" / name).glob("*/spec.json"))]
    mappings = [path for folder in folders for path in sorted((folder / "rows").glob("*.parquet"))]
    found = manifest.earlier(store.datasets_folder, name, ids, {path.stem for path in mappings})
    open_rows: set[str] = set()
    for folder in folders:
        try:
            open_rows |= _add_rows(folder, ids, found)
        except StoreError:  # damaged: nobody knows what its rows were computed from
            found.stated.update(ids.to_pylist())
    open_rows |= _add_surveys(store, name, ids, found)
    found.stated.update(open_rows - found.hashes.keys())
    return found


def _add_rows(folder: Place, ids: "pa.Array", found: History) -> set[str]:
    """Add the hashes of a set's rows; returns the samples with a row whose bytes are not known."""
    import pyarrow.compute as pc

    mapped: dict[int, set[str]] = {}
    for path in sorted((folder / "rows").glob("*.parquet")):
        table = ledger.read_mapping_table(path)
        table = table.filter(pc.is_in(table.column("id"), value_set=ids))
        for sample, size, row in zip(*(table.column(key).to_pylist() for key in ("id", "size", "row"))):
            if size != MISSING:
                mapped.setdefault(row, set()).add(sample)
    if not mapped:
        return set()
    known: set[int] = set()
    for group in ledger.read_ledger(folder).groups:
        for commit in commits.read_commits(folder, group).values():
            for row in mapped.keys() & range(commit.start, commit.stop):
                if (content := commit.content(row)) != NO_CONTENT:
                    known.add(row)
                    for sample in mapped[row]:
                        found.hashes.setdefault(sample, set()).add(content)
    return {sample for row in mapped.keys() - known for sample in mapped[row]}


def _add_surveys(store: Store, name: str, ids: "pa.Array", found: History) -> set[str]:
    """Add the hashes of images that networks were trained on; returns the samples whose bytes are not known."""
    import pyarrow as pa
    import pyarrow.compute as pc

    held = read_surveys(store, name)
    if not held.is_whole:
        found.stated.update(ids.to_pylist())
    columns = {
        "id": pa.chunked_array([piece.ids for piece in held.pieces], ids.type),
        "content": pa.chunked_array([piece.contents for piece in held.pieces], pa.string()),
    }
    table = pa.table(columns)
    # Images are looked at anew for every preprocessing: most are there often.
    table = table.filter(pc.is_in(table.column("id"), value_set=ids)).group_by(["id", "content"]).aggregate([])
    open_rows = set()
    for sample, content in zip(table.column("id").to_pylist(), table.column("content").to_pylist()):
        if content is None:
            open_rows.add(sample)
        else:
            found.hashes.setdefault(sample, set()).add(content)
    return open_rows
