"""`probes finetune`: networks trained on images, beside the heads on their frozen features."""

import sys
from pathlib import Path

from cli import show
from cli.extract import JsonOption, StoreOption
from cli.flags import with_config
from cli.running import make_stop
from probes.configs import SplitConfig, TaskConfig
from probes.finetune_config import (
    AugmentConfig,
    FinetuneData,
    ImagesConfig,
    MethodConfig,
    NetworkConfig,
    StepsConfig,
    TrialsConfig,
    WorkConfig,
)

LOGS = ("probes.tuning_loop", "probes.tuning_hold", "probes.tuning_watch", "probes.finetune_fit")


@with_config(
    data=FinetuneData,
    method=MethodConfig,
    network=NetworkConfig,
    steps=StepsConfig,
    trials=TrialsConfig,
    augment=AugmentConfig,
    images=ImagesConfig,
    reading=TaskConfig,
    splits=SplitConfig,
    work=WorkConfig,
)
def finetune(
    *,
    data: FinetuneData,
    method: MethodConfig,
    network: NetworkConfig,
    steps: StepsConfig,
    trials: TrialsConfig,
    augment: AugmentConfig,
    images: ImagesConfig,
    reading: TaskConfig,
    splits: SplitConfig,
    work: WorkConfig,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Train a network on the images: full, LoRA, BitFit, the last blocks, or a head alone with the same budget.

    Manifest, task, splits, pixels, metrics and record are those of the frozen probes; no cached feature is read. By
    default (`--preset fair`) three learning rates are tried with the first seed and validation chooses one, three seeds
    make a record each, and the head starts from the linear probe of the frozen features (LP-FT). Compare with `--method
    linear-online`, the frozen network under the same budget and augmentation; `probes compare` says where budgets are
    unequal.

    Published recipes, with everything listed that departs from them: chest and lora-chest (Tayebi Arasteh et al.
    2025: AdamW, pos_weight, mirrored and turned by 7 degrees, lowest validation loss of 100 epochs, images of
    dinov3-cxr), radiology, lora-radiology and bitfit-radiology (Baharoon et al. 2023: SGD, four rates of the head, 10
    epochs, trained again on train + val). Any flag changes them. The chest paper's other settings: `--label-noise 0.2`,
    and `--test-dataset nih,chexpert` for external validation.

    Examples: `probes finetune --dataset cxr --model dinov3-base --res 224 --method full`; `probes finetune --dataset
    cxr --model dinov2-base --method lora --r 8 --lr 1e-4,1e-3`; `probes finetune --dataset chexpert --model
    dinov3-base --preset lora-chest`; `--method last-k --k 2 --from-cache --flip off --degrees 0` computes the frozen
    blocks once. On 8 GPUs: `torchrun --nproc-per-node 8 -m -- probes finetune ...`. Ended by Ctrl-C, a scheduler or
    `--time-budget`, the same command goes on. What is printed at the end makes feature sets of the trained network.
    """
    from featstore.extraction.distributed import find_ranks
    from featstore.extraction.stopping import signals
    from featstore.store.catalog import Store
    from featstore.store.layout import store_path
    from probes.finetune import Request, describe, evaluate_finetune
    from probes.finetune_presets import settle
    from probes.finetune_table import print_arms

    home = Store(store_path(store))
    if ":" in data.model:
        sys.path.append(str(Path.cwd()))  # so that `module:function` finds a module beside the user
    settled = settle(method, steps, augment, trials)
    request = Request(
        data=data, settled=settled, network=network, images=images, reading=reading, splits=splits, work=work
    )
    speaks = find_ranks().speaks
    if speaks and not json:
        print(f"store {home.path}", flush=True)
    if speaks and (not json or work.dry_run):
        about = describe(home, request, foreseen=work.dry_run)
        if json:
            show.emit_json(about.facts)
        else:
            for line in about.lines:
                print(line, flush=True)
    if work.dry_run:
        return
    stop = make_stop(work.run)
    with show.told(*LOGS, speaks=speaks), signals(stop):
        records = evaluate_finetune(home, request, stop=stop, say=show.say if speaks else _nothing)
    if not speaks:
        return
    if json:
        show.emit_json(records)
    else:
        given = None if store is None else home.path
        print_arms(records, data.results or home.path / "results", show.table, store=given)


def _nothing(text: str) -> None:
    """What the first process of a team says is said once."""


COMMANDS = {"finetune": finetune}
