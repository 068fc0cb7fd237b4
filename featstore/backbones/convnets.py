"""ResNet, VGG, DenseNet and MobileNetV2 as modules of their own, with torchvision's names for the parameters.

transformers lacks VGG and DenseNet, and torchvision cannot be installed beside every torch; these four give what the
store keeps and no class scores: (vector (B, D), last feature map (B, E, h, w)). They run on sizes that are no multiples
of the stride too, but the store asks for multiples, so that every place of the map stands for one square of the image.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from featstore.backbones.architecture import Architecture

# Images are no part of the check of sizes: behind kept activations the blocks have more rows than the one blank image.
Features = tuple[Float[Tensor, "B D"], Float[Tensor, "B E h w"]]
Maps = Float[Tensor, "B C H W"]
NewMaps = Float[Tensor, "B E h w"]

EXPANSION = 4  # of ResNet's bottlenecks
GROWTH, BOTTLENECK = 32, 4  # DenseNet: channels that a layer adds; its inner width in multiples of that
VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_GRID = 7  # places along a side that its matrices take
TENSORFLOW_EPS = 1e-3  # of MobileNetV2's norms
# Sandler et al. 2018, table 2: expansion, channels, blocks, stride of the first one.
INVERTED = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _numbers(architecture: Architecture) -> tuple[int, ...]:
    return tuple(int(number) for number in architecture.variant.split("-"))


def _pool(feature_map: Maps) -> Features:
    return feature_map.mean((2, 3)), feature_map


class _Bottleneck(nn.Module):
    def __init__(self, before: int, inner: int, stride: int) -> None:
        super().__init__()
        after = EXPANSION * inner
        self.conv1 = nn.Conv2d(before, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.downsample: nn.Module | None = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, maps: Maps) -> NewMaps:
        skip = maps if self.downsample is None else self.downsample(maps)
        maps = F.relu(self.bn1(self.conv1(maps)))
        maps = F.relu(self.bn2(self.conv2(maps)))
        return F.relu(self.bn3(self.conv3(maps)) + skip)


class ResNet(nn.Module):
    """A residual network of bottlenecks, `depths` of them in every stage."""

    def __init__(self, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        before = 64
        for stage, depth in enumerate(depths):
            inner = 64 * 2**stage
            blocks = []
            for block in range(depth):
                blocks.append(_Bottleneck(before, inner, 2 if stage and not block else 1))
                before = EXPANSION * inner
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(depths)

    def forward(self, pixels: Float[Tensor, "_ 3 H W"]) -> Features:
        """(mean of the last map, the map)."""
        maps = F.max_pool2d(F.relu(self.bn1(self.conv1(pixels))), 3, 2, padding=1)
        for stage in range(self.stages):
            maps = self.get_submodule(f"layer{stage + 1}")(maps)
        return _pool(maps)


class VGG(nn.Module):
    """Plain 3 x 3 convolutions, `depths` of them before every halving, and two matrices on a 7 x 7 map."""

    def __init__(self, depths: tuple[int, ...], width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for depth, after in zip(depths, VGG_WIDTHS, strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
                before = after
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.ModuleDict(
            # As a convolution over the whole 7 x 7 map, which is how the hub's file has it; the numbers are the same.
            {"0": nn.Conv2d(before, width, VGG_GRID), "3": nn.Linear(width, width)}
        )

    def forward(self, pixels: Float[Tensor, "_ 3 H W"]) -> Features:
        """(output of the second matrix after its ReLU, the map before it is brought to 7 x 7)."""
        maps = self.features(pixels)
        vector = F.relu(self.classifier["0"](F.adaptive_avg_pool2d(maps, VGG_GRID))).flatten(1)
        return F.relu(self.classifier["3"](vector)), maps


class _DenseLayer(nn.Module):
    def __init__(self, before: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, BOTTLENECK * GROWTH, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(BOTTLENECK * GROWTH)
        self.conv2 = nn.Conv2d(BOTTLENECK * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, maps: Maps) -> NewMaps:
        inner = self.conv1(F.relu(self.norm1(maps)))
        return torch.cat([maps, self.conv2(F.relu(self.norm2(inner)))], dim=1)


class _Transition(nn.Module):
    def __init__(self, before: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(before)
        self.conv = nn.Conv2d(before, before // 2, 1, bias=False)

    def forward(self, maps: Maps) -> NewMaps:
        return F.avg_pool2d(self.conv(F.relu(self.norm(maps))), 2)


class DenseNet(nn.Module):
    """Layers that each see the maps of all earlier ones of their block, `depths` of them in every block."""

    def __init__(self, depths: tuple[int, ...]) -> None:
        super().__init__()
        channels = 2 * GROWTH
        parts: dict[str, nn.Module] = {
            "conv0": nn.Conv2d(3, channels, 7, 2, padding=3, bias=False),
            "norm0": nn.BatchNorm2d(channels),
            "relu0": nn.ReLU(),
            "pool0": nn.MaxPool2d(3, 2, padding=1),
        }
        for block, depth in enumerate(depths, start=1):
            dense = nn.Sequential()
            for layer in range(depth):
                dense.add_module(f"denselayer{layer + 1}", _DenseLayer(channels + layer * GROWTH))
            parts[f"denseblock{block}"] = dense
            channels += depth * GROWTH
            if block < len(depths):
                parts[f"transition{block}"] = _Transition(channels)
                channels //= 2
        parts["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential()
        for name, part in parts.items():
            self.features.add_module(name, part)

    def forward(self, pixels: Float[Tensor, "_ 3 H W"]) -> Features:
        """(mean of the last map, the map after its norm and ReLU)."""
        return _pool(F.relu(self.features(pixels)))


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: at stride 2 an even size is padded at the bottom and right only.

    Source: https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
    """

    def forward(self, input: Maps) -> NewMaps:
        """Padded and convolved."""
        pads: list[int] = []
        for axis in (1, 0):  # the last axis comes first
            size, kernel, stride = input.shape[2 + axis], self.kernel_size[axis], self.stride[axis]
            total = max(kernel - (size % stride or stride), 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads))


