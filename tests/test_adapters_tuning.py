"""Methods of fine-tuning: what trains, what stays to the bit, LoRA, depths, counts in closed form."""

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from backbone_conformance import images
from torch import Tensor, nn
from tuning import (
    DINOV2,
    FACTS,
    LEARNERS,
    OPTIONS,
    Closed,
    Own,
    fresh,
    gap,
    load,
    perturb,
    pixels,
    same,
)

from featstore.backbones import BACKBONES
from featstore.backbones.anatomy import depths_of, find_blocks, find_targets, usual_targets
from featstore.backbones.compiling import Compilation
from featstore.backbones.family import Release
from featstore.backbones.mobilenet import MOBILENETV2
from featstore.backbones.network import build_empty, load_network
from featstore.backbones.pooling import width_of
from featstore.backbones.source import find_family
from featstore.backbones.tensors import RandomTensors
from featstore.backbones.tokens import Tokens
from featstore.backbones.trainable import Trainable, make_trainable
from featstore.errors import ConfigError
from probes import adapters_lora
from probes.adapters import Adapted, adapt, is_bias
from probes.adapters_config import METHODS, AdapterConfig
from probes.adapters_counts import compare_with_paper, count_bitfit, count_full, count_last, count_lora

# What trains


def batch_of(trainable: Trainable) -> tuple[Tensor, Tensor]:
    batch = pixels(trainable, count=8, seed=3)
    batch[::2, :, :16] += 2.0
    return batch, torch.tensor([1.0, 0.0] * 4)


