"""Random weights that are the same numbers on every machine, in any order, with any version of torch or transformers.

Each tensor has its own PCG64 stream, keyed by (seed, name in the hub's files). 16 bits of it become one number on an
even lattice of 65,536 values, uniform and symmetric around zero: integer steps and one float32 product, so no library's
idea of a normal deviate enters, and a number costs 1 to 2 ns where a normal one costs 4 to 5.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from featstore.backbones.family import HubKey

PER_DRAW = 4  # 16-bit numbers in one 64-bit draw
CHUNK = 1 << 17  # numbers at a time: the buffers stay in the processor's cache
TOKEN_STD = 0.02  # of CLS, registers and positions, as the networks are initialised for training
SMALL = (
    "cls_token",
    "register_tokens",
    "position_embeddings",
    "class_embedding",
    "position_embedding.weight",
    "pos_embed",
    "rel_pos_h",
    "rel_pos_w",
)


def draw(
    key: HubKey,
    shape: tuple[int, ...],
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    gain: float = 1.0,
) -> Float[Tensor, "..."]:
    """One parameter: the piece of the hub's tensor `key` that has `shape`.

    Matrices and convolutions have standard deviation `gain`/sqrt(inputs), so that signals keep their size and tokens
    differ between images; norms, layer scales and running variances are 1; biases, running means and the mask token 0.
    """
    values = torch.empty(shape, device=device, dtype=dtype)
    draw_into(key, values, seed=seed, gain=gain)
    return values


def draw_into(key: HubKey, values: Float[Tensor, "..."], *, seed: int, gain: float = 1.0) -> None:
    """As `draw`, into a contiguous tensor that is there."""
    name, shape = key.name, values.shape
    if not values.numel():  # no registers
        return
    if name.endswith(("mask_token", "bias", "running_mean")):
        values.zero_()
        return
    if name.endswith(SMALL):
        std = TOKEN_STD
    elif len(shape) == 1:
        values.fill_(1)
        return
    else:
        std = gain / math.sqrt(math.prod(shape[1:]))
    flat, start = values.view(-1), 0
    for chunk in uniform_chunks(name, seed, count=flat.numel(), skip=key.part * flat.numel(), std=std):
        flat[start : start + len(chunk)].copy_(torch.from_numpy(chunk))
        start += len(chunk)


def uniform_chunks(name: str, seed: int, *, count: int, skip: int = 0, std: float) -> Iterator[Float[np.ndarray, " N"]]:
    """`count` numbers of the stream of (seed, name) after the first `skip`, in float32 arrays of at most `CHUNK`.

    Uniform with standard deviation `std`, between -sqrt(3) std and +sqrt(3) std.
    """
    stream = np.random.PCG64(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little"))
    stream.advance(skip // PER_DRAW)
    unused = skip % PER_DRAW
    step = np.float32(math.sqrt(3) * std / 2**15)
    while count > 0:
        length = min(count, CHUNK - unused)  # so that every later chunk starts with a fresh draw
        draws = stream.random_raw((unused + length + PER_DRAW - 1) // PER_DRAW)
        integers = draws.astype("<u8", copy=False).view("<i2")[unused : unused + length]
        values = integers.astype(np.float32)
        values += np.float32(0.5)
        values *= step
        yield values
        count, unused = count - length, 0
