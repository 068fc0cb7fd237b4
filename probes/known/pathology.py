"""Tasks on whole slides: labels are of the slide or patient, tiles are pooled."""

from probes.taskspec import TaskSpec

STANDARD = "DINOv3 as a medical vision standard"
MEAN = "tiles of a slide are averaged; the paper pools them by gated attention"
UNSEEN = (
    "unseen are two centres (3 and 4), at most 200 slides; the paper has 140 seen and 324 unseen ones, whose list is "
    "not public"
)

TASKS = (
    TaskSpec(
        name="camelyon16-slide",
        labels=("label",),
        selection="carve",
        unit="volume",
        pool="features",
        source=f"Bejnordi et al. 2017; {STANDARD}",
        deviations=(MEAN, "one seeded validation share instead of five folds"),
    ),
    TaskSpec(
        name="camelyon17-slide",
        labels=("label",),
        unit="volume",
        pool="features",
        source="Bandi et al. 2019",
        deviations=(MEAN,),
    ),
    TaskSpec(
        name="camelyon17-stage4",
        labels=("slide_class",),
        kind="multiclass",
        classes=("negative", "itc", "micro", "macro"),
        unit="volume",
        pool="features",
        source="Bandi et al. 2019",
    ),
    TaskSpec(
        name="camelyon17-unseen-b",
        labels=("label",),
        where=(("slide_class", ("negative", "micro", "macro")),),
        split_column="split_centre",
        selection="carve",
        unit="volume",
        pool="features",
        source=STANDARD,
        deviations=(MEAN, UNSEEN),
    ),
    *(
        TaskSpec(
            name=f"bcnb-{name}",
            labels=(name,),
            unit="volume",
            pool="features",
            source=f"Xu et al. 2021; {STANDARD}",
            deviations=(MEAN, "one split instead of five"),
        )
        for name in ("aln", "er", "pr", "her2", "ki67")
    ),
)
