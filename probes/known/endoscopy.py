"""Tasks on endoscopy and surgery."""

from probes.taskspec import TaskSpec

KVASIR = (
    "Angiectasia", "Blood", "Erosion", "Erythematous", "Foreign Bodies", "Ileo-cecal valve", "Lymphangiectasia",
    "Normal", "Pylorus", "Reduced Mucosal View", "Ulcer",
)  # fmt: skip
PHASES = (
    "Preparation", "Dividing Ligament and Peritoneum", "Dividing Uterine Vessels and Ligament",
    "Transecting the Vagina", "Specimen Removal", "Suturing", "Washing",
)  # fmt: skip

TASKS = (
    TaskSpec(
        name="kvasir-capsule-11",
        labels=("label",),
        kind="multiclass",
        classes=KVASIR,
        selection="carve",
        source="Smedsrud et al. 2021, official split 0 -> 1; DINOv3 as a medical vision standard",
        deviations=("one direction of the two-fold split",),
    ),
    TaskSpec(
        name="autolaparo-7",
        labels=("phase_name",),
        kind="multiclass",
        classes=PHASES,
        source="Wang et al. 2022; DINOv3 as a medical vision standard",
        deviations=("frames are scored one by one, without a temporal model",),
    ),
    TaskSpec(name="edd2020-5", labels=("BE", "suspicious", "HGD", "cancer", "polyp"), source="Ali et al. 2020"),
)
