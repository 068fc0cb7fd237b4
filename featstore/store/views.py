"""Augmented views: sets that hold the same embeddings of augmented copies of the images, found from their plain set."""

from collections.abc import Collection
from typing import Any

from featstore.configs import Augmentation
from featstore.errors import ConfigError, IncompleteError
from featstore.request import command_of, request_of
from featstore.store.catalog import Entry, Store
from featstore.store.features import FeatureSet
from featstore.store.layout import augment_of, without_augment

VECTORS = ("cls", "mean_patch")


def is_view(spec: dict[str, Any]) -> bool:
    """Whether a set holds augmented copies of the images, and not the images themselves."""
    return augment_of(spec) is not None


def views_of(
    store: Store, features: FeatureSet, recipe: Augmentation | None = None, *, seed: int | None = None
) -> list[FeatureSet]:
    """The augmented views of a set that have every row of its manifest, by ascending number; empty where there is none.

    They are the sets of its data set that were made as it was in everything but the augmentation, whatever their name.

    Raises:
        ConfigError: there are views of several recipes or seeds, and `recipe` and `seed` do not say which are meant; or
            `features` is itself a view.
    """
    if is_view(features.spec):
        raise ConfigError(f"{features.name} is itself an augmented view; ask for the views of its plain set")
    wanted = without_augment(features.spec["identity"])
    found: dict[tuple[str, int], dict[int, FeatureSet]] = {}
    for entry in store.entries(features.spec["dataset"]):
        augment = augment_of(entry.spec)
        if augment is None or without_augment(entry.spec["identity"]) != wanted:
            continue
        if recipe not in (None, augment["recipe"]) or seed not in (None, augment["seed"]):
            continue
        view = _open_complete(store, entry, features)
        if view is not None:
            found.setdefault((augment["recipe"], augment["seed"]), {})[augment["view"]] = view
    if len(found) > 1:
        kinds = ", ".join(f"{len(views)} of {name} (seed {number})" for (name, number), views in sorted(found.items()))
        raise ConfigError(
            f"{features.name} has augmented views of several kinds: {kinds}; say which by recipe, or by seed"
        )
    return [view for views in found.values() for _, view in sorted(views.items())]


def _open_complete(store: Store, entry: Entry, features: FeatureSet) -> FeatureSet | None:
    """The set for the same manifest, None where it lacks rows of that."""
    view = store.open(entry, manifest=features.manifest.digest)
    try:
        return None if view.pending().any() else view
    except IncompleteError:
        return None


def views_command(
    features: FeatureSet,
    count: int,
    recipe: Augmentation | None = None,
    *,
    seed: int = 0,
    needs: Collection[str] = (),
) -> str:
    """The command line that makes the first `count` augmented views of a set; what of them is there is kept.

    They get the vectors that the set has (`cls`, `mean_patch`, also of inner layers) and the arrays in `needs`: patch
    tokens are as many for each view as for the set, and most heads on vectors need none.
    """
    request = request_of(features.spec)
    vectors = [name for name in features.arrays if name.rsplit("/", 1)[-1] in VECTORS or name in needs]
    asked = {**request, "views": count, "augment": recipe or "dino", "augment_seed": seed}
    # Reductions are of patch tokens, and part of what the set is.
    arrays = features.arrays if request.get("reduce") or not vectors else vectors
    return command_of({**features.spec, "request": asked}, arrays)
