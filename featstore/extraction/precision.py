"""Precision gate: tokens in another type than float32 are compared with float32 before a set of them is made.

A seeded sample of the data set's images runs through the set's own network and through the same weights in float32 on
the same device. What is measured stands in the new set's spec; below a threshold nothing is created.
"""

import contextlib
import gc
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from featstore import records
from featstore.backbones.tokens import Backbone, Tokens
from featstore.configs import RunConfig
from featstore.errors import ConfigError, WeightsError
from featstore.extraction.backbone import load_for_set
from featstore.extraction.batching import advised
from featstore.extraction.plan import Plan, image_gflops
from featstore.extraction.reduce import Forward, draw_sample, neighbour_overlap
from featstore.images import stack, to_pixels
from featstore.store.reductions import SEED

LARGEST_SAMPLE, SMALLEST_SAMPLE = 64, 2  # images
LEAST_FOR_NEIGHBOURS = 32  # images: among fewer, one that changes its place is a large share
# Work of the sample in float32: about 20 s on two cores (100 GFLOP/s), 10 s on a data-centre GPU (50 TFLOP/s).
GFLOP = {"cpu": 2_000.0, "cuda": 500_000.0}
MEASURES = ("cosine_worst", "cosine_mean", "relative_error", "spread_error", "norm_ratio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """What a gate asks of every array: cosines to float32 of a token, and |norm / norm in float32 - 1|.

    `neighbours` is the least share of nearest images in common, asked from `LEAST_FOR_NEIGHBOURS` images on. None asks
    nothing. Tokens that are not finite are never accepted.
    """

    cosine_worst: float
    cosine_mean: float | None = None
    norm_error: float | None = None
    neighbours: float | None = None


THRESHOLDS = Thresholds(cosine_worst=0.99, cosine_mean=0.999, norm_error=0.05, neighbours=0.9)
THRESHOLDS_8_BIT = Thresholds(cosine_worst=0.98, cosine_mean=0.99, norm_error=0.1, neighbours=0.8)


@dataclass(slots=True)
class _Comparison:
    """Running sums over the tokens of one array."""

    rows: int = 0
    not_finite: int = 0
    cosines: float = 0.0
    worst: float = 1.0
    error: float = 0.0
    squares: float = 0.0
    total: Tensor | None = None
    lowest_norm: float = math.inf
    highest_norm: float = 0.0

    def add(self, exact: Float[Tensor, "B N D"], found: Float[Tensor, "B N D"]) -> None:
        """Compare tokens; those that are not finite are counted and left out of the rest."""
        exact, found = (each.double().flatten(0, 1) for each in (exact, found))  # (B N, D)
        whole = torch.isfinite(found).all(1)
        self.rows, self.not_finite = self.rows + len(found), self.not_finite + int((~whole).sum())
        exact, found = exact[whole], found[whole]
        if not len(exact):
            return
        lengths, found_lengths = exact.norm(dim=1), found.norm(dim=1)
        # Two zeros point the same way; a zero against anything else points nowhere.
        both = (lengths == 0) & (found_lengths == 0)
        cosine = torch.where(both, 1.0, (exact * found).sum(1) / (lengths * found_lengths).clamp(min=1e-300))
        ratio = torch.where(both, 1.0, found_lengths / lengths.clamp(min=1e-300))
        self.cosines, self.worst = self.cosines + float(cosine.sum()), min(self.worst, float(cosine.min()))
        self.error += float((exact - found).square().sum())
        self.squares += float(exact.square().sum())
        self.total = exact.sum(0) if self.total is None else self.total + exact.sum(0)  # (D,)
        self.lowest_norm = min(self.lowest_norm, float(ratio.min()))
        self.highest_norm = max(self.highest_norm, float(ratio.max()))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers; None where no token was finite."""
        compared = self.rows - self.not_finite
        found: dict[str, Any] = {"rows": self.rows, "not_finite": self.not_finite}
        if self.total is None:
            return found | dict.fromkeys(MEASURES)
        spread = self.squares - float(self.total.square().sum()) / compared
        return found | {
            "cosine_worst": _rounded(self.worst),
            "cosine_mean": _rounded(self.cosines / compared),
            "relative_error": _rounded(math.sqrt(self.error / max(self.squares, 1e-300))),
            # Of equal tokens nothing but rounding is left.
            "spread_error": _rounded(math.sqrt(self.error / spread)) if spread > 1e-9 * self.squares else None,
            "norm_ratio": [_rounded(self.lowest_norm), _rounded(self.highest_norm)],
        }


def measure_precision(
    reference: Forward,
    candidate: Forward,
    batches: Iterable[np.ndarray],
    *,
    names: Collection[str] | None = None,
    reference_batch: int | None = None,
) -> dict[str, dict[str, Any]]:
    """What lies between the tokens of a network and those of a reference, array by array.

    Args:
        reference, candidate: stacked images (B, C, H, W) to tokens.
        batches: stacked images. The candidate may give more rows than it got images; the first ones count.
        names: arrays to compare; default: all.
        reference_batch: most images that the reference takes at once; default: as they come.

    Returns:
        For `cls`, `registers`, `patches` and those of kept layers (`layers/<k>/cls`, ...): rows (tokens), not_finite
        (tokens with infinity or NaN, left out of the rest), cosine_worst, cosine_mean, relative_error (RMSE / RMS),
        spread_error (RMSE / RMS of the deviations from the mean token, so that a constant part of all tokens hides
        nothing; None where tokens are equal), norm_ratio ([lowest, highest] norm / norm of the reference) and
        neighbours: of each image's token, or mean of its tokens, the share of the k nearest images by cosine that
        stays.

    Raises:
        WeightsError: the reference's tokens are not finite.
    """
    compared: dict[str, _Comparison] = {}
    means: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for images in batches:
        found = _arrays(candidate(images))
        step = reference_batch or len(images)
        for first in range(0, len(images), step):
            for name, exact in _arrays(reference(images[first : first + step])).items():
                if names is not None and name not in names:
                    continue
                if not torch.isfinite(exact).all():
                    raise WeightsError(
                        f"{name}: tokens of the network in float32 hold infinity or NaN; check the weights"
                    )
                here = found[name][first : first + len(exact)].to(exact.device)
                compared.setdefault(name, _Comparison()).add(exact, here)
                for values, kept in zip((exact, here), means.setdefault(name, ([], []))):
                    kept.append(values.double().mean(1).cpu().numpy())
    return {
        name: one.as_dict() | {"neighbours": _neighbours(*(np.concatenate(side) for side in means[name]))}
        for name, one in compared.items()
    }


def _arrays(tokens: Tokens, prefix: str = "") -> dict[str, Float[Tensor, "B N D"]]:
    """All tokens by the name of their array, empty ones left out."""
    found = {"cls": tokens.cls[:, None], "registers": tokens.registers, "patches": tokens.patches}
    named = {f"{prefix}{name}": values for name, values in found.items() if values.shape[1]}
    for number, inner in tokens.layers.items():
        named |= _arrays(inner, f"layers/{number}/")
    return named


def _neighbours(exact: Float[np.ndarray, "N D"], found: Float[np.ndarray, "N D"]) -> dict[str, Any]:
    """As `neighbour_overlap`, over images whose tokens are finite."""
    whole = np.isfinite(found).all(1)
    return neighbour_overlap(exact[whole], found[whole])


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")


def check_precision(
    arrays: dict[str, dict[str, Any]], thresholds: Thresholds, *, images: int, compute_dtype: str, weight_dtype: str
) -> None:
    """Raise `ConfigError` that names every measure beyond its threshold, unless there is none."""
    kind = compute_dtype if weight_dtype == "same" else f"{compute_dtype} with {weight_dtype} weights"
    exact = "--weight-dtype same" if weight_dtype != "same" else "--compute-dtype float32"
    broken = [
        f"{found['not_finite']} of {found['rows']} {name}" for name, found in arrays.items() if found["not_finite"]
    ]
    if broken:
        wider = "--compute-dtype bfloat16 or float32" if compute_dtype == "float16" else exact
        raise ConfigError(
            f"precision gate: in {kind} tokens that are finite in float32 hold infinity or NaN "
            f"({', '.join(broken)}, on {images} images); use {wider}"
        )
    beyond = [line for name, found in arrays.items() for line in _beyond(name, found, thresholds)]
    if beyond:
        worst = math.floor(1000 * min(found["cosine_worst"] for found in arrays.values())) / 1000
        raise ConfigError(
            f"precision gate: {kind} is too far from float32 on {images} images: {'; '.join(beyond)}. "
            f"Use {exact}, or accept it, which the set then says, with --min-cosine {worst:g}"
        )


def _beyond(name: str, found: dict[str, Any], thresholds: Thresholds) -> Iterator[str]:
    """What is wrong with one array."""
    for label, key, limit in (
        ("worst cosine", "cosine_worst", thresholds.cosine_worst),
        ("mean cosine", "cosine_mean", thresholds.cosine_mean),
    ):
        if limit is not None and found[key] < limit:
            yield f"{name}: {label} {found[key]:.6g} below {limit:g}"
    lowest, highest = found["norm_ratio"]
    furthest = lowest if 1 - lowest > highest - 1 else highest
    if thresholds.norm_error is not None and abs(furthest - 1) > thresholds.norm_error:
        yield f"{name}: a norm of {furthest:.6g} times that in float32, more than {thresholds.norm_error:g} away from 1"
    near = found["neighbours"]
    asked = thresholds.neighbours if near["among"] >= LEAST_FOR_NEIGHBOURS else None
    if asked is not None and near["overlap"] < asked:
        yield f"{name}: {near['overlap']:.3g} of the {near['k']} nearest images in common, below {asked:g}"


def thresholds_of(weight_dtype: str, min_cosine: float | None) -> Thresholds:
    """The gate's own, or the one cosine that the user asks of every token, and then nothing else."""
    if min_cosine is not None:
        return Thresholds(cosine_worst=min_cosine)
    return THRESHOLDS if weight_dtype == "same" else THRESHOLDS_8_BIT


def gate(
    plan: Plan, forward: Forward, run: RunConfig, *, device: str, batch_size: int, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Compare a new set's network with float32, for the set's spec (`precision`); None where it is plain float32.

    `forward` runs the set's network on stacked images as the extraction will, `batch_size` of them at once. The
    reference has the same weights, device, windows and attention, and is let go when this returns.

    Raises:
        ConfigError: the set's precision is below a threshold, or no image can be decoded.
        DeviceError: the reference does not fit, even block by block.
        WeightsError: the reference's tokens are not finite.
    """
    identity = plan.spec["identity"]
    if is_exact(identity):
        return None
    compute_dtype, weight_dtype = str(identity["compute_dtype"]), str(identity.get("weight_dtype", "same"))
    min_cosine = plan.spec.get("request", {}).get("min_cosine")
    thresholds = thresholds_of(weight_dtype, min_cosine)
    count = sample_size(plan, device)
    kind = compute_dtype if weight_dtype == "same" else f"{compute_dtype} with {weight_dtype} weights"
    say(f"{plan.name}: measuring {kind} against plain float32 on up to {count} images")
    sample = draw_sample(plan.manifest, plan.preprocess, run, count=count)
    # Equal images tie for every neighbour, and say nothing new.
    distinct = {image.tobytes(): image for image in (*sample.fit, *sample.measure)}
    images = list(distinct.values())[:count]
    if not images:
        raise ConfigError(
            f"{kind} is compared with float32 on a sample, and no image of {plan.manifest.name} could be decoded: "
            "nothing can be measured, and no set is made; check the root and the files"
        )
    arrays = _measure(plan, forward, run, images, device=device, batch_size=batch_size)
    gc.collect()  # the reference is gone, and its memory is for the run
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    check_precision(arrays, thresholds, images=len(images), compute_dtype=compute_dtype, weight_dtype=weight_dtype)
    return {
        "compared": kind,
        "sample": {"images": len(images), "seed": SEED, "split": sample.split, "manifest": plan.manifest.short},
        "arrays": arrays,
        "thresholds": asdict(thresholds),
        "asked": min_cosine is not None,
        "device": device_name(device),
        "tf32": tf32_state(),
        "versions": records.versions(),
    }


def _measure(
    plan: Plan, forward: Forward, run: RunConfig, images: list[np.ndarray], *, device: str, batch_size: int
) -> dict[str, dict[str, Any]]:
    """`measure_precision` of a plan's network, for the tokens that its set is made of."""
    kept = {array.name.replace("mean_patch", "patches") for array in plan.arrays} | {"cls", "patches"}
    reference = load_reference(plan, run, device)

    def exact(batch: np.ndarray) -> Tokens:
        pixels = to_pixels(torch.from_numpy(batch), plan.preprocess, device=reference.device, dtype=torch.float32)
        short = advised(device, len(batch), batch.shape[2:])
        with torch.inference_mode(), full_float32(), short:
            return reference(pixels, layers=plan.layers)

    def padded(batch: np.ndarray) -> Tokens:  # one shape, as in the run: kernels and rounding are those of the set
        empty = np.zeros((batch_size - len(batch), *batch.shape[1:]), batch.dtype)
        return forward(np.concatenate([batch, empty]))

    batches = (
        stack(images[first : first + batch_size], plan.preprocess) for first in range(0, len(images), batch_size)
    )
    # Numbers of twice the size: half of the images at once.
    return measure_precision(exact, padded, batches, names=kept, reference_batch=max(1, batch_size // 2))


def load_reference(plan: Plan, run: RunConfig, device: str) -> Backbone:
    """The plan's network in float32, with whole matrices; streamed where it does not fit the device."""
    exact = {**plan.spec["identity"], "compute_dtype": "float32", "weight_dtype": "same"}
    settings = replace(
        run,
        compile="off",
        memory="auto" if run.memory in ("resident", "shard") else run.memory,  # the other processes wait meanwhile
        attention="sdpa" if run.attention == "flash" else run.attention,  # FlashAttention has no float32
    )
    return load_for_set(plan.source, exact, settings, device)


def is_exact(identity: dict[str, Any]) -> bool:
    """Whether a set is float32 through and through, and its own reference."""
    return (identity["compute_dtype"], identity.get("weight_dtype", "same")) == ("float32", "same")


def sample_size(plan: Plan, device: str) -> int:
    """Images that the gate may take: as many as the work of a reference pass allows, within bounds."""
    per_image = image_gflops(plan.source, (plan.preprocess.height, plan.preprocess.width), plan.window)
    affordable = GFLOP[device.partition(":")[0]] / max(per_image, 1e-9)
    return int(min(max(affordable, SMALLEST_SAMPLE), LARGEST_SAMPLE))


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Within it matrix products of float32 are of float32: no TF32, and no bfloat16 on a CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def tf32_state() -> dict[str, Any]:
    """Whether products of float32 may be rounded to fewer bits; for records of a run.

    `matmul` and `cudnn` are torch's flags for TF32 on a GPU, None where its two ways of setting them were mixed;
    `precision` is its own word for matrix products (highest, high, medium). Convolutions of the networks of this
    package never use TF32, whatever `cudnn` says.
    """

    def flag(backend: Any) -> bool | None:
        try:
            return bool(backend.allow_tf32)
        except RuntimeError:
            return None

    return {
        "matmul": flag(torch.backends.cuda.matmul),
        "cudnn": flag(torch.backends.cudnn),
        "precision": torch.get_float32_matmul_precision(),
    }


def device_name(device: str) -> str:
    """What people call the processor or the card."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else records.processor_name()
