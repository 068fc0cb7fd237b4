"""`tiny`: a 1.9-million-parameter DINOv2 with registers whose weights come with the package, for demos and tests.

What it was trained on, and the licences that follow, stand in `tiny_weights/README.md`.
"""

from pathlib import Path

from featstore.backbones.architecture import VisionTransformer

FOLDER = Path(__file__).parent / "tiny_weights"

ARCHITECTURE = VisionTransformer(
    family="dinov2_with_registers",
    embed_dim=192,
    depth=4,
    num_heads=3,
    patch_size=14,
    num_registers=4,
    mlp="gelu",
    mlp_dim=768,
    native_size=98,
)
