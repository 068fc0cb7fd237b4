"""Facts about a backbone that need neither torch nor transformers: widths, token counts, FLOPs, bytes.

They are part of a set's identity, so `ls`, `info` and a second `extract` never load a network.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from featstore.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A vision transformer as the store sees it; with the weights' bytes it determines every output.

    `family` is the model type of the hub's `config.json`; `native_size` the training image size in pixels; `mlp_dim`
    the hidden width of the feed-forward part; `qkv_bias` tells which of query, key and value have a bias; `rope_theta`
    is the base of rotary positions, None where positions are a learned table.
    """

    family: str
    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    num_registers: int
    mlp: Literal["gelu", "swiglu"]
    mlp_dim: int
    native_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    norm_eps: float = 1e-6
    qkv_bias: tuple[bool, bool, bool] = (True, True, True)
    rope_theta: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, as they stand in `spec.json`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches along (height, width) of an image in pixels."""
        return height // self.patch_size, width // self.patch_size

    def check_size(self, height: int, width: int) -> None:
        """Raise `ConfigError` unless patches cover the image exactly: the network would crop the rest silently."""
        patch = self.patch_size
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
                )
        return tuple(dict.fromkeys(layer if layer > 0 else self.depth + 1 + layer for layer in layers))

    def num_tokens(self, height: int, width: int) -> int:
        """CLS + registers + patches."""
        rows, columns = self.grid(height, width)
        return 1 + self.num_registers + rows * columns

    def num_parameters(self) -> int:
        """Every number in the weights, the mask token included."""
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
        mlp_matrices = 3 if self.mlp == "swiglu" else 2
        linear = 4 * self.embed_dim**2 + mlp_matrices * self.embed_dim * self.mlp_dim
        attention = 2 * tokens * self.embed_dim
        patch_projection = rows * columns * 3 * self.patch_size**2 * self.embed_dim
        return 2e-9 * (self.depth * tokens * (linear + attention) + patch_projection)
