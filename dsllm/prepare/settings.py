"""Says what a run's data settings mean: how they differ from those of prepared data, and which corpus is the default."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsllm.config.data import DataConfig
from dsllm.data.manifest import Manifest
from dsllm.errors import DataError

EMBEDDED_CORPUS = "the corpus is the text that every Python installation has: name your own text in data.sources"


def reads_default_corpus(data: DataConfig) -> bool:
    """Whether the sources are those of a run that names none."""
    return data.sources == DataConfig().sources


def other_settings(directory: Path, manifest: Manifest, settings: dict[str, Any]) -> DataError:
    """The error that a directory was prepared with other settings, with a line for each difference."""
    before, now = dict(_flat(manifest.settings)), dict(_flat(settings))
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    changes = "\n".join(f"  {key}: was {before.get(key)!r}, now {now.get(key)!r}" for key in keys)
    return DataError(
        f"{directory} was prepared with other settings:\n{changes}\n"
        "undo the change, set another data.directory, or replace it by `dsllm prepare CONFIG --force`"
    )


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a tree of settings."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not items:
        yield path, tree
    for key, value in items:
        yield from _flat(value, f"{path}.{key}".lstrip("."))
