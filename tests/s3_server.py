"""moto's S3 server on loopback, with conditional puts as atomic as those of S3, and faults on request."""

import contextlib
import threading
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from featstore.objects import ObjectPath

VARIABLES = {
    "AWS_ALLOW_HTTP": "true",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
}


@dataclass
class Server:
    """`requests` counts what arrived, by method; `fault` answers instead of moto where it returns a status."""

    url: str
    requests: list[str] = field(default_factory=list)
    fault: Callable[[str, str], int | None] = lambda method, path: None

    def prefix(self) -> ObjectPath:
        """A prefix that nothing stands under."""
        return ObjectPath("bucket", uuid.uuid4().hex[:12])

    @contextlib.contextmanager
    def answering(self, status: int, *, times: int = 10**6) -> Iterator[None]:
        """The next requests get this status."""
        left = [times]

        def fault(method: str, path: str) -> int | None:
            left[0] -= 1
            return status if left[0] >= 0 else None

        self.fault = fault
        try:
            yield
        finally:
            self.fault = lambda method, path: None

    @contextlib.contextmanager
    def counting(self) -> Iterator[list[str]]:
        """`METHOD path` of every request while the block runs."""
        self.requests = []
        yield self.requests


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Start the server with the bucket `bucket` and point the AWS variables at it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised on import by moto's dependencies
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any, **__: Any) -> None:
            """Requests are counted, not printed."""

    backend = DomainDispatcherApplication(create_backend_app)
    one_by_one = threading.Lock()  # moto looks at the condition, then writes: S3 does both at once

    def app(environ: Any, start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        found.requests.append(f"{method} {path}")
        status = found.fault(method, path)
        if status is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{status} Fault", [("Content-Length", "0")])
            return [b""]
        with one_by_one:
            return list(backend(environ, start_response))

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    found = Server(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**VARIABLES, "AWS_ENDPOINT_URL": found.url}.items():
            patch.setenv(name, value)
        made = urllib.request.Request(f"{found.url}/bucket", method="PUT")
        urllib.request.urlopen(made).close()
        try:
            yield found
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
