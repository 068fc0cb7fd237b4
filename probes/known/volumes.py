"""Tasks on volumes: chest CT, PET/CT, the heart; a head sees the mean of the features of a volume's slices."""

from probes.taskspec import TaskSpec

CT_RATE_18 = (
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule",
    "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening",
)  # fmt: skip

TASKS = (
    TaskSpec(
        name="ct-rate-18",
        labels=CT_RATE_18,
        selection="carve",
        unit="volume",
        pool="features",
        source="CT-RATE release (Hamamci et al. 2024)",
    ),
    TaskSpec(
        name="ct-rate-18-b",
        labels=CT_RATE_18,
        selection="carve",
        unit="volume",
        pool="features",
        source="Does DINOv3 Set a New Medical Vision Standard? (mean over slices; kNN and linear per class)",
        deviations=(
            "slice axis, resize and intensity window are not published; slices are axial",
            "k, metric and temperature of the kNN are not published",
        ),
    ),
    TaskSpec(
        name="autopet-lesion",
        labels=("lesion",),
        selection="carve",
        unit="study",
        pool="features",
        source="FDG-PET-CT-Lesions, clinical table",
        deviations=("the release is for segmentation; a study is positive if its patient's diagnosis is not NEGATIVE",),
    ),
    TaskSpec(
        name="camus-ef",
        labels=("ef",),
        kind="regression",
        unit="patient",
        pool="features",
        source="CAMUS release (Leclerc et al. 2019)",
        deviations=("the features of the patient's four images are averaged",),
    ),
    TaskSpec(
        name="camus-quality",
        labels=("ImageQuality",),
        kind="ordinal",
        classes=("Poor", "Medium", "Good"),
        unit="study",
        pool="features",
        source="CAMUS release (Leclerc et al. 2019)",
    ),
    TaskSpec(
        name="acdc-group",
        labels=("Group",),
        kind="multiclass",
        classes=("NOR", "MINF", "DCM", "HCM", "RV"),
        unit="patient",
        pool="features",
        source="ACDC release (Bernard et al. 2018)",
        deviations=(
            "the challenge's classifiers measure volumes and masses; here features of two frames are averaged",
        ),
    ),
)
