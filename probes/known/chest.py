"""Tasks on chest radiographs."""

from probes.policies import MIXED, POLICIES, Policy
from probes.taskspec import TaskSpec
from probes.words import SHARED_7, WORDS, word_of

CHEXPERT_5 = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
CHEXPERT_14 = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
CHEXPERT_10 = (
    "Cardiomegaly", "Pleural Effusion", "Pneumonia", "Atelectasis", "No Finding", "Consolidation", "Pneumothorax",
    "Lung Opacity", "Lung Lesion", "Fracture",
)  # fmt: skip
NIH_14 = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
NIH_13 = tuple(label for label in NIH_14 if label != "Infiltration")
VINDR_22 = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema",
    "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift",
    "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture",
    "Other lesion",
)  # fmt: skip
VINDR_6 = ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding")
VINDR_11 = (
    "Cardiomegaly", "Pleural effusion", "Pneumonia", "Atelectasis", "No finding", "Consolidation", "Pneumothorax",
    "Pleural thickening", "Lung Opacity", "Pulmonary fibrosis", "Nodule/Mass",
)  # fmt: skip
# The classes of the Kaggle release that have boxes.
VINDR_14 = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD", "Infiltration",
    "Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion", "Pleural thickening", "Pneumothorax",
    "Pulmonary fibrosis",
)  # fmt: skip
PCXR_15 = (
    "No finding", "Bronchitis", "Brocho-pneumonia", "Other disease", "Bronchiolitis", "Situs inversus", "Pneumonia",
    "Pleuro-pneumonia", "Diagphramatic hernia", "Tuberculosis", "Congenital emphysema", "CPAM",
    "Hyaline membrane disease", "Mediastinal tumor", "Lung tumor",
)  # fmt: skip
PADCHEST_17 = (
    "cardiomegaly", "pleural effusion", "pneumonia", "atelectasis", "no_finding", "consolidation", "pneumothorax",
    "emphysema", "hernia", "scoliosis", "congestion", "aortic elongation", "kyphosis", "copd signs",
    "pleural thickening", "nodule_mass", "infiltrates",
)  # fmt: skip
PADCHEST_MERGE = (
    ("no_finding", ("normal",)),
    ("hernia", ("hiatal hernia",)),
    ("congestion", ("hilar congestion",)),
    ("nodule_mass", ("nodule", "mass")),
)


