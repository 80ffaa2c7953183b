"""DeepSpeed 0.19.8's known traps, one test each: fixed and proven here, or refused by name.

Trap 5, a launcher that leaves its ranks behind or hides their exit code, belongs to tests/cli/test_launchers.py (what a
signal or a dead launcher leaves in status.json). Traps 9 and 10 are of sequence and pipeline parallelism.
"""

import math
from datetime import timedelta

import pytest
import torch
from torch.distributed import distributed_c10d

from dsllm.engine.deepspeed_library import deepspeed
from dsllm.engine.optimizers import set_learning_rate
from dsllm.engine.processes.process_group import World, bound_all_groups
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout
from dsllm.engine.state import load_state, owned_slices
from dsllm.errors import ConfigError
from dsllm.mesh import Mesh
from dsllm.slices import WEIGHTS, Region
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import first_state, tiny_engine, tiny_run, tiny_step

STAGES = (0, 1, 2, 3)
GPU = Layout(mesh=Mesh(data=2), device="cuda", precision="bf16")


def refusal(given: dict, layout: Layout = GPU) -> str:
    """The one problem of a DeepSpeed JSON."""
    with pytest.raises(ConfigError) as caught:
        final_config(tiny_run(), given, layout)
    (text,) = caught.value.problems
    return text


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("clipping", [0.0, 0.5])
def test_1_clipping_is_always_written(stage, clipping):
    final = final_config(tiny_run(gradient_clipping=clipping), {"zero_optimization": {"stage": stage}}, GPU)
    assert final["gradient_clipping"] == clipping


def no_step_taken(world: World) -> bool:
    """Moments right after the start, and the masters after a step with learning rate 0 and weight decay."""
    config = tiny_run(precision="bf16")
    engine = tiny_engine(world, config, 0)
    assert all(not piece.scalars and set(piece.tensors) == {WEIGHTS} for piece in owned_slices(engine))
    first = first_state(config)
    exact = True
    for piece in owned_slices(engine):
        master = piece.tensors[WEIGHTS]
        exact &= torch.equal(master, first.read(piece.name, WEIGHTS, piece.region))
    tiny_step(engine, config, 0)
    return exact and all(piece.scalars == {"step": 1.0} for piece in owned_slices(engine))


def test_2_bf16_at_stage_0_starts_without_the_empty_step():
    assert all(run_ranks(2, no_step_taken))


class Saved:
    """An engine's own slices, as a reader: what a checkpoint of one rank would give back."""

    def __init__(self, slices):
        self.slices = {piece.name: piece for piece in slices}

    def read(self, name: str, key: str, region: Region) -> torch.Tensor:
        """See StateReader."""
        piece = self.slices[name]
        start = piece.region.start
        return piece.tensors[key][region.start - start : region.stop - start].clone()

    def keys(self, name: str) -> tuple[str, ...]:
        """See StateReader."""
        return tuple(self.slices[name].tensors)

    def scalars(self, name: str) -> dict[str, float]:
        """See StateReader."""
        return dict(self.slices[name].scalars)


def steps_and_decay_after_loading(world: World) -> tuple[set[float], list[float], bool]:
    """ZeRO-3 with several sub-groups: Adam's steps and the groups' decay after loading and one step; own step tensors?"""
    config = tiny_run()
    engine = tiny_engine(world, config, 3)
    assert len(engine.optimizer.fp32_partitioned_groups_flat) > 2, "several sub-groups share what they should not"
    for step in range(2):
        tiny_step(engine, config, step)
    load_state(engine, Saved(owned_slices(engine)))
    state = engine.optimizer.optimizer.state
    own = len({moments["step"].data_ptr() for moments in state.values()}) == len(state)
    tiny_step(engine, config, 2)
    taken = {piece.scalars["step"] for piece in owned_slices(engine)}
    return taken, [group["weight_decay"] for group in engine.optimizer.param_groups], own


def test_3_loading_stage_3_keeps_a_step_for_each_sub_group_and_each_groups_decay():
    for taken, decay, own in run_ranks(2, steps_and_decay_after_loading):
        assert taken == {3.0} and decay == [0.1, 0.0] and own


def test_4_round_robin_gradients_are_refused():
    assert "read wrong weights" in refusal({"zero_optimization": {"stage": 2, "round_robin_gradients": True}})


def timeouts(world: World) -> set[timedelta]:
    """Time-outs of all groups, ZeRO's own among them, once they are bounded by another than torch's default."""
    for stage in (1, 3):
        tiny_engine(world, tiny_run(), stage)
    bound_all_groups(timedelta(seconds=47))
    assert len(distributed_c10d._world.pg_map) > 1, "ZeRO reduces in a group of its own"
    backends = (group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map)
    return {backend.options._timeout for backend in backends}


