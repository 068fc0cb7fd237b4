"""Exact search for the most similar rows of a bank: FAISS, or torch where FAISS is absent. Both agree."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from featstore.errors import ConfigError

Backend = Literal["auto", "faiss", "torch"]
# Neighbours asked for beyond k: with more rows than this tied at the last place, the whole bank is ranked.
SPARE = 8
SCORE_BYTES = 1 << 27  # similarities held at once where a product is taken in full

logger = logging.getLogger(__name__)


@runtime_checkable
class Index(Protocol):
    """A bank of unit rows to search."""

    bank: Float[np.ndarray, "N D"]

    def nearest(
        self, queries: Float[np.ndarray, "Q D"], k: int
    ) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """(similarity, row) of the k most similar rows, descending, any order among ties."""
        ...


class FaissIndex:
    """FAISS's exact inner-product index; it holds the bank."""

    def __init__(self, faiss: ModuleType, bank: Float[np.ndarray, "N D"]) -> None:
        self.index = faiss.IndexFlatIP(bank.shape[1])
        self.index.add(bank)
        self.bank: np.ndarray = faiss.rev_swig_ptr(self.index.get_xb(), bank.size).reshape(bank.shape)

    def nearest(
        self, queries: Float[np.ndarray, "Q D"], k: int
    ) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        similarity, rows = self.index.search(queries, k)
        return similarity, rows


class TorchIndex:
    """One float32 product and a partial sort."""

    def __init__(self, bank: Float[np.ndarray, "N D"]) -> None:
        import torch

        self.bank, self._bank = bank, torch.from_numpy(bank)

    def nearest(
        self, queries: Float[np.ndarray, "Q D"], k: int
    ) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        import torch

        similarity, rows = torch.topk(torch.from_numpy(queries) @ self._bank.T, k)
        return similarity.numpy(), rows.numpy()


def build_index(bank: Float[np.ndarray, "N D"], backend: Backend) -> tuple[Index, str]:
    """An index over unit float32 rows, and the name of what searches it.

    Raises:
        ConfigError: an unknown backend, or FAISS asked for by name where it cannot be imported.
    """
    if backend not in ("auto", "faiss", "torch"):
        raise ConfigError(f"backend is 'auto', 'faiss' or 'torch', got {backend!r}")
    if backend == "torch":
        return TorchIndex(bank), "torch"
    try:
        faiss = import_faiss()
    except Exception as error:  # a build for another numpy or CPU fails in many ways
        reason = f"FAISS cannot be imported ({type(error).__name__}: {error})"
        if backend == "faiss":
            raise ConfigError(f"{reason}; install featstore[cpu] or featstore[gpu], or use backend='torch'") from error
        logger.warning("%s; searching with torch, which finds the same neighbours", reason)
        return TorchIndex(bank), "torch"
    return FaissIndex(faiss, bank), "faiss"


def import_faiss() -> Any:
    """Import FAISS with the kernels that its OpenBLAS would not find by itself.

    The OpenBLAS inside faiss-cpu predates current processors and falls back to SSE3 code there, five times slower;
    numpy's own, newer OpenBLAS knows what this processor can do.
    """
    with _openblas_kernels():
        import faiss
    return faiss


@contextmanager
def _openblas_kernels() -> Iterator[None]:
    name = "OPENBLAS_CORETYPE"
    from threadpoolctl import threadpool_info

    numpy_blas = [
        entry for entry in threadpool_info() if entry["internal_api"] == "openblas" and "numpy" in entry["filepath"]
    ]
    kernels = numpy_blas[0].get("architecture") if numpy_blas else None
    # The newer names are refinements of SkylakeX (AVX-512) that an old library does not know.
    kernels = "SkylakeX" if kernels in ("Cooperlake", "SapphireRapids") else kernels
    if name in os.environ or kernels not in ("Haswell", "SkylakeX", "Zen"):
        yield
        return
    os.environ[name] = kernels
    try:
        yield
    finally:
        del os.environ[name]
