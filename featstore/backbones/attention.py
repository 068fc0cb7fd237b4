"""Attention kernels by name, and which one really ran.

`sdpa` leaves the choice to torch (flash, cuDNN or memory-efficient kernels, by device, type and size), `flash` allows
its FlashAttention alone, `xformers` is xformers' memory-efficient attention, `eager` the formula with the whole matrix
of weights. All give the same numbers up to rounding, so the kernel is part of a run's record, not of a set's identity.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from featstore.backbones.architecture import Architecture, VisionTransformer
from featstore.backbones.family import Family
from featstore.errors import ConfigError

Heads = Float[Tensor, "B heads N d"]
# Those that are registered here; transformers has the others, and takes any name with "flash" for a package of its own.
OWN = {"xformers": "featstore_xformers", "flash": "featstore_fa"}


def choose_attention(network: Any, family: Family, name: str) -> None:
    """Make a network of transformers use a kernel.

    Raises:
        ConfigError: the family does not route its attention, or not through this kernel; or its package is absent.
    """
    if name not in family.attention:
        if not family.attention and name == "sdpa":
            return  # the default: nothing was chosen where there is nothing to choose
        choice = f"it can be {' or '.join(family.attention)}" if family.attention else "leave --attention out"
        raise ConfigError(f"--attention {name}: {family.model_type} does not run its attention through it; {choice}")
    if name in OWN:
        _register(name)
    network.set_attn_implementation(OWN.get(name, name))


@cache
def _register(name: str) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(OWN[name], _flash if name == "flash" else _xformers_function())


def _flash(
    module: Any,
    query: Heads,
    key: Heads,
    value: Heads,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "B N heads d"], None]:
    _no_mask(attention_mask)
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            found = scaled_dot_product_attention(query, key, value, scale=scaling)
    except RuntimeError as error:
        if "kernel" not in str(error).lower():
            raise
        raise ConfigError(
            f"--attention flash: torch has no FlashAttention kernel for {query.dtype} on {query.device} with heads of "
            f"{query.shape[-1]}; use --compute-dtype bfloat16, or --attention sdpa, which takes another kernel"
        ) from error
    return found.transpose(1, 2).contiguous(), None


def _xformers_function() -> Callable[..., tuple[Tensor, None]]:
    try:
        from xformers import ops
    except ImportError as error:
        raise ConfigError(
            f"--attention xformers: the package cannot be imported ({error}); pip install 'featstore[gpu]', or use "
            "--attention sdpa"
        ) from error

    def attend(
        module: Any,
        query: Heads,
        key: Heads,
        value: Heads,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Float[Tensor, "B N heads d"], None]:
        _no_mask(attention_mask)
        # It wants (B, N, heads, d), and gives it.
        parts = (each.transpose(1, 2).contiguous() for each in (query, key, value))
        try:
            return ops.memory_efficient_attention(*parts, scale=scaling), None
        except NotImplementedError as error:
            raise ConfigError(
                f"--attention xformers: it has no kernel for {query.dtype} on {query.device}; use --attention sdpa"
            ) from error

    return attend


def _no_mask(mask: Tensor | None) -> None:
    if mask is not None:
        raise ConfigError("this attention kernel takes no mask; use --attention sdpa or eager")


def kernel_that_runs(
    name: str, architecture: Architecture, pixels: Float[Tensor, "B 3 H W"], dtype: torch.dtype
) -> str:
    """The kernel behind a name for these images, such as `sdpa (flash)`; torch and xformers are asked what they take.

    The answer is the name alone where nothing more can be known.
    """
    masked = architecture.family == "sam_vision_model"  # its position bias travels as a mask, which limits the choice
    if name == "eager" or masked or not isinstance(architecture, VisionTransformer):
        return name
    tokens = architecture.num_tokens(*pixels.shape[2:])
    width = architecture.patch_width // architecture.num_heads
    shape = (len(pixels), architecture.num_heads, tokens, width)
    query = torch.empty(shape, dtype=dtype, device=pixels.device)
    if name == "xformers":
        return f"xformers ({_xformers_operator(query)})"
    if name == "flash":
        return "sdpa (flash)"
    chosen = torch._fused_sdp_choice(query, query, query)
    return f"sdpa ({SDPBackend(chosen).name.lower().removesuffix('_attention')})"


def _xformers_operator(query: Heads) -> str:
    from xformers.ops import fmha

    parts = query.transpose(1, 2).contiguous()
    operator: Any = fmha._dispatch_fw(fmha.Inputs(query=parts, key=parts, value=parts), False)
    return str(operator.NAME)
