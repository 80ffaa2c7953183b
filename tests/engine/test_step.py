"""The engine's optimizer step where something is not as usual; tests/parity compares whole runs with plain PyTorch."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from dsllm.batches import MicroBatch, Origin
from dsllm.config.run import RunConfig
from dsllm.config.train import LossScaleConfig
from dsllm.engine.optimizers import set_learning_rate
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import owned_slices
from dsllm.engine.step import StepResult, accumulate_gradients, counted, take_step, update
from dsllm.errors import DataError
from dsllm.model.initial import fill_initial
from dsllm.model.transformer import Transformer
from dsllm.objectives import Measured, ModelOutput, TokenLoss
from tests.helpers.engines import engine_of, whole_weights
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import (
    GLOBAL_BATCH,
    MODEL,
    SEQUENCE_LENGTH,
    TABLE,
    micro_batches,
    tiny_engine,
    tiny_run,
    tiny_step,
)

STAGES = (0, 1, 2, 3)
FP16_STAGES = (1, 2, 3)  # stage 0 is refused

# fp32 sums of n terms in another order differ by about sqrt(n) rounding errors of 2^-24; a gradient norm sums 10^5 squares,
# each a sum over tokens of its own.
NORM_TOLERANCE = 3e-5
# bf16 keeps 8 bits: two roundings of 2^-9, of activation and weight, which are common to the rows of a gradient
BF16_NORM_TOLERANCE = 4e-3


def learning_rate(step: int) -> float:
    return 1e-3 * min(1.0, (step + 1) / 5)


def fp16_loops(world: World, config: RunConfig, num_steps: int) -> dict[int, list[tuple[float, float, bool, float]]]:
    """Rows by stage, on a CPU that computes in fp16."""
    rows: dict[int, list[tuple[float, float, bool, float]]] = {}
    for stage in FP16_STAGES:
        engine = tiny_engine(world, config, stage, device="cuda")  # as far as the config's checks are concerned
        rows[stage] = []
        for step in range(num_steps):
            set_learning_rate(engine.optimizer, learning_rate(step))
            result = tiny_step(engine, config, step)
            rows[stage].append((result.loss, result.gradient_norm, result.applied, result.loss_scale))
    return rows


@pytest.mark.slow
def test_fp16_scale_falls_on_overflow_and_all_ranks_agree():
    """2^24 overflows in fp16 (largest number 65504): steps are skipped, halving the scale, until the gradients fit."""
    scale = LossScaleConfig(initial_power=24, hysteresis=1, window_steps=1000)
    first, second = run_ranks(2, fp16_loops, tiny_run(precision="fp16", loss_scale=scale), 14)
    for stage in FP16_STAGES:
        assert [row[2:] for row in first[stage]] == [row[2:] for row in second[stage]]
        skipped = [row for row in first[stage] if not row[2]]
        assert skipped and not any(math.isfinite(row[1]) for row in skipped)
        assert [row[3] for row in first[stage][: len(skipped)]] == [2.0 ** (24 - i) for i in range(len(skipped))]
        assert first[stage][-1][2] and first[stage][-1][0] < first[stage][0][0]


def counting(batch: MicroBatch, weights: torch.Tensor) -> MicroBatch:
    return MicroBatch(inputs=batch.inputs, targets=batch.targets, weights=weights)


def poisoned_steps(world: World) -> dict[tuple[str, int], tuple[bool, float, bool, bool]]:
    """A step in which one rank's loss is not a number: (applied, norm, state untouched, next step good)."""
    return {(p, s): poisoned_step(world, tiny_run(precision=p), s) for p in ("fp32", "bf16") for s in STAGES}


def poisoned_step(world: World, config: RunConfig, stage: int) -> tuple[bool, float, bool, bool]:
    engine = tiny_engine(world, config, stage)
    tiny_step(engine, config, 0)
    before = [t.clone() for piece in owned_slices(engine) for t in piece.tensors.values()]
    batches = micro_batches(config, 1, world.data_rank, world.data_size)
    weights = torch.ones(2, SEQUENCE_LENGTH)
    if world.rank == world.size - 1:
        weights[0, 3] = math.nan
    result = take_step(engine, [counting(batches[0], weights), *batches[1:]], TokenLoss(weighted=True), seed=1)
    after = [t for piece in owned_slices(engine) for t in piece.tensors.values()]
    untouched = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    good = tiny_step(engine, config, 2).applied
    return result.applied, result.gradient_norm, untouched, good


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_changes_nothing():
    for of_rank in run_ranks(2, poisoned_steps):
        for case, (applied, norm, untouched, good) in of_rank.items():
            assert not applied and not math.isfinite(norm) and untouched and good, case


def weighted_steps(world: World, weights: torch.Tensor) -> list[tuple[float, float]]:
    """One step in which only some tokens count, and not equally many on each rank; (loss, norm) by stage."""
    config, found = tiny_run(), []
    for stage in STAGES:
        engine = tiny_engine(world, config, stage)
        plain = micro_batches(config, 0, world.data_rank, world.data_size)
        own = weights[world.rank :: world.size].split(config.train.micro_batch_sequences)
        result = take_step(
            engine, [counting(b, w) for b, w in zip(plain, own, strict=True)], TokenLoss(weighted=True), seed=0
        )
        found.append((result.loss, result.gradient_norm))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tokens_of_rank_0", [4, 0])
