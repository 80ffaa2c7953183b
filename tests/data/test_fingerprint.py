"""A fingerprint tells any two deliveries apart, and does not care in which order or grouping they were summed."""

import numpy as np

from dsllm.data.fingerprint import MODULUS, add, chain, from_int64, sample_fingerprint, to_int64

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


def test_an_int64_sum_that_wraps_is_the_sum() -> None:
    parts = [sample_fingerprint(n, 0, n, TOKENS) for n in range(7)]
    wrapped = np.sum(np.array([to_int64(part) for part in parts], dtype=np.int64))
    assert from_int64(int(wrapped)) == add(*parts)


def test_fingerprints_are_fixed_for_good() -> None:
    """A checkpoint's fingerprint is compared by later versions: these numbers may never change."""
    assert sample_fingerprint(1, 2, 3, TOKENS) == SAMPLE_FINGERPRINT
    assert chain(SAMPLE_FINGERPRINT, 5) == CHAINED


SAMPLE_FINGERPRINT = 18276587262625422735
CHAINED = 9537175770072458723
