"""What the loaders really delivered, as one 64-bit number: the same whatever the number of ranks and micro-batches.

Every delivered sequence is hashed with its sample number and place; the hashes of a step are summed modulo 2^64, over
the sequences of a rank and then over ranks, so that order and grouping do not matter; the sums are chained by step.
"""

import hashlib
import struct

import numpy as np

MODULUS = 2**64


def sample_fingerprint(sample: int, source: int, block: int, tokens: np.ndarray) -> int:
    """Hash of one delivered sequence.

    Args:
        sample: global sample number.
        source: number of the source.
        block: the block's number in its source.
        tokens: int64[T+1], the ids as delivered.
    """
    digest = hashlib.blake2b(struct.pack("<QQQ", sample, source, block), digest_size=8)
    digest.update(np.ascontiguousarray(tokens, dtype="<i8").data)
    return int.from_bytes(digest.digest(), "little")


def add(*sums: int) -> int:
    """Sum of fingerprints, modulo 2^64: of samples, of micro-batches, of ranks."""
    return sum(sums) % MODULUS


def chain(previous: int, step_sum: int) -> int:
    """Fingerprint of a run up to a step: that of the steps before it (at first 0), and the step's sum over ranks."""
    digest = hashlib.blake2b(struct.pack("<QQ", previous, step_sum), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def to_int64(value: int) -> int:
    """The same 64 bits as a signed number: an int64 all-reduce of these wraps, as the sum modulo 2^64 must."""
    return value - MODULUS if value >= MODULUS // 2 else value


def from_int64(value: int) -> int:
    """Back from `to_int64`."""
    return value % MODULUS


def halves(value: int) -> tuple[int, int]:
    """The lower and upper 32 bits: numbers whose sum over ranks fp64 holds exactly."""
    return value & 0xFFFFFFFF, value >> 32


def from_halves(low: float, high: float) -> int:
    """The fingerprint whose halves, summed over ranks, these are."""
    return (int(low) + (int(high) << 32)) % 2**64
