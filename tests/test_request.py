"""A request that is kept, rebuilt, and printed as the command that was typed."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from featstore.configs import SetConfig
from featstore.request import as_request, command_of, config_of, request_of

IDENTITY = {"preprocess": {"geometry": "dino"}, "stored_dtype": "float32", "compute_dtype": "float32"}
OLD = {
    "dataset": "cxr",
    "model": "mine",
    "resolution": "224",
    "weights": {"kind": "random", "seed": 3, "model": "dinov2-small"},
    "identity": IDENTITY,
}
EVERYTHING: dict[str, Any] = {
    "model": "hf:some/dir",
    "res": "384x512",
    "weights": Path("/w/a b"),
    "tokens": "cls,patches",
    "layers": "-4,-1",
    "geometry": "letterbox",
    "fit": "floor",
    "dtype": "float32",
    "compute_dtype": "bfloat16",
    "intensity": "windows:lung,mediastinum,bone",
    "dicom_mode": "raw_minmax",
    "decode": "scaled",
    "name": "mine",
    "block_rows": 512,
}


def spec_of(config: SetConfig, compute_dtype: str) -> dict[str, Any]:
    request = as_request(config, compute_dtype=compute_dtype)
    return {"dataset": "cxr", "model": "m", "weights": {"kind": "hub"}, "request": request}


@pytest.mark.parametrize(
    "config",
    [
        SetConfig(model="tiny"),
        SetConfig(**EVERYTHING),
        SetConfig(model="x", res="98"),
        SetConfig(model="tiny", published="xrv"),
    ],
)
def test_a_request_comes_back_as_it_was(config: SetConfig) -> None:
    spec = spec_of(config, "bfloat16")
    assert config_of(spec) == replace(config, compute_dtype="bfloat16")


def test_the_command_is_the_one_that_was_typed() -> None:
    typed = command_of(spec_of(SetConfig(**EVERYTHING), "bfloat16"))
    assert typed == (
        "featstore extract --dataset cxr --model hf:some/dir --res 384x512 --weights '/w/a b' --tokens cls,patches "
        "--layers=-4,-1 --geometry letterbox --fit floor --dtype float32 --compute-dtype bfloat16 "
        "--intensity windows:lung,mediastinum,bone --dicom-mode raw_minmax --decode scaled --name mine "
        "--block-rows 512"
    )
    assert "/w/a b" in shlex.split(typed)
    assert command_of(spec_of(SetConfig(model="tiny"), "auto")) == "featstore extract --dataset cxr --model tiny"


def test_intensities_are_quoted_for_the_shell() -> None:
    typed = command_of(spec_of(SetConfig(model="tiny", intensity="minmax + clahe"), "auto"))
    assert typed == "featstore extract --dataset cxr --model tiny --intensity 'minmax + clahe'"


def test_arrays_added_later_are_asked_for_too() -> None:
    spec = spec_of(SetConfig(model="tiny", random_weights=0), "float32")
    found = command_of(spec, ["cls", "mean_patch", "layers/11/cls", "layers/2/cls", "layers/2/patches"])
    assert found == (
        "featstore extract --dataset cxr --model tiny --random-weights 0 --tokens cls,mean_patch,patches --layers 2,11 "
        "--compute-dtype float32"
    )


def test_sets_made_before_requests_were_kept() -> None:
    assert config_of(OLD) == SetConfig(
        model="dinov2-small",
        res="224",
        random_weights=3,
        name="mine",
        geometry="dino",
        dtype="float32",
        compute_dtype="float32",
    )
    local = {**OLD, "model": "dinov2-small", "weights": {"kind": "local", "model": "dinov2-small"}}
    assert request_of(local)["weights"] == "PATH"
    assert "name" not in request_of(local)
    assert command_of({**OLD, "weights": {"kind": "imported"}}) == "featstore import FILE --dataset cxr --name mine"
