"""The loop that trains small heads by gradient on cached features: several learning rates over one reading of the rows.

Every head draws its start and its dropout from a generator of its own, and the order of rows from (seed, epoch), so
the weights that a learning rate leads to do not depend on which others are trained beside it. On a CPU, runs of one
seed and thread count are equal to the bit.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from featstore.errors import ConfigError, DeviceError, TaskError

Kind = Literal["multilabel", "multiclass"]
Make = Callable[[torch.Generator], nn.Module]

EVALUATION_BATCH = 1024  # rows scored at once where a batch of training is smaller
QUIET_SECONDS, SHOWN_SECONDS = 1.0, 5.0  # until the first line of progress, between two lines
MOMENTUM = 0.9  # of SGD

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How heads are trained. `lr`: peak rates, one head each. `warmup`: epochs of linear rise, inside `epochs`.

    `keep`: what validation measures, for the epoch of each head and the choice between heads. `patience`: epochs
    without a better one after which a head stops; None for never. `drop_last`: an epoch ends at the last whole batch.
    """

    lr: tuple[float, ...]
    epochs: int
    batch: int
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    keep: Literal["loss", "auroc"] = "loss"
    patience: int | None = None
    drop_last: bool = False
    seed: int = 0
    device: str = "cpu"

    def factor(self, step: int, steps: int) -> float:
        """Share of the peak rate at a step of all `steps`."""
        rise = steps * self.warmup // self.epochs
        if step < rise:
            return (step + 1) / rise
        return 1.0 if self.schedule == "constant" else (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


class Part(NamedTuple):
    """Rows of a batch as a head takes them; a batch that would be too large comes in several parts."""

    inputs: tuple[Tensor, ...]
    rows: Int64[np.ndarray, " B"]


@runtime_checkable
class Source(Protocol):
    """Rows of one split. `slow` says that a batch is worth reading ahead."""

    slow: bool

    def __len__(self) -> int: ...

    def batch(self, positions: Int64[np.ndarray, " B"]) -> list[Part]:
        """These rows, each in one of the parts, on the device."""
        ...


class Vectors:
    """Rows (N, D) in memory."""

    slow = False

    def __init__(self, X: Float[np.ndarray, "N D"], device: str) -> None:
        self.rows = torch.from_numpy(np.ascontiguousarray(X, np.float32)).to(device)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: Int64[np.ndarray, " B"]) -> list[Part]:
        """These rows, (B, D)."""
        return [Part((self.rows[torch.from_numpy(positions).to(self.rows.device)],), positions)]


@dataclass(frozen=True, slots=True)
class Targets:
    """What heads are trained towards; masked entries count nowhere.

    `y` and `mask` are (N, L) for labels and (N,) for classes; `weight` is pos_weight (L,) or the weight of each class.
    """

    kind: Kind
    y: Tensor
    mask: Tensor
    weight: Tensor | None

    @classmethod
    def of(
        cls,
        kind: Kind,
        y: np.ndarray,
        mask: Bool[np.ndarray, "..."],
        device: str,
        weight: Float[np.ndarray, " L"] | None = None,
    ) -> "Targets":
        """On the device; masked entries may hold anything."""
        clean = np.where(mask, y, 0)
        return cls(
            kind,
            torch.from_numpy(clean.astype(np.float32 if kind == "multilabel" else np.int64)).to(device),
            torch.from_numpy(mask.astype(np.float32)).to(device),
            None if weight is None else torch.from_numpy(weight.astype(np.float32)).to(device),
        )

    def loss(self, logits: Tensor, rows: Int64[np.ndarray, " B"]) -> Tensor:
        """Sum of the losses of the valid entries of these rows: binary cross-entropy, or cross-entropy of classes."""
        index = torch.from_numpy(rows).to(self.y.device)
        y, mask = self.y[index], self.mask[index]
        if self.kind == "multilabel":
            return binary_cross_entropy_with_logits(logits, y, mask, pos_weight=self.weight, reduction="sum")
        return (cross_entropy(logits, y, self.weight, reduction="none") * mask).sum()

    def size(self, rows: Int64[np.ndarray, " B"]) -> float:
        """What that sum is divided by: valid entries, or their weights of classes, as torch's means do."""
        index = torch.from_numpy(rows).to(self.y.device)
        mask = self.mask[index]
        if self.kind == "multiclass" and self.weight is not None:
            mask = mask * self.weight[self.y[index]]
        return float(mask.sum())


