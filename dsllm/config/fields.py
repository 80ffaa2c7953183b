"""How the branches and fields of a run are declared: what pydantic refuses, and what may change on resume."""

import dataclasses
from typing import Any

STRICT_FIELDS = {"extra": "forbid", "allow_inf_nan": False}
"""What pydantic reads from `__pydantic_config__` of each branch: unknown keys are errors, and so are .nan and .inf."""

UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
"""Types of pydantic's errors about a key that a branch or a record does not have."""


def changeable(default: Any) -> Any:
    """A field that may differ when a run is resumed: it changes how the run is executed, not what it computes."""
    return dataclasses.field(default=default, metadata={"changeable": True})
