"""The workloads that every candidate trains: shape of the model and batch, by name. Needs no torch."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model shaped like Llama or GPT-2, and the batch of one optimizer step."""

    kind: Literal["llama", "gpt2"] = "llama"
    num_layers: int
    hidden_size: int
    num_heads: int
    mlp_size: int
    vocab_size: int
    sequence_length: int
    global_batch_sequences: int
    tied: bool = False
    learning_rate: float = 3e-4
    gradient_clipping: float = 1.0

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks."""
        return self.global_batch_sequences * self.sequence_length

    @property
    def flops_per_token(self) -> int:
        """6 N_matmul + 12 L d T, with the head, and with attention counted in full."""
        matrices = 4 * self.hidden_size**2 + (3 if self.kind == "llama" else 2) * self.hidden_size * self.mlp_size
        attention = 12 * self.num_layers * self.hidden_size * self.sequence_length
        return 6 * (self.num_layers * matrices + self.vocab_size * self.hidden_size) + attention

    @property
    def dsllm_model(self) -> dict[str, Any]:
        """The same model as fields of dsllm's config."""
        biased = self.kind == "gpt2"
        return {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_heads": self.num_heads,
            "mlp_size": self.mlp_size,
            "vocab_size": self.vocab_size,
            "tie_embeddings": self.tied,
            "norm": "layernorm" if biased else "rmsnorm",
            "positions": "learned" if biased else "rope",
            "mlp": "gelu_tanh" if biased else "swiglu",
            "attention_bias": biased,
            "attention_output_bias": biased,
            "mlp_bias": biased,
        }

    def dsllm_overrides(self, world_size: int) -> tuple[str, ...]:
        """The overrides that turn bench/recipes/workload.yaml into this workload."""
        fields = {f"model.{name}": value for name, value in self.dsllm_model.items()} | {
            "data.sequence_length": self.sequence_length,
            "train.global_batch_sequences": self.global_batch_sequences,
            "train.micro_batch_sequences": self.global_batch_sequences // world_size,
            "train.gradient_clipping": self.gradient_clipping,
            "train.optimizer.learning_rate": self.learning_rate,
        }
        return tuple(f"{key}={str(value).lower()}" for key, value in fields.items())


def _llama(num_layers: int, hidden_size: int, num_heads: int, mlp_size: int, sequences: int) -> Workload:
    """The GPU bench's shapes: tied embeddings, sequences of 2048."""
    return Workload(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        mlp_size=mlp_size,
        vocab_size=50304,
        sequence_length=2048,
        global_batch_sequences=sequences,
        tied=True,
    )


WORKLOADS = {
    "a": Workload(
        num_layers=8,
        hidden_size=384,
        num_heads=6,
        mlp_size=1024,
        vocab_size=8192,
        sequence_length=512,
        global_batch_sequences=4,
    ),
    "b": Workload(
        kind="gpt2",
        num_layers=12,
        hidden_size=768,
        num_heads=12,
        mlp_size=3072,
        vocab_size=50304,
        sequence_length=1024,
        global_batch_sequences=1,
        tied=True,
    ),
    "125m": _llama(12, 768, 12, 2048, sequences=16),
    "350m": _llama(24, 1024, 16, 2816, sequences=16),
    "1.3b": _llama(24, 2048, 16, 5504, sequences=8),
    "tiny": Workload(
        num_layers=2,
        hidden_size=64,
        num_heads=2,
        mlp_size=128,
        vocab_size=8192,
        sequence_length=64,
        global_batch_sequences=2,
        tied=True,
    ),
}
"""a: 20.45 M parameters, 2048 tokens a step. b: GPT-2 124 M. The others: the GPU bench, and its dry run."""
