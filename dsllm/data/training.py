"""The micro-batches that one rank trains on, as a pure function of the position in the data."""

# Shapes: B sequences of a micro-batch, T tokens of a sequence.

from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np

from dsllm.batches import MicroBatch, Origin
from dsllm.config.data import DataConfig
from dsllm.data import fingerprint
from dsllm.data.manifest import Manifest
from dsllm.data.order import SampleOrder
from dsllm.data.position import Position
from dsllm.data.stream import TokenStream, open_streams
from dsllm.data.windows import document_numbers, inputs_and_targets
from dsllm.errors import DataError


@dataclass(eq=False, repr=False)
class TrainingBatches:
    """The micro-batches of one data-parallel rank at any position.

    A step takes the next G samples from its position on, G being the global batch; samples that the position skips are
    left out. Rank r of W gets the r-th of W equal runs of them (a run, not every W-th: neighbours in the order mix the
    sources best). So all ranks skip the same samples, and the order depends neither on the number of ranks nor on the
    micro-batch. A loop walks through the data like this:

        position = Position()  # or the one that a checkpoint holds
        while ...:
            micro_batches = batches.step(position)
            position = position.after(batches.global_batch_sequences)

    The object has no position of its own: any position may be read at any time. This is how a run returns to a
    checkpoint (its position), checks the step before it (`position.before`), and skips samples (`position.skipping`).
    `Prefetch` wraps the object and reads one step ahead.

    Raises:
        DataError: the sources are not those of the manifest, or are shorter than one sequence.
    """

    directory: Path
    """The prepared directory that the manifest describes."""
    manifest: Manifest
    data: DataConfig
    """Sequence length, document mask, and the sources' weights."""
    _: KW_ONLY
    seed: int
    """The run's seed; it decides the order."""
    global_batch_sequences: int
    micro_batch_sequences: int
    data_rank: int
    """This rank's number among the data-parallel ranks."""
    data_size: int
    """Number of data-parallel ranks."""

    def __post_init__(self) -> None:
        per_round = self.micro_batch_sequences * self.data_size
        assert self.global_batch_sequences % per_round == 0, "a batch that does not divide is refused with the run"
        self._rank_sequences = self.global_batch_sequences // self.data_size
        self._streams = open_streams(self.directory, [(s.name, s.train) for s in self.manifest.sources])
        self._order = _order(self._streams, self.directory, self.data, self.seed)

    def step(self, position: Position) -> list[MicroBatch]:
        """This rank's micro-batches of the step that begins at a position.

        Raises:
            DataError: a shard cannot be read, or contains ids that the tokenizer does not have.
        """
        own = position.after(self.data_rank * self._rank_sequences)
        samples = own.samples(self._rank_sequences)
        starts = range(0, len(samples), self.micro_batch_sequences)
        return [self._micro_batch(samples[i : i + self.micro_batch_sequences]) for i in starts]

    def fingerprint(self, position: Position) -> int:
        """Sum of the fingerprints of this rank's samples in a step, modulo 2^64. Reads the samples from the shards."""
        return fingerprint.add(*(batch.fingerprint for batch in self.step(position)))

    def first_sample_in(self, prefixes: Collection[str], before: Position, most_samples: int) -> int | None:
        """The place in the order of delivery of the first sample with tokens of some shards; reads no shard.

        Args:
            before: only samples that were delivered before this position count
            most_samples: look at no more samples than these
        Returns:
            -1 if there is none, None if `most_samples` were looked at without finding one
        """
        length = self.data.sequence_length
        blocks = [[stream.blocks_of(prefix, length) for prefix in prefixes] for stream in self._streams]
        skipped, place = [*before.skipped], 0
        for number in range(before.next_sample):
            if any(first <= number < stop for first, stop in skipped):
                continue
            if place == most_samples:
                return None
            sample = self._order.sample(number)
            if any(sample.block in found for found in blocks[sample.source]):
                return place
            place += 1
        return -1

    def _micro_batch(self, samples: Sequence[int]) -> MicroBatch:
        length = self.data.sequence_length
        windows = np.empty((len(samples), length + 1), dtype=np.int64)
        hashes, sources = [], set()
        for window, number in zip(windows, samples, strict=True):
            sample = self._order.sample(number)
            stream = self._streams[sample.source]
            sources.add(stream.name)
            window[:] = stream.read_block(sample.block, length)
            stream.check_ids(window, self.manifest.tokenizer.vocab_size)
            hashes.append(fingerprint.sample_fingerprint(number, sample.source, sample.block, window))
        inputs, targets = inputs_and_targets(windows)
        masked = self.data.document_mask
        return MicroBatch(
            inputs=inputs,
            targets=targets,
            documents=document_numbers(windows, self.manifest.tokenizer.end_of_text_id) if masked else None,
            fingerprint=fingerprint.add(*hashes),
            origin=Origin(first_sample=samples[0], last_sample=samples[-1], sources=tuple(sorted(sources))),
        )


def _order(streams: Sequence[TokenStream], directory: Path, data: DataConfig, seed: int) -> SampleOrder:
    """The order of a run over the training streams.

    Raises:
        DataError: the sources are not those of the manifest, or are shorter than one sequence.
    """
    names = [stream.name for stream in streams]
    weight_of = {source.name: source.weight for source in data.sources}
    if set(weight_of) != set(names):
        raise DataError(
            f"{directory}: prepared from the sources {', '.join(names)}, but the run has {', '.join(weight_of)}: "
            "prepare the data again, or name its directory in data.directory"
        )
    length = data.sequence_length
    weights = [weight for name in names if (weight := weight_of[name]) is not None]
    short = [stream for stream in streams if stream.num_blocks(length) == 0]
    # Without weights the sources are one pool, to which a short one adds nothing.
    if len(short) == len(streams) or (weights and short):
        found = ", ".join(f"{stream.name} has {stream.num_tokens}" for stream in short)
        raise DataError(
            f"{directory}: shorter than one sequence: a sequence needs {length + 1} training tokens "
            f"(data.sequence_length + 1), but {found}: add text, or use shorter sequences"
        )
    return SampleOrder(names, [stream.num_blocks(length) for stream in streams], weights or None, seed)
