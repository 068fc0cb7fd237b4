"""Masked autoencoders: the encoder alone, with nothing masked.

Source: He et al. 2022 (MAE). The class of transformers masks three quarters of the patches at random even in
evaluation, and shuffles them even where it masks none. The encoder is a plain vision transformer, so it runs in that
class, as Baharoon et al. load it: nothing is drawn, and patches stay in their place.
"""

from featstore.backbones.architecture import IMAGENET_MEAN, IMAGENET_STD
from featstore.backbones.family import SEPARATE_KEYS, Dialect, Family, Release
from featstore.backbones.vit import BEFORE_NORM, DEFAULTS, IMAGENET, call, hub_key, read_config, sized, write_config

FAMILY = Family(
    model_type="vit_mae",
    model_class="ViTModel",
    config_class="ViTConfig",
    model_options={"add_pooling_layer": False},
    blocks="layers",
    norm="layernorm",
    read=lambda config: read_config(config, "vit_mae", DEFAULTS, final_norm=False),
    write=write_config,
    call=call,
    dialects=(Dialect(name="hub", key=hub_key, prefixes=("vit.", ""), outside=(r"decoder\.",)),),
    key_biases=(SEPARATE_KEYS,),
)


def _release(size: str) -> Release:
    return Release(
        architecture=sized("vit_mae", size, norm_eps=1e-12, mean=IMAGENET_MEAN, std=IMAGENET_STD, final_norm=False),
        hub_id=f"facebook/vit-mae-{size}",
        licence="Apache-2.0",
        pretraining=(IMAGENET,),
        feature=f"{BEFORE_NORM}; no patch masked",
    )


BASE = _release("base")
LARGE = _release("large")
