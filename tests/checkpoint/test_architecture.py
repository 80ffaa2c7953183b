"""Two models count as the same only if the same weights compute the same in both."""

import dataclasses

import pytest
import torch

from dsllm.checkpoint.architecture import ALWAYS, NOT_COMPARED, ROTARY, differences_in_function
from dsllm.config.model import ModelConfig
from tests.helpers.models import GPT2, LLAMA, SCALING, random_model, tokens_for


def test_every_field_is_compared_or_has_a_reason_not_to_be():
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    assert sorted([*ALWAYS, *ROTARY, *NOT_COMPARED]) == sorted(fields)


def test_a_model_does_not_differ_from_itself_or_from_how_it_is_written():
    written_out = dataclasses.replace(
        LLAMA,
        num_kv_heads=2,
        head_size=8,
        size="llama-7b",
        context_length=99,
        dropout=0.1,
        initial_std=1.0,
        init_from="x",
    )
    assert differences_in_function(LLAMA, LLAMA) == differences_in_function(LLAMA, written_out) == []
    # a rotary base means nothing where positions are learned
    assert differences_in_function(GPT2, dataclasses.replace(GPT2, rope_theta=5.0, rope_fraction=0.5)) == []


SAME_SHAPES = [
    (LLAMA, {"rope_theta": 500.0}, "model.rope_theta: 10000.0 there, 500.0 here"),
    (LLAMA, {"rope_fraction": 0.5}, "model.rope_fraction: 1.0 there, 0.5 here"),
    (LLAMA, {"rope_scaling": SCALING}, "model.rope_scaling: None there, RopeScaling("),
    (LLAMA, {"norm_epsilon": 1.0}, "model.norm_epsilon: 1e-05 there, 1.0 here"),
    (LLAMA, {"parallel_residual": True}, "model.parallel_residual: False there, True here"),
    (LLAMA, {"vocab_size": 150}, "model.vocab_size: 200 there, 150 here"),
    (LLAMA, {"num_heads": 12, "head_size": 4, "num_kv_heads": 4}, "model.num_heads: 6 there, 12 here"),
    (GPT2, {"mlp": "gelu"}, "model.mlp: 'gelu_tanh' there, 'gelu' here"),
]


@pytest.mark.parametrize(("config", "change", "named"), SAME_SHAPES, ids=[next(iter(case[1])) for case in SAME_SHAPES])
@torch.no_grad()
def test_what_has_the_same_shapes_but_computes_something_else_is_named(config: ModelConfig, change: dict, named: str):
    """The loss really differs: on the same weights and tokens, the two models are not the same function."""
    other = dataclasses.replace(config, **change)
    one, two = random_model(config).eval(), random_model(other).eval()
    two.load_state_dict(one.state_dict())  # the shapes are equal
    tokens = tokens_for(other)
    assert not torch.equal(one(tokens), two(tokens))
    assert any(line.startswith(named) for line in differences_in_function(config, other))


@pytest.mark.parametrize(
    "change", [{"attention_bias": True}, {"qk_norm": True}, {"tie_embeddings": True}, {"mlp_size": 64}]
)
def test_other_parameters_are_named_by_field(change: dict):
    (name,) = change
    (line,) = differences_in_function(LLAMA, dataclasses.replace(LLAMA, **change))
    assert line.startswith(f"model.{name}: ")
