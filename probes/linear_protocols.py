"""How papers train linear heads on frozen features, as data, and where an evaluation leaves them.

Sources: DINOv2 and DINOv3 (eval/linear.py); Baharoon et al. 2023, arXiv 2312.02366, and its code; arXiv 2509.06467 v3
(text; there is no code, what it does not state is named in `gaps`); Tayebi Arasteh et al. 2025, arXiv 2510.07191, code.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from featstore.configs import Augmentation
from featstore.errors import ConfigError, UnknownNameError
from featstore.store.features import FeatureSet
from probes.configs import LinearConfig
from probes.sgd import Recipe
from probes.tasks import Task

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
DINO_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
DINO_RECIPE = Recipe(optimizer="sgd", batch=128, epochs=10, epoch_steps=1250, cosine=True, sampling="endless")
MEAN_PATCH = "mean_patch"


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """One published way to train linear heads.

    A head for every learning rate (times batch / 256 where `scaled`) x number of last blocks whose CLS tokens it reads
    x with or without the mean patch; one of all is chosen on validation by accuracy of classes, or by macro AUROC. No
    `blocks`: heads read `features` alone. `one_logit`: two classes are one label. `positives`: a label's positives
    weigh its negatives / positives. `keep_best`: the weights of the epoch with the lowest validation loss. `refit`:
    the choice is trained again on train and val. `presets` are the images it was published on (`featstore extract
    --published`), none where they are DINO's. `per_unit`: slices are averaged before the head. `gaps`: what never is as
    published here.
    """

    name: str
    rates: tuple[float, ...]
    scaled: bool
    recipe: Recipe
    blocks: tuple[int, ...] = (1,)
    avgpool: tuple[bool, ...] = (True,)
    features: str = ""
    classes_by: Literal["accuracy", "auroc"] = "auroc"
    one_logit: bool = True
    has_labels: bool = True
    has_classes: bool = True
    positives: bool = False
    keep_best: bool = False
    refit: bool = False
    augment: Augmentation | None = None
    augmentation: str = ""
    of_views: str = ""  # how stored views differ from that
    presets: tuple[str, ...] = ()
    per_unit: bool = False
    gaps: tuple[str, ...] = ()

    @property
    def published_features(self) -> str:
        """What heads read, in words."""
        if not self.blocks:
            return self.features
        return " and ".join(head_name(count, pooled) for count in self.blocks for pooled in self.avgpool)


PROTOCOLS: dict[str, Protocol] = {
    "dinov2": Protocol(
        name="dinov2",
        rates=DINO_RATES,
        scaled=True,
        recipe=DINO_RECIPE,
        blocks=(1, 4),
        avgpool=(False, True),
        classes_by="accuracy",
        one_logit=False,
        has_labels=False,
        augment="dino",
        augmentation="random resized crop to 224 and mirroring",
    ),
    "dinov3": Protocol(
        name="dinov3",
        rates=DINO_RATES,
        scaled=True,
        recipe=DINO_RECIPE,
        classes_by="accuracy",
        one_logit=False,
        augment="dino",
        augmentation="random resized crop to 224 and mirroring",
    ),
    "radiology": Protocol(
        name="radiology",
        rates=(1e-3, 5e-3, 1e-2, 5e-2),
        scaled=False,
        recipe=Recipe(optimizer="sgd", batch=128, epochs=10, cosine=True, sampling="epochs"),
        blocks=(1, 4),
        avgpool=(False, True),
        refit=True,
        augment="radiology",
        augmentation="random resized crop of 75 to 100 % and mirroring",
        of_views="intensities are mapped on the whole image, before the crop; theirs on the crop",
        presets=(
            "dinov2-radiology",
            "dinov2-radiology-amos",
            "dinov2-radiology-heart",
            "dinov2-radiology-brain",
        ),
        per_unit=True,
    ),
    "medical": Protocol(
        name="medical",
        rates=(0.005,),
        scaled=False,
        recipe=Recipe(
            optimizer="adamw", batch=1024, epochs=50, cosine=False, sampling="epochs", start="uniform"
        ),
        has_classes=False,
        presets=("dinov3-medical",),
        per_unit=True,
        gaps=(
            "optimiser and schedule are not stated: AdamW without weight decay, constant learning rate",
            "features are not stated: CLS + mean patch",
            "augmentation is not stated: none",
        ),
    ),
    "chest": Protocol(
        name="chest",
        rates=(1e-5,),
        scaled=False,
        recipe=Recipe(
            optimizer="adamw", batch=30, epochs=100, cosine=False, sampling="whole batches", start="uniform"
        ),
        blocks=(),
        avgpool=(),
        features="mean over all tokens (CLS, registers, patches)",
        has_classes=False,
        positives=True,
        keep_best=True,
        augment="chest",
        augmentation="mirroring and turns by up to 7 degrees",
        presets=("dinov3-cxr",),
        gaps=("the backbone is frozen; published: all of its weights are trained with the head",),
    ),
}  # fmt: skip


def head_name(blocks: int, pooled: bool) -> str:
    """What a head reads: `last block`, `last 4 blocks + mean patch`."""
    return ("last block" if blocks == 1 else f"last {blocks} blocks") + (" + mean patch" if pooled else "")


def recipe_of(protocol: Protocol, config: LinearConfig) -> Recipe:
    """The protocol's recipe with what was asked for in its place."""
    recipe = protocol.recipe
    return Recipe(
        optimizer=config.optimizer or recipe.optimizer,
        batch=config.batch or recipe.batch,
        epochs=recipe.epochs,
        epoch_steps=recipe.epoch_steps,
        iterations=config.iterations,
        cosine=recipe.cosine,
        sampling=recipe.sampling,
        start=recipe.start,
        seed=config.head_seed or 0,
    )


