"""Features in the basis of their principal axes: what the logistic solver works on.

Centring is free, the intercept absorbs it; a rotation leaves the norm of the weights, and so the penalty, unchanged.
With fewer rows than columns the solution lies in the span of the centred rows, and only that span is kept.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.checks import CHUNK, check_finite
from probes.workers import Workers

EXACT_BYTES = 1 << 27  # design matrices up to this size are kept in float64
CACHED = 1 << 16  # numbers at a time that stay in a core's own cache


@dataclass(frozen=True)
class Eigenbasis:
    """x -> ((x - mean) / scale) @ rotation, with orthonormal columns, and the training rows there."""

    mean: Float[np.ndarray, " D"]
    scale: Float[np.ndarray, " D"]
    rotation: Float[np.ndarray, "D r"]
    design: Tensor  # (N, r + 1), last column one; float64 where that is small, else float32


def scaled(
    X: Float[np.ndarray, "N D"], mean: Float[np.ndarray, " D"], scale: Float[np.ndarray, " D"]
) -> Float[np.ndarray, "N D"]:
    """(X - mean) / scale in float64: columns can lie far from zero."""
    result: np.ndarray = X - mean
    result /= scale
    return result


def moments(X: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """(mean, standard deviation) of the columns in float64; the deviation of constant columns is 1.

    Raises:
        TaskError: a value is NaN or infinite.
    """
    step = max(1, CACHED // max(1, X.shape[1]))
    chunks = [slice(start, start + step) for start in range(0, len(X), step)]
    mean, variance = np.zeros(X.shape[1]), np.zeros(X.shape[1])
    scratch = np.empty((min(step, len(X)), X.shape[1]))  # fresh memory would cost as much as the sums

    def read(rows: slice) -> np.ndarray:
        values = scratch[: len(X[rows])]
        np.copyto(values, X[rows])
        return values

    with np.errstate(invalid="ignore", over="ignore"):
        for rows in chunks:
            mean += read(rows).sum(0)
        mean /= len(X)
        if not np.isfinite(mean).all():
            check_finite(X)
        for rows in chunks:
            apart = read(rows)
            apart -= mean
            variance += np.einsum("ij,ij->j", apart, apart)
    variance /= len(X)
    # Rounding of the mean alone, as scikit-learn's StandardScaler bounds it.
    eps = np.finfo(np.float64).eps
    constant = variance <= len(X) * eps * variance + np.square(len(X) * mean * eps)
    return mean, np.where(constant, 1.0, np.sqrt(variance))


def eigenbasis(X: Float[np.ndarray, "N D"], workers: Workers, *, standardize: bool) -> Eigenbasis:
    """Principal axes of the rows, in descending order of variance.

    Raises:
        TaskError: a value is NaN or infinite.
    """
    mean, deviation = moments(X)
    scale = deviation if standardize else np.ones_like(mean)
    num_rows, width = X.shape
    dtype = torch.float64 if 8 * num_rows * (min(X.shape) + 1) <= EXACT_BYTES else torch.float32

    def part(rows: slice) -> Tensor:
        return torch.from_numpy(scaled(X[rows], mean, scale)).to(dtype)

    if num_rows <= width:
        rotation = _span(torch.from_numpy(scaled(X, mean, scale)))
    else:

        def square(rows: slice) -> Tensor:
            block = part(rows)
            return block.T @ block

        gram = torch.zeros(width, width, dtype=torch.float64)
        for product in workers.map_blocks(square, num_rows, CHUNK):
            gram += product
        rotation = torch.linalg.eigh(gram / num_rows).eigenvectors.flip(1)
    turn = rotation.to(dtype).contiguous()
    design = torch.ones(num_rows, rotation.shape[1] + 1, dtype=dtype)

    def fill(rows: slice) -> None:
        design[rows, :-1] = part(rows) @ turn

    for _ in workers.map_blocks(fill, num_rows, CHUNK):
        pass
    return Eigenbasis(mean, scale, rotation.numpy(), design)


def _span(rows: Tensor) -> Tensor:
    """Orthonormal basis (D, r) of the span of the rows (N, D), from the N x N products."""
    variance, axes = torch.linalg.eigh(rows @ rows.T)
    keep = variance > variance[-1] * len(rows) * torch.finfo(rows.dtype).eps
    basis = rows.T @ (axes[:, keep] / variance[keep].sqrt())
    # Axes of small variance come out of the products with little precision: make them orthonormal again.
    orthonormal: Tensor = torch.linalg.qr(basis.flip(1)).Q
    return orthonormal
