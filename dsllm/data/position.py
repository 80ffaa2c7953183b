"""The position of a run in its samples: the next sample to deliver, and the ranges that are skipped on purpose."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dsllm.config.fields import STRICT_FIELDS
from dsllm.errors import CheckpointError

Range = tuple[int, int]
"""Sample numbers [first, stop)."""


@dataclass(frozen=True)
class Position:
    """A position in the order of samples (dsllm/data/order.py). It is the whole state of the loader.

    Samples are numbered from 0 over the whole run and all ranks. Equal positions deliver equal samples. With nothing
    skipped, step s of a run with a global batch of G sequences begins at Position(s * G).
    """

    __pydantic_config__ = STRICT_FIELDS

    next_sample: int = 0
    """Number of the next sample to deliver; never inside a skipped range."""
    skipped: tuple[Range, ...] = ()
    """Ranges that are not delivered, sorted, with a gap between any two; those already passed stay in the list."""

    def __post_init__(self) -> None:
        bounds = list(chain.from_iterable(self.skipped))
        assert bounds == sorted(set(bounds)), f"ranges must be sorted and apart, and none may be empty: {self.skipped}"
        inside = [(first, stop) for first, stop in self.skipped if first <= self.next_sample < stop]
        assert self.next_sample >= 0 and not inside, f"sample {self.next_sample} cannot be next: {inside} is skipped"

    def samples(self, num_samples: int) -> list[int]:
        """Numbers of the next samples, in the order of delivery."""
        end = self.after(num_samples).next_sample
        jumped = [(first, stop) for first, stop in self.skipped if self.next_sample <= first < end]
        starts = [self.next_sample, *(stop for _, stop in jumped)]
        stops = [*(first for first, _ in jumped), end]
        return [*chain.from_iterable(map(range, starts, stops))]

    def after(self, num_samples: int) -> "Position":
        """The position after delivering this many samples; jumps over skipped ranges."""
        end = self.next_sample + num_samples
        for first, stop in self.skipped:
            if self.next_sample <= first <= end:
                end += stop - first
        return Position(end, self.skipped)

    def before(self, num_samples: int) -> "Position":
        """The position from which delivering this many samples leads here: the inverse of `after`."""
        start = self.next_sample - num_samples
        for first, stop in reversed(self.skipped):
            if start < stop <= self.next_sample:
                start -= stop - first
        return Position(start, self.skipped)

    def skipping(self, ranges: Iterable[Range]) -> "Position":
        """The same position with more ranges to skip.

        Args:
            ranges: [first, stop) each, in any order. They begin at `next_sample` or later, or are in `skipped` already:
                samples that were delivered cannot be skipped.
        """
        merged: list[Range] = []
        for first, stop in sorted([*self.skipped, *ranges]):
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((first, stop))
        passed = _below(self.next_sample, merged)
        assert passed == _below(self.next_sample, self.skipped), f"samples before {self.next_sample} were delivered"
        jumps = (stop for first, stop in merged if first <= self.next_sample < stop)
        return Position(next(jumps, self.next_sample), tuple(merged))

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers and lists, for a checkpoint."""
        return {"next_sample": self.next_sample, "skipped": [list(pair) for pair in self.skipped]}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], file: str) -> "Position":
        """Back from `to_dict`.

        Args:
            file: where it was read, for the message.

        Raises:
            CheckpointError: it is not a position.
        """
        try:
            return _ADAPTER.validate_python(saved)
        except ValidationError as error:
            raise CheckpointError(f"{file}: damaged: the position in the data is {saved!r}: {error}") from error


_ADAPTER = TypeAdapter(Position)


def _below(sample: int, ranges: Sequence[Range]) -> list[Range]:
    """The parts of the ranges that are before a sample."""
    return [(first, min(stop, sample)) for first, stop in ranges if first < sample]
