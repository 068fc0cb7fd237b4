"""Files that are kept open: how many, how much memory, and that nobody loses one while reading."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featstore.errors import DecodeError
from featstore.images import opening
from featstore.images.decoded import Decoded, DecodeOptions, Opened
from featstore.images.masks import read_mask
from featstore.images.opening import OpenFiles, open_path
from featstore.images.part import WHOLE, Part
from featstore.inputs import Inputs


class Fake:
    """A file that takes `num_bytes`, more once it is read."""

    def __init__(self, num_bytes: int, grown: int = 0):
        self.num_bytes, self._grown, self.closed = num_bytes, grown or num_bytes, False

    def pixels(self, part: Part, options: DecodeOptions) -> Decoded:
        self.num_bytes = self._grown
        return Decoded(np.zeros((1, 1), np.uint8))

    def close(self) -> None:
        self.closed = True


def get(files: OpenFiles, name: str, fake: Fake) -> bool:
    """Whether the file had to be opened."""
    made = []

    def make() -> tuple[str, Opened | DecodeError]:
        made.append(name)
        return "hash", fake

    _, found = files.get(name, 0, make)
    assert not isinstance(found, DecodeError)
    found.pixels(WHOLE, DecodeOptions())
    return bool(made)


def test_the_oldest_files_go_when_memory_is_full() -> None:
    files = OpenFiles(100)
    assert [get(files, name, Fake(40)) for name in "abaca"] == [True, True, False, True, False]  # c drives out b
    assert get(files, "b", Fake(40))
    assert not get(files, "a", Fake(40))
    assert get(files, "c", Fake(1000))  # one that is too large alone is kept until the next
    assert list(files._slots) == ["c"]
    assert get(files, "a", Fake(40))
    assert list(files._slots) == ["a"]
    assert files._total == 40


def test_what_grows_while_it_is_read_is_counted() -> None:
    files = OpenFiles(1000)
    for number in range(50):
        get(files, str(number), Fake(1, grown=300))
        assert sum(slot.num_bytes for slot in files._slots.values()) <= 1000 + 300
    assert files._total == sum(slot.counted for slot in files._slots.values())


def test_the_number_of_files_is_limited_and_their_bookkeeping_is_not_quadratic() -> None:
    asked = 0

    class Counted(Fake):
        @property
        def num_bytes(self) -> int:
            nonlocal asked
            asked += 1
            return 10

        @num_bytes.setter
        def num_bytes(self, value: int) -> None:
            pass

    files = OpenFiles()
    for number in range(2000):
        get(files, str(number), Counted(10))
    assert asked <= 2000 * 2 * opening.RECOUNTED  # not 2000 * 1000
    assert len(files._slots) == opening.MAX_OPEN_FILES
    assert files._total == 10 * opening.MAX_OPEN_FILES
    fakes = [slot.found for slot in files._slots.values()]
    files.close()
    assert all(isinstance(fake, Fake) and fake.closed for fake in fakes)
    assert (files._total, len(files._slots)) == (0, 0)


def test_files_that_cannot_be_opened_are_remembered() -> None:
    files, made = OpenFiles(), []

    def make() -> tuple[str, Opened | DecodeError]:
        made.append(1)
        return "hash", DecodeError("damaged")

    for key in (0, 0, 1, 1):
        assert str(files.get("a", key, make)[1]) == "damaged"
    assert len(made) == 2  # once for each state of the file


@pytest.mark.parametrize(("pages", "share"), [(2**18, 2**28), (2**30, 2**31), (-1, 2**31)])
def test_memory_is_a_quarter_of_the_machine_up_to_2_gib(
    pages: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": pages}.__getitem__)
    assert OpenFiles()._max_bytes == share


def test_masks_that_are_files_of_their_own_are_not_kept_open(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "v.npy", np.ones((3, 4, 4), np.int8))
    opened = OpenFiles()
    for part in (None, "values=2"):
        read_mask(Inputs(tmp_path), opened, "a.png", part)
    assert not opened._slots
    read_mask(Inputs(tmp_path), opened, "v.npy", "index=1")
    assert len(opened._slots) == 1


def test_the_content_of_a_file_in_two_covers_both(tmp_path: Path) -> None:
    header = "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = a.raw\n"
    (tmp_path / "a.mhd").write_text(header)
    contents = []
    for value in (1, 2):
        (tmp_path / "a.raw").write_bytes(bytes([value] * 8))
        inputs = Inputs(tmp_path)
        content, found = open_path(inputs, "a.mhd", Part(index=0))
        assert not isinstance(found, DecodeError)
        assert (found.pixels(Part(index=0), DecodeOptions()).pixels == value).all()
        assert content == inputs.hash("a.mhd")
        contents.append(content)
    assert contents[0] != contents[1]


def test_memory_that_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def untold(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", untold)
    assert OpenFiles()._max_bytes == opening.MAX_OPEN_BYTES


def test_threads_read_right_pixels_while_files_come_and_go(tmp_path: Path) -> None:
    for number in range(12):
        np.save(tmp_path / f"{number}.npy", np.full((4, 8, 8), number, np.uint8))
    inputs, files = Inputs(tmp_path), OpenFiles(600)  # two files
    barrier = threading.Barrier(8)

    def read(seed: int) -> None:
        barrier.wait(10)
        for number in np.random.default_rng(seed).integers(0, 12, 40).tolist():
            part = Part(index=2)
            _, found = files.get(f"{number}.npy", 0, partial(open_path, inputs, f"{number}.npy", part))
            assert not isinstance(found, DecodeError)
            assert (found.pixels(part, DecodeOptions()).pixels == number).all()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert files._total == sum(slot.counted for slot in files._slots.values())
