"""Loads a run: defaults, then the YAML file, then key=value overrides; every problem is reported at once."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dsllm.config.check import problems_in
from dsllm.config.explain import Origin, explain
from dsllm.config.paths import DEFAULT_RECIPE, find_file, searched
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

    Args:
        architecture_of: gives the fields of the model that the run starts from, where the run itself does not give them.
            None (default): they have their defaults.

    Raises:
        ConfigError: the file is missing or unreadable, or anything in it does not fit; lists every problem.
    """
    file = find_file(path or DEFAULT_RECIPE, None)
    if file is None:
        raise ConfigError(f"config file not found: {searched(path or DEFAULT_RECIPE)}")
    tree, lines = read_yaml(file)
    problems = [problem for text in overrides if (problem := _apply_override(tree, text))]
    origin = Origin(file, lines, {text.split("=", 1)[0].strip(): text for text in overrides})
    return _build(tree, origin, file.stem, problems, architecture_of)


def run_from_dict(tree: dict[str, Any], origin: str) -> RunConfig:
    """The run in a mapping, as saved in a checkpoint or in run.yaml; `origin` names it in error messages."""
    return _build(dict(tree), Origin(Path(origin), {}, {}), Path(origin).stem, [])


def run_to_dict(config: RunConfig) -> dict[str, Any]:
    """The run as plain values that JSON and YAML can hold."""
    return _ADAPTER.dump_python(config, mode="json")


def _apply_override(tree: dict[str, Any], text: str) -> str | None:
    """Set one `key.path=value` in the tree; returns the problem, if any."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        return f"override '{text}': write it as key.path=value, for example train.total_tokens=2e6"
    *parents, last = key.strip().split(".")
    try:
        parsed = parse_value(value)
    except Exception as error:  # noqa: BLE001 - PyYAML raises several unrelated types on malformed scalars
        return f"override '{text}': the value is not valid YAML: {error}"
    node: Any = tree
    for part in parents:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            if not isinstance(node.get(part), (dict, list)):
                node[part] = {}
            node = node[part]
        else:
            return f"override '{text}': there is no '{part}' to set a value in"
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            return f"override '{text}': the list has {len(node)} entries, numbered from 0"
        node[int(last)] = parsed
    else:
        node[last] = parsed
    return None


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
) -> RunConfig:
    """Validate a raw tree, fill in names and directories, and check the fields against each other."""
    run = tree.get("run")
    if run is None:
        run = tree["run"] = {}
    if isinstance(run, dict) and not run.get("name"):
        run["name"] = stem
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
        problems.extend(f"{origin.of(tuple(field.split('.')))}: {field}: {text}" for field, text in problems_in(config))
    if problems or config is None:
        raise ConfigError(problems)
    return config


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
