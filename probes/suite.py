"""`probes all`: every probe on every set and feature of a data set in one pass, beside its baselines.

Each feature matrix is read from the store once and shared by all probes. What is there already with equal rows, task,
features, options and implementation is taken as it is: a run that was stopped goes on, and one that has nothing to do
neither fits nor reads features, nor imports what would.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby
from pkgutil import resolve_name
from typing import Any, get_type_hints

import numpy as np

from featstore import files
from featstore.errors import ConfigError, IncompleteError, TaskError, UnknownNameError
from featstore.objects import Place
from featstore.request import command_of
from featstore.store.catalog import Entry, Store
from featstore.store.features import FeatureSet
from probes import BASELINES, PROBES
from probes.answers import Answer, find, keep
from probes.baselines import METADATA, BaselineConfig, baseline_task, choose_columns, columns_for
from probes.configs import EvalConfig, TaskConfig
from probes.evaluation import Job, evaluate_one, times_opened
from probes.labels import label_columns
from probes.sets import PATCHES, choose_features, complete_sets, with_token_mean
from probes.suite_config import SuiteConfig
from probes.tasks import Task, choose_task, make_task
from probes.taskspec import TaskSpec

# Options of a probe where they are not those of its fit function, which is imported only if it must be.
CONFIGS = {
    "knn": "probes.configs:KnnConfig",
    "linear": "probes.configs:LinearConfig",
    "fewshot": "probes.fewshot_config:FewShotConfig",
    "mlp": "probes.trained_config:MlpConfig",
    "attentive": "probes.trained_config:AttentiveConfig",
    "mil": "probes.trained_config:MilConfig",
}
# Raised where a probe, or the reading of tasks, gives other numbers for the same options; 1 where nothing is said.
IMPLEMENTATION: dict[str, int] = {"tasks": 2, **dict.fromkeys(CONFIGS, 1)}
# Options that say which sets and features there are, not what is computed of one.
SELECTION = ("model", "features", "manifest", "results")
NUMBERS = {"fewshot": "few-shot curves are of labels and classes, not of numbers and ranks"} | {
    probe: f"probes {probe} trains heads of labels and classes, not of numbers and ranks"
    for probe in ("mlp", "attentive", "mil")
}
IMAGES = "probes mil is of bags, and the task counts images; --unit volume, study or patient says what a bag is"
AVERAGED = "probes attentive reads the patches of images; --pool features averages images before a head sees them"
NO_METADATA = "no column of age, sex or view that is no label: no metadata baseline; name columns with --metadata"


@dataclass(frozen=True, slots=True)
class Question:
    """One record that is wanted, and what its numbers follow from."""

    source: FeatureSet
    features: str
    probe: str
    head: Any
    asked: dict[str, Any]


@dataclass(slots=True)
class Suite:
    """What one pass has: records in the order of the plan, why some are not there, and how many were made now."""

    records: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    num_made: int = 0

    @property
    def num_kept(self) -> int:
        """Records that were there already."""
        return len(self.records) - self.num_made


Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


def evaluate_all(
    store: Store,
    config: EvalConfig,
    suite: SuiteConfig,
    *,
    reading: TaskConfig | None = None,
    progress: Progress | None = None,
) -> Suite:
    """Run or reuse every probe on every chosen set and feature, then the baselines.

    A probe that cannot be fitted is named in `failed`, and the others go on.

    Raises:
        UnknownNameError: no such data set, set, task, policy, label or column. IncompleteError: no chosen set is
            complete. TaskError: the task cannot be read. ConfigError: an option of single probes.
    """
    reading = reading or TaskConfig()
    _check(config, reading)
    manifest = store.manifest(config.dataset, config.manifest)
    labels = tuple(name.strip() for name in config.labels.split(",") if name.strip())
    spec = choose_task(manifest, task=config.task, labels=labels, where=config.where, reading=reading)
    if suite.columns:  # before anything is fitted
        choose_columns(manifest, list(label_columns(spec)), suite.columns)
    sets = with_token_mean(_with_random(store, config), config.features)
    folder = config.results or store.path / "results"
    found = Suite()
    plan = list(_plan(sets, spec, config, suite, reading, found.notes))
    with progress(len(plan)) if progress else nullcontext(lambda _: None) as advance:
        return _Pass(config, suite, reading, spec, folder, advance, found).run(plan)


def _check(config: EvalConfig, reading: TaskConfig) -> None:
    for flag, given in (
        ("--policies", reading.policies),
        ("--test-dataset", reading.test_dataset),
        ("--choose-features", getattr(config, "choose_features", False)),
    ):
        if given:
            raise ConfigError(f"{flag} belongs to `probes linear` and `probes knn`; `probes all` has one task a run")


def _with_random(store: Store, config: EvalConfig) -> list[FeatureSet]:
    """The chosen sets, and where some are chosen by name also those of the data set with random weights."""
    sets = complete_sets(store, config)
    if config.model is None:
        return sets
    known = {found.fingerprint for found in sets}
    for entry in store.find(config.dataset):
        if entry.spec["random_weights"] and entry.spec["fingerprint"] not in known:
            name = entry.full_name.partition("/")[2]
            try:
                sets += complete_sets(store, replace(config, model=name))
            except IncompleteError:
                continue  # a network at random nobody asked for by name
    return sets


def head_of(probe: str, suite: SuiteConfig) -> Any:
    """The options that a probe has in one pass."""
    if probe == "fewshot":
        return resolve_name(CONFIGS[probe])(**suite.budgets)
    if probe in BASELINES:
        return BaselineConfig()
    if probe in CONFIGS:
        return resolve_name(CONFIGS[probe])()
    return get_type_hints(resolve_name(PROBES[probe]))["config"]()


def _plan(
    sets: Sequence[FeatureSet],
    spec: TaskSpec,
    config: EvalConfig,
    suite: SuiteConfig,
    reading: TaskConfig,
    notes: dict[str, None],
) -> Iterator[Question]:
    """Every record wanted: set by set, features by features, probe by probe; the baselines last.

    `notes` gets why a probe has no record of a set.
    """
    heads = {probe: head_of(probe, suite) for probe in (*suite.names, *BASELINES)}
    rows = {found.fingerprint: found.ok for found in sets}

    def question(source: FeatureSet, features: str, probe: str) -> Question:
        asked = {
            "rows": files.digest(np.packbits(rows[source.fingerprint]).tobytes()),
            "manifest": source.manifest.digest,
            "task": files.digest([spec.as_dict(), IMPLEMENTATION["tasks"]]),
            "reading": asdict(reading),
            "evaluation": _counting(config, probe),
            "probe": probe,
            "implementation": IMPLEMENTATION.get(probe, 1),
            "head": asdict(heads[probe]),
        }
        if probe == METADATA:
            asked["columns"] = None if suite.columns is None else list(suite.columns)
        if probe not in BASELINES:
            asked |= {"fingerprint": source.fingerprint, "features": features}
        # As JSON has it: a tuple is a list.
        return Question(source, features, probe, heads[probe], asked)

    for source in sets:
        wanted = {probe: _features(source, probe, heads[probe], spec, config, notes) for probe in suite.names}
        for features in dict.fromkeys(name for names in wanted.values() for name in names):
            for probe in suite.names:
                if features in wanted[probe]:
                    yield question(source, features, probe)
    whole = max(sets, key=lambda found: (int(rows[found.fingerprint].sum()), found.fingerprint))
    for probe in BASELINES:
        if probe != METADATA or suite.columns != ():
            yield question(whole, "", probe)


def _features(
    source: FeatureSet, probe: str, head: Any, spec: TaskSpec, config: EvalConfig, notes: dict[str, None]
) -> list[str]:
    """What a probe reads of a set: patches where it pools them itself, else vectors; nothing, and why, where it cannot.

    Of `--features` each probe takes those that it can read.
    """
    asked = choose_features(source, config.features)
    patches = [name for name in asked if name.rsplit("/", 1)[-1] == PATCHES]
    if probe == "mil" and spec.unit == "image":
        notes[IMAGES] = None
        return []
    if probe != "attentive":
        return [name for name in asked if name not in patches] or asked
    if spec.unit != "image" and spec.pool == "features":
        notes[AVERAGED] = None
        return []
    names = patches or choose_features(source, None, head)
    there = [name for name in names if name in source.arrays]
    for name in names:
        if name not in there:
            line = command_of(source.spec, {*source.arrays, name})
            notes[f"probes attentive: {source.name} has no {name}; run\n  {line}"] = None
    return there


def _counting(config: EvalConfig, probe: str) -> dict[str, Any]:
    """Options of the evaluation that a record's numbers can depend on; curves have bands of their draws alone."""
    without = (*SELECTION, "resamples") if probe == "fewshot" else SELECTION
    return {item.name: getattr(config, item.name) for item in fields(config) if item.name not in without}


