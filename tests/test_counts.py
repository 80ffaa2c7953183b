"""Counts by formula agree with the built model, with published figures and with DeepSpeed's measured memory."""

import dataclasses

import pytest
from pydantic import TypeAdapter

from dsllm.config.model import ModelConfig
from dsllm.config.sizes import SIZES
from dsllm.config.train import TrainConfig
from dsllm.counts import (
    Communication,
    activation_bytes,
    communication_bytes,
    flops_per_token,
    matmul_parameters,
    model_state_bytes,
    parameter_count,
    parameter_sizes,
)
from dsllm.model.transformer import parameter_shapes
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


def elements(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_named_sizes_have_the_published_number_of_parameters(name: str):
    assert parameter_count(sized(name), PUBLISHED[name][1], padded=False).total == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", SIZES)
def test_the_formula_counts_the_built_model_part_by_part(name: str):
    config = sized(name)
    shapes = parameter_shapes(config, PUBLISHED[name][1])
    count = parameter_count(config, PUBLISHED[name][1])
    of = {
        part: sum(elements(shape) for parameter, shape in shapes.items() if chosen(parameter))
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
    assert count.total == sum(map(elements, shapes.values()))


def test_odd_shapes_are_counted_too():
    config = ModelConfig(
        vocab_size=1000, num_layers=3, hidden_size=48, num_heads=6, num_kv_heads=2, head_size=10, qk_norm=True,
        attention_bias=True, mlp_bias=True, norm="layernorm",
    )  # fmt: skip
    assert parameter_count(config, 32).total == sum(map(elements, parameter_shapes(config, 32).values()))


def test_flops_of_a_measured_workload():
    # 122.7 and 854.7 MFLOP per token were counted for these shapes by hand, beside measured throughputs.
    config = ModelConfig(**SIZES["llama-20m"] | {"vocab_size": 8192})
    assert flops_per_token(config, 512) / 1e6 == pytest.approx(122.7, abs=0.05)
    gpt2 = ModelConfig(**SIZES["gpt2-124m"] | {"vocab_size": 50304})
    assert flops_per_token(gpt2, 1024) / 1e6 == pytest.approx(854.7, abs=0.5)


def test_matmul_parameters_leave_out_lookups_norms_and_biases_and_keep_a_tied_head():
    config = sized("gpt2-124m")
    matrices = {n: s for n, s in parameter_shapes(config, 1024).items() if len(s) == 2 and n != "positions.weight"}
    assert matmul_parameters(config) == sum(map(elements, matrices.values()))


@pytest.mark.parametrize(
    ("stage", "precision", "fp32_gradients", "bytes_per_parameter"),
    [
        (0, "fp32", True, 16),
        # fp32 in DeepSpeed itself: 12, 12 and 10, as it keeps the weights twice; one_copy.py mends that
        (1, "fp32", True, 10),
        (2, "fp32", True, 10),
        (3, "fp32", True, 8),
        (1, "bf16", True, 14),
        (2, "bf16", True, 10),
        (1, "bf16", False, 9),
        (3, "bf16", False, 8),
        (0, "fp16", False, 16),
    ],
)
def test_model_states_as_measured_on_two_ranks(stage, precision, fp32_gradients, bytes_per_parameter):
    # Distinct tensor storages of DeepSpeed 0.19.8 after a backward pass, in bytes per parameter, buckets left out.
    assert model_state_bytes(1000, stage, precision, 2, fp32_gradients) == 1000 * bytes_per_parameter


def test_the_estimate_of_activations_grows_with_the_tokens_but_not_with_logits_that_come_in_chunks():
    config = sized("llama-125m")
    one, two, four = (activation_bytes(config, 512, TrainConfig(micro_batch_sequences=n), "bf16") for n in (1, 2, 4))
    assert two == 2 * one and four < 2 * two


@pytest.mark.parametrize("name", SIZES)
def test_parameter_sizes_are_those_of_the_built_model(name: str):
    shapes = parameter_shapes(sized(name), PUBLISHED[name][1])
    assert sorted(parameter_sizes(sized(name), PUBLISHED[name][1])) == sorted(map(elements, shapes.values()))


def test_parameter_sizes_of_odd_shapes():
    config = ModelConfig(
        vocab_size=1000, num_layers=3, hidden_size=48, num_heads=6, num_kv_heads=2, head_size=10, qk_norm=True,
        attention_bias=True, attention_output_bias=True, mlp_bias=True, norm="layernorm", positions="learned",
    )  # fmt: skip
    assert sorted(parameter_sizes(config, 32)) == sorted(map(elements, parameter_shapes(config, 32).values()))


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [
        (0, Communication(all_reduce=4000)),
        (1, Communication(all_reduce=4000, all_gather=2000)),
        (2, Communication(all_reduce=12_000, all_gather=2000)),
        (3, Communication(reduce_scatter=12_000, all_gather=3 * 2 * 900 + 2 * 100)),
    ],
)
def test_communication_of_a_step_with_three_micro_batches(stage: int, wanted: Communication):
    # 1000 parameters, fp32 gradients, 16-bit weights; ZeRO-3 keeps 100 of them whole, and gathers those once a step
    assert communication_bytes(1000, stage, 3, 4, 2, gathered_per_micro_batch=900 if stage == 3 else None) == wanted


def test_a_ring_sends_an_all_reduce_twice_and_nothing_on_one_rank():
    communication = Communication(all_reduce=1000, reduce_scatter=400, all_gather=200)
    assert communication.handed == 1600
    assert [communication.on_wire(size) for size in (1, 2, 4)] == [0, 1300, 1950]
