"""A label column as its few distinct values and, for every row, which of them it holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int64, Shaped

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Cells:
    """`values` are the distinct values that rows hold, `index` the one of every row; -1 where a row holds none."""

    values: tuple[Any, ...]
    index: Int64[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.index)

    def row_of(self, value: int) -> int:
        """The first row that holds a value, by its number."""
        return int(np.argmax(self.index == value))

    def first(self, wrong: Sequence[int]) -> int | None:
        """The first row that holds one of these values, by their numbers; None without any."""
        return min(map(self.row_of, wrong), default=None)

    def mapped(self, meaning: Callable[[Any], Any], dtype: type[np.generic]) -> Shaped[np.ndarray, " N"]:
        """What every row means: `meaning` of its value, and of None where it holds none."""
        return np.asarray(np.array([*map(meaning, self.values), meaning(None)], dtype)[self.index])


def is_blank(value: Any) -> bool:
    """Null, the empty text or NaN."""
    return value is None or value == "" or bool(value != value)


def cells_of(values: "Sequence[Any] | Cells") -> Cells:
    """The cells of a list of Python values; cells stay as they are."""
    if isinstance(values, Cells):
        return values
    number: dict[Any, int] = {}
    distinct: list[Any] = []
    index = np.empty(len(values), np.int64)
    for row, value in enumerate(values):
        if value is None or value != value:
            index[row] = -1
            continue
        key = (type(value), value if isinstance(value, str | int | float) else str(value))
        if key not in number:
            number[key] = len(distinct)
            distinct.append(value)
        index[row] = number[key]
    return Cells(tuple(distinct), index)


def column_cells(column: "pa.ChunkedArray", used: Bool[np.ndarray, " N"]) -> Cells:
    """The cells of a column of a manifest; rows that are not `used` hold none, and their values count for nothing."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_nested(column.type) or pa.types.is_null(column.type):
        return cells_of([value if keep else None for value, keep in zip(column.to_pylist(), used)])
    whole = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    encoded = whole.dictionary_encode()
    index = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    index = np.where(used, index, -1)
    held = np.unique(index[index >= 0])
    number = np.full(len(encoded.dictionary) + 1, -1, np.int64)  # the last one is that of rows without a value
    number[held] = np.arange(len(held))
    return Cells(tuple(encoded.dictionary.take(pa.array(held)).to_pylist()), number[index])
