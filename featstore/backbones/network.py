"""Build and run a network: an empty one, its weights out of files or a seed, tokens by name instead of by position.

Importing this module takes seconds (torch and transformers' model classes); `BackboneSource.load` does it when needed.
"""

import contextlib
import math
import re
import threading
from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featstore.backbones import devices, matching
from featstore.backbones.architecture import Architecture
from featstore.backbones.attention import choose_attention, kernel_that_runs
from featstore.backbones.devices import check_dtype, resolve_device, resolve_dtype
from featstore.backbones.family import Family
from featstore.backbones.sharding import ShardedBackbone, own_device, shard_blocks
from featstore.backbones.source import LoadOptions
from featstore.backbones.streaming import Piece, Streamer, lay_out
from featstore.backbones.tensors import Tensors
from featstore.backbones.tokens import Tokens
from featstore.errors import ConfigError

_BUILDING = threading.Lock()  # register_parameter is everybody's


class NetworkBackbone:
    """A frozen network of one of the families.

    `kernel` names the attention that runs, from the first batch on with the operator behind the name (`sdpa (flash)`);
    None where there is no choice. `memory` is where its weights are: `resident` on the device, read block by block as
    it runs (`stream`), or cut over processes (`shard`).
    """

    def __init__(
        self,
        network: nn.Module,
        architecture: Architecture,
        family: Family,
        *,
        kernel: str | None,
        memory: str = "resident",
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.architecture = architecture
        self.family = family
        self.kernel = kernel
        self.memory = memory
        self._turn = threading.Lock()  # hooks are the network's: one batch at a time
        self._asked = False  # which operator runs behind the name depends on the size: asked once, of the first batch
        self._parameter = next(parameter for parameter in network.parameters() if not parameter.is_meta)

    @property
    def streams(self) -> bool:
        """Whether every batch reads all blocks anew, so that larger batches pay (see `streaming`)."""
        return self.memory == "stream"

    @property
    def device(self) -> torch.device:
        """Where the weights are and the tokens will be."""
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """Type in which it computes and of the tokens."""
        return self._parameter.dtype

    def __call__(self, pixels: Float[Tensor, "B 3 H W"], *, layers: tuple[int, ...] = ()) -> Tokens:
        """Tokens of normalised images, and of the blocks `layers` (1..depth, or -1 for the last).

        After the final norm where `architecture.final_norm`, else before it.

        Raises:
            ConfigError: the size is no multiple of the patch size, or a layer does not exist.
        """
        facts = self.architecture
        facts.check_size(*pixels.shape[2:])
        wanted = facts.block_numbers(layers)
        with self._turn, torch.inference_mode():
            inputs = pixels.to(self.device, self.dtype)
            if not self._asked and self.kernel is not None:
                self.kernel, self._asked = kernel_that_runs(self.kernel, facts, inputs, self.dtype), True
            return compute_tokens(self.network, facts, self.family, inputs, wanted)


def compute_tokens(
    network: nn.Module,
    architecture: Architecture,
    family: Family,
    inputs: Float[Tensor, "B 3 H W"],
    wanted: tuple[int, ...] = (),
) -> Tokens:
    """Tokens of images that have the network's type and lie on its device, and of the blocks `wanted` (1..depth).

    The one pass of frozen networks and of those that train: gradients are recorded as the caller asks for them.
    """
    # The last block's output is the final sequence before the norm.
    captured = wanted if architecture.final_norm else tuple({*wanted, architecture.depth})
    norm = network.get_submodule(family.norm) if family.norm else None
    hidden: dict[int, Tensor] = {}

    def finish(sequence: Tensor) -> Any:
        return family.finish(norm, sequence) if architecture.final_norm else sequence

    def split(sequence: Any) -> Tokens:
        cls, registers, patches = family.split(sequence, architecture)
        return Tokens(cls=cls, registers=registers, patches=patches, layers={})

    # float32 means float32: by default cuDNN may run the patch projection in TF32, with 10 bits of mantissa.
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with exact, _capture(network, family, captured, hidden):
        last = family.call(network, inputs, architecture)
        final = split(last if architecture.final_norm else hidden[architecture.depth])
        inner = {number: final if number == architecture.depth else split(finish(hidden[number])) for number in wanted}
    return Tokens(cls=final.cls, registers=final.registers, patches=final.patches, layers=inner)


@contextlib.contextmanager
def _capture(network: nn.Module, family: Family, wanted: tuple[int, ...], hidden: dict[int, Tensor]) -> Iterator[None]:
    # Only these blocks keep their output: output_hidden_states would hold all of them, 1.4 GB an image for 7B at 1024.
    def keep(number: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            hidden[number] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = []
    if family.blocks:
        blocks = network.get_submodule(family.blocks)
        handles = [blocks.get_submodule(str(number - 1)).register_forward_hook(keep(number)) for number in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Within it modules are made with their parameters on the meta device, and with their buffers as they should be."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, param)

    with _BUILDING:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]


def build_empty(architecture: Architecture, family: Family) -> nn.Module:
    """The network of a family, its parameters on the meta device."""
    network: nn.Module
    with empty_parameters():
        if family.build:
            network = resolve_name(family.build)(architecture)
        else:
            import transformers

            assert family.write is not None
            config = getattr(transformers, family.config_class)(**family.write(architecture))
            network = getattr(transformers, family.model_class)(config, **family.model_options)
    if family.prepare is not None:
        family.prepare(network, architecture)
    return network.eval()


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Parameters, and buffers that belong to the weights (running statistics), by live name."""
    return {name: value for name, value in network.state_dict().items() if value.is_floating_point()}


def place(network: nn.Module, live: str, values: Tensor) -> None:
    """Put values in the place of a parameter or buffer."""
    owner, _, attribute = live.rpartition(".")
    module = network.get_submodule(owner)
    if attribute in module._parameters:
        setattr(module, attribute, nn.Parameter(values, requires_grad=False))
    else:
        setattr(module, attribute, values)


def dtype_of(family: Family, live: str, dtype: torch.dtype) -> torch.dtype:
    """The compute dtype, or float32 where the family asks for it."""
    return torch.float32 if any(re.match(pattern, live) for pattern in family.float32) else dtype


def fill(
    network: nn.Module,
    tensors: Tensors,
    match: matching.Match,
    family: Family,
    *,
    device: torch.device,
    dtype: torch.dtype,
    skip: str | None = None,
) -> None:
    """Give a network its weights, one tensor at a time; parameters below `skip` (a prefix of live names) stay empty.

    What the checkpoint may lack becomes zero: nothing that the tokens depend on.
    """
    for live, empty in weights_of(network).items():
        if skip is not None and live.startswith(skip):
            continue
        kind = dtype_of(family, live, dtype)
        if live in match.keys:
            values = tensors.read(match.keys[live], tuple(empty.shape), kind).to(device)
        else:
            values = torch.zeros(empty.shape, dtype=kind, device=device)
        place(network, live, values)
    for module in network.modules():  # what is computed and no weight: position numbers, rotary frequencies
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def load_network(
    tensors: Tensors, architecture: Architecture, family: Family, pos_interp: str, options: LoadOptions
) -> NetworkBackbone | ShardedBackbone:
    """A backbone with the weights of `tensors`, as `options` ask for it.

    Raises:
        ConfigError: an attention kernel or a way of keeping weights that the family does not have.
        DeviceError: the device is absent, too small or without the compute dtype.
        WeightsError: keys are missing, left over or of another shape.
    """
    device, dtype = resolve_device(options.device), resolve_dtype(options.compute_dtype)
    if options.memory == "shard":
        device = own_device(device, options.device)
    check_dtype(device, dtype)
    check_options(options, family)
    network = build_empty(architecture, family)
    choose_attention(network, family, options.attention)
    if pos_interp != family.interpolations[0]:
        assert family.resize_positions is not None
        family.resize_positions(network, pos_interp)
    shapes = {name: tuple(value.shape) for name, value in weights_of(network).items()}
    match = matching.match(family, shapes, tensors)
    matching.check_shapes(match, shapes, tensors)
    layout = lay_out(
        {name: (shape, dtype_of(family, name, dtype)) for name, shape in shapes.items()}, match.keys, family.blocks
    )
    outside = sum(
        math.prod(shape) * dtype_of(family, name, dtype).itemsize
        for name, shape in shapes.items()
        if not (family.blocks and name.startswith(f"{family.blocks}."))
    )
    memory = choose_memory(options, outside, layout, device, dtype)
    fill(
        network,
        tensors,
        match,
        family,
        device=device,
        dtype=dtype,
        skip=None if memory == "resident" else f"{family.blocks}.",
    )
    if match.dialect.after is not None:  # nothing of the blocks: see Dialect
        match.dialect.after(network, tensors)
    blocks = network.get_submodule(family.blocks) if family.blocks else None
    if options.weight_dtype != "same":
        from featstore.backbones.quantised import quantise

        quantise(network, family, options.weight_dtype)
    if options.compile != "off":
        from featstore.backbones.compiling import compile_blocks

        compile_blocks(network, family, options.compile)
    kernel = options.attention if options.attention in family.attention else None
    if memory == "stream":
        assert blocks is not None
        Streamer(blocks, layout, tensors, device)  # held by its hooks
    if memory == "shard":
        assert blocks is not None
        shard_blocks(network, blocks, layout, tensors, device)
    backbone = NetworkBackbone(network, architecture, family, kernel=kernel, memory=memory)
    return ShardedBackbone(backbone) if memory == "shard" else backbone


def check_options(options: LoadOptions, family: Family) -> None:
    """Raise `ConfigError` where ways of keeping weights exclude each other, or the family has no blocks."""
    if options.memory not in ("stream", "shard"):
        return
    if not family.blocks:
        raise ConfigError(
            f"--memory {options.memory}: {family.model_type} has no list of blocks to take one by one; leave it out"
        )
    if options.weight_dtype != "same":
        raise ConfigError(
            f"--memory {options.memory} keeps weights as they compute; leave --weight-dtype {options.weight_dtype} "
            "out, or use --memory resident"
        )
    if options.compile == "graphs":
        raise ConfigError(
            f"--compile graphs replays one place in memory, and --memory {options.memory} moves the weights; "
            "use --compile on or off"
        )


def choose_memory(
    options: LoadOptions, outside: int, layout: list[tuple[Piece, ...]], device: torch.device, dtype: torch.dtype
) -> str:
    """`devices.choose_memory` for a network with `outside` bytes of weights beside its blocks."""
    if options.memory == "shard":
        return "shard"
    sizes = [sum(piece.bytes for piece in pieces) for pieces in layout]
    possible = sizes and options.weight_dtype == "same" and options.compile != "graphs"
    streamed = outside + 2 * max(sizes) if possible else None
    return devices.choose_memory(options.memory, outside + sum(sizes), streamed, device, dtype)
