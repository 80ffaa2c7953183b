"""Measures bits per byte of the held-out text for compressors and a byte unigram: a model must do better."""

import gzip
import io
import lzma
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dsllm.prepare.units import spooled_documents

CAP_BYTES = 64_000_000
"""Compress at most this much held-out text: it takes xz -9 a minute, and its window is 64 MiB anyway."""


def measure_baselines(
    spools: Iterable[Path], train_byte_counts: np.ndarray, cap_bytes: int = CAP_BYTES
) -> dict[str, Any]:
    """Bits per byte of the held-out documents, joined without separators in the order of the shards.

    Args:
        spools: spool files of the held-out units, in order.
        train_byte_counts: [256] how often each byte occurs in the training text.

    Returns:
        documents and bytes measured, whether these are all, and bits per byte of xz, gzip and the unigram; empty if
        nothing is held out.
    """
    text, num_documents, complete = _joined(spools, cap_bytes)
    if not text:
        return {}
    with ThreadPoolExecutor(2) as pool:  # both release the GIL while they compress
        compressors: dict[str, Callable[[bytes], bytes]] = {"xz": _xz, "gzip": _gzip}
        lengths = {name: pool.submit(compress, text) for name, compress in compressors.items()}
        bits = {name: 8 * len(future.result()) / len(text) for name, future in lengths.items()}
    return {
        "num_documents": num_documents,
        "num_bytes": len(text),
        "complete": complete,
        "xz_9_bits_per_byte": bits["xz"],
        "gzip_9_bits_per_byte": bits["gzip"],
        "unigram_bits_per_byte": unigram_bits_per_byte(text, train_byte_counts),
    }


def unigram_bits_per_byte(text: bytes, train_byte_counts: np.ndarray) -> float:
    """Cross-entropy of a text under the byte frequencies of the training text, with one added to each count."""
    log2_probability = np.log2((train_byte_counts + 1) / (train_byte_counts.sum() + 256))
    counts = np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
    return float(-(counts * log2_probability).sum() / len(text))


def _joined(spools: Iterable[Path], cap_bytes: int) -> tuple[bytes, int, bool]:
    """Joins documents up to the cap, at least one; returns the text, their number, and whether these are all."""
    joined = io.BytesIO()
    num_documents = 0
    for spool in spools:
        for content in spooled_documents(spool):
            if num_documents and joined.tell() + len(content) > cap_bytes:
                return joined.getvalue(), num_documents, False
            joined.write(content)
            num_documents += 1
    return joined.getvalue(), num_documents, True


def _xz(text: bytes) -> bytes:
    return lzma.compress(text, preset=9)


def _gzip(text: bytes) -> bytes:
    return gzip.compress(text, compresslevel=9, mtime=0)
