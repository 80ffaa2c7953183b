"""Reads checkpoints of format 1: turns such a manifest into one of format 2. The only code that knows format 1.

Format 1 kept weights and moments in one file per rank, called the weights "master", knew flat ranges of whole parameters
only, and had no record of the model. Its configs have version 1.0.
"""

from typing import Any

from dsllm.slices import WEIGHTS

FORMAT_VERSION = 1
MASTER = "master"
"""What format 1 called the weights."""

Json = dict[str, Any]


def converted(raw: Json) -> Json:
    """The content of a format-2 manifest that describes the same files.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: `raw` is not a manifest of format 1.
    """
    kept = ("progress", "engine", "config", "deepspeed", "versions")
    config = raw["config"]
    return {name: raw[name] for name in kept} | {
        "model": {
            "config": config["model"],
            "context_length": config["model"]["context_length"] or config["data"]["sequence_length"],
            "precision": raw["engine"]["precision"],
        },
        "config_version": (1, 0),
        "parameters": {name: _parameter(record) for name, record in raw["parameters"].items()},
        "parts": [_part(file) for file in raw["files"]],
    }


def _parameter(record: Json) -> Json:
    keys = tuple(WEIGHTS if key == MASTER else key for key in record["keys"])
    return {"shape": record["shape"], "keys": keys, "scalars": record["scalars"]}


def _part(file: Json) -> Json:
    record = {key: file[key] for key in ("name", "num_bytes", "sha256")} | {"renamed_keys": {WEIGHTS: MASTER}}
    slices = [{"name": name, "start": start, "stop": stop} for name, start, stop in file["slices"]]
    return {"weights": record, "optimizer": record, "slices": slices}
