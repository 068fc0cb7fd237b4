"""Options of the commands as frozen dataclasses: a field is a flag, its annotation the help text.

They are validated when made, written whole into run files and records, and hold no environment.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from featstore.errors import ConfigError

Geometry = Literal["squash", "letterbox", "dino", "short", "spline", "hf"]
Fit = Literal["nearest", "floor", "tokens", "strict"]
Attention = Literal["sdpa", "eager", "xformers", "flash"]
Memory = Literal["auto", "resident", "stream", "shard"]
Compile = Literal["auto", "on", "off", "graphs"]
PosInterp = Literal["hf", "meta"]
Norm = Literal["final", "none"]
WeightDtype = Literal["same", "int8", "fp8"]
StoredDtype = Literal["float16", "float32", "bfloat16"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]

DicomMode = Literal["standard", "raw_minmax", "xrv"]
DecodeMode = Literal["full", "scaled"]
Frames = Literal["first", "all"]
Augmentation = Literal["dino", "radiology", "chest"]
WorkerType = Literal["thread", "process"]
Engine = Literal["local", "ray"]

TOKENS = ("cls", "mean_patch", "registers", "patches")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(text: str) -> int:
    """`100GB`, `1.5TB`, `500M` or a plain number, in decimal units.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if not match:
        raise ConfigError(f"--max-bytes must be a size such as 100GB or 1.5TB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


def parse_share(text: str) -> float:
    """`1%` or `0.01` as a share in [0, 1].

    Raises:
        ConfigError: anything else.
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"--max-failed must be a share such as 1% or 0.01, got {text!r}")
    return share


def parse_seconds(text: str) -> float:
    """`3h50m`, `90m`, `45s`, `1d12h`, `D-HH:MM:SS` or `HH:MM:SS` as Slurm has them, or plain seconds.

    Raises:
        ConfigError: anything else, or no time at all.
    """
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip().lower().replace(" ", ""))
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text.strip())
    parts = [int(part or 0) for part in (clock or found or re.match("()()()()", "")).groups()]  # type: ignore[union-attr]
    seconds = float(sum(part * unit for part, unit in zip(parts, (86400, 3600, 60, 1))))
    if not seconds:
        raise ConfigError(f"--time-budget is a time such as 3h50m, 90m, 3:50:00 or 600 (seconds), got {text!r}")
    return seconds


def parse_tokens(text: str) -> tuple[str, ...]:
    """Comma-separated token arrays in canonical order.

    Raises:
        ConfigError: an unknown or no name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in TOKENS]
    if unknown or not names:
        raise ConfigError(f"--tokens takes a comma-separated choice of {', '.join(TOKENS)}; got {text!r}")
    return tuple(name for name in TOKENS if name in names)


def parse_layers(text: str) -> tuple[int, ...]:
    """Comma-separated block numbers: 1 is the first block, -1 the last.

    Raises:
        ConfigError: something that is no block number.
    """
    try:
        layers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        layers = (0,)
    if 0 in layers:
        raise ConfigError(
            f"--layers takes block numbers such as 4,8,12 or -4,-1 (1 is the first, -1 the last), got {text!r}"
        )
    return layers