def train_steps(adapted: Adapted, *, autocast: bool, steps: int = 4) -> list[float]:
    """Losses of a linear head over the network's features; the head's own steps are off, unless nothing else trains."""
    trainable = adapted.trainable.train()
    batch, labels = batch_of(trainable)
    head = nn.Linear(width_of("cls+mean_patch", trainable.architecture), 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.05)
        head.bias.zero_()
    own = list(adapted.parameters.values())
    optimiser = torch.optim.AdamW(own or head.parameters(), lr=3e-3)
    losses = []
    torch.manual_seed(0)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = trainable.features(batch, "cls+mean_patch")
        assert features.dtype == torch.float32
        loss = nn.functional.binary_cross_entropy_with_logits(head(features)[:, 0], labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("label", LEARNERS)
def test_steps_lower_the_loss_and_move_nothing_else(label: str, method: str, autocast: bool) -> None:
    trainable = fresh(label)
    config = AdapterConfig(dropout=0.0) if method == "lora" else AdapterConfig()
    adapted = adapt(trainable, method, config, features="cls+mean_patch")
    before = {name: value.clone() for name, value in trainable.network.state_dict().items()}
    losses = train_steps(adapted, autocast=autocast)
    assert losses[-1] < losses[0]
    after = trainable.network.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    allowed = set(adapted.state())
    assert moved <= allowed
    assert bool(moved) is (method != "linear-online")
    assert all(parameter.dtype == torch.float32 for parameter in adapted.parameters.values())


def test_what_each_method_trains() -> None:
    trainable = fresh("dinov3-convnext")
    assert set(adapt(trainable, "bitfit").parameters) == {
        name for name, _ in trainable.network.named_parameters() if name.endswith(".bias")
    }
    trainable = fresh("dinov2")
    adapted = adapt(trainable, "last-k", AdapterConfig(k=2))
    assert {name.split(".")[2] if "layer." in name else name for name in adapted.parameters} == {
        *("1", "2", "layernorm.weight", "layernorm.bias")
    }
    assert adapted.notes == ["blocks 2 to 3 and the 2 parameters behind them (final norm) train"]
    trainable = fresh("mobilenet")
    adapted = adapt(trainable, "last-k", AdapterConfig(k=1))
    assert {".".join(name.split(".")[:2]) for name in adapted.parameters} == {"features.18"}
    adapted = adapt(fresh("dinov2"), "full")
    assert "embeddings.mask_token" not in adapted.parameters
    assert adapted.counts().total - adapted.counts().trainable == DINOV2.embed_dim
    trainable = fresh("dinov2")
    adapted = adapt(trainable, "lora", AdapterConfig(bias="lora_only", targets="q,fc2"))
    assert all(".lora_" in name or name.endswith("base_layer.bias") for name in adapted.parameters)
    assert len(adapted.parameters) == 3 * (2 * 2 + 2)


def test_a_bias_is_what_its_own_name_says() -> None:
    assert is_bias("blocks.0.attn.q_bias")
    assert is_bias("bn1.bias")
    assert not is_bias("layers.0.relative_position_bias_table")
    assert not is_bias("bias_net.weight")


def test_unused_parameters_are_frozen_and_said() -> None:
    trainable = fresh("convnext")
    adapted = adapt(trainable, "full", features="mean_patch")  # the patches of a ConvNeXt are not normed
    assert not any(name.startswith("layernorm.") for name in adapted.parameters)
    assert adapted.notes == ["2 parameters are not trained, mean_patch does not depend on them: layernorm.weight"]
    assert adapt(fresh("convnext"), "full", features="cls").notes == []


# LoRA


@pytest.mark.parametrize("label", ["dinov2", "dinov2-swiglu", "dinov3", "convnext", "dinov3-convnext", "mobilenet"])
def test_adapters_begin_with_the_frozen_output(label: str) -> None:
    backbone = load(label)
    batch = images(backbone, 2, 2)
    expected = backbone(batch)
    trainable = make_trainable(backbone)
    adapted = adapt(trainable, "lora", AdapterConfig(r=3))
    assert same(trainable.eval()(batch), expected)
    perturb(adapted, 0.02)
    moved = trainable(batch)
    assert gap(moved, expected) > 1e-3
    before = {name: value.clone() for name, value in trainable.state_dict().items()}
    with adapted.merged():
        assert gap(trainable(batch), moved) <= 1e-5
        name, layer = adapters_lora.lora_layers(trainable.network)[0]
        assert not torch.equal(layer.base_layer.weight, before[f"network.{name}.base_layer.weight"])
    after = trainable.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert same(trainable(batch), moved)
    assert adapted.live_state().keys() == load(label).network.state_dict().keys()


def test_adapters_follow_the_seed_alone() -> None:
    def first(seed: int, targets: str, noise: int) -> Tensor:
        trainable = fresh("dinov2")
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        adapted = adapt(trainable, "lora", AdapterConfig(seed=seed, targets=targets))
        assert torch.equal(before, torch.random.get_rng_state())  # nothing was drawn from everybody's generator
        return next(value for name, value in adapted.state().items() if "q_proj.lora_A" in name)

    assert torch.equal(first(0, "q,v", 0), first(0, "fc1,q", 5))
    assert not torch.equal(first(0, "q,v", 0), first(1, "q,v", 0))
    bound = (1 / DINOV2.embed_dim) ** 0.5  # of a uniform draw as nn.Linear's own
    drawn = first(0, "q,v", 0)
    assert 0.95 * bound < float(drawn.abs().max()) <= bound


def test_dropout_is_on_in_training_alone() -> None:
    trainable = fresh("dinov2")
    perturb(adapt(trainable, "lora", AdapterConfig(dropout=0.5)))
    batch = pixels(trainable)
    torch.manual_seed(0)
    assert same(trainable.eval()(batch), trainable(batch))
    assert not same(trainable.train()(batch), trainable(batch))


class Plain:
    """A backbone that is no torch module."""

    architecture, device, dtype = Own.architecture, Own.device, Own.dtype

    def __call__(self, pixels: Tensor, *, layers: tuple[int, ...] = ()) -> Tokens:
        raise AssertionError("not called here")


def test_own_networks_train() -> None:
    trainable = make_trainable(Own())
    adapted = adapt(trainable, "lora", AdapterConfig(r=2, targets="q,v"), features="cls")
    assert adapted.notes == [
        f"{part}: query, key and value are one matrix here, which is adapted as a whole" for part in "qv"
    ]
    assert {name.split(".lora")[0] for name in adapted.parameters} == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}
    facts = replace(DINOV2, embed_dim=8, mlp_dim=32, depth=2)  # type: ignore[call-arg]
    assert adapted.counts().trainable == count_lora(facts, 2, "qkv", fused=True)
    losses = train_steps(adapted, autocast=False)
    assert losses[-1] < losses[0]
    with pytest.raises(ConfigError, match="an own network reads its weights itself"):
        adapted.export(Path("never"))
    trainable = make_trainable(Closed())
    with pytest.raises(ConfigError, match="Closed computes without gradients; to train it, its forward must run und"):
        adapt(trainable, "full", features="cls")
    with pytest.raises(ConfigError, match="Plain cannot train: it must be a torch module"):
        make_trainable(Plain())


