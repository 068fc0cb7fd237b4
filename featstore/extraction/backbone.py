"""The network of a set, loaded as the set's identity and the run ask for it."""

from typing import Any

from featstore.backbones import BackboneSource
from featstore.backbones.devices import use_device
from featstore.backbones.tokens import Backbone
from featstore.configs import RunConfig
from featstore.extraction.staged_weights import staged


def load_for_set(source: BackboneSource, identity: dict[str, Any], run: RunConfig, device: str) -> Backbone:
    """`source` on a device, in the compute dtype and weight dtype of a set, seen through its windows.

    `--compile auto` is on where it pays: on a GPU (1.15 to 1.7 times, published by timm), not on a CPU, where 2 to 5 %
    do not repay the compiler's 15 seconds, and not where blocks are streamed.

    A `cuda:N` becomes the current device of this thread. With `--stage` weights are read from copies there.

    Raises:
        ConfigError: an option that the network cannot have.
        DeviceError: it does not fit the device.
        WeightsError: the files do not fit the architecture.
    """
    if run.memory != "shard":  # there every process has a device of its own
        use_device(device)
    backbone = staged(source, run.stage).load(
        device=device,
        compute_dtype=identity["compute_dtype"],
        attention=run.attention,
        memory=run.memory,
        weight_dtype=identity.get("weight_dtype", "same"),
        compile=resolve_compile(run, device, source),
    )
    window = identity.get("window")
    if window is None:
        return backbone
    from featstore.backbones.windows import WindowedBackbone

    return WindowedBackbone(backbone, (int(window[0]), int(window[1])))


def resolve_compile(run: RunConfig, device: str, source: BackboneSource) -> str:
    """What `--compile auto` means on this device: on for a GPU that holds the whole network, else off."""
    if run.compile != "auto":
        return run.compile
    whole = run.memory in ("auto", "resident") and source.weights["kind"] != "function"
    return "on" if device.startswith("cuda") and whole else "off"
