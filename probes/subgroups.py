"""Parts of the samples by sex, age band, view or any other column of the manifest."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from featstore.errors import ConfigError, TaskError, UnknownNameError

# First ages of the bands: children, young, middle-aged and older adults, the oldest.
AGE_BANDS = (0, 18, 40, 60, 80)
# What data sets call a column, in lower case.
SPELLINGS = {
    "sex": ("sex", "gender", "patient gender", "patient sex", "patientsex", "patient_sex"),
    "age": ("age", "patient age", "patientage", "patient_age", "age_at_cxr", "anchor_age"),
    "view": ("view", "view position", "viewposition", "view_position", "frontal/lateral", "ap/pa"),
}
UNKNOWN = "unknown"


def find_column(names: Sequence[str], asked: str) -> str:
    """The column that is asked for by name, or by `sex`, `age` or `view` whatever a data set calls it.

    Raises:
        UnknownNameError: there is none.
    """
    if asked in names:
        return asked
    lower = {name.lower(): name for name in reversed(names)}
    for spelling in SPELLINGS.get(asked.lower(), (asked.lower(),)):
        if spelling in lower:
            return lower[spelling]
    raise UnknownNameError(f"no column {asked!r} to make subgroups of; columns: {', '.join(names) or 'none'}")


def age_of(value: Any) -> float:
    """Years of a cell such as 62, '040Y', '62.5' or '18M' (DICOM: D, W, M, Y); NaN where there is none."""
    text = str(value).strip().upper() if value is not None else ""
    years = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}.get(text[-1:])
    try:
        age = float(text) if years is None else float(text[:-1]) * years
    except ValueError:
        return float("nan")
    return age if 0 <= age < 130 else float("nan")


def parse_bands(text: str) -> tuple[int, ...]:
    """First ages of bands from `0,18,40,60,80` or `0-18,18-40,40-60,60-80,80+`: a band ends where the next starts.

    Raises:
        ConfigError: no ascending whole ages, or bands that leave a gap or overlap.
    """
    starts, ends = [], []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        start, _, end = part.rstrip("+").partition("-")
        try:
            starts.append(int(start))
            ends.append(int(end) if end else None)
        except ValueError:
            raise ConfigError(f"bands of age are whole years such as 0,18,40 or 0-18,18-40,40+; got {part!r}") from None
    if not starts or starts[0] < 0 or any(low >= high for low, high in itertools.pairwise(starts)):
        raise ConfigError(f"bands of age ascend from 0 or more; got {text!r}")
    if any(end not in (None, following) for end, following in zip(ends, starts[1:])) or ends[-1] is not None:
        raise ConfigError(
            f"a band of age ends where the next starts and the last is open, as in 0-18,18+; got {text!r}"
        )
    return tuple(starts)


def age_band(value: Any, bands: Sequence[int] = AGE_BANDS) -> str:
    """`0-17`, `18-39`, `40-59`, `60-79`, `80+`, or by other first ages; `unknown` where there is none or below all."""
    age = age_of(value)
    number = int(np.searchsorted(bands, age, "right")) - 1
    if age != age or number < 0:
        return UNKNOWN
    return f"{bands[number]}-{bands[number + 1] - 1}" if number + 1 < len(bands) else f"{bands[-1]}+"


def subgroup_rows(
    name: str, values: Sequence[Any], *, most: int = 12, bands: Sequence[int] = AGE_BANDS
) -> dict[str, Bool[np.ndarray, " N"]]:
    """Value -> rows that have it, in order of value; ages (`name` is one of a data set's words for age) by band.

    Raises:
        TaskError: more than `most` different values: a number that is no age, or an id.
    """
    is_age = name.lower() in SPELLINGS["age"]
    cells = [
        age_band(value, bands)
        if is_age
        else UNKNOWN
        if value is None or str(value).strip() == ""
        else str(value).strip()
        for value in values
    ]
    found = sorted(set(cells), key=lambda cell: (cell == UNKNOWN, cell))
    if is_age:
        found.sort(key=lambda cell: 1000 if cell == UNKNOWN else int(cell.rstrip("+").split("-")[0]))
    if len(found) > most:
        raise TaskError(
            f"column {name!r} has {len(found)} different values, such as {found[0]!r}; subgroups take at most {most}"
        )
    array = np.array(cells, dtype=np.str_)
    return {value: array == value for value in found}
