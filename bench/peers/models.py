"""The model of the plain loops, as anyone would write a Llama or a GPT-2 in torch, and dsllm's model of the same shape."""

import torch
from torch import nn
from torch.nn import functional as F

from bench.workloads import Workload

# B = batch, T = sequence, D = hidden size, H = heads, W = width of a head


class Attention(nn.Module):
    """Causal self-attention with torch's fused kernel; with rotary positions in a Llama."""

    def __init__(self, shape: Workload):
        super().__init__()
        self.num_heads, self.rotary, biased = shape.num_heads, shape.kind == "llama", shape.kind == "gpt2"
        self.query_key_value = nn.Linear(shape.hidden_size, 3 * shape.hidden_size, bias=biased)
        self.output = nn.Linear(shape.hidden_size, shape.hidden_size, bias=biased)
        width = shape.hidden_size // shape.num_heads
        angles = torch.outer(torch.arange(shape.sequence_length), 10000.0 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cos", torch.cat([angles, angles], 1).cos(), persistent=False)  # [T, W]
        self.register_buffer("sin", torch.cat([angles, angles], 1).sin(), persistent=False)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.query_key_value(x).unflatten(2, (3, self.num_heads, -1))  # [B, T, 3, H, W]
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, W]
        if self.rotary:
            query, key = self.rotate(query).to(value.dtype), self.rotate(key).to(value.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated in a Llama, two matrices with GELU in a GPT-2."""

    def __init__(self, shape: Workload):
        super().__init__()
        biased = shape.kind == "gpt2"
        self.gate = None if biased else nn.Linear(shape.hidden_size, shape.mlp_size, bias=False)
        self.up = nn.Linear(shape.hidden_size, shape.mlp_size, bias=biased)
        self.down = nn.Linear(shape.mlp_size, shape.hidden_size, bias=biased)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))


def norm(shape: Workload) -> nn.Module:
    """RMSNorm in a Llama, LayerNorm in a GPT-2."""
    return (nn.RMSNorm if shape.kind == "llama" else nn.LayerNorm)(shape.hidden_size, eps=1e-5)


class Block(nn.Module):
    """Attention and an MLP, each after a norm and added to the residual stream."""

    def __init__(self, shape: Workload):
        super().__init__()
        self.attention_norm, self.attention = norm(shape), Attention(shape)
        self.mlp_norm, self.mlp = norm(shape), MLP(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class PlainModel(nn.Module):
    """The decoder; its forward pass returns the mean loss of the targets."""

    def __init__(self, shape: Workload):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        learned = shape.kind == "gpt2"
        self.positions = nn.Embedding(shape.sequence_length, shape.hidden_size) if learned else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = norm(shape)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)  # [B, T, D]
        if self.positions is not None:
            x = x + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class MeanLoss(nn.Module):
    """dsllm's model, with the mean of its per-token losses as its output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, targets).losses.mean()


def dsllm_model(shape: Workload, seed: int = 1234) -> nn.Module:
    """dsllm's model of the same shape, which computes in bf16 without autocast."""
    from dsllm.config.model import ModelConfig
    from dsllm.model.initial import fill_initial
    from dsllm.model.transformer import Transformer
    from dsllm.parameters import parameter_table

    config = ModelConfig(**shape.dsllm_model)
    model = Transformer(config, shape.sequence_length, compute_dtype=torch.bfloat16)
    fill_initial(model, parameter_table(config, shape.sequence_length), seed)
    return MeanLoss(model)


@torch.no_grad()
def copy_weights(plain: PlainModel, state: dict[str, torch.Tensor]) -> None:
    """Copy the weights of dsllm's model, given by name, into the plain Llama; rows of padding are left out."""
    names = {"embedding.weight": "embed.weight", "head.weight": "head.weight", "norm.weight": "norm.weight"}
    for name, parameter in plain.named_parameters():
        if "query_key_value" in name:
            own = name.replace("blocks", "layers")
            parts = [state[own.replace("query_key_value", part)] for part in "qkv"]
            parameter.copy_(torch.cat(parts))
        else:
            own = names.get(name) or name.replace("blocks", "layers")
            parameter.copy_(state[own][: len(parameter)])
