"""Counts of parameters and FLOPs agree with the built model and with published figures."""

import dataclasses
from math import prod

import pytest
import torch
from pydantic import TypeAdapter

from dsllm.config.model import ModelConfig
from dsllm.config.sizes import SIZES
from dsllm.counts import flops_per_token, largest_parameter, matmul_parameters, parameter_count
from dsllm.model.transformer import Transformer
from tests.helpers.sizes import PUBLISHED

# From the models' papers, cards and Hugging Face checkpoints: facts that do not come from this code.
PUBLISHED_PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama-7b": 6_738_415_616,
    "llama-8b": 8_030_261_248,
    "llama-13b": 13_015_864_320,
    "llama-70b": 68_976_648_192,
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
}


def sized(name: str) -> ModelConfig:
    return TypeAdapter(ModelConfig).validate_python(SIZES[name] | {"vocab_size": PUBLISHED[name][0]})


def built_shapes(config: ModelConfig, context_length: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the built model, by name."""
    with torch.device("meta"):
        model = Transformer(config, context_length)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_named_sizes_have_the_published_number_of_parameters(name: str):
    assert parameter_count(sized(name), PUBLISHED[name][1], padded=False).total == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", SIZES)
def test_the_formula_counts_the_built_model_part_by_part(name: str):
    config = sized(name)
    shapes = built_shapes(config, PUBLISHED[name][1])
    count = parameter_count(config, PUBLISHED[name][1])
    of = {
        part: sum(prod(shape) for parameter, shape in shapes.items() if chosen(parameter))
        for part, chosen in {
            "embedding": lambda p: p == "embed.weight",
            "positions": lambda p: p == "positions.weight",
            "attention": lambda p: ".attention." in p and "norm" not in p,
            "mlp": lambda p: ".mlp." in p,
            "norms": lambda p: "norm" in p,
            "head": lambda p: p == "head.weight",
        }.items()
    }
    assert dataclasses.asdict(count) == of
    assert count.total == sum(map(prod, shapes.values()))
    assert largest_parameter(config, config.vocab_size, PUBLISHED[name][1]) == max(map(prod, shapes.values()))


def test_odd_shapes_are_counted_too():
    config = ModelConfig(
        vocab_size=1000, num_layers=3, hidden_size=48, num_heads=6, num_kv_heads=2, head_size=10, qk_norm=True,
        attention_bias=True, mlp_bias=True, norm="layernorm",
    )  # fmt: skip
    assert parameter_count(config, 32).total == sum(map(prod, built_shapes(config, 32).values()))


def test_flops_of_a_measured_workload():
    # 122.7 and 854.7 MFLOP per token were counted by hand for these shapes.
    config = ModelConfig(**SIZES["llama-20m"] | {"vocab_size": 8192})
    assert flops_per_token(config, 512) / 1e6 == pytest.approx(122.7, abs=0.05)
    gpt2 = ModelConfig(**SIZES["gpt2-124m"] | {"vocab_size": 50304})
    assert flops_per_token(gpt2, 1024) / 1e6 == pytest.approx(854.7, abs=0.5)


def test_matmul_parameters_leave_out_lookups_norms_and_biases_and_keep_a_tied_head():
    config = sized("gpt2-124m")
    matrices = {n: s for n, s in built_shapes(config, 1024).items() if len(s) == 2 and n != "positions.weight"}
    assert matmul_parameters(config) == sum(map(prod, matrices.values()))


def test_the_largest_parameter_is_found_before_the_vocabulary_is_known():
    config = ModelConfig(num_layers=2, hidden_size=64, num_heads=4, mlp_size=500, positions="learned")
    assert largest_parameter(config, vocab_size=300, context_length=16) == 500 * 64
    assert largest_parameter(config, vocab_size=520, context_length=16) == 640 * 64  # padded
    assert largest_parameter(config, vocab_size=300, context_length=1000) == 1000 * 64
