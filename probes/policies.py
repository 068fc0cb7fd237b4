"""What the values of a label column mean: policies as data, named, and hashed with the task that uses them.

Columns stay verbatim in the manifest: 1, 0, -1 (uncertain), blank (not mentioned), or the votes of several readers
joined by a bar, as `1|0|1`.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from featstore.errors import UnknownNameError

Uncertain = Literal["mask", "zero", "one", "drop", "class"]
Blank = Literal["mask", "zero"]
Readers = Literal["any", "majority"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What the values 1, 0, -1 and blank of a label column mean, and how readers are counted.

    `uncertain` (value -1) is masked, 0 or 1; "drop" leaves out the whole row if any of the task's labels (or of
    `drop_labels`, where named) is uncertain; "class" reads it as 0 and adds one more label, `Uncertain`, that is 1
    where any label is uncertain. `overrides` says it for single labels. `blank` is masked or 0. `readers`: positive if
    any reader says so, or more than half of those who say 1 or 0.
    """

    uncertain: Uncertain = "mask"
    blank: Blank = "mask"
    overrides: tuple[tuple[str, Literal["mask", "zero", "one"]], ...] = ()
    drop_labels: tuple[str, ...] = ()
    readers: Readers = "majority"

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; what came later is stated where it is not the default, so that old task digests hold."""
        later = {"drop_labels": (), "readers": "majority"}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


# Uncertain -> one for atelectasis, edema and effusion, zero for the others (protocols of MGCA; U-Ones/U-Zeros mixed).
MIXED = Policy(
    uncertain="zero",
    blank="zero",
    overrides=(("Atelectasis", "one"), ("Edema", "one"), ("Pleural Effusion", "one")),
)
POLICIES = {
    "ignore": Policy(uncertain="mask", blank="zero"),  # U-Ignore
    "zeros": Policy(uncertain="zero", blank="zero"),  # U-Zeros
    "ones": Policy(uncertain="one", blank="zero"),  # U-Ones
    "mixed": MIXED,
    "drop-row": Policy(uncertain="drop", blank="zero"),
    "extra-class": Policy(uncertain="class", blank="zero"),
    "labelled-only": Policy(uncertain="mask", blank="mask"),
    "any-reader": Policy(blank="zero", readers="any"),
    "majority": Policy(blank="zero", readers="majority"),
}


def named_policy(name: str) -> Policy:
    """A policy of `POLICIES`.

    Raises:
        UnknownNameError: no such name.
    """
    if name not in POLICIES:
        raise UnknownNameError(f"unknown label policy {name!r}; known: {', '.join(POLICIES)}")
    return POLICIES[name]
