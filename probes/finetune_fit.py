"""All runs of one arm on one task: rates tried with the first seed, the choice repeated with the others.

Every run has a folder of its own, so that the same request goes on where it was ended, and trains nothing twice.
"""

import io
import json
import logging
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from featstore import files
from featstore.backbones.digests import digest_files
from featstore.backbones.source import RANDOM_ENDING
from featstore.errors import ConfigError, CorruptError, TaskError
from featstore.pretraining import RUN_FACTS
from probes.finetune_arm import Arm, Rate
from probes.finetune_costs import COSTS, keep_cost, paying, read_before, seed_cost, spent_in_vain
from probes.finetune_memory import advised
from probes.finetune_presets import Settled
from probes.finetune_start import check_parity, linear_start
from probes.finetune_tasks import refit_task, trained_task
from probes.selection import Fitted
from probes.tasks import Task
from probes.tuning_cost import cost_notes, free_memory
from probes.tuning_hold import alone
from probes.tuning_images import kind_of
from probes.tuning_model import Tuned, make_head, start_head
from probes.tuning_recipe import Precision
from probes.tuning_run import MODEL, LinearStart, TuningOptions, TuningResult, finetune

START, PARITY = "start.npz", "parity.json"
FROZEN, PARITY_RUNS = "frozen-features", "parity"  # until the head's start is fitted, and the check is made

log = logging.getLogger(__name__)


class Seeded(NamedTuple):
    """One repetition: what evaluation scores, what it cost, where its weights are."""

    seed: int
    fitted: Fitted
    cost: dict[str, Any]
    weights: Path | None


def fit_arm(arm: Arm, task: Task) -> list[Seeded]:
    """Train every rate with the first seed, choose one on validation, and repeat it with the other seeds.

    Raises:
        TaskError: numbers or ranks, a split without both classes of any label, or a rate for which the loss left the
            finite numbers where there is no other.
        ConfigError: a network that cannot train so; bfloat16 that departs from float32.
        DeviceError: no memory for it; says what takes less.
        Stopped: asked to end; the same call goes on.
    """
    with advised(arm):
        return _fit_arm(arm, task)


def _fit_arm(arm: Arm, task: Task) -> list[Seeded]:
    kind_of(task)
    start, started = _start(arm, task) if arm.settled.values["start"] == "linear" else (None, {})
    options = TuningOptions(
        features=arm.features,
        start=start,
        cache=arm.root.parent / "activations" if arm.work.from_cache else None,
        cache_dtype="bfloat16" if arm.settled.precision == "bfloat16" else "float32",
        shard=arm.work.shard,
        export=False,
        score_test=False,
        processor=arm.source.processor,
    )
    rates, seeds = arm.settled.rates, arm.settled.seeds
    facts: dict[str, Any] = {"start": {"from": arm.settled.values["start"], **started}}
    if arm.settled.precision == "bfloat16":
        facts["parity"] = _parity(arm, task, start)
    first = _Trials(arm, task, options, seeds[0])
    for number, rate in enumerate(rates):
        first.run(rate, f"run {number + 1} of {len(rates) + len(seeds) - 1}")
    chosen = first.choose()
    made = [first.finish(chosen, facts)]
    for number, seed in enumerate(seeds[1:], start=len(rates) + 1):
        trials = _Trials(arm, task, options, seed)
        trials.run(chosen, f"run {number} of {len(rates) + len(seeds) - 1}")
        made.append(trials.finish(chosen, facts))
    return made


