"""Reads a DeepSpeed JSON against the table: unknown keys, refused keys, types, and clashes with the run."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from dsllm.config.suggest import did_you_mean
from dsllm.engine.settings.key import AUTO, Key, is_one_of
from dsllm.engine.settings.table import BLOCKS, TABLE, keys_in

WHERE = "deepspeed JSON: "

IGNORES_UNKNOWN_KEYS = ("", "data_types", "aio")
"""Objects that DeepSpeed reads key by key, so that a misspelled key has no effect; in the others it is an error."""

WORDS = {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be a whole number",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "string_type": "must be text",
}
"""What a value must be, by the type of pydantic's error."""

Values = dict[str, Any]
"""What a JSON sets, by path in the table; None where the value is wrong, so that no rule builds on it."""


def read_values(given: Mapping[str, Any]) -> tuple[Values, list[str]]:
    """What a DeepSpeed JSON sets, with the types of the table, and everything wrong with each key by itself.

    A value of null or "auto" leaves the decision to dsllm, as if the key were absent.
    """
    values: Values = {}
    return values, list(_read_block("", given, values))


def _read_block(outer: str, given: Mapping[str, Any], values: Values) -> Iterator[str]:
    known = keys_in(outer)
    for name, value in given.items():
        key = known.get(name)
        if key is None:
            path = f"{outer}.{name}" if outer else name
            ignored = " (DeepSpeed would ignore it silently)" if outer in IGNORES_UNKNOWN_KEYS else ""
            yield f"{WHERE}{path}: unknown key{ignored}{did_you_mean(name, known)}"
        elif value is None or value == AUTO:
            continue
        elif key.path in BLOCKS and isinstance(value, Mapping):
            yield from _read_block(key.path, value, values)
        else:
            yield from _read_value(key, value, values)


def _read_value(key: Key, value: Any, values: Values) -> Iterator[str]:
    if key.is_off(value):
        return
    if key.fields is not None and isinstance(value, Mapping) and (value.get("params") or len(value) > 1):
        yield from _read_left_to_the_run(key, value)
        return
    problem = ""
    if key.owner == "refused" or is_one_of(value, key.refuses):
        problem = key.reason
    elif key.owner == "json" or key.path in BLOCKS:
        value, problem = _typed(key, value)
    values[key.path] = None if problem else value
    if problem:
        yield f"{WHERE}{key.path}: {problem}"


def _read_left_to_the_run(key: Key, given: Mapping[str, Any]) -> Iterator[str]:
    """An optimizer or scheduler as transformers' JSONs have it: its kind, and "auto" for all that the run decides."""
    assert key.fields is not None
    kind, params = given.get("type"), given.get("params")
    others = {name: value for name, value in given.items() if name not in ("type", "params")}
    if key.kinds and kind is not None and kind != AUTO and kind not in key.kinds:
        yield (
            f"{WHERE}{key.path}.type is {_shown(kind)}, but the run trains with {key.kinds[0]} ({key.decided_by}.kind): "
            "remove it here"
        )
    if params is not None and params != AUTO and not isinstance(params, Mapping):
        yield f"{WHERE}{key.path}.params must be an object, but it is {_shown(params)}"
    inner = {f"params.{name}": value for name, value in params.items()} if isinstance(params, Mapping) else {}
    for name, value in (others | inner).items():
        if value is not None and value != AUTO:
            field = f"{key.decided_by}.{key.fields[name]}" if name in key.fields else key.decided_by
            yield f'{WHERE}{key.path}.{name} is {_shown(value)}, but belongs to the run: set {field}, and "auto" here'


def _typed(key: Key, value: Any) -> tuple[Any, str]:
    """The value in the key's type, and what is wrong with it."""
    try:
        return key.adapter.validate_python(value), ""
    except ValidationError as error:
        first = error.errors()[0]
        says = WORDS[first["type"]].format(**first.get("ctx", {})) if first["type"] in WORDS else first["msg"]
        return None, f"{says}, but it is {_shown(value)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def clashes(values: Values, of_run: Mapping[str, Any]) -> Iterator[str]:
    """Keys that the run decides and the JSON sets to something else.

    Args:
        of_run: the run's own values, by path; None where the run has none because of another problem.
    """
    for path, value in values.items():
        key = TABLE[path]
        if key.owner != "run" or value is None:
            continue
        if path not in of_run:
            why = f"; {key.reason}" if key.reason else ""
            yield f"{WHERE}{path} belongs to the run: set {key.decided_by}, and remove it here{why}"
        elif of_run[path] is not None and value != of_run[path]:
            yield f"{WHERE}{path} is {_shown(value)}, but the run says {of_run[path]!r} ({key.decided_by})"
