"""What a kNN configuration means: the vote it stands for, the estimator, and where it leaves a published protocol."""

from dataclasses import dataclass
from typing import Any

from featstore.errors import TaskError
from probes.configs import KnnConfig
from probes.knn import KNNProbe, KNNRegressor
from probes.mlknn import MLKNN
from probes.tasks import Task

NUMERIC = ("regression", "ordinal")
PUBLISHED_K = (10, 20, 100, 200)


@dataclass(frozen=True, slots=True)
class Plan:
    """A configuration with its protocol filled in."""

    config: KnnConfig
    vote: str
    temperature: float
    smoothing: float
    include_self: bool
    refit: bool

    @classmethod
    def of(cls, config: KnnConfig) -> "Plan":
        radiology = config.protocol == "radiology"
        return cls(
            config,
            {"dino": "softmax", "radiology": "mlknn"}.get(config.protocol or "", config.vote or "softmax"),
            0.07 if config.temperature is None else config.temperature,
            1.0 if config.smoothing is None else config.smoothing,
            config.self_neighbour or radiology,
            config.refit or radiology,
        )

    @property
    def name(self) -> str:
        """The vote as tables name it."""
        text = {
            "softmax": f"softmax vote, T={self.temperature:g}",
            "majority": "majority vote",
            "distance": "distance-weighted vote",
            "mlknn": f"ML-kNN, s={self.smoothing:g}, {'with' if self.include_self else 'without'} self-neighbour",
        }[self.vote]
        text += ", standardised" if self.config.standardize else ""
        return text + (f", protocol {self.config.protocol}" if self.config.protocol else "")

    def make(self, kind: str) -> Any:
        """The estimator for a kind of task, not fitted.

        Raises:
            TaskError: ML-kNN asked of anything but labels.
        """
        config = self.config
        common: dict[str, Any] = {
            "k": config.counts,
            "standardize": config.standardize,
            "backend": config.backend or "auto",
            "device": config.device or "auto",
        }
        if self.vote == "mlknn":
            if kind != "multilabel":
                raise TaskError(
                    f"ML-kNN is of labels that are present or not, and this task is {kind}; use --vote softmax, "
                    "majority or distance"
                )
            return MLKNN(smoothing=self.smoothing, include_self=self.include_self, **common)
        if kind in NUMERIC:
            return KNNRegressor(vote=self.vote, temperature=self.temperature, **common)  # type: ignore[arg-type]
        return KNNProbe(
            vote=self.vote,  # type: ignore[arg-type]
            temperature=self.temperature,
            renormalize=config.protocol != "dino",
            **common,
        )

    def deviations(self, task: Task, features: str, *, masked: int) -> list[str]:
        """Where this evaluation leaves the protocol that it names; none without a protocol.

        `masked`: label entries of the library that are masked.
        Source: DINO, DINOv2 and DINOv3 (eval/knn.py); Baharoon et al. 2023, arXiv 2312.02366, and its code.
        """
        if self.config.protocol is None:
            return []
        found = []
        if features != "cls":
            found.append(f"features {features} in place of the CLS token")
        found += _of_set(self.config.protocol, task)
        if self.config.standardize:
            found.append("standardised features")
        if self.config.counts not in (None, PUBLISHED_K):
            found.append(f"k from {self.config.k} in place of 10,20,100,200")
        by = "leave-one-patient-out on train" if self.config.select == "loo" else "val"
        if self.config.protocol == "dino":
            found.append(f"one k, chosen on {by}, is tested; the protocol reports every k")
            if self.temperature != 0.07:
                found.append(f"temperature {self.temperature:g} in place of 0.07")
            if task.kind in NUMERIC:
                found.append("weighted mean of numbers; the protocol has classes only")
            if self.refit:
                found.append("train and val as the library in place of train")
        else:
            found.append(f"k chosen on {by}; the k behind the published table is not known")
            if self.smoothing != 1:
                found.append(f"smoothing {self.smoothing:g} in place of 1")
        if masked:
            found.append(f"{masked} masked label entries of the library {self._masked(task)}; the protocol has none")
        return found

    def _masked(self, task: Task) -> str:
        """What becomes of masked entries."""
        if self.vote == "mlknn":
            return "are left out of their label's prior and counts, and their rows are neighbours without it"
        if task.kind == "multilabel":
            return "count as absent"
        return "are left out"


def _of_set(name: str, task: Task) -> list[str]:
    """What of the images, of the stored numbers and of the unit of a task is not as published."""
    from probes.linear_protocols import PROTOCOLS, of_images, of_unit  # imports torch, which a vote alone need not

    protocol = PROTOCOLS["dinov2" if name == "dino" else name]
    spec = task.features.spec
    images, found = spec["identity"].get("preprocess"), of_images(protocol, spec)
    # Radiology's presets are of its linear heads; its kNN, too, saw DINO's geometry.
    if images and protocol.presets and (images["geometry"], images["height"], images["width"]) != ("dino", 224, 224):
        size = f"{images['height']}x{images['width']}"
        found.insert(0, f"geometry {images['geometry']} at {size} in place of short side 256, centre crop 224")
    stored = spec["identity"].get("stored_dtype")
    if stored != "float32":
        found.append(f"features rounded to {stored} in the store; published neighbours are of what the network gives")
    return found + of_unit(protocol, task)
