"""Probes of a prefix in a bucket: what commits by conditional puts need, and what readers use."""

import functools
import time

from featstore.doctor.findings import Probe, Result, asks
from featstore.objects import ObjectPath

PROBES: list[Probe] = []
_bucket = functools.partial(asks, PROBES)


@_bucket("put", "no object can be written here")
def _probe_put(prefix: ObjectPath) -> Result:
    path = prefix / "written"
    path.put(b"0123456789")
    if path.read_bytes() != b"0123456789":
        return "missing", "an object does not read back as it was written", "other bytes"
    return "ok", "objects can be written and read back", ""


@_bucket("conditional put", "objects cannot be put only where there is none", "degraded")
def _probe_put_new(prefix: ObjectPath) -> Result:
    path = prefix / "exclusive"
    done = path.put_new(b"first"), path.put_new(b"second")
    if done != (True, False) or path.read_bytes() != b"first":
        return "degraded", "If-None-Match is ignored: an object is replaced though there is one", "replaced"
    return "ok", "an object takes its name only if it is free (If-None-Match)", ""


@_bucket("conditional replacement", "objects cannot be replaced only if they are the ones that were read", "degraded")
def _probe_put_over(prefix: ObjectPath) -> Result:
    path = prefix / "matched"
    path.put(b"first")
    stale = path.stat().e_tag or ""
    path.put(b"other")
    done = path.put_over(b"wrong", stale), path.put_over(b"right", path.stat().e_tag or "")
    if done != (False, True) or path.read_bytes() != b"right":
        return "degraded", "If-Match is ignored: an object is replaced though it changed meanwhile", "replaced"
    return "ok", "an object is replaced only if it is the one that was read (If-Match)", ""


@_bucket("listing", "objects cannot be listed, so nobody would find what is committed")
def _probe_listing(prefix: ObjectPath) -> Result:
    names = [f"{number:08d}.json" for number in range(3)]
    started = time.perf_counter()
    for name in names:
        (prefix / "listed" / name).put(b"{}")
    found = [path.name for path in (prefix / "listed").iterdir()]
    seconds = time.perf_counter() - started
    if found != names:
        return (
            "missing",
            "a listing lacks objects just written, so blocks would be lost from sight",
            f"{len(found)} of 3",
        )
    return "ok", "a listing shows objects at once", f"{1e3 * seconds / 4:.2g} ms a request"


@_bucket("range read", "parts of objects cannot be read: gathers fetch whole shards", "degraded")
def _probe_range(prefix: ObjectPath) -> Result:
    path = prefix / "ranged"
    path.put(b"0123456789")
    if path.read_range(3, 7, path.stat().e_tag) != b"3456":
        return "degraded", "a part of an object comes back as something else: nothing can be gathered", "other bytes"
    return "ok", "rows are fetched without the rest of their shard", ""


@_bucket("delete", "objects cannot be deleted, so attempts would pile up")
def _probe_delete(prefix: ObjectPath) -> Result:
    path = prefix / "deleted"
    path.put(b"here")
    path.unlink()
    if path.is_file():
        return "missing", "a deleted object is still there", "still there"
    return "ok", "objects go at once", ""
