"""The held-out tokens as micro-batches: one pass that predicts every token exactly once."""

# Shapes: B sequences of a micro-batch, T tokens of a sequence.

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from dsllm.batches import MicroBatch
from dsllm.data.manifest import Manifest
from dsllm.data.stream import TokenStream, open_streams
from dsllm.data.windows import document_numbers, inputs_and_targets


@dataclass(eq=False, repr=False)
class ValidationBatches:
    """One pass over the held-out tokens. Every token is predicted exactly once and counts once.

    The stream of each source gets one end-of-text in front, as context for its first token. It is read in windows of T
    targets that advance by `stride`; with a stride below T each window repeats T - stride tokens as context, with
    weight 0. All ranks yield the same number of micro-batches, because ZeRO-3 needs it; the last ones are filled up with
    weight 0.
    """

    directory: Path
    """The prepared directory that the manifest describes."""
    manifest: Manifest
    _: KW_ONLY
    sequence_length: int
    """T."""
    micro_batch_sequences: int
    data_rank: int = 0
    """This rank's number among the data-parallel ranks."""
    data_size: int = 1
    """Number of data-parallel ranks."""
    max_sequences: int | None = None
    """Use at most this many windows, spread evenly over all. None or 0 (default None): use all."""
    stride: int | None = None
    """Targets that count per window after the first, at most T. None (default): T."""
    document_mask: bool = False
    """Number the documents of each window, so that attention stays within them."""
    first_context_id: int | None = None
    """The context of each source's first token. None (default): an end-of-text token."""
    trim: bool = False
    """Leave out rows and columns in which nothing counts, so that micro-batches differ in shape. On one rank only."""

    def __post_init__(self) -> None:
        self._stride = self.stride or self.sequence_length
        assert 0 < self._stride <= self.sequence_length, f"stride {self._stride} of {self.sequence_length}"
        assert self.data_size == 1 or not self.trim, "ranks need micro-batches of the same shape"
        self._streams = open_streams(self.directory, [(s.name, s.validation) for s in self.manifest.sources])
        # Windows are numbered over all streams; a number becomes a stream and a place when the window is read.
        self._starts = [0, *accumulate(self._num_windows(stream) for stream in self._streams)]
        self._num_used = min(self.max_sequences or self._starts[-1], self._starts[-1])
        self.num_tokens = self._num_counted()
        """Targets that count, over all ranks and micro-batches."""
        self.text_bytes = self._num_text_bytes()
        """UTF-8 bytes of the documents that these tokens encode: exact for a whole pass, in proportion to the tokens
        where max_sequences leaves some out. None: the text of a source is not known."""

    def __len__(self) -> int:
        """Micro-batches per rank, the same on all ranks."""
        return -(-self._num_used // (self.micro_batch_sequences * self.data_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        for i in range(len(self)):
            yield self._micro_batch((i * self.data_size + self.data_rank) * self.micro_batch_sequences)

    def _micro_batch(self, first: int) -> MicroBatch:
        """The windows numbered from `first` on; rows after the last window are end-of-text tokens of weight 0."""
        end_of_text_id = self.manifest.tokenizer.end_of_text_id
        numbers = range(first, min(first + self.micro_batch_sequences, self._num_used))
        rows, width = self.micro_batch_sequences, self.sequence_length
        spans = [(stream, *self._span(stream, window)) for stream, window in map(self._window, numbers)]
        if self.trim:
            rows, width = len(numbers), max(stop - start for _, start, _, stop in spans)
        windows = np.full((rows, width + 1), end_of_text_id, dtype=np.int64)
        weights = np.zeros((rows, width), dtype=np.float32)
        for row, (stream, start, counted, stop) in enumerate(spans):
            if start == 0:  # the end-of-text that is there already is the context of the first token
                windows[row, 1 : stop + 1] = stream.read(0, stop)
            else:
                windows[row, : stop - start + 1] = stream.read(start - 1, stop)
            stream.check_ids(windows[row], self.manifest.tokenizer.vocab_size)
            if start == 0 and self.first_context_id is not None:
                windows[row, 0] = self.first_context_id
            weights[row, counted - start : stop - start] = 1
        inputs, targets = inputs_and_targets(windows)
        return MicroBatch(
            inputs=inputs,
            targets=targets,
            weights=torch.from_numpy(weights),
            documents=document_numbers(windows, end_of_text_id) if self.document_mask else None,
        )

    def _num_windows(self, stream: TokenStream) -> int:
        """The first window counts T targets, each later one `stride`."""
        beyond = max(stream.num_tokens - self.sequence_length, 0)
        return -(-beyond // self._stride) + 1 if stream.num_tokens else 0

    def _window(self, number: int) -> tuple[TokenStream, int]:
        """Stream and window in it of the number-th window that is used."""
        index = number * self._starts[-1] // self._num_used
        source = bisect_right(self._starts, index) - 1
        return self._streams[source], index - self._starts[source]

    def _span(self, stream: TokenStream, window: int) -> tuple[int, int, int]:
        """Places of a window's targets in the stream: the first, the first that counts, and the end."""
        start = window * self._stride
        counted = start + (self.sequence_length - self._stride if window else 0)
        return start, counted, min(start + self.sequence_length, stream.num_tokens)

    def _num_counted(self) -> int:
        if self._num_used == self._starts[-1]:
            return sum(stream.num_tokens for stream in self._streams)
        total = 0
        for number in range(self._num_used):
            stream, window = self._window(number)
            _, counted, stop = self._span(stream, window)
            total += stop - counted
        return total

    def _num_text_bytes(self) -> int | None:
        sizes = [record.text_bytes for source in self.manifest.sources for record in source.validation]
        known = [size for size in sizes if size is not None]
        total = sum(stream.num_tokens for stream in self._streams)
        return round(sum(known) * self.num_tokens / max(total, 1)) if len(known) == len(sizes) else None