class _Trials:
    """The runs of one seed."""

    def __init__(self, arm: Arm, task: Task, options: TuningOptions, seed: int) -> None:
        self.arm, self.task, self.options, self.seed = arm, task, options, seed
        self.folder = arm.root / f"seed{seed}"
        self.tried: dict[Rate, TuningResult] = {}
        self.costs: list[dict[str, Any]] = []
        self.failed: dict[Rate, str] = {}

    def run(self, rate: Rate, said: str) -> None:
        """Train with a rate; one whose loss leaves the finite numbers is out, as long as there is another."""
        log.info("%s: %s, seed %d", said, said_rate(rate), self.seed)
        folder = self.folder / _name(rate)
        began = time.monotonic()
        try:
            self.tried[rate] = self._train(self.task, rate, folder, self.options)
        except TaskError as error:
            if "finite" not in str(error):
                raise
            self.failed[rate] = str(error)
            self.costs.append(spent_in_vain(time.monotonic() - began, self.arm.team))

    def _train(
        self, task: Task, rate: Rate, folder: Path, options: TuningOptions, stop_after: int | None = None
    ) -> TuningResult:
        arm = self.arm
        result = finetune(
            task,
            arm.adapted(self.seed),
            arm.recipe(rate, self.seed, stop_after),
            folder,
            options=options,
            team=arm.team,
            stop=arm.stop,
        )
        self.costs.append(keep_cost(result.cost, folder / COSTS, arm.team))
        free_memory(arm.team)
        return result

    def choose(self) -> Rate:
        """The rate that validation prefers, the smallest of equals.

        Raises:
            TaskError: none gave finite numbers.
        """
        if not self.tried:
            raise TaskError(f"at every rate {next(iter(self.failed.values()))}")
        return max(self.tried, key=lambda rate: (self._worth(rate), -rate[0], -(rate[1] or 0)))

    def _worth(self, rate: Rate) -> list[float]:
        """What validation says of a rate; where every run keeps its last epoch, the loss there."""
        progress = self.tried[rate].progress
        return [-progress.val_loss[progress.chosen - 1]] if self.arm.settled.values["keep"] == "last" else progress.best

    def finish(self, rate: Rate, facts: dict[str, Any]) -> Seeded:
        """The chosen run, its weights written; trained again on train and val where that is asked."""
        if rate not in self.tried:
            raise TaskError(f"with seed {self.seed}: {self.failed[rate]}")
        arm, chosen = self.arm, self.tried[rate]
        export = TuningOptions(
            **{
                name: getattr(self.options, name)
                for name in ("features", "start", "cache", "cache_dtype", "shard", "processor")
            }
        )
        refit = bool(arm.settled.values["refit"])
        if refit:
            log.info("training on train and val with %s, seed %d", said_rate(rate), self.seed)
            # In a recipe that refits the count of epochs is a setting; else validation has chosen it, with the rate.
            is_setting = arm.settled.preset.values.get("refit", False) and not arm.settled.values["patience"]
            stop_after = None if is_setting else chosen.progress.chosen
            final = self._refit(rate, export, stop_after)
        else:
            # The run is finished: its weights are read and written, nothing is trained.
            final = self._export(rate, export)
        # Absolute, so that the printed line holds wherever it is run.
        place = None if final.weights is None else str(final.weights.absolute())
        choices = self._choices(rate, chosen, final) | facts | {"weights": place}
        if refit:
            choices["refit_epochs"] = final.progress.epoch
        self._about(choices, self.folder / ("refit-" * refit + _name(rate)))
        # The first seed also pays for what comes before all runs: the head's start, the check of bfloat16.
        before = arm.before.values() if self.seed == arm.settled.seeds[0] else ()
        cost = seed_cost(self.costs, before, chosen.cost)
        notes = [*arm.notes, *chosen.notes, *self._notes(), *cost_notes(cost["trained_with"], final.asked)]
        notes = list(dict.fromkeys(notes))
        if refit:
            notes += [  # the first is that of every fold too
                "trained again on train and val with the rate that validation chose; val shows the run before that",
                f"on train and val it was trained for {final.progress.epoch} epochs",
            ]
        assert final.test_scores is not None
        fitted = Fitted(
            chosen.val_scores,
            final.test_scores,
            choices,
            final.num_trainable,
            tuple(notes),
        )
        return Seeded(self.seed, fitted, cost, final.weights)

    def _export(self, rate: Rate, export: TuningOptions) -> TuningResult:
        costs = list(self.costs)
        final = self._train(self.task, rate, self.folder / _name(rate), export)
        self.costs = costs  # loading is no training
        return final

    def _refit(self, rate: Rate, export: TuningOptions, stop_after: int | None) -> TuningResult:
        arm, held = self.arm, self.arm.settled
        values = {**held.values, "keep": "last", "patience": 0}
        arm.settled = Settled(**{**held.__dict__, "values": values})
        try:
            folder = self.folder / f"refit-{_name(rate)}"
            return self._train(refit_task(self.task), rate, folder, export, stop_after)
        finally:
            arm.settled = held

    def _choices(self, rate: Rate, chosen: TuningResult, final: TuningResult) -> dict[str, Any]:
        arm, values = self.arm, self.arm.settled.values
        rates, seeds = arm.settled.rates, arm.settled.seeds
        edge = len(rates) > 1 and _at_edge(rate, rates)
        epoch = chosen.progress.chosen
        return {
            "said": f"{said_rate(rate)}, epoch {epoch}" + ("*" if edge else ""),
            "method": arm.settled.method,
            "preset": arm.settled.preset.name,
            "lr": rate[0],
            "head_lr": rate[0] if rate[1] is None else rate[1],
            "epoch": epoch,
            "at_edge": edge,
            "tried": {said_rate(each): _tried(result) for each, result in self.tried.items()}
            | {said_rate(each): {"failed": why} for each, why in self.failed.items()},
            "rates_chosen_with_seed": seeds[0],
            "budget": {
                "configurations": len(rates),
                "seeds": len(seeds),
                "epochs": values["epochs"],
                "augmentation": describe_augmentation(values),
                "selection": "validation loss of the last epoch"
                if values["keep"] == "last"
                else f"validation {values['keep']}",
            },
            "training": final.settings,
            "history": chosen.history,
            "protocol_deviations": list(arm.settled.deviations),
        }

    def _notes(self) -> list[str]:
        notes = []
        if self.failed:
            notes.append(f"training left the finite numbers at {'; '.join(map(said_rate, self.failed))}")
        if self.seed != self.arm.settled.seeds[0]:
            notes.append(f"learning rates were chosen with seed {self.arm.settled.seeds[0]} for all seeds")
        return notes

    def _about(self, choices: dict[str, Any], folder: Path) -> None:
        """Beside the weights, what they are and which rows they have seen (`featstore.pretraining.runs_behind`)."""
        arm, source, values = self.arm, self.arm.source, self.arm.settled.values
        if not arm.team.writes:
            return
        task = trained_task(self.task)
        manifest, spec = task.features.manifest, task.features.spec
        before = {"random": source.random, "pretraining": spec["weights"].get("pretraining")}
        begun = f"{source.name.removesuffix(RANDOM_ENDING)}-{arm.settled.method}-seed{self.seed}"
        run = {
            "name": begun + ("-from-random-weights" if source.random else ""),
            "method": arm.settled.method,
            "preset": arm.settled.preset.name,
            "seed": self.seed,
            "changed": arm.settled.method != "linear-online",
            "refit": bool(values["refit"]),
            "dataset": manifest.name,
            "adapter": manifest.meta["adapter"],
            "manifest": manifest.digest,
            "fingerprint": spec["fingerprint"],
            "task": {"name": task.name, "digest": task.digest, "spec": task.spec.as_dict()},
            "started_from": before,
        }
        weights = folder / MODEL
        said = {
            "model": source.model,
            "digest": digest_files((weights,)) if weights.is_file() else None,
            "trained_on": [*source.weights.get("trained_on", []), run],
            "started_from": {**source.weights, "random": source.random},
            "identity": arm.identity,
            "features": arm.features,
            "labels": list(self.task.labels),
            "options": arm.settled.options(self.seed),
            "chosen": {name: choices[name] for name in ("lr", "head_lr", "epoch", "refit_epochs") if name in choices},
        }
        files.write_atomic(folder / RUN_FACTS, json.dumps(said, indent=1, default=str).encode())


