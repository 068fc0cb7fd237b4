"""The doctor and buckets."""

import logging
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from featstore import doctor, files, objects
from featstore.errors import StoreError
from featstore.store import locks

ROOT = Path(__file__).resolve().parent.parent


def states(found: doctor.Diagnosis) -> dict[str, str]:
    return {item.name: item.state for item in found.findings}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("obstore")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        request = urllib.request.Request(f"http://{host}:{port}/features", method="PUT")
        urllib.request.urlopen(request).close()
        yield objects.ObjectPath("features", "store")
    finally:
        server.stop()


def test_a_bucket_with_conditional_puts_needs_nothing(bucket: Any) -> None:
    found = doctor.diagnose(bucket)
    assert {name: state for name, state in states(found).items() if state != "ok"} == {}
    assert (found.mode, found.fsync) == ("conditional", True)
    assert doctor.settle(bucket, found) == "nothing to write down"
    assert list(bucket.rglob("*")) == []


def test_a_bucket_that_ignores_conditions_takes_one_writer(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def put_new(path: Any, data: bytes) -> bool:
        path.put(data)
        return True

    monkeypatch.setattr(objects.ObjectPath, "put_new", put_new)
    found = doctor.diagnose(bucket)
    assert {name: state for name, state in states(found).items() if state != "ok"} == {"conditional put": "degraded"}
    assert found.mode == "single"
    assert doctor.settle(bucket, found).endswith("mode.json written")
    assert files.commit_mode(bucket) == "single"
    with locks.writer_lock(bucket) as lock:
        assert lock.is_ours()
        monkeypatch.setattr(locks, "RENEW_SECONDS", 0.0)
        lock.renew()
        with pytest.raises(StoreError, match=f"process {os.getpid()} on .* has been writing here since"):
            locks._acquire(bucket)
    assert [path.name for path in bucket.rglob("*")] == [files.MODE]


@pytest.mark.parametrize(
    ("method", "words"),
    [("put", "put: no object can be written here"), ("iterdir", "listing: objects cannot be listed")],
)
def test_a_bucket_that_refuses(bucket: Any, monkeypatch: pytest.MonkeyPatch, method: str, words: str) -> None:
    def refuse(*_: Any) -> None:
        raise StoreError("access denied")

    monkeypatch.setattr(objects.ObjectPath, method, refuse)
    found = doctor.diagnose(bucket)
    with pytest.raises(StoreError, match=f"{words}.*access denied.*put the store on a local disk"):
        doctor.settle(bucket, found)


# --- the lock of the one writer
