"""The part of `bench_extract.py` that needs a GPU: networks of random weights, S to 7B, against the usual loop.

The peer is what most people write: float32 weights under `torch.autocast(bfloat16)`, transformers' network as it comes,
float RGB images uploaded from pageable memory, every batch fetched with `.cpu()`. Ours: bfloat16 weights, compiled
blocks, grey uint8 uploads, copies on side streams. FLOPs are 2 a multiply-add, attention included.
"""

import gc
import importlib.util
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from featstore.backbones import describe
from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.extraction import pipeline
from featstore.extraction.batching import default_batch_size
from featstore.extraction.device import Transfers
from featstore.extraction.plan import make_plan
from featstore.images import PreprocessSpec, to_pixels
from featstore.register import register
from featstore.store.catalog import Store

SIZES = {
    "dinov2-small": (224, 518),
    "dinov2-base": (224, 518),
    "dinov2-large": (224, 518),
    "dinov2-giant": (224, 518),
    "dinov3-small": (224, 512),
    "dinov3-base": (224, 512),
    "dinov3-large": (224, 512),
    "dinov3-huge-plus": (224, 512),
    "dinov3-7b": (224, 512),
}
PEER_FLOOR = {"dinov3-7b": 1.15}  # times the usual loop; the others 1.4, the two in between none
UNASKED = ("dinov2-giant", "dinov3-huge-plus")
CEILING_FLOOR, CACHE_FLOOR = 0.85, 0.90
TARGET_7B_512, LEAST_7B_512 = 40.0, 36.0  # images/s on one H200
BYTES_A_TOKEN = 68  # times the width: what a fused block moves, bfloat16 (see `mfu_ceiling`)


def mfu_ceiling(architecture: Any, size: int, flops: float, bandwidth: float) -> float:
    """The share of the matrix rate that memory traffic leaves to a network whose elementwise work is fused.

    A block's linear layers take 24 D^2 FLOP a token (4 D^2 multiply-adds of attention, 8 D^2 of the MLP, times 2) and
    move about 68 D bytes; compute and traffic do not overlap in the worst case, so that 1 / (1 + 68 D r / (24 D^2)) at
    r = flops / bandwidth; at 184 FLOP a byte that is 1 / (1 + 521 / D). Attention adds 4 T D FLOP a token at T tokens
    and no traffic: scores stay on the chip.
    """
    dim, tokens = architecture.embed_dim, architecture.num_tokens(size, size)
    work = 24 * dim**2 + 4 * tokens * dim
    return work / (work + BYTES_A_TOKEN * dim * flops / bandwidth)


def rate_of(call: Callable[[], object], device: str, *, seconds: float, work: float, warmup: int = 2) -> float:
    """Work a second of a call: as many calls as fit, the device drained before and after."""

    def drain() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    for _ in range(warmup):
        call()
    drain()
    started, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - started < seconds:
        call()
        calls += 1
        if calls % 4 == 0:
            drain()
    drain()
    return work * calls / (time.perf_counter() - started)


