"""Tasks on chest radiographs."""

from probes.policies import MIXED, Policy
from probes.taskspec import TaskSpec

CHEXPERT_5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
CHEXPERT_14 = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
NIH_14 = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip


FRONTAL = (("Frontal/Lateral", ("Frontal",)),)
TASKS = (
    TaskSpec(
        name="chexpert-5",
        labels=CHEXPERT_5,
        train_policy=MIXED,
        eval_policy=Policy(blank="zero"),
        where=FRONTAL,
        selection="carve",
    ),
    TaskSpec(
        name="chexpert-14",
        labels=CHEXPERT_14,
        train_policy=MIXED,
        eval_policy=Policy(blank="zero"),
        where=FRONTAL,
        selection="carve",
    ),
    TaskSpec(name="nih-14", labels=NIH_14),
    TaskSpec(name="nih-15", labels=(*NIH_14, "No Finding")),
)
