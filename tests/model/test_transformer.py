"""The whole model: losses and logits agree, the past decides, and neither caches nor other documents change it."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from dsllm.config.model import ModelConfig
from dsllm.model.transformer import KeyValueCache, Transformer, parameter_shapes
from tests.helpers.models import CONTEXT, GPT2, LLAMA, NEOX, SHAPES, random_model, tokens_for

ALL = SHAPES | {"qk-norm": dataclasses.replace(LLAMA, qk_norm=True)}


def gradients(model: Transformer, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_losses_are_the_cross_entropy_of_the_logits(name: str):
    model, tokens = random_model(ALL[name]), tokens_for(ALL[name])
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs)
    assert logits.shape == (*inputs.shape, ALL[name].vocab_size)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    # fp32, both from the same logits up to the order of sums: losses of up to 50 have steps of 4e-6
    assert torch.allclose(model(inputs, targets), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_token_does_not_see_those_after_it(name: str):
    model, tokens = random_model(ALL[name]), tokens_for(ALL[name])
    other = tokens.clone()
    other[:, 20:] = (other[:, 20:] + 1) % ALL[name].vocab_size
    before, after = model(tokens), model(other)
    assert torch.allclose(before[:, :20], after[:, :20], rtol=1e-5, atol=1e-4)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=0.1)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_cache_changes_nothing(name: str):
    model, tokens = random_model(ALL[name]), tokens_for(ALL[name])
    whole = model(tokens)
    cache = KeyValueCache(ALL[name].num_layers)
    pieces = [model(part, cache=cache) for part in tokens.split([20, 1, 1, 30, 1, 11], 1)]
    assert cache.num_tokens == CONTEXT
    # the same sums in another order: 1e-5 of the largest logit
    assert float((torch.cat(pieces, 1) - whole).abs().max() / whole.abs().max()) < 1e-5


def test_dropout_acts_in_training_only():
    model, tokens = random_model(dataclasses.replace(LLAMA, dropout=0.2)), tokens_for(LLAMA)
    with torch.no_grad():
        assert not torch.equal(model(tokens), model(tokens))
        model.eval()
        assert torch.equal(model(tokens), model(tokens))
        assert torch.equal(model(tokens), random_model(LLAMA)(tokens))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_training_is_deterministic(compute_dtype: torch.dtype | None):
    tokens = tokens_for(LLAMA)
    first = gradients(random_model(LLAMA, compute_dtype=compute_dtype), tokens)
    again = gradients(random_model(LLAMA, compute_dtype=compute_dtype), tokens)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("config", [LLAMA, GPT2, NEOX], ids=["llama", "gpt2", "neox"])
def test_bf16_compute_stays_near_fp32_and_keeps_fp32_gradients(config: ModelConfig):
    # 3 layers with about 10 roundings of 2^-9 each, at weights six times their usual size: a few per cent in all
    tokens = tokens_for(config)
    exact, rounded = random_model(config), random_model(config, compute_dtype=torch.bfloat16)
    wanted, found = gradients(exact, tokens), gradients(rounded, tokens)
    if config is GPT2:  # without rotation a bias on the keys moves all scores of a query alike: its gradient is 0
        wanted = {name: grad for name, grad in wanted.items() if not name.endswith("attention.k.bias")}
    for name in wanted:
        assert found[name].dtype == torch.float32
        assert float((found[name] - wanted[name]).norm() / wanted[name].norm()) < 0.1, name


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_low_precision_parameters_work(compute_dtype: torch.dtype | None):
    for config in (LLAMA, GPT2, NEOX):
        model = random_model(config, compute_dtype=compute_dtype).bfloat16()
        found = gradients(model, tokens_for(config))
        assert {g.dtype for g in found.values()} == {torch.bfloat16}


def test_a_tied_head_is_one_parameter_with_both_gradients():
    tied = random_model(SHAPES["llama-tied"])
    assert tied.head.weight is tied.embed.weight
    assert "head.weight" not in dict(tied.named_parameters())
    untied = random_model(dataclasses.replace(SHAPES["llama-tied"], tie_embeddings=False))
    with torch.no_grad():
        for name, parameter in tied.named_parameters():
            untied.get_parameter(name).copy_(parameter)
        untied.head.weight.copy_(tied.embed.weight)
    tokens = tokens_for(LLAMA)
    one, two = gradients(tied, tokens), gradients(untied, tokens)
    both = two["embed.weight"] + two["head.weight"]
    assert torch.allclose(one["embed.weight"], both, rtol=1e-4, atol=1e-6)


def test_names_and_shapes():
    shapes = parameter_shapes(dataclasses.replace(GPT2, qk_norm=True, num_layers=1), CONTEXT)
    block = [
        *("attention_norm.weight", "attention_norm.bias", "attention.q.weight", "attention.q.bias"),
        *("attention.k.weight", "attention.k.bias", "attention.v.weight", "attention.v.bias"),
        *("attention.output.weight", "attention.output.bias", "attention.q_norm.weight", "attention.k_norm.weight"),
        *("mlp_norm.weight", "mlp_norm.bias", "mlp.up.weight", "mlp.up.bias", "mlp.down.weight", "mlp.down.bias"),
    ]
    names = ["embed.weight", "positions.weight", *(f"layers.0.{name}" for name in block), "norm.weight", "norm.bias"]
    assert list(shapes) == names
    assert shapes["embed.weight"] == (256, 48) and shapes["positions.weight"] == (CONTEXT, 48)
    llama = parameter_shapes(LLAMA, CONTEXT)
    assert llama["layers.2.attention.k.weight"] == (16, 48) and llama["layers.2.mlp.gate.weight"] == (80, 48)
    assert llama["head.weight"] == (256, 48)


def test_a_sequence_beyond_the_context_is_refused():
    model = random_model(GPT2)
    with pytest.raises(AssertionError, match="do not fit the model's context of 64"):
        model(torch.zeros(1, CONTEXT + 1, dtype=torch.long))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "neox"])
def test_packed_documents_are_as_if_each_were_alone(name: str, compute_dtype: torch.dtype | None):
    config, tokens = ALL[name], tokens_for(ALL[name], batch=1)
    model = random_model(config, compute_dtype=compute_dtype)
    lengths = (1, 20, 43)
    documents = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    inputs, targets = tokens, tokens.roll(-1, 1)
    packed = model(inputs, targets, documents=documents)
    alone = torch.cat(
        [model(i, t) for i, t in zip(inputs.split(lengths, 1), targets.split(lengths, 1), strict=True)], 1
    )
    # Rotary positions go on in the packed sequence: the same angles between tokens, up to the rounding of each cosine,
    # 2^-24 in fp32 and 2^-9 in bf16, which losses average over entries of a head and gradients sum over a few layers.
    tolerance, gradient_tolerance = (1e-6, 2e-5) if compute_dtype is None else (5e-3, 0.1)
    distance = (packed - alone).detach().norm() / alone.detach().norm()
    crossing = (model(inputs, targets) - alone).detach().norm() / alone.detach().norm()
    assert float(distance) < tolerance and float(crossing) > 0.03
    wanted, found = (torch.autograd.grad(x.sum(), model.parameters()) for x in (alone, packed))
    for w, f in zip(wanted, found, strict=True):
        assert float((f - w).norm() / w.norm()) < gradient_tolerance


def test_learned_positions_go_on_from_document_to_document():
    model, tokens = random_model(GPT2), tokens_for(GPT2, batch=1)
    documents = (torch.arange(CONTEXT) >= 20).long()[None]
    packed = model(tokens, documents=documents)
    with torch.no_grad():
        model.positions.weight[: CONTEXT - 20] = model.positions.weight[20:].clone()
    assert torch.allclose(packed[:, 20:], model(tokens[:, 20:]), rtol=1e-4, atol=1e-4)
