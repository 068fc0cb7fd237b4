"""What a step of fine-tuning costs by method.

On a GPU: networks of random weights, AdamW, batch 32, bfloat16 autocast over float32 weights, no checkpointing; the
median of steps after warm-up and the largest memory that was allocated. Floors, for DINOv2-g at 224: LoRA and BitFit at
least 1.3 times as fast as full, and at most 0.6 of its memory. What cached activations save is `bench_activations.py`.
"""

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from harness import parser, report
from torch.nn.functional import binary_cross_entropy_with_logits

from featstore.backbones import describe
from featstore.backbones.trainable import make_trainable
from probes.adapters import adapt
from probes.tuning_model import Tuned, make_head, make_optimizer
from probes.tuning_recipe import Optimisation

METHODS = ("full", "lora", "bitfit")
CASES = (("dinov3-base", 512), ("dinov2-giant", 224))
QUICK = (("tiny", 42),)
FLOORS = {"speed": 1.3, "memory": 0.6}
LABELS = 14


def step_cost(model: str, size: int, method: str, *, batch: int, device: str, steps: int) -> dict[str, Any]:
    """Median seconds of a training step and the largest memory; memory is 0 on a CPU, which counts no allocations."""
    cuda = device.startswith("cuda")
    torch.manual_seed(0)
    backbone = describe(model, random_weights=0).load(device=device, compute_dtype="float32")
    adapted = adapt(make_trainable(backbone), method, features="cls")
    tuned = Tuned(adapted, "cls", make_head(adapted, "cls", LABELS, 0), "bfloat16")
    how = Optimisation(lr=1e-5)
    optimizer = make_optimizer(tuned, how, tuned.groups(how))
    images = torch.randn(batch, 3, size, size, device=device)
    target = torch.randint(0, 2, (batch, LABELS), device=device).float()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    tuned.train()
    seconds = []
    for number in range(steps + 3):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        binary_cross_entropy_with_logits(tuned(images), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        if number >= 3:
            seconds.append(time.perf_counter() - started)
    return {
        "trainable": tuned.num_trainable(),
        "step_seconds": statistics.median(seconds),
        "images_per_second": batch / statistics.median(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
    }


def steps_by_method(options: argparse.Namespace) -> dict[str, Any]:
    """Every case and method; a case that does not fit the device is named with its reason."""
    found: dict[str, Any] = {}
    for model, size in QUICK if options.quick else CASES:
        costs: dict[str, Any] = {}
        for method in METHODS:
            try:
                costs[method] = step_cost(
                    model, size, method, batch=4 if options.quick else options.batch, device=options.device,
                    steps=2 if options.quick else options.steps,
                )  # fmt: skip
            except torch.cuda.OutOfMemoryError as error:
                costs[method] = {"failed": str(error).splitlines()[0]}
            gc.collect()
            if options.device.startswith("cuda"):
                torch.cuda.empty_cache()
        found[f"{model} {size}"] = costs | {"against_full": against_full(costs)}
    return found


def against_full(costs: dict[str, Any]) -> dict[str, Any]:
    """Of each other method how many times faster than full it is, its share of the memory, and whether floors hold."""
    found: dict[str, Any] = {}
    full = costs["full"]
    for method in METHODS[1:]:
        if "failed" in full or "failed" in costs[method]:
            continue
        speed = full["step_seconds"] / costs[method]["step_seconds"]
        memory = costs[method]["peak_bytes"] / full["peak_bytes"] if full["peak_bytes"] else None
        found[method] = {
            "speed": speed,
            "memory": memory,
            "held": speed >= FLOORS["speed"] and (memory is None or memory <= FLOORS["memory"]),
        }
    return found


def main() -> None:
    """Parse, measure, report."""
    made = parser(__doc__ or "")
    made.add_argument("--device", default="cuda", help="cuda, or with --quick cpu")
    made.add_argument("--batch", type=int, default=32)
    made.add_argument("--steps", type=int, default=20, help="steps that are timed")
    options = made.parse_args()
    if options.device == "cpu" and not options.quick:
        made.error("--device cpu is for --quick alone")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured; --quick --device cpu tries it out")
        return
    report("finetune", options, steps_by_method(options))


if __name__ == "__main__":
    main()
