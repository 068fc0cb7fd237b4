"""`featstore demo`: the whole way on data that needs no download."""

import time
from typing import TYPE_CHECKING, Any

from cli import show
from cli.extract import StoreOption, extract, register

if TYPE_CHECKING:
    from featstore.objects import Place


def demo(*, store: StoreOption = None) -> None:
    """Register, extract and probe real handwritten digits and a synthetic chest phantom; offline, in two minutes."""
    from cli.probing import knn, linear
    from featstore.store.layout import store_path

    started = time.monotonic()
    home = store_path(store)
    steps: list[tuple[str, Any]] = [
        ("featstore register digits", lambda: register(**_defaults(register, name="digits", store=str(home)))),
        ("featstore register phantom", lambda: register(**_defaults(register, name="phantom", store=str(home)))),
        ("featstore extract --model tiny --dataset digits", lambda: _extract(home, "digits", "tiny")),
        ("featstore extract --model tiny --dataset phantom", lambda: _extract(home, "phantom", "tiny")),
        ("featstore extract --model tiny-random --dataset phantom", lambda: _extract(home, "phantom", "tiny-random")),
        ("probes knn --dataset digits", lambda: knn(**_defaults(knn, dataset="digits", store=str(home)))),
        ("probes linear --dataset phantom", lambda: linear(**_defaults(linear, dataset="phantom", store=str(home)))),
    ]
    for command, step in steps:
        print(f"\n$ {command}", flush=True)
        step()
    print(f"\ndone in {show.duration(time.monotonic() - started)}; everything is in {home}")
    print("next: `featstore ls`, `probes results`, and `featstore register NAME ROOT` with your own images")


def _extract(home: "Place", dataset: str, model: str) -> None:
    extract(**_defaults(extract, dataset=dataset, model=model, store=str(home)))


def _defaults(command: Any, **given: Any) -> dict[str, Any]:
    """The command's own defaults, as typer would fill them in, with some values given."""
    import inspect

    parameters = inspect.signature(command).parameters
    return {**{name: parameter.default for name, parameter in parameters.items() if name not in given}, **given}


COMMANDS = {"demo": demo}
