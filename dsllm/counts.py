"""Parameters, FLOPs and bytes of a model by formula: shared by the model's tests, MFU, --dry-run and the planner."""

from dataclasses import dataclass
from typing import Literal

from dsllm.config.model import VOCAB_MULTIPLE, ModelConfig
from dsllm.config.train import Precision, TrainConfig

LOGITS_AT_A_TIME = 2**26
"""Logits that the loss computes at a time, in the hidden state's dtype: each chunk costs a pass over the head's gradient."""


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
    """Parameters of the built model.

    Args:
        context_length: in tokens; decides the learned positions
        padded: count the padding rows of the vocabulary too, as they are built; published counts do not
    """
    assert config.vocab_size is not None, "vocab_size is resolved from the tokenizer before a model is counted"
    vocabulary = (config.padded_vocab_size if padded else config.vocab_size) * config.hidden_size
    norm = config.hidden_size * (2 if config.norm == "layernorm" else 1)
    head_norms = 2 * config.head_width if config.qk_norm else 0
    return ParameterCount(
        embedding=vocabulary,
        positions=context_length * config.hidden_size if config.positions == "learned" else 0,
        attention=config.num_layers * (_attention_matrices(config) + _attention_biases(config)),
        mlp=config.num_layers * (_mlp_matrices(config) + _mlp_biases(config)),
        norms=config.num_layers * (2 * norm + head_norms) + norm,
        head=0 if config.tie_embeddings else vocabulary,
    )


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters in a matrix product with every token: all projections, and the padded head, tied or not."""
    layers = config.num_layers * (_attention_matrices(config) + _mlp_matrices(config))
    return layers + config.padded_vocab_size * config.hidden_size


def largest_parameter(config: ModelConfig, vocab_size: int, context_length: int) -> int:
    """Elements of the model's largest parameter: what ZeRO-3 gathers at once, and a buffer for swapping must hold.

    Args:
        vocab_size: before padding; taken instead of the config's, which may still be open
        context_length: in tokens; decides the learned positions
    """
    rows = max(
        -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE, config.num_heads * config.head_width, config.mlp_width
    )
    return config.hidden_size * max(rows, context_length if config.positions == "learned" else 0)


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of a forward and backward pass per token: 6 N_matmul + 12 L h s.

    Attention is counted in full, not its causal half, and recomputed activations are not counted (PaLM: Chowdhery et
    al. 2022, appendix B).

    Args:
        sequence_length: s, in tokens; L is the number of layers and h the width of all query heads together
    """
    attention = 12 * config.num_layers * config.num_heads * config.head_width * sequence_length
    return 6 * matmul_parameters(config) + attention


