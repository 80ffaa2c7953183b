"""How far a run is: the state of the loop and of the data, saved next to weights and optimizer state."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dsllm.data import fingerprint
from dsllm.data.position import Position
from dsllm.engine.step import StepResult
from dsllm.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Counters of a run, and its position in the data."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    position: Position = field(default_factory=Position)
    """Where the next step begins in the samples."""
    tokens: int = 0
    """Tokens read."""
    skipped_steps: int = 0
    """Steps whose gradient was not finite and was dropped."""
    skipped_in_a_row: int = 0
    """How many of the most recent steps were skipped, one after the other."""
    fingerprint: int = 0
    """Chained hash of every sample that the loaders delivered."""
    last_step_fingerprint: int = 0
    """Hash of the samples of the last step alone; they are delivered again and compared on resume."""
    data_sha256: str = ""
    """Hash of the prepared data's manifest."""

    def after(self, result: StepResult, position: Position, step_fingerprint: int) -> "Progress":
        """The progress one step later.

        Args:
            position: where the step after that one begins
            step_fingerprint: of the samples of all ranks in this step
        """
        return replace(
            self,
            step=self.step + 1,
            position=position,
            tokens=self.tokens + result.tokens,
            skipped_steps=self.skipped_steps + (not result.applied),
            skipped_in_a_row=0 if result.applied else self.skipped_in_a_row + 1,
            fingerprint=fingerprint.chain(self.fingerprint, step_fingerprint),
            last_step_fingerprint=step_fingerprint,
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint's manifest."""
        return {**asdict(self), "position": self.position.to_dict()}


def read_progress(saved: Mapping[str, Any], global_batch_sequences: int, where: str) -> Progress:
    """The progress in a checkpoint's manifest, whichever minor version wrote it.

    A counter that an older version did not have starts at its default. One that only a newer version has is skipped if it
    is zero or empty: by convention that means the same as not having it.

    Args:
        global_batch_sequences: before there were positions, a step's number was the position
        where: the checkpoint, for messages

    Raises:
        CheckpointError: a field is not what it should be, or a newer version has counted what this one would lose.
    """
    known = {f.name for f in fields(Progress)}
    lost = {name: value for name, value in saved.items() if name not in known and value}
    if lost:
        raise CheckpointError(
            f"{where}: a newer dsllm saved it, with progress that this one does not know "
            f"({', '.join(f'{name}: {value!r}' for name, value in lost.items())}): update dsllm to resume"
        )
    values = {name: value for name, value in saved.items() if name in known}
    try:
        position = values.pop("position", None) or {"next_sample": values["step"] * global_batch_sequences}
        progress = _ADAPTER.validate_python(values)
    except (ValidationError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: its progress cannot be read: {error}") from error
    return replace(progress, position=Position.from_dict(position, where))


_ADAPTER = TypeAdapter(Progress)
