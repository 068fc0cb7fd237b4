"""The README's table of measurements, from the latest full result file of every stage."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def latest(stage: str) -> dict[str, Any]:
    """The newest result of a stage that was not a quick run."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{stage}-*.json"))]
    full: dict[str, Any] = [record for record in found if not record["quick"]][-1]
    return full


def ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.3g}x ({value['min']:.3g} to {value['max']:.3g})"


def rows() -> list[tuple[str, str, str]]:
    """(what, peer, ratio with its range)."""
    store, decode, extract, probes = (latest(stage)["results"] for stage in ("store", "decode", "extract", "probes"))
    found = []
    names = {
        "gather_warm": "256 random rows, cached",
        "gather_cold": "256 random rows, uncached",
        "load_warm": "full load, cached",
    }
    for case, text in names.items():
        ours = store["cases"][case]["ours"]
        key = next(name for name in ours if name.startswith("speed_to_"))
        low, high = ours[f"quartiles_{key}"]
        peer = "np.load" if key.endswith("np_load") else "np.memmap"
        found.append((f"store: {text}", peer, f"{ours[key]:.3g}x (quartiles {low:.3g} to {high:.3g})"))
    for case, value in decode.items():
        found.append(
            (
                f"decode and resize, {case}, one thread",
                "Pillow to RGB",
                ratio(value["peer_time_over_ours"]["Pillow RGB"]),
            )
        )
    for ours, key in (("float32", "peer_time_over_ours"), ("bfloat16", "peer_time_over_ours_bfloat16")):
        for peer in ("naive loop, batch 1", "naive loop, batch 16"):
            found.append((f"extract ViT-S/14 at 224, {ours}", f"{peer}, float32", ratio(extract[key][peer])))
    for case, value in probes.items():
        if case != "config":
            found.append((case, "scikit-learn", ratio(value["peer_time_over_ours"])))
    return found


def main() -> None:
    print("| what | peer | speed against the peer |\n|---|---|---|")
    for row in rows():
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
