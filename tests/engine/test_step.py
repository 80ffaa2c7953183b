"""The engine's optimizer step against a plain single-process PyTorch loop on the same samples."""

import math

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from dsllm.config.run import RunConfig
from dsllm.config.train import LossScaleConfig
from dsllm.engine.process_group import World
from dsllm.engine.state import owned_slices
from dsllm.engine.step import set_learning_rate, take_step
from dsllm.model.initial import decay_groups, fill_initial
from dsllm.model.transformer import Transformer
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import MODEL, SEQUENCE_LENGTH, Batch, micro_batches, tiny_engine, tiny_run

NUM_STEPS = 20
STAGES = (0, 1, 2, 3)
FP16_STAGES = (1, 2, 3)  # stage 0 is refused
PRECISIONS = ("fp32", "bf16", "fp32_compute_bf16")
Curve = tuple[list[float], list[float]]
"""Losses and gradient norms, step by step."""

# fp32 sums of n terms in another order differ by about sqrt(n) rounding errors of 2^-24. A loss here is a mean over 128
# tokens, each the end of a few thousand additions: sqrt(128 x 4000) x 2^-24 = 4e-5 if every rounding were independent and
# of full size; the mean over tokens divides that by sqrt(128), which leaves 4e-6. Twenty Adam steps carry it along, so
# 1e-5 for losses. A gradient norm sums 10^5 squares: the same bound on its square, half of it on the root, but each of
# its terms is a sum over tokens of its own, without that averaging: 3e-5.
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 3e-5


def learning_rate(step: int) -> float:
    return 1e-3 * min(1.0, (step + 1) / 5)


def plain_loop(config: RunConfig, num_steps: int = NUM_STEPS) -> Curve:
    """Losses and gradient norms of the same run in plain PyTorch: one process, one big batch."""
    torch.manual_seed(0)
    model = Transformer(MODEL, SEQUENCE_LENGTH, torch.float32)
    fill_initial(model, MODEL, config.run.seed)
    parameters = dict(model.named_parameters())
    decayed, free = decay_groups(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[n] for n in decayed], "weight_decay": 0.1},
            {"params": [parameters[n] for n in free], "weight_decay": 0},
        ],
        betas=(0.9, 0.95),
    )
    losses, norms = [], []
    for step in range(num_steps):
        (batch,) = micro_batches(tiny_run(micro_batch_sequences=8), step, 0, 1)
        logits = model(batch.inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.gradient_clipping or math.inf))
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


# bf16 keeps 8 bits: a rounding error is 2^-9 = 2e-3. The loss averages 128 independent tokens, which leaves 2e-4, doubled
# for the drift of weights that are rounded at each of the three layers; a gradient's rounding is common to its rows and
# does not average out: two roundings (activation and weight), 4e-3.
BF16_LOSS_TOLERANCE = 4e-4
BF16_NORM_TOLERANCE = 4e-3


def engine_loop(world: World, config: RunConfig, stage: int, num_steps: int = NUM_STEPS) -> Curve:
    engine = tiny_engine(world, config, stage)
    losses, norms = [], []
    for step in range(num_steps):
        set_learning_rate(engine, learning_rate(step))
        result = take_step(engine, micro_batches(config, step, world.rank, world.size), seed=step)
        assert result.applied and result.tokens == 8 * SEQUENCE_LENGTH
        losses.append(result.loss)
        norms.append(result.gradient_norm)
    return losses, norms


def engine_loops(world: World, precisions: tuple[str, ...], stages: tuple[int, ...]) -> dict[tuple[str, int], Curve]:
    """Losses and norms of this rank by precision and stage, one engine after the other."""
    return {(p, s): engine_loop(world, tiny_run(precision=p), s) for p in precisions for s in stages}


@pytest.fixture(scope="module")
def plain() -> Curve:
    return plain_loop(tiny_run())


@pytest.fixture(scope="module")
def curves() -> dict[int, list[dict[tuple[str, int], Curve]]]:
    """Every curve of the engine: by world size, then rank, then precision and stage."""
    return {size: run_ranks(size, engine_loops, PRECISIONS, STAGES) for size in (1, 2)}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_fp32_equals_plain_pytorch(plain, curves, stage, world_size):
    losses, norms = plain
    assert min(norms) > 1.0 and losses[-1] < losses[0] - 0.3  # clipping bites, and the model learns
    for of_rank in curves[world_size]:
        got_losses, got_norms = of_rank["fp32", stage]
        assert got_losses == pytest.approx(losses, rel=LOSS_TOLERANCE)
        assert got_norms == pytest.approx(norms, rel=NORM_TOLERANCE)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_bf16_differs_by_its_rounding_only(plain, curves, precision, stage, world_size):
    losses, norms = plain
    for of_rank in curves[world_size]:
        got_losses, got_norms = of_rank[precision, stage]
        assert got_losses == pytest.approx(losses, rel=BF16_LOSS_TOLERANCE)
        assert got_norms == pytest.approx(norms, rel=BF16_NORM_TOLERANCE)


