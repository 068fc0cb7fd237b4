"""What was asked for when a set was made, so that the same can be asked again: to complete it, grow it, check it.

It stands in the spec beside the identity: names and paths say where the numbers came from, not what they are.
"""

import shlex
from collections.abc import Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from featstore.configs import TOKENS, SetConfig, parse_reduce
from featstore.errors import ConfigError


def as_request(config: SetConfig, *, compute_dtype: str) -> dict[str, Any]:
    """Everything of a request that is not a default, the compute dtype as it was resolved."""
    reduce = ",".join(parse_reduce(config.reduce))  # one spelling
    asked = {**asdict(config), "compute_dtype": compute_dtype, "reduce": reduce}
    defaults = {item.name: item.default for item in fields(SetConfig)}
    values = {key: value for key, value in asked.items() if value != defaults[key]}
    if config.weights is not None:
        values["weights"] = str(config.weights.expanduser().resolve())
    return values


def request_of(spec: dict[str, Any]) -> dict[str, Any]:
    """The request that a spec keeps; for sets made before requests were kept, what their identity tells of it.

    Raises:
        ConfigError: imported features, which no request makes.
    """
    if "request" in spec:
        return dict(spec["request"])
    if spec["weights"]["kind"] == "imported":
        raise ConfigError(
            f"{spec['dataset']}/{spec['model']} holds imported features, which no extraction can make again or extend; "
            "name a set that was extracted"
        )
    identity, weights = spec["identity"], spec["weights"]
    model = weights.get("model", spec["model"])
    values: dict[str, Any] = {
        "model": model,
        "res": spec["resolution"],
        "name": spec["model"] if spec["model"] != model else None,
        "random_weights": weights.get("seed") if weights["kind"] == "random" and model != "tiny-random" else None,
        "weights": "PATH" if weights["kind"] == "local" else None,
        "geometry": identity["preprocess"]["geometry"],
        "dtype": identity["stored_dtype"],
        "compute_dtype": identity["compute_dtype"],
    }
    defaults = {item.name: item.default for item in fields(SetConfig)}
    return {key: value for key, value in values.items() if value is not None and value != defaults[key]}


def config_of(spec: dict[str, Any]) -> SetConfig:
    """The request as a config, to be planned again.

    Raises:
        ConfigError: a value that this version does not know.
    """
    values = request_of(spec)
    if "weights" in values:
        values["weights"] = Path(values["weights"])
    return SetConfig(**values)


def command_of(spec: dict[str, Any], arrays: Collection[str] = ()) -> str:
    """The command line that completes a set; `arrays` are those it has by now, which later runs may have added to."""
    if spec["weights"]["kind"] == "imported":
        return f"featstore import FILE --dataset {spec['dataset']} --name {spec['model']}"
    values = request_of(spec)
    if arrays:
        layers = sorted({int(name.split("/")[1]) for name in arrays if "/" in name})
        tokens = {name.rsplit("/", 1)[-1] for name in arrays}
        values["layers"] = ",".join(map(str, layers))
        values["tokens"] = ",".join(name for name in TOKENS if name in tokens)
    flags = ["--dataset", str(spec["dataset"])]
    for item in fields(SetConfig):
        value = values.get(item.name, item.default)
        if value != item.default:
            flag, text = f"--{item.name.replace('_', '-')}", shlex.quote(str(value))
            # What begins with a dash would be taken for the next option.
            flags += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return " ".join(["featstore extract", *flags])
