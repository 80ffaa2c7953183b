"""Every token is predicted once per epoch, for any shards, ranks and micro-batches; a step is a function of its position."""

import json
from pathlib import Path

import pytest
import torch

from dsllm.data.fingerprint import add
from dsllm.data.position import Position
from dsllm.errors import DataError
from tests.helpers.prepared import counting_documents, write_prepared
from tests.helpers.training_data import G, T, at_step, data, targets_of, three_shards, training, two_sources


@pytest.mark.parametrize("cuts", [(3, 200), (170, 170), (256, 300)])
def test_every_token_but_the_first_is_predicted_exactly_once_per_epoch(tmp_path: Path, cuts: tuple[int, int]) -> None:
    num_steps = 8  # of 8 sequences: 64 blocks, one epoch
    manifest = write_prepared(tmp_path, {"a": three_shards(64 * T + 1, cuts)})
    batches = training(tmp_path, manifest, data(), micro=2)
    for epoch in range(3):
        steps = [batches.step(at_step(epoch * num_steps + i)) for i in range(num_steps)]
        assert sorted(targets_of(steps)) == list(range(2, 64 * T + 2))


def test_targets_are_the_inputs_one_token_later(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, {"a": three_shards(500, (100, 211))})
    (batch,) = training(tmp_path, manifest, data(), micro=8).step(at_step(3))
    assert batch.inputs.shape == batch.targets.shape == (8, T)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.is_contiguous() and batch.targets.is_contiguous() and batch.weights is None
    assert torch.equal(batch.targets, batch.inputs + 1)  # the stream counts


def test_a_step_is_a_function_of_its_position(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, {"a": three_shards(500, (100, 211))})
    one, other = (training(tmp_path, manifest, data()) for _ in range(2))
    late = targets_of([one.step(at_step(5))])
    steps = [one.step(at_step(step)) for step in (0, 5)]
    assert targets_of(steps)[-len(late) :] == late == targets_of([other.step(at_step(5))])
    assert late != targets_of([one.step(at_step(4))])


def test_a_micro_batch_says_which_samples_it_has(tmp_path: Path) -> None:
    batches = training(tmp_path, two_sources(tmp_path), data(a=None, b=None), rank=1, num_ranks=2, micro=2)
    origins = [batch.origin for batch in batches.step(at_step(3))]
    assert [(origin.first_sample, origin.last_sample) for origin in origins] == [(28, 29), (30, 31)]
    assert {name for origin in origins for name in origin.sources} == {"a", "b"}


