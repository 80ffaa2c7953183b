"""Seeded damage and random values for tests of readers: each input must give a named error or a right result."""

import random
import time
from collections.abc import Callable
from typing import Any

from dsllm.errors import DsllmError

MOST_SECONDS = 10.0
"""CPU seconds that one input may take."""

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**63,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
)
WORDS = (
    *("", " ", "auto", "none", "true", "null", "~", "~x/y", "$X", "${X", "\0", "a\nb", "ü", "\U0001f600", "x" * 5000),
    *("1e4", "0x", "/"),
)
INSERTED = (
    *(b"[", b"{", b"}", b":", b": ", b"\n", b"\t", b"&a ", b"*a", b"<<: ", b"- ", b"!!int ", b"'", b"\xff", b"\0"),
    *(b'"', b",", b"9"),
)


def random_value(rng: random.Random, depth: int = 3) -> Any:
    """A value as YAML and JSON have it: a number, a text, a switch, nothing, or a list or mapping of such values."""
    kind = rng.randrange(6 if depth else 4)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(WORDS)
    if kind == 2:
        return rng.choice((True, False, None))
    if kind == 3:
        return rng.randrange(-5, 300)
    if kind == 4:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(WORDS)): random_value(rng, depth - 1) for _ in range(rng.randrange(4))}


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in nested dicts and lists, the outermost first."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def changed(tree: Any, rng: random.Random, times: int = 1) -> Any:
    """A copy of nested dicts and lists with some values replaced, removed, added, renamed or moved elsewhere."""
    for _ in range(times):
        tree = _changed_at(tree, rng.choice(places(tree)), rng)
    return tree


def _changed_at(tree: Any, path: tuple[Any, ...], rng: random.Random) -> Any:
    if path:
        key, *rest = path
        copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
        action = rng.randrange(8) if not rest else -1
        if action == 0:
            del copy[key]
        elif action == 1 and isinstance(copy, dict):
            copy[f"{key}{rng.choice(('_', 's', ' ', '.x'))}"] = copy.pop(key)
        else:
            copy[key] = _changed_at(copy[key], tuple(rest), rng)
        return copy
    action = rng.randrange(3)
    if action == 0 and isinstance(tree, dict):
        return {**tree, rng.choice(WORDS): random_value(rng)}
    if action == 1 and isinstance(tree, list):
        return [*tree, random_value(rng)]
    return random_value(rng)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes after one accident: cut, flipped, removed, doubled, moved, replaced by zeros, or with something inserted."""
    if not content:
        return rng.randbytes(rng.randrange(20))
    start = rng.randrange(len(content))
    stop = min(len(content), start + rng.randrange(1, 40))
    before, part, after = content[:start], content[start:stop], content[stop:]
    flipped = bytes([part[0] ^ (1 << rng.randrange(8))]) + part[1:]
    inserted = rng.choice(INSERTED)
    accidents = (before, after, before + flipped + after, before + after, before + part + part + after)
    accidents += (part + before + after, before + bytes(len(part)) + after, before + inserted + after)
    accidents += (before + rng.choice((b"[", b"{", b"- ", b"[{")) * rng.choice((30, 3000)) + after,)
    accidents += (before + inserted * rng.choice((2, 100)) + after, before + rng.randbytes(len(part)) + after)
    return rng.choice(accidents)


def outcome(action: Callable[[], Any]) -> Any:
    """What an action returns, or the named error that it raises; any other exception, and a long wait, fails the test.

    Raises:
        AssertionError: it took too long, or its message is no message.
    """
    began = time.process_time()
    result: Any
    try:
        result = action()
    except DsllmError as error:
        result = error
        assert 0 < len(str(error)) < 100_000
    assert time.process_time() - began < MOST_SECONDS
    return result
