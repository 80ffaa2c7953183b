"""The whole model: losses and logits agree, the past decides, and neither caches nor other documents change it."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig
from dsllm.engine.processes.process_group import World
from dsllm.engine.step import take_step
from dsllm.model.transformer import KeyValueCache, Transformer
from dsllm.objectives import TokenLoss
from dsllm.parameters import parameter_table
from tests.helpers.models import CONTEXT, GPT2, LLAMA, NEOX, SHAPES, random_model, tokens_for
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import micro_batches, tiny_engine, tiny_run

ALL = SHAPES | {"qk-norm": dataclasses.replace(LLAMA, qk_norm=True)}


def gradients(model: Transformer, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).losses.mean().backward()
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
    output = model(inputs, targets)
    assert torch.allclose(output.losses, wanted, rtol=1e-5, atol=1e-5) and output.auxiliary == {}


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


def two_steps(world: World, config: RunConfig) -> dict[int, list[float]]:
    """Losses of two steps, by ZeRO stage."""
    found = {}
    for stage in (0, 3):
        engine = tiny_engine(world, config, stage)
        batches = [micro_batches(config, step, world.data_rank, world.data_size) for step in range(2)]
        found[stage] = [take_step(engine, batch, TokenLoss(), seed=0).loss for batch in batches]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tied_head_with_biases_and_learned_positions_trains_under_zero_3(precision: str):
    # ZeRO-3 divides each module's parameters when it has been constructed, and gathers them when it runs
    config = tiny_run(precision=precision)
    config = dataclasses.replace(config, model=dataclasses.replace(GPT2, vocab_size=250))
    for of_rank in run_ranks(2, two_steps, config):
        # 8 sequences and two updates; fp32 sums over two ranks in another order, bf16 rounds the update of its weights
        assert of_rank[3] == pytest.approx(of_rank[0], rel=1e-6 if precision == "fp32" else 1e-3)
        assert of_rank[0][1] != of_rank[0][0]


def test_names_and_shapes():
    model = Transformer(dataclasses.replace(GPT2, qk_norm=True, num_layers=1), CONTEXT)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    block = [
        *("attention_norm.weight", "attention_norm.bias", "attention.q.weight", "attention.q.bias"),
        *("attention.k.weight", "attention.k.bias", "attention.v.weight", "attention.v.bias"),
        *("attention.output.weight", "attention.output.bias", "attention.q_norm.weight", "attention.k_norm.weight"),
        *("mlp_norm.weight", "mlp_norm.bias", "mlp.up.weight", "mlp.up.bias", "mlp.down.weight", "mlp.down.bias"),
    ]
    names = ["embed.weight", "positions.weight", *(f"layers.0.{name}" for name in block), "norm.weight", "norm.bias"]
    assert list(shapes) == names
    assert shapes["embed.weight"] == (256, 48) and shapes["positions.weight"] == (CONTEXT, 48)
    llama = Transformer(LLAMA, CONTEXT)
    assert llama.layers[2].attention.k.weight.shape == (16, 48) and llama.layers[2].mlp.gate.weight.shape == (80, 48)
    assert llama.head.weight.shape == (256, 48)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_is_in_a_layer_of_torch(name: str):
    # what tools for tensor parallelism, adapters and quantisation look for
    kinds = {"matrix": nn.Linear, "head": nn.Linear, "embedding": nn.Embedding, "norm": (nn.RMSNorm, nn.LayerNorm)}
    model = Transformer(ALL[name], CONTEXT)
    assert isinstance(model.head, nn.Linear)  # with a tied weight too
    for parameter in parameter_table(ALL[name], CONTEXT):
        module = model.get_submodule(parameter.name.rpartition(".")[0])
        kind = (nn.Linear, nn.LayerNorm) if parameter.role == "bias" else kinds[parameter.role]
        assert isinstance(module, kind), parameter.name


def test_building_draws_no_numbers_and_takes_torchs_default_type():
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Transformer(GPT2, CONTEXT)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own initialisation of a layer would draw from it
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.head.weight is model.embed.weight


def mlp_cut_by_torch(world: World) -> list[float]:
    """Deviations of output and gradients of an MLP that torch's tensor parallelism has cut, from the whole one's."""
    config = SHAPES["llama-biases"]
    whole = random_model(config).layers[0].mlp
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    out = whole(x)
    wanted = [out, *torch.autograd.grad(out.sum(), list(whole.parameters()))]
    mesh = init_device_mesh("cpu", (world.size,))
    rows = {
        parameter.name.removeprefix("layers.0.mlp."): parameter
        for parameter in parameter_table(config, CONTEXT)
        if parameter.layer == "layers.0" and parameter.part == "mlp"
    }
    plan = {
        name.removesuffix(".weight"): ColwiseParallel() if row.tensor_axis == 0 else RowwiseParallel()
        for name, row in rows.items()
        if row.role == "matrix"
    }
    assert set(plan) == {"gate", "up", "down"}
    cut = parallelize_module(copy.deepcopy(whole), mesh, plan)
    for name, row in rows.items():
        shares = [world.size if axis == row.tensor_axis else 1 for axis in range(len(row.shape))]
        local = cut.get_parameter(name).to_local()
        assert tuple(local.shape) == tuple(n // share for n, share in zip(row.shape, shares, strict=True)), name
    out = cut(x)
    found = [out, *(grad.full_tensor() for grad in torch.autograd.grad(out.sum(), list(cut.parameters())))]
    return [float((f - w).detach().norm() / w.detach().norm()) for f, w in zip(found, wanted, strict=True)]


def test_torchs_tensor_parallelism_cuts_our_layers_by_the_axes_of_the_table():
    for deviations in run_ranks(2, mlp_cut_by_torch):
        assert max(deviations) < 1e-6  # sums of 80 terms in two halves: a few roundings of 2^-24 each


def test_a_sequence_beyond_the_context_is_refused():
    model = random_model(GPT2)
    with pytest.raises(AssertionError, match="do not fit the model's context of 64"):
        model(torch.zeros(1, CONTEXT + 1, dtype=torch.long))
    with pytest.raises(AssertionError, match="65 positions do not fit the model's context of 64"):
        model(torch.zeros(1, 2, dtype=torch.long), positions=torch.tensor([[3, CONTEXT]]))


LENGTHS = (1, 20, 43)
"""Of the documents that are packed into one sequence."""
DOCUMENTS = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))[None]


def packed_and_alone(model: Transformer, tokens: torch.Tensor, positions: torch.Tensor | None) -> tuple[Tensor, Tensor]:
    """Losses [1, T] of the documents in one sequence, and of each by itself."""
    inputs, targets = tokens, tokens.roll(-1, 1)
    packed = model(inputs, targets, documents=DOCUMENTS, positions=positions).losses
    parts = zip(inputs.split(LENGTHS, 1), targets.split(LENGTHS, 1), strict=True)
    return packed, torch.cat([model(i, t).losses for i, t in parts], 1)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "neox"])
def test_packed_documents_are_as_if_each_were_alone(name: str, compute_dtype: torch.dtype | None):
    tokens = tokens_for(ALL[name], batch=1)
    model = random_model(ALL[name], compute_dtype=compute_dtype)
    packed, alone = packed_and_alone(model, tokens, None)
    # Rotary positions continue in the packed sequence: the same angles between tokens, up to the rounding of each
    # cosine, 2^-24 in fp32 and 2^-9 in bf16, which losses average over entries of a head and gradients sum over a few
    # layers.
    tolerance, gradient_tolerance = (1e-6, 2e-5) if compute_dtype is None else (5e-3, 0.1)
    distance = (packed - alone).detach().norm() / alone.detach().norm()
    crossing = (model(tokens, tokens.roll(-1, 1)).losses - alone).detach().norm() / alone.detach().norm()
    assert float(distance) < tolerance and float(crossing) > 0.03
    wanted, found = (torch.autograd.grad(x.sum(), model.parameters()) for x in (alone, packed))
    for w, f in zip(wanted, found, strict=True):
        assert float((f - w).norm() / w.norm()) < gradient_tolerance


RESTARTED = torch.cat([torch.arange(length) for length in LENGTHS])[None]
"""Positions that start at 0 in each document."""


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_with_positions_that_restart_packed_documents_are_those_alone(name: str, compute_dtype: torch.dtype | None):
    tokens = tokens_for(ALL[name], batch=1)
    model = random_model(ALL[name], compute_dtype=compute_dtype)
    packed, alone = packed_and_alone(model, tokens, RESTARTED)
    # The angles are the same numbers. What differs is the order of sums: in fp32 a few roundings of 2^-24 in a loss and
    # some tens of them on the way back through 3 layers. In bf16 each document's gradient of a matrix is rounded once
    # more, by at most 2^-9, before the sum over documents, and another order may flip a rounding of 2^-9 anywhere.
    tolerance, gradient_tolerance = (2**-22, 2**-19) if compute_dtype is None else (2**-8, 2**-7)
    assert float((packed - alone).detach().norm() / alone.detach().norm()) < tolerance
    wanted, found = (torch.autograd.grad(x.sum(), model.parameters()) for x in (alone, packed))
    difference = torch.stack([(f - w).norm() for f, w in zip(found, wanted, strict=True)]).norm()
    assert float(difference / torch.stack([w.norm() for w in wanted]).norm()) < gradient_tolerance
    if ALL[name].positions == "learned":
        continued, _ = packed_and_alone(model, tokens, None)
        assert float((continued - alone).detach().norm() / alone.detach().norm()) > 0.01


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_positions_from_0_are_the_default(name: str, compute_dtype: torch.dtype | None):
    model, tokens = random_model(ALL[name], compute_dtype=compute_dtype), tokens_for(ALL[name])
    positions = torch.arange(CONTEXT).expand(2, -1)
    plain, placed = (model(tokens, tokens.roll(-1, 1), positions=p).losses for p in (None, positions))
    assert torch.equal(plain, placed)
    wanted, found = (torch.autograd.grad(x.sum(), model.parameters()) for x in (plain, placed))
    assert all(torch.equal(w, f) for w, f in zip(wanted, found, strict=True))  # also: a + b is the sum of 2 sequences


def test_learned_positions_continue_from_document_to_document():
    model, tokens = random_model(GPT2), tokens_for(GPT2, batch=1)
    documents = (torch.arange(CONTEXT) >= 20).long()[None]
    packed = model(tokens, documents=documents)
    with torch.no_grad():
        model.positions.weight[: CONTEXT - 20] = model.positions.weight[20:].clone()
    assert torch.allclose(packed[:, 20:], model(tokens[:, 20:]), rtol=1e-4, atol=1e-4)
