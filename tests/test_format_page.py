"""docs/format.md is true and enough: a reader made from the page alone reads a real set, and its examples are real.

The reader below uses the standard library, numpy and google_crc32c, nothing of this package.
"""

import hashlib
import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs/format.md"
DTYPES = {"float16": "<f2", "float32": "<f4", "int8": "|i1", "bfloat16": "<u2"}
PADDING = {"float16": "007e", "float32": "0000c07f", "int8": "00", "bfloat16": "c07f"}
ABSENT = 2**64 - 1


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def unsealed(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_bytes())
    if value.pop("digest") != sha256(canonical(value)):
        raise ValueError(f"{path.name}: digest")
    return dict(value)


def crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def shard_bytes(rows: np.ndarray, dtype: str, chunk_rows: int, shard_rows: int) -> bytes:
    """What the page says a shard file is."""
    row_bytes = rows[0].nbytes
    chunks, words = b"", []
    for first in range(0, len(rows), chunk_rows):
        chunk = rows[first : first + chunk_rows].tobytes()
        missing = chunk_rows * row_bytes - len(chunk)
        chunk += bytes.fromhex(PADDING[dtype]) * (missing // len(bytes.fromhex(PADDING[dtype])))
        words.append(struct.pack("<QQ", len(chunks), len(chunk) + 4))
        chunks += chunk + crc32c(chunk)
    words += [struct.pack("<QQ", ABSENT, ABSENT)] * (shard_rows // chunk_rows - len(words))
    index = b"".join(words)
    return chunks + index + crc32c(index)


class PageReader:
    """A set, read by the page."""

    def __init__(self, folder: Path) -> None:
        if unsealed(folder.parents[2] / "store.json") != {"format": "featstore", "schema": 2}:
            raise ValueError("store.json")
        self.folder, self.spec = folder, unsealed(folder / "spec.json")
        if self.spec["fingerprint"] != sha256(canonical(self.spec["identity"])):
            raise ValueError("fingerprint")
        self.arrays: dict[str, dict[str, Any]] = {}
        self.segments: list[tuple[int, int]] = []
        number = 0
        while (folder / f"ledger/{number:06d}.json").exists():
            entry = unsealed(folder / f"ledger/{number:06d}.json")
            if entry["kind"] == "arrays":
                self.arrays |= {array["name"]: {**array, "group": entry["group"]} for array in entry["arrays"]}
            else:
                self.segments.append((entry["start"], entry["stop"]))
            number += 1

    @property
    def length(self) -> int:
        return max(stop for _, stop in self.segments)

    def committed(self, name: str) -> dict[int, dict[str, Any]]:
        home = self.folder / "commits" / self.arrays[name]["group"]
        return {int(path.stem): unsealed(path) for path in sorted(home.glob("*.json"))}

    def check_seal(self, manifest: str) -> None:
        seal = unsealed(self.folder / f"rows/{manifest}.json")
        data = (self.folder / f"rows/{manifest}.parquet").read_bytes()
        if (seal["bytes"], seal["sha256"]) != (len(data), sha256(data)):
            raise ValueError(f"rows of {manifest}")

    def read(self, name: str, row: int) -> np.ndarray:
        """One row, its chunk checked, the file of its shard compared with the marker."""
        array, block_rows = self.arrays[name], self.spec["layout"]["block_rows"]
        marker = self.committed(name)[row // block_rows]
        if not marker["start"] <= row < marker["stop"]:
            raise ValueError(f"row {row} belongs to nobody")
        dtype = np.dtype(DTYPES[array["dtype"]])
        row_bytes = int(np.prod(array["row_shape"])) * dtype.itemsize
        chunk_rows, shard_rows = array["chunk_rows"], array["shard_rows"]
        shard, position = divmod(row, shard_rows)
        key = "/".join(["c", str(shard), *["0"] * len(array["row_shape"])])
        data = (self.folder / "data.zarr" / name / key).read_bytes()
        stride, index = chunk_rows * row_bytes + 4, 16 * shard_rows // chunk_rows + 4
        chunks, rest = divmod(len(data) - index, stride)
        words = [data[(chunk + 1) * stride - 4 : (chunk + 1) * stride] for chunk in range(chunks)]
        sums = [len(data), int.from_bytes(data[-4:], "little"), int(google_crc32c.value(b"".join(words)))]
        if rest or crc32c(data[-index:-4]) != data[-4:] or sums != marker["shards"][name][str(shard)]:
            raise ValueError(f"shard {shard} of {name}")
        places = np.frombuffer(data[-index:-4], "<u8").reshape(-1, 2)
        chunk = position // chunk_rows
        if places[chunk].tolist() != [chunk * stride, stride] or (places[chunks:] != ABSENT).any():
            raise ValueError(f"index of shard {shard} of {name}")
        if crc32c(data[chunk * stride : (chunk + 1) * stride - 4]) != words[chunk]:
            raise ValueError(f"chunk {chunk} of shard {shard} of {name}")
        start = chunk * stride + position % chunk_rows * row_bytes
        return np.frombuffer(data[start : start + row_bytes], dtype).reshape(array["row_shape"])


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the page: five samples, then six."""
    from tiny_sets import make_manifest, make_spec_of, named, prepare, values_of, write_block, writer_of

    from featstore.store.commits import RowState
    from featstore.store.layout import ArraySpec

    root = tmp_path_factory.mktemp("store")
    cls = ArraySpec(name="cls", row_shape=(2,), dtype="float16", shard_rows=4, chunk_rows=2)
    spec = make_spec_of(block_rows=4)
    folder = prepare(root, spec, make_manifest(named(5)), [cls])
    write_block(folder, "cls", 0, 1)
    with writer_of(folder, "cls", 1) as writer:
        writer.append({"cls": np.array([[1.0, -2.0]], np.float16)}, [RowState("aa00" * 8)])
        assert writer.commit()
    prepare(root, spec, make_manifest(named(6)), [cls])
    with writer_of(folder, "cls", 2) as writer:
        writer.append({"cls": np.full((1, 2), np.nan, np.float16)}, [RowState("bb11" * 8, "not an image")])
        assert writer.commit()
    assert values_of(cls, 0, 4, 1).shape == (4, 2)
    return root


def examples(language: str) -> dict[str, str]:
    """Path -> text of the examples of the page."""
    found = re.findall(rf"^`([^`\n]+)`[^\n]*:\n\n```{language}\n(.*?)```", PAGE.read_text(), re.M | re.S)
    assert found
    return dict(found)


def test_the_examples_are_the_real_files(example: Path) -> None:
    found = examples("json")
    assert len(found) == 9
    for name, text in found.items():
        stated, real = json.loads(text), json.loads((example / name).read_bytes())
        assert stated.keys() == real.keys(), name
        if name.startswith("sets") and "/rows/" in name:  # bytes of parquet depend on who wrote them
            assert real["bytes"] > 500
            continue
        assert stated == real, name
        if "digest" in real:
            unsealed(example / name)


def test_source_toml_is_sealed_as_the_page_says(example: Path) -> None:
    ((name, text),) = examples("toml").items()
    data = (example / name).read_bytes()
    keys = [line.split(" = ")[0] for line in data.decode().splitlines()]
    assert keys == [line.split(" = ")[0] for line in text.splitlines()]
    body, _, seal = data.rpartition(b'seal = "')
    assert seal == f'{sha256(body)}"\n'.encode()
    stated = re.search(rb'sha256 = "(\w+)"', data)
    assert stated is not None
    assert stated[1].decode() == sha256((example / name).with_name("manifest.parquet").read_bytes())
    assert (example / "datasets/demo/current").read_bytes() == b"b76f8271\n"


def test_the_manifest_digest_follows_the_page(example: Path) -> None:
    """By numpy and hashlib from the values; the types are spelled out here."""
    import pyarrow.parquet as pq

    for folder in sorted((example / "datasets/demo").glob("*/")):
        table = pq.ParquetFile(folder / "manifest.parquet").read()
        total = hashlib.sha256()
        for name in table.column_names:
            if name == "mtime_ns":
                continue
            values = table.column(name).to_pylist()
            number = name == "size"
            mask = np.packbits(np.array([value is None for value in values])).tobytes()
            texts = ["" if value is None else str(value) for value in values]
            lengths = b"" if number else struct.pack(f"<{len(texts)}q", *(len(text.encode()) for text in texts))
            data = struct.pack(f"<{len(values)}q", *values) if number else "".join(texts).encode()
            total.update(canonical([name, "int64" if number else "string", len(values)]))
            for part in (mask, lengths, data):
                total.update(hashlib.sha256(part).digest())
        assert total.hexdigest()[:8] == folder.name


def test_the_bytes_of_the_shard_are_those_on_the_page(example: Path) -> None:
    found = re.search(r"^`(sets/\S+/c/1/0)`.*?```\n(.*?)```", PAGE.read_text(), re.M | re.S)
    assert found is not None
    data = b""
    for line in found[2].splitlines():
        offset, text = re.match(r"(\w\w)  ((?:\w\w )*\w\w)(?:  |$)", line).groups()  # type: ignore[union-attr]
        assert int(offset, 16) == len(data)
        data += bytes.fromhex(text)
    assert data == (example / found[1]).read_bytes()
    assert data == shard_bytes(np.array([[1.0, -2.0]], np.float16), "float16", 2, 4)
    assert int.from_bytes(data[-4:], "little") == 84590287


def test_a_reader_made_from_the_page_reads_a_grown_set(example: Path) -> None:
    from featstore.store.reader import ShardedArray

    (folder,) = (example / "sets/demo").iterdir()
    reader = PageReader(folder)
    assert reader.length == 9
    assert sorted(reader.committed("cls")) == [0, 1, 2]
    for manifest in ("cabe53f8", "b76f8271"):
        reader.check_seal(manifest)
    ours = ShardedArray(folder / "data.zarr/cls")
    for row in (0, 1, 2, 3, 4, 8):
        np.testing.assert_array_equal(reader.read("cls", row), ours[row])
    with pytest.raises(ValueError, match="row 5 belongs to nobody"):
        reader.read("cls", 5)
    assert np.isnan(reader.read("cls", 8)).all()
    for marker in reader.committed("cls").values():
        assert marker["attempt"] == sha256(canonical(marker["shards"]))[:16]
        assert len(marker["contents"]) == 32 * (marker["stop"] - marker["start"])


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("count", [1, 16, 37])
def test_the_reader_and_the_writer_of_the_page_agree_with_ours(tmp_path: Path, dtype: str, count: int) -> None:
    import ml_dtypes  # noqa: F401 - gives numpy bfloat16
    from tiny_sets import make_manifest, make_spec_of, named, prepare, values_of, write_missing

    from featstore.store.layout import ArraySpec

    arrays = [
        ArraySpec(name="cls", row_shape=(8,), dtype=dtype, shard_rows=8, chunk_rows=2),
        ArraySpec(name="layers/3/patches", row_shape=(3, 8), dtype=dtype),
    ]
    folder = prepare(tmp_path, make_spec_of(block_rows=16, stored_dtype=dtype), make_manifest(named(count)), arrays)
    write_missing(folder, 1, block_rows=16)
    reader = PageReader(folder)
    assert {array["group"] for array in reader.arrays.values()} == {"cls+layers.3.patches"}
    for array in arrays:
        held, truth = reader.arrays[array.name], values_of(array, 0, count, 1)
        for row in range(count):
            assert reader.read(array.name, row).tobytes() == truth[row].tobytes()
        for shard, first in enumerate(range(0, count, held["shard_rows"])):
            rows = truth[first : first + held["shard_rows"]]
            key = f"c/{shard}" + "/0" * len(array.row_shape)
            wanted = shard_bytes(rows, dtype, held["chunk_rows"], held["shard_rows"])
            assert (folder / "data.zarr" / array.name / key).read_bytes() == wanted


DAMAGE = {  # file, byte, what the reader says
    "payload": ("data.zarr/cls/c/1/0", 1, "chunk 0 of shard 1"),
    "index": ("data.zarr/cls/c/1/0", 20, "shard 1 of cls"),
    "checksum of the index": ("data.zarr/cls/c/1/0", -1, "shard 1 of cls"),
    "marker": ("commits/cls/00000001.json", -10, "digest"),
    "ledger": ("ledger/000001.json", -10, "digest"),
    "spec": ("spec.json", 16, "digest"),
    "rows": ("rows/cabe53f8.parquet", 300, "rows of cabe53f8"),
}


@pytest.mark.parametrize("place", DAMAGE)
def test_the_reader_of_the_page_finds_damage(tmp_path: Path, example: Path, place: str) -> None:
    """So the checks that the page asks for are real ones."""
    shutil.copytree(example, tmp_path / "store")
    (folder,) = (tmp_path / "store/sets/demo").iterdir()
    name, position, message = DAMAGE[place]
    path = folder / name
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)

    def read_all() -> None:
        reader = PageReader(folder)
        reader.read("cls", 4)
        reader.check_seal("cabe53f8")

    with pytest.raises(ValueError, match=message):
        read_all()


def test_every_file_of_a_store_is_on_the_page(example: Path) -> None:
    text = PAGE.read_text()
    tree = text[text.index("```") : text.index("```", text.index("```") + 3)]
    for path in example.rglob("*"):
        if path.is_file():
            assert re.sub(r"^\w{8}$|^\d+$", "", path.stem) == "" or path.name in tree, path


def test_the_page_names_what_the_code_knows() -> None:
    """Constants of the code that the page states in words."""
    from featstore.store import commits, decisions, layout, packed

    text = PAGE.read_text()
    assert f"schema {layout.SCHEMA}" in text.splitlines()[0]
    assert f"up to {decisions.INTENT_BYTES} bytes" in text
    assert f"{commits.HASH_HEX} hex digits a row" in text
    assert packed.BEGUN in text
    assert packed.SEALED in text
    assert packed.ATTRIBUTE in text
    for axes in layout.AXES.values():
        assert all(f"`{axis}`" in text for axis in axes)
