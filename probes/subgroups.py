"""Parts of the samples by sex, age band, view or any other column of the manifest."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from featstore.errors import TaskError, UnknownNameError

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


def age_band(value: Any) -> str:
    """`0-17`, `18-39`, `40-59`, `60-79`, `80+` or `unknown`."""
    age = age_of(value)
    if age != age:
        return UNKNOWN
    number = int(np.searchsorted(AGE_BANDS, age, "right")) - 1
    return f"{AGE_BANDS[number]}-{AGE_BANDS[number + 1] - 1}" if number + 1 < len(AGE_BANDS) else f"{AGE_BANDS[-1]}+"


def subgroup_rows(name: str, values: Sequence[Any], *, most: int = 12) -> dict[str, Bool[np.ndarray, " N"]]:
    """Value -> rows that have it, in order of value; ages (`name` is one of a data set's words for age) by band.

    Raises:
        TaskError: more than `most` different values: a number that is no age, or an id.
    """
    is_age = name.lower() in SPELLINGS["age"]
    cells = [
        age_band(value) if is_age else UNKNOWN if value is None or str(value).strip() == "" else str(value).strip()
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
