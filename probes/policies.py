"""What the values of a label column mean: policies as data, named, and hashed with the task that uses them.

Columns stay verbatim in the manifest: 1, 0, -1 (uncertain), blank (not mentioned), or the votes of several readers
joined by a bar, as `1|0|1`. Policies say nothing of categorical columns, numbers and ranks: there a blank is masked.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from featstore.errors import UnknownNameError

Uncertain = Literal["mask", "zero", "one", "drop", "class"]
Blank = Literal["mask", "zero"]
Readers = Literal["any", "majority"]
UNCERTAIN = "Uncertain"  # the label that "class" adds


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What the values 1, 0, -1 and blank of a label column mean, and how readers are counted.

    `uncertain` (value -1) is masked, 0 or 1; "drop" leaves out the whole row if any label of `drop_labels` is
    uncertain, or, where none is named, any of the task's labels without an override; "class" reads it as 0 and adds one
    more label, `Uncertain`, that is 1 where any label of the row is uncertain. `overrides` says how the uncertain
    values of single labels are read (also of one column of a merged label); a label is found by its name or by the
    word that spellings share (`probes.words`). `blank` is masked or 0.

    Votes become one value first. `readers` "majority": 1 if more than half of those who say 1 or 0 say 1, so that a
    tie is 0; "any": 1 if anyone says 1, else uncertain if anyone is. Votes without any 1 or 0 are uncertain if one is
    -1, else blank. A single value is its own vote.

    Where the column `normal` is 1, all others are 0 whatever they say, those of `normal_keeps` excepted.
    """

    uncertain: Uncertain = "mask"
    blank: Blank = "mask"
    overrides: tuple[tuple[str, Literal["mask", "zero", "one"]], ...] = ()
    drop_labels: tuple[str, ...] = ()
    readers: Readers = "majority"
    normal: str = ""
    normal_keeps: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; what came later is stated where it is not the default, so that old task digests hold."""
        later = {"drop_labels": (), "readers": "majority", "normal": "", "normal_keeps": ()}
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
    # U-Ignore as TorchXRayVision reads it: No Finding rules out every pathology (a device is none), and a blank is not
    # taken for 0.
    "ignore-xrv": Policy(uncertain="mask", blank="mask", normal="No Finding", normal_keeps=("Support Devices",)),
}
SENSITIVITY = ("zeros", "ones", "mixed", "ignore", "drop-row", "extra-class")  # what `--policies all` compares


def named_policy(name: str) -> Policy:
    """A policy of `POLICIES`.

    Raises:
        UnknownNameError: no such name.
    """
    if name not in POLICIES:
        raise UnknownNameError(f"unknown label policy {name!r}; known: {', '.join(POLICIES)}")
    return POLICIES[name]


def policy_name(policy: Policy) -> str:
    """The first name that a policy has, "own" where it has none."""
    return next((name for name, known in POLICIES.items() if known == policy), "own")
