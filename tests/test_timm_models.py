"""`timm:NAME` with a module of timm's documented interface that stands in for it; `timm_parity.py` runs the real one.

The stand-in has networks of the kinds there are: tokens with and without a class token, maps with channels first and
last, and some that cannot be a backbone.
"""

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_conformance import CHECKS, images
from safetensors.torch import save_file
from torch import Tensor, nn

from featstore.backbones import describe
from featstore.backbones.timm_models import FAMILY
from featstore.errors import ConfigError, MissingWeightsError, UnknownNameError, WeightsError

SIZE, WIDTH = 32, 12
LAYERED = ("check_layers_end_in_final_tokens",)  # timm's networks keep no inner layers


def check_size(pixels: Tensor) -> None:
    """As timm's networks for one size do it."""
    if pixels.shape[2:] != (SIZE, SIZE):
        raise AssertionError("size doesn't match model")


class VitLike(nn.Module):
    """Class token, two registers, then patches of 8 pixels; positions resized when made for any size."""

    num_prefix_tokens = 3

    def __init__(self, num_classes: int = 7, dynamic_img_size: bool = False) -> None:
        super().__init__()
        self.dynamic = dynamic_img_size
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.reg_token = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, WIDTH, SIZE // 8, SIZE // 8))
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes) if num_classes else nn.Identity()

    def forward_features(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels)
        if not self.dynamic:
            check_size(pixels)
        positions = nn.functional.interpolate(self.pos_embed, size=patches.shape[2:], mode="bilinear")
        patches = (patches + positions).flatten(2).mT
        first = torch.cat([self.cls_token, self.reg_token], dim=1).expand(len(pixels), -1, -1)
        tokens = torch.cat([first, patches], dim=1)
        mixed: Tensor = self.norm(tokens + self.attn(tokens, tokens, tokens, need_weights=False)[0])
        return mixed

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features[:, 0]


class FixedLike(VitLike):
    """Tokens without any prefix, pooled by the head, for one size."""

    num_prefix_tokens = 0

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__(num_classes)
        self.cls_token = self.reg_token = None  # type: ignore[assignment]

    def forward_features(self, pixels: Tensor) -> Tensor:
        check_size(pixels)
        tokens: Tensor = self.norm((self.patch_embed(pixels) + self.pos_embed).flatten(2).mT)
        return tokens

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features.mean(dim=1)


class ConvLike(nn.Module):
    """A map of half the pooled width with stride 4, batch norm with its statistics, and a pooled vector."""

    last = False

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 2, 2)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 2, 2)
        self.expand = nn.Linear(6, WIDTH)
        self.fc = nn.Linear(WIDTH, num_classes) if num_classes else nn.Identity()

    def forward_features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.conv2(torch.relu(self.bn1(self.conv1(pixels))))
        return features.permute(0, 2, 3, 1) if self.last else features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled: Tensor = self.expand(features.mean(dim=(1, 2) if self.last else (2, 3)))
        return pooled if pre_logits else self.fc(pooled)


class LastLike(ConvLike):
    """The same with channels last."""

    last = True
    output_fmt = "NHWC"


class ListLike(ConvLike):
    """Several maps at once."""

    def forward_features(self, pixels: Tensor) -> Any:
        return [super().forward_features(pixels)]


class UnpooledLike(ConvLike):
    """A head that pools nothing."""

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features


class CeilLike(ConvLike):
    """A map whose positions are no whole patches."""

    def forward_features(self, pixels: Tensor) -> Tensor:
        return super().forward_features(pixels)[..., 1:, 1:]


NETWORKS: dict[str, type[nn.Module]] = {
    "vit_like": VitLike,
    "fixed_like": FixedLike,
    "conv_like": ConvLike,
    "last_like": LastLike,
    "list_like": ListLike,
    "unpooled_like": UnpooledLike,
    "ceil_like": CeilLike,
    "gray_like": ConvLike,
}
GOOD = ("vit_like", "conv_like", "last_like")


