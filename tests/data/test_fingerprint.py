"""Fingerprints of different deliveries differ; the order and grouping of the samples do not matter."""

import numpy as np

from dsllm.data.fingerprint import MODULUS, add, chain, from_halves, halves, sample_fingerprint

TOKENS = np.arange(9)


def test_it_depends_on_sample_source_block_and_every_token() -> None:
    changed = [TOKENS + (np.arange(9) == i) for i in range(9)]
    prints = [
        sample_fingerprint(1, 2, 3, TOKENS),
        sample_fingerprint(2, 2, 3, TOKENS),
        sample_fingerprint(1, 3, 3, TOKENS),
        sample_fingerprint(1, 2, 4, TOKENS),
        *(sample_fingerprint(1, 2, 3, tokens) for tokens in changed),
    ]
    assert len(set(prints)) == len(prints)


def test_it_does_not_depend_on_the_tokens_integer_type_or_layout() -> None:
    wide = np.arange(18, dtype=np.int32)[::2] // 2
    assert sample_fingerprint(1, 2, 3, wide) == sample_fingerprint(1, 2, 3, TOKENS.astype(np.int64))


def test_sums_do_not_depend_on_order_or_grouping() -> None:
    a, b, c = (sample_fingerprint(n, 0, n, TOKENS) for n in range(3))
    assert add(a, b, c) == add(c, add(b, a)) < MODULUS


def test_the_chain_depends_on_the_order_of_the_steps() -> None:
    assert chain(chain(0, 1), 2) != chain(chain(0, 2), 1)


def test_halves_that_ranks_sum_in_fp64_give_the_sum() -> None:
    """The largest halves of 2^20 ranks sum up to less than 2^53, which fp64 represents exactly."""
    parts = [MODULUS - 1] * 2**20 + [sample_fingerprint(n, 0, n, TOKENS) for n in range(7)]
    low, high = np.array([halves(part) for part in parts], dtype=np.float64).sum(0)
    assert from_halves(low, high) == add(*parts)


def test_fingerprints_are_fixed_for_good() -> None:
    """Later versions compare with a checkpoint's fingerprint: these numbers may never change."""
    assert sample_fingerprint(1, 2, 3, TOKENS) == SAMPLE_FINGERPRINT
    assert chain(SAMPLE_FINGERPRINT, 5) == CHAINED


SAMPLE_FINGERPRINT = 18276587262625422735
CHAINED = 9537175770072458723
