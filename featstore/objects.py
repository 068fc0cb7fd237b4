"""Objects of a bucket by the part of pathlib that the store uses, so that one code reads and writes both.

A key is whole or absent, folders are prefixes, a name can be taken exclusively (`put_new`) and an object replaced only
if it is still the one that was read (`put_over`), which is what commits need. Everything else that a file system has
and a bucket has not (links, renames, syncing) lives in `files.py`.
"""

import fnmatch
import functools
import io
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from featstore.errors import ConfigError, FeatstoreError, StoreError

PIECE_BYTES = 16 * 2**20  # large objects are read in ranges of this size
PARALLEL = 8  # of them at once
UPLOAD_BYTES = 8 * 2**20  # larger objects get the time that a slow line needs
CONFLICT_TRIES, CONFLICT_SECONDS = 6, 0.1  # of a put that met another one; the pause doubles


class ReplacedError(StoreError):
    """An object is not the one any more that was asked for by its tag."""


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """What a listing or a head request says of an object."""

    st_size: int
    st_mtime: float
    e_tag: str | None


@functools.total_ordering
class ObjectPath:
    """`s3://bucket/prefix/...`; the same text is the same object."""

    __slots__ = ("bucket", "key")

    def __init__(self, bucket: str, key: PurePosixPath | str = ""):
        self.bucket = bucket
        self.key = PurePosixPath(key)

    @classmethod
    def parse(cls, text: str) -> "ObjectPath":
        """From `s3://bucket/prefix`.

        Raises:
            ConfigError: no bucket, another scheme, or a prefix with `..` in it.
        """
        found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]*)(?:/+(.*))?", text)
        if not found or ".." in PurePosixPath(found[2] or "").parts:
            raise ConfigError(f"an object store is given as s3://BUCKET/PREFIX, got {text!r}")
        return cls(found[1], (found[2] or "").strip("/"))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self._key}".rstrip("/")

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and (self.bucket, self.key) == (other.bucket, other.key)

    def __lt__(self, other: "ObjectPath") -> bool:
        return (self.bucket, self.key) < (other.bucket, other.key)

    def __hash__(self) -> int:
        return hash((self.bucket, self.key))

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectPath, (self.bucket, str(self.key))

    def __truediv__(self, other: str | PurePosixPath) -> "ObjectPath":
        return ObjectPath(self.bucket, self.key / other)

    @property
    def _key(self) -> str:
        return "" if self.key == PurePosixPath() else str(self.key)

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def stem(self) -> str:
        return self.key.stem

    @property
    def suffix(self) -> str:
        return self.key.suffix

    @property
    def parent(self) -> "ObjectPath":
        return ObjectPath(self.bucket, self.key.parent)

    @property
    def parents(self) -> list["ObjectPath"]:
        return [ObjectPath(self.bucket, parent) for parent in self.key.parents]

    def with_name(self, name: str) -> "ObjectPath":
        return ObjectPath(self.bucket, self.key.with_name(name))

    def with_suffix(self, suffix: str) -> "ObjectPath":
        return ObjectPath(self.bucket, self.key.with_suffix(suffix))

    def relative_to(self, other: "ObjectPath") -> PurePosixPath:
        return self.key.relative_to(other.key)

    def as_posix(self) -> str:
        return str(self)

    def read_bytes(self) -> bytes:
        """The whole object; FileNotFoundError where there is none."""
        return self.read_tagged()[0]

    def read_tagged(self) -> tuple[bytes, str]:
        """The whole object and the tag of these very bytes."""
        import obstore

        with _told(self):
            found = obstore.get(connection(self.bucket).requests, self._key)
            return bytes(found.bytes()), str(found.meta["e_tag"])

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, stop: int, e_tag: str | None = None) -> bytes:
        """Bytes start to stop - 1.

        Raises:
            FileNotFoundError: no such object.
            ReplacedError: the object is not the one with this tag any more.
        """
        import obstore
        from obstore.exceptions import PreconditionError

        if stop <= start:
            return b""
        options: Any = {"range": (start, stop), **({"if_match": e_tag} if e_tag else {})}
        with _told(self):
            try:
                data = bytes(obstore.get(connection(self.bucket).requests, self._key, options=options).bytes())
                if len(data) != stop - start:
                    raise StoreError(f"{self}: {stop - start} bytes asked for, {len(data)} came; run it again")
                return data
            except PreconditionError as error:
                raise ReplacedError(f"{self}: the object was replaced while it was read; open it again") from error

    def pieces(self, facts: ObjectStat) -> Iterator[bytes]:
        """The object that `facts` describes, in order, several ranges on their way at once (128 MiB in memory)."""
        starts = list(range(0, facts.st_size, PIECE_BYTES))
        with ThreadPoolExecutor(PARALLEL) as pool:
            for first in range(0, len(starts), PARALLEL):
                yield from pool.map(
                    lambda start: self.read_range(start, min(start + PIECE_BYTES, facts.st_size), facts.e_tag),
                    starts[first : first + PARALLEL],
                )

    def open(self) -> "ObjectReader":
        """A buffered binary file over ranges of the object, for reading in order or in places."""
        return ObjectReader(self)

    def put(self, data: bytes | memoryview) -> None:
        """Write or replace the object."""
        self._put_settled(data, "overwrite", lambda: False)

    def put_new(self, data: bytes | memoryview) -> bool:
        """Write the object unless there is one; True if this call wrote it.

        An answer that was lost on the way and asked for again can come back as False though this call wrote it.
        """
        if not connection(self.bucket).conditional:  # one writer: nobody comes in between
            if self.is_file():
                return False
            self.put(data)
            return True
        return self._put_settled(data, "create", self.is_file)

    def put_over(self, data: bytes | memoryview, e_tag: str) -> bool:
        """Replace the object if it is still the one with this tag; True if this call did."""
        from obstore.exceptions import PreconditionError

        if not connection(self.bucket).conditional:
            if not self.is_file() or self.stat().e_tag != e_tag:
                return False
            self.put(data)
            return True
        try:
            return self._put_settled(data, {"e_tag": e_tag}, lambda: self.stat().e_tag != e_tag)
        except (PreconditionError, FileNotFoundError):
            return False

    def _put_settled(self, data: bytes | memoryview, mode: Any, overtaken: Callable[[], bool]) -> bool:
        """Put; False where `overtaken` says that another put settled the matter.

        S3 answers 409 to a put that met another one on its way, which says nothing about what is there: asked again.

        Raises:
            StoreError: that goes on.
        """
        from obstore.exceptions import AlreadyExistsError

        for number in range(CONFLICT_TRIES):
            try:
                self._put(data, mode)
                return True
            except AlreadyExistsError:
                if overtaken():
                    return False
                time.sleep(random.uniform(0.5, 1) * CONFLICT_SECONDS * 2**number)
        raise StoreError(
            f"{self}: the bucket says of {CONFLICT_TRIES} puts that each met another one (409); run the same command "
            "again; what is committed stays"
        )

    def _put(self, data: bytes | memoryview, mode: Any) -> None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        held = connection(self.bucket)
        client = held.uploads if memoryview(data).nbytes > UPLOAD_BYTES else held.requests
        passed = (AlreadyExistsError,) if isinstance(mode, str) else (AlreadyExistsError, PreconditionError)
        with _told(self, *passed):
            # In one request: what is put in parts cannot be put on a condition.
            obstore.put(client, self._key, data, mode=mode, use_multipart=False)

    def stat(self) -> ObjectStat:
        """Size, time and tag; FileNotFoundError where there is none."""
        import obstore

        with _told(self):
            return _facts(obstore.head(connection(self.bucket).requests, self._key))

    def is_file(self) -> bool:
        if not self._key:
            return False
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether any object lies below."""
        return next(self.walk(), None) is not None

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object; a bucket does not say whether there was one, so `missing_ok` is always so."""
        import obstore

        with _told(self):
            obstore.delete(connection(self.bucket).requests, self._key)

    def remove_below(self) -> None:
        """Remove every object below this prefix."""
        import obstore

        keys = [path._key for path, _ in self.walk()]
        with _told(self):
            if keys:
                obstore.delete(connection(self.bucket).requests, keys)

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Objects and prefixes one level below."""
        folders, objects = self.listing()
        yield from sorted([*folders, *objects])

    def listing(self) -> tuple[list["ObjectPath"], dict["ObjectPath", ObjectStat]]:
        """(prefixes, objects with their facts) one level below, a thousand names a request."""
        import obstore

        with _told(self):
            found = obstore.list_with_delimiter(connection(self.bucket).requests, self._prefix)
            objects = {ObjectPath(self.bucket, item["path"]): _facts(item) for item in found["objects"]}
            return [ObjectPath(self.bucket, key) for key in found["common_prefixes"]], objects

    def glob(self, pattern: str) -> list["ObjectPath"]:
        """Objects and prefixes below that match; `*` stands for anything but a slash. One listing a folder matched."""
        found = [self]
        parts = pattern.split("/")
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            if not re.search(r"[*?\[]", part):
                found = [path / part for path in found]
                found = [path for path in found if not last or path.is_file()]
                continue
            matched = []
            for path in found:
                folders, objects = path.listing()
                names = [*folders, *objects] if last else folders
                matched += [name for name in names if fnmatch.fnmatchcase(name.name, part)]
            found = matched
        return sorted(found)

    def rglob(self, pattern: str) -> list["ObjectPath"]:
        """Objects anywhere below whose name matches; there are no folders among them."""
        return sorted(path for path, _ in self.walk() if fnmatch.fnmatchcase(path.name, pattern))

    @property
    def _prefix(self) -> str | None:
        return f"{self._key}/" if self._key else None

    def walk(self) -> Iterator[tuple["ObjectPath", ObjectStat]]:
        """Every object below and its facts, in the order of the keys, a thousand a request."""
        import obstore

        with _told(self):
            for batch in obstore.list(connection(self.bucket).requests, self._prefix):
                yield from ((ObjectPath(self.bucket, item["path"]), _facts(item)) for item in batch)


def _facts(item: Any) -> ObjectStat:
    return ObjectStat(item["size"], item["last_modified"].timestamp(), item.get("e_tag"))


class ObjectReader(io.RawIOBase):
    """Reads through a window of one piece, so that reading in order is one request a piece."""

    def __init__(self, path: ObjectPath):
        self.path, self.facts = path, path.stat()
        self._position, self._start, self._window = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.facts.st_size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        stop = self.facts.st_size if size is None or size < 0 else min(self._position + size, self.facts.st_size)
        parts = []
        while self._position < stop:
            offset = self._position - self._start
            if not 0 <= offset < len(self._window):
                self._start, offset = self._position, 0
                end = min(self._position + PIECE_BYTES, self.facts.st_size)
                self._window = self.path.read_range(self._position, end, self.facts.e_tag)
            parts.append(self._window[offset : offset + stop - self._position])
            self._position += len(parts[-1])
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


if TYPE_CHECKING:
    Place = Path  # an ObjectPath is used like a Path, by the methods that both have
else:
    Place = Path | ObjectPath


def as_object(place: Place) -> ObjectPath | None:
    """The place as an object where it is one, for what only buckets can do; None for local paths."""
    value: Any = place
    return value if isinstance(value, ObjectPath) else None


def parse_place(text: str | Place) -> Place:
    """A local path, or an object store where the text begins like one.

    Raises:
        ConfigError: another scheme.
    """
    if str(text).startswith("s3:/"):  # a Path made of such a text has lost a slash
        place: Place = cast(Any, ObjectPath.parse(re.sub("^s3:/+", "s3://", str(text))))
        return place
    if "://" in str(text):
        raise ConfigError(f"a store is a folder or s3://BUCKET/PREFIX, got {str(text)!r}")
    return Path(text).expanduser().resolve()


@dataclass(slots=True)
class Connection:
    """Two clients of a bucket (`uploads` waits longer), and what is known of it.

    `conditional`: it keeps the conditions of a put. `entered`: stores in it that this process may write to, each with
    the lock that it holds or None (see `store/bucket.py`).
    """

    requests: Any
    uploads: Any
    conditional: bool = True
    entered: dict[str, Any] = field(default_factory=dict)


def connection(bucket: str) -> Connection:
    """The connection to a bucket; endpoint, region and keys come from the AWS variables or the instance's role."""
    return _connect(bucket, tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


@functools.cache
def _connect(bucket: str, variables: tuple[tuple[str, str], ...]) -> Connection:
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise StoreError("s3:// stores need the package obstore: pip install 'featstore[remote]'") from error
    plain = dict(variables).get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")

    def client(timeout: str) -> Any:
        return S3Store(
            bucket,
            client_options={"connect_timeout": "3s", "timeout": timeout, "allow_http": plain},
            # Refused connections, dropped ones and the server's own errors are asked again three times.
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=10)},
        )

    return Connection(client("60s"), client("900s"))


@contextmanager
def _told(path: ObjectPath, *passed: type[Exception]) -> Iterator[None]:
    """Turn what obstore raises into what the system raises for files; `passed` go on as they are."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (FeatstoreError, *passed)):
            raise
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        text = str(error)
        if "NoSuchBucket" in text:
            raise StoreError(
                f"{path}: the bucket {path.bucket!r} does not exist; create it, or check its name and AWS_ENDPOINT_URL"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(2, "no such object", str(path)) from error
        if isinstance(error, (PermissionDeniedError, UnauthenticatedError, PermissionError)):
            raise StoreError(
                f"{path}: access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they may do here"
            ) from error
        if isinstance(error, (BaseError, OSError)):
            reason = text.split("Debug source")[0].strip().splitlines()[0] if text.strip() else type(error).__name__
            raise StoreError(
                f"{path}: the object store cannot be used ({reason}); check AWS_ENDPOINT_URL, AWS_REGION, keys and "
                "network, then run the same command again; what is committed stays"
            ) from error
        raise
