"""Continues a prompt: greedy or sampled, one token at a time, with keys and values cached."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsllm.model.transformer import KeyValueCache, Transformer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Divides the logits; 0: always the likeliest token (greedy)."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability (Holtzman et al. 2020)."""
    seed: int = 0


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    end_of_text_id: int | None = None,
    document_mask: bool = False,
) -> Iterator[int]:
    """Token ids that continue a prompt, as they come.

    Ends after max_tokens, at the end of the model's context, or with the end-of-text token (which is not yielded).

    Args:
        prompt: at least one token id, and fewer than the model's context has room for
        document_mask: the model was trained so that no token sees beyond an end-of-text: nor does it here
    """
    assert prompt, "a model continues something: give it at least the end-of-text token"
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = KeyValueCache(model.config.num_layers)
    ends = [i for i, token in enumerate(prompt[:-1]) if document_mask and token == end_of_text_id]
    new = list(prompt[ends[-1] + 1 if ends else 0 :])
    for _ in range(min(max_tokens, model.context_length - len(new))):
        logits = model(torch.tensor([new], device=device), cache=cache)[0, -1]  # [vocab_size]
        token = choose_token(logits.float(), sampling, generator)
        if token == end_of_text_id:
            return
        yield token
        if document_mask and new[-1] == end_of_text_id:
            cache = KeyValueCache(model.config.num_layers)  # the token is the first of its document
        new = [token]


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from the logits [vocab_size] of the next."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits, ids = (logits / sampling.temperature).sort(descending=True, stable=True)
    kept = sampling.top_k or len(logits)
    probabilities = torch.softmax(logits[:kept], -1)
    before = probabilities.cumsum(-1) - probabilities  # of the likelier ones; the first is always kept
    probabilities[before >= sampling.top_p] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
