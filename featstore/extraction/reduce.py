"""Patch tokens made smaller: on the device, with parameters fitted on a sample, at a loss that is measured and kept.

The sample is drawn once, when an array is created: half of it fits, the other half measures. Whoever creates the set
first settles the parameters; a resumed or grown set keeps them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from featstore import files
from featstore.backbones.tokens import Tokens
from featstore.configs import RunConfig
from featstore.datasets.manifest import Manifest
from featstore.errors import ConfigError, StoreError
from featstore.extraction.loader import Job, open_loader
from featstore.extraction.plan import Plan
from featstore.images import PreprocessSpec, stack
from featstore.store import reductions
from featstore.store.layout import ArraySpec
from featstore.store.reductions import LEVELS, SAMPLE, SEED, Reduction

Forward = Callable[[np.ndarray], Tokens]  # stacked images (B, C, H, W) -> tokens of the batch

FIT_TOKENS = 16384  # tokens that parameters are fitted on, spread evenly over the images; bounds memory
BANK_TOKENS = 2048  # tokens among which neighbours are looked for
NEIGHBOURS = 10
# int8 covers the sample's range and a quarter more, and 5 standard deviations where that is wider: a sample of few
# tokens has a narrow range. Measured on 128 images by the tiny network: fitted on 128 others, the bare range cuts off
# 3.5e-4 of the numbers and the worst token keeps a cosine of 0.9981; range x 1.25 2.5e-6 and 0.99985; with the
# deviations nothing and 0.99995, at a relative error of 0.009. Fitted on 2 images, range x 1.25 alone cuts off 1.5e-2
# and has a relative error of 0.055; with the deviations 2.8e-4 and 0.010.
HEADROOM, DEVIATIONS = 1.25, 5.0


class Reducer:
    """The steps of one array on a device."""

    def __init__(self, reduction: Reduction, device: torch.device | str):
        self.reduction = reduction
        self.parameters = {name: torch.from_numpy(values).to(device) for name, values in reduction.parameters.items()}

    def floats(self, patches: Float[Tensor, "B P D"]) -> Float[Tensor, "B Q C"]:
        """Everything before int8, in float32."""
        values = patches.float()
        if self.reduction.cell > 1:
            rows, columns = self.reduction.grid
            planes = values.transpose(1, 2).reshape(len(values), -1, rows, columns)
            # Cells that reach over the edge are divided by what they hold.
            pooled = torch.nn.functional.avg_pool2d(planes, self.reduction.cell, ceil_mode=True)
            values = pooled.flatten(2).transpose(1, 2)
        if self.reduction.components is not None:
            values = (values - self.parameters["mean"]) @ self.parameters["axes"].T
        return values

    def levels(self, values: Float[Tensor, "B Q C"]) -> Float[Tensor, "B Q C"]:
        """Steps of the int8 scale, rounded and not yet cut off at its ends."""
        return ((values - self.parameters["offset"]) / self.parameters["scale"]).round()

    def __call__(self, patches: Float[Tensor, "B P D"]) -> Shaped[Tensor, "B Q C"]:
        """Rows to store: int8, or float32 still to be cast."""
        values = self.floats(patches)
        return self.quantised(values) if self.reduction.is_int8 else values

    def quantised(self, values: Float[Tensor, "B Q C"]) -> Shaped[Tensor, "B Q C"]:
        return self.levels(values).clamp(-LEVELS, LEVELS).to(torch.int8)


@dataclass(frozen=True, slots=True)
class Sample:
    """Decoded images (C, H, W) to fit and to measure on, and the split that they are from (`all` for any)."""

    fit: list[np.ndarray]
    measure: list[np.ndarray]
    split: str


def draw_sample(manifest: Manifest, spec: PreprocessSpec, run: RunConfig, *, count: int = SAMPLE) -> Sample:
    """The first `count` decodable images of a seeded permutation: training images only, where there are at least two.

    Their first half fits and the second measures; one image alone does both. Decoded as `run` says.
    """
    train = np.flatnonzero(np.asarray(manifest.column("split")) == "train")
    candidates = train if len(train) > 1 else np.arange(len(manifest))
    order = np.random.default_rng(SEED).permutation(candidates).tolist()
    jobs = [Job(-1, tuple(order[first : first + 16])) for first in range(0, len(order), 16)]
    found: list[np.ndarray] = []
    with open_loader(manifest, spec, jobs, run) as loader:
        for batch in loader:
            found += [image for image, state in zip(batch.pixels, batch.states) if state.reason is None]
            if len(found) >= count:
                break
    found = found[:count]
    half = -(-len(found) // 2)
    return Sample(found[:half], found[half:] or found, "train" if candidates is train else "all")


@dataclass(frozen=True, slots=True)
class Settled:
    """The plan, whose spec describes the arrays of a new set; the arrays measured here, and their parameter file."""

    plan: Plan
    arrays: list[str]
    parameters: str | None


def settle(plan: Plan, forward: Forward, run: RunConfig, *, batch_size: int, say: Callable[[str], None]) -> Settled:
    """Fit and measure the reductions of arrays that have none yet.

    Parameters are on disk before anything names them. What others settled first stays.

    Raises:
        ConfigError: no image can be decoded, or more components are asked for than tokens are sampled.
        StoreError: the reduced sample does not fit the stored type.
    """
    steps = reductions.steps_of(plan.spec)
    exists = (plan.folder / "spec.json").is_file()
    new = [
        array
        for array in plan.arrays
        if reductions.is_reduced(array.name, steps)
        and not (exists and reductions.description(plan.folder, plan.spec, array.name))
    ]
    if not new:
        return Settled(plan, [], None)
    say(f"{plan.name}: fitting and measuring {','.join(steps)} on up to {SAMPLE} images")
    sample = draw_sample(plan.manifest, plan.preprocess, run)
    if not sample.fit:
        raise ConfigError(
            f"--reduce {','.join(steps)} is fitted and measured on a sample, and no image of {plan.manifest.name} "
            "could be decoded; check the root and the files"
        )
    rows, columns = plan.source.architecture.grid(plan.preprocess.height, plan.preprocess.width)
    base = Reduction(
        steps=steps,
        grid=(rows, columns),
        dim=plan.source.architecture.patch_width,
        dtype="float16" if plan.spec["identity"]["stored_dtype"] == "float16" else "float32",
    )

    def tokens(images: list[np.ndarray], name: str) -> Iterator[Float32[np.ndarray, "B P D"]]:
        for first in range(0, len(images), batch_size):
            batch = [*images[first : first + batch_size]]
            padded = batch + [None] * (batch_size - len(batch))
            found = patches_of(forward(stack(padded, plan.preprocess)), name)[: len(batch)]
            yield found.float().cpu().numpy()

    fitted: dict[str, Reduction] = {}
    for array in new:
        full = ArraySpec(
            name=array.name, row_shape=(rows * columns, base.dim), dtype=plan.spec["identity"]["stored_dtype"]
        )
        reduction = fit(base, array.name, tokens(sample.fit, array.name), len(sample.fit))
        loss = measure(reduction, full, tokens(sample.measure, array.name), len(sample.measure))
        fitted[array.name] = replace(reduction, loss=loss)
    return _keep(plan, fitted, sample, exists=exists)


def _keep(plan: Plan, fitted: dict[str, Reduction], sample: Sample, *, exists: bool) -> Settled:
    """Write the parameters, and the description where the spec already stands."""
    same = sample.fit[0] is sample.measure[0]
    facts = {
        "images": len(sample.fit) + (0 if same else len(sample.measure)),
        "fitted_on": len(sample.fit),
        "measured_on": len(sample.measure),
        "same_images": same,
        "split": sample.split,
        "manifest": plan.manifest.short,
    }
    name = reductions.write_parameters(plan.folder, fitted)
    arrays = {array: reductions.describe(reduction) for array, reduction in fitted.items()}
    if not exists:
        held = {"parameters": name, "sample": facts, "arrays": arrays}
        return Settled(replace(plan, spec={**plan.spec, "reduction": held}), list(fitted), name)
    for array, entry in arrays.items():
        described = {"parameters": name, "sample": facts, "arrays": {array: entry}}
        files.create_exclusive(reductions.added_path(plan.folder, array), files.sealed(described))
    return Settled(plan, list(fitted), name)


def patches_of(tokens: Tokens, name: str) -> Float[Tensor, "B P D"]:
    """Patches behind `patches` or `layers/<k>/patches`."""
    *layer, _ = name.split("/")
    return tokens.layers[int(layer[1])].patches if layer else tokens.patches


def fit(base: Reduction, name: str, batches: Iterator[Float32[np.ndarray, "B P D"]], num_images: int) -> Reduction:
    """Fit what the steps need on the tokens of some images.

    Raises:
        ConfigError: pca asks for more components than there are tokens.
        StoreError: tokens are not finite, or int8 would decode to more than the stored type holds.
    """
    if base.components is None and not base.is_int8:
        return base
    pooling = Reducer(replace(base, steps=base.steps[:1] if base.cell > 1 else ()), "cpu")
    quota = max(1, FIT_TOKENS // num_images)
    rng = np.random.default_rng(SEED)
    kept = []
    for batch in batches:
        for image in pooling.floats(torch.from_numpy(batch)).numpy():
            kept.append(image[_draw(rng, len(image), quota)])
    sample = np.concatenate(kept)  # (N, D)
    if not np.isfinite(sample).all():
        raise StoreError(f"{name}: tokens of the sample hold infinity or NaN; check the weights and the compute dtype")
    parameters: dict[str, np.ndarray] = {}
    if base.components is not None:
        mean, axes = principal_axes(sample, base.components)
        parameters = {"mean": mean, "axes": axes}
        sample = (sample - mean) @ axes.T
    if base.is_int8:
        offset, scale = int8_scale(sample)
        parameters |= {"offset": offset, "scale": scale}
        largest = float((np.abs(offset) + LEVELS * scale).max())
        if largest > float(np.finfo(base.dtype).max):
            raise StoreError(
                f"{name}: int8 would decode to values of {largest:.3g}, more than {base.dtype} holds; "
                "decode to float32 (--dtype float32)"
            )
    return replace(base, parameters=parameters)


def _draw(rng: np.random.Generator, count: int, quota: int) -> np.ndarray:
    """Sorted positions, `quota` of `count` or all."""
    return np.sort(rng.choice(count, min(count, quota), replace=False))


def principal_axes(
    tokens: Float32[np.ndarray, "N D"], components: int
) -> tuple[Float32[np.ndarray, " D"], Float32[np.ndarray, "K D"]]:
    """Mean and the first principal axes, from the covariance in float64; an axis' largest entry is positive.

    Raises:
        ConfigError: fewer tokens than components.
    """
    if components > len(tokens):
        raise ConfigError(
            f"--reduce pca:{components} needs at least {components} tokens to be fitted on, the sample has "
            f"{len(tokens)}; ask for fewer components or register more images"
        )
    mean = tokens.mean(0, dtype=np.float64)
    centred = tokens - mean
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1].T[:components]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
    return mean.astype(np.float32), (axes * np.sign(largest)).astype(np.float32)


def int8_scale(values: Float32[np.ndarray, "N C"]) -> tuple[Float32[np.ndarray, " C"], Float32[np.ndarray, " C"]]:
    """Offset and step of each dimension: the middle of its range, and a wider range divided by 2 x 127."""
    low, high = values.min(0), values.max(0)
    offset = (low / 2 + high / 2).astype(np.float32)
    half = np.maximum(HEADROOM * (high / 2 - low / 2), DEVIATIONS * values.std(0, dtype=np.float64))
    least = max(1e-6 * float(max(half.max(), np.abs(offset).max())), 1e-30)  # a constant dimension needs a step, too
    return offset, (np.maximum(half, least) / LEVELS).astype(np.float32)


def measure(
    reduction: Reduction, array: ArraySpec, batches: Iterator[Float32[np.ndarray, "B P D"]], num_images: int
) -> dict[str, Any]:
    """What is lost between the network's float32 tokens and what a reader gets back at their size.

    `array` is the array as it would be without reductions.

    Returns:
        bytes_per_row and full_bytes_per_row; relative_error (RMSE / RMS), cosine_mean and cosine_worst over all tokens;
        neighbours_images and neighbours_tokens, the share of the nearest neighbours by cosine that stays (of the mean
        of each image, and of tokens drawn from all images); saturated, the share of numbers that int8 cut off.

    Raises:
        StoreError: the sample does not fit the stored type.
    """
    reducer = Reducer(reduction, "cpu")
    quota, rng = max(1, BANK_TOKENS // num_images), np.random.default_rng(SEED)
    squares = error = cosines = saturated = 0.0
    worst, numbers, count = 1.0, 0, 0
    means: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    bank: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for batch in batches:
        floats = reducer.floats(torch.from_numpy(batch))
        if reduction.is_int8:
            saturated += float((reducer.levels(floats).abs() > LEVELS).sum())
            numbers += floats.numel()
        for exact, back in zip(batch.astype(np.float64), _returned(reduction, array, reducer, floats)):
            squares, error = squares + (exact**2).sum(), error + ((exact - back) ** 2).sum()
            cosine = (_unit(exact) * _unit(back)).sum(1)
            worst, cosines, count = min(worst, float(cosine.min())), cosines + cosine.sum(), count + len(cosine)
            chosen = _draw(rng, len(exact), quota)
            for one, (mean, tokens) in zip((exact, back), zip(means, bank)):
                mean.append(one.mean(0))
                tokens.append(one[chosen])
    return {
        "bytes_per_row": reduction.array(array).row_bytes,
        "full_bytes_per_row": array.row_bytes,
        "relative_error": _rounded(np.sqrt(error / max(squares, 1e-300))),
        "cosine_mean": _rounded(cosines / count),
        "cosine_worst": _rounded(worst),
        "neighbours_images": neighbour_overlap(np.array(means[0]), np.array(means[1])),
        "neighbours_tokens": neighbour_overlap(np.concatenate(bank[0]), np.concatenate(bank[1])),
        "saturated": _rounded(saturated / max(numbers, 1)),
    }


def _returned(
    reduction: Reduction, array: ArraySpec, reducer: Reducer, floats: Float[Tensor, "B Q C"]
) -> Iterator[np.ndarray]:
    """Images (P, D) as they come back from the store, pooled grids spread out again.

    Raises:
        StoreError: they do not fit the stored type.
    """
    if reduction.is_int8:
        stored = reducer.quantised(floats).numpy()
    else:
        stored = floats.to(getattr(torch, array.dtype)).float().numpy()
    if not np.isfinite(stored).all():
        raise StoreError(
            f"{array.name}: the reduced sample does not fit {array.dtype}; store float32 (--dtype float32)"
        )
    for image in stored:
        yield reduction.spread(reduction.restore(reduction.decode(image))).astype(np.float64)


def _unit(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12))


def neighbour_overlap(exact: np.ndarray, back: np.ndarray) -> dict[str, Any]:
    """{"k": neighbours looked at, "among": rows, "overlap": mean share of the k nearest rows (cosine) in common}."""
    k = min(NEIGHBOURS, len(exact) - 1)
    if k < 1:
        return {"k": 0, "among": len(exact), "overlap": None}
    nearest = []
    for rows in (exact, back):
        similar = _unit(rows) @ _unit(rows).T
        np.fill_diagonal(similar, -np.inf)
        nearest.append(np.argpartition(-similar, k - 1, axis=1)[:, :k])
    shared = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(*nearest)])
    return {"k": k, "among": len(exact), "overlap": _rounded(shared)}


def _rounded(value: Any) -> float:
    return float(f"{float(value):.6g}")


def summary_line(reduction: Reduction, array: str) -> str:
    """The measured loss in one line."""
    loss = reduction.loss
    tokens = loss["neighbours_tokens"]
    kept = loss["bytes_per_row"] / loss["full_bytes_per_row"]
    overlap = "" if tokens["overlap"] is None else f", {tokens['overlap']:.3f} of {tokens['k']} neighbours kept"
    cut = f", {loss['saturated']:.2%} cut off" if reduction.is_int8 else ""
    return (
        f"{array} reduced by {','.join(reduction.steps)}: {loss['bytes_per_row']} instead of "
        f"{loss['full_bytes_per_row']} bytes a row ({kept:.1%}); relative error {loss['relative_error']:.3g}, cosine "
        f"{loss['cosine_mean']:.4f} (worst {loss['cosine_worst']:.4f}){overlap}{cut}"
    )