@pytest.mark.parametrize(
    ("label", "targets", "expected"),
    [
        ("dinov2", "q,v", {"q_proj", "v_proj"}),
        ("dinov2", "query,value", {"q_proj", "v_proj"}),
        ("dinov2", "qkv,fc1,fc2", {"q_proj", "k_proj", "v_proj", "fc1", "fc2"}),
        ("dinov2", "o", {"o_proj"}),
        ("dinov2-swiglu", "qkv,fc1,fc2", {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}),
        ("dinov2-swiglu", "w12,w3", {"gate_proj", "up_proj", "down_proj"}),
        ("dinov2-swiglu", "up_proj", {"up_proj"}),
        ("dinov3", "fc1,fc2", {"up_proj", "down_proj"}),
        ("dinov3-gated", "fc1", {"gate_proj", "up_proj"}),
        ("convnext", "fc1,fc2", {"pwconv1", "pwconv2"}),
        ("convnext", "pointwise_conv1", {"pwconv1"}),
        ("dinov3-convnext", "fc1, fc2", {"pointwise_conv1", "pointwise_conv2"}),
        ("resnet", "conv1,conv3", {"conv1", "conv3"}),
    ],
)
def test_targets_by_role(label: str, targets: str, expected: set[str]) -> None:
    trainable = fresh(label)
    names, notes = find_targets(trainable.network, trainable.block_names, targets)
    assert {name.rpartition(".")[2] for name in names} == expected
    assert notes == ()
    blocks = len(trainable.block_names)
    assert len(names) == blocks * len(expected)


def test_names_of_older_versions_of_transformers_are_roles_too() -> None:
    layer = nn.ModuleDict(
        {
            "attention": nn.ModuleDict(
                {
                    "attention": nn.ModuleDict({name: nn.Linear(4, 4) for name in ("query", "key", "value")}),
                    "output": nn.ModuleDict({"dense": nn.Linear(4, 4)}),
                }
            ),
            "mlp": nn.ModuleDict({"weights_in": nn.Linear(4, 8), "weights_out": nn.Linear(4, 4)}),
            "intermediate": nn.ModuleDict({"dense": nn.Linear(4, 4)}),
            "output": nn.ModuleDict({"dense": nn.Linear(4, 4)}),
        }
    )
    network = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.ModuleList([layer, copy.deepcopy(layer)])})})
    blocks = find_blocks(network, "encoder.layer")
    for targets, expected in (
        ("q,v", {"attention.attention.query", "attention.attention.value"}),
        ("q_proj", {"attention.attention.query"}),
        ("o", {"attention.output.dense"}),
        ("fc1", {"mlp.weights_in", "intermediate.dense"}),
        ("fc2", {"mlp.weights_out", "output.dense"}),
    ):
        names, _ = find_targets(network, blocks, targets)
        assert set(names) == {f"encoder.layer.{block}.{name}" for block in (0, 1) for name in expected}


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("dinov2", "q,v"),
        ("dinov3", "q,v"),
        ("convnext", "fc1,fc2"),
        ("resnet", "pointwise"),
        ("mobilenet", "pointwise"),
    ],
)
def test_usual_targets(label: str, expected: str) -> None:
    trainable = fresh(label)
    assert usual_targets(trainable.network, trainable.block_names) == expected
    assert adapt(trainable, "lora").settings["targets"] == expected