def test_6_one_timeout_reaches_every_group():
    assert run_ranks(2, timeouts) == [{timedelta(seconds=47)}] * 2


def linear_is_torchs(world: World) -> bool:
    """Whether F.linear is the same function before and after a ZeRO-3 engine."""
    before = torch.nn.functional.linear
    tiny_engine(world, tiny_run(precision="bf16"), 3)
    return torch.nn.functional.linear is before


def test_7_stage_3_leaves_functional_linear_alone():
    assert all(run_ranks(2, linear_is_torchs))
    assert "torch.nn.functional.linear" in refusal({"zero_optimization": {"stage": 3, "memory_efficient_linear": True}})


def poisoned_fp32(world: World) -> tuple[float, float, bool, bool]:
    """fp32 at ZeRO-0: a good step's norm, then a NaN on one rank: its norm, whether applied, whether weights changed."""
    config = tiny_run()
    engine = tiny_engine(world, config, 0)
    good = tiny_step(engine, config, 0)
    if world.rank == 1:  # an infinite weight of the last block's norm, on one rank only, as a bit flip would leave it
        parameter = dict(engine.module.named_parameters())["norm.weight"]
        kept = parameter.data.clone()
        parameter.data.fill_(math.nan)
    bad = tiny_step(engine, config, 1)
    if world.rank == 1:
        parameter.data.copy_(kept)
    finite = all(bool(torch.isfinite(piece.tensors[WEIGHTS]).all()) for piece in owned_slices(engine))
    return good.gradient_norm, bad.gradient_norm, bad.applied, finite


def test_8_fp32_at_stage_0_reports_the_norm_and_drops_a_nan():
    for good, bad, applied, finite in run_ranks(2, poisoned_fp32):
        assert math.isfinite(good) and good > 0 and not math.isfinite(bad) and not applied and finite


def test_9_sequence_parallelism_is_refused():
    assert "would not synchronise the sequence ranks" in refusal({"sequence_parallel_size": 2})


def test_10_pipelines_are_refused():
    assert "set parallel.pipeline, and remove it here" in refusal({"pipeline": {"stages": 2}})


@pytest.mark.parametrize("key", ["checkpoint", "load_universal_checkpoint"])
def test_11_deepspeeds_own_checkpoints_are_refused(key):
    """Checkpoints are atomic and checksummed: tests/checkpoint, tests/train/test_saver.py."""
    assert "dsllm writes checkpoints of its own" in refusal({key: True})


def updates_taken(world: World, accumulation: int) -> list[tuple[int, float, bool]]:
    """By stage: DeepSpeed's own count of steps, Adam's, and whether each of them moved the weights."""
    config, found = tiny_run(micro_batch_sequences=8 // world.size // accumulation), []
    for stage in STAGES:
        engine, moved = tiny_engine(world, config, stage), True
        for step in range(3):
            before = [piece.tensors[WEIGHTS].clone() for piece in owned_slices(engine)]
            set_learning_rate(engine.optimizer, 1e-3)
            tiny_step(engine, config, step)
            after = [piece.tensors[WEIGHTS] for piece in owned_slices(engine)]
            moved &= any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        (taken,) = {piece.scalars["step"] for piece in owned_slices(engine)}
        found.append((engine.deepspeed.global_steps, taken, moved))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_12_every_step_is_one_update_whatever_the_accumulation(accumulation):
    for of_rank in run_ranks(2, updates_taken, accumulation):
        assert of_rank == [(3, 3.0, True)] * len(STAGES)
    assert "counter of micro-batches" in refusal({"managed_gradient_accumulation": False})


def types_at_stage_3(world: World) -> list[tuple[set, set, bool]]:
    """Types of the weights and of the masters in fp32, and whether these are exact, by what the accelerator says of fp16."""
    config, found = tiny_run(precision="fp32"), []
    first = first_state(config)
    for supported in (False, True):
        accelerator = type(deepspeed.accelerator.get_accelerator())
        accelerator.is_fp16_supported = lambda self, answer=supported: answer
        engine = tiny_engine(world, config, 3)
        pieces = [(piece, piece.tensors[WEIGHTS]) for piece in owned_slices(engine)]
        exact = all(torch.equal(m, first.read(p.name, WEIGHTS, p.region)) for p, m in pieces)
        found.append(({p.dtype for p in engine.module.parameters()}, {m.dtype for _, m in pieces}, exact))
    return found


def test_13_fp32_at_stage_3_is_fp32_whether_or_not_the_cpu_knows_fp16():
    """Where it does not (most CPUs), DeepSpeed takes bf16 whatever type is set."""
    assert run_ranks(1, types_at_stage_3)[0] == [({torch.float32}, {torch.float32}, True)] * 2
