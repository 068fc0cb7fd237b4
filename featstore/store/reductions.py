"""Patch tokens that are stored smaller than the network gave them: what was done, its parameters, and the way back.

Steps, in this order: `pool2`, `pool4` average cells of the grid; `pca:K` keeps K principal components; `int8` keeps a
byte a number, with an offset and a scale for each dimension. Identity holds the steps and how the sample is drawn; the
fitted parameters lie in `reductions/<digest>.safetensors`, named by their content, and `spec.json` names that file
beside the loss that was measured. Arrays added to a set later are described in `reductions/<array>.json`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Int8

from featstore import files
from featstore.errors import CorruptError
from featstore.objects import Place
from featstore.store.layout import ArraySpec

SAMPLE, SEED = 256, 0  # images drawn to fit and to measure on, and the seed of everything drawn
LEVELS = 127  # int8 goes from -127 to 127: symmetric, so that the offset decodes exactly
PIECE_BYTES = 64 * 2**20  # float32 held while integers are decoded


def identity_of(steps: Sequence[str]) -> dict[str, Any]:
    """What a set's identity says about its reductions; empty without any."""
    return {"steps": list(steps), "sample": SAMPLE, "seed": SEED} if steps else {}


def steps_of(spec: dict[str, Any]) -> tuple[str, ...]:
    """Steps of a set, in the order in which they were done."""
    return tuple(spec["identity"].get("reductions", {}).get("steps", ()))


