"""p-values of a family of tests, adjusted so that they can be read one by one. NaN stands for no test and stays."""

import numpy as np
from jaxtyping import Float


def holm(p: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Step-down adjustment: rejecting where it is at most a holds the chance of any false rejection at a.

    Source: Holm 1979. Holds for tests that depend on each other in any way.
    """
    return _adjusted(p, down=True)


def benjamini_hochberg(p: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Step-up adjustment: rejecting where it is at most a holds the expected share of false rejections at a.

    Source: Benjamini and Hochberg 1995. Holds for tests that are independent or depend on each other positively, as
    labels of one patient do.
    """
    return _adjusted(p, down=False)


def _adjusted(p: Float[np.ndarray, " m"], *, down: bool) -> Float[np.ndarray, " m"]:
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    count = len(order)
    ranks = np.arange(count)
    if down:
        values = np.maximum.accumulate(p[order] * (count - ranks))
    else:
        values = np.minimum.accumulate((p[order] * count / (ranks + 1))[::-1])[::-1]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(values, 1)
    return adjusted
