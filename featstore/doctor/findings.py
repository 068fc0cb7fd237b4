"""What a probe is and what it finds."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from featstore.objects import Place

State = Literal["ok", "degraded", "missing"]
Result = tuple[State, str, str]  # state, what it means, what was measured


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was probed: whether it is there, what follows, and what was measured."""

    name: str
    state: State
    meaning: str
    value: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """A named question to a place; where the system refuses to answer, `absent` says what that means."""

    name: str
    absent: str
    unanswered: State
    ask: Callable[[Any], Result]

    def __call__(self, place: Place) -> Finding:
        try:
            return Finding(self.name, *self.ask(place))
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, "")
            value = f"{code}: {error.strerror}" if code else str(error)
            return Finding(self.name, self.unanswered, self.absent, value)


def asks(
    probes: list[Probe], name: str, absent: str, unanswered: State = "missing"
) -> Callable[[Callable[[Any], Result]], Callable[[Any], Result]]:
    """Decorator that adds a probe to a list."""

    def register(ask: Callable[[Any], Result]) -> Callable[[Any], Result]:
        probes.append(Probe(name, absent, unanswered, ask))
        return ask

    return register
