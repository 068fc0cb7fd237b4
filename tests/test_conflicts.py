"""S3 answers 409 to a put that met another one on its way: that is no answer, and the put is asked again."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_server import Server, serving
from tiny_sets import CLS, check_blocks, make_manifest, make_spec_of, named, prepare, write_block

from featstore.errors import StoreError
from featstore.objects import CONFLICT_TRIES, parse_place
from featstore.store.commits import committed_blocks


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featstore.objects.CONFLICT_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def conflicts(server: Server, times: int, key: str = "") -> Callable[[], bool]:
    """The next puts of this key meet another one; the call that comes back tells whether all did."""
    left = [times]

    def fault(method: str, path: str) -> int | None:
        if method != "PUT" or not path.endswith(key) or not left[0]:
            return None
        left[0] -= 1
        return 409

    server.fault = fault
    return lambda: not left[0]


def test_what_stands_there_decides(server: Server) -> None:
    path = server.prefix() / "a"
    conflicts(server, 2)
    assert path.put_new(b"one")
    conflicts(server, 1)
    assert not path.put_new(b"two")
    conflicts(server, 2)
    path.put(b"three")
    tag = str(path.stat().e_tag)
    done = conflicts(server, 5)  # the client itself asks four times
    assert path.put_over(b"four", tag)
    assert done()
    done = conflicts(server, 4)
    assert not path.put_over(b"five", tag)
    assert done()
    assert path.read_bytes() == b"four"
    path.unlink()
    conflicts(server, 4)
    assert not path.put_over(b"six", tag)
    assert not path.exists()


def test_conflicts_without_end_are_told(server: Server) -> None:
    path = server.prefix() / "a"
    for put in (path.put_new, path.put):
        done = conflicts(server, CONFLICT_TRIES)
        with pytest.raises(
            StoreError, match=r"the bucket says of 6 puts that each met another one \(409\); run the same"
        ):
            put(b"one")
        assert done()
    assert not path.exists()


@pytest.mark.parametrize(("key", "times"), [("/c/0/0", 2), ("/00000000.json", 5), ("/marker.json", 1)])
def test_a_block_is_committed_all_the_same(server: Server, key: str, times: int) -> None:
    folder = prepare(parse_place(str(server.prefix())), make_spec_of(block_rows=16), make_manifest(named(12)), [CLS])
    done = conflicts(server, times, key)
    assert write_block(folder, "cls", 0, 1)
    assert done()
    assert committed_blocks(folder, "cls") == {0}
    check_blocks(folder, {1})
