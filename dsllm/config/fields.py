"""How a field of the run is declared: forbidding unknown keys, and marking what may change on resume."""

import dataclasses
from typing import Any

FORBID_UNKNOWN_KEYS = {"extra": "forbid"}
"""Read by pydantic from `__pydantic_config__` of each branch."""


def changeable(default: Any) -> Any:
    """A field that may differ when a run is resumed: it changes how the run is carried out, not what it computes."""
    return dataclasses.field(default=default, metadata={"changeable": True})
