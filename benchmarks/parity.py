"""Writes docs/parity.md: our tokens beside those of transformers, of Meta's own code and of timm, on equal weights.

python benchmarks/parity.py --meta-dinov2 DIR --meta-dinov3 DIR --timm-site DIR --output docs/parity.md

The folders are Meta's repositories and a folder into which timm and torchvision were unpacked
(`pip install --no-deps --target DIR timm torchvision`); what is not given is left out and said to be so. Ends with
status 1 where a bound is not kept.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import parity_meta
import parity_networks
import torch
import transformers
from parity_networks import Case, images, randomise

from featstore.backbones import describe
from featstore.backbones.tokens import Tokens

FLOAT32_BOUND, META_BOUND = 1e-5, 5e-4
# timm's name, ours, image size or (0, 0) for the native one.
TIMM = (
    ("vit_small_patch14_dinov2", "dinov2-small", (0, 0)),
    ("vit_small_patch14_reg4_dinov2", "dinov2-small-reg", (0, 0)),
    ("vit_small_patch16_dinov3", "dinov3-small", (224, 336)),
    ("vit_small_plus_patch16_dinov3_qkvb", "dinov3-small-plus", (224, 336)),
    ("vit_base_patch16_224", "vit-base", (0, 0)),
)
Row = tuple[str, ...]


class Report:
    """Lines of the page, and what did not keep its bound."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.broken: list[str] = []

    def text(self, *paragraphs: str) -> None:
        for paragraph in paragraphs:
            self.lines += [paragraph, ""]

    def table(self, header: Row, rows: Iterable[Row]) -> None:
        self.lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for row in rows:
            self.lines.append("| " + " | ".join((*row, *("",) * (len(header) - len(row)))) + " |")
            print(*row, sep="  ", flush=True)
        self.lines.append("")

    def bounded(self, value: float, bound: float, what: str) -> str:
        """The value as it is printed, noted where it is above its bound."""
        if not value <= bound:
            self.broken.append(f"{what}: {value:.2e} is above {bound:.0e}")
            return f"**{value:.1e}**"
        return f"{value:.1e}" if value else "0"


def size(height: int, width: int) -> str:
    return f"{height} x {width}"


def lowest_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).min())


def largest(ours: Tokens, cls: torch.Tensor, patches: torch.Tensor) -> float:
    return max(float((ours.cls - cls).abs().max()), float((ours.patches - patches).abs().max()))


def case_rows(case: Case, quick: bool, scratch: Path, report: Report) -> Iterable[Row]:
    """Rows of one network of transformers, saved as the hub has it and read back by us."""
    config = getattr(transformers, f"{case.model}Config")(**{**case.config, **(case.small if quick else {})})
    network = randomise(getattr(transformers, f"{case.model}Model")(config, **case.options))
    folder = scratch / case.label.replace("/", "-")
    network.save_pretrained(folder)
    source = describe(f"hf:{folder}")
    assert source.architecture.family == case.family
    exact = source.load(device="cpu", compute_dtype="float32")
    short = source.load(device="cpu", compute_dtype="bfloat16")
    for height, width in case.small_sizes if quick else case.sizes:
        pixels = images(height, width)
        with torch.inference_mode():
            cls, patches = case.reference(network, pixels)
        difference = report.bounded(
            largest(exact(pixels), cls, patches), FLOAT32_BOUND, f"{case.label} {height} {width}"
        )
        half = short(pixels)
        rounded = Tokens(cls=half.cls.float(), registers=half.registers, patches=half.patches.float(), layers={})
        cosines = (lowest_cosine(half.cls, cls), lowest_cosine(half.patches, patches))
        yield (
            case.label,
            size(height, width),
            difference,
            f"{largest(rounded, cls, patches):.2g}",
            f"{cosines[0]:.5f}",
            f"{cosines[1]:.5f}",
        )


def transformers_rows(quick: bool, scratch: Path, report: Report) -> Iterable[Row]:
    for case in parity_networks.CASES:
        try:
            yield from case_rows(case, quick, scratch, report)
        except Exception as error:  # one family that fails must not hide the others; the status says it
            report.broken.append(f"{case.label}: {type(error).__name__}: {error}")
            yield case.label, f"failed: {type(error).__name__}"


