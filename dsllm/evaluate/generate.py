"""Continues a prompt token by token, greedily or by sampling, with cached keys and values."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsllm.errors import CheckpointError
from dsllm.model.transformer import KeyValueCache, Transformer

SMALLEST_TEMPERATURE = 1e-6
"""At it, fp32 logits that differ at all differ by a factor of e or more in probability; below, they would overflow."""
SEEDS = range(-(2**63), 2**64)
"""What torch's generators take."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token."""

    temperature: float = 1.0
    """Divides the logits. 0, or below SMALLEST_TEMPERATURE: always take the most likely token (greedy)."""
    top_k: int = 0
    """Choose among this many of the most likely tokens. 0 (default): among all."""
    top_p: float = 1.0
    """Choose among the most likely tokens that together have this probability (Holtzman et al. 2020)."""
    seed: int = 0
    """In SEEDS."""


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    end_of_text_id: int | Sequence[int] | None = None,
    document_mask: bool = False,
) -> Iterator[int]:
    """Yield the token ids that continue a prompt, one by one.

    Ends after max_tokens, at the end of the model's context, or at the end-of-text token (which is not yielded).

    Args:
        prompt: at least one token id, and fewer than the model's context.
        end_of_text_id: the id that ends a text; of several, the first is the one that ended documents in training.
        document_mask: a token sees only its own document, as in training with data.document_mask.

    Raises:
        CheckpointError: the model's logits are not finite.
    """
    assert prompt, "a prompt has at least one token, for example the end-of-text token"
    all_ends = [end_of_text_id] if isinstance(end_of_text_id, int) else list(end_of_text_id or ())
    end_of_text = all_ends[0] if all_ends else None
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = KeyValueCache(model.config.num_layers)
    ends = [i for i, token in enumerate(prompt[:-1]) if document_mask and token == end_of_text]
    new = list(prompt[ends[-1] + 1 if ends else 0 :])
    for _ in range(min(max_tokens, model.context_length - len(new))):
        logits = model(torch.tensor([new], device=device), cache=cache)[0, -1]  # [vocab_size]
        token = choose_token(logits.float(), sampling, generator)
        if token in all_ends:
            return
        yield token
        if document_mask and new[-1] == end_of_text:
            cache = KeyValueCache(model.config.num_layers)  # `token` starts a new document
        new = [token]


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose one token id by the logits [vocab_size]; -inf: never.

    Raises:
        CheckpointError: a logit is not a number, or infinite.
    """
    if not bool(logits.max() < torch.inf):  # NaN is the largest to max, and compares as false
        raise CheckpointError(
            "the model's logits are not finite: its activations overflow in this precision, or its weights are damaged; "
            "try --precision fp32, or an older checkpoint"
        )
    if sampling.temperature < SMALLEST_TEMPERATURE:
        return int(logits.argmax())
    logits, ids = (logits / sampling.temperature).sort(descending=True, stable=True)
    kept = min(sampling.top_k or len(logits), len(logits))
    probabilities = torch.softmax(logits[:kept], -1)
    before = probabilities.cumsum(-1) - probabilities  # the probability of all more likely tokens
    # The first is always kept: in fp32 a tiny top_p is 0.
    probabilities[1:][before[1:] >= sampling.top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
