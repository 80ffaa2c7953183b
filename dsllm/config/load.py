"""Loads a run: defaults, then the YAML file, then key=value overrides; every problem is reported at once."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dsllm.config.check import directory_problems, problems_in, record_problems
from dsllm.config.explain import Origin, explain
from dsllm.config.paths import DEFAULT_RECIPE, expanded, find_file, searched
from dsllm.config.run import RunConfig
from dsllm.config.sizes import resolve_size
from dsllm.config.yaml_file import parse_value, read_yaml
from dsllm.errors import ConfigError

_ADAPTER = TypeAdapter(RunConfig)

ArchitectureOf = Callable[[str, Path], Mapping[str, Any]]
"""Finds the fields of the model that `model.init_from` names, for a run in this directory."""


def load_run(
    path: str | None, overrides: Sequence[str] = (), architecture_of: ArchitectureOf | None = None
) -> RunConfig:
    """The run in a YAML file (None: the embedded recipe), with `key.path=value` overrides on top.

    In paths, ~ and variables are replaced by their values here.

    Args:
        architecture_of: gives the fields of the model that the run starts from, where the run itself does not give them.
            None (default): they have their defaults.

    Raises:
        ConfigError: the file is missing or unreadable, or anything in it does not fit; lists every problem.
    """
    file = find_file(path or DEFAULT_RECIPE, None)
    if file is None:
        raise ConfigError(_not_found(path or DEFAULT_RECIPE))
    tree, lines = read_yaml(file)
    problems = [problem for text in overrides if (problem := _apply_override(tree, text))]
    origin = Origin(file, lines, {text.split("=", 1)[0].strip(): text for text in overrides})
    for field in _PATHS:
        problems += _expand_paths(tree, field.split("."), (), origin)
    return _build(tree, origin, file.stem, problems, architecture_of)


def run_from_dict(tree: dict[str, Any], origin: str) -> RunConfig:
    """The run in a mapping, as saved in a checkpoint or in run.yaml; `origin` names it in error messages."""
    return _build(dict(tree), Origin(Path(origin), {}, {}), Path(origin).stem, [], is_saved=True)


def run_to_dict(config: RunConfig) -> dict[str, Any]:
    """The run as plain values that JSON and YAML can hold."""
    return _ADAPTER.dump_python(config, mode="json")


def _not_found(name: str) -> str:
    """Why there is no run in what the command line names."""
    if not Path(name).is_dir():
        return f"config file not found: {searched(name)}"
    inside = sorted(str(file) for pattern in ("*.yaml", "*.yml") for file in Path(name).glob(pattern))[:3]
    example = (
        f": name the run's YAML file in it, for example {' or '.join(inside)}" if inside else " without a YAML file"
    )
    return f"config file not found: {name} is a folder{example}"


def _apply_override(tree: dict[str, Any], text: str) -> str | None:
    """Set one `key.path=value` in the tree; returns the problem, if any."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        return f"override '{text}': write it as key.path=value, for example train.total_tokens=2e6"
    try:
        parsed = parse_value(value)
    except ConfigError as error:
        return f"override '{text[:200]}': {'; '.join(error.problems)}"
    try:
        _set(tree, key.strip().split("."), parsed)
    except LookupError as error:
        return f"override '{text[:200]}': {error.args[0]}"
    return None


def _set(tree: Any, path: Sequence[str], value: Any) -> None:
    """Set a value in a tree; sections that are not there are added.

    Raises:
        LookupError: the path leads through something that is not a section, or to an entry that a list does not have.
    """
    part, *rest = path
    if isinstance(tree, list):
        if not _is_index(part, tree):
            raise LookupError(f"there is no '{part}': the list has {len(tree)} entries, numbered from 0")
        key: Any = int(part)
    elif isinstance(tree, dict):
        key = part
    else:
        raise LookupError(f"{str(tree)[:100]!r} has no '{part}' to set")
    if not rest:
        tree[key] = value
        return
    if isinstance(tree, dict) and tree.get(key) is None:
        if rest[0].isdecimal():
            raise LookupError(f"there is no list '{part}' in the file: give all of it as {part}=[...]")
        tree[key] = {}
    _set(tree[key], rest, value)


