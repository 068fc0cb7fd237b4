"""Where the bytes of a sample come from: a file below the root of its data set."""

import hashlib
import os
import stat
from pathlib import Path

HASH_HEX = 32  # 128 bits of SHA-256: enough to tell contents apart


class Inputs:
    """The files of one data set by their paths relative to `root`, as a manifest writes them.

    Raises (every method):
        FileNotFoundError: no such file. OSError: it cannot be read.
    """

    def __init__(self, root: Path):
        self.root = root

    def stat(self, path: str) -> tuple[int, int]:
        """(size in bytes, time of the last change in ns); a folder is no file."""
        found = os.stat(self.root / path)
        if stat.S_ISDIR(found.st_mode):
            raise FileNotFoundError(f"{self.root / path} is a folder")
        return found.st_size, found.st_mtime_ns

    def read(self, path: str, *, first: int = -1) -> bytes:
        """The bytes, or only the first ones."""
        with open(self.root / path, "rb") as file:
            return file.read(first)

    def hash(self, path: str) -> str:
        """SHA-256 of the bytes, shortened to `HASH_HEX` digits."""
        with open(self.root / path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:HASH_HEX]

    def local(self, path: str) -> Path:
        """The file itself, for readers that take no bytes."""
        return self.root / path

    def beside(self, path: str) -> Path | None:
        """Where the file lies, for formats that keep their data in a second file; None inside an archive."""
        return self.root / path
