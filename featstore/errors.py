"""One tree of errors; each is also the builtin that a caller would expect.

A message says what must hold, what came and what to do. The command line prints it and exits with 2.
"""


class FeatstoreError(Exception):
    """Root of every error that a caller can react to; `about` names the set of several that it is about."""

    about = ""


class ConfigError(FeatstoreError, ValueError):
    """An option or argument has a value that cannot be used."""


class UnknownNameError(FeatstoreError, LookupError):
    """A data set, model, set, task or label has no such name; the message lists the known ones."""


class ManifestError(FeatstoreError, ValueError):
    """A table or folder cannot become a manifest, or the files no longer match it."""


class DecodeError(FeatstoreError, ValueError):
    """The bytes of one image cannot be decoded; the row is kept and marked failed."""


class WeightsError(FeatstoreError, ValueError):
    """Weights were found but do not fit: wrong architecture, missing or extra keys, truncated file."""


class MissingWeightsError(FeatstoreError, FileNotFoundError):
    """Weights are not on this machine and cannot be had: no network, no access, no such place."""


class DeviceError(FeatstoreError, RuntimeError):
    """The device cannot do what the set asks: absent, too small, or without the compute dtype."""


class StoreError(FeatstoreError, OSError):
    """The store cannot be read or written."""


class SchemaError(StoreError):
    """The store was written by another schema version."""


class CorruptError(StoreError):
    """Bytes on disk differ from their checksum, or a committed file is missing."""


class IncompleteError(FeatstoreError, RuntimeError):
    """Rows are asked for that no committed block holds yet."""


class TaskError(FeatstoreError, ValueError):
    """Labels, splits or policies do not make a task that can be fitted and scored."""


class LeakError(TaskError):
    """One group (patient) stands in two splits."""


class Stopped(FeatstoreError, RuntimeError):
    """A run was asked to end and did so cleanly; `code` is the exit status that says who asked."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["Stopped"], tuple[str, int]]:
        return Stopped, (str(self), self.code)
