"""Lack of memory in fine-tuning: said with what was asked for and what takes less."""

from collections.abc import Iterator
from contextlib import contextmanager

from featstore.errors import DeviceError, FeatstoreError
from featstore.extraction.batching import is_out_of_memory
from probes.finetune_arm import Arm
from probes.tuning_cost import on_gpu

HOST = ("DefaultCPUAllocator", "bad_alloc")  # in errors of the host's memory, where a GPU computes too


@contextmanager
def advised(arm: Arm) -> Iterator[None]:
    """Within it lack of memory is a `DeviceError` that says what to do; every other error passes as it is."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, FeatstoreError) or not is_out_of_memory(error):
            raise
        raise DeviceError(describe_lack(arm, error)) from error


def describe_lack(arm: Arm, error: BaseException) -> str:
    """What was too much, and what takes less: options with which the same run goes on, then those of another run."""
    settled, work, team = arm.settled, arm.work, arm.team
    batch = settled.values["batch"]
    at_once = min(work.micro or batch, -(-batch // team.world))
    least = 2 if arm.moves else 1  # batch norms that move need two
    goes_on: list[str] = []
    another = ["--compute-dtype bfloat16"] if settled.precision == "float32" else []
    another.append("a smaller --res or model")
    if at_once > least:
        # What batch norms take statistics of decides about the result.
        (another if arm.moves else goes_on).insert(0, f"--micro {max(least, at_once // 2)}")
    if not work.checkpointing and not arm.moves:
        goes_on.append("--checkpointing")
    spec = arm.identity["preprocess"]
    host = isinstance(error, MemoryError) or any(word in str(error) for word in HOST)
    place = team.device if on_gpu(team) and not host else "this machine"
    asked = [f"--batch {batch}", f"{at_once} at once", f"{spec['width']}x{spec['height']} pixels", settled.precision]
    asked += [f"{team.world} processes"] if team.world > 1 else []
    said = str(error).partition("\n")[0][:200] or type(error).__name__
    others = f"{', '.join(another)} make{'s' * (len(another) == 1)} another run"
    ways = f"give {' or '.join(goes_on)}, and the same command goes on from the last checkpoint; " if goes_on else ""
    return (
        f"{place} has no memory for {settled.method} with {', '.join(asked)} ({said}); {ways}{others} that takes less"
    )
