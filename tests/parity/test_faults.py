"""Faults planted into the real path, on real ranks: the comparison that passes every sound combination must catch each."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from dsllm.engine.processes.local_ranks import iterate_on_ranks
from dsllm.engine.processes.process_group import World
from dsllm.parity import engine_run
from dsllm.parity.combinations import DEEPSPEED_SETTINGS, Combination
from dsllm.parity.compare import Row, compare
from dsllm.parity.engine_run import RankTrained, train_on_rank
from dsllm.parity.table import References

SEED = 7
WORLD_SIZE = 2
Patch = contextlib.AbstractContextManager[None]


@contextlib.contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """owner.name becomes wrap(owner.name) for the duration."""
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def backward_of(scale: Callable[[DeepSpeedEngine], float]) -> Patch:
    """Every loss is multiplied by scale(engine) on its way into backward."""
    return replaced(DeepSpeedEngine, "backward", lambda own: lambda self, loss, **o: own(self, loss * scale(self), **o))


def not_averaged_over_accumulation(world: World) -> Patch:
    return backward_of(lambda engine: engine.gradient_accumulation_steps())


def last_micro_batch_dropped(world: World) -> Patch:
    return backward_of(lambda engine: 0.0 if engine.is_gradient_accumulation_boundary() else 1.0)


def summed_over_ranks(world: World) -> Patch:
    return backward_of(lambda engine: world.size)


def averaged_twice_over_ranks(world: World) -> Patch:
    return backward_of(lambda engine: 1 / world.size)


def data_of_another_rank(world: World) -> Patch:
    """Rank 1 trains on what rank 0 trains on."""
    return replaced(engine_run, "micro_batches", lambda own: lambda c, seed, step, rank: own(c, seed, step, 0))


def own_tokens_only(world: World) -> Patch:
    """The mean over tokens is taken on each rank, and then the mean over ranks."""
    return replaced(
        World,
        "sum",
        lambda own: (
            lambda self, values, **o: [v * self.size for v in values] if len(values) == 1 else own(self, values, **o)
        ),
    )


def stale_weights(world: World) -> Patch:
    """The third step's weights do not reach the layers."""

    def wrap(own: Any) -> Any:
        def step(self: DeepSpeedEngine) -> Any:
            parameters = list(self.module.parameters())
            seen = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in parameters]
            before = [p.detach().clone() for p in seen]
            result = own(self)
            if self.global_steps == 3 and self.micro_steps % self.gradient_accumulation_steps() == 0:
                for p, old in zip(seen, before, strict=True):
                    p.data.copy_(old)
            return result

        return step

    return replaced(DeepSpeedEngine, "step", wrap)


@contextlib.contextmanager
def clipped_before_unscaling(world: World) -> Iterator[None]:
    """The norm of the still scaled gradient is held against the limit."""

    def first(own: Any) -> Any:
        return lambda self, grads, norm: own(self, grads, norm * self.loss_scale)

    with (
        replaced(DeepSpeedZeroOptimizer, "unscale_and_clip_grads", first),
        replaced(DeepSpeedZeroOptimizer_Stage3, "unscale_and_clip_grads", first),
    ):
        yield


