"""Compiled networks give the tokens of the plain ones; where nothing can be compiled the run goes on and says so."""

import shutil
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from featstore.backbones import describe
from featstore.backbones.compiling import Compilation, compilation_of, compile_blocks
from featstore.backbones.dinov2 import FAMILY
from featstore.errors import ConfigError

PIXELS = torch.randn(3, 3, 42, 56, generator=torch.Generator().manual_seed(0))


def tiny(compile: str = "off") -> Any:
    return describe("tiny").load(device="cpu", compute_dtype="float32", compile=compile)


def counting(calls: list[str]) -> Any:
    """In place of `torch.compile`: the function itself, its calls counted."""

    def fake(function: Any, **options: Any) -> Any:
        assert options == {"dynamic": False, "mode": None}

        def run(*args: Any, **keywords: Any) -> Any:
            calls.append("block")
            return function(*args, **keywords)

        return run

    return fake


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # inductor's own, when imported
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_tokens_are_those_of_the_network() -> None:
    torch.compiler.reset()
    plain, compiled = tiny(), tiny("on")
    for _ in range(2):  # hooks are new in every call
        a, b = plain(PIXELS, layers=(2,)), compiled(PIXELS, layers=(2,))
        for name in ("cls", "registers", "patches"):
            torch.testing.assert_close(getattr(b, name), getattr(a, name), rtol=0, atol=1e-5)
            torch.testing.assert_close(getattr(b.layers[2], name), getattr(a.layers[2], name), rtol=0, atol=1e-5)
    assert compilation_of(compiled) == Compilation("on")
    # One program serves all four blocks.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_every_block_is_compiled_and_hooks_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch, "compile", counting(calls))
    compiled = tiny("on")
    a, b = tiny()(PIXELS, layers=(1, -1)), compiled(PIXELS, layers=(1, -1))
    assert len(calls) == compiled.architecture.depth
    torch.testing.assert_close(b.layers[1].patches, a.layers[1].patches, rtol=0, atol=0)
    assert compilation_of(compiled).ran == "on"


def test_a_family_without_blocks_is_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch, "compile", counting(calls))
    from dataclasses import replace

    network = nn.Linear(3, 2)
    compile_blocks(network, replace(FAMILY, blocks=""), "on")
    assert network(torch.zeros(1, 3)).shape == (1, 2)
    assert calls == ["block"]


def test_a_compiler_that_fails_is_named_and_the_network_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    calls = []

    def fake(function: Any, **options: Any) -> Any:
        def run(*args: Any, **keywords: Any) -> Any:
            calls.append(1)
            raise TorchDynamoException("No working C++ compiler found\nlong story")

        return run

    monkeypatch.setattr(torch, "compile", fake)
    broken = tiny("on")
    for _ in range(2):
        torch.testing.assert_close(broken(PIXELS).cls, tiny()(PIXELS).cls, rtol=0, atol=0)
    found = compilation_of(broken)
    assert found.failure is not None
    assert "No working C++ compiler found" in found.failure
    assert "long story" not in found.failure
    assert (found.ran, len(calls)) == ("off", 1)


def test_errors_of_the_network_are_not_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(function: Any, **options: Any) -> Any:
        def run(*args: Any, **keywords: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    monkeypatch.setattr(torch, "compile", fake)
    with pytest.raises(torch.OutOfMemoryError):
        tiny("on")(PIXELS)


def test_cuda_graphs_need_cuda() -> None:
    with pytest.raises(ConfigError, match=r"--compile graphs records CUDA graphs, and the device is cpu"):
        tiny("graphs")
    with pytest.raises(ConfigError, match=r"compile must be on or graphs here; got 'off'"):
        compile_blocks(nn.Linear(1, 1), FAMILY, "off")


def test_graphs_keep_their_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    from featstore.backbones import compiling

    static = torch.zeros(2)

    def fake(function: Any, **options: Any) -> Any:
        assert options["mode"] == "reduce-overhead"
        return lambda value: (static.copy_(value), None)

    monkeypatch.setattr(torch, "compile", fake)
    forward = compiling._guarded(lambda value: value, Compilation("graphs"))
    first, second = forward(torch.ones(2))[0], forward(torch.full((2,), 2.0))[0]
    assert first.tolist() == [1, 1]
    assert second.tolist() == [2, 2]


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


def test_graphs_keep_outputs_of_every_kind() -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention

    from featstore.backbones.compiling import _copied

    static = torch.ones(2)
    hidden = (static, [static, {"a": static}], Pair(static, None), 3, "b")
    found = _copied(
        BaseModelOutputWithPoolingAndNoAttention(last_hidden_state=static, pooler_output=static, hidden_states=hidden)
    )
    static.zero_()
    assert isinstance(found, BaseModelOutputWithPoolingAndNoAttention)
    assert list(found) == ["last_hidden_state", "pooler_output", "hidden_states"]
    assert found.last_hidden_state.tolist() == found["pooler_output"].tolist() == [1, 1]
    first, items, pair, *rest = found.hidden_states
    assert [values.tolist() for values in (first, items[0], items[1]["a"], pair.first)] == [[1, 1]] * 4
    assert isinstance(items, list)
    assert isinstance(pair, Pair)
    assert [pair.second, *rest] == [None, 3, "b"]
    with pytest.raises(
        ConfigError, match=r"--compile graphs copies the outputs .* how to copy object; use --compile on"
    ):
        _copied({"a": object()})


def test_other_backbones_are_not_compiled() -> None:
    assert compilation_of(object()) == Compilation("off")