def _same(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, nn.Module]:
    norm = nn.BatchNorm2d(after, eps=TENSORFLOW_EPS)
    if stride > 1:
        return SameConv2d(before, after, kernel, stride, groups=groups, bias=False), norm
    return nn.Conv2d(before, after, kernel, padding=kernel // 2, groups=groups, bias=False), norm


class _Inverted(nn.Module):
    def __init__(self, before: int, after: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * before
        layers: list[nn.Module] = []
        if expansion > 1:
            layers.append(nn.Sequential(*_same(before, inner, 1), nn.ReLU6()))
        layers.append(nn.Sequential(*_same(inner, inner, 3, stride, groups=inner), nn.ReLU6()))
        self.conv = nn.Sequential(*layers, *_same(inner, after, 1))
        self.skips = stride == 1 and before == after

    def forward(self, maps: Maps) -> NewMaps:
        inner: Tensor = self.conv(maps)
        return maps + inner if self.skips else inner


class MobileNetV2(nn.Module):
    """Inverted residuals with linear bottlenecks, padded as TensorFlow does it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        before = 32
        layers: list[nn.Module] = [nn.Sequential(*_same(3, before, 3, 2), nn.ReLU6())]
        for expansion, channels, count, stride in INVERTED:
            for block in range(count):
                layers.append(_Inverted(before, channels, expansion, 1 if block else stride))
                before = channels
        layers.append(nn.Sequential(*_same(before, width, 1), nn.ReLU6()))
        self.features = nn.Sequential(*layers)

    def forward(self, pixels: Float[Tensor, "_ 3 H W"]) -> Features:
        """(mean of the last map, the map)."""
        return _pool(self.features(pixels))


def build_resnet(architecture: Architecture) -> nn.Module:
    """A ResNet; `variant` holds its depths, as 3-4-6-3."""
    return ResNet(_numbers(architecture))


def build_vgg(architecture: Architecture) -> nn.Module:
    """A VGG; `variant` holds its depths, as 2-2-4-4-4."""
    return VGG(_numbers(architecture), architecture.embed_dim)


def build_densenet(architecture: Architecture) -> nn.Module:
    """A DenseNet; `variant` holds its depths, as 6-12-48-32."""
    return DenseNet(_numbers(architecture))


def build_mobilenet(architecture: Architecture) -> nn.Module:
    """A MobileNetV2 with the widths of its paper."""
    return MobileNetV2(architecture.embed_dim)
