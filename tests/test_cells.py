"""Columns read by their distinct values say what a reading cell by cell says, errors included."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.errors import TaskError
from probes.cells import cells_of, column_cells
from probes.labels import code_of, read_codes, read_numbers


def read_row_by_row(values: list[Any], readers: Any) -> tuple[list[int], int | None]:
    """Codes of a column, one cell after the other, and the first row that says something else."""
    codes = [code_of(value, readers) for value in values]
    wrong = codes.index(None) if None in codes else None
    return [code for code in codes if code is not None], wrong


CELL_TYPES = st.sampled_from(
    [
        (st.sampled_from(["1", "0", "-1", "", "1.0", "1|0", "-1|", "x", "2"]), pa.string()),
        (st.sampled_from([1.0, 0.0, -1.0, float("nan"), 0.5]), pa.float64()),
        (st.sampled_from([1, 0, -1, 2]), pa.int64()),
        (st.booleans(), pa.bool_()),
        (st.sampled_from([["1"], ["0"]]), pa.list_(pa.string())),
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.data(), CELL_TYPES, st.sampled_from(["any", "majority"]))
def test_columns_are_read_as_cell_by_cell(data: st.DataObject, cells: Any, readers: Any) -> None:
    values = data.draw(st.lists(st.one_of(st.none(), cells[0]), max_size=12))
    used = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))), dtype=bool)
    kept = [value if keep else None for value, keep in zip(values, used)]
    codes, wrong = read_row_by_row(kept, readers)
    whole = pa.chunked_array([pa.array(part, cells[1]) for part in (values[:5], values[5:])])
    for found in (kept, cells_of(kept), column_cells(whole, used)):
        if wrong is None:
            assert read_codes(found, "a", readers).tolist() == codes
        else:
            with pytest.raises(TaskError, match=f"label 'a': row {wrong + 1} says "):
                read_codes(found, "a", readers)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["1.5", "7e1", "-1", "", "nan", "inf", "x", None]), max_size=12))
def test_numbers_are_read_as_cell_by_cell(values: list[Any]) -> None:
    wrong = [row for row, value in enumerate(values) if value in ("nan", "inf", "x")]
    for found in (values, column_cells(pa.chunked_array([pa.array(values, pa.string())]), np.ones(len(values), bool))):
        if wrong:
            with pytest.raises(TaskError, match=f"row {wrong[0] + 1} holds a value that is no number"):
                read_numbers(found, "age")
        else:
            y, mask = read_numbers(found, "age")
            assert mask.tolist() == [bool(value) for value in values]
            assert y.tolist() == [float(value or 0) for value in values]


def test_a_dictionary_column_is_read_by_its_values() -> None:
    column = pa.chunked_array([pa.array(["1", None, "0"]).dictionary_encode()])
    assert read_codes(column_cells(column, np.array([True, True, False])), "a", "any").tolist() == [1, -2, -2]
