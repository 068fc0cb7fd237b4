"""The README's table of measurements, from the latest full result file of every stage and its newer parts."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CASES = {
    "gather_warm": "256 random rows, cached",
    "gather_cold": "256 random rows, uncached",
    "grids_gather_warm": "16 random patch grids, cached",
    "grids_gather_cold": "16 random patch grids, uncached",
    "load_warm": "full load, cached",
    "load_cold": "full load, uncached",
    "slice_warm": "a range of rows, cached",
    "write_synced": "write with fsync",
}
# Heading -> rivals as `store_rivals.py` calls them; the one that comes closest to us is shown.
PEERS = {
    "numpy": ("memmap", "np_load", "plain"),
    "zarr-python": ("zarr_oindex", "zarr_slices"),
    "tensorstore": ("tensorstore", "tensorstore_cached"),
    "HDF5": ("hdf5_contiguous", "hdf5_chunked"),
    "Lance": ("lance",),
    "one .pt a row": ("pt_files", "pt_files_loop"),
}


def latest(stage: str) -> dict[str, Any]:
    """The newest result of a stage that was not a quick run."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{stage}-*.json"))]
    full: dict[str, Any] = [record for record in found if not record["quick"]][-1]
    return full


def with_parts(stage: str) -> dict[str, Any]:
    """The newest full result of a stage, and what parts measured anew have since then."""
    full = latest(stage)
    parts = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{stage}_part-*.json"))]
    found = dict(full["results"])
    for record in parts:
        if not record["quick"] and record["time"] > full["time"]:
            found |= record["results"]
    return found


def ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.3g}x ({value['min']:.3g} to {value['max']:.3g})"


def rows() -> list[tuple[str, str, str]]:
    """(what, peer, ratio with its range)."""
    decode, extract = (latest(stage)["results"] for stage in ("decode", "extract"))
    probes = with_parts("probes")
    found = []
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
    singles = {case: value for case, value in probes.items() if case.startswith("one fit")}
    for case, value in probes.items():
        if case != "config" and case not in singles:
            found.append((case, value.get("peer", "scikit-learn"), ratio(value["peer_time_over_ours"])))
    if singles:
        worst = min(singles, key=lambda case: singles[case]["peer_time_over_ours"]["median"])
        value = singles[worst]
        name = f"the worst of {len(singles)} single fits: {worst.removeprefix('one fit, ')}"
        found.append((name, value["peer"], ratio(value["peer_time_over_ours"])))
    return found


def store_rows() -> list[list[str]]:
    """One row a case: our speed relative to each peer at its best, median (quartiles)."""
    cases = latest("store")["results"]["cases"]
    found = []
    for case, text in CASES.items():
        ours = cases[case]["ours"]
        row = [text]
        for names in PEERS.values():
            speeds = [(ours[f"speed_to_{name}"], name) for name in names if f"speed_to_{name}" in ours]
            if speeds:
                speed, name = min(speeds)
                low, high = ours[f"quartiles_speed_to_{name}"]
                row.append(f"{speed:.3g}x ({low:.3g} to {high:.3g})")
            else:
                row.append("")
        found.append(row)
    return found


def main() -> None:
    print(f"| our speed against | {' | '.join(PEERS)} |")
    print("|---" * (len(PEERS) + 1) + "|")
    for line in store_rows():
        print("| " + " | ".join(line) + " |")
    print()
    print("| what | peer | speed against the peer |\n|---|---|---|")
    for row in rows():
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
