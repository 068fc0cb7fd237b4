"""ViT, MAE, MSN, CLIP, SAM and their DINO relatives: tokens against transformers' own forward pass, and their traps.

Every network is saved by transformers as the hub has it: whole models too, whose heads, decoders and text towers are
none of ours.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbone_conformance import CHECKS, TOLERANCE, images, largest_difference, load
from safetensors.torch import load_file, save_file
from torch import Tensor
from vit_models import ALL, CASES, PLAIN, SAM_CASES, image_part, make_model, save_all

from featstore.backbones import describe
from featstore.backbones.tokens import Backbone
from featstore.errors import ConfigError, UnknownNameError, WeightsError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def backbones(folders: dict[str, Path]) -> dict[str, Backbone]:
    loaded = {label: load(describe(f"hf:{folder}")) for label, folder in folders.items()}
    return loaded | {f"{label}-random": load(describe(f"hf:{folders[label]}", random_weights=0)) for label in folders}


def reference(label: str, part: Any, pixels: Tensor) -> Any:
    """The output of transformers' own forward pass, hidden states included."""
    options: dict[str, Any] = {"interpolate_pos_encoding": True}
    if label.startswith("mae"):
        part.config.mask_ratio = 0.0
        patches = (pixels.shape[2] // 16) * (pixels.shape[3] // 16)
        options["noise"] = torch.arange(patches)[None].expand(len(pixels), -1)  # sorted already: nothing is shuffled
    with torch.no_grad():
        return part(pixels, output_hidden_states=True, **({} if label.startswith("sam") else options))


def normed(label: str, part: Any, sequence: Tensor) -> Tensor:
    """What the network makes of its last block's output; CLIP's norm is for CLS alone."""
    with torch.no_grad():
        if label.startswith("clip"):
            return torch.cat((part.post_layernorm(sequence[:, :1]), sequence[:, 1:]), 1)
        done: Tensor = part.layernorm(sequence)
    return done


@pytest.mark.parametrize(
    "label",
    ["vit", "vit-no-bias", "mae", "msn", "clip", *(f"{label}-random" for label in ("vit", "mae", "msn", "clip"))],
)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conformance(check: Callable[[Backbone], None], label: str, backbones: dict[str, Backbone]) -> None:
    check(backbones[label])


# Parity with transformers


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 5), (6, 4)], ids=["native", "wide", "tall"])
def test_tokens_equal_transformers(label: str, rows: int, columns: int, folders: dict[str, Path]) -> None:
    part = image_part(label, make_model(label))
    for norm in ("final", "none"):
        backbone = load(describe(f"hf:{folders[label]}", norm=norm))
        pixels = images(backbone, rows, columns, count=3)
        output = reference(label, part, pixels)
        tokens = backbone(pixels, layers=(1, 2, -1))
        assert tokens.registers.shape[1] == 0
        for number, found in ((3, tokens), *tokens.layers.items()):
            expected = output.hidden_states[number]
            if norm == "final":
                expected = normed(label, part, expected)
            assert torch.allclose(found.cls, expected[:, 0], rtol=0, atol=TOLERANCE)
            assert torch.allclose(found.patches, expected[:, 1:], rtol=0, atol=TOLERANCE)
        if norm == "final":
            pooled = label.startswith("clip")
            cls = output.pooler_output if pooled else output.last_hidden_state[:, 0]
            assert torch.allclose(tokens.cls, cls, rtol=0, atol=TOLERANCE)
            assert torch.allclose(tokens.patches, output.last_hidden_state[:, 1:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("label", ALL)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_equals_transformers(label: str, dtype: str, folders: dict[str, Path]) -> None:
    kind = getattr(torch, dtype)
    backbone = load(describe(f"hf:{folders[label]}"), dtype)
    network = getattr(transformers, ALL[label].model).from_pretrained(folders[label], dtype=kind).eval()
    pixels = images(backbone, 4, 4) if label in SAM_CASES else images(backbone, 2, 3)
    expected = reference(label, image_part(label, network), pixels.to(kind))
    tokens = backbone(pixels)
    assert tokens.cls.dtype == tokens.patches.dtype == kind
    if label in SAM_CASES:
        assert torch.equal(tokens.patches, expected.hidden_states[-1].flatten(1, 2))
    else:
        sequence = expected.last_hidden_state if backbone.architecture.final_norm else expected.hidden_states[-1]
        assert torch.equal(tokens.cls, sequence[:, 0])
        assert torch.equal(tokens.patches, sequence[:, 1:])


@pytest.mark.parametrize("label", ["vit", "mae", "msn", "clip"])
def test_kernels_agree(label: str, folders: dict[str, Path]) -> None:
    source = describe(f"hf:{folders[label]}")
    eager, sdpa = load(source, attention="eager"), load(source, attention="sdpa")
    assert (eager.network.config._attn_implementation, sdpa.network.config._attn_implementation) == ("eager", "sdpa")
    pixels = images(sdpa, 3, 2)
    assert largest_difference(eager(pixels), sdpa(pixels)) <= TOLERANCE


# SAM: another sequence, another norm, one size


@pytest.mark.parametrize("label", SAM_CASES)
@pytest.mark.parametrize("side", [3, 4, 5])
def test_sam_equals_transformers(label: str, side: int, tmp_path: Path) -> None:
    case = SAM_CASES[label]
    config = case.config()
    for part in (config, getattr(config, "vision_config", None), getattr(config, "prompt_encoder_config", None)):
        if hasattr(part, "image_size"):
            part.image_size = 16 * side
    network = getattr(transformers, case.model)(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    network.save_pretrained(tmp_path)
    backbone = load(describe(f"hf:{tmp_path}"))
    facts = backbone.architecture
    assert (facts.native_size, facts.fixed_size, facts.summary) == (16 * side, True, "pool")
    pixels = images(backbone, side, side, count=3)
    output = reference(label, network.vision_encoder, pixels)
    tokens = backbone(pixels, layers=(1, 2, -1))
    for number, found in ((3, tokens), *tokens.layers.items()):
        expected = output.hidden_states[number].flatten(1, 2)
        assert found.patches.shape == (3, side**2, 32)
        assert torch.allclose(found.patches, expected, rtol=0, atol=TOLERANCE)
        assert torch.allclose(found.cls, expected.mean(1), rtol=0, atol=TOLERANCE)
    # The neck is all that stands between our patches and the output of the whole encoder.
    with torch.no_grad():
        grid = network.vision_encoder.neck(tokens.patches.clone().reshape(3, side, side, 32))
    assert torch.allclose(grid, output.last_hidden_state, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("label", ["sam", "sam-random", "sam-tower", "sam-tower-random"])
def test_sam_tokens(label: str, backbones: dict[str, Backbone]) -> None:
    backbone = backbones[label]
    batch = images(backbone, 4, 4, count=4)
    tokens = backbone(batch)
    assert (tokens.cls.shape, tokens.registers.shape, tokens.patches.shape) == ((4, 32), (4, 0, 32), (4, 16, 32))
    assert bool(torch.isfinite(tokens.patches).all())
    assert float(tokens.patches.std(0).mean()) > 1e-3 < float(tokens.cls.std(0).mean())
    assert largest_difference(backbone(batch), tokens) == 0
    assert torch.allclose(backbone(batch[1:2]).patches, tokens.patches[1:2], rtol=0, atol=TOLERANCE)
    changed = batch[:1].clone()
    changed[:, :, 16:32, 48:] *= -1  # row 1, column 3
    moved = (backbone(changed).patches - tokens.patches[:1]).norm(dim=-1)[0]
    assert int(moved.argmax()) == 1 * 4 + 3


def test_sam_has_one_size(backbones: dict[str, Backbone]) -> None:
    with pytest.raises(ConfigError, match=r"sam_vision_model takes images of 64 x 64 pixels only, not 64 x 80"):
        backbones["sam"](torch.zeros(1, 3, 64, 80))
    with pytest.raises(ConfigError, match=r"takes images of 1024 x 1024 pixels only, not 512 x 512; leave --res out"):
        describe("sam-large", random_weights=0).architecture.check_size(512, 512)


def test_sam_changes_its_kernel(folders: dict[str, Path]) -> None:
    from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionSdpaAttention

    source = describe(f"hf:{folders['sam']}")
    eager, sdpa = load(source, attention="eager"), load(source, attention="sdpa")
    for backbone, kind in ((eager, SamVisionAttention), (sdpa, SamVisionSdpaAttention)):
        assert {type(layer.attn) for layer in backbone.network.vision_encoder.layers} == {kind}
    pixels = images(sdpa, 4, 4)
    assert 0 < largest_difference(eager(pixels), sdpa(pixels)) <= TOLERANCE
    for attention in ("xformers", "flash"):
        with pytest.raises(ConfigError, match=f"--attention {attention}: sam_vision_model"):
            load(source, attention=attention)


# What is in the files and none of the tokens' business


def rewritten(folder: Path, place: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of a folder whose tensors have been changed."""
    place.mkdir()
    (place / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value.contiguous() for name, value in change(tensors).items()}, place / "model.safetensors")
    return place


def test_pooler_is_left_out(folders: dict[str, Path], backbones: dict[str, Backbone], tmp_path: Path) -> None:
    backbone: Any = backbones["vit"]
    assert not [name for name, _ in backbone.network.named_modules() if "pooler" in name and _ is not None]
    pixels = images(backbone, 3, 2)
    assert "pooler.dense.weight" in load_file(folders["vit"] / "model.safetensors")
    for label, change in (
        ("noise", lambda tensors: {k: v + 7 if k.startswith("pooler") else v for k, v in tensors.items()}),
        ("none", lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("pooler")}),
    ):
        other = load(describe(f"hf:{rewritten(folders['vit'], tmp_path / label, change)}"))
        assert largest_difference(other(pixels), backbone(pixels)) == 0


def test_mae_neither_masks_nor_shuffles(backbones: dict[str, Backbone]) -> None:
    backbone, whole = backbones["mae"], make_model("mae")
    pixels = images(backbone, 3, 3)
    with torch.no_grad():
        masked = whole.vit(pixels).last_hidden_state
        whole.vit.config.mask_ratio = 0.0
        torch.manual_seed(0)
        shuffled = whole.vit(pixels, output_hidden_states=True).hidden_states[-1]
    assert masked.shape[1] == 1 + 2  # of 9 patches
    state = torch.random.get_rng_state()
    tokens = backbone(pixels)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert largest_difference(backbone(pixels), tokens) == 0
    assert torch.allclose(tokens.cls, shuffled[:, 0], rtol=0, atol=1e-4)  # CLS sees a set
    assert not torch.allclose(tokens.patches, shuffled[:, 1:], rtol=0, atol=1e-2)
    sums = [sequence.sum(-1).sort(dim=1).values for sequence in (tokens.patches, shuffled[:, 1:])]
    assert torch.allclose(*sums, rtol=0, atol=1e-3)  # the same patches in another order


def test_mae_equals_the_plain_classifier(folders: dict[str, Path], backbones: dict[str, Backbone]) -> None:
    """As Baharoon et al. load it: hidden states of a ViT classifier whose encoder has MAE's tensors."""
    plain = transformers.ViTForImageClassification.from_pretrained(
        folders["mae"], config=transformers.ViTConfig(**PLAIN)
    ).eval()
    for rows, columns in ((3, 3), (2, 4), (5, 5)):
        pixels = images(backbones["mae"], rows, columns)
        with torch.no_grad():
            output = plain(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        tokens = backbones["mae"](pixels)
        assert torch.allclose(tokens.cls, output.hidden_states[-1][:, 0], rtol=0, atol=TOLERANCE)
        assert torch.allclose(tokens.patches, output.hidden_states[-1][:, 1:], rtol=0, atol=TOLERANCE)


def test_numbers_of_positions_in_old_files(
    folders: dict[str, Path], backbones: dict[str, Backbone], tmp_path: Path
) -> None:
    def age(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            **tensors,
            "vision_model.embeddings.position_ids": torch.arange(10)[None],
            "text_model.embeddings.position_ids": torch.arange(77)[None],
        }

    aged = load(describe(f"hf:{rewritten(folders['clip'], tmp_path / 'aged', age)}"))
    pixels = images(aged, 2, 3)
    assert largest_difference(aged(pixels), backbones["clip"](pixels)) == 0


@pytest.mark.parametrize("label", ALL)
def test_missing_and_foreign_tensors(label: str, folders: dict[str, Path], tmp_path: Path) -> None:
    names = load_file(folders[label] / "model.safetensors").keys()
    block = next(
        name
        for name in names
        if "layer" in name and name.endswith("weight") and ".1." in name and not name.startswith(("text", "decoder"))
    )
    if "mask_decoder" in block:
        block = "vision_encoder.layers.1.attn.qkv.weight"
    without = rewritten(
        folders[label], tmp_path / "without", lambda tensors: {k: v for k, v in tensors.items() if k != block}
    )
    with pytest.raises(WeightsError, match=f"does not fit the model: tensors 1 missing .{block}"):
        load(describe(f"hf:{without}"))
    foreign = block.replace("weight", "lora")
    more = rewritten(folders[label], tmp_path / "more", lambda tensors: {**tensors, foreign: torch.zeros(2)})
    with pytest.raises(WeightsError, match=f"does not fit the model: tensors 1 left over .{foreign}"):
        load(describe(f"hf:{more}"))


def test_unknown_types_are_still_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(UnknownNameError, match=r"model_type = 'siglip'; supported: .*clip_vision_model"):
        describe(f"hf:{tmp_path}")


# timm's files


def as_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of ViTModel under timm's names, with timm's head."""
    renamed = {
        "cls_token": tensors["embeddings.cls_token"],
        "pos_embed": tensors["embeddings.position_embeddings"],
        "patch_embed.proj.weight": tensors["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": tensors["layernorm.weight"],
        "norm.bias": tensors["layernorm.bias"],
        "head.weight": torch.ones(5, 32),
        "head.bias": torch.ones(5),
    }
    for block in range(3):
        old, new = f"encoder.layer.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            attention = [tensors[f"{old}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            renamed |= {
                f"{new}.attn.qkv.{kind}": torch.cat(attention),
                f"{new}.attn.proj.{kind}": tensors[f"{old}.attention.output.dense.{kind}"],
                f"{new}.norm1.{kind}": tensors[f"{old}.layernorm_before.{kind}"],
                f"{new}.norm2.{kind}": tensors[f"{old}.layernorm_after.{kind}"],
                f"{new}.mlp.fc1.{kind}": tensors[f"{old}.intermediate.dense.{kind}"],
                f"{new}.mlp.fc2.{kind}": tensors[f"{old}.output.dense.{kind}"],
            }
    return renamed


def test_timm_files(folders: dict[str, Path], backbones: dict[str, Backbone], tmp_path: Path) -> None:
    mirror = load(describe(f"hf:{rewritten(folders['vit'], tmp_path / 'timm', as_timm)}"))
    for rows, columns in ((3, 3), (2, 5)):
        pixels = images(mirror, rows, columns)
        assert largest_difference(mirror(pixels), backbones["vit"](pixels)) == 0


def test_random_weights_of_a_release() -> None:
    backbone = load(describe("vit-base", random_weights=0))
    tokens = backbone(images(backbone, 2, 3, count=3))
    assert bool(torch.isfinite(tokens.patches).all())
    assert float(tokens.cls.std(0).mean()) > 0.05
    assert float(tokens.patches.std(1).mean()) > 0.05
