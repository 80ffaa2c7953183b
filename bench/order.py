"""Time and memory until the first batch, from 10^6 to 10^12 tokens, of dsllm and of Megatron-core.

    python bench/order.py [--directory FOLDER] [--most-tokens 1e12] [--most-megatron-tokens 1e10] [--repeats 3]

dsllm reads shards of the size that `dsllm prepare` writes by default, and for comparison with Megatron-core one shard of
all tokens. The .bin files are sparse (no blocks on the disk), documents have 1000 tokens, sequences 1024. Megatron-core
reads the whole .idx, so it is written in full where Megatron-core is measured; elsewhere it has only the entries that are
read when it is opened. Every number is the median of several processes. Imports are not counted.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dsllm.config.data import DataConfig, SourceConfig
from dsllm.data.manifest import (
    Manifest,
    ShardRecord,
    SourceRecord,
    TokenizerRecord,
    check_shards,
    check_tokenizer,
    hash_of,
    load_manifest,
    write_manifest,
)
from dsllm.data.position import Position
from dsllm.data.shards import HEADER, MAGIC, bin_path, idx_path
from dsllm.data.training import TrainingBatches
from dsllm.files import sha256_of_folder

DOCUMENT_TOKENS = 1000
SEQUENCE_LENGTH = 1024
SEED = 1234
NUM_READS = 200
CHUNK = 10**7
MIB = 2**20
SHARD_TOKENS = 16 * 10**6
"""Tokens in a shard with data.shard_megabytes at its default of 64, at about 4 bytes of text per token."""
NUM_RANKS = 64
KINDS = {
    "shards": "dsllm, shards of 16 million tokens, one rank",
    "shards-shared": f"dsllm, the same shards, one of {NUM_RANKS} ranks",
    "ours": "dsllm, one shard",
    "megatron": "Megatron-core, one shard, first start",
    "megatron-cached": "Megatron-core, one shard, index cached",
}


def main() -> None:
    """Measure every size and print the table."""
    arguments = parse()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, Path(arguments.directory))))
        return
    print("| tokens | shards | loader | start-up, s | resident memory, MiB | peak, MiB | one sequence, µs |")
    print("|---:|---:|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        for exponent in range(6, 13):
            if 10**exponent <= arguments.most_tokens:
                print_rows(Path(folder, str(exponent)), exponent, arguments)


def print_rows(folder: Path, exponent: int, arguments: argparse.Namespace) -> None:
    """Write the corpora of one size and measure every loader on them."""
    num_tokens = 10**exponent
    with_megatron = num_tokens <= arguments.most_megatron_tokens
    sharded, whole = folder / "sharded", folder / "whole"
    try:
        write_corpus(sharded, num_tokens, SHARD_TOKENS, full_index=False)
        write_corpus(whole, num_tokens, num_tokens, full_index=with_megatron)
    except OSError as error:
        print(f"| 10^{exponent} | | not measured: {error.strerror} ({2 * num_tokens:.0e} bytes) | | | | |")
        return
    for kind, name in KINDS.items():
        directory = sharded if kind.startswith("shards") else whole
        shards = -(-num_tokens // SHARD_TOKENS) if directory == sharded else 1
        if with_megatron or not kind.startswith("megatron"):
            cells = row(kind, directory, arguments.repeats)
            print(f"| 10^{exponent} | {shards:,} | {name} | {cells} |", flush=True)
    shutil.rmtree(folder)  # a tenth of a million small files


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="folder for the sparse files (default: the temporary directory)")
    parser.add_argument("--most-tokens", type=float, default=1e12)
    parser.add_argument("--most-megatron-tokens", type=float, default=1e10, help="0: leave Megatron-core out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_corpus(directory: Path, num_tokens: int, shard_tokens: int, full_index: bool) -> None:
    """A prepared directory of zeros in shards of at most so many tokens."""
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    records = tuple(
        write_holes(directory / f"train-holes-{i:05d}", min(shard_tokens, num_tokens - start), full_index)
        for i, start in enumerate(range(0, num_tokens, shard_tokens))
    )
    tokenizer_record = TokenizerRecord(
        directory="tokenizer", sha256=sha256_of_folder(tokenizer), vocab_size=50000, end_of_text_id=0
    )
    manifest = Manifest(
        settings={},
        settings_sha256=hash_of({}),
        tokenizer=tokenizer_record,
        sources=(SourceRecord(name="holes", train=records, validation=()),),
        dtype="uint16",
    )
    write_manifest(directory, manifest)


def write_holes(prefix: Path, num_tokens: int, full_index: bool) -> ShardRecord:
    """A shard of zeros that takes no space on the disk."""
    num_documents = num_tokens // DOCUMENT_TOKENS
    with bin_path(prefix).open("wb") as file:
        file.truncate(2 * num_tokens)
    write_index(idx_path(prefix), num_documents, full_index)
    return ShardRecord(
        prefix=prefix.name,
        num_tokens=num_tokens,
        num_documents=num_documents,
        text_bytes=None,
        bin_bytes=2 * num_tokens,
        idx_bytes=idx_path(prefix).stat().st_size,
        bin_sha256=None,
    )


def write_index(path: Path, count: int, full: bool) -> None:
    """Megatron's .idx of `count` equal documents: all entries, or only the last one of each array."""
    first = 0 if full else count - 1
    bytes_each = 2 * DOCUMENT_TOKENS
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, count, count + 1))
        write_array(file, HEADER.size, range(first, count), "<i4", lambda i: np.full_like(i, DOCUMENT_TOKENS))
        write_array(file, HEADER.size + 4 * count, range(first, count), "<i8", lambda i: i * bytes_each)
        write_array(file, HEADER.size + 12 * count, range(first, count + 1), "<i8", lambda i: i)


