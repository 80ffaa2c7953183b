"""Activation checkpointing: the same gradients bit for bit, and as much memory as the formula says."""

import dataclasses
import hashlib
from typing import Any

import pytest
import torch

from dsllm.config.model import ModelConfig
from dsllm.config.train import TrainConfig
from dsllm.counts import activation_bytes, kept_activation_bytes
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import owned_slices
from dsllm.model.recompute import Recompute
from dsllm.model.transformer import Transformer
from tests.helpers.models import CONTEXT, GPT2, LLAMA, NEOX, random_model, tokens_for
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_engine, tiny_run, tiny_step

MODES = ("full", 2, "attention", "mlp")
SHAPES = {"llama": LLAMA, "gpt2": GPT2, "neox": NEOX, "qk-norm": dataclasses.replace(LLAMA, qk_norm=True)}


def gradients(model: Transformer, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model(tokens[:, :-1], tokens[:, 1:]).losses.mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("what", MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_the_gradients_are_the_same_bit_by_bit(name: str, dropout: float, what: Any, offload: bool):
    config = dataclasses.replace(SHAPES[name], dropout=dropout)
    tokens = tokens_for(config)
    for compute_dtype in (None, torch.bfloat16):
        plain = gradients(random_model(config, compute_dtype=compute_dtype), tokens)
        recompute = Recompute(what=what, offload=offload)
        found = gradients(random_model(config, compute_dtype=compute_dtype, recompute=recompute), tokens)
        assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_without_training_nothing_is_recomputed(monkeypatch: pytest.MonkeyPatch):
    model, tokens = random_model(LLAMA, recompute=Recompute(what="full", offload=True)), tokens_for(LLAMA)
    monkeypatch.setattr(Recompute, "apply", None)
    with pytest.raises(TypeError):
        model(tokens)
    assert torch.equal(model.eval()(tokens), random_model(LLAMA).eval()(tokens))


def kept_bytes(config: ModelConfig, train: TrainConfig, tokens: torch.Tensor) -> int:
    """Bytes of the activations that autograd keeps on the device after a forward pass, each storage once."""
    recompute = Recompute(what=train.activation_checkpointing, offload=train.activation_offload)
    model = random_model(config, recompute=recompute)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # what is offloaded is taken by the inner hooks, and does not come here

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own and x.numel() >= tokens.numel() * 8:  # not indices, nor tables
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(tokens[:, :-1], tokens[:, 1:]).losses.sum()
    logits = (tokens.numel() - len(tokens)) * config.padded_vocab_size * 4
    total = sum(x.untyped_storage().nbytes() for x in kept.values()) - logits
    loss.backward()
    return total


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("what", ["none", *MODES])
@pytest.mark.parametrize("name", SHAPES)
def test_the_formula_counts_what_is_kept(name: str, what: Any, offload: bool):
    if what == "none" and offload:
        return  # refused with the run
    config, batch = SHAPES[name], 8
    train = TrainConfig(micro_batch_sequences=batch, activation_checkpointing=what, activation_offload=offload)
    tokens = tokens_for(config, batch, CONTEXT + 1)
    found = kept_bytes(config, train, tokens)
    # in fp32 nothing is left out but what is one number per token, or per token and head, which the test leaves out too
    assert found == kept_activation_bytes(config, CONTEXT, train, "fp32", "cuda")


def test_more_is_saved_from_mode_to_mode_and_the_peak_is_above_what_is_kept():
    config = dataclasses.replace(LLAMA, num_layers=12)

    def peak(what: Any, offload: bool = False, device: str = "cuda") -> int:
        train = TrainConfig(activation_checkpointing=what, activation_offload=offload)
        assert activation_bytes(config, 64, train, "bf16", device) > kept_activation_bytes(
            config, 64, train, "bf16", device
        )
        return activation_bytes(config, 64, train, "bf16", device)

    order = [peak("none"), peak("attention"), peak("mlp"), peak(2), peak("full"), peak("full", offload=True)]
    assert (
        order[0] > order[1] > order[4] > order[5] and order[0] > order[2] > order[4] and order[0] > order[3] > order[4]
    )
    assert peak("full", offload=True, device="cpu") == peak("full")


def two_steps(world: World, settings: list[dict[str, Any]]) -> dict[int, list[list[Any]]]:
    """Losses, norms and the hash of the state after two steps with dropout, for each setting, by ZeRO stage."""
    found: dict[int, list[list[Any]]] = {}
    for stage in (0, 1, 2, 3):
        found[stage] = []
        for setting in settings:
            config = tiny_run(precision="fp32_compute_bf16", **setting)
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.1))
            engine = tiny_engine(world, config, stage)
            results = [tiny_step(engine, config, s) for s in range(2)]
            state = b"".join(t.numpy().tobytes() for piece in owned_slices(engine) for t in piece.tensors.values())
            found[stage].append([*((r.loss, r.gradient_norm) for r in results), hashlib.sha256(state).hexdigest()])
    return found


@pytest.mark.slow
def test_under_zero_with_two_ranks_it_is_the_same_bit_by_bit():
    settings = [{}, {"activation_checkpointing": "attention"}]
    settings += [{"activation_checkpointing": what, "activation_offload": True} for what in (2, "mlp")]
    for of_rank in run_ranks(2, two_steps, settings):
        for stage, (plain, *others) in of_rank.items():
            for setting, other in zip(settings[1:], others, strict=True):
                assert other == plain, (stage, setting)
