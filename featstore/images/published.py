"""Presets: intensity, geometry and normalisation as a paper or a package has them, and what is not as published.

"As published" is claimed of a set only where nothing deviates.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from featstore.configs import DicomMode, Geometry, SetConfig
from featstore.errors import ConfigError, UnknownNameError
from featstore.images.intensity import canonical_intensity

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One preset. `mean` and `std` None are the model's own; (0, 0, 0) and (1, 1, 1) feed [0, 1] as it is.

    `sizes` are the sides in pixels that were used, the first the default; `deviations` whole sentences without a stop.
    """

    title: str
    source: str
    intensity: str
    geometry: Geometry = "squash"
    dicom_mode: DicomMode = "standard"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    sizes: tuple[int, ...]
    deviations: tuple[str, ...]


_RADIOLOGY = "Baharoon et al. 2023, arXiv 2312.02366, and its code"
_RADIOLOGY_DEVIATIONS = (
    "the resize is antialiased; theirs (torchvision 0.15 on tensors) is not",
    "intensities are mapped before the resize, theirs after it",
    "files keep their depth; theirs pass through float16, which cuts 16-bit values above 2048",
    "its kNN resized to 256 and cropped 224; here every probe sees the same images",
)
_STORED_SLICES = (
    "slices are axial in the canonical orientation; theirs run along the third axis of the file, unturned",
)

PUBLISHED: dict[str, Published] = {
    "dinov3-cxr": Published(
        title="DINOv3 on chest radiographs: spline resize, min-max, equalised, no mean and std",
        source="Tayebi Arasteh et al. 2025, arXiv 2510.07191; image preparation in the authors' chestx_domain code",
        intensity="minmax+equalise",
        geometry="spline",
        dicom_mode="raw_minmax",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        sizes=(224, 512, 1024),
        deviations=(
            "prepared images go to the network as they are; the authors wrote most of them as JPEG and read that",
            "16-bit PNG (PadChest) keeps its depth; the authors' reader cut it to 8 bits",
            "images in real colour fail; the authors made grey of them",
        ),
    ),
    "dinov3-medical": Published(
        title="Does DINOv3 set a new medical vision standard: 256 x 256, what else is stated",
        source="arXiv 2509.06467 v3, text; there is no code",
        intensity="native",
        sizes=(256,),
        deviations=(
            "mean and std are not stated; the model's own are used",
            "how images are resized and scaled is not stated; squash, bicubic, and native intensities are used",
        ),
    ),
    "dinov2-radiology": Published(
        title="DINOv2 on radiology: min-max of each channel, ImageNet mean and std, squashed; 448 for segmentation",
        source=_RADIOLOGY,
        intensity="minmax-channels",
        mean=IMAGENET[0],
        std=IMAGENET[1],
        sizes=(224, 448),
        deviations=_RADIOLOGY_DEVIATIONS,
    ),
    "dinov2-radiology-amos": Published(
        title="the same for AMOS: -1024 to 600 HU first",
        source=_RADIOLOGY,
        intensity="window:amos+minmax-channels",
        mean=IMAGENET[0],
        std=IMAGENET[1],
        sizes=(448, 224),
        deviations=(*_RADIOLOGY_DEVIATIONS, *_STORED_SLICES),
    ),
    "dinov2-radiology-heart": Published(
        title="the same for MSD Heart: 5th to 95th percentile of the slice",
        source=_RADIOLOGY,
        intensity="percentile:5-95",
        mean=IMAGENET[0],
        std=IMAGENET[1],
        sizes=(448, 224),
        deviations=(*_RADIOLOGY_DEVIATIONS, *_STORED_SLICES),
    ),
    "dinov2-radiology-brain": Published(
        title="the same for brain tumours: cut at the 95th percentile, 0 at or below the 5th",
        source=_RADIOLOGY,
        intensity="brain-c",
        mean=IMAGENET[0],
        std=IMAGENET[1],
        sizes=(224,),
        deviations=_RADIOLOGY_DEVIATIONS,
    ),
    "xrv": Published(
        title="torchxrayvision: values by the depth of the file, centre square, no equalisation",
        source="torchxrayvision, datasets.py and its XRayCenterCrop and XRayResizer",
        intensity="bits:stored",
        geometry="short",
        dicom_mode="xrv",
        sizes=(224,),
        deviations=(
            "mean and std are the model's own; torchxrayvision's networks are fed -1024 to 1024, others are not",
            "one antialiased bicubic resize, then the crop; theirs crops first and resizes linearly with skimage",
        ),
    ),
    "ct-clip": Published(
        title="CT-CLIP on CT-RATE: -1000 to 1000 HU, fed as -1 to 1",
        source="CT-CLIP, preprocessing code",
        intensity="window:ct-clip",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        sizes=(480,),
        deviations=(
            "volumes are not resampled to 0.75 x 0.75 x 1.5 mm",
            "slices are squashed to the size; theirs crops or pads the volume to 480 x 480 x 240",
        ),
    ),
}


def published(name: str) -> Published:
    """A preset by name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in PUBLISHED:
        raise UnknownNameError(f"--published: unknown preset {name!r}; known: {', '.join(sorted(PUBLISHED))}")
    return PUBLISHED[name]


def apply_published(config: SetConfig) -> SetConfig:
    """The request with what its preset settles filled in; unchanged where it names none.

    A flag that is left at its default counts as not given.

    Raises:
        UnknownNameError: as `published`. ConfigError: a flag contradicts the preset.
    """
    if config.published is None:
        return config
    preset = published(config.published)
    defaults = {item.name: item.default for item in fields(SetConfig)}
    settled: dict[str, Any] = {
        "intensity": preset.intensity,
        "geometry": preset.geometry,
        "dicom_mode": preset.dicom_mode,
        "decode": "full",
    }
    for name, value in settled.items():
        asked = getattr(config, name)
        if name == "intensity":
            asked, value = canonical_intensity(asked), canonical_intensity(value)
        if asked not in (value, defaults[name]):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"--published {config.published} has {flag} {value}, and {flag} {asked} contradicts it; leave one out"
            )
    return replace(config, **settled, res=config.res or str(preset.sizes[0]))


def deviations_of(name: str, pixels: tuple[int, int]) -> tuple[str, ...]:
    """What is not as published in a set of images of `pixels` (height, width); none allows to say "as published"."""
    preset = published(name)
    if pixels[0] == pixels[1] and pixels[0] in preset.sizes:
        return preset.deviations
    used = " or ".join(map(str, preset.sizes))
    return (*preset.deviations, f"images are {pixels[0]}x{pixels[1]} pixels; published is {used}, square")