def write_array(
    file: BinaryIO, offset: int, places: range, dtype: str, value_at: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Write some entries of an array; the file has no blocks where the entries before them would be."""
    file.seek(offset + np.dtype(dtype).itemsize * places.start)
    for start in range(places.start, places.stop, CHUNK):
        value_at(np.arange(start, min(start + CHUNK, places.stop), dtype=np.int64)).astype(dtype).tofile(file)


def row(kind: str, directory: Path, repeats: int) -> str:
    """Medians of several processes, as the cells of a row; or the reason why there are none."""
    found = []
    for _ in range(repeats):
        if kind == "megatron":
            for path in (directory / "cache").glob("*"):
                path.unlink()
        command = [sys.executable, __file__, "--measure", kind, "--directory", str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"killed ({done.returncode})"
            return f"not measured: {reason} | | |"
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    median = {key: statistics.median(one[key] for one in found) for key in found[0]}
    formats = {"seconds": ".4f", "resident_mib": ".1f", "peak_mib": ".1f", "sequence_us": ".0f"}
    return " | ".join(f"{median[key]:{form}}" for key, form in formats.items())


def measure(kind: str, directory: Path) -> dict[str, float]:
    """Start one loader in this process; its memory is what it adds to the process after all imports."""
    start, read = megatron(directory) if kind.startswith("megatron") else ours(directory, kind)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = memory("VmRSS")
    began = time.perf_counter()
    loader = start()
    read(loader, 0)
    seconds = time.perf_counter() - began
    resident, peak = memory("VmRSS") - before, memory("VmHWM") - before
    times = []
    for i in range(NUM_READS):
        began = time.perf_counter()
        read(loader, i)
        times.append(time.perf_counter() - began)
    sequence_us = 1e6 * statistics.median(times)
    return {"seconds": seconds, "resident_mib": resident, "peak_mib": peak, "sequence_us": sequence_us}


def memory(field: str) -> float:
    """A field of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / MIB


def ours(directory: Path, kind: str) -> tuple[Callable[[], Any], Callable[[Any, int], Any]]:
    """What training does with its data before the first step, including all checks."""

    def start() -> TrainingBatches:
        manifest = load_manifest(directory)
        check_shards(directory, manifest, 0, NUM_RANKS if kind == "shards-shared" else 1)
        check_tokenizer(directory, manifest)
        return TrainingBatches(
            directory,
            manifest,
            DataConfig(sources=(SourceConfig(name="holes"),), sequence_length=SEQUENCE_LENGTH),
            seed=SEED,
            global_batch_sequences=1,
            micro_batch_sequences=1,
            data_rank=0,
            data_size=1,
        )

    return start, lambda batches, i: batches.step(Position(i))


def megatron(directory: Path) -> tuple[Callable[[], Any], Callable[[Any, int], Any]]:
    """One epoch of a GPTDataset over the same shard, without attention masks; its index is cached in the same folder."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.utils import Split

    tokenizer = types.SimpleNamespace(vocab_size=50000, eod=0, pad=-1, unique_identifiers={"class": "none"})
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQUENCE_LENGTH,
        blend=([str(directory / "train-holes-00000")], None),
        split="1,0,0",
        path_to_cache=str(directory / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )

    def start() -> GPTDataset:
        prefix = str(directory / "train-holes-00000")
        stored = GPTDataset.build_low_level_dataset(prefix, config)
        documents = np.arange(len(stored), dtype=np.int32)
        return GPTDataset(stored, prefix, documents, None, Split.train, config)

    return start, lambda dataset, i: dataset[i % len(dataset)]


if __name__ == "__main__":
    main()
