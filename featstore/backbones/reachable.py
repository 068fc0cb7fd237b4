"""Whether a server accepts connections, in bounded time, also where a firewall drops packets and says nothing."""

import queue
import selectors
import socket
import threading
import time
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

SECONDS = 0.8
PATIENT_SECONDS = 10.0  # for a user who asked for the network, which may be a slow one


def is_reachable(endpoint: str, seconds: float = SECONDS) -> bool:
    """Whether the server of a URL accepts a connection within `seconds`, name lookup and all its addresses included.

    Behind a proxy the answer is yes: only the client knows the way.
    """
    parts = urlsplit(endpoint)
    if not parts.hostname:
        return False
    proxies = getproxies()
    if (parts.scheme in proxies or "all" in proxies) and not proxy_bypass(parts.hostname):
        return True
    end = time.monotonic() + seconds
    port = parts.port or (80 if parts.scheme == "http" else 443)
    return _connects(_look_up(parts.hostname, port, seconds), end)


def _look_up(host: str, port: int, seconds: float) -> list[Any]:
    """The addresses of a name; none where it has none, or where nobody said so in time."""
    found: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError):  # no such name; a name that cannot be one
            found.put([])

    # The resolver cannot be told to hurry: it is left behind.
    threading.Thread(target=ask, daemon=True, name="name lookup").start()
    try:
        return found.get(timeout=seconds)
    except queue.Empty:
        return []


def _connects(addresses: list[Any], end: float) -> bool:
    """Whether one of the addresses, all tried at once, accepts a connection before `end`."""
    with ExitStack() as stack:
        waiting = stack.enter_context(selectors.DefaultSelector())
        for family, kind, protocol, _, address in addresses:
            try:
                tried = stack.enter_context(socket.socket(family, kind, protocol))
                tried.setblocking(False)
                tried.connect(address)
            except BlockingIOError:
                waiting.register(tried, selectors.EVENT_WRITE)
            except OSError:  # refused at once, or no such kind of network on this machine
                continue
            else:
                return True
        while waiting.get_map() and (left := end - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                answered = key.fileobj
                assert isinstance(answered, socket.socket)
                if answered.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    return True
                waiting.unregister(answered)
    return False
