"""Which attempt a block is, and that it is committed: two files on a file system, one object in a bucket.

A file system has the intent `<block>.intent`, which names the attempt, and the marker `<block>.json`, both of which
appear once, by a link; a finisher that wakes up late finds its attempt's folder renamed away and can link nothing.
An intent may also say which marker its attempt takes the place of. Whoever finishes it moves that marker into the
attempt's folder before anything else, so at any moment the old marker or the intent of a whole attempt stands.

A bucket has no links and no renames: who has read an attempt's files can put them at any time later. So there the
block is one object, `<block>.json`, that goes from nothing or a vacancy to an intent, and from that to the marker or to
a vacancy, each step replacing exactly the object that was read (If-Match), where every intent and vacancy is unique by
a random number. Hence, for a finisher that stands still anywhere:

- The marker: its put asks for its own intent, which is never there again once the block was marked, given up, or
  taken back, so it puts nothing. No intent can stand beside another one.
- A shard under a free key: `put_new` changes nothing that is there, and all shards of a committed block are.
- A shard in the place of another one: its put asks for the object that it saw, and the intent is looked at right
  before. For harm, the process must stand still between these two requests while others finish this attempt, take the
  block back and commit once more the very bytes that it saw (a tag follows from the content). Bytes of another content
  than the marker names are the worst that comes of it, and `verify` finds them.
- Its attempt's objects have names that nobody else uses, so removing them late harms nothing.
- A marker that an attempt takes the place of becomes its intent by one put over just that marker.

Intents and vacancies are shorter than any marker, so one listing tells what is committed.
"""

import contextlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from featstore import files
from featstore.errors import CorruptError
from featstore.objects import ObjectPath, Place, as_object

INTENT_BYTES = 128  # an object up to this size is an intent or a vacancy; the digest alone makes a marker longer


@dataclass(frozen=True, slots=True)
class Intent:
    """The attempt that a block is to be; `tag` is that of the object which says so, '' on a file system.

    `over`: digest of the marker that the attempt takes the place of; '' where there is none, and in a bucket.
    """

    attempt: str
    tag: str = ""
    over: str = ""


def group_folder(folder: Place, group: str) -> Place:
    return folder / "commits" / group


def marker_path(folder: Place, group: str, block: int) -> Place:
    return group_folder(folder, group) / f"{block:08d}.json"


def intent_path(folder: Place, group: str, block: int) -> Place:
    """Where the intent stands on a file system."""
    return group_folder(folder, group) / f"{block:08d}.intent"


def _slot(folder: Place, group: str, block: int) -> ObjectPath | None:
    return as_object(marker_path(folder, group, block))


def markers(folder: Place, group: str) -> dict[int, str]:
    """Committed blocks and the tags of their markers ('' on a file system), by one listing."""
    home = group_folder(folder, group)
    held = as_object(home)
    if held is not None:
        found = held.listing()[1].items()
        return {
            int(path.stem): facts.e_tag or ""
            for path, facts in found
            if path.suffix == ".json" and facts.st_size > INTENT_BYTES
        }
    try:
        names = os.listdir(home)
    except FileNotFoundError:
        return {}
    return {int(name[:8]): "" for name in names if len(name) == 13 and name.endswith(".json")}


def is_marked(folder: Place, group: str, block: int) -> bool:
    """Whether the block is committed."""
    slot = _slot(folder, group, block)
    if slot is None:
        return marker_path(folder, group, block).exists()
    try:
        return slot.stat().st_size > INTENT_BYTES
    except FileNotFoundError:
        return False


def read_marker(folder: Place, group: str, block: int) -> bytes:
    """Bytes of the marker; FileNotFoundError where the block is not committed."""
    path = marker_path(folder, group, block)
    data = path.read_bytes()
    if as_object(path) is not None and len(data) <= INTENT_BYTES:
        raise FileNotFoundError(2, "not committed", str(path))
    return data


def holds(folder: Place, group: str, block: int, marker: bytes) -> bool:
    """Whether the block is committed by this very marker."""
    try:
        return read_marker(folder, group, block) == marker
    except FileNotFoundError:
        return False


def decide(folder: Place, group: str, block: int, attempt: str, over: bytes | None = None) -> None:
    """Make this attempt the block, unless another one is; the one whose marker is `over` gives way to it."""
    slot = _slot(folder, group, block)
    if slot is None:
        replaced = {} if over is None else {"over": files.digest(over)}
        files.create_exclusive(intent_path(folder, group, block), files.sealed({"files": attempt, **replaced}))
        return
    data = f"intent {attempt} {uuid.uuid4().hex[:16]}\n".encode()
    assert len(data) <= INTENT_BYTES, "an intent must be told from a marker by its size"
    try:
        held, tag = slot.read_tagged()
    except FileNotFoundError:
        slot.put_new(data)
        return
    if held.startswith(b"vacant ") or held == over:
        slot.put_over(data, tag)


