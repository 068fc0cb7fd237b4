"""The store as a whole: which data sets and sets it holds, and how a name finds one."""

import html
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from featstore import files
from featstore.datasets import manifest as manifests
from featstore.datasets.manifest import Manifest
from featstore.errors import FeatstoreError, StoreError, UnknownNameError
from featstore.objects import Place, as_object
from featstore.store.bucket import enter
from featstore.store.features import FeatureSet
from featstore.store.layout import DECODED, augment_of, check_store, differences, read_spec, set_name, store_path


@dataclass(frozen=True)
class Entry:
    """A set found on disk, not opened yet."""

    folder: Place
    spec: dict[str, Any]

    @property
    def dataset(self) -> str:
        return str(self.spec["dataset"])

    @property
    def name(self) -> str:
        """`dataset/model@res`."""
        return f"{self.dataset}/{set_name(self.spec)}"

    @property
    def is_decoded(self) -> bool:
        """Whether it holds decoded images, and no embeddings."""
        return bool(self.spec["weights"].get("kind") == DECODED)

    @property
    def is_view(self) -> bool:
        """Whether it holds embeddings of augmented copies, which serve the training of heads alone."""
        return augment_of(self.spec) is not None

    @property
    def full_name(self) -> str:
        """With the fingerprint, where the short name is not unique."""
        return f"{self.name}-{self.spec['fingerprint'][:8]}"


