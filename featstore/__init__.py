"""featstore: extract frozen embeddings once, probe them forever.

```python
import featstore
store = featstore.open()
fs = store["chexpert", "dinov3-base@512"]
fs.cls[[5, 0, 5]], fs.load("cls+mean_patch"), fs.rows
```
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from featstore.store.catalog import Store as Store
    from featstore.store.catalog import open_store as open
    from featstore.store.features import FeatureSet as FeatureSet

__all__ = ["FeatureSet", "Store", "__version__", "open"]

_LAZY = {
    "open": "featstore.store.catalog:open_store",
    "Store": "featstore.store.catalog:Store",
    "FeatureSet": "featstore.store.features:FeatureSet",
}


def __getattr__(name: str) -> Any:
    # Deferred so that `import featstore` and `featstore --help` stay light.
    if name in _LAZY:
        from pkgutil import resolve_name

        return resolve_name(_LAZY[name])
    raise AttributeError(f"module 'featstore' has no attribute {name!r}")
