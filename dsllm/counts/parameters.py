"""Parameters of a model by part, and the FLOPs they cost: sums over the table of parameters."""

import dataclasses
from collections import Counter
from dataclasses import dataclass

from dsllm.config.model import ModelConfig
from dsllm.parameters import Part, parameter_table


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Number of parameters of a model, by part."""

    embedding: int
    positions: int
    """Learned positions; 0 with rotary ones."""
    attention: int
    """The projections of all layers."""
    mlp: int
    """The MLPs of all layers."""
    norms: int
    head: int
    """0 where the head uses the embedding's weights."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.positions + self.attention + self.mlp + self.norms + self.head


def parameter_count(config: ModelConfig, context_length: int, padded: bool = True) -> ParameterCount:
    """Number of parameters of a model.

    Args:
        config: with its vocabulary resolved
        context_length: in tokens; decides the learned positions
        padded: count the padding rows of the vocabulary, which the built model has; published counts leave them out
    """
    count: Counter[Part] = Counter()
    for parameter in parameter_table(config, context_length):
        count[parameter.part] += parameter.num_elements if padded else parameter.num_real_elements
    return ParameterCount(
        embedding=count["embedding"],
        positions=count["positions"],
        attention=count["attention"],
        mlp=count["mlp"],
        norms=count["norm"],
        head=count["head"],
    )


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that every token is multiplied with: all projections, and the padded head, tied or not."""
    head: Part = "embedding" if config.tie_embeddings else "head"
    table = parameter_table(config, context_length=1)  # positions are looked up, not multiplied: any length will do
    return sum(p.num_elements for p in table if p.role == "matrix" or p.part == head)


def largest_parameter(config: ModelConfig, vocab_size: int, context_length: int) -> int:
    """Elements of the model's largest parameter: what ZeRO-3 gathers at once, and a buffer for swapping must hold.

    Args:
        vocab_size: before padding; replaces the config's, which may not be resolved yet
        context_length: in tokens; decides the learned positions
    """
    config = dataclasses.replace(config, vocab_size=vocab_size)
    return max(p.num_elements for p in parameter_table(config, context_length))


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of a forward and backward pass per token: 6 N_matmul + 12 L h s.

    Attention is counted in full, although a causal kernel may skip half of it. Recomputed activations are not counted
    (PaLM: Chowdhery et al. 2022, appendix B).

    Args:
        sequence_length: s, in tokens; L is the number of layers and h the width of all query heads together
    """
    attention = 12 * config.num_layers * config.num_heads * config.head_width * sequence_length
    return 6 * matmul_parameters(config) + attention
