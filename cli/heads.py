"""`probes mlp`, `probes attentive`, `probes mil`: heads trained by gradient on cached features."""

from typing import Any

from cli import probing
from cli.extract import JsonOption, StoreOption
from cli.flags import with_config
from cli.probing import ExtractOption
from featstore.errors import ConfigError
from probes.configs import EvalConfig, SplitConfig, TaskConfig
from probes.trained_config import AttentiveConfig, MilConfig, MlpConfig


@with_config(config=EvalConfig, reading=TaskConfig, splits=SplitConfig, head=MlpConfig)
def mlp(
    *,
    config: EvalConfig,
    reading: TaskConfig,
    splits: SplitConfig,
    head: MlpConfig,
    extract: ExtractOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """One hidden layer: LayerNorm, 512, GELU, LayerNorm, dropout 0.3, labels. Trained by AdamW; for labels and classes.

    By default features are standardised, and the best of 1e-4, 3e-4 and 1e-3 and of 50 epochs is chosen by the loss on
    validation. `--protocol chest` trains it as published on frozen DINOv3 7B features (mean over all tokens, AdamW at
    1e-5, pos_weight, lowest validation loss of 100 epochs) and lists what differs; of a set without `--tokens
    cls,registers,patches` it takes the mean over patches, or CLS.

    Examples: `probes mlp --dataset chexpert`; `probes mlp --dataset cxr --labels Edema,Effusion --lr 1e-4,1e-3 --epochs
    20 --class-weight balanced`; `probes mlp --dataset cxr --model dinov3-7b --protocol chest`.
    """
    _train("mlp", config, reading, head, splits=splits, extract=extract, store=store, json=json)


@with_config(config=EvalConfig, reading=TaskConfig, splits=SplitConfig, head=AttentiveConfig)
def attentive(
    *,
    config: EvalConfig,
    reading: TaskConfig,
    splits: SplitConfig,
    head: AttentiveConfig,
    extract: ExtractOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Attention pooling over patch tokens, then a linear layer; for labels and classes.

    A learned query attends to all patches of an image, in heads of 64 columns. Patches are read from the store in every
    epoch, once for all learning rates, and may be larger than memory; pooled, int8 and pca grids work as they are. By
    default the best of 1e-4, 3e-4 and 1e-3 and of 20 epochs is chosen by the loss on validation. Sets need their
    patches: `featstore extract --dataset cxr --model dinov3-base --res 512 --tokens cls,mean_patch,patches`.

    Examples: `probes attentive --dataset cxr --labels Edema,Effusion`; `probes attentive --dataset cxr --model
    dinov3-base@512 --heads 12 --queries 4 --lr 3e-4 --epochs 10 --patience 3`.
    """
    _train("attentive", config, reading, head, splits=splits, extract=extract, store=store, json=json)


@with_config(config=EvalConfig, reading=TaskConfig, splits=SplitConfig, head=MilConfig)
def mil(
    *,
    config: EvalConfig,
    reading: TaskConfig,
    splits: SplitConfig,
    head: MilConfig,
    extract: ExtractOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Volumes and slides as bags of slices and tiles: gated attention (ABMIL), mean or maximum over instances.

    A bag is all images of one unit, which --unit names; it has one label, and its patient decides the split. `--pooling
    abmil` projects instances to 512 and pools them by gated attention; `mean` and `max` pool the features themselves.
    By default features are standardised, and the best of 1e-4, 3e-4 and 1e-3 and of 50 epochs is chosen by the loss on
    validation; published are the head and its loss, not these. Images that failed are left out of their bags.

    Examples: `probes mil --dataset camelyon16 --unit volume --features mean_patch`; `probes mil --dataset ct --unit
    volume --pooling mean`; `probes mil --dataset cxr --unit study --lr 1e-4 --dropout 0.5`.
    """
    if reading.pool is not None:
        raise ConfigError(f"--pool {reading.pool} pools scores or features, and a bag's head does that; use --pooling")
    _train("mil", config, reading, head, splits=splits, extract=extract, store=store, json=json)


def _train(
    probe: str,
    config: EvalConfig,
    reading: TaskConfig,
    head: Any,
    *,
    splits: SplitConfig,
    extract: bool,
    store: str | None,
    json: bool,
) -> None:
    if splits.train_resamples is not None:  # before hours of training
        raise ConfigError(
            f"--train-resamples fits heads again at a fixed strength, and training probes {probe} so many times is not "
            "offered; leave it out, or use probes knn or probes linear without --protocol"
        )
    probing.evaluate(probe, config, reading, head, splits=splits, extract=extract, store=store, json=json)


COMMANDS = {"mlp": mlp, "attentive": attentive, "mil": mil}