def fp16_loops(world: World, config: RunConfig, num_steps: int) -> dict[int, list[tuple[float, float, bool, float]]]:
    """The CPU computes in fp16 well enough to test with; DeepSpeed must only be told so. Rows by stage."""
    accelerator = type(get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.float16]
    rows: dict[int, list[tuple[float, float, bool, float]]] = {}
    for stage in FP16_STAGES:
        engine = tiny_engine(world, config, stage, device="cuda")  # as far as the config's checks are concerned
        rows[stage] = []
        for step in range(num_steps):
            set_learning_rate(engine, learning_rate(step))
            result = take_step(engine, micro_batches(config, step, world.rank, world.size), seed=step)
            rows[stage].append((result.loss, result.gradient_norm, result.applied, result.loss_scale))
    return rows


@pytest.mark.parametrize("world_size", [1, 2])
def test_fp16_with_a_static_scale(plain, world_size):
    """fp16 keeps 11 bits, 8 times bf16's accuracy, and its gradients are scaled back by exactly the loss scale."""
    losses, norms = plain
    config = tiny_run(precision="fp16", loss_scale=LossScaleConfig(static=1024))
    for rows in run_ranks(world_size, fp16_loops, config, 10)[0].values():
        assert [row[0] for row in rows] == pytest.approx(losses[:10], rel=BF16_LOSS_TOLERANCE / 8)
        assert [row[1] for row in rows] == pytest.approx(norms[:10], rel=BF16_NORM_TOLERANCE / 8)
        assert all(row[2:] == (True, 1024) for row in rows)


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


def counting(batch: Batch, weights: torch.Tensor) -> Batch:
    return Batch(batch.inputs, batch.targets, weights)


def poisoned_steps(world: World) -> dict[tuple[str, int], tuple[bool, float, bool, bool]]:
    """A step in which one rank's loss is not a number: (applied, norm, state untouched, next step good)."""
    return {(p, s): poisoned_step(world, tiny_run(precision=p), s) for p in ("fp32", "bf16") for s in STAGES}


def poisoned_step(world: World, config: RunConfig, stage: int) -> tuple[bool, float, bool, bool]:
    engine = tiny_engine(world, config, stage)
    take_step(engine, micro_batches(config, 0, world.rank, world.size), seed=0)
    before = [t.clone() for piece in owned_slices(engine) for t in piece.tensors.values()]
    batches = micro_batches(config, 1, world.rank, world.size)
    weights = torch.ones(2, SEQUENCE_LENGTH)
    if world.rank == world.size - 1:
        weights[0, 3] = math.nan
    result = take_step(engine, [counting(batches[0], weights), *batches[1:]], seed=1)
    after = [t for piece in owned_slices(engine) for t in piece.tensors.values()]
    untouched = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    good = take_step(engine, micro_batches(config, 2, world.rank, world.size), seed=2).applied
    return result.applied, result.gradient_norm, untouched, good


def test_a_gradient_that_is_not_finite_changes_nothing():
    for of_rank in run_ranks(2, poisoned_steps):
        for case, (applied, norm, untouched, good) in of_rank.items():
            assert not applied and not math.isfinite(norm) and untouched and good, case


def weighted_steps(world: World, weights: torch.Tensor) -> list[tuple[float, float]]:
    """One step in which only some tokens count, and not equally many on each rank; (loss, norm) by stage."""
    config, found = tiny_run(), []
    for stage in STAGES:
        engine = tiny_engine(world, config, stage)
        plain = micro_batches(config, 0, world.rank, world.size)
        own = weights[world.rank :: world.size].split(config.train.micro_batch_sequences)
        result = take_step(engine, [counting(b, w) for b, w in zip(plain, own, strict=True)], seed=0)
        found.append((result.loss, result.gradient_norm))
    return found


def test_masked_tokens_are_normalised_over_the_global_batch():
    weights = (torch.rand(8, SEQUENCE_LENGTH, generator=torch.Generator().manual_seed(3)) < 0.3).float()
    weights[::2] *= (torch.arange(SEQUENCE_LENGTH) < 4).float()  # the first of two ranks has far fewer
    model = Transformer(MODEL, SEQUENCE_LENGTH, torch.float32)
    fill_initial(model, MODEL, tiny_run().run.seed)
    (batch,) = micro_batches(tiny_run(micro_batch_sequences=8), 0, 0, 1)
    losses = torch.nn.functional.cross_entropy(model(batch.inputs).transpose(1, 2), batch.targets, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf))
    for world_size in (1, 2):
        for got in run_ranks(world_size, weighted_steps, weights)[0]:
            assert got == pytest.approx((loss.item(), norm), rel=NORM_TOLERANCE)