def balance(kind: Kind, y: np.ndarray, mask: Bool[np.ndarray, "..."], num_classes: int) -> Float64[np.ndarray, " L"]:
    """Negatives over positives of each label (1 where it has no positives), or n / (K n_class) of each class."""
    if kind == "multilabel":
        positive = ((y == 1) & mask).sum(0)
        return np.where(positive > 0, (mask.sum(0) - positive) / np.maximum(positive, 1), 1.0)
    counts = np.bincount(y[mask], minlength=num_classes)
    return np.asarray(mask.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1.0)))


@dataclass(frozen=True, slots=True)
class Validation:
    """Rows that choose. `quality` is a number to maximise (macro AUROC) from probabilities in the rows' order."""

    source: Source
    targets: Targets
    quality: Callable[[Float64[np.ndarray, "V L"]], float]


@dataclass
class Trained:
    """A head with the weights of its best epoch.

    `epoch` counts from 1 and says which that is, `epochs` how many were run. `diverged`: its loss left the finite
    numbers, and it stopped there.
    """

    lr: float
    head: nn.Module
    optimizer: "AdamW | SGD"
    epoch: int = 0
    epochs: int = 0
    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_quality: list[float] = field(default_factory=list)
    best: tuple[float, ...] = (-math.inf,)
    diverged: bool = False
    running: bool = True
    _weights: dict[str, Tensor] = field(default_factory=dict)

    def judge(self, key: tuple[float, ...], patience: int | None) -> None:
        """Keep the weights if this epoch is the best so far (the first of equals); stop if none was for too long."""
        if key > self.best:
            self.best, self.epoch = key, self.epochs
            self._weights = {name: value.detach().clone() for name, value in self.head.state_dict().items()}
        elif patience is not None and self.epochs - self.epoch >= patience:
            self.running = False

    def restore(self) -> None:
        """Put the kept weights back."""
        if self._weights:
            self.head.load_state_dict(self._weights)
            self._weights = {}
        self.head.eval().requires_grad_(False)


def train(
    make: Make, source: Source, targets: Targets, recipe: Recipe, validation: Validation | None = None
) -> list[Trained]:
    """A trained head for each learning rate; without validation those of the last epoch.

    Raises:
        TaskError: every learning rate diverged. DeviceError: the device is not there.
    """
    check_device(recipe.device)
    heads = [_started(make, lr, recipe) for lr in recipe.lr]
    size = min(recipe.batch, len(source))
    per_epoch = len(source) // size if recipe.drop_last else -(-len(source) // size)
    watch = Watch(f"training {len(heads)} heads" if len(heads) > 1 else "training", recipe.epochs, len(source))
    for epoch in range(recipe.epochs):
        running = [item for item in heads if item.running]
        if not running:
            break
        order = np.random.default_rng([recipe.seed, epoch]).permutation(len(source))
        totals, weight = [0.0] * len(running), 0.0
        for item in running:
            item.head.train()
        for number, parts in enumerate(_read(source, order[: per_epoch * size], size)):
            factor = recipe.factor(epoch * per_epoch + number, recipe.epochs * per_epoch)
            entries = sum(targets.size(part.rows) for part in parts)
            weight += entries
            for place, item in enumerate(running):
                if item.running:
                    totals[place] += _step(item, parts, targets, entries, item.lr * factor)
                    item.running = math.isfinite(totals[place])
            watch.advance(epoch, sum(len(part.rows) for part in parts))
        for total, item in zip(totals, running):
            item.epochs, item.diverged = epoch + 1, not item.running
            item.train_loss.append(total / max(weight, 1e-12))
        _judge([item for item in running if item.running], validation, recipe)
    for item in heads:
        item.restore()
    if not any(item.epoch for item in heads):
        rates = ", ".join(f"{lr:g}" for lr in recipe.lr)
        raise TaskError(f"training left the finite numbers in its first epoch at every rate ({rates}); lower --lr")
    return heads


