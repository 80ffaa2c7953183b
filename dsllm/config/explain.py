"""Turns validation errors into lines that name file and line, field, problem, and the likely intention."""

import dataclasses
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsllm.config.suggest import did_you_mean
from dsllm.config.yaml_file import Lines


@dataclasses.dataclass(frozen=True)
class Origin:
    """The file, the line or the override that each value comes from."""

    file: Path
    lines: Lines
    overrides: dict[str, str]

    def of(self, path: tuple[str, ...]) -> str:
        """'override KEY=VALUE' or 'FILE:LINE' of a key path, or of its nearest parent that was given."""
        dotted = ".".join(path)
        for key, text in self.overrides.items():
            if dotted == key or dotted.startswith(key + "."):
                return f"override '{text}'"
        if path not in self.lines:
            inside = [text for key, text in self.overrides.items() if key.startswith(dotted + ".")]
            if inside:
                return f"override '{inside[0]}'"
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.file}:{self.lines[path[:end]]}"
        return str(self.file)


def explain(error: ValidationError, origin: Origin, root: type) -> list[str]:
    """One line per problem: file and line or override, field, what is wrong, and a suggestion."""
    lines = []
    unions: dict[tuple[str, ...], list[str]] = {}
    for item in error.errors():
        path = tuple(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden" or item["type"] == "unexpected_keyword_argument":
            lines.append(f"{origin.of(path)}: {'.'.join(path)}: unknown key{_suggestion(path, root)}")
        elif item["type"] in ("missing", "missing_argument"):
            lines.append(f"{origin.of(path)}: {'.'.join(path)}: is required")
        elif path and (path[-1] == "int" or path[-1].startswith("literal[")):  # a union's arms are reported one by one
            unions.setdefault(path[:-1], []).append(_say(item))
        else:
            reason = _WHY_NOT.get((".".join(path), str(item["input"])), "")
            lines.append(f"{origin.of(path)}: {'.'.join(path)}: {_say(item)}{reason}")
    lines += [f"{origin.of(path)}: {'.'.join(path)}: {' or '.join(says)}" for path, says in unions.items()]
    return lines


_WHY_NOT = {("train.precision", "fp8"): "; fp8 is refused until a GPU run has proven its numbers: use bf16"}
"""Values that look valid, by field, and why they are refused."""


_SHOWN = 200
"""Characters of a value that a message repeats."""


def _say(item: Any) -> str:
    given = repr(item["input"])
    shown = given if len(given) <= _SHOWN else f"{given[:_SHOWN]}... ({len(given):,} characters)"
    if item["type"] == "tuple_type":
        one = (
            f": write [{item['input']}]"
            if isinstance(item["input"], str | int | float) and len(given) <= _SHOWN
            else ""
        )
        return f"must be a list, but it is {shown}{one}"
    return f"{item['msg'][0].lower()}{item['msg'][1:]}, but it is {shown}"


def _suggestion(path: tuple[str, ...], root: type) -> str:
    """A suggestion from the keys of that section, or of another section that has such a key."""
    known = _keys_by_section(root)
    section = ".".join("*" if p.isdigit() else p for p in path[:-1])
    close = did_you_mean(path[-1], known.get(section, []))
    if close:
        return close
    elsewhere = [f"{s}.{path[-1]}" if s else path[-1] for s, keys in known.items() if path[-1] in keys]
    if elsewhere:
        return f"; did you mean {' or '.join(repr(e) for e in elsewhere)}?"
    return f"; known here: {', '.join(known.get(section, []))}"


def _keys_by_section(branch: type, prefix: str = "") -> dict[str, list[str]]:
    """Field names of each dataclass in the tree, by dotted section; list items are written '*'."""
    fields = dataclasses.fields(branch)
    known = {prefix: [f.name for f in fields]}
    for f in fields:
        inner = _dataclass_in(f.type)
        if inner is not None:
            star = ".*" if "tuple" in str(f.type) else ""
            known |= _keys_by_section(inner, f"{prefix}.{f.name}{star}".lstrip("."))
    return known


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass inside an annotation such as X, X | None or tuple[X, ...]."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if dataclasses.is_dataclass(c) and isinstance(c, type)), None)
