"""Inputs whose files kill the process that reads them, or keep it waiting; for tests of worker processes."""

import os
import signal
import time
from pathlib import Path

from featstore.inputs import Inputs


class HostileInputs(Inputs):
    """`crash*` segfaults, `once*` only the first time, `hang*` never returns, `broken*` is a mistake of ours."""

    def __reduce__(self) -> tuple[type["HostileInputs"], tuple[Path]]:
        return HostileInputs, (self.root,)

    def read(self, path: str, *, first: int = -1) -> bytes:
        data = super().read(path, first=first)
        if path.startswith("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if path.startswith("once") and not (self.root / "done").exists():
            (self.root / "done").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if path.startswith("hang"):
            time.sleep(1000)
        if path.startswith("broken"):
            raise KeyError(path)
        return data


class UnreadableInputs(Inputs):
    """Cannot be built again in another process."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("no number",)