def _words(labels: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((label, word_of(label)) for label in labels if label.casefold() in WORDS)


def _seven(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a data set's labels that are the seven shared ones, in their order."""
    by_word = {word_of(label): label for label in labels}
    return tuple(by_word[word] for word in SHARED_7)


FRONTAL = (("Frontal/Lateral", ("Frontal",)),)
PA_AP = (("ViewPosition", ("PA", "AP")),)
PADCHEST_VIEWS = (("Projection", ("PA", "AP", "AP_horizontal")),)
ONLY_ONE = POLICIES["zeros"]  # value 1 is positive, all else 0
PLAIN_ZERO = Policy(blank="zero")
ANY = POLICIES["any-reader"]
MAJORITY = POLICIES["majority"]
# Rows uncertain in one of five labels are left out; the other labels' uncertain values are 0.
NO_THREE = Policy(
    uncertain="drop",
    blank="zero",
    overrides=tuple((label, "zero") for label in CHEXPERT_10),
    drop_labels=("Cardiomegaly", "Lung Opacity", "Lung Lesion", "Pneumonia", "Edema"),
)
PAPER_A = "Tayebi Arasteh et al. 2025, arXiv 2510.07191"
PAPER_B = "arXiv 2509.06467 (DINOv3 as a medical vision standard)"
PAPER_C = "Baharoon et al. 2023, arXiv 2312.02366"
MGCA = "Wang et al. 2022, MGCA"
MIMIC_RELEASE = "MIMIC-CXR-JPG (Johnson et al. 2019): its labels, its split"
MIMIC_POLICY = (
    "the release says nothing of uncertain labels: they train as in MGCA's CheXpert protocol and are not scored"
)
OWN_SPLIT = "the authors' test part (20 % of the patients) is not published; split_a is our seeded 70/10/20 by patient"
NO_VAL = (
    "validation images are a seeded tenth of the training images; one revision of the authors' code used the test part"
)

CHEXPERT = (
    TaskSpec(
        name="chexpert-5",
        labels=CHEXPERT_5,
        train_policy=MIXED,
        eval_policy=PLAIN_ZERO,
        where=FRONTAL,
        selection="carve",
    ),
    TaskSpec(
        name="chexpert-14",
        labels=CHEXPERT_14,
        train_policy=MIXED,
        eval_policy=PLAIN_ZERO,
        where=FRONTAL,
        selection="carve",
    ),
    TaskSpec(
        name="chexpert-5-mgca",
        labels=CHEXPERT_5,
        train_policy=MIXED,
        eval_policy=PLAIN_ZERO,
        where=FRONTAL,
        split_column="split_mgca",
        source=MGCA,
        deviations=(
            "which 5,000 training images validate is not known; split_mgca takes whole patients, seeded, up to about "
            "as many, counted before lateral views are left out",
        ),
    ),
    TaskSpec(
        name="chexpert-10-a",
        labels=CHEXPERT_10,
        train_policy=ONLY_ONE,
        eval_policy=ONLY_ONE,
        where=FRONTAL,
        names=_words(CHEXPERT_10),
        split_column="split_a",
        source=PAPER_A,
        deviations=(OWN_SPLIT,),
    ),
    TaskSpec(
        name="chexpert-10-a-nothree",
        labels=CHEXPERT_10,
        train_policy=NO_THREE,
        eval_policy=NO_THREE,
        where=FRONTAL,
        names=_words(CHEXPERT_10),
        split_column="split_a",
        source=PAPER_A,
        deviations=(OWN_SPLIT,),
    ),
    TaskSpec(
        name="chexpert-7-a",
        labels=_seven(CHEXPERT_10),
        train_policy=ONLY_ONE,
        eval_policy=ONLY_ONE,
        where=FRONTAL,
        names=_words(_seven(CHEXPERT_10)),
        split_column="split_a",
        source=f"{PAPER_A}, external validation",
        deviations=(OWN_SPLIT,),
    ),
    TaskSpec(
        name="chexpert-6-c",
        labels=CHEXPERT_5,
        train_policy=POLICIES["extra-class"],
        eval_policy=POLICIES["extra-class"],
        where=FRONTAL,
        source=PAPER_C,
        deviations=(
            "its test part is the later test release: without test.csv the official validation images test",
            "frontal is what the view column says; the authors look for 'lateral' in the path",
            "validation is chosen on, not added to the training images afterwards",
        ),
    ),
    # The later test release has neither age nor sex, so the official validation images test.
    TaskSpec(
        name="chexpert-age",
        labels=("age_years",),
        kind="regression",
        where=FRONTAL,
        split_column="split_mgca",
        deviations=("three training images have age 0, which is no age; they are masked",),
    ),
    TaskSpec(
        name="chexpert-sex",
        labels=("Sex",),
        kind="multiclass",
        classes=("Female", "Male"),
        where=FRONTAL,
        split_column="split_mgca",
    ),
)
MIMIC = (
    TaskSpec(
        name="mimic-5",
        labels=CHEXPERT_5,
        train_policy=MIXED,
        eval_policy=PLAIN_ZERO,
        where=PA_AP,
        unlabelled="mask",
        source=MIMIC_RELEASE,
        deviations=(MIMIC_POLICY,),
    ),
    TaskSpec(
        name="mimic-14",
        labels=CHEXPERT_14,
        train_policy=MIXED,
        eval_policy=PLAIN_ZERO,
        where=PA_AP,
        unlabelled="mask",
        source=MIMIC_RELEASE,
        deviations=(MIMIC_POLICY,),
    ),
    TaskSpec(
        name="mimic-10-a",
        labels=CHEXPERT_10,
        train_policy=ONLY_ONE,
        eval_policy=ONLY_ONE,
        where=PA_AP,
        unlabelled="mask",
        names=_words(CHEXPERT_10),
        split_column="split_a",
        source=PAPER_A,
        deviations=(OWN_SPLIT,),
    ),
    TaskSpec(
        name="mimic-10-a-nothree",
        labels=CHEXPERT_10,
        train_policy=NO_THREE,
        eval_policy=NO_THREE,
        where=PA_AP,
        unlabelled="mask",
        names=_words(CHEXPERT_10),
        split_column="split_a",
        source=PAPER_A,
        deviations=(OWN_SPLIT,),
    ),
    TaskSpec(
        name="mimic-7-a",
        labels=_seven(CHEXPERT_10),
        train_policy=ONLY_ONE,
        eval_policy=ONLY_ONE,
        where=PA_AP,
        unlabelled="mask",
        names=_words(_seven(CHEXPERT_10)),
        split_column="split_a",
        source=f"{PAPER_A}, external validation: trained here, tested on ChestX-ray14 and CheXpert",
        deviations=(OWN_SPLIT,),
    ),
)
NIH = (
    TaskSpec(name="nih-14", labels=NIH_14),
    TaskSpec(name="nih-15", labels=(*NIH_14, "No Finding")),
    TaskSpec(
        name="nih-14-a",
        labels=(*NIH_13, "No Finding"),
        names=_words((*NIH_13, "No Finding")),
        source=PAPER_A,
        deviations=("which official training images validate is not published; a seeded tenth of the patients does",),
    ),
    TaskSpec(
        name="nih-7-a",
        labels=_seven((*NIH_13, "No Finding")),
        names=_words(_seven((*NIH_13, "No Finding"))),
        source=f"{PAPER_A}, external validation",
        deviations=("which official training images validate is not published; a seeded tenth of the patients does",),
    ),
    TaskSpec(
        name="nih-14-c",
        labels=NIH_14,
        split_column="split_c",
        source=PAPER_C,
        deviations=(
            "14 labels as the article counts them; the authors' code scores 15, with No Finding (nih-15-c)",
            "validation is chosen on, not added to the training images afterwards",
        ),
    ),
    TaskSpec(
        name="nih-15-c",
        labels=(*NIH_14, "No Finding"),
        split_column="split_c",
        source=f"{PAPER_C}, code",
        deviations=("validation is chosen on, not added to the training images afterwards",),
    ),
    TaskSpec(name="nih-age", labels=("age_years",), kind="regression"),
    TaskSpec(name="nih-sex", labels=("sex",), kind="multiclass", classes=("F", "M")),
)
VINDR = (
    TaskSpec(
        name="vindr-cxr-28",
        labels=(*VINDR_22, *VINDR_6),
        train_policy=MAJORITY,
        eval_policy=MAJORITY,
        source="VinDr-CXR 1.0.0, local and global labels",
    ),
    TaskSpec(
        name="vindr-cxr-22",
        labels=VINDR_22,
        train_policy=MAJORITY,
        eval_policy=MAJORITY,
        source="VinDr-CXR 1.0.0, local labels",
    ),
    TaskSpec(
        name="vindr-cxr-6",
        labels=VINDR_6,
        train_policy=MAJORITY,
        eval_policy=MAJORITY,
        source="VinDr-CXR 1.0.0, global labels",
    ),
    TaskSpec(
        name="vindr-cxr-11-a",
        labels=VINDR_11,
        train_policy=ANY,
        eval_policy=ANY,
        names=_words(VINDR_11),
        source=PAPER_A,
        deviations=(NO_VAL,),
    ),
    TaskSpec(
        name="vindr-cxr-15-kaggle",
        labels=(*VINDR_14, "No finding"),
        train_policy=MAJORITY,
        eval_policy=MAJORITY,
        source="VinBigData chest X-ray competition, training images",
        deviations=("its test labels are not published; the training images are split by image, seeded",),
    ),
    TaskSpec(
        name="vindr-cxr-14-kaggle",
        labels=VINDR_14,
        train_policy=MAJORITY,
        eval_policy=MAJORITY,
        source="VinBigData chest X-ray competition, training images",
        deviations=("its test labels are not published; the training images are split by image, seeded",),
    ),
    TaskSpec(
        name="vindr-pcxr-15",
        labels=PCXR_15,
        train_policy=MAJORITY,
        eval_policy=MAJORITY,
        source="VinDr-PCXR 1.0.0",
    ),
    TaskSpec(
        name="vindr-pcxr-3-a",
        labels=("No finding", "Pneumonia", "Bronchitis/Bronchiolitis"),
        merge=(("Bronchitis/Bronchiolitis", ("Bronchitis", "Bronchiolitis")),),
        train_policy=ANY,
        eval_policy=ANY,
        names=_words(("No finding", "Pneumonia")),
        source=PAPER_A,
        deviations=(NO_VAL, "the authors' table of merged labels is not published; Brocho-pneumonia is not Pneumonia"),
    ),
)
_PADCHEST_DEVIATIONS = (
    "no 20 % test list is published; 70/10/20 by patient, seeded",
    "which PadChest findings the 17 labels are is not published: no_finding is normal, hernia hiatal hernia, "
    "congestion hilar congestion, nodule_mass nodule or mass; the others have the findings' own names",
)
PADCHEST = (
    TaskSpec(
        name="padchest-17-a",
        labels=PADCHEST_17,
        merge=PADCHEST_MERGE,
        where=PADCHEST_VIEWS,
        names=_words(PADCHEST_17),
        source=PAPER_A,
        deviations=_PADCHEST_DEVIATIONS,
    ),
    TaskSpec(
        name="padchest-7-a",
        labels=_seven(PADCHEST_17),
        merge=(("no_finding", ("normal",)),),
        where=PADCHEST_VIEWS,
        names=_words(_seven(PADCHEST_17)),
        source=f"{PAPER_A}, the seven shared labels",
        deviations=_PADCHEST_DEVIATIONS[:1],
    ),
)
RSNA = (
    TaskSpec(name="rsna-pneumonia", labels=("Target",), source="RSNA Pneumonia Detection Challenge 2018"),
    TaskSpec(
        name="rsna-pneumonia-b",
        labels=("Target",),
        split_column="split_mgca",
        source=f"{PAPER_B}, split of {MGCA}",
        deviations=(
            "the article counts 29,700 images; 26,684 have labels",
            "the split is by image, and the images come from fewer ChestX-ray14 patients: it leaks patients",
        ),
    ),
    TaskSpec(
        name="rsna-3class",
        labels=("class",),
        kind="multiclass",
        classes=("Normal", "No Lung Opacity / Not Normal", "Lung Opacity"),
        source="RSNA Pneumonia Detection Challenge 2018, detailed class information",
    ),
)
TASKS = (*CHEXPERT, *MIMIC, *NIH, *VINDR, *PADCHEST, *RSNA)
