"""How long a plan will take, from a matrix product of a tenth of a second on the device that will run it."""

import time

import torch

# Share of the matrix-product rate that a transformer's forward pass reaches: 0.5 on few CPU cores and on a GPU without
# compilation (measured on a 2-core CPU, float32, ViT-S at 224).
EFFICIENCY = 0.5


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


def forward_seconds(gflop: float, device: str, compute_dtype: str) -> float:
    """Estimated seconds of backbone work, decoding not included."""
    return gflop / (EFFICIENCY * matmul_gflops(device, getattr(torch, compute_dtype)))
