"""The model branch of a run: the shape of the decoder."""

from dataclasses import dataclass
from typing import Literal

from dsllm.config.fields import FORBID_UNKNOWN_KEYS

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, so that matrix products are aligned."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama-3's stretching of the rotary frequencies to a longer context (Llama 3 herd of models, 2024)."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    factor: float = 8.0
    """How many times longer the context becomes."""
    low_frequency_factor: float = 1.0
    """Wavelengths above original_context_length / this are stretched by the whole factor."""
    high_frequency_factor: float = 4.0
    """Wavelengths below original_context_length / this are left as they are."""
    original_context_length: int = 8192
    """Context length, in tokens, before the stretching."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    size: str | None = None
    """A named model (dsllm/config/sizes.py) whose fields apply where the run gives none. None (default): no named model."""
    num_layers: int = 8
    """Decoder blocks."""
    hidden_size: int = 384
    """Width of the residual stream."""
    num_heads: int = 6
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention). None (default): num_heads."""
    head_size: int | None = None
    """Width of a head. None (default): hidden_size / num_heads."""
    mlp_size: int | None = None
    """Inner width of the MLP. None (default): 4 x hidden_size; with swiglu 8/3 x hidden_size, rounded up to 64."""
    vocab_size: int | None = None
    """Number of token ids; at least that of the tokenizer. None (default): that of the tokenizer."""
    context_length: int | None = None
    """Longest sequence that the model is made for, in tokens. None (default): data.sequence_length."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and before the head."""
    norm_epsilon: float = 1e-5
    """Added to the mean square (or variance) before the root."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary embedding of queries and keys, or a learned vector per position."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: float = 1.0
    """Share of each head that is rotated (GPT-NeoX: 0.25)."""
    rope_scaling: RopeScaling | None = None
    """Llama-3 stretching to a longer context. None (default): off."""
    mlp: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """The MLP's non-linearity; gelu_tanh is GPT-2's approximation."""
    parallel_residual: bool = False
    """Attention and MLP both read the block's input (GPT-NeoX), instead of one after the other."""
    tie_embeddings: bool = False
    """The head uses the embedding's weights."""
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    attention_output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases in the MLP."""
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys, before the rotation."""
    dropout: float = 0.0
    """Probability of dropping an activation: after the embedding, of attention's weights, and of each branch's output."""
    initial_std: float = 0.02
    """Standard deviation of the initial weights; output projections use initial_std / sqrt(2 x num_layers)."""
    init_from: str | None = None
    """Start from these weights: a run directory, one of its checkpoints, or a Hugging Face folder; the fields above that the
    run does not give come from there too. None (default): from the initial values."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head, resolved."""
        return self.hidden_size // self.num_heads if self.head_size is None else self.head_size

    @property
    def mlp_width(self) -> int:
        """Inner width of the MLP, resolved."""
        if self.mlp_size is not None:
            return self.mlp_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64 if self.mlp == "swiglu" else 4 * self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to VOCAB_MULTIPLE."""
        assert self.vocab_size is not None, "vocab_size is resolved from the tokenizer before a model is built"
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
