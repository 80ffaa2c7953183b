"""Reads YAML 1.2, where 2e6 is a number and yes is a word, with the line of every key."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dsllm.errors import ConfigError
from dsllm.untrusted_files import UntrustedFileError, read_bounded

Lines = dict[tuple[str, ...], int]
"""Line number (from 1) of each key path."""


MOST_BYTES = 2**20
"""A file that a person writes is shorter; PyYAML needs seconds for a longer one."""
MOST_DEPTH = 50
"""Lists and mappings inside each other; a run has 6 at most."""
MOST_NODES = 100_000
"""Keys and values, each alias counted as often as it is used."""
MOST_DIGITS = 400
"""Of one number; Python refuses to read thousands of digits, with a message that names no line."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema, no other types, and bounds on what aliases expand to."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML declares it so
    yaml_constructors: ClassVar[dict[Any, Any]] = {}  # those below, and no others

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0
        self._sizes: dict[int, int] = {}  # by id of a composed node: its own nodes and those inside it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Read one node, within the bounds."""
        event = self.peek_event()
        before, self._depth = self._nodes, self._depth + 1
        if self._depth > MOST_DEPTH:
            raise _problem(f"more than {MOST_DEPTH} lists and mappings inside each other", event.start_mark)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _problem(f"*{event.anchor} is inside what it stands for", event.start_mark)
            self._nodes += self._sizes[id(node)]
        else:
            self._nodes += 1
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > MOST_NODES:
            raise _problem(
                f"more than {MOST_NODES:,} values, each alias counted as often as it is used", event.start_mark
            )
        self._depth -= 1
        return node


def _problem(text: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


_NULL, _BOOL = r"null|Null|NULL|~|", r"true|True|TRUE|false|False|FALSE"
_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_CORE_SCHEMA = [  # YAML 1.2.2, section 10.3.2
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("merge", r"<<", ["<"]),  # of YAML 1.1: takes over the keys of another mapping that are not given here
]
for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _scalar(loader: _Loader, node: yaml.Node, pattern: str, kind: str) -> str:
    """The text of a value whose type may have been written down, as in `!!int 7`."""
    text = str(loader.construct_scalar(node))  # type: ignore[arg-type]
    if not re.fullmatch(pattern, text):
        raise _problem(f"'{text[:MOST_DIGITS]}' is not {kind}", node.start_mark)
    if len(text) > MOST_DIGITS:
        raise _problem(f"a number of {len(text):,} characters", node.start_mark)
    return text


def _construct_null(loader: _Loader, node: yaml.Node) -> None:
    _scalar(loader, node, _NULL, "null")


def _construct_bool(loader: _Loader, node: yaml.Node) -> bool:
    return _scalar(loader, node, _BOOL, "true or false").lower() == "true"


def _construct_int(loader: _Loader, node: yaml.Node) -> int:
    """Read an integer. YAML 1.1, and so PyYAML, would read 010 as 8 and 1:30 as 90."""
    text = _scalar(loader, node, _INT, "a whole number")
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _construct_float(loader: _Loader, node: yaml.Node) -> float | int:
    """Read a number. One with an exponent is an int if it is whole, so that a count can be written as 2e6."""
    text = _scalar(loader, node, f"{_FLOAT}|{_INT}", "a number").lower().replace(".inf", "inf").replace(".nan", "nan")
    value = float(text)
    return int(value) if "e" in text and value.is_integer() else value


def _construct_unknown(loader: _Loader, node: yaml.Node) -> None:
    raise _problem(f"type {node.tag.removeprefix('tag:yaml.org,2002:')} is not read", node.start_mark)


for _kind, _construct in {
    "null": _construct_null,
    "bool": _construct_bool,
    "int": _construct_int,
    "float": _construct_float,
    "str": yaml.SafeLoader.construct_yaml_str,
    "merge": yaml.SafeLoader.construct_yaml_str,  # `<<` as a value
    "seq": yaml.SafeLoader.construct_yaml_seq,
    "map": yaml.SafeLoader.construct_yaml_map,
}.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct)
_Loader.add_constructor(None, _construct_unknown)


def _collect_lines(node: yaml.Node, path: tuple[str, ...], lines: Lines, problems: list[str]) -> None:
    """Note the line of every key in a node, and every key that is given twice. Comes before merge keys are resolved."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[*path, str(i)] = item.start_mark.line + 1
            _collect_lines(item, (*path, str(i)), lines, problems)
    if not isinstance(node, yaml.MappingNode):
        return
    own: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in own:
            problems.append(f"{'.'.join((*path, name))}: given twice, on lines {own[name]} and {line}")
        own[name] = line
        if key.tag == "tag:yaml.org,2002:merge":
            _collect_merged(value, path, lines, problems)
    for key, value in node.value:
        if key.tag != "tag:yaml.org,2002:merge":
            here = (*path, str(key.value))
            lines[here] = own[str(key.value)]
            _collect_lines(value, here, lines, problems)


def _collect_merged(node: yaml.Node, path: tuple[str, ...], lines: Lines, problems: list[str]) -> None:
    """The lines of what `<<` takes over: a mapping, or a list of them of which the first has precedence."""
    merged = reversed(node.value) if isinstance(node, yaml.SequenceNode) else [node]
    for mapping in merged:
        if isinstance(mapping, yaml.MappingNode):
            _collect_lines(mapping, path, lines, problems)


def _load(text: str) -> tuple[Any, Lines, list[str]]:
    """The value in a YAML text, the line of each key, and keys that are given twice."""
    loader = _Loader(text)
    lines: Lines = {}
    problems: list[str] = []
    node = loader.get_single_node()
    if node is None:
        return None, lines, problems
    _collect_lines(node, (), lines, problems)
    return _unshared(loader.construct_document(node)), lines, problems


def _unshared(value: Any) -> Any:
    """A copy in which an alias is a value of its own, so that an override of one place does not change the other."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _say(error: yaml.YAMLError) -> tuple[str, int | None]:
    """What is wrong, in one line, and the number of the line in the text where that is known."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split()), None
    mark = error.problem_mark or error.context_mark
    text = " ".join(part for part in (error.context, error.problem) if part)
    return " ".join(text.split()), mark.line + 1 if mark else None


def parse_value(text: str) -> Any:
    """The value of a `key=value` override, read as YAML.

    Raises:
        ConfigError: not YAML, nested too deeply, too many values, or a key given twice.
    """
    try:
        value, _, problems = _load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value is not valid YAML: {_say(error)[0]}") from error
    if problems:
        raise ConfigError(problems)
    return value


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """The mapping in a YAML file, and the line of each key.

    Raises:
        ConfigError: unreadable, too long, not UTF-8, not YAML, nested too deeply, not a mapping, or a key given twice.
    """
    try:
        text = read_bounded(path, MOST_BYTES).decode("utf-8")
    except UntrustedFileError as error:
        raise ConfigError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        value, lines, problems = _load(text)
    except yaml.YAMLError as error:
        says, line = _say(error)
        raise ConfigError(f"{path}{f':{line}' if line else ''}: is not valid YAML: {says}") from error
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: contains a {type(value).__name__} where a mapping of keys to values is expected")
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
