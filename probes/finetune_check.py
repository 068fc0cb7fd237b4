"""What a request cannot have, told before any image is read: by its options, by the manifest, by an empty network.

The network is built on the meta device, where it takes no memory and is not computed, and the method is applied to it:
what it cannot follow is an error here, and the numbers that train are counted.
"""

from dataclasses import dataclass
from typing import Any

from featstore.backbones import BackboneSource
from featstore.backbones.pooling import width_of
from featstore.errors import ConfigError
from featstore.extraction.distributed import find_ranks
from probes.adapters import Adapted, adapt
from probes.finetune_config import WorkConfig
from probes.finetune_presets import Settled
from probes.roles import SPLITS
from probes.selection import check_two_classes
from probes.tasks import Task
from probes.tuning_activations import entry_block
from probes.tuning_augment import Augmenter
from probes.tuning_images import kind_of, split_images


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What trains: parameters of the network and of the head, and what the method says of them."""

    network: int
    head: int
    notes: tuple[str, ...]

    @property
    def trainable(self) -> int:
        """All numbers that train."""
        return self.network + self.head


def check_options(settled: Settled, work: WorkConfig) -> None:
    """Options that exclude each other, whatever the data set and the network.

    Raises:
        ConfigError: there are some.
    """
    values = settled.values
    for rate in settled.rates:
        settled.recipe(rate, settled.train_seed, micro=work.micro)
    if not 0 <= values["drop_path"] < 1:
        raise ConfigError(f"--drop-path must be at least 0 and below 1; got {values['drop_path']:g}")
    if not 0 < values["layer_decay"] <= 1:
        raise ConfigError(f"--layer-decay must be above 0 and at most 1; got {values['layer_decay']:g}")
    if work.shard and find_ranks().world == 1:
        raise ConfigError(
            "--shard cuts a network over several processes, and there is one; start them by "
            "`torchrun --nproc-per-node N -m -- probes finetune ...`, or leave it out"
        )
    if work.shard and work.from_cache:
        raise ConfigError("--from-cache needs the network whole on every device; leave --shard out")
    smallest = min(values["batch"], work.micro or values["batch"])
    if values["batch_norm"] == "train" and smallest == 1:
        raise ConfigError(
            "--batch-norm train takes statistics of the images that go through a device at once, and --batch or "
            "--micro allows one; give 2 or more"
        )


def check_task(settled: Settled, work: WorkConfig, task: Task) -> None:
    """What the labels of a task, as the manifest has them, do not allow.

    Raises:
        TaskError: numbers or ranks; a split without both classes of any label.
        ConfigError: an augmentation that these labels, or cached activations, cannot have.
    """
    kind_of(task)
    for split in SPLITS:
        held = split_images(task, split)
        check_two_classes(task, split, held.y, held.mask)
    augmenter = Augmenter(settled.augment, task.labels, settled.train_seed)
    if not work.from_cache or not augmenter.changes:
        return
    changes = {
        "--flip off": augmenter.flip != "off",
        "--degrees 0": settled.augment.degrees > 0,
        "--crop off": settled.augment.crop != "off",
    }
    advice = " ".join(flag for flag, is_needed in changes.items() if is_needed)
    raise ConfigError(
        "--from-cache keeps what the frozen blocks give for images as they are, and training would change them; add "
        f"{advice}, or leave --from-cache out"
    )


def foresee(source: BackboneSource, settled: Settled, work: WorkConfig, *, features: str, outputs: int) -> Foreseen:
    """Apply the method to an empty network, as it will be to the loaded one.

    Args:
        features: what the head reads. outputs: labels or classes.

    Raises:
        ConfigError: a network that cannot train so, or settings that it cannot follow.
    """
    adapted = _adapted(source, settled, work, features)
    if work.from_cache:
        entry_block(adapted, features)
    head = outputs * (width_of(features, source.architecture) + 1)
    return Foreseen(network=adapted.counts().trainable, head=head, notes=tuple(adapted.notes))


def _adapted(source: BackboneSource, settled: Settled, work: WorkConfig, features: str) -> Adapted:
    from featstore.backbones.network import build_empty
    from featstore.backbones.source import find_family
    from featstore.backbones.trainable import Trainable, make_trainable

    values, facts = settled.values, source.architecture
    asked: dict[str, Any] = {"drop_path": values["drop_path"], "augment_positions": values["stretch_positions"]}
    if source.weights["kind"] == "function":  # nobody else can build it; it was loaded to be described, too
        backbone = source.load(device="cpu", compute_dtype="float32")
        trainable = make_trainable(backbone, checkpointing=work.checkpointing, **asked)
        return adapt(trainable, settled.method, settled.adapter(settled.train_seed), features=features)
    family = find_family(facts.family)
    trainable = Trainable(build_empty(facts, family).to("meta"), facts, family).requires_grad_(False)
    if asked["drop_path"]:
        trainable.drop_paths(asked["drop_path"])
    if asked["augment_positions"]:
        trainable.augment_positions()
    found = adapt(trainable, settled.method, settled.adapter(settled.train_seed), features=features)
    if values["layer_decay"] != 1:
        trainable.depths()
    if work.checkpointing:
        if values["batch_norm"] == "auto":  # whether statistics move follows from weights, which are not here
            trainable.batch_norm = "frozen"
        trainable.check_checkpointing()
    return found
