"""Images that are edited after a training: another manifest, another run; and nothing else makes one."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finetunes import evaluate
from pictures import CONFIG, write_pictures, write_table
from PIL import Image
from s3_server import serving
from tuning_runs import image_set

from featstore.datasets.manifest import Manifest
from featstore.errors import ManifestError
from featstore.inputs import Inputs
from featstore.objects import Place, parse_place
from featstore.register import register
from featstore.store import hashes
from featstore.store.catalog import Store
from featstore.store.hashes import file_hashes, read_surveys, surveys_folder
from probes import tuning_survey
from probes.tuning_loop import Run
from probes.tuning_survey import Kept

COUNT, EDITED = 32, 6
PLAIN: dict[str, Any] = {"method": "full", "lr": "1e-2", "epochs": 2, "batch": 8, "start": "random"}
CACHED: dict[str, Any] = {**PLAIN, "method": "last-k", "from_cache": True, "flip": "off", "degrees": 0.0}


def write(root: Path, count: int = COUNT) -> None:
    """Pictures whose files have one size, whatever they show."""
    names = write_pictures(root, count)
    write_table(root, names)
    for name in names:
        Image.open(root / name).save(root / name, compress_level=0)


def again(store: Place, root: Path, **options: Any) -> Manifest:
    return register(store, "pics", root, replace(CONFIG, **options))[0]


def edit(root: Path, count: int = EDITED) -> None:
    """Other pictures in the first files, which train, of the same size."""
    for path in sorted((root / "images").iterdir())[:count]:
        size = path.stat().st_size
        pixels = 255 - np.asarray(Image.open(path))
        Image.fromarray(pixels).save(path, compress_level=0)
        assert path.stat().st_size == size
        later(path)


def later(path: Path) -> None:
    """The same bytes at another time, as after a copy."""
    time_ns = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(time_ns, time_ns))


def touch(root: Path) -> None:
    for path in (root / "images").iterdir():
        later(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "pics")
    return tmp_path / "pics"


@pytest.fixture
def store(tmp_path: Path, root: Path) -> Path:
    again(tmp_path / "store", root)
    return tmp_path / "store"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an entry for every step of training from now on."""
    found: list[int] = []
    real = Run._step

    def counted(self: Run, *given: Any) -> float:
        found.append(1)
        return real(self, *given)

    monkeypatch.setattr(Run, "_step", counted)
    return found


def train(store: Path, **options: Any) -> dict[str, Any]:
    (record,) = evaluate(store, **{**PLAIN, **options})
    return record


def losses(record: dict[str, Any]) -> Any:
    return record["choices"]["history"]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Losses of a method on the edited pictures, in a store that has never seen others."""
    base = tmp_path_factory.mktemp("fresh")
    write(base / "pics")
    edit(base / "pics")
    again(base / "store", base / "pics")
    return functools.cache(lambda method: losses(train(base / "store", **(CACHED if method == "last-k" else PLAIN))))


@pytest.mark.parametrize(
    "kind",
    ["plain", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("decoded", "activations", "runs"))],
)
def test_edited_images_are_another_run(
    kind: str, store: Path, root: Path, steps: list[int], fresh: Callable[[str], Any]
) -> None:
    options: dict[str, Any] = {
        "plain": {},
        "decoded": {"decoded_cache": True},
        "activations": CACHED,
        "runs": {"runs": root.parent / "elsewhere"},
    }[kind]
    first = train(store, **options)
    assert steps
    before = Store(store).manifest("pics")
    assert again(store, root).digest == before.digest
    touch(root)
    assert again(store, root).digest == before.digest
    steps.clear()
    if kind in ("plain", "activations"):
        assert losses(train(store, **options)) == losses(first)
        assert steps == []
    edit(root)
    if kind != "decoded":  # whose pixels are those of registration
        with pytest.raises(ManifestError, match=f"{EDITED} files changed since registration"):
            train(store, **options)
    after = again(store, root)
    assert after.digest != before.digest
    assert [value is not None for value in after.column("content")] == [row < EDITED for row in range(COUNT)]
    second = train(store, **options)
    assert steps
    assert second["choices"]["weights"] != first["choices"]["weights"]
    assert losses(second) != losses(first)
    assert losses(second) == fresh(options.get("method", "full"))
    assert file_hashes(Store(store), after) == image_hashes(root)
    if kind == "plain":  # a cache of the same bytes makes no other run
        steps.clear()
        assert losses(train(store, decoded_cache=True)) == losses(second)
        assert steps == []


def image_hashes(root: Path) -> list[str]:
    return [Inputs(root).hash(f"images/{path.name}") for path in sorted((root / "images").iterdir())]


def test_a_killed_run_does_not_go_on_with_other_images(
    store: Path, root: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch, fresh: Callable[[str], Any]
) -> None:
    real = Run._epoch

    def killed(self: Run, *given: Any, **more: Any) -> Any:
        if steps:
            raise KeyboardInterrupt
        return real(self, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            train(store)
    assert steps
    assert list((store / "finetune").rglob("state.json"))
    edit(root)
    again(store, root)
    record = train(store)
    assert not any("went on" in note for note in record["notes"])
    assert losses(record) == fresh("full")


def test_a_store_that_takes_nothing_gives_no_older_run(
    store: Path, root: Path, steps: list[int], fresh: Callable[[str], Any]
) -> None:
    """Nobody can tell registration: the run itself is of other bytes."""
    (store / "finetune").write_bytes(b"")
    options = {**CACHED, "runs": root.parent / "runs"}
    first, short = train(store, **options), Store(store).manifest("pics").short
    steps.clear()
    assert losses(train(store, **options)) == losses(first)
    assert not steps
    edit(root)
    assert again(store, root).short == short
    assert losses(train(store, **options)) == fresh("last-k") != losses(first)


# What registration is told


ROWS = np.arange(COUNT)


def look(store: Place, rows: Any = ROWS) -> None:
    image_set(store).survey(rows, folder=surveys_folder(store, "pics"))  # type: ignore[arg-type]


def digests_of_touched(store: Place, root: Path) -> list[bool]:
    """Which samples' contents are stated once all files have been touched."""
    touch(root)
    return [value is not None for value in again(store, root).column("content")]


