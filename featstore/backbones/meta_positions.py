"""The position table at other image sizes as Meta's DINOv2 resizes it; transformers resizes it otherwise.

Meta asks for a scale instead of a size: (patches + 0.1) / patches of the table, where the 0.1 once kept a rounding
error from losing a row. The sampling places follow that scale and lie closer together than those of transformers, by
0.1 / (patches + 0.1), so tokens differ at every size but the native one. Releases with registers have no such offset
and sample with antialiasing, as transformers does for them.

Source: Oquab et al. 2023 (DINOv2), `interpolate_pos_encoding` with `interpolate_offset` 0.1 and no antialiasing.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

OFFSET = 0.1


def meta_positions(table: Float[Tensor, "1 P D"], rows: int, columns: int) -> Float[Tensor, "1 N D"]:
    """Positions of CLS and of rows x columns patches, from a table of CLS and a square of patches.

    Computed in float32 and returned in the table's type; the table itself where it has that very shape.
    """
    side = math.isqrt(table.shape[1] - 1)
    if (rows, columns) == (side, side):
        return table
    square = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    scale = ((rows + OFFSET) / side, (columns + OFFSET) / side)
    resized = torch.nn.functional.interpolate(square, scale_factor=scale, mode="bicubic")
    assert resized.shape[2:] == (rows, columns)
    return torch.cat((table[:, :1], resized.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)


def positions_method(embeddings: Any) -> Callable[[Any, int, int], Any]:
    """What replaces `interpolate_pos_encoding(embeddings, height, width)` of transformers' `embeddings`."""

    def interpolate_pos_encoding(sequence: Float[Tensor, "B N D"], height: int, width: int) -> Float[Tensor, "1 N D"]:
        patch_height, patch_width = embeddings.patch_embeddings.patch_size
        return meta_positions(embeddings.position_embeddings, height // patch_height, width // patch_width)

    return interpolate_pos_encoding
