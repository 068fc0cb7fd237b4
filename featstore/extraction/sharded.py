"""One extraction over the processes of torchrun: rank 0 runs the pipeline, the others lend their share of the network.

Only rank 0 reads images and writes the store, so everything that holds for one process holds here. It tells the others
which plan's network to load, they serve it until it is done with, and wait for the next one.
"""

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from featstore.backbones.sharding import ShardedBackbone, join_group
from featstore.backbones.tokens import Backbone
from featstore.configs import RunConfig
from featstore.extraction.creation import load_backbone
from featstore.extraction.plan import Plan


class Lenders:
    """The group of processes, as one of them sees it.

    Raises:
        ConfigError: torchrun did not start this process.
    """

    def __init__(self, plans: list[Plan], run: RunConfig, device: str) -> None:
        join_group(device)
        self.plans, self.run, self.device = plans, run, device
        self.rank = dist.get_rank()
        self._lent: ShardedBackbone | None = None

    def load(self, number: int) -> Backbone:
        """On rank 0: the network of plan `number`, loaded by all ranks."""
        self.give_back()
        plan = self.plans[number]
        self._tell((number, plan.spec["identity"]))
        backbone = load_backbone(plan, self.run, self.device)
        assert isinstance(backbone, ShardedBackbone)
        self._lent = backbone
        return backbone

    def give_back(self) -> None:
        """On rank 0: let the other ranks drop the network that they hold."""
        if self._lent is not None and dist.is_initialized():
            self._lent.close()
        self._lent = None

    def dismiss(self) -> None:
        """On rank 0: let the other ranks end; where the group is gone already, they have."""
        if not dist.is_initialized():
            return
        self.give_back()
        self._tell(None)
        dist.destroy_process_group()

    def serve(self) -> None:
        """On the other ranks: hold networks as rank 0 asks for them, until it is done.

        Raises:
            DeviceError: a rank failed, or rank 0 is gone.
            FeatstoreError: this rank cannot load the network.
        """
        while (order := self._tell(None)) is not None:
            number, identity = order
            plan = self.plans[number]
            # Rank 0's word on the compute dtype: the store may have changed between two looks at it.
            plan = replace(plan, spec={**plan.spec, "identity": identity})
            backbone = load_backbone(plan, self.run, self.device)
            assert isinstance(backbone, ShardedBackbone)
            backbone.serve()
        dist.destroy_process_group()

    def _tell(self, order: tuple[int, dict[str, Any]] | None) -> tuple[int, dict[str, Any]] | None:
        """Rank 0's order, on every rank."""
        box = [order]
        dist.broadcast_object_list(box, src=0)
        return box[0]
