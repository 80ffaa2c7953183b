"""dsllm generate: continue a prompt."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from dsllm.config.train import PRECISIONS, Precision
from dsllm.data.tokenizer import Tokenizer
from dsllm.engine.processes.device import choose_device, set_up_process
from dsllm.errors import CheckpointError
from dsllm.evaluate.generate import Sampling, generate
from dsllm.evaluate.load import find_tokenizer, load_model, open_saved, open_tokenizer

REPLACEMENT = "\ufffd"
"""What stands for bytes that are not a whole character yet."""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        DsllmError: there is no such model or tokenizer, or the prompt leaves no room in the context.
    """
    options = _parse(arguments)
    set_up_process(1)
    device = choose_device(0)
    saved = open_saved(options.model, print)
    tokenizer = open_tokenizer(options.tokenizer or find_tokenizer(saved, options.data), options.end_of_text)
    if tokenizer.vocab_size > (saved.config.vocab_size or 0):
        raise CheckpointError(
            f"{saved.folder}: knows {saved.config.vocab_size} token ids, the tokenizer has {tokenizer.vocab_size}: "
            "it is another model's"
        )
    # In training every document follows an end-of-text token, so a prompt does too; with a document mask it is not seen.
    prompt = [tokenizer.end_of_text_id, *tokenizer.encode(options.prompt)]
    if len(prompt) >= saved.context_length:
        raise CheckpointError(
            f"the prompt has {len(prompt)} tokens, the model's context {saved.context_length}: shorten the prompt"
        )
    default: Precision = "fp32" if device.type == "cpu" else "bf16"
    model = load_model(saved, options.precision or default, device)
    for number in range(options.samples):
        sampling = Sampling(
            temperature=0.0 if options.greedy else options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed + number,
        )
        print(options.prompt, end="")
        tokens = generate(model, prompt, options.max_tokens, sampling, tokenizer.end_of_text_id, saved.document_mask)
        _print_text(tokenizer, tokens)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dsllm generate", description="Continue a prompt.")
    parser.add_argument("model", type=Path, help="a run directory, a checkpoint or a Hugging Face folder")
    parser.add_argument("--prompt", default="", help="what to continue; default: the start of a document")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens to add at most (default 200)")
    parser.add_argument("--samples", type=int, default=1, help="continuations, each with the next seed (default 1)")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1 safer, above 1 bolder (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest; 0: among all (default)")
    parser.add_argument("--top-p", type=float, default=0.95, help="... that together have this probability (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: fp32 on CPU, bf16 on GPU")
    parser.add_argument("--data", type=Path, help="prepared directory with the tokenizer; default: the run's")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, .model or folder; default: the model's own")
    parser.add_argument("--end-of-text", help="the token that ends a text; default: as the tokenizer says")
    options = parser.parse_args(arguments)
    for name, fits in [
        ("max_tokens", options.max_tokens >= 0),
        ("samples", options.samples >= 1),
        ("temperature", options.temperature >= 0),
        ("top_k", options.top_k >= 0),
        ("top_p", 0 < options.top_p <= 1),
    ]:
        if not fits:
            parser.error(f"--{name.replace('_', '-')} cannot be {getattr(options, name)}")
    return options


def _print_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> None:
    """Print tokens as they come; the bytes of a character that is not complete wait for the rest of it."""
    ids: list[int] = []
    printed = 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith(REPLACEMENT):
            print(text[printed:], end="", flush=True)
            printed = len(text)
    print(tokenizer.decode(ids)[printed:] if ids else "", flush=True)
