"""`probes finetune`: the arms that a frozen probe is compared with, from the same manifest, task, splits and metrics.

A network is trained on images in the place of a head on features; everything behind the scores is what frozen probes
have: the record, its intervals, its thresholds, its count of how often the test split was opened.
"""

import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from featstore import files
from featstore.backbones.pooling import MEAN_ALL, parts_of
from featstore.configs import SetConfig
from featstore.errors import ConfigError, StoreError
from featstore.extraction.pipeline import choose_device
from featstore.extraction.plan import Plan, describe_backbone, make_plan
from featstore.extraction.stopping import Stop
from featstore.objects import Place, as_object
from featstore.store.catalog import Store
from featstore.store.hashes import RUNS, surveys_folder
from featstore.store.layout import set_name
from probes.configs import EvalConfig, SplitConfig, TaskConfig
from probes.cross import best_task, cross_task
from probes.crossval import with_summaries
from probes.evaluation import Job, check_together, keep_record, times_opened
from probes.finetune_arm import Arm
from probes.finetune_check import Foreseen, check_options, check_task, foresee
from probes.finetune_config import FinetuneData, ImagesConfig, NetworkConfig, WorkConfig, set_config
from probes.finetune_fit import Seeded, describe_augmentation, fit_arm, said_rate
from probes.finetune_presets import Settled
from probes.finetune_tasks import training_digest
from probes.folds import fold_specs
from probes.roles import SPLITS
from probes.scoring import score
from probes.tasks import Task, choose_task, make_task
from probes.taskspec import TaskSpec
from probes.tuning_images import ImageSet, make_image_task
from probes.tuning_ranks import Team

PROBE = "finetune"
Say = Callable[[str], None]
# A task on images, made with (images, spec, whether leaks are allowed, the splits that are used).
Make = Callable[[ImageSet, TaskSpec, bool, Sequence[str]], Task]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that was asked for."""

    data: FinetuneData
    settled: Settled
    network: NetworkConfig = field(default_factory=NetworkConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    reading: TaskConfig = field(default_factory=TaskConfig)
    splits: SplitConfig = field(default_factory=SplitConfig)
    work: WorkConfig = field(default_factory=WorkConfig)

    def __post_init__(self) -> None:
        if self.reading.policies:
            raise ConfigError("--policies compares training policies of frozen probes; give one --train-policy here")
        if self.splits.train_resamples is not None:
            raise ConfigError(
                "--train-resamples fits heads again at a fixed strength, and a network is not trained so many times; "
                "leave it out: --seeds repeats the training"
            )

    @property
    def published(self) -> str | None:
        """The images of the preset, unless flags say otherwise."""
        asked = self.images.published
        return self.settled.preset.images if asked is None else None if asked == "none" else asked

    @property
    def set_config(self) -> SetConfig:
        """The set that features of these images would stand in."""
        network = self.network
        if network.res is None and self.settled.preset.res is not None:
            network = replace(network, res=self.settled.preset.res)
        precision = self.settled.precision
        return set_config(self.data, network, self.images, published=self.published, precision=precision)  # type: ignore[arg-type]

    def deviations(self, plan: Plan) -> tuple[str, ...]:
        """What of the images is not the preset's."""
        preset = self.settled.preset
        found = list(plan.spec.get("published", {}).get("deviations", ()))
        if preset.images is not None and self.published != preset.images:
            found.append(f"--published {self.published or 'none'}; {preset.name} has {preset.images}")
        if preset.res is not None and self.network.res not in (None, preset.res):
            found.append(f"--res {self.network.res}; {preset.name} has {preset.res}")
        family = plan.source.architecture.family
        if preset.name == "lora-chest" and family == "vit" and self.settled.values.get("targets") is None:
            found.append("adapters of their own on query and value; published for this network: one on its fused qkv")
        if self.data.features is not None and preset.is_published:
            usual = features_of(self, plan, asked=None)
            if self.data.features != usual:
                found.append(f"--features {self.data.features}; {preset.name} has {usual}")
        return tuple(found)


def features_of(request: Request, plan: Plan, asked: str | None) -> str:
    """What the head reads: as asked, else the preset's, which a network without a CLS token may lack.

    Raises:
        ConfigError: the network has no such features.
    """
    preset, facts = request.settled.preset, plan.source.architecture
    usual = MEAN_ALL if preset.token_mean and facts.summary != "pool" else preset.features
    if preset.token_mean and not facts.family.startswith("dino"):
        usual = "cls"  # published: the heads of timm's own models
    found = asked or usual
    parts_of(found, facts)
    return found


