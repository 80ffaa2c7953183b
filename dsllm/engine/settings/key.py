"""A key of the DeepSpeed JSON: who decides its value, its type, what is written, what is refused, and what proves it."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, TypeAdapter

AUTO = "auto"
"""As a value it means what null means: dsllm decides, as if the key were absent."""

Owner = Literal["run", "json", "refused"]
"""run: the run decides the value, and the JSON may only repeat it; json: the JSON decides it; refused: it must be off."""


def _whole(value: Any) -> Any:
    """JSON has no whole numbers of its own: 5e7 arrives as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Switch = Annotated[bool, Strict()]
Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=0, le=2**63)]
Positive = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=1, le=2**63)]
Factor = Annotated[float, Field(strict=True, gt=0, le=2**20, allow_inf_nan=False)]
Text = Annotated[str, Strict()]
Object = dict[str, Any]
Stage = Annotated[int, BeforeValidator(_whole), Field(strict=True, ge=0, le=3)]
Dtype = Literal["fp32", "bf16", "fp16"]
Device = Literal["none", "cpu", "nvme"]

ALL_STAGES = (0, 1, 2, 3)
SHARDED = (1, 2, 3)
"""The stages at which ZeRO divides something among the ranks."""

SMALL, LARGE = 1_000, 1_000_000
"""Numbers of elements: smaller than one matrix of the model that parity trains, and larger than all of it."""


@dataclass(frozen=True, kw_only=True)
class Covered:
    """The parity table has rows with these values."""

    values: tuple[Any, ...]
    others: tuple[Any, ...] = ()
    """The values among them that also stand for every value that is not in the table."""
    name: str = ""
    """What the rows call the setting. Empty (default): the last part of the key's path."""
    outside: Mapping[Any, str] | None = None
    """Accepted values that no row has, each with what is known of it."""

    def rows_for(self, value: Any) -> tuple[Any, ...]:
        """The table's values that stand for a run's value; () where no row covers it."""
        if self.outside and value in self.outside:
            return ()
        return (value,) if value in self.values and value not in self.others else self.others


@dataclass(frozen=True)
class Untouched:
    """The key cannot change a number."""

    reason: str


@dataclass(frozen=True)
class NotCovered:
    """The key may change numbers, and no row of the parity table has it."""

    known: str
    """What is known of it."""


@dataclass(frozen=True)
class Key:
    """One row of the table."""

    path: str
    """Names from the outermost object to the key, with dots between them."""
    owner: Owner
    type: Any = Object
    """What pydantic checks the value against where the JSON decides it."""
    default: Any = None
    """Written where the JSON does not set the key. None (default): nothing is written, or final_config computes it."""
    stages: tuple[int, ...] = ALL_STAGES
    """ZeRO stages at which the key exists; it is left out of the final config at the others."""
    parity: Covered | Untouched | NotCovered | None = None
    """What proves its numbers. None (default): the key is not the JSON's to decide, is an object, or is `nvme_only`."""
    _: KW_ONLY
    decided_by: str = ""
    """Owner run: the field of the run that decides the value."""
    reason: str = ""
    """Why the key, or one of the values in `refuses`, is refused. Owner run: why the JSON may not decide it."""
    refuses: tuple[Any, ...] = ()
    """Owner json: values that are refused."""
    off: tuple[Any, ...] = ()
    """Owner run and refused: values that switch the feature off. They are accepted, and left out of the final config."""
    fields: Mapping[str, str] | None = None
    """Owner run, of an object whose values may be "auto": the field below `decided_by` that decides each of them. None
    (default): the object itself may not be given."""
    kinds: tuple[str, ...] = ()
    """With `fields`: the values of `type` that the run agrees with. () (default): all, as the run's own counts anyway."""
    nvme_only: bool = False
    """The key means something only where its object is offloaded to NVMe; the parity table covers it as NVMe."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def block(self) -> str:
        """Path of the object that holds the key; empty for the outermost."""
        return self.path.rpartition(".")[0]

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """Pydantic's check of the type."""
        return TypeAdapter(self.type)

    def is_off(self, value: Any) -> bool:
        """Whether a value switches the feature off: one of `off`, an empty object, or {"enabled": false}."""
        if isinstance(value, Mapping):
            return bool(self.off) and (not value or value.get("enabled") is False)
        return is_one_of(value, self.off)


def is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is among others, where 1 is not True."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def refused(path: str, reason: str, off: tuple[Any, ...] = (False,)) -> Key:
    """A key that is accepted only with a value that switches it off."""
    return Key(path, "refused", reason=reason, off=off)


def of_run(path: str, decided_by: str, off: tuple[Any, ...] = (), reason: str = "") -> Key:
    """A key that the run decides."""
    return Key(path, "run", decided_by=decided_by, off=off, reason=reason)


def block(outer: Key, *inner: Key) -> tuple[Key, ...]:
    """An object and the keys in it, which exist at its stages only."""
    return (
        outer,
        *(
            replace(key, path=f"{outer.path}.{key.path}", stages=tuple(s for s in key.stages if s in outer.stages))
            for key in inner
        ),
    )


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by path as the objects that the paths name."""
    outermost: dict[str, Any] = {}
    for path, value in values.items():
        *blocks, name = path.split(".")
        inner = outermost
        for outer in blocks:
            inner = inner.setdefault(outer, {})
        inner[name] = value
    return outermost


def value_at(path: str, final: Mapping[str, Any]) -> Any:
    """The value that a DeepSpeed JSON has at a path; None where it has none."""
    value: Any = final
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
