"""Requests for tests of `probes finetune`: small pictures, a small network, few steps."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from featstore.store.catalog import Store
from probes.configs import SplitConfig, TaskConfig
from probes.finetune import Request, evaluate_finetune
from probes.finetune_config import (
    AugmentConfig,
    FinetuneData,
    ImagesConfig,
    MethodConfig,
    NetworkConfig,
    StepsConfig,
    TrialsConfig,
    WorkConfig,
)
from probes.finetune_presets import settle

GROUPS: tuple[type, ...] = (FinetuneData, NetworkConfig, ImagesConfig, TaskConfig, SplitConfig, WorkConfig)
TRAINING: tuple[type, ...] = (MethodConfig, StepsConfig, AugmentConfig, TrialsConfig)
QUICK: dict[str, Any] = {
    "dataset": "pics",
    "model": "tiny-random",
    "res": "42",
    "labels": "first,second",
    "resamples": 20,
    "device": "cpu",
    "workers": 1,
    "method": "linear-online",
    "lr": "1e-3",
    "epochs": 1,
    "batch": 12,
    "seeds": 1,
}


def request(**options: Any) -> Request:
    """A request from options by their names; those of `QUICK` unless others are given."""
    given = {**QUICK, **options}
    made: dict[type, Any] = {
        group: group(**{item.name: given.pop(item.name) for item in fields(group) if item.name in given})
        for group in (*GROUPS, *TRAINING)
    }
    assert given == {}
    settled = settle(made[MethodConfig], made[StepsConfig], made[AugmentConfig], made[TrialsConfig])
    data, network, images, reading, splits, work = (made[group] for group in GROUPS)
    return Request(
        data=data, settled=settled, network=network, images=images, reading=reading, splits=splits, work=work
    )


def evaluate(store: Path, *, stop: Any = None, **options: Any) -> list[dict[str, Any]]:
    """Records of a request."""
    return evaluate_finetune(Store(store), request(**options), stop=stop)
