"""How many images go through the network at once, and in how many pieces where memory does not hold them.

Where batches are cut is decided before a run and depends on nothing that happens in it. Out of memory, a batch keeps
its place and its shape in the set and only goes through the network in smaller pieces. Kernels may round a piece
otherwise than the whole: the bytes are then equal within the parity tolerance, as between two batch sizes.
"""

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from featstore.errors import DeviceError

Rows = dict[str, Tensor]

# Measured on 2 cores (AMX) with ViT-S at 224: float32 is fastest at 4 to 8 images, bfloat16 at 8 to 16, that is at 1k
# to 4k tokens; 16k are slower again. A GPU of any size is full at 64k.
TOKENS = {"cpu": 4096, "cuda": 65536}
# A network whose weights come block by block reads all of them once a batch. On a card of 100 TFLOP/s behind 25 GB/s
# that is hidden from 4k tokens on, on one of 800 from 32k; on a CPU, whose disk gives 1 to 2 GB/s, from some thousands.
STREAMED_TOKENS = {"cpu": 16384, "cuda": 65536}
LARGEST = 256  # images, unless the budget is the user's own: small ones are not worth the memory of more


def default_batch_size(num_tokens: int, device: str, *, budget: int | None = None, streams: bool = False) -> int:
    """Images per forward pass: the largest power of two whose tokens stay within the budget, at least one image.

    A power of two cuts blocks, whose rows are one, into equal batches. `budget` is that of `--tokens-per-batch`,
    `streams` says that the weights come to the device block by block.
    """
    kind = device.partition(":")[0]
    tokens = budget or (STREAMED_TOKENS if streams else TOKENS)[kind]
    size: int = 1 << int(math.log2(max(1, tokens // num_tokens)))
    return size if budget else min(size, LARGEST)


# What else than torch's own error says so. oneDNN's words may mean something else too: pieces of a batch tell, and what
# still fails at one image is quoted.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
    "could not create a primitive",
    "could not create a memory",
    "could not execute a primitive",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, the allocator of the CPU, or a library of either has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


@contextlib.contextmanager
def advised(device: str, images: int, size: Sequence[int]) -> Iterator[None]:
    """Within it lack of memory for what a batch needs beside the network is a `DeviceError` that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, DeviceError) or not is_out_of_memory(error):
            raise
        shape = "x".join(map(str, size))
        raise DeviceError(
            f"{device} has no memory for the pixels and rows of {images} images of {shape} "
            f"({str(error).partition(chr(10))[0][:200]}); use a smaller --batch-size, or --tokens-per-batch"
        ) from error


@dataclass(slots=True)
class Pieces:
    """Runs batches of `batch_size` images in pieces of `size`, which is halved whenever one does not fit.

    All pieces have one shape: the last is filled up with zeros. `notes` says when the size changed.
    """

    batch_size: int
    device: str
    size: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.size = self.size or self.batch_size

    def __call__(self, images: Tensor, forward: Callable[[Tensor], Rows]) -> Rows:
        """Rows of all images (B, ...), as `forward` gives them for a piece.

        Raises:
            DeviceError: one image alone does not fit.
        """
        while True:
            # The memory is given back only when the error and its frames are gone, so outside of `except`.
            found, error = self._attempt(images, forward)
            if found is not None:
                return found
            self._shrink(images, error)

    def _attempt(self, images: Tensor, forward: Callable[[Tensor], Rows]) -> tuple[Rows | None, str]:
        try:
            if self.size >= len(images):
                return forward(images), ""
            pieces = [forward(self._piece(images, first)) for first in range(0, len(images), self.size)]
            return {name: torch.cat([piece[name] for piece in pieces])[: len(images)] for name in pieces[0]}, ""
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None, str(error).partition("\n")[0][:200]

    def _piece(self, images: Tensor, first: int) -> Tensor:
        piece = images[first : first + self.size]
        if len(piece) == self.size:
            return piece
        return torch.cat([piece, piece.new_zeros((self.size - len(piece), *piece.shape[1:]))])

    def _shrink(self, images: Tensor, error: str) -> None:
        tried = min(self.size, len(images))
        shape = "x".join(str(length) for length in images.shape[2:])
        if tried == 1:
            raise DeviceError(
                f"{self.device} has no memory for one image of {shape} ({error}); use a smaller --res or model, "
                "--compute-dtype bfloat16, or --memory stream, which keeps one block of the network on the device"
            )
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        self.size = tried // 2
        note = (
            f"{self.device} has no memory for {tried} images of {shape} at once: batches of {self.batch_size} go "
            f"through in pieces of {self.size}"
        )
        self.notes[:] = [note]  # the last says it all
