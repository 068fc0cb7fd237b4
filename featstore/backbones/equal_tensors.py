"""Whether two files of weights hold the same numbers, whatever their format, key names, order and packing.

The hub, Meta and timm publish one network in three files with three digests, and identity is that of bytes. A digest
over canonical names, shapes and float32 values links them. It reads every byte, so it is made on demand and remembered.
"""

import hashlib
import math
import re
from pathlib import Path
from typing import Any

from featstore.backbones.digests import recall, remember
from featstore.backbones.source import FAMILIES, BackboneSource, find_family

RULE = 1  # raise it whenever another digest would come out


def same_tensors(a: dict[str, Any], b: dict[str, Any], cache: Path | None) -> bool | None:
    """Whether the weights in two sets' identities are equal tensors; None where that was not computed yet."""
    if a["weights"] == b["weights"]:
        return True
    if a["architecture"]["family"] != b["architecture"]["family"]:
        return False
    known = [recall(cache, _key(each["architecture"]["family"], each["weights"])) for each in (a, b)]
    found = [entry.get("tensors") for entry in known if entry is not None]
    return None if len(found) < 2 or None in found else found[0] == found[1]


def tensors_digest(source: BackboneSource, cache: Path | None = None) -> str | None:
    """SHA-256 over names, shapes and float32 values of what a network takes from its files.

    Names and packing are those of the family's hub files; what the tokens do not depend on is left out. Stored float16
    and bfloat16 count as the float32 of the same value. Reads one tensor at a time; None for weights that are no files
    of a known family.

    Raises:
        WeightsError: the files do not fit the architecture.
    """
    files = getattr(source.loader, "files", ())
    if not files or source.architecture.family not in FAMILIES:
        return None
    key = _key(source.architecture.family, source.weights["digest"])
    known = recall(cache, key)
    if known is not None and isinstance(known.get("tensors"), str):
        return str(known["tensors"])
    found = _digest(source, files)
    if cache is not None:
        remember(cache, key, {"tensors": found})
    return found


def _key(family: str, digest: str) -> str:
    return f"{RULE} {family} {digest}"


def _digest(source: BackboneSource, files: tuple[Path, ...]) -> str:
    import torch

    from featstore.backbones import matching
    from featstore.backbones.network import build_empty, place, weights_of
    from featstore.backbones.tensors import open_files

    family, tensors = find_family(source.architecture.family), open_files(files)
    network = build_empty(source.architecture, family)
    shapes = {name: tuple(value.shape) for name, value in weights_of(network).items()}
    match = matching.match(family, shapes, tensors)
    matching.check_shapes(match, shapes, tensors)
    # What a dialect lacks is zero, or made of other tensors once the rest is in place.
    for live in shapes.keys() - match.keys.keys():
        place(network, live, torch.zeros(shapes[live]))
    if match.dialect.after is not None:
        match.dialect.after(network, tensors)
    made = weights_of(network)
    hub = family.dialects[0]
    pieces: dict[str, list[tuple[int, str]]] = {}
    for live in shapes:
        if not any(re.match(pattern, live) for pattern in hub.optional):
            hub_key = hub.key(live)
            pieces.setdefault(hub_key.name, []).append((hub_key.part, live))
    lines = []
    for name, parts in sorted(pieces.items()):
        summary, count = hashlib.sha256(), 0
        for _, live in sorted(parts):
            if live in match.keys:
                values = tensors.read(match.keys[live], shapes[live], torch.float32)
            else:
                values = made[live].float().contiguous()
            summary.update(values.view(-1).view(torch.uint8).numpy().data)
            count += math.prod(shapes[live])
        # Axes of length 1 and the cut into pieces may differ between versions; the last axis of a piece does not.
        lines.append(f"{name} {count} {shapes[parts[0][1]][-1:]} {summary.hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
