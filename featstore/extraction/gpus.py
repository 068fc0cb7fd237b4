"""What a named GPU could do: the FLOP model for plans of machines that are not at hand; no torch, nothing measured.

A transformer block moves about 68 bytes per token and dimension where torch.compile fuses what lies between the matrix
products, 120 where it does not, for 24 dimensions squared FLOP. With R FLOP of matrix products for every byte that
memory can move, the share of the peak that is left is 1 / (1 + bytes / 24 * R / width). Published rates of compiled
DINO networks on an RTX 4090 (timm's result files) lie within 0.04 of that.
"""

import difflib
import math
from dataclasses import dataclass
from typing import Any

from featstore.errors import UnknownNameError

FUSED_BYTES, EAGER_BYTES = 68.0, 120.0  # moved per token, block and dimension
BLOCK_FLOP = 24.0  # per token, block and dimension squared
REACHED = 0.85  # share of that ceiling which a run is asked to reach
TOKENS, LARGEST = 65536, 256  # a batch, as `batching.default_batch_size` cuts it on a GPU
WORKING_BYTES = 1.5e9  # context, kernels and workspace of torch on a card


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card: dense TFLOP/s of matrix products (accumulated in float32), memory in TB/s and GB.

    `bfloat16` is the maker's figure, for H100 and H200 four fifths of it, which is what they keep up under load.
    """

    name: str
    bfloat16: float
    float32: float
    bandwidth: float
    memory: float
    has_bfloat16: bool = True

    def tflops(self, dtype: str) -> float:
        return self.float32 if dtype == "float32" else self.bfloat16

    def share(self, width: int, dtype: str, *, fused: bool) -> float:
        """Share of the peak that memory traffic leaves to a transformer of this width."""
        ridge = self.tflops(dtype) / self.bandwidth  # FLOP a byte
        moved = (FUSED_BYTES if fused else EAGER_BYTES) * (2 if dtype == "float32" else 1)
        return 1 / (1 + moved / BLOCK_FLOP * ridge / width)

    def seconds(self, gflop: float, width: int, dtype: str, *, fused: bool) -> float:
        """Seconds of forward passes worth `gflop`."""
        return gflop / (1e3 * self.tflops(dtype) * self.share(width, dtype, fused=fused) * REACHED)


# Sources: the makers' data sheets of each card.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 1800.0, 75.0, 8.0, 180.0),
        Gpu("h200", 790.0, 67.0, 4.8, 141.0),
        Gpu("h100", 790.0, 67.0, 3.35, 80.0),
        Gpu("h100-pcie", 600.0, 51.0, 2.0, 80.0),
        Gpu("gh200", 790.0, 67.0, 4.0, 96.0),
        Gpu("a100", 312.0, 19.5, 2.0, 80.0),
        Gpu("a100-40", 312.0, 19.5, 1.555, 40.0),
        Gpu("a40", 150.0, 37.0, 0.696, 48.0),
        Gpu("a10", 125.0, 31.0, 0.6, 24.0),
        Gpu("l40s", 362.0, 91.0, 0.864, 48.0),
        Gpu("l4", 121.0, 30.0, 0.3, 24.0),
        Gpu("rtx-5090", 209.0, 105.0, 1.79, 32.0),
        Gpu("rtx-4090", 165.0, 83.0, 1.008, 24.0),
        Gpu("rtx-3090", 71.0, 36.0, 0.936, 24.0),
        Gpu("rtx-a6000", 155.0, 39.0, 0.768, 48.0),
        Gpu("v100", 125.0, 15.7, 0.9, 32.0, has_bfloat16=False),
        Gpu("t4", 65.0, 8.1, 0.32, 16.0, has_bfloat16=False),
    )
}


def find_gpu(name: str) -> Gpu:
    """A card by its name, however it is spelled.

    Raises:
        UnknownNameError: it is not in the table.
    """
    plain = {key.replace("-", ""): gpu for key, gpu in GPUS.items()}
    asked = "".join(letter for letter in name.lower() if letter.isalnum())
    for prefix in ("", "rtx"):
        if prefix + asked in plain:
            return plain[prefix + asked]
    near = difflib.get_close_matches(name.lower(), GPUS, n=2)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UnknownNameError(f"unknown GPU {name!r}; {hint}known: {', '.join(sorted(GPUS))}")


def gpu_batch_size(num_tokens: int, *, asked: int | None, budget: int | None, block_rows: int) -> int:
    """Images of a batch on a GPU, as `batching.default_batch_size` and the run choose it."""
    size: int = 1 << int(math.log2(max(1, (budget or TOKENS) // num_tokens)))
    return min(asked or (size if budget else min(size, LARGEST)), block_rows)


def gpu_memory(architecture: Any, num_tokens: int, batch_size: int, pixels: int, dtype: str) -> tuple[float, float]:
    """(bytes of weights, of activations and working space) that a network needs on a card."""
    item = 4 if dtype == "float32" else 2
    weights = float(item * architecture.num_parameters())
    hidden = getattr(architecture, "mlp_dim", 4 * architecture.patch_width)
    rows = batch_size * num_tokens * item * (6.0 * architecture.patch_width + 2.0 * hidden)
    return weights, rows + 2.0 * batch_size * 3 * pixels * 4 + WORKING_BYTES
