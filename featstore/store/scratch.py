"""Shards on a local disk until their block is whole: for buckets, which take whole objects, and for `--stage`."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from featstore import files
from featstore.errors import ConfigError, FeatstoreError, StoreError
from featstore.objects import Place, as_object
from featstore.staging import RESERVE
from featstore.store.layout import ArraySpec
from featstore.store.shards import ShardWriter

FOLDER = "writing"  # below the stage: a folder for each block that is open, named after its writer
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Scratch:
    """Where the shards of one block stand until its commit, a context: on the local disk `stage`, or beside the marker.

    Without a stage shards of a bucket stand in the user's cache folder, those of a folder in `home`, the attempt's own.
    A shard gets its whole space on the stage when it is begun, or goes to `home` at once, so that no disk fills up half
    way. `notes` says why a stage was not used. What killed processes of this machine left there is removed.
    """

    def __init__(self, home: Place, stage: Path | None):
        self.notes: list[str] = []
        self._home = home
        self._stage = None if stage is None else stage.absolute()
        self._folder: Path | None = None

    def __enter__(self) -> "Scratch":
        if self._stage is not None:
            try:
                self._folder = _own_folder(self._stage / FOLDER)
            except OSError as error:
                self._refuse(error)
        if self._folder is None and as_object(self._home) is not None:
            with files.writing(files.user_cache()):
                self._folder = _own_folder(files.user_cache() / FOLDER)
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def begin(self, array: ArraySpec, name: str, rows: int, rows_per_block: int) -> ShardWriter:
        """A writer for the shard file `name` that will hold so many rows."""
        if self._folder is not None:
            writer = _writer(self._folder / name, array, rows_per_block)
            if self._stage is None or as_object(self._home) is not None:
                return writer
            try:
                _reserve(writer, rows)
                return writer
            except OSError as error:
                writer.discard()
                self._refuse(error)
        assert isinstance(self._home, Path)
        return _writer(self._home / name, array, rows_per_block)

    def _refuse(self, error: OSError) -> None:
        note = f"--stage {self._stage}: blocks are written to the store directly ({error.strerror or error})"
        self.notes = [note]

    @contextlib.contextmanager
    def writing(self, path: Path | None = None) -> Iterator[None]:
        """Name the place whose disk refuses to write `path`, or to make anything there.

        Raises:
            StoreError: it does.
        """
        if self._stage is None or path is None or not path.is_relative_to(self._stage):
            with files.writing(self._home if path is None else path.parent):
                yield
            return
        try:
            yield
        except FeatstoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"{self._stage}: cannot write ({error.strerror or error}); free space there, name another --stage or "
                "leave it out, then run the same command again; what is committed stays"
            ) from error

    def deliver(self, name: str) -> None:
        """Bring a finished shard file home, whole and on the disk; the local one goes."""
        if self._folder is None or not (self._folder / name).exists():  # at home, or there since a call before
            return
        local = self._folder / name
        if as_object(self._home) is not None:
            files.upload(local, self._home / name)
        else:
            target = Path(str(self._home), name)
            shutil.copyfile(local, target)
            with open(target, "rb+") as file:
                files.sync(file.fileno(), target)
        local.unlink()


def check_stage(stage: Path | None, store: Place) -> None:
    """A stage is for copies: none of them belongs in the store.

    Raises:
        ConfigError: the stage lies in the store.
    """
    if stage is not None and isinstance(store, Path) and stage.resolve().is_relative_to(store.resolve()):
        raise ConfigError(f"--stage {stage} lies in the store {store}; name a folder on a local disk")


def _own_folder(home: Path) -> Path:
    home.parent.mkdir(parents=True, exist_ok=True)
    home.mkdir(mode=0o700, exist_ok=True)
    for left in home.iterdir():
        if files.is_dead(left.name):
            shutil.rmtree(left, ignore_errors=True)
    folder = home / files.own_name()
    folder.mkdir()
    return folder


def _writer(path: Path, array: ArraySpec, rows_per_block: int) -> ShardWriter:
    shard_rows, chunk_rows = array.layout(rows_per_block)
    return ShardWriter(path, row_shape=array.row_shape, dtype=array.dtype, chunk_rows=chunk_rows, shard_rows=shard_rows)


def _reserve(writer: ShardWriter, rows: int) -> None:
    """Give a new shard file the space of all its rows.

    Raises:
        OSError: there is not so much.
    """
    layout = writer.layout
    size = -(-rows // layout.chunk_rows) * layout.stride + layout.index_bytes
    facts = os.statvfs(writer.path.parent)
    if size + RESERVE > facts.f_bavail * facts.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if not hasattr(os, "posix_fallocate"):
        return
    with open(writer.path, "rb+") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in FULL:  # else this file system gives no space in advance
                raise
