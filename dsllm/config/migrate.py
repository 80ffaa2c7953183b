"""Reads the config that a checkpoint saved, whichever version of the config's fields it was written with.

A config has a version (major, minor):
- a new field whose default means what every run did before it existed raises the minor version
- a field that is renamed, removed or given another meaning raises the major version and adds a function to MIGRATIONS

So a config of an older version is always read. One of a newer minor version is read if every field that this version
does not know is at its default; the checkpoint records which fields are not. One of a newer major version is refused.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dsllm.config.check import problems_in_model
from dsllm.config.fields import UNKNOWN_KEY
from dsllm.config.load import run_from_dict
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig
from dsllm.errors import CheckpointError, ConfigError

ConfigVersion = tuple[int, int]
Tree = dict[str, Any]
Migration = Callable[[Tree], Tree]

CONFIG_VERSION: ConfigVersion = (1, 2)
"""1.1 added `parallel`, `train.optimizer.kind` and `data.prefetch`. 1.2 added `data.sources.*.encoding`, `data.verify`,
`data.verify_megabytes_per_second`, `tokenizer.begin_of_text` and `train.device`."""

MIGRATIONS: tuple[tuple[ConfigVersion, Migration], ...] = ()
"""In order: a version, and a pure function that turns a config of the version before into one of this version. It must
accept a config that has the section `model` only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedConfig:
    """A config as a checkpoint keeps it."""

    tree: Mapping[str, Any]
    """The fields, by section."""
    version: ConfigVersion
    changed: Sequence[str] = ()
    """Dotted names of the fields that are not at their default (`changed_fields`)."""
    origin: str
    """Where it was read, for messages."""


def changed_fields(config: RunConfig) -> tuple[str, ...]:
    """Dotted names of all fields of a run that are not at their default."""
    return tuple(_changed(config, ""))


def read_run(saved: SavedConfig) -> RunConfig:
    """The run that was saved, with today's fields.

    Raises:
        CheckpointError: this version cannot read it; says which fields are in the way.
    """
    try:
        return run_from_dict(_with_todays_fields(saved), saved.origin)
    except ConfigError as error:
        raise CheckpointError(f"{saved.origin}: the config of its run cannot be read: {error}") from error


def read_model(saved: SavedConfig) -> ModelConfig:
    """The section `model` of a saved config with today's fields; the other sections may be missing.

    Raises:
        CheckpointError: this version cannot read it; says which fields are in the way.
    """
    try:
        model = TypeAdapter(ModelConfig).validate_python(_with_todays_fields(saved)["model"])
    except ValidationError as error:
        raise CheckpointError(f"{saved.origin}: the config of its model cannot be read: {error}") from error
    problems = problems_in_model(model)
    if problems:
        field, problem = problems[0]
        raise CheckpointError(f"{saved.origin}: the config of its model cannot be read: {field}: {problem}")
    return model


def _with_todays_fields(saved: SavedConfig) -> Tree:
    if saved.version[0] > CONFIG_VERSION[0]:
        raise CheckpointError(
            f"{saved.origin}: its config has version {_dotted(saved.version)}, this dsllm reads up to "
            f"{CONFIG_VERSION[0]}.x: update dsllm"
        )
    tree = copy.deepcopy(dict(saved.tree))
    for version, migration in MIGRATIONS:
        if saved.version < version:
            tree = migration(tree)
    return _without_unknown_defaults(tree, saved) if saved.version > CONFIG_VERSION else tree


def _without_unknown_defaults(tree: Tree, saved: SavedConfig) -> Tree:
    """Drop the fields that only a newer minor version knows. At their default they mean what this version does."""
    unknown = _unknown_fields(tree)
    dotted = {".".join(map(str, path)): path for path in unknown}
    needed = [name for name in dotted if any(c == name or c.startswith(f"{name}.") for c in saved.changed)]
    if needed:
        raise CheckpointError(
            f"{saved.origin}: its config has version {_dotted(saved.version)}, this dsllm has {_dotted(CONFIG_VERSION)} "
            f"and does not know {', '.join(needed)}: update dsllm"
        )
    for *parents, last in unknown:
        node: Any = tree
        for part in parents:
            node = node[part]
        del node[last]
    return tree


def _unknown_fields(tree: Tree) -> list[tuple[str | int, ...]]:
    """Paths of the fields in the tree that RunConfig does not have."""
    try:
        TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        locations = [item["loc"] for item in error.errors() if item["type"] in UNKNOWN_KEY]
        return [path for location in locations if (path := _path_in(tree, location))]
    return []


def _path_in(tree: Tree, location: Sequence[str | int]) -> tuple[str | int, ...]:
    """The path that a location of pydantic's means. Locations also contain the names of a union's members."""
    node: Any = tree
    path: list[str | int] = []
    for part in location:
        children = dict(enumerate(node)) if isinstance(node, list) else node
        if isinstance(children, dict) and part in children:
            node = children[part]
            path.append(part)
    return tuple(path)


def _changed(branch: Any, path: str) -> Iterator[str]:
    for field in dataclasses.fields(branch):
        value, default = getattr(branch, field.name), _default(field)
        name = f"{path}.{field.name}".lstrip(".")
        if value == default:
            continue
        replaced = default is not dataclasses.MISSING and type(default) is not type(value)
        if replaced or not dataclasses.is_dataclass(value):
            yield name
        items = {f"{name}.{i}": item for i, item in enumerate(value)} if isinstance(value, tuple) else {name: value}
        for inner, item in items.items():
            if dataclasses.is_dataclass(item):
                yield from _changed(item, inner)


def _default(field: "dataclasses.Field[Any]") -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _dotted(version: ConfigVersion) -> str:
    return ".".join(map(str, version))