def _tried(result: TuningResult) -> dict[str, Any]:
    progress = result.progress
    found: dict[str, Any] = {
        "epoch": progress.chosen,
        "epochs": progress.epoch,
        "val_loss": progress.val_loss[progress.chosen - 1],
    }
    if progress.val_quality:
        found["val_auroc"] = progress.val_quality[progress.chosen - 1]
    return found


def _at_edge(rate: Rate, rates: list[Rate]) -> bool:
    lrs, heads = {each[0] for each in rates}, {each[1] for each in rates if each[1] is not None}
    lr_edge = len(lrs) > 1 and rate[0] in (min(lrs), max(lrs))
    return lr_edge or (len(heads) > 1 and rate[1] in (min(heads), max(heads)))


def said_rate(rate: Rate) -> str:
    """`lr=1e-05`, with the head's where it has its own."""
    return f"lr={rate[0]:g}" + (f", head lr={rate[1]:g}" if rate[1] is not None else "")


def _name(rate: Rate) -> str:
    return f"lr{rate[0]:g}" + (f"-head{rate[1]:g}" if rate[1] is not None else "")


def describe_augmentation(values: dict[str, Any]) -> str:
    """What is done to training images, in words; `none` where nothing is."""
    parts = [f"mirrored ({values['flip']})"] if values["flip"] != "off" else []
    parts += [f"turned by up to {values['degrees']:g} degrees"] if values["degrees"] else []
    parts += [f"crops of {values['crop']} of the area"] if values["crop"] != "off" else []
    return ", ".join(parts) or "none"


