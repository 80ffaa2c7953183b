"""Small models of every shape, with weights that show mistakes, and their state as a reader."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dsllm.config.model import ModelConfig, RopeScaling
from dsllm.model.initial import fill_initial
from dsllm.model.transformer import Transformer
from dsllm.parameters import parameter_table
from dsllm.slices import Region

CONTEXT = 64

LLAMA = ModelConfig(num_layers=3, hidden_size=48, num_heads=6, num_kv_heads=2, mlp_size=80, vocab_size=200)
# GPT-2's biases, learned positions and GELU
BIASES: dict[str, Any] = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
GPT2 = ModelConfig(
    num_layers=3, hidden_size=48, num_heads=4, mlp_size=100, vocab_size=200, norm="layernorm", positions="learned",
    mlp="gelu_tanh", tie_embeddings=True, **BIASES,
)  # fmt: skip
NEOX = ModelConfig(
    num_layers=3, hidden_size=64, num_heads=4, mlp_size=100, vocab_size=200, norm="layernorm", mlp="gelu",
    rope_fraction=0.25, parallel_residual=True, **BIASES,
)  # fmt: skip

# a short original context, so that some frequencies are stretched, some kept and some in between
SCALING = RopeScaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context_length=32)

SHAPES: dict[str, ModelConfig] = {
    "llama": LLAMA,
    "llama-tied": dataclasses.replace(LLAMA, tie_embeddings=True, num_kv_heads=None),
    "llama-scaled": dataclasses.replace(LLAMA, rope_theta=500.0, rope_scaling=SCALING, norm_epsilon=1e-6),
    "llama-head-size": dataclasses.replace(LLAMA, head_size=20, num_kv_heads=1),
    "llama-biases": dataclasses.replace(LLAMA, **BIASES),
    "qwen2": dataclasses.replace(LLAMA, attention_bias=True, rope_theta=1e6, tie_embeddings=True),
    "gpt2": GPT2,
    "gpt2-exact-gelu-untied": dataclasses.replace(GPT2, mlp="gelu", tie_embeddings=False),
    "neox": NEOX,
    "neox-sequential": dataclasses.replace(NEOX, parallel_residual=False, mlp="gelu_tanh", rope_fraction=1.0),
    "neox-tied-no-attention-bias": dataclasses.replace(
        NEOX, tie_embeddings=True, attention_bias=False, attention_output_bias=False, rope_theta=500.0
    ),
}
"""Every shape that a Hugging Face architecture holds, by name."""


def random_model(config: ModelConfig, seed: int = 0, **more: Any) -> Transformer:
    """A model whose weights are all random and large: norms, biases and positions matter, so that a wrong one shows."""
    model = Transformer(config, CONTEXT, **more)
    table = parameter_table(config, CONTEXT)
    fill_initial(model, table, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for row, parameter in zip(table, model.parameters(), strict=True):
            noise = torch.randn(parameter.shape, generator=generator)
            if row.role == "bias":
                parameter.copy_(0.3 * noise)
            elif row.role == "norm":
                parameter.copy_(1 + 0.5 * noise)
            else:
                parameter.mul_(6)  # padding rows stay 0
    return model


def tokens_for(config: ModelConfig, batch: int = 2, length: int = CONTEXT) -> Tensor:
    """Random token ids [batch, length]."""
    assert config.vocab_size is not None
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


class WeightsOf:
    """A model's weights as a reader, like a checkpoint's."""

    def __init__(self, model: Transformer):
        self.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def names(self) -> list[str]:
        """Names of all parameters."""
        return list(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return tuple(self.weights[name].shape)

    def read(self, name: str, key: str, region: Region) -> Tensor:
        """The values of a region of the parameter."""
        return region.of(self.weights[name])
