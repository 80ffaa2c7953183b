"""Every token is predicted once, whatever the shards, ranks and micro-batches; a batch is a function of the step."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from dsllm.config.data import DataConfig, SourceConfig
from dsllm.data.fingerprint import add
from dsllm.data.loader import Batch, TrainingBatches, ValidationBatches
from dsllm.data.manifest import Manifest
from dsllm.errors import DataError
from tests.helpers.prepared import END_OF_TEXT, counting_documents, write_prepared

T = 8


def data(sequence_length: int = T, **weights: float | None) -> DataConfig:
    sources = tuple(SourceConfig(name=name, weight=weight) for name, weight in (weights or {"a": None}).items())
    return DataConfig(sources=sources, sequence_length=sequence_length)


def training(
    directory: Path, manifest: Manifest, config: DataConfig, rank: int = 0, num_ranks: int = 1, micro: int = 1
) -> TrainingBatches:
    return TrainingBatches(
        directory,
        manifest,
        config,
        seed=1,
        global_batch_sequences=8,
        micro_batch_sequences=micro,
        rank=rank,
        num_ranks=num_ranks,
    )


def three_shards(num_tokens: int, cuts: tuple[int, int]) -> list[list[list[int]]]:
    """The stream 1, 2, 3, ... cut into three shards; blocks lie across the cuts."""
    bounds = [0, *cuts, num_tokens]
    return [
        counting_documents(stop - start, document_tokens=5, first=start + 1)
        for start, stop in itertools.pairwise(bounds)
    ]


def targets_of(steps: list[list[Batch]]) -> list[int]:
    return [int(token) for batches in steps for batch in batches for token in batch.targets.flatten()]


@pytest.mark.parametrize("cuts", [(3, 200), (170, 170), (256, 300)])
def test_every_token_but_the_first_is_predicted_exactly_once_per_epoch(tmp_path: Path, cuts: tuple[int, int]) -> None:
    num_steps = 8  # of 8 sequences: 64 blocks, one epoch
    manifest = write_prepared(tmp_path, {"a": three_shards(64 * T + 1, cuts)})
    batches = training(tmp_path, manifest, data(), micro=2)
    for epoch in range(3):
        steps = [batches.step(epoch * num_steps + i) for i in range(num_steps)]
        assert sorted(targets_of(steps)) == list(range(2, 64 * T + 2))
    assert batches.epochs(3 * 64) == {"a": 3.0}


def test_targets_are_the_inputs_one_token_later(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, {"a": three_shards(500, (100, 211))})
    (batch,) = training(tmp_path, manifest, data(), micro=8).step(3)
    assert batch.inputs.shape == batch.targets.shape == (8, T)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.is_contiguous() and batch.targets.is_contiguous() and batch.weights is None
    assert torch.equal(batch.targets, batch.inputs + 1)  # the stream counts


def test_documents_are_numbered_within_each_sequence(tmp_path: Path) -> None:
    documents = [[*words, END_OF_TEXT] for words in counting_documents(400, document_tokens=4)]
    manifest = write_prepared(tmp_path, {"a": [documents]})
    masked = dataclasses.replace(data(), document_mask=True)
    (batch,) = training(tmp_path, manifest, masked, micro=8).step(2)
    held_out = ValidationBatches(
        tmp_path, manifest, sequence_length=T, micro_batch_sequences=2, document_mask=True, stride=3
    )
    for found in (batch, *held_out):
        ends = (found.inputs == END_OF_TEXT).tolist()
        assert found.documents.tolist() == [[sum(row[:i]) for i in range(T)] for row in ends]
    assert batch.documents.max() > 0  # an end-of-text within a sequence, which belongs to the document that it ends
    (plain,) = training(tmp_path, manifest, data(), micro=8).step(2)
    assert plain.documents is None and torch.equal(plain.inputs, batch.inputs)


def test_a_batch_is_a_function_of_the_step(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, {"a": three_shards(500, (100, 211))})
    one, other = (training(tmp_path, manifest, data()) for _ in range(2))
    late = targets_of([one.step(5)])
    assert targets_of([one.step(0), one.step(5)])[-len(late) :] == late == targets_of([other.step(5)])
    assert late != targets_of([one.step(4)])


@pytest.mark.parametrize("weights", [{"a": None, "b": None}, {"a": 3.0, "b": 1.0}])
@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 8), (2, 2), (4, 1), (8, 1)])
def test_order_and_fingerprint_do_not_depend_on_ranks_and_micro_batches(
    tmp_path: Path, weights: dict[str, float | None], num_ranks: int, micro: int
) -> None:
    manifest = write_prepared(tmp_path, {"a": three_shards(500, (100, 211)), "b": [counting_documents(99, first=1000)]})
    config = data(**weights)
    alone = training(tmp_path, manifest, config)
    ranks = [training(tmp_path, manifest, config, rank, num_ranks, micro) for rank in range(num_ranks)]
    for step in (0, 1, 30):
        assert targets_of([rank.step(step) for rank in ranks]) == targets_of([alone.step(step)])
        assert add(*(rank.fingerprint(step) for rank in ranks)) == alone.fingerprint(step)
    assert [len(rank.step(0)) for rank in ranks] == [8 // num_ranks // micro] * num_ranks


def test_the_fingerprint_sees_a_changed_token(tmp_path: Path) -> None:
    documents = counting_documents(65)
    before = training(tmp_path, write_prepared(tmp_path, {"a": [documents]}), data()).fingerprint(0)
    documents[0][7] += 1
    assert training(tmp_path, write_prepared(tmp_path, {"a": [documents]}), data()).fingerprint(0) != before


def test_weighted_sources_have_their_share_of_the_samples(tmp_path: Path) -> None:
    train = {"a": [counting_documents(50)], "b": [counting_documents(500, first=1000)]}
    manifest = write_prepared(tmp_path, train)
    batches = training(tmp_path, manifest, data(a=3.0, b=1.0))
    samples = torch.cat([batch.inputs[:, 0] for step in range(50) for batch in batches.step(step)])
    assert (samples < 1000).sum() == 300
    assert batches.epochs(400) == {"a": 300 / 6, "b": 100 / 62}


def test_a_loader_keeps_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsllm.data.loader.MOST_OPEN_SHARDS", 2)
    open_files = Path("/proc/self/fd")
    if not open_files.exists():
        pytest.skip("needs /proc")
    shards = [counting_documents(20, first=1 + 20 * i) for i in range(16)]
    manifest = write_prepared(tmp_path, {"a": shards})
    batches = training(tmp_path, manifest, data())
    before = len(list(open_files.iterdir()))
    for step in range(5):
        batches.step(step)
    assert len(list(open_files.iterdir())) <= before + 2


def test_a_corpus_shorter_than_one_sequence_is_refused(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, {"a": [counting_documents(T)]})
    with pytest.raises(DataError, match=r"a sequence needs 9 training tokens .* a has 8"):
        training(tmp_path, manifest, data())


def test_a_weighted_source_shorter_than_one_sequence_is_refused(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, {"a": [counting_documents(100)], "b": [counting_documents(3)]})
    with pytest.raises(DataError, match="b has 3"):
        training(tmp_path, manifest, data(a=1.0, b=1.0))
    assert training(tmp_path, manifest, data(a=None, b=None)).epochs(12)["a"] == 1.0


def test_other_sources_than_those_prepared_are_refused(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, {"a": [counting_documents(100)]})
    with pytest.raises(DataError, match="prepared from the sources a, but the run has b"):
        training(tmp_path, manifest, data(b=None))


def test_ids_that_the_tokenizer_does_not_have_are_refused(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, {"a": [counting_documents(100)]}, vocab_size=90)
    with pytest.raises(DataError, match="but the tokenizer has 90"):
        for step in range(2):
            training(tmp_path, manifest, data()).step(step)


HELD_OUT = [(), (1,), (T,), (T + 1,), (100, 37), (5 * T, 3, 64)]


def validation(directory: Path, lengths: tuple[int, ...], **settings: int) -> list[ValidationBatches]:
    """The loaders of all ranks over one held-out stream per length; the streams count on from each other."""
    train = {f"s{i}": [counting_documents(20)] for i in range(max(len(lengths), 1))}
    held_out = {}
    first = 1
    for i, length in enumerate(lengths):
        held_out[f"s{i}"] = [
            counting_documents(length // 3, first=first),
            counting_documents(length - length // 3, first=first + length // 3),
        ]
        first += length
    manifest = write_prepared(directory, train, held_out)
    num_ranks = settings.pop("num_ranks", 1)
    common = {"sequence_length": T, "micro_batch_sequences": 2, **settings}
    return [
        ValidationBatches(directory, manifest, rank=rank, num_ranks=num_ranks, **common) for rank in range(num_ranks)
    ]


def counted(loaders: list[ValidationBatches]) -> list[tuple[int, int]]:
    """(input, target) wherever a target counts, over all ranks."""
    pairs = []
    for loader in loaders:
        for batch in loader:
            assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == (2, T)
            chosen = batch.weights == 1
            assert chosen.sum() == batch.weights.sum(), "weights are 0 or 1"
            pairs += zip(batch.inputs[chosen].tolist(), batch.targets[chosen].tolist(), strict=True)
    return pairs


@pytest.mark.parametrize("lengths", HELD_OUT)
@pytest.mark.parametrize("stride", [T, 3, 1])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_held_out_token_is_predicted_exactly_once(
    tmp_path: Path, lengths: tuple[int, ...], stride: int, num_ranks: int
) -> None:
    loaders = validation(tmp_path, lengths, stride=stride, num_ranks=num_ranks)
    pairs = counted(loaders)
    assert sorted(target for _, target in pairs) == list(range(1, sum(lengths) + 1))
    starts = set(np.cumsum([1, *lengths])[:-1].tolist())
    assert all(given == (END_OF_TEXT if target in starts else target - 1) for given, target in pairs)
    assert {loader.num_tokens for loader in loaders} == {sum(lengths)}
    assert {loader.text_bytes for loader in loaders} == {3 * sum(lengths)}


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_all_ranks_have_the_same_number_of_batches(tmp_path: Path, num_ranks: int) -> None:
    loaders = validation(tmp_path, (100, 37), num_ranks=num_ranks)
    assert {len(list(loader)) for loader in loaders} == {len(loaders[0])}
    assert len(loaders[0]) == -(-18 // (2 * num_ranks))  # 13 and 5 windows of 8 tokens


def test_a_window_that_overlaps_counts_only_its_last_tokens(tmp_path: Path) -> None:
    (loader,) = validation(tmp_path, (20,), stride=4)
    first, second = next(iter(loader)).weights.tolist()
    assert first == [1.0] * 8
    assert second == [0.0] * 4 + [1.0] * 4


def test_fewer_sequences_are_spread_over_all_sources(tmp_path: Path) -> None:
    whole = set(counted(validation(tmp_path, (100, 100))))
    loaders = validation(tmp_path, (100, 100), max_sequences=4, num_ranks=2)
    pairs = counted(loaders)
    assert set(pairs) < whole
    assert loaders[0].num_tokens == len(pairs) == len(set(pairs)) <= 4 * T
    assert len([target for _, target in pairs if target <= 100]) == 2 * T
    assert loaders[0].text_bytes == 3 * len(pairs)


def test_more_sequences_than_there_are_is_all_of_them(tmp_path: Path) -> None:
    assert validation(tmp_path, (100,), max_sequences=1000)[0].num_tokens == 100
