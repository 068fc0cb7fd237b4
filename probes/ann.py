"""Approximate search for retrieval among very many rows: inverted lists (IVF) or a graph (HNSW), with measured recall.

Probes never use it: their neighbours are exact.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from featstore.errors import ConfigError
from featstore.objects import Place
from probes.neighbours import Index, import_faiss

Kind = Literal["ivf", "hnsw"]
MIN_ROWS_PER_LIST = 39  # FAISS's own lower bound for the training of centroids
HNSW_NEIGHBOURS, HNSW_BUILD, HNSW_SEARCH = 32, 64, 200
SEED = 1234


class Ann(NamedTuple):
    """An approximate index: what searches it, and how it was made, for people."""

    index: Any
    recipe: str

    def search(
        self, queries: Float[np.ndarray, "Q D"], k: int, allowed: Bool[np.ndarray, " N"] | None = None
    ) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """(similarity, row), descending, among the `allowed` rows; row -1 where fewer than k of them were found."""
        more = {}
        if allowed is not None:
            faiss = faiss_or_refuse()
            chosen = faiss.IDSelectorBatch(np.flatnonzero(allowed))
            more["params"] = (
                faiss.SearchParametersIVF(sel=chosen, nprobe=self.index.nprobe)
                if hasattr(self.index, "nprobe")
                else faiss.SearchParametersHNSW(sel=chosen, efSearch=HNSW_SEARCH)
            )
        similarity, rows = self.index.search(np.ascontiguousarray(queries), k, **more)
        return similarity, rows


def build_ann(bank: Float[np.ndarray, "N D"], kind: Kind) -> Ann:
    """An approximate index over unit rows; the seeds are FAISS's own, fixed ones.

    IVF: about 2 sqrt(N) lists, an eighth of which (at least 8) is searched. HNSW: 32 links, 200 candidates.

    Raises:
        ConfigError: FAISS is not installed, or the bank is too small for the index to be of use.
    """
    faiss = faiss_or_refuse()
    num_rows, width = bank.shape
    if kind == "ivf":
        lists = 2 ** int(np.log2(max(1.0, min(2 * np.sqrt(num_rows), num_rows / MIN_ROWS_PER_LIST))))
        if lists < 4:
            raise ConfigError(f"an IVF index needs at least {4 * MIN_ROWS_PER_LIST} rows, got {num_rows}; use exact")
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = SEED
        index.train(bank)
        index.nprobe = min(lists, max(8, lists // 8))
        recipe = f"IVF, {lists} lists, {index.nprobe} searched"
    else:
        index = faiss.IndexHNSWFlat(width, HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD, HNSW_SEARCH
        recipe = f"HNSW, {HNSW_NEIGHBOURS} links, {HNSW_SEARCH} candidates"
    index.add(bank)
    return Ann(index, recipe)


def recall(ann: Ann, exact: Index, queries: Float[np.ndarray, "Q D"], k: int) -> float:
    """Share of the exact k nearest rows that the approximate search finds, over the queries."""
    similarity, _ = exact.nearest(queries, k)
    found, _ = ann.search(queries, k)
    # By similarity, not by row: of equal rows either is right. FAISS marks missing ones by the lowest number.
    return float((found >= similarity[:, -1:] - 1e-6).mean())


def save_ann(ann: Ann, path: Place) -> None:
    """Write the index to a local file."""
    faiss_or_refuse().write_index(ann.index, str(path))


def load_ann(path: Place, recipe: str) -> Ann:
    """Read an index that `save_ann` wrote."""
    return Ann(faiss_or_refuse().read_index(str(path)), recipe)


def faiss_or_refuse() -> Any:
    """FAISS.

    Raises:
        ConfigError: it cannot be imported; there is no approximate search without it.
    """
    try:
        return import_faiss()
    except Exception as error:  # a build for another numpy or CPU fails in many ways
        raise ConfigError(
            f"approximate search needs FAISS, which cannot be imported ({type(error).__name__}: {error}); install "
            "featstore[cpu] or featstore[gpu], or use --index exact"
        ) from error