def _started(make: Make, lr: float, recipe: Recipe) -> Trained:
    head = make(torch.Generator().manual_seed(recipe.seed)).to(recipe.device)
    rule = AdamW if recipe.optimizer == "adamw" else SGD
    return Trained(lr, head, rule(list(head.parameters()), recipe.weight_decay))


def _step(item: Trained, parts: list[Part], targets: Targets, entries: float, lr: float) -> float:
    """One step of the optimizer down the mean loss of a batch; returns the sum."""
    item.head.zero_grad()
    total = 0.0
    for part in parts:
        loss = targets.loss(item.head(*part.inputs), part.rows)
        (loss / max(entries, 1e-12)).backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    if math.isfinite(total):
        item.optimizer.step(lr)
    return total


def _judge(running: list[Trained], validation: Validation | None, recipe: Recipe) -> None:
    """Measure heads on validation after an epoch, and keep their weights if they are the best so far."""
    if validation is None:
        for item in running:
            item.epoch = item.epochs
        return
    for item, logits in zip(running, outputs([item.head for item in running], validation.source, recipe.batch)):
        rows = np.arange(len(validation.source))
        loss = float(validation.targets.loss(logits, rows)) / max(validation.targets.size(rows), 1e-12)
        item.val_loss.append(loss)
        if recipe.keep == "auroc":
            quality = validation.quality(probabilities(logits, validation.targets.kind))
            item.val_quality.append(quality)
            item.judge((quality if quality == quality else -math.inf, -loss), recipe.patience)
        else:
            item.judge((-loss,), recipe.patience)


@torch.no_grad()
def outputs(heads: Sequence[nn.Module], source: Source, batch: int) -> list[Tensor]:
    """Logits (N, L) of every head for the rows in order, all heads over one reading."""
    found: list[list[Tensor]] = [[] for _ in heads]
    rows: list[np.ndarray] = []
    for head in heads:
        head.eval()
    size = batch if source.slow else max(batch, EVALUATION_BATCH)
    for parts in _read(source, np.arange(len(source)), size):
        for part in parts:
            rows.append(part.rows)
            for place, head in enumerate(heads):
                found[place].append(head(*part.inputs))
    back = torch.from_numpy(np.argsort(np.concatenate(rows), kind="stable"))
    return [torch.cat(parts)[back.to(parts[0].device)] for parts in found]


def probabilities(logits: Tensor, kind: Kind) -> Float64[np.ndarray, "N L"]:
    """Sigmoid of each label, or softmax over classes, in float64."""
    wide = logits.detach().double()
    return np.asarray((wide.sigmoid() if kind == "multilabel" else wide.softmax(1)).cpu().numpy())


def _read(source: Source, order: Int64[np.ndarray, " M"], size: int) -> Iterator[list[Part]]:
    """Batches of rows in an order; of a slow source one thread reads the next two ahead."""
    cuts = [order[first : first + size] for first in range(0, len(order), size)]
    if not source.slow:
        yield from map(source.batch, cuts)
        return
    with ThreadPoolExecutor(1, "probes-reader") as thread:
        try:
            ahead = [thread.submit(source.batch, cut) for cut in cuts[:2]]
            for number in range(len(cuts)):
                parts = ahead.pop(0).result()
                if number + 2 < len(cuts):
                    ahead.append(thread.submit(source.batch, cuts[number + 2]))
                yield parts
        finally:
            thread.shutdown(cancel_futures=True)


