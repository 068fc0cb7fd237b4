"""Named tasks, one file per kind of data: `TASKS` of every module here, the papers' and the official ones.

A task of a new data set is one entry in such a file, or in a new file.
"""

from importlib import import_module
from pkgutil import iter_modules

from probes.taskspec import TaskSpec

TASKS: dict[str, TaskSpec] = {}
for _module in sorted(module.name for module in iter_modules(__path__)):
    for _task in import_module(f"{__name__}.{_module}").TASKS:
        assert _task.name not in TASKS, f"two tasks are called {_task.name}"
        TASKS[_task.name] = _task
