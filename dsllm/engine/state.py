"""This rank's state as slices: which ranges of which parameters it owns, to be saved, and to be loaded under any layout.

Where the fp32 masters and Adam's moments lie differs with every wrapper that DeepSpeed puts around the optimizer; the
functions `_pieces_*`, and swap.py for what lies on NVMe, are the only code that knows. They read private attributes of
DeepSpeed, tried with the versions in deepspeed_library.TESTED_VERSIONS; `check_attributes` says at the start if one of
them is gone. Offload to CPU moves these tensors and changes nothing else here.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist

from dsllm.engine.build import Engine
from dsllm.engine.deepspeed_library import TESTED_VERSIONS, deepspeed
from dsllm.engine.wrappers.swap import forget_moments, in_memory, is_swapped, swapped_tensors
from dsllm.errors import LaunchError
from dsllm.slices import WEIGHTS, ParameterSlice, Region, StateReader, whole

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's tensors per parameter, by torch's names."""

_ATTRIBUTES = {
    "AdamW": ("param_groups", "state"),
    "FP16_UnfusedOptimizer": ("fp16_groups", "fp32_groups", "optimizer"),
    "DeepSpeedZeroOptimizer": (
        "single_partition_of_fp32_groups", "real_dp_process_group", "round_robin_bit16_groups",
        "round_robin_bit16_offsets", "update_lp_params", "optimizer",
    ),
    "BF16_Optimizer": ("fp32_groups_flat_partition", "real_dp_process_group", "bf16_groups", "update_lp_params", "optimizer"),
    "DeepSpeedZeroOptimizer_Stage3": (
        "fp16_groups", "fp32_partitioned_groups_flat", "persistent_parameters", "_get_param_partition_rank",
        "_reassign_or_swap_out_partitioned_parameters", "invalidate_secondary_tensor", "_swappable_optimizer_subgroup",
        "_optimizer_states_and_gradient_swap_in", "_optimizer_states_and_gradient_swap_out", "optimizer",
    ),
}  # fmt: skip
"""What is read of each wrapper."""


@dataclass(frozen=True)
class _Piece:
    """A range of one parameter inside one of the optimizer's own fp32 tensors."""

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    owner: torch.Tensor  # the fp32 weights that key the optimizer's state; empty while they lie on NVMe
    offset: int  # of the range inside the owner
    swapped: int | None = None  # ZeRO-3's sub-group, where that lies on NVMe


def check_attributes(engine: Engine) -> None:
    """Refuse a DeepSpeed whose optimizer wrapper this module does not know, rather than save or load the wrong numbers.

    Raises:
        LaunchError: names the class and what is missing.
    """
    kind = type(engine.optimizer).__name__
    missing = [a for a in _ATTRIBUTES.get(kind, ()) if getattr(engine.optimizer, a, None) is None]
    if kind not in _ATTRIBUTES or missing:
        raise LaunchError(
            f"deepspeed {deepspeed.__version__}: dsllm does not know how to read the state of {kind}"
            + (f" (missing: {', '.join(missing)})" if missing else "")
            + f"; it was tested with deepspeed {TESTED_VERSIONS}"
        )


def owned_slices(engine: Engine) -> Iterator[ParameterSlice]:
    """The slices that this rank saves: over all ranks every element of every parameter exactly once.

    The tensors are views of the engine's own memory, or of its files on NVMe: write them out before the next step.
    """
    state = _torch_optimizer(engine).state
    rank, size = engine.world.rank, engine.world.size
    for piece in _pieces(engine):
        low, high = 0, piece.count
        if engine.stage == 0:  # replicated: each rank saves its share
            low, high = rank * high // size, (rank + 1) * high // size
        if low == high:
            continue
        moments = state.get(piece.owner, {})
        if piece.swapped is None:
            tensors = {WEIGHTS: piece.owner.data} | {key: moments[key] for key in MOMENTS if key in moments}
        else:
            tensors = swapped_tensors(engine.optimizer, piece.swapped, MOMENTS)
        at = piece.offset + low
        yield ParameterSlice(
            name=piece.name,
            shape=piece.shape,
            region=Region(whole(piece.shape), piece.start + low, piece.start + high),
            tensors={key: tensor.view(-1)[at : at + high - low] for key, tensor in tensors.items()},
            scalars={"step": float(moments["step"])} if "step" in moments else {},
        )


@torch.no_grad()
def load_state(engine: Engine, reader: StateReader) -> None:
    """Give the masters, the moments and the weights that the layers see the values of `reader`; a collective call.

    Where the reader has no moments, the optimizer starts anew.
    """
    state = _torch_optimizer(engine).state
    # also undoes the empty step that DeepSpeed takes when it wraps the optimizer in 16 bits at ZeRO stage 0
    state.clear()
    if any(piece.swapped is not None for piece in _pieces(engine)):
        forget_moments(engine.optimizer)
    for _, found in groupby(_pieces(engine), lambda piece: id(piece.owner)):
        pieces = list(found)
        with _in_memory(engine, pieces[0].swapped):
            for piece in pieces:
                _fill(state, piece, reader)
    _refresh_weights(engine)


def _fill(state: Mapping[torch.Tensor, dict[str, torch.Tensor]], piece: _Piece, reader: StateReader) -> None:
    """One piece's masters and moments, from the reader."""
    inside = slice(piece.offset, piece.offset + piece.count)
    region = Region(whole(piece.shape), piece.start, piece.start + piece.count)
    piece.owner.data.view(-1)[inside].copy_(reader.read(piece.name, WEIGHTS, region))
    if MOMENTS[0] not in reader.keys(piece.name):
        return
    moments = state[piece.owner] or _empty_moments(state, piece.owner)
    moments["step"].fill_(reader.scalars(piece.name)["step"])
    for key in MOMENTS:
        moments[key].view(-1)[inside].copy_(reader.read(piece.name, key, region))


