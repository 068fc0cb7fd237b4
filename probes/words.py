"""One word for a finding that data sets of the chest spell differently, so that their labels meet."""

# The seven of the external validation of Tayebi Arasteh et al. 2025.
SHARED_7 = ("cardiomegaly", "effusion", "pneumonia", "atelectasis", "no_finding", "consolidation", "pneumothorax")
# Spelling in lower case -> word. What is a finding of its own (pericardial effusion, congenital emphysema, fibrotic
# sequela) stays one: it is not listed.
WORDS = {
    **{word: word for word in (*SHARED_7, "edema", "emphysema", "hernia", "infiltration", "lung_opacity")},
    **dict.fromkeys(("pleural effusion", "pleural_effusion"), "effusion"),
    **dict.fromkeys(("no finding",), "no_finding"),
    **dict.fromkeys(("infiltrate",), "infiltration"),  # of the boxes of ChestX-ray14
    **dict.fromkeys(("lung opacity",), "lung_opacity"),
    **dict.fromkeys(("pleural_thickening", "pleural thickening"), "pleural_thickening"),
    **dict.fromkeys(("nodule/mass", "nodule_mass"), "nodule_mass"),
    **dict.fromkeys(("fibrosis", "pulmonary fibrosis"), "fibrosis"),
}


def word_of(label: str) -> str:
    """The word of a label, whatever its case; a label that has none stands for itself."""
    return WORDS.get(label.strip().casefold(), label)
