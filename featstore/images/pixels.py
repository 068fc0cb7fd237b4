"""The last step, on the device: a batch of intensities becomes the network's input."""

import functools

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from featstore.images.preprocess import PreprocessSpec


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Float32[Tensor, "C 1 1"]:
    """Made once: a copy from the host would make it wait for the device in every batch."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def to_pixels(
    batch: UInt8[Tensor, "B C H W"] | Float32[Tensor, "B C H W"],
    spec: PreprocessSpec,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Float[Tensor, "B 3 H W"]:
    """Scale to [0, 1], subtract the mean, divide by the std, in float32 on the device; then the network's dtype.

    One channel travels to the device and is spread there; the bits are those of three equal channels. The order of the
    operations is that of the image processors of transformers, so that `hf` meets their values exactly.
    """
    values = batch.to(device, non_blocking=True).to(torch.float32)
    if not spec.unit_range:
        # CUDA turns a plain number into a multiplication, which rounds otherwise; a tensor divides as on the CPU.
        values = values / _constant((255.0,), values.device)
    mean, std = _constant(tuple(spec.mean), values.device), _constant(tuple(spec.std), values.device)
    return values.sub(mean).div_(std).to(dtype)  # (B, 3, H, W)
