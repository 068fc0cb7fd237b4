"""Tables of text: what is read is what the standard library reads, and a fault is told by its line alone."""

import csv
import gzip
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featstore.datasets import source
from featstore.datasets.source import read_csv
from featstore.errors import ManifestError


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a,b\n1.0,-1.0\n,0\n", {"a": ["1.0", None], "b": ["-1.0", "0"]}),
        (b"\xef\xbb\xbfa,b\r\n1,2\r\n", {"a": ["1"], "b": ["2"]}),
        (b'a,b\n"",NA\nnull, x \n', {"a": [None, "null"], "b": ["NA", " x "]}),
        (b'a,b\n"x\ny","say ""z"""\n\n1,2', {"a": ["x\ny", "1"], "b": ['say "z"', "2"]}),
        (b"a,b", {"a": [], "b": []}),
        (b"a,b\n", {"a": [], "b": []}),
        (b",a,,\n0,1,,\n1,,,\n", {"unnamed_1": ["0", "1"], "a": ["1", None]}),
        (b"a,b,,\n1,2\n3,4\n", {"a": ["1", "3"], "b": ["2", "4"]}),
        ("name\nÅngström\n".encode(), {"name": ["Ångström"]}),
    ],
)
def test_csv_text_is_kept(tmp_path: Path, content: bytes, expected: dict[str, list[str | None]]) -> None:
    plain, packed = tmp_path / "t.csv", tmp_path / "t.csv.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for path in (plain, packed):
        table = read_csv(path)
        assert table.to_pydict() == expected
        assert set(table.schema.types) <= {pa.string()}


def test_csv_delimiter(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("a\tb\n1,5\t2\n")
    assert read_csv(tmp_path / "t.tsv", delimiter="\t").to_pydict() == {"a": ["1,5"], "b": ["2"]}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_csv_equals_the_standard_library(tmp_path: Path, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 5))
    text = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=8)
    rows = data.draw(st.lists(st.lists(text, min_size=width, max_size=width), max_size=8))
    names = [f"c{i}" for i in range(width)]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([names, *rows])
    (tmp_path / "t.csv").write_bytes(buffer.getvalue().encode())
    table = read_csv(tmp_path / "t.csv")
    assert [list(row.values()) for row in table.to_pylist()] == [[field or None for field in row] for row in rows]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty; its first line must name the columns"),
        (b"a,b\n1,2\n\n3\n4,5\n", "line 4: 1 fields where the header names 2"),
        (b'a,b\n"x\ny",1\n1,2,3\n', "line 4: 3 fields where the header names 2"),
        (b"a,b,a\n1,2,3\n", r"line 1: column names must differ, but \['a'\] appear more than once"),
        (b"a,b\n1,\xff\n", "is not UTF-8; convert it"),
        (b'a,b\n1,"x\n2,3\n', "line 2: unexpected end of data; is a quote left open"),
        (b'a,b\n1,2\n3,"x\n4,5"\n6,"7\n8,9\n', "line 5: .* is a quote left open"),
    ],
)
def test_csv_faults_name_the_line(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ManifestError, match=match):
        read_csv(tmp_path / "t.csv")


def test_csv_fault_far_below_keeps_rows_private(tmp_path: Path) -> None:
    lines = ["name,value", *(f"Smith{row},{row}" for row in range(5000)), "Jones,1,2"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(ManifestError, match="line 5002: 3 fields") as caught:
        read_csv(tmp_path / "t.csv")
    assert "Jones" not in str(caught.value)


def test_csv_not_utf8_below_the_header(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"a,b\n" + b"1,2\n" * 9000 + b"1,\xe9\n")
    with pytest.raises(ManifestError, match="is not UTF-8"):
        read_csv(tmp_path / "t.csv")


def test_csv_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="does not exist"):
        read_csv(tmp_path / "none.csv")
    with pytest.raises(ManifestError, match=r"cannot be read: .*directory"):
        read_csv(tmp_path)
    packed = tmp_path / "cut.csv.gz"
    noise = np.random.default_rng(0).integers(0, 10**9, 60_000)
    packed.write_bytes(gzip.compress(b"a,b\n" + b"".join(b"%d,2\n" % value for value in noise))[:-90_000])
    with pytest.raises(ManifestError, match=r"is damaged after line \d+"):
        read_csv(packed)
    wide = tmp_path / "wide.csv"
    row = ",".join(["x" * 100_000] * 400)
    wide.write_text(",".join(f"c{i}" for i in range(400)) + f"\n{row}\n{row}\n")
    with pytest.raises(ManifestError, match=r"cannot be read as delimited text .* is a row above 16 MiB"):
        read_csv(wide)


class _SlowFile(io.FileIO):
    """A file whose reads take long, and which counts those that end after it was closed."""

    reads: int = 0
    late: int = 0

    def readinto(self, buffer: Any) -> int:
        got = super().readinto(buffer)
        time.sleep(0.1)
        self.reads += 1
        self.late += self.closed
        return got


def test_no_read_is_under_way_when_a_failed_table_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Arrow reads ahead; a read of a closed descriptor takes bytes from the next file that gets its number.
    table = tmp_path / "wide.csv"
    table.write_bytes(b"a,b\n" + b"1" * (80 << 20) + b",2\n")
    files: list[_SlowFile] = []

    def opened(path: Path) -> io.BufferedReader:
        files.append(_SlowFile(path, "rb"))
        return io.BufferedReader(files[-1])

    monkeypatch.setattr(source, "_open_bytes", opened)
    monkeypatch.setattr(source, "_read_header", lambda *_: (["a", "b"], True))
    for _ in range(3):
        with pytest.raises(ManifestError):
            read_csv(table)
        time.sleep(0.2)
    assert [file.closed for file in files] == [True] * 3
    assert min(file.reads for file in files) > 0
    assert [file.late for file in files] == [0, 0, 0]
