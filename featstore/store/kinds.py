"""Imported, random and real weights never share a name: a listing or a table must not show one for the other."""

from typing import Any, Literal

from featstore.errors import ConfigError
from featstore.store.catalog import Entry, Store

Kind = Literal["imported", "random", "real"]
RANDOM_ENDING = "-random"
SAID = {"imported": "imported features", "random": "random weights", "real": "a network with trained weights"}


def kind_of(spec: dict[str, Any]) -> Kind:
    """What the numbers of a set with embeddings come from."""
    if spec["weights"]["kind"] == "imported":
        return "imported"
    return "random" if spec["random_weights"] else "real"


def check_random_name(model: str, advice: str = "choose another name") -> None:
    """Refuse a name that says "random weights" for anything else.

    Raises:
        ConfigError: it ends in `-random`.
    """
    if model.lower().endswith(RANDOM_ENDING):
        raise ConfigError(f"{model}: names that end in {RANDOM_ENDING} are those of random weights; {advice}")


def check_kind(
    store: Store,
    dataset: str,
    model: str,
    kind: Kind,
    *,
    but: str | None = None,
    advice: str = "choose another --name",
) -> None:
    """Refuse a set's name that sets of another kind have in this data set; `but` is a fingerprint that may stay.

    Raises:
        ConfigError: one has.
    """
    for entry in store.find(dataset, model):
        if entry.spec["model"] != model or entry.is_decoded or entry.spec["fingerprint"] == but:
            continue
        held = kind_of(entry.spec)
        if held != kind:
            raise ConfigError(
                f"{model}: {entry.name} in {store.path} holds {SAID[held]}, these are of {SAID[kind]}; {advice}, "
                "so that no table shows one for the other"
            )


def check_arrival(store: Store, entry: Entry, model: str, advice: str) -> None:
    """Refuse to show the set `entry` as `model` in a store where that name says something else.

    Raises:
        ConfigError: sets of another kind have the name there, or it is one of random weights and the set is not.
    """
    if entry.is_decoded:
        return
    kind = kind_of(entry.spec)
    if kind != "random":
        check_random_name(model, advice)
    check_kind(store, entry.dataset, model, kind, but=entry.spec["fingerprint"], advice=advice)
