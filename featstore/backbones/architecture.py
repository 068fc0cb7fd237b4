"""Facts about a backbone that need neither torch nor transformers: widths, token counts, FLOPs, bytes.

They are part of a set's identity, so `ls`, `info` and a second `extract` never load a network.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from featstore.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What came later is stated where it is not the default, so that sets made before keep their fingerprint.
LATER: dict[str, Any] = {"patch_dim": None, "final_norm": True, "fixed_size": False, "summary": "token", "variant": ""}


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A network as the store sees it; with the weights' bytes it determines every output.

    `family` names the network's code; `embed_dim` is the width of `cls`, `patch_dim` that of the patches where it is
    another one; `depth` the number of blocks whose tokens can be kept (0: none); `patch_size` the pixels of one patch,
    or the stride of a network of convolutions; `native_size` the training image size in pixels, the only possible one
    where `fixed_size`. `summary` tells what `cls` is: a token of the network's own, or what it pools from the patches.
    `final_norm`: tokens are taken after the network's last norm, else before it. `variant` tells apart networks of one
    family that no other fact does. `counts` are (parameters, GFLOP of one image at the native size), for networks whose
    facts do not tell them; they are no part of identity.
    """

    family: str
    embed_dim: int
    depth: int
    patch_size: int
    num_registers: int
    native_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    patch_dim: int | None = None
    final_norm: bool = True
    fixed_size: bool = False
    summary: Literal["token", "pool"] = "token"
    variant: str = ""
    counts: tuple[int, float] = (0, 0.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, as they stand in `spec.json`."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if key != "counts" and not (key in LATER and value == LATER[key])
        }

    @property
    def patch_width(self) -> int:
        """Width of one patch token."""
        return self.patch_dim or self.embed_dim

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches along (height, width) of an image in pixels."""
        return height // self.patch_size, width // self.patch_size

    def check_size(self, height: int, width: int) -> None:
        """Raise `ConfigError` unless patches cover the image exactly: the network would crop the rest silently."""
        patch = self.patch_size
        if self.fixed_size and (height, width) != (self.native_size, self.native_size):
            raise ConfigError(
                f"{self.family} takes images of {self.native_size} x {self.native_size} pixels only, "
                f"not {height} x {width}; leave --res out"
            )
        if height < patch or width < patch or height % patch or width % patch:
            fits = " or ".join(
                f"{rows * patch} x {columns * patch}"
                for rows, columns in dict.fromkeys(
                    (max(1, height // patch + up), max(1, width // patch + up)) for up in (0, 1)
                )
            )
            raise ConfigError(
                f"height and width must be multiples of the patch size {patch}; {height} x {width} is not: use {fits}"
            )

    def check_window(self, window: tuple[int, int], height: int, width: int) -> None:
        """Raise `ConfigError` unless windows of (size, stride) pixels lie on the patch grid and an image holds one."""
        size, stride = window
        patch = self.patch_size
        if size % patch or stride % patch:
            near = max(patch, size // patch * patch)
            raise ConfigError(
                f"--window {size}/{stride}: size and stride must be multiples of the patch size {patch}; "
                f"for example {near}/{max(patch, min(near, stride // patch * patch))}"
            )
        self.check_size(size, size)
        if min(height, width) < size:
            raise ConfigError(f"--window {size}: images of {height}x{width} are smaller than one window; leave it out")
        if height % patch or width % patch:
            replace(self, fixed_size=False).check_size(height, width)

    def block_numbers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Block numbers 1..depth for `layers`, where -1 is the last block; each once, in the order asked.

        Raises:
            ConfigError: a layer lies outside 1..depth and -depth..-1.
        """
        for layer in layers:
            if not 1 <= abs(layer) <= self.depth:
                raise ConfigError(
                    f"layer {layer} does not exist: blocks are numbered 1 to {self.depth}, "
                    f"or -{self.depth} to -1 from the end"
                    if self.depth
                    else f"layer {layer}: {self.family} has no inner layers to keep; leave --layers out"
                )
        return tuple(dict.fromkeys(layer if layer > 0 else self.depth + 1 + layer for layer in layers))

    def num_tokens(self, height: int, width: int) -> int:
        """CLS + registers + patches."""
        rows, columns = self.grid(height, width)
        return 1 + self.num_registers + rows * columns

    def num_parameters(self) -> int:
        """Every number in the weights that training changed; 0 where it is not known."""
        return self.counts[0]

    def gflops(self, height: int, width: int) -> float:
        """GFLOP of one forward pass per image: 2 per multiply-add; convolutions grow with the area."""
        return self.counts[1] * height * width / self.native_size**2


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionTransformer(Architecture):
    """A plain vision transformer.

    `mlp_dim` is the hidden width of the feed-forward part; `qkv_bias` tells which of query, key and value have a bias;
    `rope_theta` is the base of rotary positions, None where positions are a learned table.
    """

    num_heads: int
    mlp: Literal["gelu", "swiglu", "quick_gelu"]
    mlp_dim: int
    norm_eps: float = 1e-6
    qkv_bias: tuple[bool, bool, bool] = (True, True, True)
    rope_theta: float | None = None

    def num_parameters(self) -> int:
        """Every number in the weights of a DINO network, the mask token included, or what `counts` says."""
        if self.counts[0]:
            return self.counts[0]
        dim = self.embed_dim
        biases = sum(self.qkv_bias) * dim + dim
        if self.mlp == "swiglu":
            feed_forward = 3 * dim * self.mlp_dim + 2 * self.mlp_dim + dim
        else:
            feed_forward = 2 * dim * self.mlp_dim + self.mlp_dim + dim
        norms_and_scales = 6 * dim
        block = 4 * dim**2 + biases + feed_forward + norms_and_scales
        positions = 0 if self.rope_theta is not None else (self.native_size // self.patch_size) ** 2 + 1
        single_tokens = 2 + self.num_registers  # CLS, mask
        patch_projection = 3 * self.patch_size**2 * dim + dim
        return self.depth * block + patch_projection + (positions + single_tokens) * dim + 2 * dim

    def gflops(self, height: int, width: int) -> float:
        """GFLOP of one forward pass per image: 2 per multiply-add, attention included."""
        tokens = self.num_tokens(height, width)
        rows, columns = self.grid(height, width)
        width_of = self.patch_width  # of the trunk; a head may project `cls` to another one
        mlp_matrices = 3 if self.mlp == "swiglu" else 2
        linear = 4 * width_of**2 + mlp_matrices * width_of * self.mlp_dim
        attention = 2 * tokens * width_of
        patch_projection = rows * columns * 3 * self.patch_size**2 * width_of
        return 2e-9 * (self.depth * tokens * (linear + attention) + patch_projection)
