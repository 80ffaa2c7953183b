"""The batches of one rank: of a training step, and of a pass over the held-out tokens. No state moves on in here."""

# Shapes: B sequences of a micro-batch, T tokens of a sequence.

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from dsllm.config.data import DataConfig
from dsllm.data import fingerprint
from dsllm.data.manifest import Manifest, ShardRecord
from dsllm.data.order import SampleOrder
from dsllm.data.shards import Shard
from dsllm.data.stream import TokenStream
from dsllm.errors import DataError

MOST_OPEN_SHARDS = 256  # a process may have 1024 open files by default


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one rank."""

    inputs: torch.Tensor  # int64 [B, T]
    targets: torch.Tensor  # int64 [B, T]
    weights: torch.Tensor | None
    """fp32 [B, T]: 1 where a target counts and 0 where not; None: all count."""
    fingerprint: int
    """Sum of its samples' fingerprints (dsllm/data/fingerprint.py); 0 in validation."""
    documents: torch.Tensor | None = None
    """int64 [B, T]: end-of-text tokens before each input in its sequence, which numbers the documents: the end-of-text
    belongs to the document that it ends. None: attention passes over their boundaries."""
    origin: str = ""
    """Which samples these are, in words; empty in validation."""


@dataclass(eq=False, repr=False)
class TrainingBatches:
    """The micro-batches of one rank at any step. Nothing moves on in here: the step's number is the whole state.

    Step s takes the samples [s G, s G + G) of the run's order, G being the global batch. Rank r of W has the r-th of W
    equal runs of them (a run, not every W-th: neighbours in the order mix the sources best).

    Raises:
        DataError: the sources are not those of the manifest, or are shorter than one sequence.
    """

    directory: Path
    """The prepared directory that the manifest is of."""
    manifest: Manifest
    data: DataConfig
    """Sequence length, and the sources' weights."""
    _: KW_ONLY
    seed: int
    """Of the run; decides the order."""
    global_batch_sequences: int
    micro_batch_sequences: int
    rank: int
    """Among the data-parallel ranks."""
    num_ranks: int

    def __post_init__(self) -> None:
        per_round = self.micro_batch_sequences * self.num_ranks
        assert self.global_batch_sequences % per_round == 0, "a batch that does not divide is refused with the run"
        self.num_micro_batches = self.global_batch_sequences // per_round
        self._streams = _streams(self.directory, [(s.name, s.train) for s in self.manifest.sources])
        self._order = _order(self._streams, self.directory, self.data, self.seed)

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step`, counted from 0.

        Raises:
            DataError: a shard cannot be read, or holds ids that the tokenizer does not have.
        """
        first = step * self.global_batch_sequences + self.rank * (self.global_batch_sequences // self.num_ranks)
        return [self._batch(first + i * self.micro_batch_sequences) for i in range(self.num_micro_batches)]

    def fingerprint(self, step: int) -> int:
        """Sum over this rank's samples of a step, modulo 2^64. Reads them anew: of batches at hand, add theirs up."""
        return fingerprint.add(*(batch.fingerprint for batch in self.step(step)))

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How many times the first samples of the run go through each source."""
        return self._order.epochs(num_samples)

    def _batch(self, first_sample: int) -> Batch:
        length = self.data.sequence_length
        tokens = np.empty((self.micro_batch_sequences, length + 1), dtype=np.int64)
        hashes, sources = [], set()
        for row, number in enumerate(range(first_sample, first_sample + len(tokens))):
            sample = self._order.sample(number)
            stream = self._streams[sample.source]
            sources.add(stream.name)
            tokens[row] = stream.read_block(sample.block, length)
            stream.check_ids(tokens[row], self.manifest.tokenizer.vocab_size)
            hashes.append(fingerprint.sample_fingerprint(number, sample.source, sample.block, tokens[row]))
        last = first_sample + len(tokens) - 1
        origin = f"samples {first_sample} to {last} of the run, from {', '.join(sorted(sources))}"
        return Batch(
            *_shifted(tokens),
            weights=None,
            fingerprint=fingerprint.add(*hashes),
            documents=_documents(tokens, self.manifest) if self.data.document_mask else None,
            origin=origin,
        )


@dataclass(eq=False, repr=False)
class ValidationBatches:
    """One pass over the held-out tokens in which every token is predicted exactly once, and counts once.

    Each source's stream is preceded by one end-of-text as the first token's context, and read in windows of T targets
    that advance by `stride`; with a stride below T each window repeats T - stride tokens as context, with weight 0.
    Every rank yields the same number of batches, which ZeRO-3 needs: what is missing is filled with weight 0.
    """

    directory: Path
    """The prepared directory that the manifest is of."""
    manifest: Manifest
    _: KW_ONLY
    sequence_length: int
    """T."""
    micro_batch_sequences: int
    rank: int = 0
    """Among the data-parallel ranks."""
    num_ranks: int = 1
    max_sequences: int | None = None
    """Use at most so many windows, spread evenly over all; None or 0: all."""
    stride: int | None = None
    """Targets that count per window after the first, at most T; None: T."""
    document_mask: bool = False
    """Number the documents of each window, so that attention stays within them."""

    def __post_init__(self) -> None:
        self._stride = self.stride or self.sequence_length
        assert 0 < self._stride <= self.sequence_length, f"stride {self._stride} of {self.sequence_length}"
        self._streams = _streams(self.directory, [(s.name, s.validation) for s in self.manifest.sources])
        # Windows are numbered over all streams; which one is meant is found when it is read.
        self._starts = [0, *accumulate(self._num_windows(stream) for stream in self._streams)]
        self._num_used = min(self.max_sequences or self._starts[-1], self._starts[-1])
        self.num_tokens = self._num_counted()
        """Targets that count, over all ranks and batches."""
        self.text_bytes = self._num_text_bytes()
        """UTF-8 bytes of the documents that these tokens stand for: exact for a whole pass, in proportion to the tokens
        where max_sequences leaves some out; None where the text of a source is not known."""

    def __len__(self) -> int:
        """Batches per rank, the same on all."""
        return -(-self._num_used // (self.micro_batch_sequences * self.num_ranks))

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
            yield self._batch((i * self.num_ranks + self.rank) * self.micro_batch_sequences)

    def _batch(self, first: int) -> Batch:
        tokens = np.full(
            (self.micro_batch_sequences, self.sequence_length + 1),
            self.manifest.tokenizer.end_of_text_id,
            dtype=np.int64,
        )
        weights = np.zeros((self.micro_batch_sequences, self.sequence_length), dtype=np.float32)
        for row, number in enumerate(range(first, min(first + self.micro_batch_sequences, self._num_used))):
            stream, window = self._window(number)
            start, counted, stop = self._span(stream, window)
            if start == 0:
                tokens[row, 1 : stop + 1] = stream.read(0, stop)
            else:
                tokens[row, : stop - start + 1] = stream.read(start - 1, stop)
            stream.check_ids(tokens[row], self.manifest.tokenizer.vocab_size)
            weights[row, counted - start : stop - start] = 1
        documents = _documents(tokens, self.manifest) if self.document_mask else None
        return Batch(*_shifted(tokens), weights=torch.from_numpy(weights), fingerprint=0, documents=documents)

    def _num_windows(self, stream: TokenStream) -> int:
        """The first window counts T targets, each later one `stride`."""
        beyond = max(stream.num_tokens - self.sequence_length, 0)
        return -(-beyond // self._stride) + 1 if stream.num_tokens else 0

    def _window(self, number: int) -> tuple[TokenStream, int]:
        """The stream and the window in it that is the number-th of those used."""
        index = number * self._starts[-1] // self._num_used
        source = bisect_right(self._starts, index) - 1
        return self._streams[source], index - self._starts[source]

    def _num_counted(self) -> int:
        if self._num_used == self._starts[-1]:
            return sum(stream.num_tokens for stream in self._streams)
        counted = 0
        for number in range(self._num_used):
            stream, window = self._window(number)
            _, first, stop = self._span(stream, window)
            counted += stop - first
        return counted

    def _span(self, stream: TokenStream, window: int) -> tuple[int, int, int]:
        """A window's targets in the stream: the first, the first that counts, and the end."""
        start = window * self._stride
        counted = start + (self.sequence_length - self._stride if window else 0)
        return start, counted, min(start + self.sequence_length, stream.num_tokens)

    def _num_text_bytes(self) -> int | None:
        sizes = [record.text_bytes for source in self.manifest.sources for record in source.validation]
        known = [size for size in sizes if size is not None]
        total = sum(stream.num_tokens for stream in self._streams)
        return round(sum(known) * self.num_tokens / max(total, 1)) if len(known) == len(sizes) else None


def _streams(directory: Path, sources: Sequence[tuple[str, Sequence[ShardRecord]]]) -> list[TokenStream]:
    """One stream per (name, shards). They share a limited number of open shards."""
    open_shard = lru_cache(MOST_OPEN_SHARDS)(Shard)
    return [TokenStream(name, directory, records, open_shard) for name, records in sources]


def _order(streams: Sequence[TokenStream], directory: Path, data: DataConfig, seed: int) -> SampleOrder:
    """The order of a run over the training streams.

    Raises:
        DataError: the sources are not those of the manifest, or are shorter than one sequence.
    """
    names = [stream.name for stream in streams]
    asked = {source.name: source.weight for source in data.sources}
    if set(asked) != set(names):
        raise DataError(
            f"{directory}: prepared from the sources {', '.join(names)}, but the run has {', '.join(asked)}: "
            "prepare the data again, or name its directory in data.directory"
        )
    length = data.sequence_length
    weights = [weight for name in names if (weight := asked[name]) is not None]
    short = [stream for stream in streams if stream.num_blocks(length) == 0]
    if len(short) == len(streams) or (weights and short):
        found = ", ".join(f"{stream.name} has {stream.num_tokens}" for stream in short)
        raise DataError(
            f"{directory}: shorter than one sequence: a sequence needs {length + 1} training tokens "
            f"(data.sequence_length + 1), but {found}: add text, or use shorter sequences"
        )
    return SampleOrder(names, [stream.num_blocks(length) for stream in streams], weights or None, seed)


def _documents(tokens: np.ndarray, manifest: Manifest) -> torch.Tensor:
    """The number of each input's document in its window: [B, T] of token windows [B, T + 1]."""
    ends = tokens[:, :-1] == manifest.tokenizer.end_of_text_id
    return torch.from_numpy(np.cumsum(ends, 1) - ends)


def _shifted(tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [B, T] of token windows [B, T + 1]."""
    windows = torch.from_numpy(tokens)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
