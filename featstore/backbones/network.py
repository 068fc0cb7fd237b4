"""Build and run a network of transformers: weights from files or at random, tokens by name instead of by position.

Importing this module takes seconds (torch and transformers' model classes); `BackboneSource.load` does it when needed.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from featstore.backbones.architecture import Architecture
from featstore.backbones.devices import check_memory, resolve_device, resolve_dtype
from featstore.backbones.family import Family
from featstore.backbones.random_weights import fill_random
from featstore.backbones.tokens import Tokens
from featstore.errors import WeightsError

NAMED_KEYS = 3  # of those that do not fit, in a message


class TransformersBackbone:
    """A frozen vision transformer of one of the families."""

    def __init__(self, network: nn.Module, architecture: Architecture, family: Family) -> None:
        self.network = network.eval().requires_grad_(False)
        self.architecture = architecture
        self._blocks = network.get_submodule(family.blocks)
        self._norm = network.get_submodule(family.norm)
        self._parameter = next(network.parameters())

    @property
    def device(self) -> torch.device:
        """Where the weights are and the tokens will be."""
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """Type in which it computes and of the tokens."""
        return self._parameter.dtype

    def __call__(self, pixels: Float[Tensor, "B 3 H W"], *, layers: tuple[int, ...] = ()) -> Tokens:
        """Tokens of normalised images, and of the blocks `layers` (1..depth, or -1 for the last) after the final norm.

        Raises:
            ConfigError: the size is no multiple of the patch size, or a layer does not exist.
        """
        self.architecture.check_size(*pixels.shape[2:])
        wanted = self.architecture.block_numbers(layers)
        hidden: dict[int, Tensor] = {}
        # float32 means float32: by default cuDNN may run the patch projection in TF32, with 10 bits of mantissa.
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact, _capture(self._blocks, wanted, hidden):
            last = self.network(pixels.to(self.device, self.dtype)).last_hidden_state
            final = self._split(last)
            # After the last block the network has applied the norm itself.
            inner = {
                number: final if number == self.architecture.depth else self._split(self._norm(hidden[number]))
                for number in wanted
            }
        return Tokens(cls=final.cls, registers=final.registers, patches=final.patches, layers=inner)

    def _split(self, sequence: Float[Tensor, "B N D"]) -> Tokens:
        first_patch = 1 + self.architecture.num_registers
        return Tokens(
            cls=sequence[:, 0], registers=sequence[:, 1:first_patch], patches=sequence[:, first_patch:], layers={}
        )


@contextlib.contextmanager
def _capture(blocks: nn.Module, wanted: tuple[int, ...], hidden: dict[int, Tensor]) -> Iterator[None]:
    # Only these blocks keep their output: output_hidden_states would hold all of them, 1.4 GB an image for 7B at 1024.
    def keep(number: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            hidden[number] = output

        return hook

    handles = [blocks.get_submodule(str(number - 1)).register_forward_hook(keep(number)) for number in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_files(
    files: tuple[Path, ...],
    architecture: Architecture,
    family: Family,
    *,
    device: str,
    compute_dtype: str,
    attention: str,
) -> TransformersBackbone:
    """A backbone with the weights of safetensors files in the hub's key names.

    Raises:
        DeviceError: the device is absent, too small or without the compute dtype.
        WeightsError: keys are missing, left over or of another shape.
    """
    target, dtype = resolve_device(device), resolve_dtype(compute_dtype)
    for place in {target, torch.device("cpu")}:  # files are read into host memory first
        check_memory(architecture.num_parameters(), place, dtype)
    config = getattr(transformers, family.config_class)(**family.write(architecture))
    with tempfile.TemporaryDirectory(prefix="featstore-weights-") as folder, _quiet_transformers():
        _link(files, Path(folder))
        try:
            network, report = getattr(transformers, family.model_class).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that they are reported with the rest
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise WeightsError(f"{files[0]} cannot be loaded as {family.model_class}: {error}") from error
    _check_report(report, files[0])
    return TransformersBackbone(network.to(target), architecture, family)


def _link(files: tuple[Path, ...], folder: Path) -> None:
    # transformers loads folders: one is made that holds exactly the digested files, whatever else lies beside them.
    if len(files) == 1:
        (folder / "model.safetensors").symlink_to(files[0].resolve())
        return
    for file in files:
        (folder / file.name).symlink_to(file.resolve())
    index = "model.safetensors.index.json"
    (folder / index).symlink_to((files[0].parent / index).resolve())


def _check_report(report: Mapping[str, Any], file: Path) -> None:
    # The mask token serves training only; converters keep it or drop it.
    problems = []
    for kind, text in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "left over"),
        ("mismatched_keys", "of another shape"),
    ):
        keys = sorted(key if isinstance(key, str) else key[0] for key in report[kind])
        keys = [key for key in keys if not key.endswith("mask_token") or kind == "mismatched_keys"]
        if keys:
            shown = ", ".join(keys[:NAMED_KEYS]) + (", ..." if len(keys) > NAMED_KEYS else "")
            problems.append(f"{len(keys)} {text} ({shown})")
        if any(key.startswith("blocks.") for key in keys):
            problems.append("these are the key names of Meta's own checkpoints, convert them to the hub's format")
    if problems:
        raise WeightsError(f"{file} does not fit the model: tensors {'; '.join(problems)}")


def build_random(
    seed: int, architecture: Architecture, family: Family, *, device: str, compute_dtype: str, attention: str
) -> TransformersBackbone:
    """A backbone with random weights, equal for equal seed on every machine and with every version of transformers.

    Raises:
        DeviceError: the device is absent, too small or without the compute dtype.
    """
    target, dtype = resolve_device(device), resolve_dtype(compute_dtype)
    check_memory(architecture.num_parameters(), target, dtype)
    config = getattr(transformers, family.config_class)(**family.write(architecture))
    with torch.device("meta"):
        network = getattr(transformers, family.model_class)(config)
    network.set_attn_implementation(attention)
    fill_random(network, family, seed=seed, device=target, dtype=dtype)
    for name in family.computed:
        # Built again off the meta device: computed numbers, in float32 whatever the weights are.
        setattr(network, name, type(network.get_submodule(name))(config).to(target))
    return TransformersBackbone(network, architecture, family)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    # Its report of keys that do not fit repeats ours, and its progress bar breaks the caller's.
    log: Any = transformers_logging  # without type hints of its own
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    if bars:
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
