"""The engine's optimizer step against a plain single-process PyTorch loop on the same samples."""

import math

import pytest
import torch

from dsllm.config.run import RunConfig
from dsllm.engine.build import compute_dtype
from dsllm.engine.process_group import World
from dsllm.engine.state import owned_slices
from dsllm.engine.step import set_learning_rate, take_step
from dsllm.model.initial import decay_groups, fill_initial
from dsllm.model.transformer import Transformer
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import MODEL, SEQUENCE_LENGTH, micro_batches, tiny_engine, tiny_run

NUM_STEPS = 20

# fp32 sums of n terms in another order differ by about sqrt(n) rounding errors of 2^-24. A loss here is a mean over 128
# tokens, each the end of a few thousand additions: sqrt(128 x 4000) x 2^-24 = 4e-5 if every rounding were independent and
# of full size; the mean over tokens divides that by sqrt(128), which leaves 4e-6. Twenty Adam steps carry it along, so
# 1e-5 for losses. A gradient norm sums 10^5 squares: the same bound on its square, half of it on the root, but each of
# its terms is a sum over tokens of its own, without that averaging: 3e-5.
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 3e-5


def learning_rate(step: int) -> float:
    return 1e-3 * min(1.0, (step + 1) / 5)


def plain_loop(config: RunConfig, num_steps: int = NUM_STEPS) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the same run in plain PyTorch: one process, one big batch."""
    torch.manual_seed(0)
    model = Transformer(MODEL, SEQUENCE_LENGTH, torch.float32)
    fill_initial(model, MODEL, config.run.seed)
    parameters = dict(model.named_parameters())
    decayed, free = decay_groups(model)
    optimizer = torch.optim.AdamW(
        [{"params": [parameters[n] for n in decayed], "weight_decay": 0.1}, {"params": [parameters[n] for n in free], "weight_decay": 0}],
        betas=(0.9, 0.95),
    )
    losses, norms = [], []
    for step in range(num_steps):
        (batch,) = micro_batches(tiny_run(micro_batch_sequences=8), step, 0, 1)
        logits = model(batch.inputs)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.gradient_clipping or math.inf)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def engine_loop(world: World, config: RunConfig, stage: int, num_steps: int = NUM_STEPS) -> tuple[list[float], list[float]]:
    engine = tiny_engine(world, config, stage)
    losses, norms = [], []
    for step in range(num_steps):
        set_learning_rate(engine, learning_rate(step))
        result = take_step(engine, micro_batches(config, step, world.rank, world.size), seed=step)
        assert result.applied and result.tokens == 8 * SEQUENCE_LENGTH
        losses.append(result.loss)
        norms.append(result.gradient_norm)
    return losses, norms


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], list[float]]:
    return plain_loop(tiny_run())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_equals_plain_pytorch(plain, stage, world_size):
    losses, norms = plain
    assert min(norms) > 1.0 and losses[-1] < losses[0] - 0.3  # clipping bites, and the model learns
    for got_losses, got_norms in run_ranks(world_size, engine_loop, tiny_run(), stage):
        assert got_losses == pytest.approx(losses, rel=LOSS_TOLERANCE)
        assert got_norms == pytest.approx(norms, rel=NORM_TOLERANCE)