def parse_window(text: str | None) -> tuple[int, int] | None:
    """(size, stride) of a window in pixels: `512` or `512/256`; without a stride windows touch.

    Raises:
        ConfigError: anything else, or a stride beyond the size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,5})(?:/([1-9][0-9]{0,5}))?", text.strip())
    size, stride = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 0 < stride <= size:
        raise ConfigError(
            f"--window is a size in pixels such as 512, or 512/256 with a stride of at most the size; got {text!r}"
        )
    return size, stride


def parse_reduce(text: str) -> tuple[str, ...]:
    """Comma-separated reductions of patch tokens in the order in which they are done: pool, pca, int8.

    Raises:
        ConfigError: an unknown one, or two of one kind.
    """
    given = [step.strip() for step in text.split(",") if step.strip()]
    patterns = (r"pool[24]", r"pca:[1-9]\d*", r"int8")
    steps = [[step for step in given if re.fullmatch(pattern, step)] for pattern in patterns]
    if sum(map(len, steps)) < len(given):
        raise ConfigError(
            f"--reduce takes pool2 or pool4, pca:K (K components) and int8, comma-separated; got {text!r}"
        )
    if max(map(len, steps)) > 1:
        raise ConfigError(f"--reduce takes at most one pool, one pca:K and one int8; got {text!r}")
    return tuple(step for found in steps for step in found)


@dataclass(frozen=True, kw_only=True, slots=True)
class SetConfig:
    """What is computed: everything here can change the numbers of a set, or which arrays it has."""

    model: Annotated[
        str,
        "backbone name (`featstore models`), hub id, hf:DIR_OR_ID, or module:function; several (a,b,c) share one pass",
    ]
    res: Annotated[
        str | None,
        "input size in pixels: 512, or 384x512 (height x width), or several: 224,512; default: the model's native size",
    ] = None
    weights: Annotated[
        Path | None, "folder (config.json + weights), .safetensors, or Meta's .pth, to load instead of the hub's"
    ] = None
    revision: Annotated[str | None, "branch, tag or commit of the hub's weights; default: the newest"] = None
    random_weights: Annotated[
        int | None, "seed: fill the network with reproducible random weights instead of loading any"
    ] = None
    tokens: Annotated[str, "arrays to keep: cls, mean_patch, registers, patches"] = "cls,mean_patch"
    layers: Annotated[str, "also keep these blocks' tokens: 4,8,12 or -4,-1 (the last is -1)"] = ""
    norm: Annotated[
        Norm | None, "tokens after the network's final norm, or before it (none); default: as published for the model"
    ] = None
    pos_interp: Annotated[
        PosInterp | None,
        "resize learned positions as transformers (hf) or as Meta's code does; default: as the weights' own code",
    ] = None
    window: Annotated[
        str | None, "run the network over windows of this size and put their patches together: 512, or 512/256 (stride)"
    ] = None
    geometry: Annotated[
        Geometry,
        "squash: whole image to the size; letterbox: padded; dino: short side x256/224, crop; short: short side to the "
        "size, crop; hf: the checkpoint's processor; spline: stored values by scipy's zoom, as a paper has it",
    ] = "squash"
    fit: Annotated[
        Fit, "for sizes that the patch does not divide: nearest, floor, tokens (grid of patch 16), strict (refuse)"
    ] = "nearest"
    dtype: Annotated[StoredDtype, "stored type"] = "float16"
    reduce: Annotated[
        str, "make patch tokens smaller: pool2 or pool4 (cells of the grid), pca:K, int8; chained: pool2,int8"
    ] = ""
    compute_dtype: Annotated[
        ComputeDtype, "auto: bfloat16 on a GPU that has it, else float32; fixed when the set is created"
    ] = "auto"
    weight_dtype: Annotated[
        WeightDtype, "keep the matrices of the blocks in int8 or fp8, behind the precision gate; same: as they compute"
    ] = "same"
    min_cosine: Annotated[
        float | None,
        "lowest cosine to float32 that the precision gate accepts for any row; default: the gate's own thresholds",
    ] = None
    intensity: Annotated[
        str, "values to grey levels: native, minmax, percentile:1-99, window:40/400, ... (`featstore intensities`)"
    ] = "native"
    dicom_mode: Annotated[
        DicomMode, "DICOM: standard (modality LUT, window, MONOCHROME1), raw_minmax (stored values), xrv"
    ] = "standard"
    decode: Annotated[DecodeMode, "full, or scaled: large JPEGs at 1/2, 1/4, 1/8, at least twice the size asked"] = (
        "full"
    )
    published: Annotated[
        str | None, "intensity, geometry and normalisation as a paper has them (`featstore intensities` lists them)"
    ] = None
    views: Annotated[
        int, "also make this many augmented copies of every image, each a set of its own, for heads that train on them"
    ] = 0
    view: Annotated[int | None, "make this one of the augmented copies alone, counted from 1"] = None
    augment: Annotated[
        Augmentation | None,
        "what --views are: dino (crop of 8-100 %, mirrored or not; the default), radiology (crop of 75-100 %, mirrored "
        "or not), chest (mirrored or not, turned by up to 7 degrees); mirroring swaps left and right, which labels of "
        "a side do not follow",
    ] = None
    augment_seed: Annotated[int, "other copies for another number"] = 0
    name: Annotated[str | None, "model part of the set's name; default: the backbone's name"] = None
    block_rows: Annotated[int | None, "rows per commit (a power of two) of a new set; default: from size and cost"] = (
        None
    )

    def __post_init__(self) -> None:
        parse_tokens(self.tokens)
        parse_layers(self.layers)
        if parse_reduce(self.reduce) and "patches" not in parse_tokens(self.tokens):
            raise ConfigError(
                f"--reduce {self.reduce} makes patch tokens smaller, and --tokens {self.tokens} keeps none; "
                "add patches to --tokens, or leave --reduce out"
            )
        if self.weights is not None and self.random_weights is not None:
            raise ConfigError("--weights and --random-weights exclude each other; give one")
        if self.min_cosine is not None and not -1 <= self.min_cosine <= 1:
            raise ConfigError(f"--min-cosine must lie between -1 and 1, got {self.min_cosine}")
        parse_window(self.window)
        self._check_views()
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ConfigError(f"--name is letters, digits, '.', '_' and '-', got {self.name!r}")
        if self.block_rows is not None and (self.block_rows < 1 or self.block_rows & (self.block_rows - 1)):
            raise ConfigError(f"--block-rows must be a power of two (16, 256, 4096, ...), got {self.block_rows}")

    def _check_views(self) -> None:
        if self.views < 0 or self.augment_seed < 0:
            raise ConfigError(
                f"--views and --augment-seed must be at least 0, got {self.views} and {self.augment_seed}"
            )
        if self.view is not None and (self.views or self.view < 1):
            raise ConfigError(
                f"--view is the number of one augmented copy, from 1, without --views; got --view {self.view}"
                + (f" --views {self.views}" if self.views else "")
            )
        if not self.views and self.view is None:
            if self.augment is not None or self.augment_seed:
                raise ConfigError("--augment and --augment-seed say what the copies of --views are; add --views 4")
            return
        if any(step.startswith("pca") for step in parse_reduce(self.reduce)):
            raise ConfigError(
                "--views: principal components are fitted for each set, so that those of augmented copies have other "
                "axes; leave pca out of --reduce"
            )
        if self.augment is None:
            object.__setattr__(self, "augment", "dino")


def each_set(config: SetConfig) -> list[SetConfig]:
    """One configuration for every model and size of `--model a,b --res 224,512`, in that order.

    After each come those of its augmented copies where `--views` asks for them.

    Raises:
        ConfigError: a list with an empty or repeated item, or with an option that is one model's own.
    """
    models, sizes = config.model.split(","), config.res.split(",") if config.res is not None else [None]
    for option, items in (("--model", models), ("--res", sizes)):
        named = [item.strip() for item in items if item is not None]
        if len(named) != len(set(named)) or (len(named) > 1 and not all(named)):
            raise ConfigError(f"{option} {','.join(named)}: an item is empty or stands there twice; name each one once")
    if len(models) > 1:
        own = {"--weights": config.weights, "--name": config.name, "--revision": config.revision}
        given = [option for option, value in own.items() if value is not None]
        if given:
            raise ConfigError(
                f"{', '.join(given)} belongs to one model, and --model names {len(models)}; run that model by itself"
            )
    return [
        one
        for model in models
        for size in sizes
        for one in _with_views(replace(config, model=model.strip(), res=None if size is None else size.strip()))
    ]


def _with_views(config: SetConfig) -> list[SetConfig]:
    """The plain set and each of its augmented copies."""
    if not config.views:
        return [config]
    plain = replace(config, views=0, augment=None, augment_seed=0)
    return [plain, *(replace(config, views=0, view=number) for number in range(1, config.views + 1))]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How it is computed: nothing here changes what a set is."""

    device: Annotated[str, "auto, cpu, cuda or cuda:1"] = "auto"
    batch_size: Annotated[int | None, "images per forward pass; default: from --tokens-per-batch"] = None
    tokens_per_batch: Annotated[
        int | None, "tokens per forward pass, whatever the image size; default: by device, on a GPU by trial"
    ] = None
    workers: Annotated[int | None, "threads or processes that read and decode; default: one per core"] = None
    worker_type: Annotated[WorkerType, "thread, or process: survives a decoder that crashes or hangs"] = "thread"
    decoded_cache: Annotated[
        bool, "keep the resized images in the store, so that the next model at this size decodes nothing"
    ] = False
    stage: Annotated[
        Path | None,
        "folder on a local disk ($SLURM_TMPDIR): input files and weights are copied there and read from it, and blocks "
        "are written there before they go to the store",
    ] = None
    attention: Annotated[
        Attention, "attention kernel: sdpa (torch's own choice), xformers, flash (FlashAttention alone), or eager"
    ] = "sdpa"
    memory: Annotated[
        Memory, "weights whole on the device, streamed block by block, or sharded over the processes of torchrun"
    ] = "auto"
    compile: Annotated[Compile, "torch.compile: auto is on for GPUs; graphs adds CUDA graphs"] = "auto"
    max_bytes: Annotated[str, "stop and ask for --yes beyond this much new data"] = "100GB"
    max_failed: Annotated[
        str, "stop when more than this share of the set's images, earlier runs included, cannot be decoded: 1% or 0.01"
    ] = "100%"
    retry_failed: Annotated[bool, "compute blocks with failed images again"] = False
    dry_run: Annotated[
        bool, "say what would be done and stop; of weights' files whose digest is not known yet it is kept"
    ] = False
    yes: Annotated[bool, "go on beyond --max-bytes or the free space"] = False
    rank: Annotated[
        int | None, "number of this process among --world (jobs of a Slurm array); torchrun sets both by itself"
    ] = None
    world: Annotated[int | None, "number of processes that share the work; any number may finish it"] = None
    take_over: Annotated[
        bool, "when its own blocks are done, a process goes on with those that others have not come to, or are stuck on"
    ] = True
    patience: Annotated[float, "seconds after which a silent process's block is taken over"] = 120.0
    time_budget: Annotated[
        str | None,
        "end cleanly, with exit status 75 for a requeue, when this time is up: 3h50m; no block is begun that cannot be "
        "finished",
    ] = None
    log_json: Annotated[Path | None, "append progress, stage rates and results to this file, one JSON a line"] = None
    engine: Annotated[Engine, "local: this process, or those of torchrun; ray: actors on a Ray cluster"] = "local"
    address: Annotated[
        str | None, "--engine ray: address of a cluster (auto, ray://HOST:10001); default: one is started here"
    ] = None
    actors: Annotated[
        int | None, "--engine ray: actors that compute; default: one for each GPU of the cluster, else each two cores"
    ] = None

    def __post_init__(self) -> None:
        parse_bytes(self.max_bytes)
        if self.time_budget is not None:
            parse_seconds(self.time_budget)
        if self.log_json is not None and str(self.log_json) == "-":
            raise ConfigError("--log-json takes the name of a file; - is not one (results of --json go to the output)")
        if self.patience <= 0:
            raise ConfigError(f"--patience must be above 0 seconds, got {self.patience:g}")
        if self.actors is not None and self.actors < 1:
            raise ConfigError(f"--actors must be at least 1, got {self.actors}")
        if self.engine != "ray" and (self.address is not None or self.actors is not None):
            raise ConfigError("--address and --actors are for --engine ray; add that, or leave them out")
        if self.engine == "ray" and (self.rank is not None or self.memory == "shard"):
            raise ConfigError("--engine ray divides the work itself; leave out --rank, --world and --memory shard")
        parse_share(self.max_failed)
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise ConfigError(f"--tokens-per-batch must be at least 1, got {self.tokens_per_batch}")
        if self.tokens_per_batch is not None and self.batch_size is not None:
            raise ConfigError("--tokens-per-batch and --batch-size exclude each other; give one")
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers must be at least 1, got {self.workers}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"--device is auto, cpu, cuda or cuda:N, got {self.device!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisterConfig:
    """Where the samples of a data set come from."""

    adapter: Annotated[str | None, "family: chexpert, nih, folder, table, ...; default: from NAME and --table"] = None
    table: Annotated[Path | None, "CSV, TSV or Parquet with one row a sample, relative to ROOT or here"] = None
    path_column: Annotated[str, "column of image paths, relative to ROOT"] = "path"
    id_column: Annotated[str | None, "column of unique sample ids; default: the path"] = None
    label_columns: Annotated[str, "comma-separated label columns; they are the default task"] = ""
    group_column: Annotated[str | None, "column of patients; nothing with one group crosses splits"] = None
    study_column: Annotated[str | None, "column of studies"] = None
    split_column: Annotated[str | None, "column with train, val, test; default: split 70/10/20 by group, seeded"] = None
    mask_column: Annotated[str | None, "column of mask paths, relative to ROOT"] = None
    split_seed: Annotated[int, "seed of the split where the source has none"] = 0
    frames: Annotated[
        Frames | None,
        "table, folder: first picture of a file, or all of them as samples; default: all of a volume, else the first",
    ] = None
    option: Annotated[list[str], "an adapter's own choice, KEY=VALUE; repeatable (`featstore datasets NAME`)"] = field(
        default_factory=list
    )
    hash: Annotated[
        bool,
        "also hash every file now (reads all bytes): finds duplicates, and edits that left size and time as they were",
    ] = False
    allow_missing: Annotated[bool, "keep rows whose file is missing; extraction marks them failed"] = False

    def options(self, adapter: str) -> dict[str, Any]:
        """Keyword arguments for the adapter.

        Raises:
            ConfigError: an option of the table adapter is given to another one, or a seed where nothing is drawn.
        """
        own: dict[str, str | Path | None] = {
            "path_column": self.path_column if self.path_column != "path" else None,
            "id_column": self.id_column,
            "label_columns": self.label_columns or None,
            "group_column": self.group_column,
            "study_column": self.study_column,
            "split_column": self.split_column,
            "mask_column": self.mask_column,
            "table": self.table,
        }
        if adapter == "table":
            if self.table is None:
                raise ConfigError("the table adapter needs --table FILE (CSV, TSV or Parquet)")
            given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
            if self.split_seed and self.split_column:
                raise ConfigError("--split-seed and --split-column exclude each other: the column is the split")
            given["label_columns"] = tuple(name.strip() for name in self.label_columns.split(",") if name.strip())
            return {**given, "seed": self.split_seed, "frames": self.frames}
        foreign = [f"--{name.replace('_', '-')}" for name, value in own.items() if value is not None]
        if foreign:
            raise ConfigError(
                f"{', '.join(foreign)}: only the table adapter takes these, not {adapter!r}; add --adapter table"
            )
        if adapter == "folder":
            return {"seed": self.split_seed, "frames": self.frames}
        if self.frames:
            raise ConfigError(f"--frames {self.frames}: the adapter {adapter!r} knows its own samples; leave it out")
        if self.split_seed:
            raise ConfigError(f"--split-seed: the adapter {adapter!r} has a split of its own")
        return {}