def _start(arm: Arm, task: Task) -> tuple[LinearStart, dict[str, Any]]:
    """The linear probe that heads start from, kept for the runs that go on."""
    path = arm.root / START
    with alone(arm.root, arm.team, arm.stop):  # commands for other seeds need the same one
        if not arm.team.any([path.is_file()])[0]:
            _fit_start(arm, task, path)
    try:
        with np.load(io.BytesIO(path.read_bytes())) as held:
            arrays = {name: held[name] for name in ("weight", "bias", "mean", "scale")}
            facts = json.loads(str(held["facts"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CorruptError(f"{path} is damaged; remove it, and the head's start is fitted again") from error
    arm.before[START] = read_before(arm, START)
    return LinearStart(**arrays), facts


def _fit_start(arm: Arm, task: Task, path: Path) -> None:
    log.info("fitting the linear probe that the head starts from")
    values = arm.settled.values
    with paying(arm, START):  # beside the file, whose bytes are those of any other attempt
        start, facts = linear_start(
            task,
            arm.trainable(),
            arm.features,
            arm.team,
            batch=arm.work.micro or values["batch"],
            class_weight=values["class_weight"],
            folder=arm.root / FROZEN,
            stop=arm.stop,
        )
    free_memory(arm.team)
    if arm.team.writes:
        sink = io.BytesIO()
        arrays = {"weight": start.weight, "bias": start.bias, "mean": start.mean, "scale": start.scale}
        held = {name: np.asarray(value) for name, value in arrays.items()}
        np.savez(sink, allow_pickle=False, facts=np.array(json.dumps(facts)), **held)
        files.write_atomic(path, sink.getvalue())
        shutil.rmtree(arm.root / FROZEN, ignore_errors=True)
    arm.team.wait()


def _parity(arm: Arm, task: Task, start: LinearStart | None) -> dict[str, Any]:
    """That bfloat16 gives what float32 gives; once for an arm."""
    path = arm.root / PARITY
    with alone(arm.root, arm.team, arm.stop):  # commands for other seeds need the same one
        if not arm.team.any([path.is_file()])[0]:
            _check_parity(arm, task, start, path)
    found: dict[str, Any] = files.unseal(path.read_bytes(), path)
    arm.before[PARITY] = read_before(arm, PARITY)
    return found


def _check_parity(arm: Arm, task: Task, start: LinearStart | None, path: Path) -> None:
    log.info("checking bfloat16 against float32")
    rate = arm.settled.rates[-1]

    def make(precision: Precision) -> Tuned:
        adapted = arm.adapted(arm.settled.train_seed)
        head = make_head(adapted, arm.features, len(task.labels), arm.settled.train_seed)
        if start is not None:
            start_head(head, start.weight, start.bias, start.mean, start.scale)
        return Tuned(adapted, arm.features, head, precision)

    recipe, folder = arm.recipe(rate, arm.settled.train_seed), arm.root / PARITY_RUNS
    with paying(arm, PARITY):
        try:
            facts = check_parity(task, make, recipe, folder, arm.team, shard=arm.work.shard, stop=arm.stop)
        except ConfigError:
            if arm.team.writes:  # with other versions it may come out otherwise
                shutil.rmtree(folder, ignore_errors=True)
            raise
    facts["lr"] = rate[0]
    if arm.team.writes:
        files.write_atomic(path, files.sealed(facts))
        shutil.rmtree(folder, ignore_errors=True)
    arm.team.wait()