@contextlib.contextmanager
def _in_memory(engine: Engine, swapped: int | None) -> Iterator[None]:
    """A sub-group that lies on NVMe is in memory inside the block; afterwards its weights have its values too."""
    if swapped is None:
        yield
        return
    with in_memory(engine.optimizer, swapped):
        yield
        engine.optimizer._reassign_or_swap_out_partitioned_parameters(swapped)


def _empty_moments(
    state: Mapping[torch.Tensor, dict[str, torch.Tensor]], owner: torch.Tensor
) -> dict[str, torch.Tensor]:
    """AdamW makes its state with the first step; make it now, each tensor with a step of its own."""
    moments = state[owner]
    moments["step"] = torch.zeros((), dtype=torch.float32, device=owner.device)
    for key in MOMENTS:
        moments[key] = torch.zeros_like(owner.data)
    return moments


def _torch_optimizer(engine: Engine) -> Any:
    return engine.optimizer if type(engine.optimizer) is torch.optim.AdamW else engine.optimizer.optimizer


def _pieces(engine: Engine) -> Iterator[_Piece]:
    names = {id(p): name for name, p in engine.module.named_parameters()}
    kind = type(engine.optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return _pieces_of_stage3(engine.optimizer, names)
    if kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        return _pieces_of_flat_groups(engine.optimizer, names)
    return _pieces_of_whole_parameters(engine.optimizer, names)


def _pieces_of_whole_parameters(optimizer: Any, names: Mapping[int, str]) -> Iterator[_Piece]:
    """ZeRO-0: every rank holds everything, in fp32 (AdamW itself) or beside the 16-bit weights."""
    if type(optimizer) is torch.optim.AdamW:
        pairs = [(p, p) for group in optimizer.param_groups for p in group["params"]]
    else:
        pairs = [
            pair
            for low, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for pair in zip(low, full, strict=True)
        ]
    for parameter, master in pairs:
        yield _Piece(names[id(parameter)], tuple(parameter.shape), 0, parameter.numel(), master, 0)


def _pieces_of_flat_groups(optimizer: Any, names: Mapping[int, str]) -> Iterator[_Piece]:
    """ZeRO-1 and 2: the parameters of a group one after the other in one flat tensor, rank r owning its r-th part."""
    zero = type(optimizer).__name__ == "DeepSpeedZeroOptimizer"
    partitions = optimizer.single_partition_of_fp32_groups if zero else optimizer.fp32_groups_flat_partition
    for g, flat in enumerate(partitions):
        rank, size = dist.get_rank(optimizer.real_dp_process_group[g]), flat.numel()
        first, last = rank * size, (rank + 1) * size
        parameters = optimizer.round_robin_bit16_groups[g] if zero else optimizer.bf16_groups[g]
        at = 0
        for j, p in enumerate(parameters):
            if zero:
                at = optimizer.round_robin_bit16_offsets[g][j]
            low, high = max(at, first), min(at + p.numel(), last)
            if low < high:
                yield _Piece(names[id(p)], tuple(p.shape), low - at, high - low, flat, low - first)
            at += p.numel()


def _pieces_of_stage3(optimizer: Any, names: Mapping[int, str]) -> Iterator[_Piece]:
    """ZeRO-3: rank r owns the r-th part of each parameter; the parts of a sub-group lie one after the other."""
    for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        offset, swapped = 0, group if is_swapped(optimizer, group) else None
        for p in optimizer.fp16_groups[group]:
            width = p.ds_tensor.ds_numel  # the last ranks' parts are padded to it
            start = optimizer._get_param_partition_rank(p) * width
            count = max(0, min(width, p.ds_numel - start))
            if count:
                yield _Piece(names[id(p)], tuple(p.ds_shape), start, count, flat, offset, swapped)
            offset += width


def _refresh_weights(engine: Engine) -> None:
    """Copy the masters to the weights that the layers see."""
    optimizer, kind = engine.optimizer, type(engine.optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        for group in range(len(optimizer.fp16_groups)):
            if not is_swapped(optimizer, group):  # those were done while their masters were in memory
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        small = optimizer.persistent_parameters  # whole on every rank
        if small:  # let go of the old values first: gathering passes over what is already there
            small[0].partition(small)
        optimizer.invalidate_secondary_tensor()  # ZeRO++'s second copy, made of old values when letting go of them
        if small:
            small[0].all_gather(small)
    elif kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        optimizer.update_lp_params()
    elif kind == "FP16_UnfusedOptimizer":
        for low, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master in zip(low, full, strict=True):
                weight.data.copy_(master.data)


def loss_scaler_state(engine: Engine) -> dict[str, float]:
    """The dynamic loss scale and its counters, which decide when it changes next; empty except in fp16."""
    if engine.precision != "fp16":
        return {}
    scaler = engine.optimizer.loss_scaler
    return {name: float(getattr(scaler, name)) for name in _SCALER_FIELDS if name in vars(scaler)}


def load_loss_scaler_state(engine: Engine, saved: Mapping[str, float]) -> None:
    """Put the loss scale back to where it was saved."""
    if engine.precision != "fp16":
        return
    scaler = engine.optimizer.loss_scaler
    for name in _SCALER_FIELDS:
        if name in saved and name in vars(scaler):
            setattr(scaler, name, type(getattr(scaler, name))(saved[name]))


_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
