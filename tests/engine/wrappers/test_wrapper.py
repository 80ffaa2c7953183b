"""What every wrapper promises: its pieces are the optimizer's memory, and what is written there reaches the layers."""

import itertools

import pytest
import torch

from dsllm.engine.processes.process_group import World
from dsllm.engine.wrappers.wrapper import Piece
from dsllm.slices import WEIGHTS
from tests.helpers.engines import MOMENTS, NumberedState, changed_table, engine_of, whole_weights
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import TABLE, tiny_run, tiny_step

STAGES = (0, 1, 2, 3)
FROZEN = "layers.1.mlp.down.weight"
SHAPES = {row.name: row.shape for row in TABLE}


def test_a_piece_is_a_range_of_its_owner():
    piece = Piece(name="a", shape=(4, 5), start=3, count=7, owner=torch.arange(20.0), offset=2, group=None)
    assert piece.owner[piece.inside].tolist() == [2, 3, 4, 5, 6, 7, 8]


def check_pieces(world: World, precision: str, stage: int) -> None:
    """After a step there is state of every trainable piece; what the pieces say is what they are."""
    table = changed_table([FROZEN], trainable=False)
    engine = engine_of(world, config := tiny_run(precision=precision), stage, table)
    wrapper = engine.wrapper
    assert all(set(wrapper.tensors(piece)) == {WEIGHTS} for piece in wrapper.pieces())
    tiny_step(engine, config, 0)
    seen, owners = whole_weights(engine), []
    for piece in wrapper.pieces():
        tensors = wrapper.tensors(piece)
        assert piece.shape == SHAPES[piece.name] and piece.count > 0
        assert (piece.group is None) == (piece.name == FROZEN)
        assert piece.replicated == (stage == 0 or (piece.group is None and stage < 3))
        assert set(tensors) == {WEIGHTS, *wrapper.state_names(piece)}
        assert wrapper.state_names(piece) == (() if piece.group is None else MOMENTS)
        assert all(tensor.numel() == piece.owner.numel() for tensor in tensors.values())
        weights = tensors[WEIGHTS].view(-1)[piece.inside]
        layers = seen[piece.name].view(-1)[piece.start : piece.start + piece.count]
        assert torch.equal(weights.to(layers.dtype), layers), piece.name
        owners.append(id(piece.owner))
    # pieces of one owner follow each other: the state is loaded owner by owner
    assert len(set(owners)) == 1 + sum(one != other for one, other in itertools.pairwise(owners))
    wrapper.forget_state()
    assert all(set(wrapper.tensors(piece)) == {WEIGHTS} for piece in wrapper.pieces())


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pieces_are_the_optimizers_memory(precision, stage, world_size):
    run_ranks(world_size, check_pieces, precision, stage)


def check_refresh(world: World, precision: str, stage: int) -> None:
    """Numbers written to the masters, other ones than before, are seen by the layers once they are refreshed."""
    engine, state = engine_of(world, tiny_run(precision=precision), stage), NumberedState()
    with torch.no_grad():
        for piece in engine.wrapper.pieces():
            new = state.whole(piece.name, WEIGHTS)[piece.start : piece.start + piece.count]
            engine.wrapper.tensors(piece)[WEIGHTS].view(-1)[piece.inside].copy_(new)
        engine.wrapper.refresh()
    for name, weights in whole_weights(engine).items():
        assert torch.equal(weights.view(-1), state.whole(name, WEIGHTS).to(weights.dtype)), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_refresh_shows_the_masters_to_the_layers(precision, stage):
    run_ranks(2, check_refresh, precision, stage)
