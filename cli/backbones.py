"""`featstore models, fetch`: which backbones there are, and their weights on this machine ahead of time."""

import contextlib
from typing import Annotated, Any

import typer

from cli import show
from cli.extract import JsonOption
from cli.operations import print_facts

COLUMNS = ["model", "family", "weights", "width", "depth", "patch", "native", "parameters", "licence"]

NORMS = {"final": "tokens after the last norm", "none": "tokens before the last norm"}


def models(
    name: Annotated[
        str | None, typer.Argument(help="a backbone, its hub id or Meta's name: everything about this one")
    ] = None,
    *,
    json: JsonOption = False,
) -> None:
    """Backbones by name; with NAME what its vector is, sizes, normalisation, kernels, pre-training data and licence.

    Examples: `featstore models`; `featstore models dinov3-7b`; `featstore models facebook/dinov2-base --json`.
    """
    from featstore.backbones.catalogue import explain_model, list_models

    if name is not None:
        facts = explain_model(name)
        if json:
            show.emit_json(facts)
        else:
            print_facts(_for_people(facts))
        return
    rows = list_models()
    if json:
        show.emit_json(rows)
        return
    show.table("", COLUMNS, [_row(row) for row in rows], right=("width", "depth", "patch", "native", "parameters"))
    print(
        "`featstore models NAME` explains one, `featstore fetch NAME` gets its weights; also hf:DIR_OR_ID for a folder "
        "or hub id of these families, timm:NAME, and module:function for your own"
    )


def _row(row: dict[str, Any]) -> list[str]:
    return [
        row["model"],
        row["family"],
        row["weights"] + (" (gated)" if row["gated"] else ""),
        *(str(row[key]) for key in ("embed_dim", "depth", "patch_size", "native_size")),
        f"{row['parameters'] / 1e6:.1f} M" if row["parameters"] else "",
        row["licence"].partition(":")[0].partition(";")[0],
    ]


def _for_people(facts: dict[str, Any]) -> dict[str, Any]:
    """The same facts in lines that can be read."""
    cls, patches, size = facts["cls"], facts["patches"], facts["native_size"]
    sizes = facts["sizes"]
    pooled = "pooled by the network" if cls["from"] == "pool" else "a token of the network"
    return {
        "model": facts["model"],
        "also": facts["aliases"] or None,
        "weights": facts["weights"] + (" (gated: accept the licence on its page first)" if facts["gated"] else ""),
        "licence": facts["licence"],
        "feature": facts["feature"],
        "cls": f"{cls['width']} numbers, {pooled}",
        "patches": f"{patches['width']} numbers for each {patches['patch_size']} x {patches['patch_size']} pixels",
        "registers": facts["registers"] or None,
        "sizes": (f"{size} x {size} only" if isinstance(sizes, list) else f"{sizes}; native {size} x {size}"),
        "pos-interp": " | ".join(facts["pos_interp"]) if len(facts["pos_interp"]) > 1 else None,
        "mean, std": ", ".join(map(str, facts["normalisation"]["mean"]))
        + "; "
        + ", ".join(map(str, facts["normalisation"]["std"])),
        "norm": _norm(facts),
        "attention": " | ".join(facts["attention"]) or "none to choose",
        "layers": f"1 to {facts['layers']}" if facts["layers"] else "none to keep",
        "size": f"{facts['parameters'] / 1e6:.1f} M parameters, {facts['gflops']} GFLOP an image at {size} x {size}"
        if facts["parameters"]
        else None,
        "pre-training": {
            item["name"]: item["source"] or "not in the table of this package" for item in facts["pretraining"]
        }
        or "not stated",
        "fetch": facts["fetch"],
        "extract": facts["extract"],
    }


def _norm(facts: dict[str, Any]) -> str | None:
    """Which tokens are taken, and the option for the others where there is one."""
    if facts["norm"] not in NORMS or not facts["norms"]:
        return None
    others = [way for way in facts["norms"] if way != facts["norm"]]
    choice = f" (the default; --norm {others[0]} for {'before' if others[0] == 'none' else 'after'})" if others else ""
    return f"{NORMS[facts['norm']]}{choice}"


def fetch(
    model: Annotated[str, typer.Argument(help="a backbone, its hub id or Meta's name, or hf:OWNER/NAME")],
    *,
    revision: Annotated[
        str | None, typer.Option("--revision", help="branch, tag or commit on the hub; default: its main branch")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Download a backbone's weights ahead, on a machine with network, and print the line for one without.

    Examples: `featstore fetch dinov2-base`; `featstore fetch dinov3-7b --revision COMMIT`. They go to the hub's cache
    (HF_HOME); every byte is compared with the hub's own digests. What is there already is not downloaded again.
    """
    from featstore import files
    from featstore.backbones.fetching import fetch_model

    with contextlib.ExitStack() as stack:
        bars: list[show.Advance] = []
        shown = 0

        def advance(done: int, total: int) -> None:
            nonlocal shown
            if not bars:
                bars.append(stack.enter_context(show.progress("checking", total // 10**6, "MB")))
            bars[0](done // 10**6 - shown)
            shown = done // 10**6

        found = fetch_model(
            model, revision, digest_cache=files.user_cache() / "cache" / "weights.json", advance=advance
        )
    copy, run = found.copied_lines
    if json:
        show.emit_json(
            {
                "model": found.target.model,
                "repo": found.target.repo,
                "revision": found.commit,
                "folder": str(found.folder),
                "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in found.files.items()},
                "checked": "hub" if found.checked else "cache",
                "shared_cache": found.shared_line,
                "copy": copy,
                "copied_folder": run,
            }
        )
        return
    told = "sizes and digests are the hub's" if found.checked else "no network: digests are those that the cache states"
    print(f"{found.target.repo} at {found.commit}: {len(found.files)} files, {show.size(found.num_bytes)}; {told}")
    print(f"  {found.folder}")
    print("where this cache can be seen, it may be read-only:")
    print(f"  {found.shared_line}")
    print("or copy the folder, and there:")
    print(f"  {copy}")
    print(f"  {run}")


COMMANDS = {"models": models, "fetch": fetch}
