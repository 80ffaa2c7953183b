"""dsllm generate: continue a prompt."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsllm.cli.output import Report, add_json_option, json_report
from dsllm.cli.terminal import Output, status_line
from dsllm.config.train import PRECISIONS, Precision
from dsllm.errors import CheckpointError

if TYPE_CHECKING:  # imported when the command runs
    from dsllm.data.tokenizer import Tokenizer
    from dsllm.evaluate.load import SavedModel
    from dsllm.model.transformer import Transformer

SEEDS = range(-(2**63), 2**64)
"""As in evaluate/generate.py, which imports torch."""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        DsllmError: there is no such model or tokenizer, or the prompt leaves no room in the context.
    """
    options = _parse(arguments)
    with json_report(options.json) as report:
        return _run(options, report)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dsllm generate", description="Continue a prompt.")
    parser.add_argument("model", type=Path, help="a run directory, a checkpoint or a Hugging Face folder")
    parser.add_argument("--prompt", default="", help="what to continue; default: the start of a document")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens to add at most (default 200)")
    parser.add_argument(
        "--samples", type=int, default=1, help="number of continuations, each with the next seed (default 1)"
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1 safer, above 1 bolder (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k likeliest; 0: among all (default)")
    parser.add_argument("--top-p", type=float, default=0.95, help="... that together have this probability (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default 0)")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: fp32 on CPU, bf16 on GPU")
    parser.add_argument("--data", type=Path, help="prepared directory with the tokenizer; default: the run's")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, .model or folder; default: the model's own")
    parser.add_argument("--end-of-text", help="the token that ends a text; default: the one that the tokenizer names")
    parser.add_argument("--begin-of-text", help="the token that a text begins with; default: as the model was trained")
    add_json_option(parser, "prompt, texts, tokens and seeds")
    options = parser.parse_args(arguments)
    last_seed = options.seed + options.samples - 1
    for name, fits, allowed in [
        ("max_tokens", options.max_tokens >= 0, "0 or more"),
        ("samples", options.samples >= 1, "1 or more"),
        ("temperature", options.temperature >= 0, "0 or more"),
        ("top_k", options.top_k >= 0, "0 or more"),
        ("top_p", 0 < options.top_p <= 1, "above 0 and at most 1"),
        (
            "seed",
            options.seed in SEEDS and last_seed in SEEDS,
            f"from {SEEDS[0]} to {SEEDS[-1]}, for the last sample too",
        ),
    ]:
        if not fits:
            parser.error(f"--{name.replace('_', '-')} cannot be {getattr(options, name)}: it must be {allowed}")
    for name in ("prompt", "end_of_text", "begin_of_text"):
        _check_text(parser, f"--{name.replace('_', '-')}", getattr(options, name))
    return options


def _check_text(parser: argparse.ArgumentParser, option: str, text: str | None) -> None:
    """Refuse words that are not UTF-8: Python stands surrogates for their bytes, which no tokenizer takes."""
    wrong = [(place, c) for place, c in enumerate(text or "", 1) if 0xD800 <= ord(c) < 0xE000]
    if wrong:
        place, character = wrong[0]
        byte = f"byte 0x{ord(character) - 0xDC00:02x}" if 0xDC80 <= ord(character) < 0xDD00 else "half a character"
        parser.error(f"{option} is not UTF-8 text: {byte} at character {place}; convert it to UTF-8 first")


def _run(options: argparse.Namespace, report: Report) -> int:
    from dsllm.engine.processes.device import choose_device, set_up_process
    from dsllm.evaluate.load import check_finite, load_model, open_saved
    from dsllm.evaluate.model_tokenizer import find_tokenizer, open_tokenizer_of

    set_up_process(1)
    device = choose_device(0)
    output = Output()
    saved = open_saved(options.model, output)
    folder = options.tokenizer or find_tokenizer(saved, options.data)
    tokenizer = open_tokenizer_of(saved, folder, options.end_of_text, options.begin_of_text)
    if tokenizer.vocab_size > (saved.config.vocab_size or 0):
        raise CheckpointError(
            f"{saved.folder}: has {saved.config.vocab_size} token ids, the tokenizer {tokenizer.vocab_size}: "
            "it belongs to another model"
        )
    # In training every document follows an end-of-text token, or begins with a token of its own, so a prompt does too.
    prompt = [tokenizer.prompt_start, *tokenizer.encode(options.prompt)]
    if len(prompt) >= saved.context_length:
        raise CheckpointError(
            f"the prompt has {len(prompt)} tokens, the model's context {saved.context_length}: shorten the prompt"
        )
    default: Precision = "fp32" if device.type == "cpu" else "bf16"
    precision = options.precision or default
    with status_line() as status:
        status(f"loading {saved.folder}")
        model = load_model(saved, precision, device)
        check_finite(saved, model)
    samples = _samples(_Continuation(saved, model, tokenizer, prompt), options, output)
    report(
        {
            "model": str(saved.folder),
            "step": saved.step,
            "precision": precision,
            "prompt": options.prompt,
            "prompt_tokens": prompt,
            "samples": samples,
        }
    )
    return 0


@dataclass(frozen=True)
class _Continuation:
    """What every sample continues."""

    saved: "SavedModel"
    model: "Transformer"
    tokenizer: "Tokenizer"
    prompt: list[int]


def _samples(what: _Continuation, options: argparse.Namespace, output: Output) -> list[dict[str, Any]]:
    """Print every sample as it comes; returns them for --json."""
    from dsllm.evaluate.generate import Sampling, generate
    from dsllm.evaluate.model_tokenizer import end_ids
    from dsllm.evaluate.streaming import TextStream

    samples: list[dict[str, Any]] = []
    ends = end_ids(what.saved, what.tokenizer)
    room = min(options.max_tokens, what.saved.context_length - len(what.prompt))
    for seed in range(options.seed, options.seed + options.samples):
        temperature = 0.0 if options.greedy else options.temperature
        sampling = Sampling(temperature=temperature, top_k=options.top_k, top_p=options.top_p, seed=seed)
        stream = TextStream(what.tokenizer, what.prompt)
        ids: list[int] = []
        text = ""
        output(options.prompt, end="")
        for token in generate(what.model, what.prompt, room, sampling, ends, what.saved.document_mask):
            ids.append(token)
            new = stream.add(token)
            output(new, end="")
            text += new
            if output.reader_left and not options.json:
                return samples
        rest = stream.end()
        output(rest)
        ended = "end_of_text" if len(ids) < room else "max_tokens" if room == options.max_tokens else "context"
        if not ids and room:
            print(f"sample {len(samples) + 1}: the model ended the text at once", file=sys.stderr)
        samples.append({"seed": seed, "tokens": ids, "text": text + rest, "ended": ended})
    return samples