def test_bytes_are_known_over_several_manifests(store: Path, root: Path) -> None:
    """Rows of an older manifest are others than those of the one that registration replaces."""
    look(store)
    extra = write_pictures(root.parent / "more", 4)
    shutil.copy(root.parent / "more" / extra[0], root / "images" / "00000a.png")
    names = [f"images/{path.name}" for path in sorted((root / "images").iterdir())]
    write_table(root, [name for name in names if "a" not in Path(name).stem])
    lines = (root / "table.csv").read_text().splitlines()
    (root / "table.csv").write_text("\n".join([lines[0], "images/00000a.png,p9,train,a,1,0", *lines[1:]]) + "\n")
    second = again(store, root)
    assert len(second) == COUNT + 1
    edit(root, 1)
    later(root / "images" / "00000a.png")  # nobody has read it: it may be any
    third = again(store, root)
    assert [row for row, value in enumerate(third.column("content")) if value is not None] == [1]


def test_failed_images_are_known_too(store: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sorted((root / "images").iterdir())[3]
    path.write_bytes(bytes(path.stat().st_size))
    again(store, root)
    images = image_set(store, max_failed="10%")
    images.survey(ROWS, folder=surveys_folder(store, "pics"))
    assert list(images.failures) == [3]
    assert digests_of_touched(store, root) == [False] * COUNT
    edit(root, 1)
    assert again(store, root).column("content")[0] is not None


def test_what_is_about_to_be_read_is_in_doubt(store: Path, root: Path) -> None:
    """A survey that is still going may have read the bytes from before, and not written so yet."""
    images = image_set(store)
    kept = Kept(surveys_folder(store, "pics"), images.manifest, images.preprocess)
    take_back = kept.announce(ROWS[:5])
    touch(root)
    found = again(store, root).column("content")
    assert [value is not None for value in found] == [row < 5 for row in range(COUNT)]
    take_back()
    assert list((store / "finetune").rglob("*.json")) == []


def test_an_ended_survey_leaves_the_rest_in_doubt(store: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_survey, "SIZE", 8)
    monkeypatch.setattr(tuning_survey, "PIECE", 8)
    real = Kept.write
    calls: list[int] = []

    def killed(self: Kept, states: Any) -> bool:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(self, states)

    with monkeypatch.context() as patch:
        patch.setattr(Kept, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            look(store)
    assert digests_of_touched(store, root) == [row >= 8 for row in range(COUNT)]


@pytest.mark.parametrize("damage", ["piece", "older", "gone"])
def test_damaged_surveys_put_changed_files_in_doubt(damage: str, store: Path, root: Path) -> None:
    look(store)
    first = Store(store).manifest("pics").digest
    for path in list((store / "finetune").rglob("*.json")):
        if damage == "piece":
            path.write_bytes(path.read_bytes()[:-9])
        elif damage == "older":  # one that names no samples
            path.write_bytes(path.read_bytes().replace(b'"ids"', b'"idz"'))
        else:
            path.unlink()
            (store / "finetune" / "pics" / "some-run").mkdir()
    assert read_surveys(Store(store), "pics").is_whole is False
    assert again(store, root).digest == first, "nobody asks while files are as they were"
    later(root / "images" / "00002.png")
    assert [row for row, value in enumerate(again(store, root).column("content")) if value is not None] == [2]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Place]:
    with serving() as server:
        yield parse_place(str(server.prefix()))


def test_a_store_in_a_bucket_is_told(bucket: Place, root: Path) -> None:
    first = again(bucket, root)
    look(bucket)
    assert None not in file_hashes(Store(bucket), first)
    assert digests_of_touched(bucket, root) == [False] * COUNT
    edit(root, 2)
    assert again(bucket, root).column("content")[:3] == [*image_hashes(root)[:2], None]


def test_hidden_edits_are_found_by_hashing(store: Path, root: Path) -> None:
    look(store)
    path = root / "images" / "00000.png"
    time_ns = path.stat().st_mtime_ns
    edit(root, 1)
    os.utime(path, ns=(time_ns, time_ns))
    found = again(store, root, hash=True)
    assert any("1 samples have the same size and time, other bytes than before" in note for note in found.meta["notes"])
    assert hashes.NO_CONTENT not in found.column("content")