def test_targets_that_match_nothing_say_what_there_is() -> None:
    for label, targets, message in (
        (
            "convnext",
            "q,v",
            r"--targets q matches nothing; this network has the roles fc1, fc2 and modules ending in pwc",
        ),
        (
            "dinov2",
            "qv",
            r"--targets qv matches nothing; this network has the roles q, k, v, qkv, o, fc1, fc2 and modu",
        ),
        ("dinov2", "q,", r"--targets  matches nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapt(fresh(label), "lora", AdapterConfig(targets=targets))
    with pytest.raises(ConfigError, match="LoRA needs matrices or 1 x 1 convolutions within blocks, and this network"):
        usual_targets(nn.Sequential(nn.ReLU()), ())


def test_settings_must_hold() -> None:
    for options, message in (
        ({"r": 0}, "r must be at least 1; got 0"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"bias": "all"}, "bias must be none or lora_only; got 'all'"),
        ({"k": 0}, "k must be at least 1"),
        ({"batch_norm": "sync"}, "batch norm must be auto, frozen or train; got 'sync'"),
        ({"seed": -1}, "seed must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            AdapterConfig(**options)  # type: ignore[arg-type]
    for method, options, message in (
        ("ia3", {}, "method must be one of full, lora, bitfit, last-k, linear-online; got 'ia3'"),
        ("bitfit", {"r": 4}, "r is a setting of lora, and the method is bitfit; leave it out"),
        ("lora", {"k": 1}, "k is a setting of last-k, and the method is lora"),
        ("last-k", {"k": 4}, "last-k 4: the network has 3 blocks; use a smaller k, or full"),
        ("full", {"batch_norm": "train"}, "batch norm train: the network has no batch norms; leave it out"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapt(fresh("dinov2"), method, AdapterConfig(**options))
    with pytest.raises(ConfigError, match="batch norm train: lora trains no batch norm"):
        adapt(fresh("mobilenet"), "lora", AdapterConfig(batch_norm="train"))
    trainable = fresh("dinov2")
    adapt(trainable, "bitfit")
    with pytest.raises(ConfigError, match="a method was applied to this network before; load it anew"):
        adapt(trainable, "full")
    bare = make_trainable(Own())
    bare.network.stem.bias = None
    for block in bare.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.bias = None
    with pytest.raises(ConfigError, match="bitfit trains biases, and this network has none"):
        adapt(bare, "bitfit")


def test_lora_without_peft_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(ConfigError, match=r"pip install 'featstore\[finetune\]'; full, bitfit, last-k and linear-onli"):
        adapt(fresh("dinov2"), "lora")
    for method in ("full", "bitfit", "last-k", "linear-online"):
        adapt(fresh("dinov2"), method)


def test_weights_must_be_plain_float32() -> None:
    facts = FACTS["dinov2"]
    family = find_family(facts.family)
    for options in ({"compute_dtype": "bfloat16"}, {"memory": "stream"}, {"weight_dtype": "int8"}):
        chosen = replace(OPTIONS, **options)  # type: ignore[arg-type]
        backbone = load_network(RandomTensors(0, family), facts, family, "hf", chosen)
        with pytest.raises(ConfigError, match=r"training needs whole float32 weights on one device; these are "):
            make_trainable(backbone)
    compiled = load("dinov2")
    compiled.network._compilation = Compilation("on")  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="a network that extraction compiled has no gradients"):
        make_trainable(compiled)


# Depth and groups


def test_depths_rise_from_the_image_to_the_head() -> None:
    depths = fresh("dinov2").depths()
    assert depths["embeddings.position_embeddings"] == depths["embeddings.patch_embeddings.projection.bias"] == 0
    assert depths["encoder.layer.0.norm1.weight"] == 1
    assert depths["encoder.layer.2.mlp.fc2.bias"] == 3
    assert depths["layernorm.weight"] == 4
    depths = fresh("convnext").depths()  # 1, 2, 1, 1 blocks
    assert depths["embeddings.patch_embeddings.weight"] == 0
    assert depths["encoder.stages.0.layers.0.pwconv1.weight"] == 1
    assert (
        depths["encoder.stages.1.downsampling_layer.1.weight"] == depths["encoder.stages.1.layers.0.dwconv.bias"] == 2
    )
    assert depths["encoder.stages.1.layers.1.dwconv.bias"] == 3
    assert depths["encoder.stages.3.downsampling_layer.0.bias"] == 5
    assert depths["layernorm.bias"] == 6
    with pytest.raises(ConfigError, match="no list of blocks was found under the usual names"):
        depths_of(["a.weight"], ())


@pytest.mark.parametrize("name", sorted({*BACKBONES} - {"tiny-random"}))
def test_blocks_of_every_listed_network_are_found(name: str) -> None:
    release = resolve_name(BACKBONES[name])
    facts = release.architecture if isinstance(release, Release) else release
    network = build_empty(facts, find_family(facts.family))
    trainable = Trainable(network, facts, find_family(facts.family))
    blocks = trainable.block_names
    assert len(blocks) >= 4
    if facts.depth:
        assert len(blocks) == facts.depth
    depths = trainable.depths()
    assert set(depths.values()) >= set(range(len(blocks) + 1))
    inside = sum(network.get_parameter(each).numel() for each, depth in depths.items() if 0 < depth <= len(blocks))
    assert inside > 0.8 * sum(parameter.numel() for parameter in network.parameters())


def test_groups_by_depth() -> None:
    trainable = fresh("dinov2")
    adapted = adapt(trainable, "full")
    groups = adapted.groups(lr=1.0, weight_decay=0.1, layer_decay=0.5)
    by_name = {name: group for group in groups for name in group["names"]}
    assert by_name.keys() == adapted.parameters.keys()
    assert by_name["layernorm.weight"]["lr"] == 1.0
    assert by_name["encoder.layer.2.mlp.fc1.weight"]["lr"] == 0.5
    assert by_name["encoder.layer.0.mlp.fc1.weight"]["lr"] == 0.125
    assert by_name["embeddings.cls_token"]["lr"] == 0.0625
    for name, decay in (
        ("encoder.layer.0.mlp.fc1.weight", 0.1),
        ("embeddings.patch_embeddings.projection.weight", 0.1),
        ("encoder.layer.0.mlp.fc1.bias", 0.0),
        ("encoder.layer.0.layer_scale1.lambda1", 0.0),
        ("embeddings.cls_token", 0.0),
    ):
        assert by_name[name]["weight_decay"] == decay
    torch.optim.AdamW(groups)  # extra keys are no matter to it
    flat = adapted.groups(lr=1.0)
    assert {group["lr"] for group in flat} == {1.0}
    with pytest.raises(ConfigError, match=r"layer decay must be above 0 and at most 1; got 1\.5"):
        adapted.groups(lr=1.0, layer_decay=1.5)


# Counts: on the meta device, at full size


TRANSFORMERS = ("dinov2-base", "dinov2-giant", "dinov3-base", "dinov3-7b")
MORE = ("dinov2-large", "dinov2-large-reg", "dinov3-huge-plus", "vit-base", "convnext-base")
CONVNEXTS = ("dinov3-convnext-base", "convnext-base")


def on_meta(name: str) -> Trainable:
    facts = resolve_name(BACKBONES[name]).architecture
    family = find_family(facts.family)
    return Trainable(build_empty(facts, family), facts, family)


@pytest.mark.parametrize(
    "name",
    [*TRANSFORMERS, *CONVNEXTS[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in (*MORE, CONVNEXTS[1]))],
)
def test_counts_are_the_closed_forms(name: str) -> None:
    facts = resolve_name(BACKBONES[name]).architecture
    targets = "fc1,fc2" if name in CONVNEXTS else "qkv,fc1,fc2"
    usual = "fc1,fc2" if name in CONVNEXTS else "q,v"
    trainable = on_meta(name)
    for method, settings, expected in (
        ("full", AdapterConfig(), count_full(facts)),
        ("bitfit", AdapterConfig(), count_bitfit(facts)),
        ("last-k", AdapterConfig(k=2), count_last(facts, 2)),
        ("last-k", AdapterConfig(k=5), count_last(facts, 5)),
        ("last-k", AdapterConfig(k=12), count_last(facts, 12)),
        ("linear-online", AdapterConfig(), 0),
        ("lora", AdapterConfig(), count_lora(facts, 16, usual)),
    ):
        trainable.requires_grad_(False)
        counts = adapt(trainable, method, settings).counts()
        assert counts.trainable == expected, (method, settings)
        assert counts.total == facts.num_parameters() + counts.added
        assert counts.added == (expected if method == "lora" else 0)
    settings = AdapterConfig(r=48, alpha=16.0, bias="lora_only", targets=targets)
    counts = adapt(on_meta(name), "lora", settings).counts()
    assert counts.trainable == count_lora(facts, 48, targets, bias="lora_only")
    assert counts.added == count_lora(facts, 48, targets)


def test_counts_of_the_paper() -> None:
    rows = compare_with_paper(resolve_name(BACKBONES["dinov2-giant"]).architecture)
    counted = {(row["method"], row["variant"].split(":")[0]): row["counted"] for row in rows}
    # By hand: 40 blocks of width 1536; adapters of one matrix W (out x in) have r (in + out) numbers.
    assert counted["lora", "rank 32, qkv in one matrix"] == 40 * 32 * (1536 + 4608) / 1e6
    assert counted["lora", "rank 48, qkv in one matrix, biases"] == (40 * 48 * (1536 + 4608) + 40 * 4608) / 1e6
    assert counted["bitfit", "every bias"] == pytest.approx(0.8, abs=0.05)
    assert counted["full", "all but the mask token"] == pytest.approx(1136.5, abs=0.1)
    assert {row["published"] for row in rows} == {1100.0, 8.0, 0.8}
    with pytest.raises(ConfigError, match="no closed form is known for mobilenet_v2"):
        count_bitfit(MOBILENETV2.architecture)
    with pytest.raises(ConfigError, match=r"the roles of a vision transformer are q, k, v.*; got 'w12'"):
        count_lora(DINOV2, 4, "w12")
