"""dsllm evaluate: loss, perplexity and bits per byte on the held-out text."""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsllm.cli.output import Report, add_json_option, check_writable, json_report, write_json
from dsllm.config.train import PRECISIONS, Precision
from dsllm.errors import CheckpointError, DataError, OutputError

if TYPE_CHECKING:  # imported when the command runs
    from dsllm.data.manifest import Manifest
    from dsllm.data.validation import ValidationBatches
    from dsllm.evaluate.load import SavedModel
    from dsllm.evaluate.perplexity import HeldOutLoss

BASELINES = {"xz_9_bits_per_byte": "xz -9", "gzip_9_bits_per_byte": "gzip -9", "unigram_bits_per_byte": "byte unigram"}
TOKENS_PER_BATCH = 8192


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        DsllmError: there is no such model or data, or they do not belong together.
    """
    options = _parse(arguments)
    with json_report(options.json) as report:
        return _run(options, report)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsllm evaluate",
        description="Loss, perplexity and bits per byte of a model on held-out text, every token predicted once.",
    )
    parser.add_argument("model", type=Path, help="a run directory, a checkpoint or a Hugging Face folder")
    parser.add_argument("--data", type=Path, help="prepared directory with the held-out text; default: the run's")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: the one it was trained in; fp32 if unknown")
    parser.add_argument("--sequence-length", type=int, help="tokens per window; default: as in training")
    parser.add_argument("--stride", type=int, help="counted tokens per window; fewer give each more context")
    parser.add_argument("--max-sequences", type=int, help="use this many windows, spread evenly; default: all")
    parser.add_argument(
        "--output", type=Path, help="JSON file to write; default: eval/step-N.json in the run directory"
    )
    add_json_option(parser, "the same result")
    options = parser.parse_args(arguments)
    for name in ("sequence_length", "stride", "max_sequences"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be above 0, but it is {value}")
    return options


def _run(options: argparse.Namespace, report: Report) -> int:
    from dsllm.data.manifest import check_shards, check_tokenizer, load_manifest
    from dsllm.data.verify import check_held_out
    from dsllm.engine.processes.device import choose_device, set_up_process
    from dsllm.evaluate.load import load_model, open_saved
    from dsllm.evaluate.perplexity import validation_loss

    set_up_process(1)
    device = choose_device(0)
    saved = open_saved(options.model, print)
    directory = _data_directory(saved, options.data)
    manifest = load_manifest(directory)
    check_shards(directory, manifest)
    check_tokenizer(directory, manifest)
    check_held_out(directory, manifest, print)
    batches = _batches(saved, directory, manifest, options)
    precision: Precision = options.precision or saved.precision or "fp32"
    if precision == "fp16" and device.type == "cpu":
        precision = "fp32"  # CPUs have no fp16
    path = options.output or _default_output(saved)
    if path is not None:
        _make_writable(path)
    start = time.monotonic()
    result = validation_loss(load_model(saved, precision, device), batches, device)
    card = directory / "data_card.json"
    baselines = json.loads(card.read_text(encoding="utf-8")).get("baselines", {}) if card.is_file() else {}
    _show(saved, result, baselines)
    document = _document(saved, result, baselines) | {
        "data": str(directory),
        "sequence_length": batches.sequence_length,
        "stride": batches.stride or batches.sequence_length,
        "max_sequences": batches.max_sequences,
        "document_mask": batches.document_mask,
        "precision": precision,
        "seconds": round(time.monotonic() - start, 2),
    }
    if path is not None:
        write_json(path, document)
        print(f"written to {path}")
    report(document)
    return 0


def _data_directory(saved: "SavedModel", given: Path | None) -> Path:
    if given is None and saved.is_hugging_face:
        raise DataError(f"{saved.folder}: is a Hugging Face folder: give the prepared held-out text with --data")
    return given or saved.data_directory or Path()


def _batches(
    saved: "SavedModel", directory: Path, manifest: "Manifest", options: argparse.Namespace
) -> "ValidationBatches":
    """One pass over the held-out text.

    Raises:
        CheckpointError: the tokenizer has more ids than the model, or the window is longer than the model's context.
        DataError: no text is held out.
    """
    from dsllm.data.validation import ValidationBatches

    needed, there = manifest.tokenizer.vocab_size, saved.config.vocab_size or 0
    if needed > there:
        raise CheckpointError(
            f"{saved.folder}: knows {there} token ids, the text in {directory} was made with {needed}"
        )
    length = options.sequence_length or saved.sequence_length or saved.context_length
    if length > saved.context_length:
        raise CheckpointError(f"--sequence-length {length} is beyond the model's context of {saved.context_length}")
    if options.stride is not None and options.stride > length:
        raise CheckpointError(f"--stride {options.stride} is beyond the {length} tokens of a window")
    batches = ValidationBatches(
        directory,
        manifest,
        sequence_length=length,
        micro_batch_sequences=max(1, TOKENS_PER_BATCH // length),
        max_sequences=options.max_sequences,
        stride=options.stride,
        document_mask=saved.document_mask,
    )
    if batches.num_tokens == 0:
        raise DataError(f"{directory}: no text is held out: set data.validation_share above 0 and prepare again")
    return batches


def _show(saved: "SavedModel", result: "HeldOutLoss", baselines: Mapping[str, Any]) -> None:
    step = "" if saved.step is None else f" (step {saved.step:,})"
    size = "" if result.text_bytes is None else f" of {result.text_bytes:,} bytes of text"
    print(f"{saved.folder}{step} on {result.num_tokens:,} held-out tokens{size}:")
    print(f"  loss           {result.loss:.4f} nats per token")
    print(f"  perplexity     {result.perplexity:.3f}")
    if result.bits_per_byte is not None:
        others = [f"{name} {baselines[key]:.3f}" for key, name in BASELINES.items() if key in baselines]
        compared = f"   (compare {', '.join(others)})" if others else ""
        print(f"  bits per byte  {result.bits_per_byte:.4f}{compared}")


def _document(saved: "SavedModel", result: "HeldOutLoss", baselines: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": str(saved.folder),
        "step": saved.step,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "num_tokens": result.num_tokens,
        "text_bytes": result.text_bytes,
        "baselines": dict(baselines),
    }


def _default_output(saved: "SavedModel") -> Path | None:
    return None if saved.run_directory is None else saved.run_directory / "eval" / f"step-{saved.step:08d}.json"


def _make_writable(path: Path) -> None:
    """Make the folder of the result, and check before the evaluation that the file can be written after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be made: {error.strerror or error}") from error
    check_writable(path)
