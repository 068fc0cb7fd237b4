"""The last block for the CLS token alone, where a head reads nothing else: the same numbers and gradients, less work.

Keys and values are those of all tokens; queries, the matrix behind the attention and the MLP act on each token by
itself, and what they give the other tokens reaches nothing. Two thirds and more of a last block are saved, in the pass
and in its gradients.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.functional import pad

from featstore.backbones.anatomy import matrices_of
from featstore.backbones.pooling import parts_of
from featstore.backbones.trainable import Trainable


class ClsOnly:
    """What of the last block may be left out for these features; nothing, where they read more than CLS.

    Nor of networks whose CLS is pooled from patches, of a user's own, and of matrices that have an adapter.
    """

    def __init__(self, trainable: Trainable, features: str) -> None:
        self._trainable = trainable
        self._count = 0
        self._first: list[nn.Module] = []  # these get CLS of all tokens, ...
        self._last: list[nn.Module] = []  # ... these give zeros to the others again
        facts = trainable.architecture
        reads_cls = all(part.split("/")[-1] == "cls" for part in parts_of(features, facts))
        if trainable.family is None or facts.summary != "token" or not reads_cls:
            return
        block = trainable.blocks[-1]
        for role in ("q", "o"):
            self._first += matrices_of(block, role)
            self._last += matrices_of(block, role)
        wide, narrow = matrices_of(block, "fc1"), matrices_of(block, "fc2")
        if wide and narrow:
            self._first += wide
            self._last += narrow

    @property
    def saves(self) -> bool:
        """Whether anything is left out; never where blocks are computed twice, the second time outside of `applied`."""
        return bool(self._first) and not self._trainable.checkpointing

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the last block's output is that of CLS, and undefined for the other tokens."""
        handles = []
        if self.saves:
            handles += [module.register_forward_pre_hook(self._cut) for module in self._first]
            handles += [module.register_forward_hook(self._fill) for module in self._last]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _cut(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._count = inputs[0].shape[1]
        return (inputs[0][:, :1],)

    def _fill(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return pad(output[:, :1], (0, 0, 0, self._count - 1))
