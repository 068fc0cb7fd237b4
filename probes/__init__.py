"""probes: heads on cached embeddings, from the store and a manifest to a record.

```python
import featstore, probes
fs = featstore.open()["cxr", "tiny@98"]
task = probes.task(fs, labels=["Edema", "Effusion"])
X, y, mask, groups, ids = task.arrays("train", features="cls")
task.evaluate(scores)
```
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featstore.store.features import FeatureSet
    from probes.tasks import Task

# name -> function(task, features, config) -> Fitted
PROBES = {
    "knn": "probes.knn_fit:fit_knn",
    "linear": "probes.linear:fit_linear",
    "mlp": "probes.mlp:fit_mlp",
    "attentive": "probes.attentive:fit_attentive",
    "mil": "probes.mil:fit_mil",
}
# The same for what every probe must beat (see `probes.baselines`); `probes all` makes them.
BASELINES = {
    "baseline:chance": "probes.baselines:fit_chance",
    "baseline:majority": "probes.baselines:fit_majority",
    "baseline:metadata": "probes.baselines:fit_metadata",
}


def task(
    features: "FeatureSet",
    name: str | None = None,
    *,
    labels: Any = (),
    where: str = "",
    allow_leak: bool = False,
    **reading: Any,
) -> "Task":
    """A task on a set: by name, made of label columns, or the data set's default.

    `reading` are fields of `probes.configs.TaskConfig` that change how it is read: `train_policy`, `eval_policy`,
    `unit`, `pool`, `kind`, `classes`.

    Raises:
        TaskError, UnknownNameError: see `probes.tasks`.
    """
    from probes.configs import TaskConfig
    from probes.tasks import choose_task, make_task

    columns = (labels,) if isinstance(labels, str) else tuple(labels)
    spec = choose_task(features.manifest, task=name, labels=columns, where=where, reading=TaskConfig(**reading))
    return make_task(features, spec, allow_leak=allow_leak)