def meta_section(report: Report, folders: dict[str, Path], scratch: Path) -> None:
    """Sections 2 to 4, from Meta's own code."""
    report.text(
        "## Meta's own code, Meta's own checkpoints",
        "Networks of Meta's constructors with random parameters, saved with `torch.save`, read by us as `.pth`; "
        f"max |difference| in float32, at most {META_BOUND:.0e}. Positions are resized as the checkpoint's own code "
        "does it (`--pos-interp meta`, the default for these files).",
    )
    if len(folders) < 2:
        report.text("Not run: needs `--meta-dinov2` and `--meta-dinov3`.")
        return
    versions = ", ".join(f"{name} {_digest(folder, name)}" for name, folder in folders.items())
    report.text(f"SHA-256 of `models/vision_transformer.py`: {versions}.")
    rows = (
        (
            name,
            size(height, width),
            *(report.bounded(value, META_BOUND, f"{name} {height} {width}") for value in values),
        )
        for name, height, width, *values in parity_meta.compare_loaded(folders, scratch)
    )
    report.table(("network", "pixels", "CLS", "patches"), rows)
    report.text(
        "## Positions: `--pos-interp hf` against `meta`",
        "DINOv2 without registers, the same weights through both. Here neighbouring positions of the table are "
        "independent random numbers, so a shift of the sampling places changes as much as it can.",
    )
    report.table(
        ("network", "pixels", "CLS, max", "patches, max", "CLS, lowest cosine", "patches, lowest cosine"),
        (
            ("dinov2-small", size(height, width), f"{cls:.2g}", f"{patches:.2g}", *(f"{c:.5f}" for c in cosines))
            for height, width, cls, patches, *cosines in parity_meta.compare_interpolations(scratch)
        ),
    )
    report.text(
        "## Key maps of the largest networks",
        "Meta's networks and ours without any numbers: every parameter of ours has its own piece of Meta's checkpoint "
        "with a shape that fits, and nothing of it is left over but what is named here.",
    )
    report.table(
        ("network", "our parameters", "numbers", "Meta's tensors", "numbers", "not used"),
        (
            (
                name,
                str(ours),
                f"{numbers:,}",
                str(theirs),
                f"{all_numbers:,}",
                ", ".join(f"`{k}`" for k in kinds) or "none",
            )
            for name, ours, numbers, theirs, all_numbers, kinds in parity_meta.map_keys(folders)
        ),
    )


def timm_rows(site: Path, scratch: Path, report: Report) -> Iterable[Row]:
    """Rows of timm's networks, run in a process of their own and read back by us as timm's files."""
    worker = Path(__file__).with_name("parity_timm.py")
    for theirs, ours, (height, width) in TIMM:
        folder = scratch / theirs
        folder.mkdir()
        command = [sys.executable, str(worker), str(folder), theirs, str(height), str(width)]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)
        try:
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
            pixels, tokens = (torch.load(folder / name, weights_only=True) for name in ("pixels.pt", "tokens.pt"))
            source = describe(ours, weights=folder / "weights.safetensors", norm=None)
            backbone = source.load(device="cpu", compute_dtype="float32")
            value = largest(backbone(pixels), tokens["cls"], tokens["patches"])
            yield theirs, ours, size(*pixels.shape[2:]), report.bounded(value, META_BOUND, theirs)
        except Exception as error:  # as in `transformers_rows`
            report.broken.append(f"timm {theirs}: {type(error).__name__}: {error}")
            yield theirs, ours, f"failed: {type(error).__name__}"


def convolution_rows(site: Path, report: Report) -> Iterable[Row]:
    """Rows of the script that the tests have beside them."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from parity_torchvision import torchvision_parity

    for label, value in torchvision_parity(site).items():
        yield label, report.bounded(value, META_BOUND, label)


def _digest(folder: Path, name: str) -> str:
    file = folder / name / "models" / "vision_transformer.py"
    return f"`{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}`"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meta-dinov2", type=Path)
    parser.add_argument("--meta-dinov3", type=Path)
    parser.add_argument("--timm-site", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="small networks")
    arguments = parser.parse_args()
    folders = {"dinov2": arguments.meta_dinov2, "dinov3": arguments.meta_dinov3}
    transformers.utils.logging.disable_progress_bar()
    report = Report()
    report.text(
        "# Parity",
        "Generated by `benchmarks/parity.py`; do not edit. Random weights in every parameter, noise for images, on a "
        f"CPU; torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
        f"{'; small networks (`--quick`)' if arguments.quick else ''}.",
        "## transformers' own forward",
        "A network of transformers, saved as the hub has it and read by us. float32: max |difference| of CLS and "
        f"patches, at most {FLOAT32_BOUND:.0e}. bfloat16: ours in bfloat16 against transformers in float32, which is "
        "what that precision costs.",
    )
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        report.table(
            ("network", "pixels", "float32, max", "bfloat16, max", "CLS, lowest cosine", "patches, lowest cosine"),
            transformers_rows(arguments.quick, scratch, report),
        )
        meta_section(report, {key: folder for key, folder in folders.items() if folder is not None}, scratch)
        report.text(
            "## timm's own forward",
            f"timm's networks, saved as timm saves them; float32, at most {META_BOUND:.0e}. timm resizes position "
            "tables with antialiasing, so networks with a table are compared at their native size.",
        )
        if arguments.timm_site is None:
            report.text("Not run: needs `--timm-site`.")
        else:
            rows = timm_rows(arguments.timm_site, scratch, report)
            report.table(("timm's name", "ours", "pixels", "max"), rows)
            report.text(
                "Networks of convolutions beside torchvision's and timm's, by `tests/parity_torchvision.py`: max "
                "|difference| over square and oblong images as a part of the largest value."
            )
            report.table(("package and network", "max"), convolution_rows(arguments.timm_site, report))
    arguments.output.write_text("\n".join(report.lines).rstrip() + "\n", encoding="utf-8")
    for line in report.broken:
        print(line, file=sys.stderr)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
