"""Exact search for the most similar rows of a bank: FAISS, or torch where FAISS is absent. Both agree, ties included.

Similarities are taken in float32; where two of them are closer than its rounding, the rows are compared again in
float64, and equal ones stand in the order of the bank. So neither backend, device nor batch changes who is a neighbour.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float64, Int

from featstore.errors import ConfigError, DeviceError, TaskError
from probes.checks import check_finite

Backend = Literal["auto", "faiss", "torch"]
Device = Literal["auto", "cpu", "cuda"]
# Neighbours asked for beyond k: with more rows than this tied at the last place, the whole bank is ranked.
SPARE = 8
SCORE_BYTES = 1 << 27  # similarities held at once where a product is taken in full
PAIRS = 4096  # products that are taken again at once
CACHED = 1 << 16  # numbers at a time that stay in a core's own cache
FAISS_GPU_MAX_K = 2048  # of FAISS's selection on a GPU; more neighbours are looked for on the CPU

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
    """FAISS's exact inner-product index; it holds the bank. On a GPU a second copy answers up to 2,048 neighbours."""

    def __init__(self, faiss: ModuleType, bank: Float[np.ndarray, "N D"], *, gpu: bool = False) -> None:
        self.index = faiss.IndexFlatIP(bank.shape[1])
        self.index.add(bank)
        self.bank: np.ndarray = faiss.rev_swig_ptr(self.index.get_xb(), bank.size).reshape(bank.shape)
        self._on_gpu: Any = None
        if gpu:
            self._resources = faiss.StandardGpuResources()  # must outlive the index that uses it
            self._on_gpu = faiss.index_cpu_to_gpu(self._resources, 0, self.index)

    def nearest(
        self, queries: Float[np.ndarray, "Q D"], k: int
    ) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        index = self._on_gpu if self._on_gpu is not None and k <= FAISS_GPU_MAX_K else self.index
        similarity, rows = index.search(queries, k)
        return similarity, rows


