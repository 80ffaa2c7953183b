"""Bytes of a micro-batch's activations, by formula."""

from dsllm.config.model import ModelConfig
from dsllm.config.precision import compute_bits
from dsllm.config.train import Precision, TrainConfig

LOGITS_AT_A_TIME = 2**26
"""Logits that the loss computes at a time, in the hidden state's dtype: each chunk costs a pass over the head's gradient."""


def kept_activation_bytes(
    config: ModelConfig, sequence_length: int, train: TrainConfig, precision: Precision, device: str = "cpu"
) -> int:
    """Bytes of one micro-batch's activations that the blocks and the last norm keep between forward and backward pass.

    These are the inputs that each operation saves. Left out are the logits (see `activation_bytes`), masks of dropout,
    one number per token (norms) or per token and head (attention), and the attention weights that the CPU's kernel for
    bf16 keeps (1 to 2 bytes per token, head and key, up to 1024 tokens); fused kernels keep none.

    Args:
        precision: resolved, not auto
        device: "cpu" or "cuda": offloaded activations count on the CPU only
    """
    attention, mlp = _kept_widths(config)
    layers, what = config.num_layers, train.activation_checkpointing
    recomputed_blocks = _recomputed_blocks(train, layers)
    # A branch's input is kept by its norm or by its recomputation. Parallel branches share it.
    inputs = config.hidden_size * (1 if config.parallel_residual else 2)
    block = inputs + (0 if what == "attention" else attention) + (0 if what == "mlp" else mlp)
    kept = recomputed_blocks * config.hidden_size + (layers - recomputed_blocks) * block
    if train.activation_offload and device != "cpu":
        # The input that parallel branches share stays: the branch that is not recomputed keeps it on the device.
        recomputed_branches = layers if what in ("attention", "mlp") and not config.parallel_residual else 0
        kept -= (recomputed_blocks + recomputed_branches) * config.hidden_size
    last_norm = 2 * config.hidden_size  # its input and its output
    return _bytes_per_column(sequence_length, train, precision) * (kept + last_norm)


def activation_bytes(
    config: ModelConfig, sequence_length: int, train: TrainConfig, precision: Precision, device: str = "cpu"
) -> int:
    """An estimate of the most bytes that one micro-batch's activations take at a time.

    Kept activations plus the larger of one chunk of logits and one recomputed part of a block, which are never alive
    together. Arguments as in `kept_activation_bytes`.
    """
    column = _bytes_per_column(sequence_length, train, precision)
    attention, mlp = _kept_widths(config)
    what = train.activation_checkpointing
    parts = {"none": 0, "attention": attention, "mlp": mlp, "full": attention + mlp + config.hidden_size}
    recomputed = column * parts[what if isinstance(what, str) else "full"]
    num_logits = sequence_length * train.micro_batch_sequences * config.padded_vocab_size
    logits = compute_bits(precision) // 8 * min(num_logits, LOGITS_AT_A_TIME)
    return kept_activation_bytes(config, sequence_length, train, precision, device) + max(logits, recomputed)


def _recomputed_blocks(train: TrainConfig, num_layers: int) -> int:
    """Blocks that keep their input only."""
    what = train.activation_checkpointing
    if isinstance(what, int):
        return -(-num_layers // what)  # every what-th, from the first
    return num_layers if what == "full" else 0


def _bytes_per_column(sequence_length: int, train: TrainConfig, precision: Precision) -> int:
    """Bytes of one number per token of a micro-batch."""
    return compute_bits(precision) // 8 * sequence_length * train.micro_batch_sequences


def _kept_widths(config: ModelConfig) -> tuple[int, int]:
    """Numbers per token that attention and the MLP of a block keep, without the inputs of their norms."""
    queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
    attention = config.hidden_size + 2 * queries + 2 * keys  # the normed input; q, k, v and attention's output
    attention += queries + keys if config.qk_norm else 0
    return attention, config.hidden_size + (4 if config.mlp == "swiglu" else 2) * config.mlp_width
