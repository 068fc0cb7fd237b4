"""Options of the probes; a field is a flag."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from featstore.errors import ConfigError

NOISE_SEED = 42  # of the published flips


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Comma-separated positive numbers.

    Raises:
        ConfigError: anything else, or none.
    """
    try:
        numbers = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) <= 0:
        raise ConfigError(f"{option} takes positive numbers, comma-separated; got {text!r}")
    return numbers


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True, slots=True)
class SubjectConfig:
    """What every result is of: data, backbone, labels, features."""

    dataset: Annotated[str, "registered data set"]
    model: Annotated[str | None, "set or sets to evaluate: MODEL, MODEL@RES; default: every set of the data set"] = None
    task: Annotated[str | None, "named task, such as chexpert-5; default: the data set's own"] = None
    labels: Annotated[str, "label columns: one categorical, or several of 0/1/-1/blank"] = ""
    where: Annotated[str, "keep rows by column: 'source=nih,view=AP|PA', quoted, as | is a pipe to the shell"] = ""
    features: Annotated[
        str | None,
        "cls, mean_patch, cls+mean_patch, mean_all, ..., or several, comma-separated; default: cls+mean_patch and cls",
    ] = None
    seed: Annotated[int, "seed of what is drawn"] = 0
    allow_leak: Annotated[
        bool, "go on although a patient or an image stands in two splits, or in both data sets; the record says so"
    ] = False
    results: Annotated[Path | None, "folder of the records; default: STORE/results"] = None

    def __post_init__(self) -> None:
        if self.task and self.labels:
            raise ConfigError("--task and --labels exclude each other; give one")
        if self.seed < 0:
            raise ConfigError(f"--seed must be 0 or more, got {self.seed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(SubjectConfig):
    """What every evaluation of stored features is of."""

    manifest: Annotated[str | None, "digest of an older manifest of the data set; default: the current one"] = None

    def __post_init__(self) -> None:
        SubjectConfig.__post_init__(self)  # super() does not know a class that slots made again
        if self.features is not None and not _names(self.features):
            raise ConfigError(f"--features names features, comma-separated; got {self.features!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig(DataConfig):
    """What is evaluated, and how its numbers are bounded."""

    seed: Annotated[int, "seed of the bootstrap"] = 0
    resamples: Annotated[int, "bootstrap resamples (by patient) for the intervals"] = 1000
    choose_features: Annotated[
        bool,
        "one record with the features that are best on validation: of --features, else cls, mean_patch, both, last4",
    ] = False

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        if self.resamples < 2:
            raise ConfigError(f"--resamples must be at least 2, got {self.resamples}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """Folds in place of the task's own splits, and what is resampled beside the scores of test rows."""

    folds: Annotated[
        int | None,
        "cross-validation over all rows, by patient: a record per fold (test; the next fold selects), and all",
    ] = None
    fold_seed: Annotated[int, "seed of the folds"] = 0
    fold_column: Annotated[str, "the manifest's column that numbers or names the folds, in place of --folds"] = ""
    fold_val: Annotated[
        float | None, "share of all patients to select with, in place of a whole fold: 0.1 is 7:1:2 with 5 folds"
    ] = None
    train_resamples: Annotated[
        int | None,
        "also an interval over heads fitted again on so many resamples of the training patients (strength kept)",
    ] = None
    test_youden: Annotated[
        bool, "also intervals of the optimistic metrics, each test resample at the threshold that is best on it"
    ] = False

    def __post_init__(self) -> None:
        if self.folds is not None and self.fold_column:
            raise ConfigError("--folds and --fold-column exclude each other; give one")
        if self.folds is not None and self.folds < 2:
            raise ConfigError(f"--folds must be at least 2, got {self.folds}")
        if self.fold_seed < 0:
            raise ConfigError(f"--fold-seed must be 0 or more, got {self.fold_seed}")
        if self.fold_val is not None and not 0 < self.fold_val < 1:
            raise ConfigError(f"--fold-val must lie between 0 and 1, got {self.fold_val}")
        if not self.crossed and (self.fold_val is not None or self.fold_seed):
            flag = "--fold-val" if self.fold_val is not None else "--fold-seed"
            raise ConfigError(f"{flag} belongs to --folds or --fold-column; give one")
        if self.train_resamples is not None and self.train_resamples < 2:
            raise ConfigError(f"--train-resamples must be at least 2, got {self.train_resamples}")

    @property
    def crossed(self) -> bool:
        """Whether folds take the place of the task's splits."""
        return self.folds is not None or bool(self.fold_column)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """How the task is read, in place of what it says itself, and what else it is tested on."""

    train_policy: Annotated[
        str | None, "what -1, blank and readers' votes mean in training: zeros, ones, mixed, ignore, drop-row, ..."
    ] = None
    eval_policy: Annotated[str | None, "the same in validation and test; default: the task's own, -1 masked"] = None
    unit: Annotated[
        Literal["image", "volume", "study", "patient"] | None, "what counts once; images of one unit are pooled"
    ] = None
    pool: Annotated[
        Literal["mean", "max", "features"] | None, "pool scores (mean, max) or average features before the head"
    ] = None
    kind: Annotated[
        Literal["multilabel", "multiclass", "regression", "ordinal"] | None, "what the label columns hold"
    ] = None
    classes: Annotated[str, "values of a multiclass or ordinal column, in order: none,mild,severe"] = ""
    policies: Annotated[
        str, "sensitivity table: one record per training policy, such as zeros,ones,drop-row, or all"
    ] = ""
    test_dataset: Annotated[str, "test on these data sets instead (NAME,NAME), by the labels they share"] = ""
    test_task: Annotated[
        str | None, "task of the other data sets, or one each (NAME,NAME); default: theirs that shares most labels"
    ] = None
    label_noise: Annotated[
        float, "flip this share of the positive training labels, and a quarter of it of the negative ones; 0: none"
    ] = 0.0
    noise_seed: Annotated[int, "seed of the flips"] = NOISE_SEED

    def __post_init__(self) -> None:
        if not 0 <= self.label_noise <= 1:
            raise ConfigError(f"--label-noise is a share from 0 to 1, got {self.label_noise}")
        if self.noise_seed < 0:
            raise ConfigError(f"--noise-seed must be 0 or more, got {self.noise_seed}")
        if self.noise_seed != NOISE_SEED and not self.label_noise:
            raise ConfigError(
                f"--noise-seed {self.noise_seed} belongs to --label-noise; give that too, or leave it out"
            )
        if self.policies and self.test_dataset:
            raise ConfigError("--policies and --test-dataset exclude each other; give one")
        if self.policies and self.train_policy:
            raise ConfigError("--policies and --train-policy exclude each other; give one")
        if self.test_task and not self.test_dataset:
            raise ConfigError("--test-task names the task of --test-dataset; give that too")
        if len(_names(self.test_task)) > 1 and len(_names(self.test_task)) != len(_names(self.test_dataset)):
            raise ConfigError(
                f"--test-task names one task for all of --test-dataset or one for each; got "
                f"{len(_names(self.test_task))} for {len(_names(self.test_dataset))}"
            )

    @property
    def test_datasets(self) -> tuple[str, ...]:
        """Names of the other data sets."""
        return tuple(dict.fromkeys(_names(self.test_dataset)))

    @property
    def tests(self) -> tuple[tuple[str, str | None], ...]:
        """(other data set, its task, None where none was named)."""
        datasets, tasks = _names(self.test_dataset), _names(self.test_task)
        each: list[str | None] = [*tasks] if len(tasks) > 1 else [tasks[0] if tasks else None] * len(datasets)
        return tuple(dict.fromkeys(zip(datasets, each)))


@dataclass(frozen=True, kw_only=True, slots=True)
class KnnConfig:
    """k nearest neighbours by cosine similarity."""

    k: Annotated[
        str | None, "neighbour counts to choose from, all for every row; default: 10,20,100,200 up to the bank's size"
    ] = None
    vote: Annotated[
        Literal["softmax", "majority", "distance", "mlknn"] | None,
        "softmax(similarity/T) as DINO's, majority, 1/distance, or ML-kNN's posterior; default: softmax",
    ] = None
    temperature: Annotated[float | None, "sharpness of the softmax vote, > 0; default: 0.07"] = None
    protocol: Annotated[
        Literal["dino", "radiology"] | None, "as published: DINO's vote, or ML-kNN with train + val as the library"
    ] = None
    smoothing: Annotated[float | None, "ML-kNN's s, > 0; default: 1"] = None
    self_neighbour: Annotated[bool, "ML-kNN: count a training row among its own neighbours"] = False
    standardize: Annotated[bool, "scale features by the training rows' mean and deviation first"] = False
    select: Annotated[
        Literal["val", "loo"] | None, "choose k on val (default), or by leaving one patient out of train"
    ] = None
    refit: Annotated[bool, "test with train + val as neighbours; k is chosen, and val scored, with train alone"] = False
    backend: Annotated[Literal["faiss", "torch"] | None, "what searches; default: FAISS where it is installed"] = None
    device: Annotated[Literal["cpu", "cuda"] | None, "where; default: a GPU if the backend has one"] = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"--temperature must be above 0, got {self.temperature}")
        if self.smoothing is not None and not self.smoothing > 0:
            raise ConfigError(f"--smoothing must be above 0, got {self.smoothing}")
        fixed = {"dino": "softmax", "radiology": "mlknn"}.get(self.protocol or "")
        if fixed is not None and self.vote not in (None, fixed):
            raise ConfigError(f"--protocol {self.protocol} votes by {fixed}; leave out --vote {self.vote}")
        vote = fixed or self.vote or "softmax"
        for flag, given, owner in (
            ("--temperature", self.temperature is not None, "softmax"),
            ("--smoothing", self.smoothing is not None, "mlknn"),
            ("--self-neighbour", self.self_neighbour, "mlknn"),
        ):
            if given and vote != owner:
                raise ConfigError(f"{flag} belongs to --vote {owner}, and the vote is {vote}")
        if vote == "mlknn" and self.select == "loo":
            raise ConfigError("--select loo is not there for ML-kNN, whose counts need every row; choose k on val")
        if self.k is not None and not self.counts:
            raise ConfigError(f"--k takes whole numbers above 0 and all, comma-separated; got {self.k!r}")

    @property
    def counts(self) -> tuple[int | str, ...] | None:
        """The counts asked for, or None for the default."""
        if self.k is None:
            return None
        parts = [part for part in _names(self.k) if part != "all"]
        numbers = parse_numbers(",".join(parts), "--k") if parts else ()
        if any(value != int(value) for value in numbers):
            raise ConfigError(f"--k takes whole numbers, got {self.k!r}")
        return (*(int(value) for value in numbers), *(("all",) if "all" in _names(self.k) else ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig:
    """Logistic regression, or ridge regression for numbers and ranks, at scikit-learn's objectives; or heads trained by
    stochastic gradients as a paper has it."""

    C: Annotated[
        str | None, "inverse strength(s) of the L2 penalty, as in scikit-learn; default: 45 values, 1e-6 to 1e5"
    ] = None
    standardize: Annotated[
        bool | None, "scale features by the training rows' mean and deviation; default: yes, but not with --protocol"
    ] = None
    class_weight: Annotated[
        Literal["none", "balanced", "positives"],
        "weight of the classes in the loss; positives: a label's negatives / positives for its positives",
    ] = "none"
    refit: Annotated[
        bool, "choose by group-wise 5-fold out-of-fold scores (with --protocol: by val), then fit on train + val"
    ] = False
    alpha: Annotated[str | None, "strength(s) of the penalty of ridge regression; default: 41 values, 1e-2 to 1e8"] = (
        None
    )
    protocol: Annotated[
        Literal["dinov2", "dinov3", "radiology", "medical", "chest"] | None,
        "train heads by SGD or AdamW as published; every deviation is listed",
    ] = None
    views: Annotated[
        int | None, "with --protocol: train on this many stored augmented views (featstore extract --views)"
    ] = None
    iterations: Annotated[int | None, "with --protocol: training steps in place of the published number"] = None
    lr: Annotated[str | None, "with --protocol: learning rate(s) in place of the published ones"] = None
    batch: Annotated[int | None, "with --protocol: rows of a training step in place of the published number"] = None
    optimizer: Annotated[
        Literal["sgd", "adamw"] | None, "with --protocol: in place of the published one; no weight decay"
    ] = None
    head_seed: Annotated[int | None, "with --protocol: seed of first weights and batches; default: 0"] = None

    def __post_init__(self) -> None:
        if self.standardize is None:
            object.__setattr__(self, "standardize", self.protocol is None)
        if self.C is not None:
            parse_numbers(self.C, "--C")
        if self.alpha is not None:
            parse_numbers(self.alpha, "--alpha")
        if self.lr is not None:
            parse_numbers(self.lr, "--lr")
        for name in ("views", "iterations", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}")
        if self.head_seed is not None and self.head_seed < 0:
            raise ConfigError(f"--head-seed must be 0 or more, got {self.head_seed}")
        if self.protocol is None:
            for name in ("views", "iterations", "lr", "batch", "optimizer", "head_seed"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"--{name.replace('_', '-')} belongs to --protocol, which trains step by step; without it the "
                        "optimum is solved for: leave it out, or name a protocol"
                    )
            return
        for flag, given, why in (
            ("--C", self.C is not None, "its heads have no penalty"),
            ("--alpha", self.alpha is not None, "its heads have no penalty"),
            ("--class-weight", self.class_weight != "none", "its loss has the weights that were published"),
            (
                "--refit",
                self.refit and self.protocol == "chest",
                "it keeps the epoch with the lowest loss on val, which a refit would train on",
            ),
            (
                "--views",
                self.views is not None and self.protocol == "medical",
                "the paper does not say that it augments",
            ),
        ):
            if given:
                raise ConfigError(f"{flag} has no place in --protocol {self.protocol}: {why}; leave it out")

    @property
    def grid(self) -> tuple[float, ...] | None:
        """The values asked for in ascending order, or None for the default."""
        return None if self.C is None else tuple(sorted(parse_numbers(self.C, "--C")))

    @property
    def alphas(self) -> tuple[float, ...] | None:
        """The values asked for in ascending order, or None for the default."""
        return None if self.alpha is None else tuple(sorted(parse_numbers(self.alpha, "--alpha")))

    @property
    def rates(self) -> tuple[float, ...] | None:
        """The learning rates asked for in ascending order, or None for the published ones."""
        return None if self.lr is None else tuple(sorted(set(parse_numbers(self.lr, "--lr"))))
