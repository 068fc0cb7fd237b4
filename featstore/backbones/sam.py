"""Segment Anything's image encoder: tokens of its last block, without the neck.

Source: Kirillov et al. 2023 (SAM), Li et al. 2022 (ViTDet: windows, relative positions); sizes as in the releases' own
`config.json`. It has no CLS token: the vector of an image is the mean of its patches, as Baharoon et al. take it. Its
position tables fit one image size. It chooses its attention by classes of its own, into which no other kernel goes, and
the bias of relative positions is as large as the attention matrix: 1 GB an image in float32 at 1024.
"""

from dataclasses import dataclass, replace
from typing import Any

from featstore.backbones.architecture import Architecture, VisionTransformer
from featstore.backbones.family import ConfigFields, Dialect, Family, HubKey, KeyBias, Release
from featstore.errors import WeightsError

# The defaults of transformers' own configuration class, for fields that a config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 1024,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "mlp_ratio": 4.0,
    "mlp_dim": None,
    "use_abs_pos": True,
    "use_rel_pos": True,
    "window_size": 14,
    "global_attn_indexes": [2, 5, 8, 11],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowedTransformer(VisionTransformer):
    """A vision transformer whose blocks look at windows of `window_size` x `window_size` patches.

    But for `global_blocks`, counted from 0, which look at the whole image.
    """

    window_size: int
    global_blocks: tuple[int, ...]

    def num_parameters(self) -> int:
        """Every number in the weights of the encoder, the neck left out."""
        dim, side = self.embed_dim, self.native_size // self.patch_size
        attention = 4 * dim**2 + (sum(self.qkv_bias) + 1) * dim
        feed_forward = 2 * dim * self.mlp_dim + self.mlp_dim + dim
        norms = 4 * dim
        reaches = [side if block in self.global_blocks else self.window_size for block in range(self.depth)]
        relative_positions = sum(2 * (2 * reach - 1) * (dim // self.num_heads) for reach in reaches)
        patch_projection = 3 * self.patch_size**2 * dim + dim
        return self.depth * (attention + feed_forward + norms) + relative_positions + patch_projection + side**2 * dim

    def gflops(self, height: int, width: int) -> float:
        """GFLOP of one forward pass per image: 2 per multiply-add, windows with their padding, relative positions."""
        (rows, columns), dim, window = self.grid(height, width), self.embed_dim, self.window_size
        products = rows * columns * 3 * self.patch_size**2 * dim
        for block in range(self.depth):
            tokens, seen = rows * columns, rows * columns
            sides = rows + columns
            if block not in self.global_blocks:
                tokens = -(-rows // window) * -(-columns // window) * window**2  # windows over the edge are padded
                seen, sides = window**2, 2 * window
            products += tokens * (4 * dim**2 + 2 * seen * dim + sides * dim)
            products += rows * columns * 2 * dim * self.mlp_dim
        return 2e-9 * products


def tower_config(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the image encoder, from its own `config.json` or from that of the whole model."""
    if config.get("model_type") != "sam":
        return config
    tower = config.get("vision_config") or {}
    if not isinstance(tower, dict):
        raise WeightsError("config.json says vision_config is no object; it must hold the image encoder's fields")
    return tower


def _global_blocks(value: Any, depth: int) -> tuple[int, ...]:
    whole = isinstance(value, list | tuple) and all(type(block) is int and block >= 0 for block in value)
    if not whole:
        raise WeightsError(
            f"config.json says global_attn_indexes = {value!r}; it must be a list of block numbers from 0"
        )
    return tuple(sorted({block for block in value if block < depth}))


def _read(config: dict[str, Any]) -> WindowedTransformer:
    fields = ConfigFields(tower_config(config), DEFAULTS)
    for field, supported in (("num_channels", 3), ("hidden_act", "gelu"), ("use_abs_pos", True), ("use_rel_pos", True)):
        fields.require(field, supported)
    embed_dim, depth = fields.integer("hidden_size"), fields.integer("num_hidden_layers")
    if fields.values["mlp_dim"] is None:
        fields.values["mlp_dim"] = int(embed_dim * fields.number("mlp_ratio"))
    return WindowedTransformer(
        family="sam_vision_model",
        embed_dim=embed_dim,
        depth=depth,
        num_heads=fields.integer("num_attention_heads"),
        patch_size=fields.integer("patch_size"),
        num_registers=0,
        mlp="gelu",
        mlp_dim=fields.integer("mlp_dim"),
        native_size=fields.integer("image_size"),
        norm_eps=fields.number("layer_norm_eps"),
        qkv_bias=(fields.flag("qkv_bias"),) * 3,
        final_norm=False,
        fixed_size=True,
        summary="pool",
        window_size=fields.integer("window_size"),
        global_blocks=_global_blocks(fields.values["global_attn_indexes"], depth),
    )


def _write(architecture: Architecture) -> dict[str, Any]:
    assert isinstance(architecture, WindowedTransformer)
    return {
        "hidden_size": architecture.embed_dim,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.num_heads,
        "num_channels": 3,
        "image_size": architecture.native_size,
        "patch_size": architecture.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": architecture.norm_eps,
        "qkv_bias": architecture.qkv_bias[0],
        "mlp_dim": architecture.mlp_dim,
        "use_abs_pos": True,
        "use_rel_pos": True,
        "window_size": architecture.window_size,
        "global_attn_indexes": list(architecture.global_blocks),
    }


def build(architecture: Architecture) -> Any:
    """The encoder of transformers, its neck off; `set_attn_implementation` changes the kernel that runs.

    In transformers it changes only the configuration of this network, whose blocks took their attention when built.
    """
    from torch import nn
    from transformers import SamVisionConfig, SamVisionModel
    from transformers.models.sam.modeling_sam import SAM_VISION_ATTENTION_CLASSES

    model: Any = SamVisionModel

    class Encoder(model):  # type: ignore[misc]
        def set_attn_implementation(self, name: str) -> None:
            super().set_attn_implementation(name)
            for layer in self.vision_encoder.layers:
                layer.attn.__class__ = SAM_VISION_ATTENTION_CLASSES[name]

    network = Encoder(SamVisionConfig(**_write(architecture)))
    network.vision_encoder.neck = nn.Identity()
    return network


def _split(sequence: Any, architecture: Architecture) -> tuple[Any, Any, Any]:
    patches = sequence.flatten(1, 2)  # (B, rows, columns, D) -> (B, P, D)
    return patches.mean(dim=1), patches[:, :0], patches


def _no_norm(norm: Any, sequence: Any) -> Any:
    return sequence


HUB = Dialect(
    name="hub",
    key=lambda live: HubKey(live.removeprefix("vision_encoder.")),
    prefixes=("vision_encoder.", ""),
    ignored=(r"neck\.",),
    outside=(r"mask_decoder\.", r"prompt_encoder\.", r"shared_image_embedding\."),
)

FAMILY = Family(
    model_type="sam_vision_model",
    build="featstore.backbones.sam:build",
    read=_read,
    write=_write,
    blocks="vision_encoder.layers",
    finish=_no_norm,
    split=_split,
    dialects=(HUB,),
    attention=("sdpa", "eager"),
    key_biases=(KeyBias(r".*\.qkv\.bias", 1, 3),),  # relative positions meet the query alone
)

LARGE = Release(
    architecture=replace(
        _read({}),
        embed_dim=1024,
        depth=24,
        num_heads=16,
        mlp_dim=4096,
        global_blocks=(5, 11, 17, 23),
    ),
    hub_id="facebook/sam-vit-large",
    licence="Apache-2.0",
    pretraining=("ImageNet-1k", "SA-1B"),
    feature="mean of the 64 x 64 patch tokens of the last block, neck off, as Baharoon et al. take it",
)
