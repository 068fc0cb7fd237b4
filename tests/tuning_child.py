"""One process of several that fine-tune together; started by torchrun, or forked with its variables set."""

import sys
from pathlib import Path
from typing import Any

import torch
from tuning_runs import LABELS, adapted_of, image_set, weights_of

from probes.tuning_images import make_image_task
from probes.tuning_ranks import Team
from probes.tuning_recipe import AugmentRecipe, Optimisation, TuningRecipe
from probes.tuning_run import TuningOptions, finetune

# 24 training images in batches of 10, 10 and 4; labels are masked unevenly, so that means of means would differ.
RECIPE = TuningRecipe(
    epochs=2,
    batch=7,
    micro=3,
    keep="auroc",
    optimisation=Optimisation(optimizer="sgd", lr=1e-3, head_lr=1e-2, weight_decay=0.01, clip=5.0, ema=0.5),
    augment=AugmentRecipe(flip="plain", degrees=7.0),
)


def run(store: Path, folder: Path, method: str, *, shard: bool | None = None, cache: Path | None = None) -> Any:
    """One run of all processes; every one writes what it has at the end under its rank."""
    team = Team()
    try:
        task = make_image_task(image_set(store, workers=1), LABELS, team)
        settings: dict[str, Any] = {"dropout": 0.0, "r": 4} if method == "lora" else {}
        adapted = adapted_of(task, method, **settings)
        recipe = RECIPE if cache is None else TuningRecipe(epochs=2, batch=7, micro=3)
        options = TuningOptions(features="cls+mean_patch", shard=shard, cache=cache)
        result = finetune(task, adapted, recipe, folder, options=options, team=team)
        if not shard:
            torch.save(weights_of(adapted), folder / f"weights-{team.rank}.pt")
        torch.save((result.history, result.val_scores, result.test_scores), folder / f"result-{team.rank}.pt")
        return result
    finally:
        team.close()


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], shard=sys.argv[4] == "shard")
