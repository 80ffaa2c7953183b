"""Reads YAML 1.2, where 2e6 is a number and yes is a word, with the line of every key."""

import re
from pathlib import Path
from typing import Any

import yaml

from dsllm.errors import ConfigError

Lines = dict[tuple[str, ...], int]
"""Line number (from 1) of each key path."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML declares it so


_CORE_SCHEMA = [  # YAML 1.2.2, section 10.3.2
    ("null", r"null|Null|NULL|~|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
]
for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    """Read an integer. YAML 1.1, and so PyYAML, would read 010 as 8 and 1:30 as 90."""
    text = node.value
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float | int:
    """Read a number. One with an exponent is an int if it is whole, so that a count can be written as 2e6."""
    text = node.value.lower().replace(".inf", "inf").replace(".nan", "nan")
    value = float(text)
    return int(value) if "e" in text and value.is_integer() else value


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def _collect_lines(node: yaml.Node, path: tuple[str, ...], lines: Lines, problems: list[str]) -> None:
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[*path, str(i)] = item.start_mark.line + 1
            _collect_lines(item, (*path, str(i)), lines, problems)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*path, str(key.value))
        line = key.start_mark.line + 1
        if here in lines:
            problems.append(f"{'.'.join(here)}: given twice, on lines {lines[here]} and {line}")
        lines[here] = line
        _collect_lines(value, here, lines, problems)


def parse_value(text: str) -> Any:
    """The value of a `key=value` override, read as YAML."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """The mapping in a YAML file, and the line of each key.

    Raises:
        ConfigError: unreadable, not UTF-8, not YAML, not a mapping, or a key given twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = {} if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: contains a {type(value).__name__} where a mapping of keys to values is expected")
    lines: Lines = {}
    problems: list[str] = []
    if node is not None:
        _collect_lines(node, (), lines, problems)
    if problems:
        raise ConfigError([f"{path}: {p}" for p in problems])
    return value, lines


def write_yaml(value: dict[str, Any]) -> str:
    """A mapping as YAML text, in its own order; `read_yaml` gives it back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """SafeDumper for the loader above. Quotes text that YAML 1.2 would read as a number."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value).replace("inf", ".inf").replace("nan", ".nan"))


_Dumper.add_representer(float, _represent_float)