def model_state_bytes(
    num_parameters: int,
    zero_stage: Literal[0, 1, 2, 3],
    precision: Precision,
    data_parallel_size: int,
    fp32_gradients: bool = True,
) -> int:
    """Bytes per rank of weights, gradients, master weights and Adam's two moments, as DeepSpeed 0.19.8 holds them.

    Buffers for communication and the activations come on top.

    Args:
        precision: a resolved one, not auto
        fp32_gradients: gradients accumulate in fp32 where the parameters are 16-bit (bf16 only; fp16 does not)
    """
    if precision in ("fp32", "fp32_compute_bf16"):
        weights, masters, gradients, accumulated = 4, 4, 4, 4
    else:
        weights, masters, gradients = 2, 4, 2
        accumulated = 4 if fp32_gradients and precision == "bf16" else 2
    moments = 8
    if zero_stage == 0:  # in fp32 the weights are the masters
        whole, shared = weights + gradients + moments + (masters if weights == 2 else 0), 0
    elif zero_stage == 1 and accumulated != gradients:  # BF16_Optimizer keeps a whole fp32 gradient on every rank
        whole, shared = weights + gradients + accumulated, masters + moments
    elif zero_stage < 3:
        whole, shared = weights, masters + accumulated + moments
    else:
        whole, shared = 0, weights + masters + accumulated + moments
    return whole * num_parameters + -(-shared * num_parameters // data_parallel_size)


def kept_activation_bytes(
    config: ModelConfig, sequence_length: int, train: TrainConfig, precision: Precision, device: str = "cpu"
) -> int:
    """Bytes of one micro-batch's activations that the blocks and the last norm keep between forward and backward pass.

    Counted are the inputs that each operation saves. Left out: the logits (`activation_bytes`), masks of dropout, what
    is one number per token (norms) or per token and head (attention), and the attention weights that the CPU's kernel
    for bf16 keeps (1 to 2 bytes per token, head and key, up to 1024 tokens); fused kernels keep none.

    Args:
        precision: a resolved one, not auto
        device: "cpu" or "cuda": what is offloaded counts on the CPU, and not on the GPU
    """
    token = _activation_width(precision) * sequence_length * train.micro_batch_sequences  # bytes per unit of width
    attention, mlp = _kept_widths(config)
    layers, what = config.num_layers, train.activation_checkpointing
    # a branch's input is kept by its norm, or by its recomputation, or both; parallel branches share it
    inputs = config.hidden_size * (1 if config.parallel_residual else 2)
    whole = {"full": layers, "none": 0, "attention": 0, "mlp": 0}[what] if isinstance(what, str) else -(-layers // what)
    kept = whole * config.hidden_size + (layers - whole) * (
        inputs + (0 if what == "attention" else attention) + (0 if what == "mlp" else mlp)
    )
    if train.activation_offload and device != "cpu":
        recomputed_branches = layers if what in ("attention", "mlp") and not config.parallel_residual else 0
        kept -= (whole + recomputed_branches) * config.hidden_size
    return token * (kept + 2 * config.hidden_size)


def activation_bytes(
    config: ModelConfig, sequence_length: int, train: TrainConfig, precision: Precision, device: str = "cpu"
) -> int:
    """An estimate of the most bytes that one micro-batch's activations take at a time.

    To what is kept comes the larger of two that do not meet: the logits, whole or a chunk of them, and the part of a
    block that is being recomputed. Arguments as in `kept_activation_bytes`.
    """
    tokens, width = sequence_length * train.micro_batch_sequences, _activation_width(precision)
    attention, mlp = _kept_widths(config)
    what = train.activation_checkpointing
    parts = {"none": 0, "attention": attention, "mlp": mlp, "full": attention + mlp + config.hidden_size}
    recomputed = width * tokens * parts[what if isinstance(what, str) else "full"]
    logits = width * min(tokens * config.padded_vocab_size, LOGITS_AT_A_TIME)
    return kept_activation_bytes(config, sequence_length, train, precision, device) + max(logits, recomputed)


def _activation_width(precision: Precision) -> int:
    return 4 if precision == "fp32" else 2


def _kept_widths(config: ModelConfig) -> tuple[int, int]:
    """Numbers per token that attention and the MLP of a block keep, their own inputs to the norm left out."""
    queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
    attention = config.hidden_size + 2 * queries + 2 * keys  # the normed input; q, k, v and attention's output
    attention += queries + keys if config.qk_norm else 0
    return attention, config.hidden_size + (4 if config.mlp == "swiglu" else 2) * config.mlp_width


def _attention_matrices(config: ModelConfig) -> int:
    return 2 * config.hidden_size * (config.num_heads + config.kv_heads) * config.head_width


def _attention_biases(config: ModelConfig) -> int:
    projections = (config.num_heads + 2 * config.kv_heads) * config.head_width if config.attention_bias else 0
    return projections + (config.hidden_size if config.attention_output_bias else 0)


def _mlp_matrices(config: ModelConfig) -> int:
    return (3 if config.mlp == "swiglu" else 2) * config.hidden_size * config.mlp_width


def _mlp_biases(config: ModelConfig) -> int:
    inner = (2 if config.mlp == "swiglu" else 1) * config.mlp_width
    return inner + config.hidden_size if config.mlp_bias else 0
