"""The last block for CLS alone: features and gradients of the whole block for less work, if nothing else is read."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from tuning import FACTS, SHRUNK, Own, fresh, perturb, pixels

from featstore.backbones.cls_only import ClsOnly
from featstore.backbones.trainable import Trainable, make_trainable
from probes.adapters import adapt
from probes.adapters_config import AdapterConfig
from probes.tuning_model import Tuned, make_head

TOKENS = [name for name in (*FACTS, *SHRUNK) if name not in ("resnet", "mobilenet", "convnext", "dinov3-convnext")]
ROWS = {"q": 1, "o": 1, "fc1": 1, "fc2": 1, "k": 5, "v": 5}  # of an image of 4 patches


def of(trainable: Trainable, features: str, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The features, and the gradients of something that depends on all of them."""
    trainable.zero_grad()
    found = trainable.features(images, features)
    (found.square() * torch.arange(1.0, found.shape[1] + 1)).sum().backward()  # type: ignore[no-untyped-call]
    return found.detach(), {n: p.grad for n, p in trainable.network.named_parameters() if p.grad is not None}


def check_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    scale = max(float(gradient.abs().max()) for gradient in wanted.values() if gradient.numel())
    assert scale > 0
    for name, gradient in found.items():  # some are nothing but rounding, such as that of a bias of keys
        assert torch.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-6 * scale), name


@pytest.mark.parametrize("label", [name for name in TOKENS if name not in ("sam", "conch")])
def test_the_same_features_and_gradients(label: str) -> None:
    trainable = fresh(label)
    adapt(trainable, "full", features="cls")
    images = pixels(trainable)
    only = ClsOnly(trainable, "cls")
    assert only.saves
    expected, wanted = of(trainable, "cls", images)
    with only.applied():
        found, gradients = of(trainable, "cls", images)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    check_gradients(gradients, wanted)
    again, _ = of(trainable, "cls", images)
    assert torch.equal(again, expected)  # nothing stays behind


@pytest.mark.parametrize("label", ["sam", "conch", "convnext", "dinov3-convnext", "resnet", "mobilenet"])
def test_networks_that_pool_are_left_as_they_are(label: str) -> None:
    assert not ClsOnly(fresh(label), "cls").saves


def test_what_reads_more_is_left_as_it_is() -> None:
    trainable = fresh("dinov2")
    for features, saves in {
        "cls": True,
        "last2": True,
        "layers/1/cls+cls": True,
        "cls+mean_patch": False,
        "mean_all": False,
        "layers/1/mean_patch+cls": False,
    }.items():
        assert ClsOnly(trainable, features).saves is saves, features
    assert not ClsOnly(fresh("dinov2", checkpointing=True), "cls").saves
    assert not ClsOnly(make_trainable(Own()), "cls").saves  # its CLS is the mean of its tokens


def test_only_the_rows_of_cls_are_computed() -> None:
    trainable = fresh("dinov2")
    images = pixels(trainable)
    rows: dict[str, int] = {}
    block = trainable.blocks[-1]
    names = {"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "o": "attention.o_proj"}
    names |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}

    def count(role: str) -> None:
        # Hooks of its own would run before those of `applied`, and see all rows.
        plain = block.get_submodule(names[role]).forward

        def forward(inputs: Any) -> Any:
            rows[role] = inputs.shape[1]
            return plain(inputs)

        block.get_submodule(names[role]).forward = forward

    for role in names:
        count(role)
    with ClsOnly(trainable, "cls").applied():
        trainable.features(images, "cls")
    assert rows == ROWS


def test_layers_in_front_are_whole() -> None:
    trainable = fresh("dinov3")
    images = pixels(trainable)
    expected = trainable.features(images, "last3")
    with ClsOnly(trainable, "last3").applied():
        assert torch.allclose(trainable.features(images, "last3"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", ["q,v", "fc1", "fc2", "gate_proj", "qkv,fc1,fc2"])
def test_matrices_with_an_adapter_are_left_as_they_are(targets: str) -> None:
    trainable = fresh("dinov3-gated")
    adapted = adapt(trainable, "lora", AdapterConfig(r=2, targets=targets), features="cls")
    perturb(adapted)
    images = pixels(trainable)
    expected, wanted = of(trainable, "cls", images)
    only = ClsOnly(trainable, "cls")
    assert only.saves  # o at least
    with only.applied():
        found, gradients = of(trainable, "cls", images)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    check_gradients(gradients, wanted)


def test_a_model_that_trains_does_less() -> None:
    """Its last block is keys and values of all tokens, and ten parts of twelve of one."""
    work = {}
    for checkpointing in (False, True):
        trainable = fresh("dinov2", checkpointing=checkpointing)
        adapted = adapt(trainable, "last-k", AdapterConfig(k=1), features="cls")
        model = Tuned(adapted, "cls", make_head(adapted, "cls", 1, 0))
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            model(pixels(trainable, count=1))
        work[checkpointing] = counted.get_total_flops()
    tokens, width = 5, 48
    assert work[True] - work[False] == 2 * (tokens - 1) * 10 * width**2