def in_third_step(change: Callable[[torch.optim.AdamW, dict, torch.Tensor, dict], None]) -> Patch:
    """Before AdamW takes its third step, `change` sees each tensor with its group and state."""

    def wrap(own: Any) -> Any:
        def step(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if float(self.state.get(p, {}).get("step", 0)) == 2:
                        change(self, group, p, self.state[p])
            return own(self, *arguments, **options)

        return step

    return replaced(torch.optim.AdamW, "step", wrap)


def decayed_twice(world: World) -> Patch:
    return in_third_step(lambda adam, group, p, state: p.data.mul_(1 - group["lr"] * group["weight_decay"]))


def step_too_far(world: World) -> Patch:
    return in_third_step(lambda adam, group, p, state: state["step"].add_(1))


def masters_in_bf16(world: World) -> Patch:
    """After each update the masters keep 8 bits: what a run in fp32 was on some CPUs (test_known_traps.py, 13)."""

    def wrap(own: Any) -> Any:
        def step(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
            result = own(self, *arguments, **options)
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.copy_(p.data.bfloat16())
            return result

        return step

    return replaced(torch.optim.AdamW, "step", wrap)


def row(stage: int, precision: Any, **more: Any) -> Combination:
    small = {"reduce_bucket_size": 1000} if stage else {}
    if stage == 3:
        small |= {"stage3_param_persistence_threshold": 100, "sub_group_size": 5000}
    of_json = {name: more.pop(name) for name in list(more) if name in DEEPSPEED_SETTINGS}
    fields = {"accumulation": 3, "clipping": True} | more
    return Combination(stage=stage, precision=precision, world_size=WORLD_SIZE, deepspeed=small | of_json, **fields)


def rows(*precisions: str, stages: tuple[int, ...] = (0, 1, 2, 3), **more: Any) -> list[Combination]:
    return [row(stage, precision, **more) for stage in stages for precision in precisions]


EVERYWHERE = rows("fp32", "bf16")
FAULTS: dict[Callable[[World], Patch], list[Combination]] = {
    not_averaged_over_accumulation: EVERYWHERE,
    last_micro_batch_dropped: EVERYWHERE,
    summed_over_ranks: EVERYWHERE,
    averaged_twice_over_ranks: rows("fp32", "bf16", clipping=False),
    data_of_another_rank: EVERYWHERE,
    own_tokens_only: rows("fp32", "bf16", masked=True),
    # in fp32 at stage 0 the weights are their own masters
    stale_weights: [
        *rows("fp32", "bf16", stages=(1, 2, 3), offload_optimizer="cpu"),
        *rows("bf16", stages=(0, 1, 2, 3)),
    ],
    clipped_before_unscaling: rows("fp16", stages=(1, 2, 3)),
    decayed_twice: EVERYWHERE,
    step_too_far: EVERYWHERE,
    masters_in_bf16: rows("fp32", "fp32_compute_bf16", "bf16"),
}
"""Each fault with combinations that it harms, at every stage where it can occur."""


def train_with_faults(world: World, cases: list[tuple[Any, Combination]], seed: int) -> Iterator[RankTrained]:
    for fault, combination in cases:
        with fault(world) if fault else contextlib.nullcontext():
            yield train_on_rank(world, combination, seed)


def train(cases: list[tuple[Any, Combination]]) -> list[Row]:
    references = References("cpu", SEED)
    references.prepare(combination for _, combination in cases)
    rounds = iterate_on_ranks(WORLD_SIZE, train_with_faults, cases, SEED)
    return [compare(c, references[c], ranks) for (_, c), ranks in zip(cases, rounds, strict=True)]


@pytest.fixture(scope="module")
def sound() -> dict[Combination, Row]:
    """The same combinations without any fault."""
    combinations = list(dict.fromkeys(c for affected in FAULTS.values() for c in affected))
    return dict(zip(combinations, train([(None, c) for c in combinations]), strict=True))


# twice the bound: a fault that is caught by luck with one seed would slip through with another
CAUGHT = 2.0


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught_in_every_affected_row(fault, sound):
    for found in train([(fault, c) for c in FAULTS[fault]]):
        assert sound[found.combination].passed, f"{found.combination.name} fails without a fault"
        assert found.ratio > CAUGHT, f"{found.combination.name}: {found}"


@pytest.mark.slow
def test_each_planted_fault_is_caught_at_stage_2():
    """The everyday part: one row for each fault, and the same row without it."""
    cases = [(fault, next(c for c in affected if c.stage == 2)) for fault, affected in FAULTS.items()]
    rows = train([*cases, *dict.fromkeys((None, c) for _, c in cases)])
    assert all(row.passed for row in rows[len(cases) :])
    caught = {fault.__name__: row.ratio > CAUGHT for (fault, _), row in zip(cases, rows, strict=False)}
    assert all(caught.values()), caught