class TorchIndex:
    """Float32 products with pieces of the bank and a running partial sort, on a device of torch's."""

    def __init__(self, bank: Float[np.ndarray, "N D"], device: str = "cpu") -> None:
        import torch

        self.bank, self._bank = bank, torch.from_numpy(bank).to(device)

    def nearest(
        self, queries: Float[np.ndarray, "Q D"], k: int
    ) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        import torch

        asked = torch.from_numpy(np.ascontiguousarray(queries)).to(self._bank.device)
        piece = max(k, SCORE_BYTES // (4 * max(1, len(queries))))
        similarity, rows = largest(asked @ self._bank[:piece].T, min(k, piece, len(self._bank)))
        for start in range(piece, len(self._bank), piece):
            part = asked @ self._bank[start : start + piece].T
            more, which = largest(part, min(k, part.shape[1]))
            joined = torch.cat([similarity, more], 1)
            similarity, order = torch.topk(joined, k)
            rows = torch.gather(torch.cat([rows, which + start], 1), 1, order)
        return similarity.cpu().numpy(), rows.cpu().numpy()


def largest(values: Any, k: int) -> tuple[Any, Any]:
    """torch.topk(values, k) of a tensor (Q, n): a partial sort of a few numbers per row in place of all.

    Column g + j * M belongs to group g < M. A value among the k largest lies in one of the k groups with the largest
    maxima, or equals the k-th: else k other groups would each hold a larger one. Groups of sqrt(n / k) columns leave
    as many maxima as values in the groups taken.
    """
    import torch

    num_rows, count = values.shape
    size = isqrt(count // k)
    if size < 2:
        best, columns = torch.topk(values, k)
        return best, columns
    num_groups = count // size  # at least k, since size <= sqrt(count / k)
    split = values[:, : size * num_groups].view(num_rows, size, num_groups)
    groups = torch.topk(split.amax(1), k, sorted=False).indices
    taken = split.gather(2, groups[:, None].expand(-1, size, -1)).view(num_rows, -1)  # (Q, size * k)
    best, place = torch.topk(torch.cat([taken, values[:, size * num_groups :]], 1), k)
    within = place // k * num_groups + groups.gather(1, place % k)
    return best, torch.where(place < size * k, within, place + size * (num_groups - k))


def build_index(bank: Float[np.ndarray, "N D"], backend: Backend, device: Device = "auto") -> tuple[Index, str]:
    """An index over unit float32 rows, and what searches it: "faiss", "faiss-gpu", "torch" or "torch-cuda".

    `auto` takes FAISS where it can be imported, and a GPU where that build of FAISS, or torch in its place, has one.

    Raises:
        ConfigError: an unknown backend or device, or FAISS asked for by name where it cannot be imported.
        DeviceError: CUDA asked for by name where neither FAISS nor torch sees a GPU.
    """
    if backend not in ("auto", "faiss", "torch"):
        raise ConfigError(f"backend is 'auto', 'faiss' or 'torch', got {backend!r}")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is 'auto', 'cpu' or 'cuda', got {device!r}")
    faiss = None if backend == "torch" else _faiss_or_none(backend)
    if faiss is not None:
        gpu = device != "cpu" and _faiss_gpus(faiss) > 0
        # A GPU that only torch can use is worth it when it is asked for; FAISS on the CPU needs no torch at all.
        if gpu or device != "cuda":
            return FaissIndex(faiss, bank, gpu=gpu), "faiss-gpu" if gpu else "faiss"
        if backend == "faiss":
            raise DeviceError(
                "device='cuda' with FAISS needs faiss-gpu and a GPU that it sees; install featstore[gpu] in place of "
                "featstore[cpu], or use backend='torch' or device='cpu'"
            )
    cuda = device != "cpu" and _torch_has_cuda()
    if device == "cuda" and not cuda:
        raise DeviceError("device='cuda' needs a GPU, and torch sees none; use device='cpu' or 'auto'")
    return TorchIndex(bank, "cuda" if cuda else "cpu"), "torch-cuda" if cuda else "torch"


def _faiss_or_none(backend: Backend) -> Any:
    try:
        return import_faiss()
    except Exception as error:  # a build for another numpy or CPU fails in many ways
        reason = f"FAISS cannot be imported ({type(error).__name__}: {error})"
        if backend == "faiss":
            raise ConfigError(f"{reason}; install featstore[cpu] or featstore[gpu], or use backend='torch'") from error
        logger.warning("%s; searching with torch, which finds the same neighbours", reason)
        return None


def _faiss_gpus(faiss: Any) -> int:
    """GPUs that this build of FAISS can use; those without CUDA lack the resources to ask with."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def _torch_has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def ranked(
    index: Index, queries: Float[np.ndarray, "Q D"], k: int
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """(similarity, row) of the k nearest rows in descending order; equal similarities in order of the row.

    The order is that of the float64 products of the float32 rows, whatever searched.
    """
    num_rows = len(index.bank)
    asked = min(k + SPARE, num_rows)
    similarity, rows = index.nearest(queries, asked)
    similarity, rows = np.array(similarity), np.array(rows, dtype=np.int64)
    near = rounding(queries.shape[1])
    close = similarity[:, :-1] - similarity[:, 1:] <= near  # (Q, asked - 1)
    # Which of more than SPARE equal rows came back is chance: these queries rank the whole bank.
    whole = close[:, k - 1 :].all(1) if asked < num_rows else np.zeros(len(queries), dtype=bool)
    unsure = np.zeros(similarity.shape, dtype=bool)
    unsure[:, :-1] |= close
    unsure[:, 1:] |= close
    unsure[whole] = False
    query, place = np.nonzero(unsure)
    exact = similarity.astype(np.float64)
    exact[query, place] = products(index.bank, queries, rows[query, place], query)
    touched = np.flatnonzero(unsure.any(1))
    order = np.lexsort((rows[touched], -exact[touched]))
    similarity[touched] = np.take_along_axis(exact[touched], order, 1)
    rows[touched] = np.take_along_axis(rows[touched], order, 1)
    for number in np.flatnonzero(whole):
        every = index.bank @ queries[number]
        kept = np.flatnonzero(every >= np.partition(every, num_rows - k)[num_rows - k] - near)
        values = products(index.bank, queries, kept, np.full(len(kept), number))
        best = np.lexsort((kept, -values))[:k]
        similarity[number, :k], rows[number, :k] = values[best], kept[best]
    return similarity[:, :k], rows[:, :k]


def rounding(width: int) -> float:
    """What two float32 products of the same unit rows, taken in different order, may differ by: far above what is
    seen (errors grow with the root of the width), far below what separates images."""
    return float(2.0**-23 * max(8.0, np.sqrt(width)))


def products(
    bank: Float[np.ndarray, "N D"],
    queries: Float[np.ndarray, "Q D"],
    rows: Int[np.ndarray, " P"],
    query: Int[np.ndarray, " P"],
) -> Float64[np.ndarray, " P"]:
    """Products of pairs (row of the bank, number of a query) in float64, each summed in the same order."""
    result = np.empty(len(rows))
    for start in range(0, len(rows), PAIRS):
        part = slice(start, start + PAIRS)
        left, right = bank[rows[part]].astype(np.float64), queries[query[part]].astype(np.float64)
        result[part] = np.einsum("pd,pd->p", left, right)
    return result


def distances(
    bank: Float[np.ndarray, "N D"], queries: Float[np.ndarray, "Q D"], rows: Int[np.ndarray, "Q k"]
) -> Float64[np.ndarray, "Q k"]:
    """1 - cosine in float64 by differences of the rows, so that equal rows are at exactly 0."""
    result = np.empty(rows.shape)
    step = max(1, PAIRS // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        apart = bank[rows[part]].astype(np.float64) - queries[part, None]
        result[part] = np.einsum("qkd,qkd->qk", apart, apart) / 2
    return result


def unit_rows(X: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Rows divided by their L2 norm, float32.

    Raises:
        TaskError: a row is not finite, or zero.
    """
    result = np.empty(X.shape, np.float32)
    step = max(1, CACHED // max(1, X.shape[1]))
    for start in range(0, len(X), step):
        part = X[start : start + step].astype(np.float64)
        square = np.einsum("ij,ij->i", part, part)
        odd = np.flatnonzero(~((square > 1e-200) & (square < 1e200)))
        if len(odd):
            check_finite(X)
            largest = np.abs(part[odd]).max(1, initial=0)
            if not largest.all():
                row = start + int(odd[largest.argmin()])
                raise TaskError(
                    f"row {row} of the features is zero and has no direction; leave failed rows out with the mask"
                )
            part[odd] /= largest[:, None]  # squares had left the range of float64
            square[odd] = np.square(part[odd]).sum(1)
        np.multiply(part, (1 / np.sqrt(square))[:, None], out=result[start : start + step], casting="same_kind")
    return result


def import_faiss() -> Any:
    """Import FAISS with the kernels that its OpenBLAS would not find by itself.

    The OpenBLAS inside faiss-cpu predates current processors and falls back to SSE3 code there, five times slower;
    numpy's own, newer OpenBLAS knows what this processor can do.
    """
    with _openblas_kernels():
        import faiss
    return faiss


def _has_avx512() -> bool:
    """Whether Linux lists what SkylakeX kernels need; of newer processors OpenBLAS may know no more than Haswell."""
    listed = Path("/proc/cpuinfo")
    flags = listed.read_text(errors="replace") if listed.exists() else ""
    return all(f" {name} " in flags for name in ("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"))


@contextmanager
def _openblas_kernels() -> Iterator[None]:
    name = "OPENBLAS_CORETYPE"
    from threadpoolctl import threadpool_info

    numpy_blas = [
        entry for entry in threadpool_info() if entry["internal_api"] == "openblas" and "numpy" in entry["filepath"]
    ]
    kernels = numpy_blas[0].get("architecture") if numpy_blas else None
    # The newer names are refinements of SkylakeX (AVX-512) that an old library does not know.
    kernels = "SkylakeX" if kernels in ("Cooperlake", "SapphireRapids") or _has_avx512() else kernels
    if name in os.environ or kernels not in ("Haswell", "SkylakeX", "Zen"):
        yield
        return
    os.environ[name] = kernels
    try:
        yield
    finally:
        del os.environ[name]
