"""Writing to a bucket: whether it keeps the conditions of a put, and one writer at a time where it does not."""

import atexit
import contextlib
import uuid

from featstore import files
from featstore.errors import StoreError
from featstore.objects import ObjectPath, Place, as_object, connection

SINGLE = "single"  # mode of a store that one writer at a time may change (see `files.commit_mode`)
NO_SUCH_TAG = '"00000000000000000000000000000000"'


def keeps_conditions(root: ObjectPath) -> bool:
    """Whether a put is refused here where an object is, or is another one than asked for; tried on a fresh key.

    Raises:
        StoreError: nothing can be written here at all.
    """
    probe = root / f".probe-{uuid.uuid4().hex}"
    try:
        probe.put(b"first")
        try:
            refused = not probe.put_new(b"second") and not probe.put_over(b"third", NO_SUCH_TAG)
        except StoreError:
            return False  # it was there, so what is not understood is the condition
        return refused and probe.read_bytes() == b"first"
    finally:
        with contextlib.suppress(StoreError):
            probe.unlink()


def enter(root: Place) -> None:
    """Make sure that this process may write to the store; checked once a process, and nothing to do for local ones.

    A bucket that does not keep conditions is marked as such (`mode.json`) and held by the lock of `locks.py` until this
    process ends; call `renew` at every commit.

    Raises:
        StoreError: another writer holds it, or it cannot be written.
    """
    held = as_object(root)
    if held is None or str(held) in connection(held.bucket).entered:
        return
    link = connection(held.bucket)
    link.conditional = files.commit_mode(root) != SINGLE
    if link.conditional and not keeps_conditions(held):
        link.conditional = False
        files.write_atomic(root / files.MODE, files.sealed({"mode": SINGLE}))
    lock = None
    if not link.conditional:
        from featstore.store.locks import writer_lock  # which needs commits, and they this

        until_exit = contextlib.ExitStack()
        lock = until_exit.enter_context(writer_lock(root))
        atexit.register(until_exit.close)
    link.entered[str(held)] = lock


def renew(root: Place) -> None:
    """Give a sign of life where this process holds a store, local or not, as its only writer.

    Raises:
        StoreError: another writer took the store over.
    """
    from featstore.store.locks import held_lock

    held = as_object(root)
    lock = held_lock(root) if held is None else connection(held.bucket).entered.get(str(held))
    if lock is not None:
        lock.renew()