def create_model(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    assert not pretrained
    architecture, _, tag = name.partition(".")
    if tag not in ("", "ours"):
        raise RuntimeError(f"Invalid pretrained tag ({tag}) for {architecture}.")
    network: Any = NETWORKS[architecture](**arguments)
    network.pretrained_cfg = {
        "architecture": architecture,
        "tag": "ours",
        "input_size": (1 if architecture == "gray_like" else 3, SIZE, SIZE),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.3, 0.4),
    }
    return network  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def fake_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in in the place of timm."""
    fake: Any = types.ModuleType("timm")
    fake.__spec__ = importlib.machinery.ModuleSpec("timm", None)
    fake.__version__ = "1.0.31"
    fake.create_model = create_model
    fake.is_model = lambda name: name.partition(".")[0] in NETWORKS
    fake.list_models = lambda: list(NETWORKS)
    monkeypatch.setitem(sys.modules, "timm", fake)


def network_with_numbers(name: str) -> Any:
    """A network of the stand-in with its classifier, numbers in everything, and its tensors."""
    torch.manual_seed(0)
    network: Any = create_model(name).eval()
    if name in ("conv_like", "last_like"):
        network.bn1.running_mean.uniform_(-1, 1)
        network.bn1.running_var.uniform_(1, 2)
    return network


def save_folder(folder: Path, name: str, **config: Any) -> Path:
    """Weights and `config.json` as the hub's folders of timm have them."""
    folder.mkdir(parents=True)
    save_file(dict(network_with_numbers(name).state_dict()), folder / "model.safetensors")
    values = {"architecture": name, "num_classes": 7, "pretrained_cfg": {"tag": "ours"}, **config}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def load(model: str, **arguments: Any) -> Any:
    return describe(model, **arguments).load(device="cpu", compute_dtype="float32")


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("size", [(SIZE, SIZE), (16, 40), (48, 8)], ids=["native", "wide", "tall"])
def test_tokens_equal_the_networks_own(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    backbone = load(f"timm:{name}", weights=save_folder(tmp_path / "w", name))
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    network = network_with_numbers(name)
    network.dynamic = True
    found = backbone(pixels)
    with torch.no_grad():
        features = network.forward_features(pixels)
        pooled = network.forward_head(features, pre_logits=True)
    if name == "vit_like":
        assert torch.equal(found.registers, features[:, 1:3])
        patches = features[:, 3:]
    else:
        assert found.registers.shape == (2, 0, WIDTH)
        patches = features.flatten(1, 2) if name == "last_like" else features.flatten(2).mT
    assert torch.equal(found.cls, pooled)
    assert torch.equal(found.patches, patches)


@pytest.mark.parametrize("name", ["vit_like", "vit_like.ours"])
@pytest.mark.parametrize(
    "check", [c for c in CHECKS if c.__name__ not in (*LAYERED, "check_layer_must_exist")], ids=lambda c: c.__name__
)
def test_conformance(check: Callable[[Any], None], name: str) -> None:
    check(load(f"timm:{name}", random_weights=0))


def test_facts_are_measured() -> None:
    facts = describe("timm:conv_like", random_weights=0).architecture
    assert (facts.family, facts.variant, facts.depth, facts.num_registers) == ("timm", "conv_like", 0, 0)
    assert (facts.embed_dim, facts.patch_width, facts.patch_size, facts.native_size) == (WIDTH, 6, 4, SIZE)
    assert (facts.mean, facts.std) == ((0.5, 0.5, 0.5), (0.2, 0.3, 0.4))
    assert facts.summary == "pool"
    assert not facts.fixed_size
    convolutions, norm, linear = 6 * 3 * 4 + 6 + 6 * 6 * 4 + 6, 12, 6 * WIDTH + WIDTH
    assert facts.num_parameters() == convolutions + norm + linear
    flops = 2 * (16 * 16 * 6 * 3 * 4 + 8 * 8 * 6 * 6 * 4 + 6 * WIDTH)
    assert facts.gflops(SIZE, SIZE) == pytest.approx(flops / 1e9)
    facts = describe("timm:vit_like", random_weights=0).architecture
    assert (facts.embed_dim, facts.patch_dim, facts.num_registers, facts.patch_size) == (WIDTH, None, 2, 8)
    assert facts.summary == "token"


def test_config_beside_the_weights_counts(tmp_path: Path) -> None:
    stated = {"mean": [0.1, 0.2, 0.3], "std": [0.9, 0.8, 0.7], "input_size": [3, 64, 64]}
    folder = save_folder(tmp_path / "w", "conv_like", pretrained_cfg=stated)
    source = describe("timm:conv_like", weights=folder)
    assert source.architecture.mean == (0.1, 0.2, 0.3)
    assert source.architecture.std == (0.9, 0.8, 0.7)
    assert source.architecture.native_size == 64
    assert source.name == "conv_like"
    assert describe("timm:conv_like", weights=folder / "model.safetensors").architecture.native_size == SIZE


def test_network_for_one_size(tmp_path: Path) -> None:
    backbone = load("timm:fixed_like", weights=save_folder(tmp_path / "w", "fixed_like"))
    assert backbone.architecture.fixed_size
    pixels = images(backbone, 4, 4)
    network = network_with_numbers("fixed_like")
    assert torch.equal(backbone(pixels).cls, network.forward_features(pixels).mean(dim=1))
    with pytest.raises(ConfigError, match="timm takes images of 32 x 32 pixels only, not 64 x 32"):
        backbone(images(backbone, 8, 4))


def test_size_that_the_network_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load("timm:vit_like", random_weights=0)
    backbone.network.dynamic = False
    with pytest.raises(
        ConfigError,
        match=r"timm:vit_like does not take images of 8 x 16 pixels \(size doesn't match model\); its own .* 32 x 32",
    ):
        backbone(images(backbone, 1, 2))
    monkeypatch.setattr(backbone.network, "forward_features", lambda pixels: torch.zeros(2, 7, WIDTH))
    with pytest.raises(ConfigError, match="it gives 4 patch tokens, not 1 x 2"):
        backbone(images(backbone, 1, 2))


def test_random_weights_are_named() -> None:
    source = describe("timm:vit_like", random_weights=3)
    assert source.name == "vit_like-random"
    other = describe("timm:conv_like", random_weights=3)
    assert source.identity["weights"] != other.identity["weights"]
    first, again = load("timm:vit_like", random_weights=3), load("timm:vit_like", random_weights=3)
    pixels = images(first, 2, 2)
    assert torch.equal(first(pixels).cls, again(pixels).cls)
    assert FAMILY.hub_key("blocks.0.attn.qkv.weight").name == "blocks.0.attn.qkv.weight"


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("timm:list_like", "timm:list_like gives list as features, not tokens or a map; give module:function"),
        ("timm:unpooled_like", "timm:unpooled_like pools no one vector per image"),
        ("timm:ceil_like", "gives 49 patch tokens for 32 x 32 pixels, which is no grid of whole patches"),
        ("timm:gray_like", "timm:gray_like takes images of 1 x 32 x 32, not square RGB images"),
    ],
)
def test_network_that_is_no_backbone(model: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        describe(model, random_weights=0)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (
            "timm:vit_liek",
            r"timm 1.0.31 has no model 'vit_liek'; did you mean vit_like.*timm.list_models\(\) lists all",
        ),
        ("timm:zzzz", r"timm 1.0.31 has no model 'zzzz'; timm.list_models\(\) lists all"),
        ("timm:hf-hub:owner/vit_like", "has no model 'hf-hub:owner/vit_like'"),
        ("timm:vit_like.theirs", r"has no model 'vit_like.theirs': Invalid pretrained tag \(theirs\) for vit_like"),
    ],
)
def test_unknown_model(model: str, match: str) -> None:
    with pytest.raises(UnknownNameError, match=match):
        describe(model, random_weights=0)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"architecture": "vit_like"}, "architecture = 'vit_like', not 'conv_like'; give timm:vit_like if it is that"),
        ({"architecture": None}, "architecture = None, not 'conv_like'; give timm:NAME if it is that"),
        ({"model_args": {"depth": 3}}, r"model_args = \{'depth': 3\}, another network than timm's conv_like"),
        ({"pretrained_cfg": 3}, "pretrained_cfg = 3; it must be an object"),
        ({"pretrained_cfg": {"mean": [1, 2]}}, r"timm's configuration says mean = \[1, 2\]; it must be three numbers"),
    ],
)
def test_folder_of_another_kind(config: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=match):
        describe("timm:conv_like", weights=save_folder(tmp_path / "w", "conv_like", **config))


