"""How a network of convolutions becomes tokens: the vector that it pools is `cls`, its last feature map the patches.

The networks give (vector (B, D), map (B, E, h, w)); a place of the map stands for `patch_size` x `patch_size` pixels,
where `patch_size` is the product of all strides.
"""

from typing import Any

from featstore.backbones.architecture import Architecture

# Counters of training steps and the classifier on top: the tokens depend on neither.
IGNORED = (r".*num_batches_tracked$", r"classifier\.", r"fc\.", r"head\.")
OUTSIDE = (r"classifier\.",)  # beside the prefix of a whole classifier
POOLED = "mean over space of the last feature map"


def call_for_map(network: Any, pixels: Any, architecture: Architecture) -> Any:
    """A `Family.call`: what the network gives, (vector, map)."""
    return network(pixels)


def split_map(output: Any, architecture: Architecture) -> tuple[Any, Any, Any]:
    """A `Family.split`: positions of the map along rows from the top left, and no registers."""
    vector, feature_map = output
    return vector, vector.new_empty(len(vector), 0, vector.shape[1]), feature_map.flatten(2).transpose(1, 2)