def test_masked_tokens_are_normalised_over_the_global_batch(tokens_of_rank_0):
    """The first of two ranks has far fewer counted targets than the second, or none at all."""
    weights = (torch.rand(8, SEQUENCE_LENGTH, generator=torch.Generator().manual_seed(3)) < 0.3).float()
    weights[::2] *= (torch.arange(SEQUENCE_LENGTH) < tokens_of_rank_0).float()
    model = Transformer(MODEL, SEQUENCE_LENGTH, torch.float32)
    fill_initial(model, TABLE, tiny_run().run.seed)
    (batch,) = micro_batches(tiny_run(micro_batch_sequences=8), 0, 0, 1)
    losses = torch.nn.functional.cross_entropy(model(batch.inputs).transpose(1, 2), batch.targets, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf))
    for world_size in (1, 2):
        for got in run_ranks(world_size, weighted_steps, weights)[0]:
            assert got == pytest.approx((loss.item(), norm), rel=NORM_TOLERANCE)


def nothing_counts(world: World, stage: int) -> tuple[str, bool, bool]:
    """A step whose weights are all 0: what is said, whether the state is untouched, whether the next step is good."""
    config = tiny_run()
    engine = tiny_engine(world, config, stage)
    tiny_step(engine, config, 0)
    before = whole_weights(engine)
    plain = micro_batches(config, 1, world.data_rank, world.data_size)
    batches = [counting(batch, torch.zeros(2, SEQUENCE_LENGTH)) for batch in plain]
    batches[0] = dataclasses.replace(batches[0], origin=Origin(first_sample=8, last_sample=9, sources=("golden",)))
    with pytest.raises(DataError) as caught:
        take_step(engine, batches, TokenLoss(weighted=True), seed=1)
    untouched = all(torch.equal(now, before[name]) for name, now in whole_weights(engine).items())
    return str(caught.value), untouched, tiny_step(engine, config, 1).applied


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_in_which_nothing_counts_is_an_error_in_words_on_all_ranks(stage):
    for text, untouched, good in run_ranks(2, nothing_counts, stage):
        assert "no target of this step counts: every weight of the global batch is 0" in text
        assert "(samples 8 to 9 of the run, from golden, and what the other ranks read)" in text
        assert untouched and good


def halves(world: World, stage: int, precision: str) -> bool:
    """Whether the two halves, called one after the other, end where `take_step` ends, bit for bit."""
    config = tiny_run(precision=precision)
    whole, halved = tiny_engine(world, config, stage), tiny_engine(world, config, stage)
    for step in range(2):
        result = tiny_step(whole, config, step)
        batches, objective = micro_batches(config, step, world.data_rank, world.data_size), TokenLoss()
        count = counted(halved, batches, objective)
        sums = accumulate_gradients(halved, batches, objective, step, count)
        outcome = update(halved)
        assert count == GLOBAL_BATCH * SEQUENCE_LENGTH
        assert (outcome.gradient_norm, outcome.applied) == (result.gradient_norm, result.applied)
        assert world.sum([float(sums.loss)])[0] / count == result.loss
        assert sums.tokens * world.data_size == result.tokens == count
    seen = whole_weights(whole)
    return all(torch.equal(weights, seen[name]) for name, weights in whole_weights(halved).items())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_its_two_halves(stage, precision):
    assert run_ranks(2, halves, stage, precision) == [True, True]


class Balanced(Transformer):
    """A model with an auxiliary loss: the squares of the embedded tokens."""

    def forward(self, *arguments: Any, **options: Any) -> ModelOutput:
        output = super().forward(*arguments, **options)
        return ModelOutput(output.losses, {"balance": self.embed(arguments[0]).float().square().sum()})


@dataclasses.dataclass(frozen=True)
class WithBalance:
    """The token losses and a share of the auxiliary loss; reports both, and a sum of squares."""

    counts_every_target: bool = True

    def count(self, batch: MicroBatch) -> float:
        return float(batch.targets.numel())

    def __call__(self, output: ModelOutput, batch: MicroBatch) -> Measured:
        tokens, balance = output.losses.sum(), output.auxiliary["balance"]
        measures = {"tokens": tokens, "balance": balance, "squares": output.losses.square().sum()}
        return Measured(loss_sum=tokens + 0.5 * balance, measures=measures)


def balanced() -> Balanced:
    return Balanced(MODEL, SEQUENCE_LENGTH, torch.float32)


def balanced_step(world: World, stage: int) -> StepResult:
    engine = engine_of(world, config := tiny_run(), stage, make_model=balanced)
    batches = micro_batches(config, 0, world.data_rank, world.data_size)
    return take_step(engine, batches, WithBalance(), seed=0, also_sum=(world.rank + 1, 0.25))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_measures_and_auxiliary_losses_are_those_of_the_global_batch(stage, world_size):
    model = balanced()
    fill_initial(model, TABLE, tiny_run().run.seed)
    (batch,) = micro_batches(tiny_run(micro_batch_sequences=8), 0, 0, 1)
    measured, count = WithBalance()(model(batch.inputs, batch.targets), batch), batch.targets.numel()
    (measured.loss_sum / count).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf))
    results = run_ranks(world_size, balanced_step, stage)
    assert all(result == results[0] for result in results)
    found = results[0]
    assert found.gradient_norm == pytest.approx(norm, rel=NORM_TOLERANCE)
    assert found.loss == pytest.approx(measured.loss_sum.item() / count, rel=NORM_TOLERANCE)
    expected = {name: value.item() / count for name, value in measured.measures.items()}
    assert found.measures == pytest.approx(expected, rel=NORM_TOLERANCE)
    assert found.sums == (sum(range(1, world_size + 1)), 0.25 * world_size)