def protocol_features(features: FeatureSet, name: str) -> str:
    """The features of a set that a protocol's heads read, or the nearest that are there.

    `last4+mean_patch` where the blocks are there, else `cls+mean_patch`; the mean over all tokens, else over the
    patches, and of a network that pools its own `cls`.
    """
    protocol = PROTOCOLS[name]
    if not protocol.blocks:
        if features.spec["identity"].get("architecture", {}).get("summary") == "pool":
            return "cls"
        return next((name for name in ("mean_all", MEAN_PATCH) if has_features(features, name)), "cls")
    most = max(protocol.blocks)
    first = f"last{most}" if most > 1 and has_features(features, f"last{most}") else "cls"
    pooled = True in protocol.avgpool and MEAN_PATCH in features.arrays
    return f"{first}+{MEAN_PATCH}" if pooled else first


def has_features(features: FeatureSet, name: str) -> bool:
    """Whether a set holds every array behind a feature name."""
    try:
        return all(part in features.arrays for part in features.parts(name))
    except (ConfigError, UnknownNameError):
        return False


def how_to_add(features: FeatureSet, count: int) -> str:
    """The command that adds the last `count` blocks to a set, as the end of a sentence; empty where they are there."""
    try:
        features.parts(f"last{count}")
    except UnknownNameError as error:
        return f"; to add them: {str(error).splitlines()[-1].strip()}"
    except ConfigError:
        pass  # the network has no such blocks
    return ""


def head_columns(protocol: Protocol, features: FeatureSet, name: str, width: int) -> dict[str, slice]:
    """What each head reads: name -> columns of the feature matrix of this width.

    The heads of the grid that `name` (`cls`, `lastN`, with or without `+mean_patch`) has the tokens for; where it has
    none for any, one head that reads everything.
    """
    first, _, second = name.partition("+")
    count = 1 if first == "cls" else int(first[4:]) if first.startswith("last") and first[4:].isdigit() else 0
    if not count or second not in ("", MEAN_PATCH):
        return {name: slice(0, width)}
    pooled_width = features.array(MEAN_PATCH).shape[-1] if second else 0
    of_block = (width - pooled_width) // count
    found = {
        head_name(blocks, pooled): slice((count - blocks) * of_block, count * of_block + pooled * pooled_width)
        for blocks in protocol.blocks
        for pooled in protocol.avgpool
        if blocks <= count and (second or not pooled)
    }
    return found or {name: slice(0, width)}


def deviations(
    protocol: Protocol, task: Task, config: LinearConfig, *, heads: dict[str, slice], masked: int, passes: float
) -> list[str]:
    """Where an evaluation leaves the protocol that it names.

    `heads` are those trained; `masked`: label entries of the training rows that are masked; `passes`: how often each
    row is trained on.
    """
    found = _of_features(protocol, task.features, heads)
    found += of_images(protocol, task.features.spec)
    if protocol.augmentation:
        if config.views is None:
            found.append(
                f"features of the images as they are; published: {protocol.augmentation}, drawn anew each time"
            )
        elif config.views < passes:
            found.append(
                f"{config.views} augmented views of each row, which is trained on {ceil(passes)} times; published: "
                "drawn anew each time"
            )
        if config.views is not None and protocol.of_views:
            found.append(protocol.of_views)
    stored = task.features.spec["identity"].get("stored_dtype")
    if stored != "float32":
        found.append(f"features rounded to {stored} in the store; published heads read what the network gives")
    found += _of_training(protocol, config)
    found += _of_task(protocol, task, masked)
    return [*found, *protocol.gaps]


