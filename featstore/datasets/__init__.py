"""Data set families: folder layout -> manifest. A new family is one file here and one line in DATASETS."""

import inspect
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from types import UnionType
from typing import Any, get_args, get_type_hints

from featstore.datasets.source import Source
from featstore.errors import ConfigError, ManifestError, UnknownNameError

# name -> function(root, **options) -> Source
DATASETS = {
    "ac34": "featstore.datasets.em:read_ac34",
    "acdc": "featstore.datasets.cardiac:read_acdc",
    "amos": "featstore.datasets.amos:read",
    "autolaparo": "featstore.datasets.autolaparo:read",
    "autopet": "featstore.datasets.pet:read_autopet",
    "bcnb": "featstore.datasets.bcnb:read",
    "brain-tumor": "featstore.datasets.brain_tumor:read",
    "camelyon16": "featstore.datasets.camelyon:read_16",
    "camelyon17": "featstore.datasets.camelyon:read_17",
    "camus": "featstore.datasets.cardiac:read_camus",
    "chexpert": "featstore.datasets.chexpert:read",
    "coco": "featstore.datasets.coco:read",
    "cremi": "featstore.datasets.em:read_cremi",
    "ct-rate": "featstore.datasets.ct_rate:read",
    "digits": "featstore.datasets.digits:read",
    "edd2020": "featstore.datasets.edd2020:read",
    "endovis18": "featstore.datasets.endovis:read",
    "folder": "featstore.datasets.folder:read",
    "hecktor": "featstore.datasets.pet:read_hecktor",
    "image-masks": "featstore.datasets.image_masks:read",
    "kvasir-capsule": "featstore.datasets.kvasir:read",
    "mimic-cxr": "featstore.datasets.mimic:read",
    "montgomery": "featstore.datasets.tuberculosis:read_montgomery",
    "msd": "featstore.datasets.msd:read",
    "nih": "featstore.datasets.nih:read",
    "padchest": "featstore.datasets.padchest:read",
    "phantom": "featstore.datasets.phantom:read",
    "rsna": "featstore.datasets.rsna:read",
    "sars-cov-2": "featstore.datasets.sars_cov_2:read",
    "shenzhen": "featstore.datasets.tuberculosis:read_shenzhen",
    "table": "featstore.datasets.table:read",
    "vindr-cxr": "featstore.datasets.vindr:read_cxr",
    "vindr-pcxr": "featstore.datasets.vindr:read_pcxr",
}
# These write their own images, so `register NAME` needs no root.
GENERATED = ("digits", "phantom")
# Parameters of adapters that have a flag of their own.
FLAGS = (
    "table", "path_column", "id_column", "label_columns", "group_column", "split_column", "mask_column",
    "study_column", "seed", "frames",
)  # fmt: skip


def choose_adapter(name: str, adapter: str | None, table: Path | None) -> str:
    """The adapter asked for; else `table` with a table, the family named like the data set, or `folder`.

    Raises:
        UnknownNameError: no such adapter.
    """
    if adapter is None:
        adapter = "table" if table is not None else name if name in DATASETS else "folder"
    if adapter not in DATASETS:
        raise UnknownNameError(f"unknown adapter {adapter!r}; known: {', '.join(sorted(DATASETS))}")
    return adapter


def parse_options(adapter: str, texts: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts as keyword arguments of an adapter, converted to the types that its function declares.

    An option is a keyword-only parameter whose type is str, int, float, bool, or a Literal of texts, or one of these
    and None. A dash in KEY is an underscore.

    Raises:
        ConfigError: no KEY=VALUE, a key that the adapter does not know, or a value of another type.
    """
    function = resolve_name(DATASETS[adapter])
    hints = get_type_hints(function)
    known = [name for name, item in inspect.signature(function).parameters.items() if item.kind is item.KEYWORD_ONLY]
    known = [name for name in known if name not in FLAGS]
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or key not in known or key in values:
            has = f"takes {', '.join(known)}" if known else "takes none"
            raise ConfigError(f"--option is KEY=VALUE, each key once; the adapter {adapter!r} {has}; got {text!r}")
        values[key] = _convert(adapter, key, value.strip(), hints[key])
    return values


def _convert(adapter: str, key: str, text: str, hint: Any) -> Any:
    kinds = [kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)) if kind is not type(None)]
    for kind in kinds:
        choices = get_args(kind)
        if choices:
            if text in choices:
                return text
            raise ConfigError(f"--option {key}: the adapter {adapter!r} knows {', '.join(choices)}; got {text!r}")
        if kind is bool and text.lower() in ("true", "false", "yes", "no", "1", "0"):
            return text.lower() in ("true", "yes", "1")
        if kind is not bool:
            with suppress(ValueError):
                return kind(text)
    names = " or ".join(kind.__name__ for kind in kinds)
    raise ConfigError(f"--option {key}: the adapter {adapter!r} takes {names} there; got {text!r}")


def explain(adapter: str) -> str:
    """What `featstore datasets NAME` prints: the adapter's own words, then its options and their defaults."""
    module, _, name = DATASETS[adapter].partition(":")
    # A file with several adapters explains each in its function.
    text = inspect.getdoc(resolve_name(module) if name == "read" else resolve_name(DATASETS[adapter])) or ""
    parameters = inspect.signature(resolve_name(DATASETS[adapter])).parameters.values()
    options = [item for item in parameters if item.kind is item.KEYWORD_ONLY and item.name not in FLAGS]
    hints = get_type_hints(resolve_name(DATASETS[adapter]))
    lines = [f"  --option {item.name}={_shown(item.default)}  ({_choices(hints[item.name])})" for item in options]
    return "\n".join([text, *(["", "Options of `featstore register`, with their defaults:", *lines] if lines else [])])


def _shown(default: Any) -> str:
    return "..." if default in (None, "") else str(default)


def _choices(hint: Any) -> str:
    kinds = [kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)) if kind is not type(None)]
    return " or ".join(", ".join(map(str, get_args(kind))) or kind.__name__ for kind in kinds)


def read_source(adapter: str, root: Path, **options: Any) -> Source:
    """Run an adapter on a folder.

    Raises:
        ManifestError: the folder does not exist or has another layout.
    """
    if adapter not in GENERATED and not root.is_dir():
        raise ManifestError(f"{root}: no such folder; ROOT is the folder that holds the data set's images")
    source: Source = resolve_name(DATASETS[adapter])(root, **options)
    return source
