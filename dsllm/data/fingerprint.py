"""A 64-bit fingerprint of the samples that the loaders delivered, equal for any number of ranks and micro-batches.

Each delivered sequence is hashed with its sample number, source and block. The hashes of a step are summed modulo 2^64,
first over the sequences of a rank and then over the ranks, so that order and grouping do not matter. The sums of the
steps are chained.
"""

import hashlib
import struct

import numpy as np

MODULUS = 2**64


def sample_fingerprint(sample: int, source: int, block: int, tokens: np.ndarray) -> int:
    """The hash of one delivered sequence.

    Args:
        sample: global sample number.
        source: number of the source.
        block: the block's number in its source.
        tokens: the ids as delivered, int64 [T + 1].
    """
    digest = hashlib.blake2b(struct.pack("<QQQ", sample, source, block), digest_size=8)
    digest.update(np.ascontiguousarray(tokens, dtype="<i8").data)
    return int.from_bytes(digest.digest(), "little")


def add(*sums: int) -> int:
    """The sum of fingerprints modulo 2^64: of samples, of micro-batches, or of ranks."""
    return sum(sums) % MODULUS


def chain(previous: int, step_sum: int) -> int:
    """The fingerprint of a run up to and with a step.

    Args:
        previous: the fingerprint of the run before the step; 0 before the first one.
        step_sum: the step's sum over all ranks.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", previous, step_sum), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def halves(value: int) -> tuple[int, int]:
    """The lower and the upper 32 bits. Ranks sum these in fp64, which is exact for up to 2^21 ranks."""
    return value & 0xFFFFFFFF, value >> 32


def from_halves(low: float, high: float) -> int:
    """The sum of the ranks' fingerprints, from the sums of their `halves`."""
    return (int(low) + (int(high) << 32)) % MODULUS