def evaluate_finetune(
    store: Store, request: Request, *, stop: Stop | None = None, say: Say = lambda _: None
) -> list[dict[str, Any]]:
    """Train and evaluate one arm: a record for each seed (fold, other test data set), which are also on disk.

    Of several processes that torchrun started all train, and the first one writes and returns records.

    Raises:
        UnknownNameError: no such data set, task, policy, label or backbone. TaskError: a task that cannot be read,
            trained or scored. ConfigError: options that exclude each other, or a network that cannot train so.
        Stopped: asked to end; the same call goes on from the last checkpoint.
    """
    data = request.data
    check_together(EvalConfig(dataset=data.dataset, resamples=data.resamples), request.reading, request.splits)
    check_options(request.settled, request.work)
    source = describe_backbone(store, request.set_config)
    plan = make_plan(store, data.dataset, request.set_config, request.work.run, source)
    features = features_of(request, plan, data.features)
    foresee_request(store, request, plan)
    for note in plan.notes:
        say(note)
    team = Team(choose_device(request.work.device))
    try:
        return _evaluate(store, request, plan, features, team, stop)
    except BaseException as error:
        _let_go(error)
        raise
    finally:
        team.close()


def _let_go(error: BaseException | None) -> None:
    """Clear the frames that an error came through.

    They hold the network wrapped for a team: its end may wait for other processes, and has to come before the team's.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _evaluate(
    store: Store, request: Request, plan: Plan, features: str, team: Team, stop: Stop | None
) -> list[dict[str, Any]]:
    home = team.objects(_surveys_home(store, request) if team.writes else None)[0]

    def look(images: ImageSet, spec: TaskSpec, leak: bool, splits: Sequence[str]) -> Task:
        folder = surveys_folder(home, images.manifest.name)
        return make_image_task(images, spec, team, allow_leak=leak, stop=stop, folder=folder, splits=splits)

    tasks = _tasks(store, request, plan, look)
    folder = request.data.results or store.path / "results"
    opened = times_opened(folder)
    records = []
    for task in tasks:
        arm = _arm(store, request, plan, task, features=features, team=team, stop=stop)
        for made in fit_arm(arm, task):
            opened[task.test_key] += 1
            if team.writes:
                times = opened[task.test_key] + opened[task.digest]
                records.append(_keep(request, task, features, made, folder=folder, opened=times))
    if request.splits.crossed and team.writes:
        return _over_folds(records, folder, opened)
    return records


@dataclass(frozen=True)
class About:
    """What would be trained: lines for people, facts for machines."""

    lines: list[str]
    facts: dict[str, Any]


def foresee_request(store: Store, request: Request, plan: Plan) -> Foreseen:
    """What trains; no image is read, and no weights of listed networks.

    Raises:
        TaskError, ConfigError: what the data set, its labels or the network do not allow.
    """

    def read(images: ImageSet, spec: TaskSpec, leak: bool, splits: Sequence[str]) -> Task:
        return make_task(images, spec, allow_leak=leak, splits=splits)

    tasks = _tasks(store, request, plan, read)
    for task in tasks:
        check_task(request.settled, request.work, task)
    features = features_of(request, plan, request.data.features)
    outputs = len(tasks[0].labels)
    return foresee(plan.source, request.settled, request.work, features=features, outputs=outputs)


def describe(store: Store, request: Request, *, foreseen: bool = False) -> About:
    """What a request stands for: network, images, rates, seeds, runs, departures.

    Args:
        foreseen: build the network, empty, and say what trains; else nothing is built.

    Raises:
        FeatstoreError: the network or the data set is not known, or options contradict each other.
    """
    check_options(request.settled, request.work)
    source = describe_backbone(store, request.set_config)
    plan = make_plan(store, request.data.dataset, request.set_config, request.work.run, source)
    settled, values = request.settled, request.settled.values
    runs = len(settled.rates) + len(settled.seeds) - 1
    features = features_of(request, plan, request.data.features)
    deviations = [*settled.deviations, *request.deviations(plan)]
    facts: dict[str, Any] = {
        "set": f"{plan.manifest.name}/{set_name(plan.spec)}",
        "random_weights": source.random,
        "method": settled.method,
        "preset": settled.preset.name,
        "features": features,
        "rates": [said_rate(rate) for rate in settled.rates],
        "seeds": list(settled.seeds),
        "runs": runs,
        "options": settled.options(settled.train_seed),
        "augmentation": describe_augmentation(values),
        "deviations": deviations,
        "runs_folder": str(runs_folder(store.path, request)),
    }
    start = "from the linear probe of the frozen features" if values["start"] == "linear" else "at random"
    trains = []
    if foreseen:
        found = foresee_request(store, request, plan)
        facts |= {"trainable_parameters": found.trainable, "head_parameters": found.head, "notes": list(found.notes)}
        trains = [f"  {found.trainable:,} parameters train, {found.head:,} of them the head's"]
        trains += [f"  {note}" for note in found.notes]
    repeated = "".join(
        [
            f", then the best with {_counted(len(settled.seeds) - 1, 'more seed')}" * (len(settled.seeds) > 1),
            f", then {'each ' * (len(settled.seeds) > 1)}again on train + val" * bool(values["refit"]),
        ]
    )
    lines = [
        f"{facts['set']} ({'RANDOM WEIGHTS, ' if source.random else ''}{source.origin})",
        f"  {settled.method} ({settled.preset.name}), head on {features}, started {start}; "
        f"{values['optimizer']}, batch {values['batch']}, at most {values['epochs']} epochs; "
        f"augmentation: {facts['augmentation']}",
        f"  {_counted(runs, 'run')}: {'; '.join(facts['rates'])} with seed {settled.train_seed}{repeated}",
        *trains,
        f"  checkpoints and weights in {facts['runs_folder']}",
        *(f"  not as {settled.preset.name} has it: {text}" for text in deviations),
    ]
    return About(lines, facts)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def runs_folder(path: Place, request: Request) -> Path:
    """Where checkpoints and trained weights are kept.

    Raises:
        ConfigError: the store is a bucket, and no folder was given.
    """
    if request.work.runs is not None:
        return request.work.runs
    if as_object(path) is not None:
        raise ConfigError(f"checkpoints need a folder on a file system, and {path} is a bucket; give --runs FOLDER")
    return Path(str(path)) / RUNS


def _surveys_home(store: Store, request: Request) -> Place:
    """Whose `surveys_folder` takes what becomes of images: the store, which registers with it, wherever runs lie.

    A store that cannot be written (and is not asked to hold the runs) is told of no training: the folder of runs is.
    """
    if request.work.runs is None:
        return store.path
    trial = store.path / RUNS / f"trial-{uuid.uuid4().hex}"
    try:
        with files.writing(trial):
            files.make_folder(trial.parent)
        files.write_atomic(trial, b"")
        trial.unlink(missing_ok=True)
    except StoreError:
        return request.work.runs
    return store.path


def _tasks(store: Store, request: Request, plan: Plan, make: Make) -> list[Task]:
    """The task on images, once per fold or other test data set."""
    data, reading = request.data, request.reading
    labels = tuple(name.strip() for name in data.labels.split(",") if name.strip())
    spec = choose_task(plan.manifest, task=data.task, labels=labels, where=data.where, reading=reading)
    specs = fold_specs(plan.manifest, spec, request.splits)
    images = ImageSet(plan, request.work.run)
    made = [make(images, each, data.allow_leak, SPLITS) for each in specs]
    return [_tested_on(store, request, other, source, make) for other in reading.tests for source in made] or made


def _tested_on(store: Store, request: Request, other: tuple[str, str | None], source: Task, make: Make) -> Task:
    """The task with the test rows of another data set, whose images are prepared in the same way."""
    dataset, name = other
    assert isinstance(source.features, ImageSet)
    own = source.features.plan
    plan = make_plan(store, dataset, request.set_config, request.work.run, own.source)
    reading, chosen = replace(request.reading, train_policy=None), ""
    if name is None:
        spec, chosen = best_task(source, plan.manifest, reading)
    else:
        spec = choose_task(plan.manifest, task=name, reading=reading)
    # What its own training rows share with its test rows does not matter: they are not used.
    target = make(ImageSet(plan, request.work.run), spec, True, ("test",))
    return cross_task(source, target, store=store, allow_leak=request.data.allow_leak, chosen=chosen)


def _arm(
    store: Store, request: Request, plan: Plan, task: Task, *, features: str, team: Team, stop: Stop | None
) -> Arm:
    settled = replace(request.settled, deviations=(*request.settled.deviations, *request.deviations(plan)))
    options = {name: value for name, value in settled.options(0).items() if name not in ("train_seed", "seeds")}
    # Of another test data set nothing is seen in training: its runs are those of the task itself.
    cached = request.work.from_cache
    key = files.digest([plan.spec["fingerprint"], training_digest(task), features, cached, options])
    # No @, which stands between a model and its size where models are named.
    place = f"{set_name(plan.spec).replace('@', '-')}-{settled.method}-{key[:10]}"
    return Arm(
        source=plan.source,
        identity=plan.spec["identity"],
        settled=settled,
        features=features,
        work=request.work,
        team=team,
        root=runs_folder(store.path, request) / plan.manifest.name / place,
        stop=stop,
    )


def _keep(request: Request, task: Task, features: str, made: Seeded, *, folder: Place, opened: int) -> dict[str, Any]:
    data, fitted = request.data, made.fitted
    val = score(task, "val", fitted.val_scores, resamples=0, seed=data.seed)
    return keep_record(
        PROBE,
        Job(task, features, splits=request.splits),
        fitted,
        {
            "evaluation": data,
            "task": request.reading,
            "splits": request.splits,
            "head": request.settled.options(made.seed),
            "network": request.network,
            "images": request.images,
            "work": request.work,
        },
        metrics={"val": val, "test": {}},
        choices={"published": request.published},
        cost=lambda: made.cost,
        folder=folder,
        opened=opened,
    )


def _over_folds(records: list[dict[str, Any]], folder: Place, opened: Any) -> list[dict[str, Any]]:
    """The records of folds, and for every seed the one over all of them."""
    seeds = dict.fromkeys(record["config"]["head"]["train_seed"] for record in records)
    return [
        record
        for seed in seeds
        for record in with_summaries(
            [each for each in records if each["config"]["head"]["train_seed"] == seed], folder, opened
        )
    ]