def _of_features(protocol: Protocol, features: FeatureSet, heads: dict[str, slice]) -> list[str]:
    if not protocol.blocks:
        pooled = features.spec["identity"].get("architecture", {}).get("summary") == "pool"
        if set(heads) == {"cls" if pooled else "mean_all"}:
            return []
        return [f"features {', '.join(heads)} in place of the {protocol.features}"]
    wanted = [head_name(count, pooled) for count in protocol.blocks for pooled in protocol.avgpool]
    unknown = [name for name in heads if name not in wanted]
    if unknown:
        return [f"features {', '.join(unknown)} in place of {protocol.published_features}"]
    missing = [name for name in wanted if name not in heads]
    found = []
    if missing:
        how = how_to_add(features, max(protocol.blocks))
        found.append(f"heads left out of the grid, whose features are not read: {', '.join(missing)}{how}")
    architecture = features.spec["identity"].get("architecture", {})
    if (
        protocol.name == "radiology"
        and architecture.get("family", "dinov2") != "dinov2"
        and architecture.get("final_norm", True)
    ):
        found.append("tokens after the final norm; published for networks other than DINOv2: before it (--norm none)")
    return found


def of_images(protocol: Protocol, spec: dict[str, Any]) -> list[str]:
    """What of the images a set was made from is not as published."""
    images = spec["identity"].get("preprocess")
    if images is None:
        return ["preprocessing of imported features unknown"]
    size = f"{images['height']}x{images['width']}"
    if protocol.presets:
        published = spec.get("published") or {}
        if published.get("name") in protocol.presets:
            return [f"images: {text}" for text in published["deviations"] if not text.startswith("its kNN")]
        return [
            f"images: geometry {images['geometry']} at {size}, intensity {images['intensity']}; published: "
            f"featstore extract --published {protocol.presets[0]}"
        ]
    found = []
    if (images["geometry"], images["height"], images["width"]) != ("dino", 224, 224):
        found.append(f"geometry {images['geometry']} at {size} in place of short side 256, centre crop 224")
    if (images["mean"], images["std"]) != IMAGENET:
        found.append(f"mean {images['mean']} and std {images['std']} in place of ImageNet's")
    return found


def _of_training(protocol: Protocol, config: LinearConfig) -> list[str]:
    recipe, found = protocol.recipe, []
    if config.standardize:
        found.append("standardised features")
    if config.refit and not protocol.refit:
        found.append("the choice is trained again on train and val; published: on train alone")
    if config.rates not in (None, tuple(sorted(protocol.rates))):
        found.append(f"learning rates {_listed(config.rates)} in place of {_listed(protocol.rates)}")
    if config.batch not in (None, recipe.batch):
        found.append(f"batches of {config.batch} in place of {recipe.batch}")
    if config.iterations is not None and config.iterations != recipe.epochs * recipe.epoch_steps:
        what = f"{recipe.epochs} x {recipe.epoch_steps}" if recipe.epoch_steps else f"{recipe.epochs} epochs"
        found.append(f"{config.iterations} training steps in place of {what}")
    if config.optimizer not in (None, recipe.optimizer):
        found.append(f"optimiser {config.optimizer} in place of {recipe.optimizer}")
    return found


def of_unit(protocol: Protocol, task: Task) -> list[str]:
    """How scores of volumes, studies or patients come about, where the protocol has none or others."""
    unit, pool = task.spec.unit, task.spec.pool
    if unit == "image" or (protocol.per_unit and pool == "features"):
        return []
    more = "; published: features are averaged before the head (--pool features)" if protocol.per_unit else ""
    return [f"{'features averaged' if pool == 'features' else f'{pool} of the scores of images'} per {unit}{more}"]


def _listed(rates: tuple[float, ...] | None) -> str:
    return ", ".join(f"{rate:g}" for rate in rates or ())


def _of_task(protocol: Protocol, task: Task, masked: int) -> list[str]:
    found = []
    if task.kind == "multilabel" and not protocol.has_labels:
        found.append(
            "labels, each with its own cross-entropy, chosen by macro AUROC; published: one of several classes"
        )
    if task.kind == "multiclass" and not protocol.has_classes and len(task.labels) > 2:
        found.append("softmax over classes; published: cross-entropy of labels")
    if masked:
        found.append(f"{masked} masked label entries of the training rows have no loss; the protocol has none")
    found += of_unit(protocol, task)
    if protocol.presets:
        origin = task.features.manifest.meta["split_origin"]
        found.append(
            f"rows to train, choose and test on are this task's (split: {origin}), not compared with the paper's"
        )
    return found