def is_reduced(array: str, steps: Sequence[str]) -> bool:
    """Only patch grids are reduced; everything else is small."""
    return bool(steps) and array.rsplit("/", 1)[-1] == "patches"


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """What happened to the patches of one array.

    Attributes:
        grid: (rows, columns) of patches that the network gave.
        dim: numbers in one of them.
        dtype: float type in which rows of int8 are returned.
        parameters: `mean` (D,) and `axes` (K, D) of pca; `offset` and `scale` (K or D,) of int8.
        loss: as measured when the array was created; see `spec.json`.
    """

    steps: tuple[str, ...]
    grid: tuple[int, int]
    dim: int
    dtype: str
    parameters: dict[str, Float32[np.ndarray, "..."]] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)

    @property
    def cell(self) -> int:
        """Patches along one side of a pooled cell; 1 without pooling."""
        return next((int(step[4:]) for step in self.steps if step.startswith("pool")), 1)

    @property
    def kept_grid(self) -> tuple[int, int]:
        """(rows, columns) of what is stored; where the cell does not divide a side, its last cells are smaller."""
        rows, columns = self.grid
        return -(-rows // self.cell), -(-columns // self.cell)

    @property
    def components(self) -> int | None:
        """Principal components kept; None without pca."""
        return next((int(step[4:]) for step in self.steps if step.startswith("pca:")), None)

    @property
    def is_int8(self) -> bool:
        return "int8" in self.steps

    @property
    def row_shape(self) -> tuple[int, int]:
        rows, columns = self.kept_grid
        return rows * columns, self.components or self.dim

    @property
    def cell_sizes(self) -> Float64[np.ndarray, " P"]:
        """Patches behind each stored one, so that weighted means over cells are means over patches."""
        along = [np.minimum(self.cell, size - self.cell * np.arange(-(-size // self.cell))) for size in self.grid]
        sizes: Float64[np.ndarray, " P"] = np.outer(*along).ravel().astype(np.float64)
        return sizes

    def array(self, array: ArraySpec) -> ArraySpec:
        """The array as it is stored."""
        return replace(array, row_shape=self.row_shape, dtype="int8" if self.is_int8 else array.dtype)

    def decode(self, values: np.ndarray) -> np.ndarray:
        """Stored rows (..., P, C) as readers get them: int8 back as floats, by float32; others as they are."""
        if not self.is_int8:
            return values
        result = np.empty(values.shape, self.dtype)
        flat, out = values.reshape(-1, values.shape[-1]), result.reshape(-1, values.shape[-1])
        step = max(1, PIECE_BYTES // (4 * values.shape[-1]))
        for first in range(0, len(flat), step):
            out[first : first + step] = self._decode(flat[first : first + step])
        return result

    def _decode(self, values: Int8[np.ndarray, "N C"]) -> Float32[np.ndarray, "N C"]:
        decoded: np.ndarray = values.astype(np.float32) * self.parameters["scale"] + self.parameters["offset"]
        return decoded

    def restore(self, values: Float[np.ndarray, "... C"]) -> Float32[np.ndarray, "... D"]:
        """Tokens of the network's width from what readers get: principal components mapped back, in float32."""
        exact = np.asarray(values, dtype=np.float32)
        if self.components is None:
            return exact
        tokens: np.ndarray = exact @ self.parameters["axes"] + self.parameters["mean"]
        return tokens

    def spread(self, values: Float32[np.ndarray, "P D"]) -> Float32[np.ndarray, "Q D"]:
        """A pooled grid at the size of the network's: every patch gets the mean of its cell."""
        rows, columns = self.kept_grid
        cells = values.reshape(rows, columns, -1).repeat(self.cell, axis=0).repeat(self.cell, axis=1)
        return cells[: self.grid[0], : self.grid[1]].reshape(-1, values.shape[-1])


def describe(reduction: Reduction) -> dict[str, Any]:
    """What `spec.json` keeps of one array: its grids, what a reader needs, and the loss."""
    return {
        "grid": list(reduction.grid),
        "kept_grid": list(reduction.kept_grid),
        "dim": reduction.dim,
        "dtype": reduction.dtype,
        **reduction.loss,
    }


def parameters_path(folder: Place, name: str) -> Place:
    """Where fitted parameters stand, named by their digest; CorruptError for any other name."""
    if not re.fullmatch("[0-9a-f]+", name):
        raise CorruptError(f"{folder}: {name!r} names no parameters; do not use a store from this source")
    return folder / "reductions" / f"{name}.safetensors"


def added_path(folder: Place, array: str) -> Place:
    """Where an array is described that joined the set after its creation."""
    return folder / "reductions" / f"{array.replace('/', '.')}.json"


def write_parameters(folder: Place, reductions: dict[str, Reduction]) -> str | None:
    """Keep the fitted parameters of some arrays in one file named by its content; None if there are none to keep."""
    tensors = {
        f"{name}/{key}": np.ascontiguousarray(values)
        for name, reduction in reductions.items()
        for key, values in reduction.parameters.items()
    }
    if not tensors:
        return None
    from safetensors.numpy import save

    data = save(tensors)
    name = files.digest(data)
    files.create_exclusive(parameters_path(folder, name), data)
    return name


def drop_unnamed(folder: Place, spec: dict[str, Any], name: str) -> None:
    """Remove a parameter file that nothing describes: that of a writer whose description came second."""
    named = {spec.get("reduction", {}).get("parameters")}
    for path in (folder / "reductions").glob("*.json"):
        named.add(files.unseal(path.read_bytes(), path)["parameters"])
    if name not in named:
        parameters_path(folder, name).unlink(missing_ok=True)


def description(folder: Place, spec: dict[str, Any], array: str) -> dict[str, Any] | None:
    """The part of `spec.json`, or the file of its own, that describes an array; None if there is none."""
    held: dict[str, Any] = spec.get("reduction", {})
    if array in held.get("arrays", {}):
        return held
    path = added_path(folder, array)
    try:
        return files.unseal(path.read_bytes(), path)
    except FileNotFoundError:
        return None


def reduction_attributes(folder: Place, spec: dict[str, Any], array: str) -> dict[str, Any]:
    """What the array's `zarr.json` tells readers of plain zarr: steps, grids, and where the parameters stand."""
    steps = steps_of(spec)
    held = description(folder, spec, array) if is_reduced(array, steps) else None
    if held is None:
        return {}
    entry = held["arrays"][array]
    kept = {key: entry[key] for key in ("grid", "kept_grid", "dim", "dtype")}
    return {"featstore": {"reduction": {"steps": list(steps), "parameters": held["parameters"], **kept}}}


def read_reduction(folder: Place, spec: dict[str, Any], array: str) -> Reduction | None:
    """What happened to an array; None if it is stored as the network gave it.

    Raises:
        CorruptError: the description or the parameters are missing or damaged.
    """
    steps = steps_of(spec)
    if not is_reduced(array, steps):
        return None
    held = description(folder, spec, array)
    if held is None:
        raise CorruptError(
            f"{folder.name}:{array} is reduced by {','.join(steps)}, and nothing says how: "
            f"{added_path(folder, array)} is missing; restore it from a copy"
        )
    entry = dict(held["arrays"][array])
    grid, dim, dtype = entry.pop("grid"), entry.pop("dim"), entry.pop("dtype")
    del entry["kept_grid"]
    parameters = _read_parameters(folder, held["parameters"], array) if held["parameters"] else {}
    return Reduction(
        steps=steps, grid=(grid[0], grid[1]), dim=dim, dtype=dtype, parameters=parameters, loss=dict(entry)
    )


def _read_parameters(folder: Place, name: str, array: str) -> dict[str, Float32[np.ndarray, "..."]]:
    from safetensors.numpy import load

    path = parameters_path(folder, name)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CorruptError(
            f"{path}: missing, and without it the reduced rows mean nothing; restore it from a copy"
        ) from error
    if files.digest(data) != name:
        raise CorruptError(f"{path}: content does not match its digest; restore it from a copy")
    prefix = f"{array}/"
    return {key.removeprefix(prefix): values for key, values in load(data).items() if key.startswith(prefix)}