def test_weights_of_another_network(tmp_path: Path) -> None:
    file = save_folder(tmp_path / "w", "vit_like") / "model.safetensors"
    with pytest.raises(WeightsError, match=r"does not fit the model: tensors \d+ missing \(bn1.bias"):
        load("timm:conv_like", weights=file)


def test_weights_that_are_not_here() -> None:
    with pytest.raises(MissingWeightsError, match=r"no weights from timm/vit_like\.ours: not in this machine's cache"):
        describe("timm:vit_like")


def test_weights_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_folder(tmp_path / ("0" * 40), "vit_like")
    asked: list[Any] = []

    def fetch_folder(*arguments: Any, model: str) -> Path:
        asked.append((*arguments, model))
        return folder

    monkeypatch.setattr("featstore.backbones.timm_models.fetch", fetch_folder)
    source = describe("timm:vit_like", revision="main")
    assert asked == [("timm/vit_like.ours", "main", "timm:vit_like.ours")]
    assert source.name == "vit_like.ours"
    assert source.weights["repo"] == "timm/vit_like.ours"
    assert source.weights["revision"] == "0" * 40
    backbone = source.load(device="cpu", compute_dtype="float32")
    pixels = images(backbone, 4, 4)
    with torch.no_grad():
        assert torch.equal(backbone(pixels).cls, network_with_numbers("vit_like").forward_features(pixels)[:, 0])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"norm": "none"}, "--norm none: timm has no final norm over tokens"),
        ({"pos_interp": "meta"}, "--pos-interp meta"),
    ],
)
def test_options_that_make_no_difference(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        describe("timm:vit_like", random_weights=0, **arguments)


def test_options_at_loading() -> None:
    source = describe("timm:vit_like", random_weights=0)
    with pytest.raises(ConfigError, match=r"--attention eager: timm .*leave --attention out"):
        source.load(device="cpu", compute_dtype="float32", attention="eager")
    backbone = source.load(device="cpu", compute_dtype="float32")
    with pytest.raises(ConfigError, match="layer 1: timm has no inner layers to keep"):
        backbone(images(backbone, 1, 1), layers=(1,))


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"timm, which is not installed; .*pip install 'featstore\[timm\]'"):
        describe("timm:vit_like", random_weights=0)


def test_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n", encoding="utf-8"
    )
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ConfigError,
        match=r"cannot be imported: operator torchvision::nms does not exist. It needs a torchvision made for this .*"
        r"breaks transformers too",
    ):
        describe("timm:vit_like", random_weights=0)


@pytest.mark.slow
def test_parity_with_timm_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "timm")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    script = Path(__file__).with_name("timm_parity.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) >= 12
    assert max(line[part] for line in lines for part in ("cls", "patches")) <= 1e-5
