"""Masked siamese networks: vision transformers trained without labels, in their own class of transformers.

Source: Assran et al. 2022 (MSN).
"""

from typing import Any

from featstore.backbones.architecture import IMAGENET_MEAN, IMAGENET_STD
from featstore.backbones.family import SEPARATE_KEYS, Dialect, Family, HubKey, Release
from featstore.backbones.vit import BEFORE_NORM, HUB, IMAGENET, call, hub_key, read_config, sized, write_config
from featstore.backbones.vit import DEFAULTS as VIT_DEFAULTS

DEFAULTS: dict[str, Any] = {**VIT_DEFAULTS, "layer_norm_eps": 1e-6}


def classifier_key(live: str) -> HubKey:
    """Name in files that transformers 5 saves of a whole classifier: it puts `vit.` before all but the blocks."""
    name = hub_key(live).name
    return HubKey(name if name.startswith("encoder.") else f"vit.{name}")


CLASSIFIER = Dialect(name="classifier", key=classifier_key, ignored=(r"classifier\.",))

FAMILY = Family(
    model_type="vit_msn",
    model_class="ViTMSNModel",
    config_class="ViTMSNConfig",
    blocks="layers",
    norm="layernorm",
    read=lambda config: read_config(config, "vit_msn", DEFAULTS, final_norm=False),
    write=write_config,
    call=call,
    dialects=(HUB, CLASSIFIER),
    key_biases=(SEPARATE_KEYS,),
)

LARGE = Release(
    architecture=sized("vit_msn", "large", norm_eps=1e-6, mean=IMAGENET_MEAN, std=IMAGENET_STD, final_norm=False),
    hub_id="facebook/vit-msn-large",
    licence="Apache-2.0",
    pretraining=(IMAGENET,),
    feature=BEFORE_NORM,
)
