"""Activations behind the last frozen block, computed once: where only the last blocks train, an epoch costs only them.

The store's `layers/K` are tokens behind the final norm, which no block can take up again; so these are kept apart, raw
and in full (CLS, registers, patches), as rows of one file with a checksum each. They are keyed by everything that they
depend on: images, preprocessing, the frozen part's weights, precision.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from featstore import files
from featstore.backbones.anatomy import depths_of
from featstore.backbones.pooling import layers_of, pool
from featstore.backbones.trainable import DropPath, Trainable
from featstore.errors import ConfigError, CorruptError
from probes.adapters import Adapted
from probes.tuning_recipe import Precision

BLOCK = 64  # rows that are committed at once
VERSION = 1  # raised whenever the same key would hold other numbers


def entry_block(adapted: Adapted, features: str) -> int:
    """Number of the last block in front of everything that trains, from 1.

    Raises:
        ConfigError: something in front of or in the first block trains, or moves at random, or the head reads what is
            in front.
    """
    trainable = adapted.trainable
    network = trainable.network
    # Adapters have names of their own inside the modules that they wrap, so depths are taken as they are now.
    depths = depths_of([name for name, _ in network.named_parameters()], trainable.block_names)
    first = min((depths[name] for name in adapted.parameters), default=len(trainable.block_names) + 1)
    block = min(first - 1, len(trainable.block_names))
    if block < 1:
        raise ConfigError(
            f"--from-cache needs frozen blocks in front of all that trains, and {adapted.method} trains from the first "
            "on; use last-k, or leave --from-cache out"
        )
    layers = layers_of(features, trainable.architecture)
    if layers and min(layers) < block:
        raise ConfigError(
            f"--from-cache keeps the activations behind block {block}, and {features} reads block {min(layers)}; use "
            "cls, mean_patch or mean_all, or leave --from-cache out"
        )
    frozen = trainable.blocks[:block]
    drops = any(isinstance(module, DropPath) and module.rate > 0 for each in frozen for module in each.modules())
    if drops or trainable.augments_positions:
        raise ConfigError(
            "--from-cache needs frozen blocks that give the same numbers every time; leave it out, or the dropping of "
            "paths and the stretching of positions"
        )
    return block


class Entry:
    """The place behind block `number` of a network, where activations are taken out and put in."""

    def __init__(self, trainable: Trainable, number: int, size: tuple[int, int]) -> None:
        self._trainable = trainable
        self.blank = torch.zeros(1, 3, *size, device=trainable.device)
        self._blocks = trainable.blocks[:number]

    def features(self, activations: Float[Tensor, "B ..."], features: str) -> Float32[Tensor, "B D"]:
        """The head's input, from the activations on.

        What is in front of the first block runs over one empty image, because positions are computed there.
        """
        facts = self._trainable.architecture
        with self._fed(activations):
            tokens = self._trainable(self.blank, layers_of(features, facts))
        return pool(tokens, features, facts)

    @contextlib.contextmanager
    def _fed(self, activations: Float[Tensor, "B ..."]) -> Iterator[None]:
        try:
            for block in self._blocks[:-1]:
                block.__dict__["forward"] = _through
            self._blocks[-1].__dict__["forward"] = lambda *_, **__: activations
            yield
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)

    @torch.no_grad()
    def take(self, call: Callable[[], object]) -> Float[Tensor, "B ..."]:
        """The activations of a forward pass.

        Raises:
            ConfigError: blocks that give more than one tensor.
        """
        found: list[Any] = []

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            found.append(output)

        handle = self._blocks[-1].register_forward_hook(keep)
        try:
            call()
        finally:
            handle.remove()
        if len(found) != 1 or not isinstance(found[0], Tensor):
            raise ConfigError("--from-cache: the blocks of this network give more than one tensor; leave it out")
        return found[0].detach()


def _through(*inputs: Any, **_: Any) -> Any:
    return inputs[0]


def frozen_digest(trainable: Trainable, number: int) -> str:
    """Digest of all weights, statistics and tables that the activations behind a block depend on."""
    network = trainable.network
    depths = depths_of([name for name, _ in network.named_parameters()], trainable.block_names)
    behind = tuple(f"{name}." for name in trainable.block_names[number:])
    held: dict[str, Tensor] = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    total = hashlib.sha256()
    for name in sorted(held):
        if depths.get(name, 0) <= number and not name.startswith(behind):
            value = held[name].detach()
            total.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
            total.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


class Activations:
    """Rows of one shape on disk, written once by any number of processes and read at random.

    `key` is everything that they depend on; what has another key lies in another folder. bfloat16 takes half the space
    and rounds.
    """

    def __init__(self, folder: Path, key: dict[str, Any], rows: int, dtype: Precision = "float32") -> None:
        self.rows, self.dtype = rows, dtype
        self.key = {**key, "version": VERSION, "rows": rows, "dtype": dtype}
        self.folder = folder / files.digest(self.key)[:24]
        self._kind = np.dtype("<f4" if dtype == "float32" else "<u2")
        self._held: dict[int, tuple[np.ndarray, list[int]]] = {}

    @property
    def missing(self) -> list[int]:
        """Blocks of rows that are not committed."""
        return [block for block in range(-(-self.rows // BLOCK)) if not self._marker(block).is_file()]

    def rows_of(self, block: int) -> Int64[np.ndarray, " b"]:
        """Positions of the rows of a block."""
        return np.arange(block * BLOCK, min(self.rows, (block + 1) * BLOCK))

    def write(self, block: int, values: Float32[Tensor, "b ..."]) -> None:
        """Commit the rows of a block: the data first, then the marker with their checksums.

        Raises:
            StoreError: it cannot be written. CorruptError: rows that are not finite.
        """
        if not torch.isfinite(values).all():
            raise CorruptError(f"activations of images {block * BLOCK} and following are not finite; check the weights")
        bits = values.cpu().contiguous()
        held = bits.numpy() if self.dtype == "float32" else bits.bfloat16().view(torch.uint16).numpy()
        held = np.ascontiguousarray(held, self._kind)
        # A file a block: no process waits for another one, and a kill leaves nothing half.
        files.write_atomic(self._data(block), held.tobytes())
        sums = [google_crc32c.value(row.tobytes()) for row in held]
        files.write_atomic(self._marker(block), files.sealed({"shape": list(held.shape[1:]), "sums": sums}))

    def read(self, positions: Int64[np.ndarray, " B"]) -> Float32[Tensor, "B ..."]:
        """Rows by position, each verified against its checksum.

        Raises:
            CorruptError: one differs.
        """
        rows = []
        for position in positions.tolist():
            block, place = divmod(position, BLOCK)
            data, sums = self._open(block)
            row = data[place]
            if google_crc32c.value(row) != sums[place]:
                raise CorruptError(
                    f"{self._data(block)}: row {place} differs from its checksum; remove the folder {self.folder}, and "
                    "it is made again"
                )
            rows.append(row)
        found = torch.from_numpy(np.stack(rows))
        return found if self.dtype == "float32" else found.view(torch.bfloat16).float()

    def _open(self, block: int) -> tuple[np.ndarray, list[int]]:
        if block not in self._held:
            body = files.unseal(self._marker(block).read_bytes(), self._marker(block))
            shape = (len(body["sums"]), *body["shape"])
            self._held[block] = (np.memmap(self._data(block), self._kind, mode="r", shape=shape), body["sums"])
        return self._held[block]

    def _data(self, block: int) -> Path:
        return self.folder / f"{block:08d}.bin"

    def _marker(self, block: int) -> Path:
        return self.folder / f"{block:08d}.json"


def check_entry(trainable: Trainable, entry: Entry, features: str) -> None:
    """The network goes on from its own activations to the same features.

    Raises:
        ConfigError: it does not, such as one whose blocks change the shape of what they pass on.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, *entry.blank.shape[1:], generator=generator).to(entry.blank.device)
    was = trainable.training
    trainable.eval()
    try:
        with torch.no_grad():
            expected: list[Tensor] = []
            taken = entry.take(lambda: expected.append(trainable.features(images, features)))
            found = entry.features(taken, features)
        # Not to the bit: kernels may round otherwise where the sizes before the block differ.
        same = found.shape == expected[0].shape and torch.allclose(found, expected[0], rtol=1e-4, atol=1e-5)
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"--from-cache: {trainable.architecture.family} cannot go on from the activations of a block ({error}); "
            "leave it out"
        ) from error
    finally:
        trainable.train(was)
    if not same:
        raise ConfigError(
            f"--from-cache: {trainable.architecture.family} gives other features when it goes on from the activations "
            "of a block, which reads more than the block before it; leave it out"
        )
