"""Objects of a bucket by the part of pathlib that the store uses, so that one code reads and writes both.

A key is whole or absent, folders are prefixes, and a name can be taken exclusively (`put_new`), which is what commits
need. Everything else that a file system has and a bucket has not (links, renames, syncing) lives in `files.py`.
"""

import fnmatch
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from featstore.errors import ConfigError, StoreError


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
        return ObjectPath, (self.bucket, self.key)

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

    def relative_to(self, other: "ObjectPath") -> PurePosixPath:
        return self.key.relative_to(other.key)

    def as_posix(self) -> str:
        return str(self)

    def read_bytes(self) -> bytes:
        """The whole object; FileNotFoundError where there is none."""
        import obstore

        with _told(self):
            return bytes(obstore.get(bucket_store(self.bucket), self._key).bytes())

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def put(self, data: bytes) -> None:
        """Write or replace the object."""
        import obstore

        with _told(self):
            obstore.put(bucket_store(self.bucket), self._key, data, use_multipart=False)

    def put_new(self, data: bytes) -> bool:
        """Write the object unless there is one; True if this call wrote it."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with _told(self):
            try:
                obstore.put(bucket_store(self.bucket), self._key, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

    def stat(self) -> ObjectStat:
        """Size, time and tag; FileNotFoundError where there is none."""
        import obstore

        with _told(self):
            facts = obstore.head(bucket_store(self.bucket), self._key)
        return ObjectStat(facts["size"], facts["last_modified"].timestamp(), facts.get("e_tag"))

    def is_file(self) -> bool:
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether any object lies below."""
        return next(self._below(), None) is not None

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object; a bucket does not say whether there was one, so `missing_ok` is always so."""
        import obstore

        with _told(self):
            obstore.delete(bucket_store(self.bucket), self._key)

    def iterdir(self) -> Iterator["ObjectPath"]:
        """Objects and prefixes one level below."""
        import obstore

        with _told(self):
            found = obstore.list_with_delimiter(bucket_store(self.bucket), self._prefix)
        keys = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
        yield from (ObjectPath(self.bucket, key) for key in sorted(keys))

    def glob(self, pattern: str) -> list["ObjectPath"]:
        """Objects below whose relative key matches, `*` standing for anything but a slash; prefixes are no match."""
        depth = pattern.count("/")
        head = pattern.split("*")[0].rpartition("/")[0]
        base = self / head if head else self
        found = []
        for path in base._below():
            relative = path.relative_to(self)
            parts = zip(relative.parts, pattern.split("/"))
            if len(relative.parts) == depth + 1 and all(fnmatch.fnmatchcase(part, want) for part, want in parts):
                found.append(path)
        return sorted(found)

    def rglob(self, pattern: str) -> list["ObjectPath"]:
        """Objects anywhere below whose name matches."""
        return sorted(path for path in self._below() if fnmatch.fnmatchcase(path.name, pattern))

    @property
    def _prefix(self) -> str | None:
        return f"{self._key}/" if self._key else None

    def _below(self) -> Iterator["ObjectPath"]:
        import obstore

        with _told(self):
            for batch in obstore.list(bucket_store(self.bucket), self._prefix):
                yield from (ObjectPath(self.bucket, item["path"]) for item in batch)


if TYPE_CHECKING:
    Place = Path  # an ObjectPath is used like a Path, by the methods that both have
else:
    Place = Path | ObjectPath


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


@functools.cache
def bucket_store(bucket: str) -> Any:
    """The connection to a bucket; endpoint, region and keys come from the AWS variables or the instance's role."""
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise StoreError("s3:// stores need the package obstore: pip install 'featstore[remote]'") from error
    return S3Store(bucket)


class _told:
    """Turn what obstore raises into what the system raises for files."""

    def __init__(self, path: ObjectPath):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, (OSError, GeneratorExit)):
            return
        from obstore.exceptions import BaseError, NotFoundError

        if isinstance(error, NotFoundError):
            raise FileNotFoundError(2, "no such object", str(self.path)) from error
        if isinstance(error, BaseError):
            raise StoreError(f"{self.path}: the object store answers: {str(error).splitlines()[0]}") from error
