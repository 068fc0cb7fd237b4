"""`featstore intensities`: how values become grey levels, and the presets of papers."""

import textwrap
from collections.abc import Callable
from typing import Any

from cli import show
from cli.extract import JsonOption


def intensities(*, json: JsonOption = False) -> None:
    """Steps of `--intensity`, named windows with their numbers, and the presets of `--published` with what deviates.

    Steps are joined by "+": the first maps the values of the file to grey levels, the others work on those levels.
    Low-is-white images (DICOM MONOCHROME1) are turned round after the first step.

    Examples: `featstore extract --model dinov3-base --intensity percentile:1-99`; `... --intensity minmax+clahe`;
    `... --intensity windows:lung,mediastinum,bone`; `... --published dinov3-cxr`.
    """
    from featstore.images.intensity import GRAMMAR, LATER, WINDOWS
    from featstore.images.published import PUBLISHED

    presets: dict[str, Any] = {
        name: {
            "title": preset.title,
            "source": preset.source,
            "intensity": preset.intensity,
            "geometry": preset.geometry,
            "dicom_mode": preset.dicom_mode,
            "mean": preset.mean,
            "std": preset.std,
            "sizes": preset.sizes,
            "deviations": preset.deviations,
        }
        for name, preset in sorted(PUBLISHED.items())
    }
    if json:
        show.emit_json({"steps": GRAMMAR, "later": LATER, "windows": WINDOWS, "published": presets})
        return
    print('--intensity: steps joined by "+", such as window:lung+clahe')
    _print_pairs(GRAMMAR)
    print(
        f"after the first step: {', '.join(LATER)}; equalise and clahe round to whole levels first.\n"
        "Nothing in a file says whether it was equalised before it was published; 8-bit releases may have been."
    )
    print("\nnamed windows, in Hounsfield units from black to white (centre/width)")
    _print_pairs(
        {name: f"{low:g} to {high:g} ({(low + high) / 2:g}/{high - low:g})" for name, (low, high) in WINDOWS.items()}
    )
    print("\n--published: presets that settle intensity, geometry, DICOM mode, size, mean and std")
    for name, preset in presets.items():
        print(f"  {name}: {preset['title']}")
        norm = "the model's mean and std" if preset["mean"] is None else f"mean {preset['mean']}, std {preset['std']}"
        print(
            f"    {preset['intensity']}, {preset['geometry']}, {preset['dicom_mode']}, {norm}, "
            f"{' or '.join(map(str, preset['sizes']))} pixels; {preset['source']}"
        )
        for sentence in preset["deviations"]:
            print(f"    not as published: {sentence}")


def _print_pairs(pairs: dict[str, str]) -> None:
    width = max(map(len, pairs)) + 2
    for name, text in pairs.items():
        lines = textwrap.wrap(text, 118 - width)
        print(f"  {name:{width}}{lines[0]}")
        for line in lines[1:]:
            print(" " * (width + 2) + line)


COMMANDS: dict[str, Callable[..., None]] = {"intensities": intensities}
