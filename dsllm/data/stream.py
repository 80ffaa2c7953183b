"""The tokens of one source and split as one stream, however many shards contain them."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from dsllm.data.manifest import ShardRecord
from dsllm.data.shards import Shard
from dsllm.errors import DataError

MOST_OPEN_SHARDS = 256  # a process may have 1024 open files by default

OpenShard = Callable[[Path, int], Shard]


def open_streams(directory: Path, sources: Sequence[tuple[str, Sequence[ShardRecord]]]) -> list["TokenStream"]:
    """One stream for each (name, records) of a prepared directory. They share a limited number of open shards."""
    open_shard = lru_cache(MOST_OPEN_SHARDS)(_open_shard)
    return [TokenStream(name, directory, records, open_shard) for name, records in sources]


def _open_shard(prefix: Path, bin_bytes: int) -> Shard:
    """Open a shard of which the manifest knows the size."""
    shard = Shard(prefix)
    # At the start each shard is checked by one rank only; this rank may see another file, on a disk of its own.
    if shard.bin_bytes != bin_bytes:
        raise DataError(
            f"{shard.path}: {shard.bin_bytes} bytes, the manifest says {bin_bytes}: not the shard that was prepared"
        )
    return shard


class TokenStream:
    """The shards of a stream, one after the other. A shard is opened when one of its tokens is read."""

    def __init__(self, name: str, directory: Path, records: Sequence[ShardRecord], open_shard: OpenShard):
        """
        Args:
            name: the source's name, for messages.
            directory: the prepared directory.
            records: the part of each shard that belongs to the stream.
            open_shard: opens the shard of a prefix and a size in bytes, or returns it if it is open already.
        """
        self.name = name
        self._directory = directory
        self._records = records
        self._open_shard = open_shard
        self._starts = [0, *accumulate(record.num_tokens for record in records)]
        self.num_tokens = self._starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """The token ids [start, stop) as int64; reads only the shards that contain them.

        Raises:
            DataError: a shard cannot be read.
        """
        assert 0 <= start < stop <= self.num_tokens, f"tokens [{start}, {stop}) of {self.num_tokens} in {self.name}"
        parts = []
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            end = min(stop, self._starts[index + 1])
            record = self._records[index]
            shift = record.first_token - self._starts[index]
            shard = self._open_shard(self._directory / record.prefix, record.bin_bytes)
            parts.append(shard.read(start + shift, end + shift))
            start, index = end, index + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def num_blocks(self, sequence_length: int) -> int:
        """Number of whole training sequences in the stream.

        Block i is the tokens [i T, i T + T + 1): T inputs and, one later, T targets. Neighbouring blocks share one token,
        so that every token but the stream's first is predicted exactly once; fewer than T tokens at the end are not used.
        """
        return max(self.num_tokens - 1, 0) // sequence_length

    def blocks_of(self, prefix: str, sequence_length: int) -> range:
        """The blocks with tokens of one shard; empty: the shard is not part of the stream."""
        for record, start in zip(self._records, self._starts, strict=False):
            if record.prefix == prefix:
                first = max(0, (start - sequence_length - 1) // sequence_length + 1)
                return range(first, -(-(start + record.num_tokens) // sequence_length))
        return range(0)

    def read_block(self, block: int, sequence_length: int) -> np.ndarray:
        """The tokens of a block: int64[sequence_length + 1]."""
        return self.read(block * sequence_length, (block + 1) * sequence_length + 1)

    def check_ids(self, tokens: np.ndarray, vocab_size: int) -> None:
        """Refuse ids that the tokenizer does not have; on a GPU the embedding would fail without saying why.

        Raises:
            DataError: the shards were made with another tokenizer, or are damaged.
        """
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise DataError(
                f"source {self.name}: token ids {low} to {high}, but the tokenizer has {vocab_size}: "
                "the shards were made with another tokenizer, or are damaged"
            )