def device_rates(device: str, *, quick: bool) -> dict[str, float]:
    """FLOP/s of bfloat16 products of 8192 x 8192 and bytes/s of copies on the device, each the best of 10."""
    side, dtype = (256, torch.float32) if quick else (8192, torch.bfloat16)
    a, b = (torch.randn((side, side), device=device, dtype=dtype) for _ in range(2))
    flops = max(rate_of(lambda: a @ b, device, seconds=0.05, work=2.0 * side**3) for _ in range(10))
    source = torch.empty(2**20 if quick else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = max(
        rate_of(lambda: target.copy_(source), device, seconds=0.05, work=2.0 * source.numel()) for _ in range(10)
    )
    return {"matmul_flops": flops, "copy_bytes": copied}


def usual_loop(network: torch.nn.Module, images: np.ndarray, device: str) -> Callable[[], object]:
    """A batch of the loop that most people write."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    colour = (torch.from_numpy(images).expand(-1, 3, -1, -1).float() / 255 - mean) / std

    def batch() -> object:
        with torch.no_grad(), torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            return network(colour.to(device)).last_hidden_state[:, 0].float().cpu()

    return batch


def our_loop(backbone: Any, spec: PreprocessSpec, images: np.ndarray, device: str) -> Callable[[], object]:
    """A batch through our stages, uploads and downloads included; the rows of the batch before are fetched."""
    transfers, pending = Transfers(device), []  # type: ignore[var-annotated]

    def batch() -> object:
        with torch.inference_mode():
            pixels = to_pixels(transfers.upload(images, len(images)), spec, device=device, dtype=backbone.dtype)
            tokens = backbone(pixels)
            rows = {"cls": tokens.cls.half(), "mean_patch": tokens.patches.float().mean(1).half()}
            pending.append(transfers.download(rows))
        return pending.pop(0).wait() if len(pending) > 2 else None

    return batch


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> int | None:
    return None if device == "cpu" else int(torch.cuda.max_memory_allocated())


def one_size(model: str, size: int, options: Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """Images/s of one network at one size: the usual loop, ours, and ours with each attention kernel."""
    device, dtype = options.device, "float32" if options.quick else "bfloat16"
    source = describe(model, random_weights=0)
    facts = source.architecture
    batch = 2 if options.quick else default_batch_size(facts.num_tokens(size, size), "cuda")
    images = np.random.default_rng(0).integers(0, 256, (batch, 1, size, size), dtype=np.uint8)
    spec = PreprocessSpec(geometry="squash", height=size, width=size, mean=facts.mean, std=facts.std)
    gflops = facts.gflops(size, size)
    found: dict[str, Any] = {"batch_size": batch, "gflop": gflops}
    _free(device)
    peer = source.load(device=device, compute_dtype="float32", attention="sdpa").network
    found["usual_loop"] = rate_of(usual_loop(peer, images, device), device, seconds=options.seconds, work=batch)
    found["usual_loop_peak_bytes"] = _peak(device)
    del peer
    kernels = ["sdpa", *(["xformers"] if importlib.util.find_spec("xformers") and device != "cpu" else [])]
    for kernel in kernels:
        _free(device)
        compiled = "off" if options.quick else "on"
        ours = source.load(device=device, compute_dtype=dtype, attention=kernel, compile=compiled)
        rate = rate_of(our_loop(ours, spec, images, device), device, seconds=options.seconds, work=batch)
        found[kernel] = {
            "images_per_second": rate,
            "peak_bytes": _peak(device),
            "kernel": getattr(ours, "kernel", None),
        }
        del ours
    best = max(found[kernel]["images_per_second"] for kernel in kernels)
    ceiling = mfu_ceiling(facts, size, rates["matmul_flops"], rates["copy_bytes"])
    mfu = best * gflops * 1e9 / rates["matmul_flops"]
    found |= {"ours": best, "mfu": mfu, "mfu_ceiling": ceiling, "speed_to_usual_loop": best / found["usual_loop"]}
    found["floors"] = floors(model, size, found)
    return found


def floors(model: str, size: int, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was asked of one size, what came, and whether it held."""
    held = {"mfu_of_ceiling": (CEILING_FLOOR, found["mfu"] / found["mfu_ceiling"])}
    if model not in UNASKED:
        held["speed_to_usual_loop"] = (PEER_FLOOR.get(model, 1.4), found["speed_to_usual_loop"])
    if model == "dinov3-7b" and size == 512:
        held["images_per_second"] = (LEAST_7B_512, found["ours"])
        held["target_images_per_second"] = (TARGET_7B_512, found["ours"])
    return {name: {"asked": asked, "got": got, "held": got >= asked} for name, (asked, got) in held.items()}


def end_to_end(model: str, size: int, model_only: float, options: Namespace) -> dict[str, Any]:
    """Images/s from the decoded cache to committed blocks, against the rate of the network alone."""
    count = 8 if options.quick else int(np.clip(model_only * 20, 2048, 60_000))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        (root / "images").mkdir(parents=True)
        rng = np.random.default_rng(0)
        for number in range(count):
            pixels = rng.integers(0, 256, (64, 64), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{number:06d}.png")
        register(Path(folder) / "store", "bench", root, RegisterConfig())
        run = RunConfig(device=options.device, decoded_cache=True, batch_size=2 if options.quick else None)
        backbone, rate, how = None, 0.0, {}
        for turn in ("warm", "timed"):  # the first fills the cache and compiles
            config = SetConfig(model=model, res=str(size), random_weights=0, name=turn)
            plan = make_plan(Store(Path(folder) / "store"), "bench", config, run)
            backbone = backbone or pipeline.load_backbone(plan, run, options.device)
            done: list[tuple[float, int]] = []

            def advance(images: int, failed: int, done: list[tuple[float, int]] = done) -> None:
                done.append((time.perf_counter(), images))

            how = pipeline.extract(plan, run, backbone=backbone, advance=advance).how
            # From the first batch written to the last: what is done once a set is no part of the rate.
            rate = sum(images for _, images in done[1:]) / (done[-1][0] - done[0][0])
    share = rate / model_only
    return {
        "images": count,
        "images_per_second": rate,
        "how": how,
        "floor": {"asked": CACHE_FLOOR, "got": share, "held": share >= CACHE_FLOOR},
    }


def nearest_neighbours(options: Namespace) -> dict[str, Any]:
    """Exact k-NN by torch on the device against brute force by numpy: queries/s, and whether they agree."""
    rows, queries, dim, k = (500, 20, 16, 5) if options.quick else (100_000, 10_000, 768, 200)
    generator = torch.Generator().manual_seed(0)
    bank, asked = (
        torch.nn.functional.normalize(torch.randn((count, dim), generator=generator), dim=1)
        for count in (rows, queries)
    )
    bank_there, asked_there = bank.to(options.device), asked.to(options.device)

    def search() -> torch.Tensor:
        return torch.cat([(part @ bank_there.T).topk(k, dim=1).indices for part in asked_there.split(2048)])

    ours = rate_of(search, options.device, seconds=min(options.seconds, 2.0), work=queries)
    few = asked[: min(queries, 500)].numpy()
    started = time.perf_counter()
    scores = few @ bank.numpy().T
    exact = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    peer = len(few) / (time.perf_counter() - started)
    found = search()[: len(few)].cpu().numpy()
    agreed = float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(exact, found)]))
    return {"rows": rows, "dim": dim, "k": k, "queries_per_second": ours, "brute_force": peer, "recall": agreed}