def decided(folder: Place, group: str, block: int) -> Intent | None:
    """The intent of a block that is not settled yet.

    Raises:
        CorruptError: it is damaged.
    """
    slot = _slot(folder, group, block)
    try:
        if slot is None:
            path = intent_path(folder, group, block)
            value = files.unseal(path.read_bytes(), path)
            return Intent(str(value["files"]), over=str(value.get("over", "")))
        data, tag = slot.read_tagged()
    except FileNotFoundError:
        return None
    if len(data) > INTENT_BYTES or data.startswith(b"vacant "):
        return None
    words = data.decode("ascii", "replace").split(" ")
    if len(words) != 3 or words[0] != "intent" or "/" in words[1]:
        raise CorruptError(f"{slot}: neither intent nor marker; run the same command again")
    return Intent(words[1], tag)


def stands(folder: Place, group: str, block: int, intent: Intent) -> bool:
    """Whether this very intent is still to be carried out; on a file system its files tell, by being there."""
    slot = _slot(folder, group, block)
    return slot is None or files.version(marker_path(folder, group, block)) == intent.tag


def is_outdated(folder: Place, group: str, block: int, intent: Intent) -> bool:
    """Whether the marker that stands is the one which the decided attempt takes the place of."""
    if not intent.over:
        return False
    try:
        return files.digest(read_marker(folder, group, block)) == intent.over
    except FileNotFoundError:
        return False


def move_marker(folder: Place, group: str, block: int, target: Path) -> None:
    """Move an outdated marker to `target` in the attempt's folder; nothing happens where another finisher was first.

    One that stood still until the attempt's folder was taken away finds no place for it and moves nothing.
    """
    path = marker_path(folder, group, block)
    with contextlib.suppress(FileNotFoundError):
        os.replace(str(path), target)
        files.sync_folder(path.parent)


def mark(folder: Place, group: str, block: int, intent: Intent, source: Place, data: bytes) -> None:
    """Publish the marker of a decided attempt, which is the file `source` and holds `data`."""
    slot = _slot(folder, group, block)
    if slot is None:
        files.link_kept(source, marker_path(folder, group, block))
    else:
        slot.put_over(data, intent.tag)


def settle(folder: Place, group: str, block: int, intent: Intent) -> None:
    """Take an intent away that is carried out or given up."""
    slot = _slot(folder, group, block)
    if slot is not None:
        slot.put_over(_vacancy(), intent.tag)
        return
    path = intent_path(folder, group, block)
    with contextlib.suppress(FileNotFoundError, CorruptError):
        if decided(folder, group, block) == intent:
            path.unlink()
            files.sync_folder(path.parent)


def drop_damaged(folder: Place, group: str, block: int) -> None:
    """Take away an intent that cannot be read."""
    slot = _slot(folder, group, block)
    if slot is None:
        intent_path(folder, group, block).unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        data, tag = slot.read_tagged()
        if len(data) <= INTENT_BYTES:
            slot.put_over(_vacancy(), tag)


def unmark(folder: Place, group: str, block: int) -> None:
    """Take a marker away; nothing happens where there is none."""
    slot = _slot(folder, group, block)
    path = marker_path(folder, group, block)
    with contextlib.suppress(FileNotFoundError):
        if slot is None:
            path.unlink()
            files.sync_folder(path.parent)
            return
        facts = slot.stat()
        if facts.st_size > INTENT_BYTES:
            slot.put_over(_vacancy(), facts.e_tag or "")


def open_intents(folder: Place, group: str) -> list[int]:
    """Blocks with an intent that nobody has carried out yet (in a bucket: vacancies too), by one listing."""
    home = group_folder(folder, group)
    held = as_object(home)
    if held is None:
        return sorted(int(path.name[:8]) for path in home.glob("*.intent"))
    found = held.listing()[1].items()
    return sorted(int(path.stem) for path, facts in found if path.suffix == ".json" and facts.st_size <= INTENT_BYTES)


def decided_attempts(folder: Place) -> set[str]:
    """Attempts that an intent names, in every group."""
    found = set()
    for home in (folder / "commits").iterdir() if (folder / "commits").is_dir() else []:
        for block in open_intents(folder, home.name):
            with contextlib.suppress(CorruptError):
                if (intent := decided(folder, home.name, block)) is not None:
                    found.add(intent.attempt)
    return found


def _vacancy() -> bytes:
    return f"vacant {uuid.uuid4().hex}\n".encode()
