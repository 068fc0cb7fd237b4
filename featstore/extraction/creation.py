"""A set before its first row: measured against float32, its reductions settled, its spec written; or opened again."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from featstore.backbones.tokens import Backbone, Tokens
from featstore.configs import RunConfig
from featstore.extraction.backbone import load_for_set
from featstore.extraction.batching import Pieces, default_batch_size
from featstore.extraction.claims import Claims
from featstore.extraction.plan import Plan
from featstore.extraction.precision import gate, is_exact
from featstore.extraction.prepare import prepare
from featstore.extraction.reduce import settle, summary_line
from featstore.images import to_pixels
from featstore.store import reductions
from featstore.store.layout import read_spec

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
CREATION = 10**8 - 1  # the piece of work that making a set is
LOOK = 0.5  # seconds between two looks whether another process has made it
Say = Callable[[str], None]


def create_set(
    plan: Plan, run: RunConfig, device: str, backbone: Backbone | None, say: Say
) -> tuple[Plan, Backbone | None, list[str]]:
    """Make the set of a plan, or open it where it is there: (plan with the spec on disk, backbone, lines to print).

    What needs a forward pass comes first, so that no set stands that was not measured: the precision gate of a new set
    that computes in another type than float32, and the parameters of reductions. The backbone is loaded where one of
    these needs it.

    Raises:
        ConfigError: the set's precision is below its thresholds, or nothing can be measured.
    """
    new = not (plan.folder / "spec.json").is_file()
    measured = new and not is_exact(plan.spec["identity"])
    reduced = bool(reductions.steps_of(plan.spec))
    if not measured and not reduced:
        prepare(plan)
        return plan, backbone, []
    # Not in the set's folder, which is to be there only if the set can be made.
    place = plan.folder.parents[2] / "cache" / f"creating-{plan.folder.name}"
    with Claims(place, patience=run.patience) as claims:
        while not claims.is_free(CREATION) or not claims.take(CREATION):
            time.sleep(LOOK)  # another process is measuring: what it finds stands
        return _create(plan, run, device, backbone, say)


def _create(
    plan: Plan, run: RunConfig, device: str, backbone: Backbone | None, say: Say
) -> tuple[Plan, Backbone | None, list[str]]:
    measured = not (plan.folder / "spec.json").is_file() and not is_exact(plan.spec["identity"])
    reduced = bool(reductions.steps_of(plan.spec))
    if not measured and not reduced:
        prepare(plan)
        return replace(plan, spec=read_spec(plan.folder)), backbone, []
    backbone = backbone or load_backbone(plan, run, device)
    size = batch_size(plan, run, device, backbone)
    forward = _in_pieces(plan, device, backbone, size)
    if measured:
        found = gate(plan, forward, run, device=device, batch_size=size, say=say)
        plan = replace(plan, spec={**plan.spec, "precision": found})
    notes = []
    if reduced:
        notes = _settle(plan, forward, run, size, say)
    else:
        prepare(plan)
    # Another process may have made the set meanwhile: what it measured and settled stays.
    return replace(plan, spec=read_spec(plan.folder)), backbone, notes


def _settle(plan: Plan, forward: Callable[[np.ndarray], Tokens], run: RunConfig, size: int, say: Say) -> list[str]:
    """`prepare` for a set with reductions: settle those of new arrays first; returns their losses as lines."""
    settled = settle(plan, forward, run, batch_size=size, say=say)
    prepare(settled.plan)
    held = read_spec(plan.folder)
    if settled.parameters is not None:
        reductions.drop_unnamed(plan.folder, held, settled.parameters)
    found = {name: reductions.read_reduction(plan.folder, held, name) for name in settled.arrays}
    return [summary_line(reduction, name) for name, reduction in found.items() if reduction is not None]


def load_backbone(plan: Plan, run: RunConfig, device: str) -> Backbone:
    """The plan's network on a device, as its identity and the run ask for it."""
    return load_for_set(plan.source, plan.spec["identity"], run, device)


def streams(backbone: Backbone) -> bool:
    """Whether a backbone's weights come to the device block by block, in every forward pass again."""
    return str(getattr(backbone, "memory", "resident")) == "stream"


def batch_size(plan: Plan, run: RunConfig, device: str, backbone: Backbone) -> int:
    """Images per forward pass: as asked, else from the token budget; never more than a block has rows."""
    size = (plan.preprocess.height, plan.preprocess.width)
    if plan.window is not None:  # as many windows as images go through at once
        size = (plan.window[0], plan.window[0])
    tokens = plan.source.architecture.num_tokens(*size)
    default = default_batch_size(tokens, device, budget=run.tokens_per_batch, streams=streams(backbone))
    return min(run.batch_size or default, int(plan.spec["layout"]["block_rows"]))


def forward_images(plan: Plan, device: str, backbone: Backbone, pixels: Tensor, layers: tuple[int, ...]) -> Tokens:
    """Tokens of stacked images."""
    dtype = TORCH_DTYPES[plan.spec["identity"]["compute_dtype"]]
    return backbone(to_pixels(pixels, plan.preprocess, device=device, dtype=dtype), layers=layers)


def _in_pieces(plan: Plan, device: str, backbone: Backbone, size: int) -> Callable[[np.ndarray], Tokens]:
    """A forward pass over stacked images that goes on in halves where memory is short."""
    pieces = Pieces(size, device)

    def rows_of(images: Tensor) -> dict[str, Tensor]:
        tokens = forward_images(plan, device, backbone, images, plan.layers)
        found: dict[str, Tensor] = {}
        for prefix, part in [("", tokens), *((f"layers/{number}/", inner) for number, inner in tokens.layers.items())]:
            found |= {f"{prefix}cls": part.cls, f"{prefix}registers": part.registers, f"{prefix}patches": part.patches}
        return found

    def forward(images: np.ndarray) -> Tokens:
        with torch.inference_mode():
            rows = pieces(torch.from_numpy(images), rows_of)

        def tokens(prefix: str) -> Tokens:
            cls, registers, patches = (rows[f"{prefix}{part}"] for part in ("cls", "registers", "patches"))
            return Tokens(cls=cls, registers=registers, patches=patches)

        return replace(tokens(""), layers={number: tokens(f"layers/{number}/") for number in plan.layers})

    return forward