def check_device(device: str) -> None:
    """The device is there.

    Raises:
        ConfigError: no such kind. DeviceError: CUDA without a GPU.
    """
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device is cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda needs a CUDA device and there is none; drop it to train on the CPU")


class Watch:
    """A line of the log now and then on work that takes more than a second: how far, how fast, how long still."""

    def __init__(self, what: str, epochs: int, rows: int, unit: str = "rows") -> None:
        self._what, self._epochs, self._total, self._unit = what, epochs, epochs * rows, unit
        self._started = self._shown = time.monotonic()
        self._done = 0

    def advance(self, epoch: int, rows: int) -> None:
        """Count rows (or what the unit is) of an epoch."""
        self._done += rows
        now = time.monotonic()
        if now - self._shown < (QUIET_SECONDS if self._shown == self._started else SHOWN_SECONDS):
            return
        self._shown = now
        rate = self._done / (now - self._started)
        left = (self._total - self._done) / rate
        of = f", epoch {epoch + 1}/{self._epochs}" if self._epochs > 1 else ""
        log.info("%s%s: %.0f %s/s, %.0f s left", self._what, of, rate, self._unit, left)


class AdamW:
    """Adam with decoupled weight decay, step for step as torch's, whose optimizers load the compiler: seconds a start.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101; betas 0.9 and 0.999, eps 1e-8.
    """

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float) -> None:
        self.parameters, self.weight_decay, self.steps = parameters, weight_decay, 0
        self.mean = [torch.zeros_like(value) for value in parameters]
        self.square = [torch.zeros_like(value) for value in parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move along the gradients."""
        self.steps += 1
        first, second = 1 - 0.9**self.steps, math.sqrt(1 - 0.999**self.steps)
        for value, mean, square in zip(self.parameters, self.mean, self.square):
            assert value.grad is not None
            value.mul_(1 - lr * self.weight_decay)
            mean.lerp_(value.grad, 0.1)
            square.mul_(0.999).addcmul_(value.grad, value.grad, value=0.001)
            value.addcdiv_(mean, (square.sqrt() / second).add_(1e-8), value=-lr / first)


class SGD:
    """Gradient descent with momentum 0.9 and weight decay in the gradient, step for step as torch's."""

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float) -> None:
        self.parameters, self.weight_decay = parameters, weight_decay
        self.speed = [torch.zeros_like(value) for value in parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move along the gradients."""
        for value, speed in zip(self.parameters, self.speed):
            assert value.grad is not None
            speed.mul_(MOMENTUM).add_(value.grad).add_(value, alpha=self.weight_decay)
            value.sub_(speed, alpha=lr)


class Dropout(nn.Module):
    """Dropout that draws from a generator of its own, on the CPU, so that devices and neighbours draw alike."""

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        super().__init__()
        self.probability, self.generator = probability, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return x
        kept = torch.empty(x.shape, dtype=x.dtype).bernoulli_(1 - self.probability, generator=self.generator)
        return x * (kept / (1 - self.probability)).to(x.device)


def linear(inputs: int, outputs: int, generator: torch.Generator, *, bias: bool = True) -> nn.Linear:
    """A layer that starts as torch's own does, uniform within 1/sqrt(inputs), drawn from `generator`."""
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(
        device="cpu"
    )  # drawn from no global generator
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        if bias:
            layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def num_parameters(head: nn.Module) -> int:
    """Trained numbers of a head."""
    return sum(value.numel() for value in head.parameters())


def facts(recipe: Recipe) -> dict[str, Any]:
    """The recipe for a record, with what was left to a default filled in."""
    names = ("epochs", "batch", "optimizer", "weight_decay", "schedule", "warmup", "keep", "patience", "seed", "device")
    return {"lr": list(recipe.lr), **{name: getattr(recipe, name) for name in names}}
