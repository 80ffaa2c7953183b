"""The base: a plain PyTorch loop with autocast bf16, over its own model or, with --model dsllm, over dsllm's."""

import argparse
import itertools

import torch
import torch.distributed
from torch import nn
from torch.nn import functional as F
from workload import Workload, announce, random_sequences, world_size

# B = batch, T = sequence, D = hidden size, H = heads, W = width of a head


class Attention(nn.Module):
    """Causal self-attention with rotary positions, by torch's fused kernel."""

    def __init__(self, shape: Workload):
        super().__init__()
        self.num_heads = shape.num_heads
        self.query_key_value = nn.Linear(shape.hidden_size, 3 * shape.hidden_size, bias=False)
        self.output = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        width = shape.hidden_size // shape.num_heads
        angles = torch.outer(torch.arange(shape.sequence_length), 10000.0 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cos", torch.cat([angles, angles], 1).cos())  # [T, W]
        self.register_buffer("sin", torch.cat([angles, angles], 1).sin())

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.query_key_value(x).unflatten(2, (3, self.num_heads, -1))  # [B, T, 3, H, W]
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, W]
        query, key = self.rotate(query).to(value.dtype), self.rotate(key).to(value.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a gated MLP, each after a norm and added to the stream."""

    def __init__(self, shape: Workload):
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden_size, eps=1e-5)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.hidden_size, eps=1e-5)
        self.gate = nn.Linear(shape.hidden_size, shape.mlp_size, bias=False)
        self.up = nn.Linear(shape.hidden_size, shape.mlp_size, bias=False)
        self.down = nn.Linear(shape.mlp_size, shape.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class PlainModel(nn.Module):
    """What anyone would write for this shape."""

    def __init__(self, shape: Workload):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=1e-5)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)  # [B, T, D]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class MeanLoss(nn.Module):
    """dsllm's model, whose forward gives a loss per token, as one number."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, targets).mean()


def dsllm_model(shape: Workload) -> nn.Module:
    """dsllm's model of the same shape, computing in bf16 by itself."""
    from dsllm.config.model import ModelConfig
    from dsllm.model.initial import fill_initial
    from dsllm.model.transformer import Transformer

    config = ModelConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        mlp_size=shape.mlp_size,
        vocab_size=shape.vocab_size,
    )
    model = Transformer(config, shape.sequence_length, compute_dtype=torch.bfloat16)
    fill_initial(model, config, seed=1234)
    return MeanLoss(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("plain", "dsllm"), default="plain")
    shape, options = Workload(), parser.parse_args()
    torch.manual_seed(1234)
    model = PlainModel(shape) if options.model == "plain" else dsllm_model(shape)
    if world_size() > 1:
        torch.distributed.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.learning_rate, fused=True)
    sequences = random_sequences(shape, 16 * shape.micro_batch_sequences).split(shape.micro_batch_sequences)
    for step, batch in enumerate(itertools.cycle(sequences), start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=options.model == "plain"):
            loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), shape.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        announce(step, loss.item())


if __name__ == "__main__":
    main()
