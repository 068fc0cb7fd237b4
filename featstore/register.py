"""`register`: run an adapter, freeze its source as the current manifest of a name."""

from pathlib import Path

from featstore import files
from featstore.configs import RegisterConfig
from featstore.datasets import GENERATED, choose_adapter, manifest, parse_options, read_source
from featstore.datasets.manifest import Manifest
from featstore.errors import ConfigError, ManifestError, UnknownNameError
from featstore.objects import Place, as_object
from featstore.store.catalog import Store
from featstore.store.layout import check_store


def register(
    store_path: Place, name: str, root: Path | None, config: RegisterConfig
) -> tuple[Manifest, Manifest | None]:
    """Register or re-register a data set; returns the new current manifest and the one before, if any.

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
    doubted = manifest.earlier_ids(store.datasets_folder, name)
    try:
        before = store.manifest(name)
    except UnknownNameError:
        before = None
    except ManifestError:
        # Damaged, and registering is what mends it; what it said of the files is lost, so all of them are hashed.
        before, doubted = None, set(source.table.column("id").to_pylist())
    result = manifest.build(name, source, allow_missing=config.allow_missing, before=before, doubted=doubted)
    manifest.save(store.datasets_folder, result)
    return result, before
