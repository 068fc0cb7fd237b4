"""What a head on cached features cost, in the same fields as a fine-tuned network's, and what that leaves out."""

import sys
import time
from typing import Any

from featstore.records import peak_memory_bytes

# Of records of frozen probes, whose features were extracted before, once for all heads of a set.
NOT_COUNTED = "extraction of the features"
COSTS_LINE = (
    "time and memory of a frozen probe are those of its head; extraction is paid once for all heads and is not in them"
)


class HeadClock:
    """Measures from when it is made: seconds, GPU-seconds where torch took memory on one, largest memory."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._device: int | None = None  # heads compute on the current one
        if (cuda := _cuda()) is not None:
            self._device = cuda.current_device()
            cuda.reset_peak_memory_stats(self._device)

    def cost(self, num_parameters: int) -> dict[str, Any]:
        """The cost columns of a record; memory of this process is its largest so far, bytes."""
        seconds = round(time.monotonic() - self._started, 3)
        cuda = _cuda()
        taken = 0 if cuda is None else int(cuda.max_memory_allocated(self._device))
        return {
            "seconds": seconds,
            "gpu_seconds": seconds if taken else 0.0,
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_gpu_memory_bytes": taken,
            "trainable_parameters": num_parameters,
            "not_counted": NOT_COUNTED,
        }


def _cuda() -> Any:
    """torch.cuda where this program has used it by now; a head that needs no torch imports none."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
