"""What backbones were trained on, as far as it is published, and whether a data set's images are among it.

A score on images that a network has seen says less about images that it has not. Three answers: `yes`, `no`, and
`unknown` wherever the published list is not closed: nobody can tell which radiographs a crawl of the web holds.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from featstore.errors import WeightsError

Overlap = Literal["yes", "no", "unknown"]

# Data set families whose images are (partly) those of another one.
SAME_IMAGES: Mapping[str, tuple[str, ...]] = {
    "rsna": ("nih",),  # drawn from ChestX-ray14
}
# Families that say nothing of the images in them: a folder may hold anything, ImageNet too.
ANYTHING = ("coco", "folder", "image-masks", "import", "table")
# Rendered by this package, so nobody was trained on it.
RENDERED = ("phantom",)
RUN_FACTS = "about.json"  # beside the weights of a fine-tuned network
UNSTATED = "unstated"  # stands for training that the files of unknown origin may have had


@dataclass(frozen=True, slots=True)
class Corpus:
    """One pre-training set.

    `holds` are families of `featstore.datasets`; `closed` says that what it consists of is published, so that it holds
    no other family's images; `source` says where.
    """

    source: str
    holds: tuple[str, ...] = ()
    closed: bool = False


_NATURAL = "photographs with labels of everyday things; no medical data set is among them"
_CRAWL = "images from the web; nobody has published which"

CORPORA: Mapping[str, Corpus] = {
    "ImageNet-1k": Corpus(f"Russakovsky et al. 2015: {_NATURAL}", closed=True),
    "ImageNet-21k": Corpus(f"Deng et al. 2009: {_NATURAL}", closed=True),
    "ImageNet-22k": Corpus(f"Deng et al. 2009: {_NATURAL}", closed=True),
    "SA-1B": Corpus("Kirillov et al. 2023: licensed photographs of one provider", closed=True),
    "SAT-493M": Corpus("Simeoni et al. 2025: satellite images at 0.6 m", closed=True),
    "LVD-142M": Corpus(f"Oquab et al. 2023: curated data sets and, for the most part, {_CRAWL}"),
    "LVD-1689M": Corpus(f"Simeoni et al. 2025: {_CRAWL}"),
    "WIT-400M": Corpus(f"Radford et al. 2021: {_CRAWL}"),
    "LAION-2B": Corpus(f"Schuhmann et al. 2022: {_CRAWL}"),
    "PMC-15M": Corpus("Zhang et al. 2023: figures of articles in PubMed Central, where public data sets are shown"),
    "Mass-100K": Corpus(
        "Chen et al. 2024 and the model's card: slides of two Boston hospitals and of GTEx; public collections that "
        "serve as benchmarks, CAMELYON among them, were left out",
        closed=True,
    ),
    "GTEx": Corpus("GTEx consortium: slides of healthy tissue of its own donors", closed=True),
    "CONCH-1.17M": Corpus("Lu et al. 2024: figures of articles and of teaching material, not listed one by one"),
    "MIMIC-CXR": Corpus("Johnson et al. 2019", holds=("mimic-cxr",), closed=True),
    "CheXpert": Corpus("Irvin et al. 2019", holds=("chexpert",), closed=True),
    "NIH ChestX-ray14": Corpus("Wang et al. 2017", holds=("nih",), closed=True),
    "PadChest": Corpus("Bustos et al. 2020", holds=("padchest",), closed=True),
    "BRAX": Corpus("Reis et al. 2022", closed=True),
    # What the demonstration weights of this package were distilled on, besides ImageNet and ChestX-ray14.
    "brain tumor (figshare 1512427)": Corpus("Cheng et al. 2015", holds=("brain-tumor",), closed=True),
    "COVID-19 X-rays (Hannover)": Corpus("doi:10.6084/m9.figshare.12275009", closed=True),
    "COVID-19 image data collection": Corpus("Cohen et al. 2020: images out of articles, five of them", closed=True),
    "paediatric X-rays (Mendeley)": Corpus("Kermany et al. 2018", closed=True),
    "intracranial haemorrhage CT": Corpus("Hssayeni et al. 2020", closed=True),
}
TINY = (
    "ImageNet-1k",
    "NIH ChestX-ray14",
    "brain tumor (figshare 1512427)",
    "COVID-19 X-rays (Hannover)",
    "COVID-19 image data collection",
    "paediatric X-rays (Mendeley)",
    "intracranial haemorrhage CT",
)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_BY_PLAIN_NAME = {_plain(name): corpus for name, corpus in CORPORA.items()}


def find_corpus(name: str) -> Corpus | None:
    """The facts of a pre-training set; upper and lower case, dashes and blanks do not matter."""
    return _BY_PLAIN_NAME.get(_plain(name))


def overlap(pretraining: Collection[str] | None, family: str) -> Overlap:
    """Whether a network saw images of a data set.

    Args:
        pretraining: names of the sets that it was trained on, from first to last stage; None if nobody says.
        family: adapter of the data set, as in `featstore.datasets.DATASETS`.
    """
    if family in RENDERED:
        return "no"
    if not pretraining or family in ANYTHING:
        return "unknown"
    images = {family, *SAME_IMAGES.get(family, ())}
    found = [_of_corpus(find_corpus(name), images) for name in pretraining]
    return "yes" if "yes" in found else "unknown" if "unknown" in found else "no"


def _of_corpus(corpus: Corpus | None, images: Collection[str]) -> Overlap:
    if corpus is None:
        return "unknown"
    if any(family in corpus.holds for family in images):
        return "yes"
    return "no" if corpus.closed else "unknown"


def overlap_of_set(
    weights: Mapping[str, Any], families: Sequence[str], *, random: bool, datasets: Collection[str] = ()
) -> Overlap:
    """The same for a set of embeddings, of whose spec `weights` is, and all data sets that a result rests on.

    One that was seen makes it `yes`, one of which nobody knows `unknown`. Random weights saw nothing. A fine-tuned
    network saw the data sets that it was trained on too; `datasets` are the names of those that are asked about, which
    say more than the family of a table or a folder does.
    """
    if random:
        return "no"
    runs = [run for run in weights.get("trained_on", ()) if run["changed"]]
    if any(run["dataset"] in datasets for run in runs):
        return "yes"
    found: list[Overlap] = [_of_run(run["adapter"], family) for run in runs for family in families]
    behind = weights.get("trained_on", ())
    if not (behind and behind[0]["started_from"]["random"]):
        found += [overlap(weights.get("pretraining"), family) for family in families]
    return "yes" if "yes" in found else "unknown" if "unknown" in found or not found else "no"


def _of_run(trained: str, family: str) -> Overlap:
    """Whether a network that was fine-tuned on one family's images saw those of another."""
    if trained in ANYTHING or family in ANYTHING:
        return "unknown"
    kin = family == trained or trained in SAME_IMAGES.get(family, ()) or family in SAME_IMAGES.get(trained, ())
    return "yes" if kin else "no"


def runs_behind(file: Path, digest: str) -> list[dict[str, Any]]:
    """Fine-tuning runs that a weight file came out of, from first to last, as `about.json` beside it has them.

    Each states the data set, its manifest, the task, what the network was before, and whether it `changed`. Empty where
    no run of `probes finetune` wrote such a file there.

    Raises:
        WeightsError: it is about other weights, or damaged.
    """
    path = file.parent / RUN_FACTS
    if not path.is_file():
        return []
    try:
        body = json.loads(path.read_bytes())
        found: list[dict[str, Any]] = body["trained_on"]
        stated = body["digest"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ValueError):
            raise WeightsError(f"{path} is damaged ({error}); run `probes finetune` again, which writes it") from error
        return []  # somebody else's file of that name
    if stated != digest:
        raise WeightsError(
            f"{path} is about weights with the SHA-256 {str(stated)[:12]}, and {file.name} beside it has "
            f"{digest[:12]}; run `probes finetune` again, or give the weights from a folder of their own"
        )
    return found
