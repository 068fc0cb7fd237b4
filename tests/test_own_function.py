"""A user's own network: `module:function` as a backbone."""

import sys
from pathlib import Path

import pytest

from featstore.backbones import describe
from featstore.backbones.tokens import Backbone
from featstore.errors import ConfigError, UnknownNameError, WeightsError

OWN = """
import torch
from torch import nn
from featstore.backbones import describe
from featstore.backbones.tokens import Tokens

class Own(nn.Module):
    architecture = describe("tiny-random").architecture
    device, dtype = torch.device("cpu"), torch.float32
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    def forward(self, pixels, *, layers=()):
        raise AssertionError("not called here")

class Plain:
    architecture, device, dtype = Own.architecture, Own.device, Own.dtype
    def __call__(self, pixels, *, layers=()):
        raise AssertionError("not called here")

calls = []
def make(*, device, compute_dtype, attention):
    calls.append((device, compute_dtype, attention))
    return Own()
def changed(**options):
    own = Own()
    own.weight.data[1] = 2
    return own
def stated(**options):
    plain = Plain()
    plain.weights_digest = "v1"
    return plain
def plain(**options):
    return Plain()
def wrong(**options):
    return 3
number = 4
"""


def test_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_lab.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    source = describe("own_lab:make")
    assert source.name == "make"
    assert source.weights == {
        "kind": "function",
        "function": "own_lab:make",
        "digest": describe("own_lab:make").weights["digest"],
    }
    assert source.weights["digest"] != describe("own_lab:changed").weights["digest"]
    assert describe("own_lab:stated").weights["digest"] == "v1"
    backbone = source.load(device="cpu", compute_dtype="bfloat16", attention="eager")
    assert isinstance(backbone, Backbone)
    assert sys.modules["own_lab"].calls[-1] == ("cpu", "bfloat16", "eager")
    for model, error, message in (
        ("own_lab:absent", UnknownNameError, "cannot import 'own_lab:absent': .*PYTHONPATH"),
        ("no_such_lab:make", UnknownNameError, "cannot import 'no_such_lab:make': No module named"),
        ("own_lab:number", ConfigError, "'own_lab:number' names int, not a function"),
        ("own_lab:wrong", ConfigError, "'own_lab:wrong' returned int; it must return a backbone"),
        ("own_lab:plain", WeightsError, "weights of 'own_lab:plain' cannot be identified"),
    ):
        with pytest.raises(error, match=message):
            describe(model)


@pytest.mark.parametrize("options", [{"memory": "stream"}, {"weight_dtype": "int8"}, {"compile": "on"}])
def test_options_that_are_the_functions_own_business(
    options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_lab.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_lab", raising=False)
    with pytest.raises(ConfigError, match="'own_lab:make' loads its own network: --memory, --weight-dtype and --comp"):
        describe("own_lab:make").load(device="cpu", compute_dtype="float32", **options)
