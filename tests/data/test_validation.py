"""Every held-out token is predicted exactly once, for any shards, ranks and strides."""

from pathlib import Path

import numpy as np
import pytest

from dsllm.data.validation import ValidationBatches
from tests.helpers.prepared import END_OF_TEXT, counting_documents, write_prepared

T = 8
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
        ValidationBatches(directory, manifest, data_rank=rank, data_size=num_ranks, **common)
        for rank in range(num_ranks)
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