def _is_index(part: str, entries: list[Any]) -> bool:
    return part.isdecimal() and len(part) < 10 and int(part) < len(entries)


_PATHS = (
    *("deepspeed", "run.directory", "data.directory", "data.sources.*.paths.*", "data.sources.*.dataset"),
    *("tokenizer.path", "model.init_from"),
)
"""Fields in which ~ and variables are replaced. *: each entry of a list."""


def _expand_paths(node: Any, names: Sequence[str], here: tuple[str, ...], origin: Origin) -> Iterator[str]:
    """Replace ~ and variables in one field of a raw tree; yields why one cannot be used."""
    if isinstance(node, list) and names[0] == "*":
        keys: Sequence[Any] = range(len(node))
    elif isinstance(node, dict):
        keys = [names[0]] if names[0] in node else []
    else:
        return  # validation reports it
    for key in keys:
        inner = (*here, str(key))
        if len(names) > 1:
            yield from _expand_paths(node[key], names[1:], inner, origin)
        elif isinstance(node[key], str):
            node[key], problem = expanded(node[key])
            if problem:
                yield f"{origin.of(inner)}: {'.'.join(inner)}: {problem}"


def _with_architecture(tree: Mapping[str, Any], architecture_of: ArchitectureOf) -> dict[str, Any]:
    """The section `model`, its missing fields filled in from the model that it starts from."""
    model: dict[str, Any] = tree["model"]
    run = tree["run"] if isinstance(tree["run"], dict) else {}
    if not isinstance(model.get("init_from"), str):
        return model  # none, or one of a wrong type, which validation reports
    directory = run.get("directory") or f"runs/{run.get('name')}"
    return {**architecture_of(model["init_from"], Path(str(directory))), **model}


def _build(
    tree: dict[str, Any],
    origin: Origin,
    stem: str,
    problems: list[str],
    architecture_of: ArchitectureOf | None = None,
    is_saved: bool = False,
) -> RunConfig:
    """Validate a raw tree, fill in names and directories, and check the fields against each other.

    Args:
        is_saved: the tree comes from a checkpoint, perhaps of another machine: its folders are not looked at
    """
    unnamed = _name_after_file(tree, stem)
    if isinstance(tree.get("model"), dict):
        tree["model"], size_problem = resolve_size(tree["model"])
        if size_problem:
            problems.append(f"{origin.of(('model', 'size'))}: model.size: {size_problem}")
        if architecture_of is not None:
            tree["model"] = _with_architecture(tree, architecture_of)
    config = None
    try:
        config = _ADAPTER.validate_python(_without_empty_sections(tree))
    except ValidationError as error:
        problems.extend(explain(error, origin, RunConfig))
    if config is not None:
        config = _fill_names(config)
        folders = [] if is_saved else [*directory_problems(config), *record_problems(config, origin.file)]
        for field, text in [*problems_in(config), *folders]:
            if unnamed and field == "run.name":
                problems.append(
                    f"{origin.file}: {field}: {text}. The name is that of the file: rename it, or set {field}"
                )
            else:
                problems.append(f"{origin.of(tuple(field.split('.')))}: {field}: {text}")
    if problems or config is None:
        raise ConfigError(problems)
    return config


def _name_after_file(tree: dict[str, Any], stem: str) -> bool:
    """Call the run as its file is called, if the run has no name; whether it had none."""
    if tree.get("run") is None:
        tree["run"] = {}
    unnamed = isinstance(tree["run"], dict) and not tree["run"].get("name")
    if unnamed:
        tree["run"] = {**tree["run"], "name": stem}
    return unnamed


def _without_empty_sections(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without null sections: a section whose lines are all commented out means the defaults."""
    return {key: value for key, value in tree.items() if value is not None}


def _fill_names(config: RunConfig) -> RunConfig:
    run, data = config.run, config.data
    return dataclasses.replace(
        config,
        run=dataclasses.replace(run, directory=run.directory or f"runs/{run.name}"),
        data=dataclasses.replace(data, directory=data.directory or f"data/{run.name}"),
    )
