"""Tiny training data and the loaders over it; a step has 8 sequences of 8 tokens."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsllm.batches import MicroBatch
from dsllm.config.data import DataConfig, SourceConfig
from dsllm.data.manifest import Manifest
from dsllm.data.position import Position
from dsllm.data.training import TrainingBatches
from tests.helpers.prepared import counting_documents, write_prepared

T = 8
G = 8


def data(sequence_length: int = T, **weights: float | None) -> DataConfig:
    """The data branch of a run over these sources; without any, over source a."""
    sources = tuple(SourceConfig(name=name, weight=weight) for name, weight in (weights or {"a": None}).items())
    return DataConfig(sources=sources, sequence_length=sequence_length)


def training(
    directory: Path, manifest: Manifest, config: DataConfig, rank: int = 0, num_ranks: int = 1, micro: int = 1
) -> TrainingBatches:
    """The micro-batches of one rank."""
    return TrainingBatches(
        directory,
        manifest,
        config,
        seed=1,
        global_batch_sequences=G,
        micro_batch_sequences=micro,
        data_rank=rank,
        data_size=num_ranks,
    )


def three_shards(num_tokens: int, cuts: tuple[int, int]) -> list[list[list[int]]]:
    """The stream 1, 2, 3, ... cut into three shards, so that blocks cross the cuts."""
    bounds = [0, *cuts, num_tokens]
    return [
        counting_documents(stop - start, document_tokens=5, first=start + 1)
        for start, stop in itertools.pairwise(bounds)
    ]


def two_sources(directory: Path) -> Manifest:
    """Source a of 500 tokens in three shards, and source b of 99 tokens from 1000 on."""
    return write_prepared(directory, {"a": three_shards(500, (100, 211)), "b": [counting_documents(99, first=1000)]})


def at_step(step: int) -> Position:
    """The position of a step when nothing is skipped."""
    return Position(step * G)


def targets_of(steps: Iterable[Sequence[MicroBatch]]) -> list[int]:
    """All targets, in the order of delivery."""
    return [int(token) for batches in steps for batch in batches for token in batch.targets.flatten()]
