"""What the nearest rows say together: weights of neighbours, and their totals for every k from one search."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Int

Vote = Literal["softmax", "majority", "distance"]
VOTES: tuple[Vote, ...] = ("softmax", "majority", "distance")
# exp of the lowest exponent is above zero in float64, so that every neighbour keeps some weight at any temperature.
LOWEST_EXPONENT = -700.0
# Below any distance of different float32 rows: a neighbour at distance 0 outweighs all others, as in scikit-learn.
SMALLEST_DISTANCE = 1e-30


def softmax_weights(similarity: Float[np.ndarray, "B k"], temperature: float) -> Float64[np.ndarray, "B k"]:
    """softmax(similarity / temperature) over all neighbours; they come in descending order.

    Source: Wu et al. 2018 (weighted k-NN), as DINO evaluates it: the softmax is taken before the cut at a smaller k.
    """
    exponent = (similarity.astype(np.float64) - similarity[:, :1]) / temperature
    weights = np.exp(np.maximum(exponent, LOWEST_EXPONENT))
    return np.asarray(weights / weights.sum(1, keepdims=True))


def distance_weights(distance: Float64[np.ndarray, "B k"]) -> Float64[np.ndarray, "B k"]:
    """1 / distance, scaled to a sum of 1; neighbours at distance 0 share all of the weight.

    Source: Dudani 1976; the rule for distance 0 is scikit-learn's.
    """
    weights = 1 / np.maximum(distance, SMALLEST_DISTANCE)
    return np.asarray(weights / weights.sum(1, keepdims=True))


def class_totals(
    classes: Int[np.ndarray, "B k"], weights: Float64[np.ndarray, "B k"], num_classes: int, ks: Sequence[int]
) -> Iterator[Float64[np.ndarray, "B C"]]:
    """Weight of every class among the first neighbours, for each k of ascending `ks`.

    The neighbours between two counts are added to one accumulator (B, C), so that nothing of size B x k x C is made.
    The array that is given out is overwritten by the next one.
    """
    num_queries = len(classes)
    cell = classes + np.arange(num_queries)[:, None] * num_classes
    total = np.zeros(num_queries * num_classes)
    start = 0
    for k in ks:
        new = slice(start, k)
        if num_classes <= 2 * (k - start):
            total += np.bincount(cell[:, new].ravel(), weights[:, new].ravel(), minlength=len(total))
        else:  # fewer neighbours than classes: a pass over all cells would cost more than the votes
            np.add.at(total, cell[:, new].ravel(), weights[:, new].ravel())
        start = k
        yield total.reshape(num_queries, num_classes)


def label_totals(
    values: Float64[np.ndarray, "N M"],
    rows: Int[np.ndarray, "B k"],
    weights: Float64[np.ndarray, "B k"],
    ks: Sequence[int],
) -> Iterator[Float64[np.ndarray, "B M"]]:
    """Weighted sums of rows of `values` over the first neighbours, for each k: one gather, then a product a segment.

    The array that is given out is overwritten by the next one.
    """
    gathered = values[rows]  # (B, k, M)
    total = np.zeros((len(rows), values.shape[1]))
    start = 0
    for k in ks:
        total += (weights[:, None, start:k] @ gathered[:, start:k])[:, 0]
        start = k
        yield total
