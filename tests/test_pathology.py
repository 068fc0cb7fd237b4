"""BiomedCLIP, UNI and CONCH: tokens against plain torch written from the definition, key names, facts, messages.

`timm_parity.py` compares the same networks with timm's own forward and with CONCH's own code.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_conformance import CHECKS, TOLERANCE, images
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from featstore.backbones import canonical_name, describe
from featstore.backbones.architecture import VisionTransformer
from featstore.backbones.family import Release
from featstore.backbones.network import build_empty, load_network, weights_of
from featstore.backbones.pathology import BIOMEDCLIP, CONCH, UNI
from featstore.backbones.source import LoadOptions, find_family
from featstore.backbones.tensors import TorchFile
from featstore.errors import ConfigError, MissingWeightsError, WeightsError

RELEASES: dict[str, Release] = {"biomedclip": BIOMEDCLIP, "uni": UNI, "conch": CONCH}
WIDTH, DEPTH, HEADS, HIDDEN, NATIVE = 32, 3, 2, 128, 48  # of the small trunks; patches of 16 pixels
OUT = {"biomedclip": 24, "uni": WIDTH, "conch": 16}
POOL_HEADS = 8
OPTIONS = LoadOptions(device="cpu", compute_dtype="float32")


def small(name: str, out: int | None = None) -> VisionTransformer:
    """A small network of a family; `out` is the width of `cls`."""
    architecture = RELEASES[name].architecture
    assert isinstance(architecture, VisionTransformer)
    return replace(
        architecture,
        embed_dim=out or OUT[name],
        patch_dim=None if name == "uni" else WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_dim=HIDDEN,
        native_size=NATIVE,
        counts=(0, 0.0),
    )


def trunk_shapes(depth: int, width: int, hidden: int, positions: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of timm's ViT without layer scale."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, positions, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(depth):
        for part, out, inputs in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):
            shapes |= {f"blocks.{block}.{part}.weight": (out, inputs), f"blocks.{block}.{part}.bias": (out,)}
        for part in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{part}.weight": (width,), f"blocks.{block}.{part}.bias": (width,)}
    return shapes


def file_shapes(name: str, out: int, trunk: dict[str, tuple[int, ...]], width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a published file, some of the text tower's among them."""
    if name == "uni":
        scales = {f"blocks.{block}.ls{i}.gamma": (width,) for block in range(DEPTH) for i in (1, 2)}
        return trunk | scales
    shapes = {f"visual.trunk.{key}": shape for key, shape in trunk.items()} | {"logit_scale": ()}
    if name == "biomedclip":
        text = {"text.transformer.embeddings.word_embeddings.weight": (9, 4), "text.proj.0.weight": (6, 4)}
        return shapes | {"visual.head.proj.weight": (out, width)} | text
    pool = {
        "query": (1, out),
        "attn.q_proj_weight": (out, out),
        "attn.k_proj_weight": (out, width),
        "attn.v_proj_weight": (out, width),
        "attn.in_proj_bias": (3 * out,),
        "attn.out_proj.weight": (out, out),
        "attn.out_proj.bias": (out,),
        "ln_q.weight": (out,),
        "ln_q.bias": (out,),
        "ln_k.weight": (width,),
        "ln_k.bias": (width,),
    }
    shapes |= {f"visual.attn_pool_contrast.{key}": shape for key, shape in pool.items()}
    shapes |= {"visual.ln_contrast.weight": (out,), "visual.ln_contrast.bias": (out,)}
    shapes |= {"visual.proj_contrast": (out, out), "visual.attn_pool_caption.query": (5, width)}
    return shapes | {"visual.ln_caption.weight": (width,), "text.cls_emb": (4,), "text.token_embedding.weight": (9, 4)}


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random numbers for every tensor, norms and scales around 1."""
    generator = torch.Generator().manual_seed(seed)
    around = {key: 1.0 if "norm" in key and key.endswith("weight") else 0.1 for key in shapes}
    return {key: torch.randn(shape, generator=generator) * 0.2 + around[key] for key, shape in shapes.items()}


def small_file(name: str, out: int | None = None) -> dict[str, Tensor]:
    trunk = trunk_shapes(DEPTH, WIDTH, HIDDEN, (NATIVE // 16) ** 2 + 1)
    return draw(file_shapes(name, out or OUT[name], trunk, WIDTH))


def save(path: Path, tensors: Any) -> Path:
    torch.save(tensors, path)
    return path


def load(name: str, file: Path, out: int | None = None, **options: Any) -> Any:
    architecture = replace(small(name, out), **options)
    return load_network(TorchFile(file), architecture, find_family(name), "hf", OPTIONS)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pathology")
    return {name: load(name, save(folder / f"{name}.bin", small_file(name))) for name in RELEASES}


def block_outputs(state: dict[str, Tensor], pixels: Tensor, *, scaled: bool) -> list[Tensor]:
    """Output of each block of the trunk whose tensors are `state`, each (B, N, D)."""
    layer_norm, linear = functional.layer_norm, functional.linear
    width = state["cls_token"].shape[-1]
    side = int((state["pos_embed"].shape[1] - 1) ** 0.5)
    grid = pixels.shape[2] // 16, pixels.shape[3] // 16
    table = state["pos_embed"][:, 1:].reshape(1, side, side, width).permute(0, 3, 1, 2)
    if grid != (side, side):
        table = functional.interpolate(table, size=grid, mode="bicubic", antialias=True, align_corners=False)
    # Every patch as one row of 3 x 16 x 16 numbers, times a matrix.
    rows = functional.unfold(pixels, kernel_size=16, stride=16).transpose(1, 2)
    patches = linear(rows, state["patch_embed.proj.weight"].flatten(1), state["patch_embed.proj.bias"])
    first = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(pixels), -1, -1)
    tokens = torch.cat([first, patches + table.flatten(2).transpose(1, 2)], dim=1)
    outputs = []
    for block in range(DEPTH):

        def get(name: str, block: int = block) -> tuple[Tensor, Tensor]:
            return state[f"blocks.{block}.{name}.weight"], state[f"blocks.{block}.{name}.bias"]

        scales = [state[f"blocks.{block}.ls{i}.gamma"] if scaled else 1.0 for i in (1, 2)]
        normed = layer_norm(tokens, (width,), *get("norm1"), eps=1e-6)
        query, key, value = linear(normed, *get("attn.qkv")).reshape(*tokens.shape[:2], 3, HEADS, -1).unbind(2)
        weights = torch.einsum("bnhd,bmhd->bhnm", query, key) / (width // HEADS) ** 0.5
        mixed = torch.einsum("bhnm,bmhd->bnhd", weights.softmax(dim=-1), value).flatten(2)
        tokens = tokens + scales[0] * linear(mixed, *get("attn.proj"))
        normed = layer_norm(tokens, (width,), *get("norm2"), eps=1e-6)
        tokens = tokens + scales[1] * linear(functional.gelu(linear(normed, *get("mlp.fc1"))), *get("mlp.fc2"))
        outputs.append(tokens)
    return outputs


def image_vector(name: str, state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """`cls` of normed tokens (B, N, D), with the tensors of the published file."""
    if name == "uni":
        return tokens[:, 0]
    if name == "biomedclip":
        return tokens[:, 0] @ state["visual.head.proj.weight"].T
    pool = {key.removeprefix("visual.attn_pool_contrast."): value for key, value in state.items()}
    out, width = pool["attn.k_proj_weight"].shape
    attention = nn.MultiheadAttention(out, POOL_HEADS, kdim=width, vdim=width, batch_first=True)
    attention.load_state_dict(
        {key.removeprefix("attn."): value for key, value in pool.items() if key.startswith("attn.")}
    )
    context = functional.layer_norm(tokens, (width,), pool["ln_k.weight"], pool["ln_k.bias"])
    query = functional.layer_norm(pool["query"], (out,), pool["ln_q.weight"], pool["ln_q.bias"])
    answer = attention(query.expand(len(tokens), 1, -1), context, context)[0][:, 0]
    return functional.layer_norm(answer, (out,), state["visual.ln_contrast.weight"], state["visual.ln_contrast.bias"])


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 5), (6, 4)], ids=["native", "wide", "tall"])
def test_tokens_equal_the_definition(name: str, rows: int, columns: int, backbones: dict[str, Any]) -> None:
    state = small_file(name)
    prefix = "" if name == "uni" else "visual.trunk."
    trunk = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    pixels = images(backbones[name], rows, columns, count=3)
    found = backbones[name](pixels, layers=(1, 2, -1))
    with torch.no_grad():
        outputs = block_outputs(trunk, pixels, scaled=name == "uni")
        for number, tokens in ((3, found), *found.layers.items()):
            normed = functional.layer_norm(
                outputs[number - 1], (WIDTH,), trunk["norm.weight"], trunk["norm.bias"], eps=1e-6
            )
            assert tokens.cls.shape == (3, OUT[name])
            assert torch.allclose(tokens.cls, image_vector(name, state, normed), rtol=0, atol=TOLERANCE)
            assert torch.allclose(tokens.patches, normed[:, 1:], rtol=0, atol=TOLERANCE)
            assert tokens.registers.shape == (3, 0, OUT[name])


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conformance(check: Callable[[Any], None], name: str, tmp_path: Path) -> None:
    check(load(name, save(tmp_path / "small.bin", small_file(name, WIDTH)), WIDTH))


@pytest.mark.parametrize("name", RELEASES)
def test_counts_are_those_of_the_network(name: str) -> None:
    architecture = RELEASES[name].architecture
    network = build_empty(architecture, find_family(name)).to("meta")
    assert architecture.num_parameters() == sum(value.numel() for value in weights_of(network).values())
    for height, width in ((224, 224), (448, 320)):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network(torch.empty(1, 3, height, width, device="meta"))
        measured = counter.get_total_flops() / 1e9
        assert architecture.gflops(height, width) == pytest.approx(measured, rel=0.015)  # the heads are not counted


def test_facts_of_the_releases() -> None:
    assert [release.architecture.embed_dim for release in RELEASES.values()] == [512, 1024, 512]
    assert [release.architecture.patch_width for release in RELEASES.values()] == [768, 1024, 768]
    assert [release.architecture.native_size for release in RELEASES.values()] == [224, 224, 448]
    assert [release.gated for release in RELEASES.values()] == [False, True, True]
    for name, release in RELEASES.items():
        assert canonical_name(release.hub_id) == name
    assert canonical_name("MahmoodLab/conch") == "conch"


@pytest.mark.parametrize("name", RELEASES)
def test_checkpoint_may_be_nested(name: str, tmp_path: Path, backbones: dict[str, Any]) -> None:
    nested = load(name, save(tmp_path / "nested.bin", {"state_dict": small_file(name), "epoch": 3}))
    pixels = images(nested, 2, 3)
    assert torch.equal(nested(pixels).cls, backbones[name](pixels).cls)


def test_conch_may_come_from_parallel_training(tmp_path: Path, backbones: dict[str, Any]) -> None:
    parallel = load("conch", save(tmp_path / "p.bin", {f"module.{k}": v for k, v in small_file("conch").items()}))
    pixels = images(parallel, 2, 3)
    assert torch.equal(parallel(pixels).cls, backbones["conch"](pixels).cls)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("biomedclip", "visual.head.proj.weight"),
        ("biomedclip", "visual.trunk.blocks.1.attn.qkv.bias"),
        ("uni", "blocks.2.ls1.gamma"),
        ("conch", "visual.attn_pool_contrast.attn.in_proj_bias"),
        ("conch", "visual.ln_contrast.weight"),
    ],
)
def test_missing_tensor_is_named(name: str, key: str, tmp_path: Path) -> None:
    state = small_file(name)
    del state[key]
    with pytest.raises(WeightsError, match=rf"does not fit the model: tensors 1 missing \({key}\)$"):
        load(name, save(tmp_path / "cut.bin", state))


@pytest.mark.parametrize("name", RELEASES)
def test_tensor_of_another_network_is_named(name: str, tmp_path: Path) -> None:
    key = "blocks.0.attn.relative_position" if name == "uni" else "visual.trunk.blocks.0.attn.relative_position"
    with pytest.raises(WeightsError, match=rf"does not fit the model: tensors 1 left over \({key}\)$"):
        load(name, save(tmp_path / "more.bin", small_file(name) | {key: torch.zeros(3)}))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "pytorch_model.bin", small_file("biomedclip"))
    with pytest.raises(WeightsError, match=r"does not fit the model: tensors \d+ missing \(visual.attn_pool_contrast"):
        load("conch", file)
    with pytest.raises(WeightsError, match=r"does not fit the model: tensors \d+ missing \(blocks.0"):
        load("uni", file)


@pytest.mark.parametrize("name", ["biomedclip", "conch"])
def test_cls_is_made_after_the_norm(name: str, tmp_path: Path) -> None:
    file = save(tmp_path / "small.bin", small_file(name))
    with pytest.raises(ConfigError, match=f"--norm none: {name} makes cls of its tokens after the final norm"):
        load(name, file, final_norm=False)


def test_uni_before_the_norm(tmp_path: Path) -> None:
    state = small_file("uni")
    backbone = load("uni", save(tmp_path / "small.bin", state), final_norm=False)
    pixels = images(backbone, 3, 3)
    expected = block_outputs(state, pixels, scaled=True)[-1]
    assert torch.allclose(backbone(pixels).cls, expected[:, 0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["uni", "conch"])
def test_gated_model_says_how_to_accept_its_licence(name: str) -> None:
    wanted = f"accept the licence on the hub's page of {RELEASES[name].hub_id}, log in with `hf auth login`"
    with pytest.raises(MissingWeightsError, match=wanted):
        describe(name)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", RELEASES)
def test_kernels_agree(name: str, kernel: str, tmp_path: Path, backbones: dict[str, Any]) -> None:
    file = TorchFile(save(tmp_path / "small.bin", small_file(name)))
    backbone = load_network(file, small(name), find_family(name), "hf", replace(OPTIONS, attention=kernel))
    pixels = images(backbone, 3, 4)
    assert torch.allclose(backbone(pixels).cls, backbones[name](pixels).cls, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["biomedclip", "conch"])
def test_published_file_at_full_size(name: str, tmp_path: Path) -> None:
    """The whole way: `describe` with the file that users download, here of random numbers."""
    release = RELEASES[name].architecture
    assert isinstance(release, VisionTransformer)
    trunk = trunk_shapes(12, 768, 3072, (release.native_size // 16) ** 2 + 1)
    state = {key: torch.randn(shape) * 0.02 for key, shape in file_shapes(name, 512, trunk, 768).items()}
    file = save(tmp_path / RELEASES[name].files[0], state)
    source = describe(name, weights=file)
    backbone = source.load(device="cpu", compute_dtype="float32")
    tokens = backbone(torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)))
    assert tokens.cls.shape == (1, 512)
    assert tokens.patches.shape == (1, 24, 768)
    assert bool(torch.isfinite(tokens.cls).all())
