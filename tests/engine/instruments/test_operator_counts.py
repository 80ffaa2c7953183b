"""What a step is counted to do equals what the formulas of dsllm/counts say."""

import dataclasses

import pytest
import torch

from dsllm import counts
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig
from dsllm.engine.instruments.operator_counts import Counting
from dsllm.engine.processes.process_group import World
from dsllm.model.block_causal import BLOCK_TOKENS
from dsllm.model.initial import fill_initial
from dsllm.model.transformer import Transformer
from dsllm.parameters import parameter_table
from tests.helpers.models import LLAMA, SHAPES
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import MODEL, SEQUENCE_LENGTH, tiny_engine, tiny_run, tiny_step

STAGES = (0, 1, 2, 3)
PERSISTENT = 200  # elements; the tiny engine's threshold
WIDTHS = {"fp32": (4, 4), "fp32_compute_bf16": (4, 4), "bf16": (4, 2)}
"""Bytes of a gradient on its way, and of a weight, by precision; at stage 0 bf16 gradients travel as they are."""


def count_pass(config: ModelConfig, tokens: int, compute_dtype: torch.dtype) -> Counting:
    """Count forward and backward of two sequences."""
    model = Transformer(config, tokens, compute_dtype)
    fill_initial(model, parameter_table(config, tokens), 0)
    ids = torch.zeros(2, tokens, dtype=torch.long)
    with Counting() as counting:
        model(ids, ids).losses.sum().backward()
    return counting


@pytest.mark.parametrize("shape", SHAPES)
def test_products_with_parameters_are_exactly_six_flops_per_parameter_and_token(shape):
    config = SHAPES[shape]
    assert count_pass(config, 64, torch.float32).parameter_flops == 6 * counts.matmul_parameters(config) * 2 * 64


def test_attention_against_the_formula():
    """The formula counts full attention: 2 products forward, 4 backward, each of T x T. Torch's fused kernel computes the
    scores again in the backward pass, 7 in all; torch's count of it does not take the mask off. The block-causal kernel
    keeps them, and computes blocks of queries over their causal prefixes: (1 + blocks) / (2 blocks) of 6."""
    config = dataclasses.replace(LLAMA, num_layers=2)
    tokens = 4 * BLOCK_TOKENS
    formula = 12 * config.num_layers * config.num_heads * config.head_width * tokens * 2 * tokens
    for dtype, share in ((torch.float32, 7 / 6), (torch.bfloat16, (1 + 4) / (2 * 4))):
        assert count_pass(config, tokens, dtype).attention_flops == pytest.approx(share * formula, rel=1e-12)


def counted_steps(world: World, micro: int, precisions: tuple[str, ...]) -> dict[tuple[str, int], dict[str, int]]:
    return {
        (p, s): counted_step(world, tiny_run(precision=p, micro_batch_sequences=micro), s)
        for p in precisions
        for s in STAGES
    }


def counted_step(world: World, config: RunConfig, stage: int) -> dict[str, int]:
    """Bytes by kind of collective in a step."""
    engine = tiny_engine(world, config, stage)
    for step in range(2):  # ZeRO-3 learns its order of modules in the first
        with Counting() as counting:
            tiny_step(engine, config, step)
    return dict(counting.communication_bytes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "micro", "precisions"),
    [(2, 2, ("fp32", "bf16")), (2, 4, tuple(WIDTHS)), (4, 1, tuple(WIDTHS))],
)
def test_communication_is_what_the_formula_says(world_size, micro, precisions):
    sizes = [row.num_elements for row in parameter_table(MODEL, SEQUENCE_LENGTH)]
    for of_rank in run_ranks(world_size, counted_steps, micro, precisions):
        for (precision, stage), measured in of_rank.items():
            gradient, weight = WIDTHS[precision]
            formula = counts.communication_bytes(
                sum(sizes),
                stage,
                accumulation=8 // (world_size * micro),
                gradient_width=gradient if stage else weight,
                weight_width=weight,
                gathered_per_micro_batch=sum(size for size in sizes if size > PERSISTENT),
            )
            # on CPUs, stages 1 and 2 gather the weights by broadcasts of their owners
            measured["gather"] = measured.pop("all_gather", 0) + measured.pop("broadcast", 0)
            for kind, expected in dataclasses.asdict(formula).items():
                # and also: norms, flags and the loss, 8 bytes each; and parts are padded to equal lengths over the ranks
                assert measured.pop(kind, 0) == pytest.approx(expected, rel=0.02, abs=200), (precision, stage, kind)
            # the rest is what DeepSpeed sends the ranks about itself
            assert sum(measured.values()) <= 0.02 * formula.handed, (precision, stage, measured)


def regathering_step(world: World) -> dict[str, int]:
    engine = tiny_engine(world, config := tiny_run(), 3, stage3_max_live_parameters=0, stage3_max_reuse_distance=0)
    for step in range(3):
        with Counting() as counting:
            tiny_step(engine, config, step)
    return dict(counting.communication_bytes)


@pytest.mark.slow
def test_zero_3_gathers_twice_what_it_may_not_keep():
    sizes = [row.num_elements for row in parameter_table(MODEL, SEQUENCE_LENGTH)]
    twice = 2 * sum(size for size in sizes if size > PERSISTENT)
    formula = counts.communication_bytes(sum(sizes), 3, 2, 4, 4, twice)
    assert run_ranks(2, regathering_step)[0]["all_gather"] == pytest.approx(formula.gather, rel=0.02)
