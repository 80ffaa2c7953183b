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


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes per rank of weights, gradients, master weights and Adam's moments, from the second optimizer step on."""

    after_init: int
    """Before the first step: neither gradients (where they come and go) nor moments exist."""
    while_accumulating: int
    """After the backward pass of a micro-batch that is not the step's last; without accumulation as after_backward."""
    after_backward: int
    """After the last backward pass, before the update."""
    after_step: int
    """Between steps."""

    @property
    def most(self) -> int:
        """The largest of them."""
        return max(self.after_init, self.while_accumulating, self.after_backward, self.after_step)


def model_states(
    num_parameters: int,
    zero_stage: Literal[0, 1, 2, 3],
    precision: Precision,
    data_parallel_size: int,
    fp32_gradients: bool = True,
    accumulation: int = 1,
) -> ModelStates:
    """Model states as DeepSpeed 0.19.8 holds them at each moment of a step.

    Buffers for communication, the activations and what a backward pass holds in between come on top.

    Args:
        precision: a resolved one, not auto
        fp32_gradients: gradients accumulate in fp32 where the parameters are 16-bit
        accumulation: micro-batches per step
    """
    sixteen = precision in ("bf16", "fp16")
    weights, masters, moments = (2, 4, 8) if sixteen else (4, 4, 8)
    gradients = weights  # as backward makes them
    summed = 4 if fp32_gradients or not sixteen else 2

    def held(whole: int, shared: int) -> int:
        return whole * num_parameters + -(-shared * num_parameters // data_parallel_size)

    if zero_stage == 3:  # in fp32 the weights are the masters; the gradients' sum is made at the start and stays
        shared = (weights + masters if sixteen else masters) + summed
        most = held(0, shared + moments)
        return ModelStates(after_init=held(0, shared), while_accumulating=most, after_backward=most, after_step=most)
    if zero_stage == 0:  # in fp32 the weights are the masters
        rest, parts = weights + (masters if sixteen else 0) + moments, 0
        init, summing, summed_up = held(rest - moments, 0), gradients, held(rest + gradients, 0)
    else:  # in fp32 a rank's masters are its part of the weights
        rest, parts = weights, moments + (masters if sixteen else 0)
        init, summing, summed_up = held(weights, parts - moments), gradients, held(rest, parts + summed)
    if zero_stage == 1 and precision == "bf16" and summed == 4:  # BF16_Optimizer keeps a whole fp32 sum on every rank
        rest, init, summed_up = rest + 4, init + 4 * num_parameters, held(rest + 4 + gradients, parts)
    elif zero_stage == 1 and sixteen and summed == 4:  # fp16: the whole fp32 sum lives until the step is over
        summing, summed_up = 4, held(rest + 4, parts)
    adding = summed_up if zero_stage == 2 or accumulation == 1 else held(rest + summing, parts)
    return ModelStates(
        after_init=init, while_accumulating=adding, after_backward=summed_up, after_step=held(rest, parts)
    )


def model_state_bytes(
    num_parameters: int,
    zero_stage: Literal[0, 1, 2, 3],
    precision: Precision,
    data_parallel_size: int,
    fp32_gradients: bool = True,
    accumulation: int = 1,
) -> int:
    """Bytes per rank of weights, gradients, master weights and Adam's two moments, where a step needs most of them.

    Args: as of `model_states`.
    """
    return model_states(num_parameters, zero_stage, precision, data_parallel_size, fp32_gradients, accumulation).most


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Bytes that every rank hands to collectives in one optimizer step.

    The convention: the size of a collective's larger side, which is what an all-reduce reduces, a reduce-scatter takes
    and an all-gather gives. Norms, losses and flags, a few bytes per bucket, are left out.
    """

    all_reduce: int = 0
    reduce_scatter: int = 0
    all_gather: int = 0

    @property
    def handed(self) -> int:
        """All kinds together."""
        return self.all_reduce + self.reduce_scatter + self.all_gather

    def on_wire(self, data_parallel_size: int) -> int:
        """Bytes that each rank sends, and receives, with ring algorithms: (W - 1) / W of what a reduce-scatter or an
        all-gather is handed, and both, one after the other, for an all-reduce (Patarasuk and Yuan 2009)."""
        once = 2 * self.all_reduce + self.reduce_scatter + self.all_gather
        return once * (data_parallel_size - 1) // data_parallel_size


def communication_bytes(
    num_parameters: int,
    zero_stage: int,
    accumulation: int,
    gradient_width: int,
    weight_width: int,
    gathered_per_micro_batch: int | None = None,
) -> Communication:
    """Gradients that are reduced and weights that are gathered in one optimizer step, by DeepSpeed 0.19.8's ZeRO.

    Stages 0 and 1 reduce once a step, stages 2 and 3 once in every micro-batch; stages 1 and 2 gather the updated
    weights once, stage 3 gathers what is not persistent in every micro-batch. All reduce whole buckets by all-reduce,
    stage 3 by reduce-scatter; `reduce_scatter: true` at stages 1 and 2 says otherwise, but calls all-reduce too.

    Args:
        accumulation: micro-batches of a rank per step
        gradient_width: bytes per gradient, as communicated
        weight_width: bytes per weight, as the layers see it
        gathered_per_micro_batch: ZeRO-3: elements; nothing: all of them once. What `stage3_param_persistence_threshold`
            keeps whole is gathered once a step; a model larger than both `stage3_max_live_parameters` and
            `stage3_max_reuse_distance` is gathered up to twice in every micro-batch, for the backward pass again
    """
    gradients, weights = num_parameters * gradient_width, num_parameters * weight_width
    if zero_stage == 0:
        return Communication(all_reduce=gradients)
    if zero_stage < 3:
        return Communication(all_reduce=gradients * (accumulation if zero_stage == 2 else 1), all_gather=weights)
    gathered = num_parameters if gathered_per_micro_batch is None else gathered_per_micro_batch
    once = max(0, num_parameters - gathered)
    return Communication(
        reduce_scatter=accumulation * gradients, all_gather=(accumulation * gathered + once) * weight_width
    )


def parameter_sizes(config: ModelConfig, context_length: int) -> list[int]:
    """Elements of every parameter, in no particular order; their sum is `parameter_count(...).total`."""
    width, inner = config.hidden_size, config.mlp_width
    queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
    norm = [width] * (2 if config.norm == "layernorm" else 1)
    layer = [width * queries, width * keys, width * keys, queries * width, *norm, *norm]
    layer += [width * inner] * (3 if config.mlp == "swiglu" else 2)
    layer += [queries, keys, keys] if config.attention_bias else []
    layer += [width] if config.attention_output_bias else []
    layer += [*[inner] * (2 if config.mlp == "swiglu" else 1), width] if config.mlp_bias else []
    layer += [config.head_width] * 2 if config.qk_norm else []
    vocabulary = [config.padded_vocab_size * width] * (1 if config.tie_embeddings else 2)
    positions = [context_length * width] if config.positions == "learned" else []
    return [*vocabulary, *positions, *norm, *layer * config.num_layers]


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
