"""A network with a method applied and a linear head on it: what is trained, averaged, kept and put back, by name."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor, nn

from featstore.backbones.cls_only import ClsOnly
from featstore.backbones.pooling import width_of
from featstore.errors import ConfigError, WeightsError
from probes.adapters import Adapted
from probes.tuning_activations import Entry
from probes.tuning_ranks import like, put, whole
from probes.tuning_recipe import Optimisation, Precision

HEAD, BACKBONE = "head.", "backbone."
HEAD_STD = 0.01  # of the head's first weights, as Baharoon et al.'s code (and DINOv2's) draws them


class Tuned(nn.Module):
    """Logits of images: the network's features, in the precision asked for, and a linear head in float32.

    Where `entry` is set, inputs are not images but the activations behind a frozen block.
    """

    def __init__(self, adapted: Adapted, features: str, head: nn.Linear, precision: Precision = "float32") -> None:
        super().__init__()
        self.trainable, self.head = adapted.trainable, head
        self.adapted, self.features, self.precision = adapted, features, precision
        self.entry: Entry | None = None
        self.last = ClsOnly(adapted.trainable, features)

    def forward(self, inputs: Float32[Tensor, "B ..."]) -> Float32[Tensor, "B L"]:
        """Logits; inputs are normalised images (B, 3, H, W), or activations."""
        kind = self.trainable.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bfloat16"), self.last.applied():
            if self.entry is None:
                features = self.trainable.features(inputs, self.features)
            else:
                features = self.entry.features(inputs, self.features)
        logits: Tensor = self.head(features.float())
        return logits

    def named(self) -> dict[str, Tensor]:
        """Everything that training changes, by name: `backbone.<name>`, `head.weight`, `head.bias`. No copies."""
        found = {f"{BACKBONE}{name}": value for name, value in self.adapted.state().items()}
        return found | {f"{HEAD}{name}": value.detach() for name, value in self.head.named_parameters()}

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters among them."""
        found = {f"{BACKBONE}{name}": value for name, value in self.adapted.parameters.items()}
        return found | {f"{HEAD}{name}": value for name, value in self.head.named_parameters()}

    def statistics(self) -> list[Tensor]:
        """Running statistics that move."""
        trained = self.trained()
        return [value for name, value in self.named().items() if name not in trained]

    def num_trainable(self) -> int:
        """Numbers that train, the head's among them."""
        return sum(value.numel() for value in self.trained().values())

    def snapshot(self) -> dict[str, Shaped[Tensor, "..."]]:
        """Copies of `named` in main memory, whole; a call of all processes."""
        return {name: _copy(value) for name, value in self.named().items()}

    def restore(self, values: Mapping[str, Shaped[Tensor, "..."]]) -> None:
        """Put a snapshot back; a call of all processes.

        Raises:
            WeightsError: it is of something else.
        """
        own = self.named()
        wrong = sorted(own.keys() ^ values.keys()) or [n for n, v in own.items() if v.shape != values[n].shape]
        if wrong:
            raise WeightsError(
                f"these weights are not of this network, method and head: {len(wrong)} tensors do not fit "
                f"({wrong[0]}, ...); give the model and the method they were trained with"
            )
        for name, target in own.items():
            put(target, values[name])

    def groups(self, how: Optimisation) -> list[dict[str, Any]]:
        """Groups for the optimiser by the `names` of their parameters.

        To be asked before weights are cut over processes, because which are decayed follows from their shapes.
        """
        found = self.adapted.groups(lr=how.lr, weight_decay=how.weight_decay, layer_decay=how.layer_decay)
        made = [
            {"names": [f"{BACKBONE}{name}" for name in each["names"]], "lr": each["lr"], "decay": each["weight_decay"]}
            for each in found
        ]
        rate = how.lr if how.head_lr is None else how.head_lr
        made.append({"names": [f"{HEAD}weight"], "lr": rate, "decay": how.weight_decay})
        made.append({"names": [f"{HEAD}bias"], "lr": rate, "decay": 0.0})
        return made


def _copy(value: Tensor) -> Tensor:
    full = whole(value.detach())
    return full.to("cpu", copy=True).contiguous()


