"""Label noise as the chest paper adds it: asymmetric flips of training labels, the same ones at every call.

Each positive flips with probability r, each negative with r / 4, over the abnormal labels; "No finding" is then 1 where
none of them is. Whether an entry flips hangs on the seed, the label and the sample's id alone, so neither the order of
rows nor other rows matter, and the flips at a smaller r are among those at a larger one. Source: Tayebi Arasteh et al.
2025 (r from 0 to 0.4, seed 42, VinDr-CXR).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from featstore.datasets.splits import seeded_rank
from featstore.errors import TaskError
from probes.policies import UNCERTAIN
from probes.taskspec import Noise
from probes.words import word_of

NO_FINDING = "no_finding"
NEGATIVE_SHARE = 0.25  # of the ratio of the positives


def abnormal(labels: Sequence[str]) -> list[int]:
    """Columns of the labels that flip: all but "No finding", and but the label that says that one was uncertain."""
    return [number for number, name in enumerate(labels) if word_of(name) != NO_FINDING and name != UNCERTAIN]


def draws(labels: Sequence[str], ids: Sequence[str], seed: int) -> Float[np.ndarray, "n L"]:
    """A number in [0, 1) for every entry of the abnormal labels; 1 for the others, which never flip."""
    found = np.ones((len(ids), len(labels)))
    for column in abnormal(labels):
        found[:, column] = [seeded_rank(f"{labels[column]}\0{sample}", seed) for sample in ids]
    return found


def flipped(
    y: Int[np.ndarray, "n L"],
    mask: Bool[np.ndarray, "n L"],
    labels: Sequence[str],
    drawn: Float[np.ndarray, "n L"],
    ratio: float,
) -> tuple[Int[np.ndarray, "n L"], tuple[int, int, int]]:
    """Labels with noise, and how many positives, negatives and entries of "No finding" changed.

    Masked entries stay as they are, and count as not positive where "No finding" is computed again.
    """
    change = mask & (drawn < np.where(y == 1, ratio, ratio * NEGATIVE_SHARE))
    noisy = np.where(change, 1 - y, y).astype(y.dtype)
    found = noisy[:, abnormal(labels)] * mask[:, abnormal(labels)]
    recomputed = 0
    for column in (number for number, name in enumerate(labels) if word_of(name) == NO_FINDING):
        after = np.where(mask[:, column], (found == 0).all(1).astype(y.dtype), y[:, column])
        recomputed += int((after != y[:, column]).sum())
        noisy[:, column] = after
    return noisy, (int((change & (y == 1)).sum()), int((change & (y == 0)).sum()), recomputed)


def add_noise(
    noise: Noise,
    labels: Sequence[str],
    ids: Sequence[str],
    train: tuple[Int[np.ndarray, "n L"], Bool[np.ndarray, "n L"]],
    evaluation: tuple[Int[np.ndarray, "n L"], Bool[np.ndarray, "n L"]],
) -> tuple[np.ndarray, np.ndarray, str]:
    """(labels of training rows under the training policy, the same under the evaluation policy, a note).

    Both readings get the same flips, so that scores of training rows held out of a fold are not measured against
    labels that the head was denied.

    Raises:
        TaskError: no label can flip.
    """
    if not abnormal(labels):
        raise TaskError(f"--label-noise flips abnormal labels, and the task has none: {', '.join(labels)}")
    drawn = draws(labels, ids, noise.seed)
    y_train, counts = flipped(*train, labels, drawn, noise.ratio)
    y, _ = flipped(*evaluation, labels, drawn, noise.ratio)
    of = train[1][:, abnormal(labels)]
    positives = int(((train[0][:, abnormal(labels)] == 1) & of).sum())
    text = (
        f"label noise {100 * noise.ratio:g}% (seed {noise.seed}): {counts[0]} of {positives} positives and {counts[1]} "
        f"of {int(of.sum()) - positives} negatives of train flipped; val and test as they are"
    )
    return (
        y_train,
        y,
        text + (f"; No finding changed in {counts[2]} rows" if len(abnormal(labels)) < len(labels) else ""),
    )
