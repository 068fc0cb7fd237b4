"""The networks of `pathology`: transformers' DINOv2 as trunk, and heads that make `cls` of all its tokens.

The final norm belongs to the head here, so that the head makes of any block's output what it makes of the last one's.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from featstore.backbones.architecture import Architecture, VisionTransformer
from featstore.errors import ConfigError

POOL_HEADS = 8  # CONCH's own setting


def build_trunk(architecture: Architecture, *, layer_scale: bool = True) -> Any:
    """Transformers' DINOv2 with 0 registers, of the trunk's width."""
    import transformers

    assert isinstance(architecture, VisionTransformer)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=architecture.patch_width,
        num_hidden_layers=architecture.depth,
        num_attention_heads=architecture.num_heads,
        mlp_ratio=architecture.mlp_dim // architecture.patch_width,
        image_size=architecture.native_size,
        patch_size=architecture.patch_size,
        layer_norm_eps=architecture.norm_eps,
        num_register_tokens=0,
    )
    network = transformers.Dinov2WithRegistersModel(config)
    del network.embeddings.mask_token  # for training, and not in these files
    if not layer_scale:
        for layer in network.encoder.layer:
            layer.layer_scale1 = layer.layer_scale2 = nn.Identity()
    return network


class _WithHead(nn.Module):
    """A trunk up to its last block, and a head."""

    def __init__(self, trunk: Any, head: nn.Module) -> None:
        super().__init__()
        trunk.layernorm = nn.Identity()
        self.trunk, self.head = trunk, head

    def set_attn_implementation(self, name: str) -> None:
        """Choose the attention kernel of the trunk."""
        self.trunk.set_attn_implementation(name)

    def forward(self, pixels: Float[Tensor, "_ 3 H W"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B P E"]]:
        """(cls, patches) of normalised images; behind kept activations there are more rows than the one blank image."""
        cls, patches = self.head(self.trunk(pixels).last_hidden_state)
        return cls, patches


class ProjectedToken(nn.Module):
    """The final norm; `cls` is the CLS token times a matrix."""

    def __init__(self, width: int, out: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.projection = nn.Linear(width, out, bias=False)

    def forward(self, sequence: Float[Tensor, "B N E"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B P E"]]:
        """(cls, patches) of a block's output."""
        tokens = self.norm(sequence)
        return self.projection(tokens[:, 0]), tokens[:, 1:]


class AttentionPool(nn.Module):
    """One learned query that attends to all tokens; with projections from their width to its own."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, out))
        self.query_norm = nn.LayerNorm(out)
        self.context_norm = nn.LayerNorm(width)
        self.query_projection = nn.Linear(out, out)
        self.key_projection = nn.Linear(width, out)
        self.value_projection = nn.Linear(width, out)
        self.output = nn.Linear(out, out)

    def forward(self, tokens: Float[Tensor, "B N E"]) -> Float[Tensor, "B D"]:
        """The query's answer."""
        context = self.context_norm(tokens)
        query = self.query_projection(self.query_norm(self.query)).expand(len(tokens), 1, -1)  # (B, 1, D)
        heads = (
            part.unflatten(-1, (POOL_HEADS, -1)).transpose(1, 2)  # (B, heads, 1 or N, D / heads)
            for part in (query, self.key_projection(context), self.value_projection(context))
        )
        answer: Tensor = functional.scaled_dot_product_attention(*heads)
        pooled: Tensor = self.output(answer.transpose(1, 2).flatten(2)[:, 0])
        return pooled


class PooledTokens(nn.Module):
    """The final norm; `cls` is what the attention pool makes of all tokens, normed once more."""

    def __init__(self, width: int, out: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.pool = AttentionPool(width, out)
        self.pooled_norm = nn.LayerNorm(out)

    def forward(self, sequence: Float[Tensor, "B N E"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B P E"]]:
        """(cls, patches) of a block's output."""
        tokens = self.norm(sequence)
        return self.pooled_norm(self.pool(tokens)), tokens[:, 1:]


def _with_head(architecture: Architecture, head: type[ProjectedToken] | type[PooledTokens]) -> nn.Module:
    assert isinstance(architecture, VisionTransformer)
    if not architecture.final_norm:
        raise ConfigError(
            f"--norm none: {architecture.family} makes cls of its tokens after the final norm; leave --norm out"
        )
    trunk = build_trunk(architecture, layer_scale=False)
    return _WithHead(trunk, head(architecture.patch_width, architecture.embed_dim, architecture.norm_eps))


def build_projected(architecture: Architecture) -> nn.Module:
    """BiomedCLIP's image tower.

    Raises:
        ConfigError: tokens before the final norm.
    """
    return _with_head(architecture, ProjectedToken)


def build_pooled(architecture: Architecture) -> nn.Module:
    """CONCH's image tower up to the pooled vector.

    Raises:
        ConfigError: tokens before the final norm.
    """
    return _with_head(architecture, PooledTokens)