def make_head(adapted: Adapted, features: str, outputs: int, seed: int) -> nn.Linear:
    """A linear head for these features: weights from N(0, 0.01^2), drawn from the seed alone, biases 0."""
    width = width_of(features, adapted.trainable.architecture)
    head = nn.Linear(width, outputs, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        head.weight.normal_(0.0, HEAD_STD, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return head.to(adapted.trainable.device)


def start_head(
    head: nn.Linear,
    weight: Float[np.ndarray, "L D"],
    bias: Float[np.ndarray, " L"],
    mean: Float[np.ndarray, " D"] | None = None,
    scale: Float[np.ndarray, " D"] | None = None,
) -> None:
    """Start from a fitted linear probe, whose standardisation (x - mean) / scale goes into the layer.

    Source: Kumar et al. 2022 (LP-FT), arXiv 2202.10054.

    Raises:
        ConfigError: it is of other features or labels.
    """
    if weight.shape != tuple(head.weight.shape) or bias.shape != tuple(head.bias.shape):
        raise ConfigError(
            f"the fitted probe has weights {weight.shape} and biases {bias.shape}, the head {tuple(head.weight.shape)} "
            f"and {tuple(head.bias.shape)}; fit it on the same features and labels"
        )
    wide = weight.astype(np.float64) / (1.0 if scale is None else scale.astype(np.float64))
    shift = 0.0 if mean is None else wide @ mean.astype(np.float64)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(wide))
        head.bias.copy_(torch.from_numpy(bias.astype(np.float64) - shift))


class Average:
    """A moving average of all parameters that train; running statistics stay those of the last step."""

    def __init__(self, model: Tuned, decay: float) -> None:
        self.decay = decay
        self._model = model
        self.values = {name: value.detach().clone() for name, value in model.trained().items()}

    @torch.no_grad()
    def add(self) -> None:
        """Count the weights as they are now in."""
        for name, value in self._model.trained().items():
            self.values[name].lerp_(value.detach(), 1 - self.decay)

    def snapshot(self) -> dict[str, Shaped[Tensor, "..."]]:
        """Copies in main memory, whole; a call of all processes."""
        return {name: _copy(value) for name, value in self.values.items()}

    def restore(self, values: Mapping[str, Shaped[Tensor, "..."]]) -> None:
        """Put a snapshot back."""
        for name, target in self.values.items():
            put(target, values[name])

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        trained = self._model.trained()
        held = {name: value.detach().clone() for name, value in trained.items()}
        try:
            with torch.no_grad():
                for name, value in trained.items():
                    value.copy_(self.values[name])
            yield
        finally:
            with torch.no_grad():
                for name, value in trained.items():
                    value.copy_(held[name])


class TrueZeros:
    """Gradients that are 0 but for rounding, set to 0: those of biases of attention keys, which softmax ignores.

    AdamW divides a gradient by its own size, so that of rounding it makes steps of the whole learning rate, up or down
    by chance, other ones for every number of processes. Made once weights are cut over processes, as all of them call.
    """

    def __init__(self, model: Tuned) -> None:
        trained = model.trained()
        self._whole: list[nn.Parameter] = []
        self._parts: list[tuple[nn.Parameter, Tensor]] = []
        for name, part in model.adapted.ignored().items():
            parameter = trained[f"{BACKBONE}{name}"]
            mask = torch.zeros(parameter.shape)
            mask[part] = 1
            if bool(mask.all()):
                self._whole.append(parameter)
            else:
                self._parts.append((parameter, like(parameter.detach(), mask) > 0))

    @torch.no_grad()
    def hold(self) -> None:
        """Set them; after gradients are summed over processes and pieces, before anything reads them."""
        for parameter in self._whole:
            if parameter.grad is not None:
                parameter.grad.zero_()
        for parameter, mask in self._parts:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(mask, 0.0)


def make_optimizer(model: Tuned, how: Optimisation, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch's own, over what `Tuned.groups` gave; the peak rate of a group stands under `peak`."""
    trained = model.trained()
    made = [
        {
            "params": [trained[name] for name in group["names"]],
            "lr": group["lr"],
            "peak": group["lr"],
            "weight_decay": group["decay"],
        }
        for group in groups
    ]
    if how.optimizer == "adamw":
        return torch.optim.AdamW(made, lr=how.lr, fused=True)  # on a CPU four to seven times as fast as torch's usual
    return torch.optim.SGD(made, lr=how.lr, momentum=how.momentum)


def optimizer_state(model: Tuned, optimizer: torch.optim.Optimizer) -> dict[str, Shaped[Tensor, "..."]]:
    """What an optimizer remembers, as `<parameter>/<key>`, whole and in main memory; a call of all processes."""
    return {
        f"{name}/{key}": _copy(value)
        for name, parameter in model.trained().items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    model: Tuned, optimizer: torch.optim.Optimizer, values: Mapping[str, Shaped[Tensor, "..."]]
) -> None:
    """Put back what `optimizer_state` gave."""
    trained = model.trained()
    for name, value in values.items():
        owner, _, key = name.rpartition("/")
        parameter = trained[owner]
        # The count of steps is whole on every process, also where its parameter is cut.
        beside = value.to(parameter.device) if value.ndim == 0 else like(parameter.detach(), value)
        optimizer.state[parameter][key] = beside.clone()
