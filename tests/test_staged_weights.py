"""Weights on a local disk: copied once, whole or not at all, the same network; a full disk only costs time."""

import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from featstore.backbones import BackboneSource, describe
from featstore.backbones.source import FileLoader
from featstore.backbones.tiny import FOLDER as TINY_FOLDER
from featstore.configs import RunConfig
from featstore.errors import WeightsError
from featstore.extraction import staged_weights
from featstore.extraction.backbone import load_for_set
from featstore.extraction.staged_weights import staged

IDENTITY = {"compute_dtype": "float32"}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The tiny network in two shards, on the disk that is far away."""
    folder = tmp_path / "far"
    shutil.copytree(TINY_FOLDER, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-{n}-of-2.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {index}}}'.replace("'", '"'))
    return folder


def source_of(weights: Path) -> BackboneSource:
    return describe("tiny", weights=weights)


def files_of(source: BackboneSource) -> tuple[Path, ...]:
    assert isinstance(source.loader, FileLoader)
    return source.loader.files


def tokens_of(source: BackboneSource, run: RunConfig) -> torch.Tensor:
    images = torch.linspace(-1, 1, 3 * 42 * 42).reshape(1, 3, 42, 42)
    backbone = load_for_set(source, IDENTITY, run, "cpu")
    with torch.inference_mode():
        return backbone(images, layers=()).patches


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_the_network_is_the_same_and_read_from_the_stage(weights: Path, tmp_path: Path, memory: Any) -> None:
    source = source_of(weights)
    run = RunConfig(memory=memory, stage=tmp_path / "stage")
    expected = tokens_of(source, replace(run, stage=None))
    assert torch.equal(tokens_of(source, run), expected)
    moved = staged(source, tmp_path / "stage")
    assert moved.identity == source.identity
    assert (moved.weights, moved.origin, moved.name) == (source.weights, source.origin, source.name)
    for file in weights.glob("*.safetensors"):
        file.write_bytes(b"nothing of this is read any more")
    assert torch.equal(tokens_of(source, run), expected)


def test_each_file_is_copied_once(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, copied = source_of(weights), []
    real = staged_weights._copy
    monkeypatch.setattr(staged_weights, "_copy", lambda *paths: (copied.append(paths), real(*paths))[1])
    first, second = staged(source, tmp_path / "stage"), staged(source, tmp_path / "stage")
    assert files_of(first) == files_of(second)
    assert len(copied) == 2
    for copy, file in zip(files_of(first), files_of(source)):
        assert copy.read_bytes() == file.read_bytes()
        assert (tmp_path / "stage" / "weights") in copy.parents
    assert (tmp_path / "stage" / "weights").stat().st_mode & 0o077 == 0


def test_other_weights_of_the_same_path_are_other_copies(weights: Path, tmp_path: Path) -> None:
    before = staged(source_of(weights), tmp_path / "stage")
    file, _ = sorted(weights.glob("*.safetensors"))
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    after = staged(source_of(weights), tmp_path / "stage")
    assert files_of(after)[0].parent != files_of(before)[0].parent
    assert files_of(after)[0].read_bytes() == file.read_bytes()


@pytest.mark.parametrize("what", ["other bytes", "shorter", "gone"])
def test_a_damaged_copy_is_made_again(
    weights: Path, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_of(weights)
    copy = files_of(staged(source, tmp_path / "stage"))[1]
    data = copy.read_bytes()
    copy.unlink()
    if what != "gone":
        copy.write_bytes(data[::-1] if what == "other bytes" else data[:-1])
    assert files_of(staged(source, tmp_path / "stage"))[1] == copy
    assert copy.read_bytes() == data
    assert ("was damaged; it is copied again" in caplog.text) == (what != "gone")
    assert [path.name for path in copy.parents[1].iterdir() if path.is_dir()] == [copy.parent.name]


def test_random_weights_and_functions_have_nothing_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "staged_lab.py").write_text(
        "from featstore.backbones import describe\n"
        "def make(device, compute_dtype, attention):\n"
        '    network = describe("tiny-random").load(device=device, compute_dtype=compute_dtype)\n'
        '    network.weights_digest = "mine"\n'
        "    return network\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for source in (describe("tiny-random"), describe("staged_lab:make")):
        assert staged(source, tmp_path / "stage") is source
    assert staged(describe("tiny"), None).loader == describe("tiny").loader
    assert not (tmp_path / "stage").exists()


def test_bytes_that_are_not_those_of_the_digest_are_refused(weights: Path, tmp_path: Path) -> None:
    source = source_of(weights)
    file = files_of(source)[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsError, match="is what they are known by; they were changed or are damaged: fetch"):
        staged(source, tmp_path / "stage")
    assert list((tmp_path / "stage" / "weights").iterdir()) == []


class Facts:
    f_bavail, f_frsize = 1, 4096


@pytest.mark.parametrize("how", ["told", "refused", "unmade"])
def test_a_full_stage_is_said_and_the_original_read(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    def refuse(_: int) -> None:
        raise OSError(28, os.strerror(28))

    stage = tmp_path / "stage"
    if how == "told":
        monkeypatch.setattr(os, "statvfs", lambda _: Facts)
    elif how == "refused":
        monkeypatch.setattr(os, "fsync", refuse)
    else:
        stage.write_bytes(b"")
    source = source_of(weights)
    with caplog.at_level(logging.WARNING):
        assert staged(source, stage) is source
    why = "File exists" if how == "unmade" else "No space left on device"
    assert caplog.messages == [f"--stage {stage}: weights are read from {source.origin} ({why})"]
    assert how == "unmade" or list((stage / "weights").iterdir()) == []


def copy_slowly(weights: Path, stage: Path, seconds: float, results: Any) -> None:
    real = staged_weights._copy

    def slow(source: Path, target: Path) -> str:
        with open(stage.parent / "copied", "a") as file:
            file.write(f"{source.name}\n")
        target.write_bytes(b"half")
        time.sleep(seconds)
        target.unlink()
        return real(source, target)

    staged_weights._copy = slow
    files = files_of(staged(source_of(weights), stage))
    results.put([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def started(count: int, *arguments: Any) -> tuple[list[Any], Any]:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=copy_slowly, args=(*arguments, results)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes, results


def test_of_several_processes_one_copies_and_all_read_the_copy(weights: Path, tmp_path: Path) -> None:
    processes, results = started(3, weights, tmp_path / "stage", 0.3)
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    expected = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files_of(source_of(weights))]
    assert found == [expected] * 3
    assert len((tmp_path / "copied").read_text().split()) == 2, "each file once"


def test_a_killed_copier_leaves_nothing_that_passes_for_a_copy(weights: Path, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    (process,), _ = started(1, weights, stage, 60.0)
    while not list(stage.rglob("*.safetensors")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(list((stage / "weights").glob("*.partial"))) == 1
    source = source_of(weights)
    for copy, file in zip(files_of(staged(source, stage)), files_of(source)):
        assert copy.is_relative_to(stage)
        assert copy.read_bytes() == file.read_bytes()
    assert list((stage / "weights").glob("*.partial")) == []
