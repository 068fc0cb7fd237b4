"""Small fine-tuning runs for tests: pictures whose brightness tells the class, a small network, a folder a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pictures import register_pictures

from featstore.backbones.trainable import make_trainable
from featstore.configs import RunConfig, SetConfig
from featstore.extraction.plan import make_plan
from featstore.extraction.stopping import Stop
from featstore.store.catalog import Store
from probes.adapters import Adapted, adapt
from probes.adapters_config import AdapterConfig
from probes.tasks import Task
from probes.taskspec import TaskSpec
from probes.tuning_images import ImageSet, make_image_task
from probes.tuning_recipe import Optimisation, TuningRecipe
from probes.tuning_run import TuningOptions, TuningResult, finetune

RUN = RunConfig(workers=2, device="cpu")
LABELS = TaskSpec(name="labels", labels=("first", "second"))
FEATURES = "cls+mean_patch"
FAST = TuningRecipe(epochs=2, batch=8, optimisation=Optimisation(lr=1e-4, head_lr=1e-2))


class After(Stop):
    """Asked to end at the n-th look."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    @property
    def asked(self) -> bool:
        self.left -= 1
        if self.left < 0:
            self.ask("stopped by the test", 75)
        return bool(self.reason)


def pictures(path: Path, count: int = 48, *, store: str = "store") -> Path:
    """A store with `count` pictures in the data set `pics`; returns its path."""
    if not (path / store).is_dir():
        register_pictures(path / store, path / "pics", count)
    return path / store


def image_set(
    store: Path, *, cache: bool = False, model: str = "tiny-random", res: str = "42", random: bool = False, **run: Any
) -> ImageSet:
    config = SetConfig(model=model, res=res, compute_dtype="float32", random_weights=0 if random else None)
    how = replace(RUN, decoded_cache=cache, **run)
    return ImageSet(make_plan(Store(store), "pics", config, how), how)


def task_of(store: Path, spec: TaskSpec = LABELS, **options: Any) -> Task:
    return make_image_task(image_set(store, **options), spec)


def adapted_of(task: Task, method: str = "full", *, features: str = FEATURES, **settings: Any) -> Adapted:

    images = task.features
    assert isinstance(images, ImageSet)
    backbone = images.plan.source.load(device="cpu", compute_dtype="float32")
    return adapt(make_trainable(backbone), method, AdapterConfig(**settings), features=features)


def tune(
    task: Task,
    folder: Path,
    recipe: TuningRecipe = FAST,
    *,
    method: str = "full",
    settings: dict[str, Any] | None = None,
    stop: Any = None,
    **options: Any,
) -> tuple[TuningResult, Adapted]:
    torch.manual_seed(123)  # nothing may depend on what was drawn before
    options = {"features": FEATURES, "export": False, **options}
    adapted = adapted_of(task, method, features=options["features"], **(settings or {}))
    result = finetune(task, adapted, recipe, folder, options=TuningOptions(**options), stop=stop)
    return result, adapted


def weights_of(adapted: Adapted) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in adapted.live_state().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