class Store:
    """Data sets and their embeddings in one folder.

    ```python
    store = featstore.open()
    store.sets()
    fs = store["chexpert", "dinov3-base@512"]
    ```
    """

    def __init__(self, path: Place):
        self.path = path
        check_store(path)

    @property
    def datasets_folder(self) -> Place:
        return self.path / "datasets"

    def datasets(self) -> list[str]:
        """Names of the registered data sets."""
        return manifests.names(self.datasets_folder)

    def manifest(self, dataset: str, digest: str | None = None) -> Manifest:
        """The current manifest of a data set, or an older one by the start of its digest."""
        return manifests.load(self.datasets_folder, dataset, digest)

    def entries(self, dataset: str | None = None) -> list[Entry]:
        """Every set, or those of one data set, in alphabetical order.

        Raises:
            CorruptError, SchemaError: the spec of one of them cannot be read.
        """
        found = []
        for item in self._scan(dataset):
            if not isinstance(item, Entry):
                raise item[1]
            found.append(item)
        return found

    def _scan(self, dataset: str | None = None) -> Iterator[Entry | tuple[Place, StoreError]]:
        """Sets in alphabetical order; (folder, why) for one whose spec cannot be read."""
        for path in sorted((self.path / "sets").glob("*/*/spec.json")):
            folder = path.parent
            if folder.name.startswith(".") or dataset not in (None, folder.parent.name):
                continue
            try:
                yield Entry(folder, read_spec(folder))
            except StoreError as error:
                yield folder, error
            except FileNotFoundError:
                continue  # removed just now

    def find(self, dataset: str, model: str | None = None) -> list[Entry]:
        """Sets of a data set that `model` names: `tiny`, `tiny@98` or `tiny@98-1a2b`; without it all with embeddings.

        Augmented views are found under their whole name alone (`tiny@98~dino3`): they belong to their plain set.

        Raises:
            CorruptError, SchemaError: a set that may be meant cannot be read.
        """
        found = []
        for item in self._scan(dataset):
            if isinstance(item, Entry):
                if not (item.is_decoded or item.is_view) if model is None else _matches(item, model):
                    found.append(item)
            elif model is None or item[0].name.startswith(model):
                raise item[1]
        return found

    def entry(self, selector: str) -> Entry:
        """The one set that `dataset/model[@res][-fingerprint]` names.

        Raises:
            UnknownNameError: none or several match; the message lists the candidates and what differs.
        """
        dataset, _, model = selector.partition("/")
        if not model:
            raise UnknownNameError(f"a set is named DATASET/MODEL@RES, got {selector!r}; `featstore ls` lists the sets")
        found = self.find(dataset, model)
        if not found:
            have = ", ".join(entry.name for entry in self.entries(dataset)) or "none; run `featstore extract` first"
            raise UnknownNameError(f"no set {selector!r} in {self.path}; sets of {dataset!r}: {have}")
        if len(found) > 1:
            first = found[0].spec
            lines = [f"  {found[0].full_name}"]
            for other in found[1:]:
                keys = [key for key, _, _ in differences(_facts(first), _facts(other.spec))]
                lines.append(f"  {other.full_name} differs in {', '.join(keys)}")
            raise UnknownNameError(f"{selector!r} names {len(found)} sets; add more of the name:\n" + "\n".join(lines))
        return found[0]

    def set(self, selector: str, *, manifest: str | None = None) -> FeatureSet:
        """Open the set that `dataset/model[@res][-fingerprint]` names, for the current manifest or an older one."""
        return self.open(self.entry(selector), manifest=manifest)

    def open(self, entry: Entry, *, manifest: str | None = None) -> FeatureSet:
        """Open a set found by `entries` or `find`."""
        return FeatureSet(entry.folder, self.manifest(entry.dataset, manifest))

    def __getitem__(self, key: tuple[str, str] | str) -> FeatureSet:
        return self.set(key if isinstance(key, str) else f"{key[0]}/{key[1]}")

    def sets(self) -> list[str]:
        """Names of all sets, with the fingerprint where the short name is not unique."""
        entries = self.entries()
        names = [entry.name for entry in entries]
        return [entry.full_name if names.count(entry.name) > 1 else entry.name for entry in entries]

    def summaries(self) -> list[dict[str, Any]]:
        """One dict a set, as `featstore ls` shows them; a set that cannot be read says why."""
        rows = []
        for item in self._scan():
            if not isinstance(item, Entry):
                folder, damage = item
                name, _, short = folder.name.rpartition("-")
                rows.append({"set": f"{folder.parent.name}/{name}", "fingerprint": short, "error": str(damage)})
                continue
            try:
                rows.append(self.open(item).summary())
            except FeatstoreError as error:
                rows.append({"set": item.name, "fingerprint": item.spec["fingerprint"], "error": str(error)})
        return rows

    def remove(self, selector: str) -> Place:
        """Delete one set; the data set and its images stay. Returns the folder that is gone."""
        folder = self.entry(selector).folder
        if as_object(folder) is not None:
            enter(self.path)
            files.remove_tree(folder, first="spec.json")  # without which it is no set
            return folder
        for left in folder.parent.glob(".removing-*"):  # by a removal that was killed
            shutil.rmtree(left, ignore_errors=True)
        doomed = folder.with_name(f".removing-{files.own_name()}")
        try:
            folder.rename(doomed)  # gone at once for every reader, then emptied
            shutil.rmtree(doomed)
        except OSError as error:
            raise StoreError(f"{folder}: cannot remove ({error.strerror}); check its owner and access") from error
        return folder

    def remove_dataset(self, dataset: str) -> Place:
        """Forget a registered data set; refused while sets of it exist.

        Raises:
            StoreError: it still has sets.
        """
        self.manifest(dataset)
        left = [entry.name for entry in self.entries(dataset)]
        if left:
            raise StoreError(
                f"data set {dataset!r} still has {len(left)} sets ({', '.join(left[:3])}); remove them first"
            )
        folder = self.datasets_folder / dataset
        try:
            (folder / "current").unlink()  # forgotten at once, then emptied
            files.remove_tree(folder)
        except OSError as error:
            raise StoreError(f"{folder}: cannot remove ({error.strerror}); check its owner and access") from error
        return folder

    def __repr__(self) -> str:
        return f"<Store {self.path}: {len(self.datasets())} data sets, {len(self.entries())} sets>"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{html.escape(name)}</td></tr>" for name in self.sets())
        return f"<table><caption>{html.escape(str(self.path))}</caption>{rows}</table>"


def _facts(spec: dict[str, Any]) -> dict[str, Any]:
    return {"resolution": spec["resolution"], **spec["identity"]}


def _matches(entry: Entry, model: str) -> bool:
    name = set_name(entry.spec)
    names = (name,) if entry.is_view else (entry.spec["model"], name)
    return model in names or (entry.folder.name.startswith(model) and model.startswith(f"{name}-"))


def open_store(path: Place | str | None = None) -> Store:
    """Open a store: the argument, else FEATSTORE_HOME, else the platform's user cache folder."""
    return Store(store_path(path))
