"""How long a plan will take, from a matrix product of a tenth of a second on the device that will run it."""

import time

import torch

# Share of the matrix-product rate below that a forward pass of a transformer reaches. CPU: ViT-S at 224, batches of 4
# to 16 on 2 cores with AMX, nothing else running: float32 202 to 217 of 266 GFLOP/s, bfloat16 430 to 970 of 1140. On a
# GPU a guess from published rates of compiled networks (timm), not measured here.
EFFICIENCY = {("cpu", "float32"): 0.75, ("cpu", "bfloat16"): 0.6}
OTHERWISE = 0.5


def matmul_gflops(device: str, dtype: torch.dtype, *, seconds: float = 0.1) -> float:
    """GFLOP/s of square matrix products, the best of as many as fit in the time."""
    size = 4096 if device.startswith("cuda") else 768
    a = torch.ones((size, size), device=device, dtype=dtype)

    def once() -> float:
        started = time.perf_counter()
        a @ a
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once()
    best, deadline = once(), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        best = min(best, once())
    return 2e-9 * size**3 / best


def forward_seconds(gflop: float, device: str, compute_dtype: str, *, seconds: float = 0.1) -> float:
    """Estimated seconds of backbone work, decoding not included."""
    share = EFFICIENCY.get((device.partition(":")[0], compute_dtype), OTHERWISE)
    return gflop / (share * matmul_gflops(device, getattr(torch, compute_dtype), seconds=seconds))
