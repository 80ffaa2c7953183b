"""Reads the DeepSpeed JSON that a run names."""

import json
import math
from pathlib import Path
from typing import Any

from dsllm.config.paths import find_file, searched
from dsllm.errors import ConfigError


def read_deepspeed_json(name: str, yaml_folder: Path | None = None) -> dict[str, Any]:
    """The DeepSpeed JSON that a run names.

    Args:
        yaml_folder: folder of the run's YAML file; None (default): the run has no file.
    Raises:
        ConfigError: the file is missing or not JSON, is not an object, gives a key twice, or has a number that is not finite.
    """
    path = find_file(name, yaml_folder)
    if path is None:
        raise ConfigError(f"deepspeed: file not found: {searched(name, yaml_folder)}")
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed: {path}: is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"deepspeed: {path}: contains a {type(value).__name__}; it must be an object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"key given twice: {', '.join(sorted(twice))}")
    return dict(pairs)


def _finite(text: str) -> float:
    """JSON itself has neither NaN nor Infinity, but Python's parser takes both, and makes 1e999 infinite."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number: write a number, or leave the key out")
    return number
