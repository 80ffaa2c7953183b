"""Saves this rank's weights and optimizer state as slices, and loads them under any layout."""

from collections.abc import Iterator, Mapping
from itertools import groupby

import torch

from dsllm.engine.build import Engine
from dsllm.engine.wrappers.loss_scale import load_scaler_state, scaler_state
from dsllm.engine.wrappers.wrapper import Piece
from dsllm.errors import CheckpointError
from dsllm.slices import WEIGHTS, ParameterSlice, Region, StateReader, whole

_STEP = "step"
"""The one number that torch's optimizers keep per parameter."""


def owned_slices(engine: Engine) -> Iterator[ParameterSlice]:
    """The slices that this rank saves. Together, the ranks save every element of every parameter once.

    The tensors are views of the engine's own memory, or of its files on NVMe: write them out before the next step.
    """
    rows = {row.name: row for row in engine.table}
    rank, size = engine.world.data_rank, engine.world.data_size
    for piece in engine.wrapper.pieces():
        low, high = 0, piece.count
        if piece.replicated:  # each rank saves its share
            low, high = rank * high // size, (rank + 1) * high // size
        if low == high:
            continue
        at = piece.offset + low
        state = engine.wrapper.torch_optimizer.state.get(piece.owner, {})
        yield ParameterSlice(
            name=piece.name,
            shape=piece.shape,
            region=Region(whole(piece.shape), piece.start + low, piece.start + high),
            tensors={
                key: tensor.view(-1)[at : at + high - low].float()  # only frozen weights are not fp32 already
                for key, tensor in engine.wrapper.tensors(piece).items()
            },
            scalars={_STEP: float(state[_STEP])} if _STEP in state else {},
            expert=rows[piece.name].expert,
            trainable=rows[piece.name].trainable,
        )


@torch.no_grad()
def load_state(engine: Engine, reader: StateReader) -> None:
    """Load the reader's values into the master weights, the optimizer and the weights that the layers see.

    A collective call. Where the reader has no optimizer state, the optimizer starts anew.

    Raises:
        CheckpointError: on all ranks, before anything is changed: the reader has the state of another optimizer.
    """
    _check_state_tensors(engine, reader)
    # also undoes the empty step that DeepSpeed takes when it wraps the optimizer in 16 bits at ZeRO-0
    engine.wrapper.forget_state()
    for _, found in groupby(engine.wrapper.pieces(), lambda piece: id(piece.owner)):
        pieces = list(found)
        with engine.wrapper.in_memory(pieces[0]):
            for piece in pieces:
                _fill(engine, piece, reader)
    engine.wrapper.refresh()


def _check_state_tensors(engine: Engine, reader: StateReader) -> None:
    """Refuse a state that is neither weights alone nor what the run's optimizer keeps."""
    problem = ""
    for piece in engine.wrapper.trainable_pieces():
        saved, kept = set(reader.keys(piece.name)) - {WEIGHTS}, set(engine.wrapper.state_names(piece))
        if saved and saved != kept:
            problem = (
                f"{piece.name}: the optimizer tensors {', '.join(sorted(saved))} are saved, but the run's optimizer keeps "
                f"{', '.join(sorted(kept)) or 'none'}: resume with the optimizer that saved them, or start a new run from "
                "the weights with model.init_from"
            )
            break
    problems = [text for text in engine.world.gather(problem) if text]
    if problems:  # a rank without such a piece would wait for the others
        raise CheckpointError(problems[0])


def _fill(engine: Engine, piece: Piece, reader: StateReader) -> None:
    """Load one piece's weights and optimizer state."""
    region = Region(whole(piece.shape), piece.start, piece.start + piece.count)
    piece.owner.data.view(-1)[piece.inside].copy_(reader.read(piece.name, WEIGHTS, region))
    names = engine.wrapper.state_names(piece)
    if not names or set(reader.keys(piece.name)) == {WEIGHTS}:
        return
    optimizer_state = engine.wrapper.torch_optimizer.state
    state = optimizer_state[piece.owner] or _empty_state(optimizer_state, piece.owner, names)
    state[_STEP].fill_(reader.scalars(piece.name)[_STEP])
    for name in names:
        state[name].view(-1)[piece.inside].copy_(reader.read(piece.name, name, region))


def _empty_state(
    optimizer_state: Mapping[torch.Tensor, dict[str, torch.Tensor]], owner: torch.Tensor, names: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Make the state that torch would make in the first step. Each owner has a step counter of its own."""
    state = optimizer_state[owner]
    state[_STEP] = torch.zeros((), dtype=torch.float32, device=owner.device)
    for name in names:
        state[name] = torch.zeros_like(owner.data)
    return state


def loss_scaler_state(engine: Engine) -> dict[str, float]:
    """The loss scale and the counters that decide when it changes next; empty except in fp16."""
    return scaler_state(engine.optimizer) if engine.precision == "fp16" else {}


def load_loss_scaler_state(engine: Engine, saved: Mapping[str, float]) -> None:
    """Restore a saved loss scale; nothing to do except in fp16."""
    if engine.precision == "fp16":
        load_scaler_state(engine.optimizer, saved)