@pytest.mark.parametrize("weights", [{"a": None, "b": None}, {"a": 3.0, "b": 1.0}])
@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 8), (2, 2), (4, 1), (8, 1)])
def test_order_and_fingerprint_do_not_depend_on_ranks_and_micro_batches(
    tmp_path: Path, weights: dict[str, float | None], num_ranks: int, micro: int
) -> None:
    manifest, config = two_sources(tmp_path), data(**weights)
    alone = training(tmp_path, manifest, config)
    ranks = [training(tmp_path, manifest, config, rank, num_ranks, micro) for rank in range(num_ranks)]
    for place in (at_step(0), at_step(1), at_step(30), Position(3).skipping([(5, 6), (9, 40)])):
        assert targets_of([rank.step(place) for rank in ranks]) == targets_of([alone.step(place)])
        assert add(*(rank.fingerprint(place) for rank in ranks)) == alone.fingerprint(place)
    assert [len(rank.step(at_step(0))) for rank in ranks] == [G // num_ranks // micro] * num_ranks


@pytest.mark.parametrize(
    "skipped",
    [
        [(0, 3)],  # at the start of the run
        [(10, 13)],  # inside a step
        [(8, 16)],  # a whole step
        [(8, 9), (15, 16)],  # at both borders of a step
        [(14, 19)],  # across a border
        [(2, 3), (5, 30), (33, 34)],  # more than a step, and on both sides of it
    ],
)
@pytest.mark.parametrize(("num_ranks", "micro"), [(1, 8), (2, 1), (4, 2)])
def test_skipped_samples_are_left_out_and_all_others_keep_their_order(
    tmp_path: Path, skipped: list[tuple[int, int]], num_ranks: int, micro: int
) -> None:
    manifest, config = two_sources(tmp_path), data(a=3.0, b=1.0)
    plain = training(tmp_path, manifest, config)
    every = [targets_of([plain.step(at_step(step))])[i * T : (i + 1) * T] for step in range(9) for i in range(G)]
    kept = [tokens for n, tokens in enumerate(every) if not any(first <= n < stop for first, stop in skipped)]
    ranks = [training(tmp_path, manifest, config, rank, num_ranks, micro) for rank in range(num_ranks)]
    position = Position().skipping(skipped)
    for step in range(5):
        delivered = targets_of([rank.step(position) for rank in ranks])
        assert delivered == [token for tokens in kept[step * G : (step + 1) * G] for token in tokens]
        position = position.after(G)


@pytest.mark.parametrize("skipped", [[], [(17, 21), (40, 48)]])
def test_a_run_resumed_from_a_saved_position_delivers_what_the_uninterrupted_run_does(
    tmp_path: Path, skipped: list[tuple[int, int]]
) -> None:
    manifest, config = two_sources(tmp_path), data(a=None, b=None)
    batches, position, prints, saved = training(tmp_path, manifest, config), Position().skipping(skipped), [], []
    for _ in range(8):
        saved.append(json.dumps(position.to_dict()))
        prints.append(batches.fingerprint(position))
        position = position.after(G)
    for step, content in enumerate(saved):
        resumed = [training(tmp_path, manifest, config, rank, num_ranks=2) for rank in range(2)]
        position = Position.from_dict(json.loads(content), "step")
        for expected in prints[step:]:
            assert add(*(rank.fingerprint(position) for rank in resumed)) == expected
            position = position.after(G)


@pytest.mark.parametrize(
    ("weights", "prints"),
    [
        ({"a": None, "b": None}, [5500320065440261695, 14702756642551191565, 2818698769789954852]),
        ({"a": 3.0, "b": 1.0}, [8588081719087141021, 6108384670497158108, 14354089222140280221]),
    ],
)
def test_the_delivered_samples_are_fixed_for_good(
    tmp_path: Path, weights: dict[str, float | None], prints: list[int]
) -> None:
    """A run that is resumed by a later version must get the same samples: these numbers may never change."""
    batches = training(tmp_path, two_sources(tmp_path), data(**weights))
    assert [batches.fingerprint(at_step(step)) for step in (0, 1, 30)] == prints


def test_the_fingerprint_sees_a_changed_token(tmp_path: Path) -> None:
    documents = counting_documents(65)
    before = training(tmp_path, write_prepared(tmp_path, {"a": [documents]}), data()).fingerprint(at_step(0))
    documents[0][7] += 1
    changed = training(tmp_path, write_prepared(tmp_path, {"a": [documents]}), data())
    assert changed.fingerprint(at_step(0)) != before


def test_weighted_sources_have_their_share_of_the_samples(tmp_path: Path) -> None:
    train = {"a": [counting_documents(50)], "b": [counting_documents(500, first=1000)]}
    manifest = write_prepared(tmp_path, train)
    batches = training(tmp_path, manifest, data(a=3.0, b=1.0))
    samples = torch.cat([batch.inputs[:, 0] for step in range(50) for batch in batches.step(at_step(step))])
    assert (samples < 1000).sum() == 300


def test_a_corpus_shorter_than_one_sequence_is_refused(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, {"a": [counting_documents(T)]})
    with pytest.raises(DataError, match=r"a sequence needs 9 training tokens .* a has 8"):
        training(tmp_path, manifest, data())


def test_a_weighted_source_shorter_than_one_sequence_is_refused(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, {"a": [counting_documents(100)], "b": [counting_documents(3)]})
    with pytest.raises(DataError, match="b has 3"):
        training(tmp_path, manifest, data(a=1.0, b=1.0))
    (batch,) = training(tmp_path, manifest, data(a=None, b=None), micro=8).step(at_step(0))
    assert batch.origin.sources == ("a",)


def test_other_sources_than_those_prepared_are_refused(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, {"a": [counting_documents(100)]})
    with pytest.raises(DataError, match="prepared from the sources a, but the run has b"):
        training(tmp_path, manifest, data(b=None))


def test_ids_that_the_tokenizer_does_not_have_are_refused(tmp_path: Path) -> None:
    manifest = write_prepared(tmp_path, {"a": [counting_documents(100)]}, vocab_size=90)
    with pytest.raises(DataError, match="but the tokenizer has 90"):
        for step in range(2):
            training(tmp_path, manifest, data()).step(at_step(step))


def test_the_first_sample_of_a_shard_is_found_without_reading_it(tmp_path: Path) -> None:
    """For every shard and position it is the one that a search through the delivered tokens finds."""
    manifest = two_sources(tmp_path)
    batches = training(tmp_path, manifest, data(a=0.7, b=0.3))
    bounds = {
        "train-a-00000": (1, 100),
        "train-a-00001": (101, 211),
        "train-a-00002": (212, 500),
        "train-b-00000": (1000, 2000),
    }
    windows = [
        {int(token) for token in (*batch.inputs[0], batch.targets[0][-1])}
        for step in range(6)
        for batch in batches.step(at_step(step))
    ]
    for path in tmp_path.glob("*.bin"):
        path.unlink()
    for prefix, (low, high) in bounds.items():
        places = [place for place, window in enumerate(windows) if any(low <= token <= high for token in window)]
        for step in range(7):
            wanted = next((place for place in places if place < step * G), -1)
            assert batches.first_sample_in({prefix}, at_step(step), 10**6) == wanted
    position = Position(0).skipping([(0, 5)])
    assert (
        batches.first_sample_in(
            {"train-a-00000", "train-a-00001", "train-a-00002", "train-b-00000"}, position.after(3), 9
        )
        == 0
    )
    assert batches.first_sample_in({"absent"}, at_step(3), 10**6) == -1
    assert batches.first_sample_in({"absent"}, at_step(3), 10) is None
