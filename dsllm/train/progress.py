"""How far a run has come: the whole state of the loop and of the data, beside weights and moments."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dsllm.engine.step import StepResult
from dsllm.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Counters of a run. The position in the data follows from `step` alone."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    tokens: int = 0
    """Tokens read."""
    skipped_steps: int = 0
    """Steps whose gradient was not finite and was dropped."""
    skipped_in_a_row: int = 0
    """Of these, the last ones without a good step between."""
    fingerprint: int = 0
    """Chained hash of every sample that the loaders really delivered."""
    last_step_fingerprint: int = 0
    """Hash of the samples of the last step alone, to be delivered again and compared on resume."""
    data_sha256: str = ""
    """Hash of the prepared data's manifest."""

    def after(self, result: StepResult, step_fingerprint: int, fingerprint: int) -> "Progress":
        """The progress one step later."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + result.tokens,
            skipped_steps=self.skipped_steps + (not result.applied),
            skipped_in_a_row=0 if result.applied else self.skipped_in_a_row + 1,
            fingerprint=fingerprint,
            last_step_fingerprint=step_fingerprint,
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], where: str) -> "Progress":
        """The progress in a checkpoint's manifest, whichever minor version wrote it.

        A counter that an older version did not have starts at its default. One that only a newer version has may be left
        out where it is zero or empty: by convention that is what it means not to have it.

        Raises:
            CheckpointError: a newer version has counted something that this one would lose.
        """
        known = {field.name for field in fields(cls)}
        lost = {name: value for name, value in saved.items() if name not in known and value}
        if lost:
            raise CheckpointError(
                f"{where}: a newer dsllm saved it, with progress that this one does not know "
                f"({', '.join(f'{name}: {value!r}' for name, value in lost.items())}): update dsllm to resume"
            )
        return cls(**{name: value for name, value in saved.items() if name in known})
