"""What one arm is: a network, what of it trains and how, on which processes, and where its runs are."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featstore.backbones import BackboneSource
from featstore.backbones.trainable import Trainable, make_trainable
from featstore.configs import RunConfig
from featstore.extraction.backbone import load_for_set
from featstore.extraction.stopping import Stop
from probes.adapters import Adapted, adapt
from probes.finetune_config import WorkConfig
from probes.finetune_presets import Settled
from probes.tuning_ranks import Team
from probes.tuning_recipe import TuningRecipe

Rate = tuple[float, float | None]


@dataclass
class Arm:
    """A network, what of it trains, and how; `root` holds its runs, `features` are what its head reads."""

    source: BackboneSource
    identity: dict[str, Any]
    settled: Settled
    features: str
    work: WorkConfig
    team: Team
    root: Path
    stop: Stop | None = None
    notes: list[str] = field(default_factory=list)
    before: dict[str, dict[str, float]] = field(default_factory=dict)  # what came before all runs took
    moves: bool = False  # batch norms take the statistics of images that go through at once

    def trainable(self) -> Trainable:
        """The network as it begins, in float32 on this process's device.

        Raises:
            ConfigError: one that cannot train, or not as is asked.
        """
        chosen = self.settled.values
        run: RunConfig = self.work.run
        backbone = load_for_set(self.source, {**self.identity, "compute_dtype": "float32"}, run, self.team.device)
        return make_trainable(
            backbone,
            checkpointing=self.work.checkpointing,
            drop_path=chosen["drop_path"],
            augment_positions=chosen["stretch_positions"],
        )

    def adapted(self, seed: int) -> Adapted:
        """The same with the method applied."""
        found = adapt(self.trainable(), self.settled.method, self.settled.adapter(seed), features=self.features)
        self.moves = found.trainable.batch_norm == "train"
        return found

    def recipe(self, rate: Rate, seed: int, stop_after: int | None = None) -> TuningRecipe:
        """How one run is trained here."""
        return self.settled.recipe(rate, seed, micro=self.work.micro, stop_after=stop_after)