def _lines(results: dict[str, Any]) -> list[str]:
    lines = []
    for name, found in results["models"].items():
        text = f"{name}: {found['ours']:.1f} images/s, {found['speed_to_usual_loop']:.2f}x the usual loop, "
        text += f"MFU {found['mfu']:.2f} of at most {found['mfu_ceiling']:.2f}"
        lines.append(text)
        checks = dict(found["floors"])
        if "end_to_end" in found:
            checks["end_to_end"] = found["end_to_end"]["floor"]
        for floor, value in checks.items():
            verdict = "held" if value["held"] else "NOT HELD"
            lines.append(f"  {floor}: {value['got']:.3g}, asked {value['asked']:.3g}: {verdict}")
    return lines


def measure(options: Namespace) -> dict[str, Any]:
    """All networks, one after the other; one that fails is named and the others go on."""
    device = options.device
    rates = device_rates(device, quick=options.quick)
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    results: dict[str, Any] = {"device": name, **rates, "models": {}, "failed": {}}
    chosen = {"tiny": (56,)} if options.quick else SIZES
    if options.models:
        chosen = {model: SIZES[model] for model in options.models.split(",")}
    for model, sizes in chosen.items():
        for size in sizes:
            try:
                found = one_size(model, size, options, rates)
                found["end_to_end"] = end_to_end(model, size, found["ours"], options)
                results["models"][f"{model} {size}"] = found
            except (RuntimeError, ImportError) as error:
                results["failed"][f"{model} {size}"] = str(error)[:500]
            _free(device)
    results["nearest_neighbours"] = nearest_neighbours(options)
    for line in _lines(results):
        print(line)
    return results
