"""Tasks on tuberculosis radiographs, CT slices of COVID-19 and brain tumours."""

from probes.taskspec import TaskSpec

SYSTEMATIC = "systematic sampling over sorted names: the paper's own list is not public"
BAHAROON = "Baharoon et al. 2023 (DINOv2 on radiology)"

TASKS = (
    TaskSpec(name="montgomery-tb", labels=("tuberculosis",), source="Jaeger et al. 2014"),
    TaskSpec(name="shenzhen-tb", labels=("tuberculosis",), source="Jaeger et al. 2014"),
    TaskSpec(name="montgomery-age", labels=("age_years",), kind="regression"),
    TaskSpec(name="shenzhen-age", labels=("age_years",), kind="regression"),
    TaskSpec(name="sars-cov-2-covid", labels=("covid",)),
    TaskSpec(name="sars-cov-2-3class", labels=("class",), kind="multiclass", classes=("covid", "healthy", "others")),
    TaskSpec(
        name="sars-cov-2-c",
        labels=("covid",),
        split_column="split_c",
        unit="volume",
        pool="features",
        source=BAHAROON,
        deviations=(SYSTEMATIC,),
    ),
    TaskSpec(
        name="brain-tumor-3",
        labels=("tumour",),
        kind="multiclass",
        classes=("meningioma", "glioma", "pituitary"),
        source="Cheng et al. 2015",
    ),
    TaskSpec(
        name="brain-tumor-3-c",
        labels=("tumour",),
        kind="multiclass",
        classes=("meningioma", "glioma", "pituitary"),
        split_column="split_c",
        source=BAHAROON,
        deviations=(SYSTEMATIC,),
    ),
)