@dataclass
class _Pass:
    """One run over a plan."""

    config: EvalConfig
    suite: SuiteConfig
    reading: TaskConfig
    spec: TaskSpec
    folder: Place
    advance: Callable[[int], None]
    found: Suite
    opened: Counter[str] | None = None

    def run(self, plan: list[Question]) -> Suite:
        """Answer every question, from what is kept where it is."""
        for _, group in groupby(plan, key=lambda question: question.source.fingerprint):
            questions = list(group)
            kept = [None if self.suite.again else find(self.folder, question.asked) for question in questions]
            task: Task | None = None  # of this set alone: it holds the features in memory
            for question, answer in zip(questions, kept):
                if not all(kept):
                    task = task or make_task(question.source, self.spec, allow_leak=self.config.allow_leak)
                    if answer is not None and answer.task != task.digest:
                        answer = None
                self._take(question, answer, task)
                self.advance(1)
        return self.found

    def _take(self, question: Question, answer: Answer | None, task: Task | None) -> None:
        if answer is None:
            assert task is not None
            try:
                answer = self._made(question, task)
            except (TaskError, ConfigError, IncompleteError, UnknownNameError) as error:
                self.found.failed.append(f"{question.probe} on {question.source.name} · {question.features}: {error}")
                return
            keep(self.folder, question.asked, answer)
            self.found.num_made += answer.record is not None
        if answer.record is None:
            self.found.notes[answer.why] = None
        else:
            self.found.records.append(answer.record)

    def _made(self, question: Question, task: Task) -> Answer:
        """Fit, score and keep one record, or say why there is none."""
        probe, head = question.probe, question.head
        if probe in NUMBERS and task.kind in ("regression", "ordinal"):
            return Answer(task.digest, None, NUMBERS[probe])
        if probe in BASELINES:
            columns = columns_for(task, self.suite.columns) if probe == METADATA else ()
            if probe == METADATA and not columns:
                return Answer(task.digest, None, NO_METADATA)
            job = Job(baseline_task(task, probe, columns), ", ".join(columns))
            head = BaselineConfig(columns=columns)
        else:
            job = Job(task, question.features)
        if self.opened is None:
            self.opened = times_opened(self.folder)
        times = self.opened[task.test_key] + self.opened[task.digest] + 1
        if probe == "fewshot":
            record = self._curve(task, question, times)
        else:
            record = evaluate_one(probe, job, self.config, head, reading=self.reading, folder=self.folder, opened=times)
        self.opened[task.test_key] += 1
        return Answer(task.digest, record)

    def _curve(self, task: Task, question: Question, times: int) -> dict[str, Any]:
        from probes import fewshot  # which imports torch
        from probes.fewshot_config import FewShotData

        shared = {item.name for item in fields(FewShotData)}
        data = FewShotData(**{key: getattr(self.config, key) for key in shared if hasattr(self.config, key)})
        return fewshot.record_curve(
            task, question.features, data, question.head, reading=self.reading, folder=self.folder, opened=times
        )


def random_twins(store: Store, dataset: str) -> list[Entry]:
    """Sets of trained networks to make with random weights, where the data set has none with random weights at all."""
    entries = store.find(dataset)
    if any(entry.spec["random_weights"] for entry in entries):
        return []
    return [entry for entry in entries if entry.spec["weights"]["kind"] not in ("imported", "function")]


def random_command(entry: Entry) -> str:
    """The command line that makes a set with the same network, all its weights drawn at random."""
    from featstore.request import request_of

    request = {key: value for key, value in request_of(entry.spec).items() if key not in ("weights", "name")}
    return command_of({**entry.spec, "request": {**request, "random_weights": 0}})


def missing_random(store: Store, dataset: str) -> list[str]:
    """What to say where no set of the data set has random weights; empty where one has."""
    twins = random_twins(store, dataset)
    if twins:
        lines = "".join(f"\n  {random_command(entry)}" for entry in twins)
        return [f"no set with random weights to compare with; --extract makes it, or run{lines}"]
    if any(entry.spec["random_weights"] for entry in store.find(dataset)):
        return []
    return ["no set with random weights to compare with, and imported features name no network to make one of"]
