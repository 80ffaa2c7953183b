"""dsllm evaluate: loss, perplexity and bits per byte on the held-out text."""

import argparse
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsllm.cli.output import Report, add_json_option, check_writable, json_report, write_json
from dsllm.cli.terminal import Output, status_line
from dsllm.config.train import PRECISIONS, Precision
from dsllm.errors import CheckpointError, DataError, OutputError
from dsllm.files import sha256_of_file
from dsllm.untrusted_files import UntrustedFileError, read_json

if TYPE_CHECKING:  # imported when the command runs
    import torch

    from dsllm.batches import MicroBatch
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
    from dsllm.evaluate.load import open_saved
    from dsllm.evaluate.model_tokenizer import check_same_tokenizer

    set_up_process(1)
    device = choose_device(0)
    output = Output()
    saved = open_saved(options.model, output)
    directory = _data_directory(saved, options.data)
    manifest = load_manifest(directory)
    check_shards(directory, manifest)
    check_tokenizer(directory, manifest)
    _check_vocabulary(saved, directory, manifest)
    unknown = check_same_tokenizer(saved, directory, manifest)
    if unknown is not None:
        output(unknown)
    check_held_out(directory, manifest, output)
    windows = _windows(saved, directory, manifest, options, output)
    precision: Precision = options.precision or saved.precision or "fp32"
    if precision == "fp16" and device.type == "cpu":
        precision = "fp32"  # CPUs have no fp16
    path = _writable_output(saved, directory, options, output)
    start = time.monotonic()
    result, by_source = _measure(saved, windows, precision, device)
    baselines = _baselines(directory, output)
    document = _document(saved, result, baselines) | {
        "sources": {name: _numbers(part) for name, part in by_source.items()},
        "data": str(directory),
        "sequence_length": windows.length,
        "stride": options.stride or windows.length,
        "max_sequences": options.max_sequences,
        "document_mask": saved.document_mask,
        "precision": precision,
        "seconds": round(time.monotonic() - start, 2),
    }
    if path is not None:
        write_json(path, document)
    _show(saved, result, by_source, baselines, output)
    if path is not None:
        output(f"written to {path}")
    report(document)
    return 0


def _data_directory(saved: "SavedModel", given: Path | None) -> Path:
    if given is None and saved.is_hugging_face:
        raise DataError(f"{saved.folder}: is a Hugging Face folder: give the prepared held-out text with --data")
    return given or saved.data_directory or Path()


def _check_vocabulary(saved: "SavedModel", directory: Path, manifest: "Manifest") -> None:
    needed, there = manifest.tokenizer.vocab_size, saved.config.vocab_size or 0
    if needed > there:
        raise CheckpointError(
            f"{saved.folder}: knows {there} token ids, the text in {directory} was made with {needed}"
        )


@dataclass(frozen=True)
class _Windows:
    """The held-out text, in windows."""

    length: int
    """Tokens of a window."""
    parts: Mapping[str, "ValidationBatches"]
    """By source; of a sample over all sources, one part."""


def _windows(
    saved: "SavedModel", directory: Path, manifest: "Manifest", options: argparse.Namespace, output: Output
) -> _Windows:
    """One pass over the held-out text of each source.

    Raises:
        CheckpointError: the window is longer than the model's context.
        DataError: no text is held out.
    """
    length = options.sequence_length or saved.sequence_length or saved.context_length
    if length > saved.context_length:
        raise CheckpointError(f"--sequence-length {length} is beyond the model's context of {saved.context_length}")
    if options.stride is not None and options.stride > length:
        raise CheckpointError(f"--stride {options.stride} is beyond the {length} tokens of a window")
    first = _first_context(saved, manifest, output)
    # A sample is spread over all sources together.
    groups = [manifest.sources] if options.max_sequences else [(s,) for s in manifest.sources]
    parts = {}
    for sources in groups:
        part = replace(manifest, sources=sources)
        longest = max(sum(record.num_tokens for record in source.validation) for source in sources)
        if longest:
            parts[sources[0].name] = _pass(directory, part, min(length, longest), first, saved, options)
    if not parts:
        raise DataError(f"{directory}: no text is held out: set data.validation_share above 0 and prepare again")
    return _Windows(length, parts)


def _pass(
    directory: Path,
    manifest: "Manifest",
    length: int,
    first: int | None,
    saved: "SavedModel",
    options: argparse.Namespace,
) -> "ValidationBatches":
    """One pass in windows of `length` tokens, which is at most what the longest source has: no window is filled up."""
    from dsllm.data.validation import ValidationBatches

    return ValidationBatches(
        directory,
        manifest,
        sequence_length=length,
        micro_batch_sequences=max(1, TOKENS_PER_BATCH // length),
        max_sequences=options.max_sequences,
        stride=None if options.stride is None else min(options.stride, length),
        document_mask=saved.document_mask,
        first_context_id=first,
        trim=True,
    )


def _first_context(saved: "SavedModel", manifest: "Manifest", output: Output) -> int | None:
    """What the first document of a source follows, for a model whose documents begin with a token that the data's do not."""
    from dsllm.evaluate.model_tokenizer import begin_of_text_of

    begin = begin_of_text_of(saved)
    if begin is None or manifest.settings.get("tokenizer", {}).get("begin_of_text") is not None:
        return None
    token, index = begin
    if index == manifest.tokenizer.end_of_text_id:
        return None
    output(
        f"the model's texts begin with {token}, the documents of this data do not: only the first of each source follows it "
        f"here. Prepare them with tokenizer.begin_of_text: {token!r} for the loss that the model was trained for"
    )
    return index


def _measure(
    saved: "SavedModel", windows: _Windows, precision: Precision, device: "torch.device"
) -> tuple["HeldOutLoss", dict[str, "HeldOutLoss"]]:
    """The loss over all of the text, and that of each source.

    Raises:
        CheckpointError: a weight or the loss is not finite.
    """
    from dsllm.evaluate.load import check_finite, load_model
    from dsllm.evaluate.perplexity import joined, validation_loss

    num_batches = sum(len(part) for part in windows.parts.values())
    with status_line() as status:
        status(f"loading {saved.folder}")
        model = load_model(saved, precision, device)
        check_finite(saved, model)
        progress = _Progress(status, num_batches)
        found = {
            name: validation_loss(model, _Counted(batches, progress), device) for name, batches in windows.parts.items()
        }
    result = next(iter(found.values())) if len(found) == 1 else joined(list(found.values()))
    if not math.isfinite(result.loss):
        raise CheckpointError(
            f"{saved.folder}: its loss is {result.loss} in {precision}: its activations overflow; try --precision fp32, or an "
            "older checkpoint"
        )
    return result, found if len(found) > 1 else {}


class _Progress:
    """Shows how many micro-batches are done, and how long the rest takes."""

    def __init__(self, status: Callable[[str], None], num_batches: int):
        self._status = status
        self._num_batches = num_batches
        self._done = 0
        self._start = time.monotonic()

    def step(self) -> None:
        """Count a micro-batch that was given out."""
        left = ""
        if self._done:
            seconds = (time.monotonic() - self._start) / self._done * (self._num_batches - self._done)
            left = f", {seconds:,.0f} s left"
        self._done += 1
        self._status(f"evaluating: micro-batch {self._done:,} of {self._num_batches:,}{left}")


@dataclass(frozen=True)
class _Counted:
    """Micro-batches that count their progress."""

    batches: "ValidationBatches"
    progress: _Progress

    @property
    def text_bytes(self) -> int | None:
        """UTF-8 bytes of the documents."""
        return self.batches.text_bytes

    def __iter__(self) -> "Iterator[MicroBatch]":
        for batch in self.batches:
            self.progress.step()
            yield batch


def _baselines(directory: Path, output: Output) -> dict[str, float]:
    """What the data card compares with; empty where there is no card, or a damaged one, which is reported."""
    path = directory / "data_card.json"
    try:
        baselines = read_json(path)["baselines"]
        return {key: value for key, value in baselines.items() if type(value) in (int, float)}
    except FileNotFoundError:
        return {}
    except (OSError, UntrustedFileError, KeyError, TypeError, AttributeError) as error:
        output(f"{path}: shows no baselines: it cannot be read ({error})")
        return {}


def _show(
    saved: "SavedModel",
    result: "HeldOutLoss",
    by_source: Mapping[str, "HeldOutLoss"],
    baselines: Mapping[str, float],
    output: Output,
) -> None:
    step = "" if saved.step is None else f" (step {saved.step:,})"
    size = "" if result.text_bytes is None else f" of {result.text_bytes:,} bytes of text"
    output(f"{saved.folder}{step} on {result.num_tokens:,} held-out tokens{size}:")
    output(f"  loss           {result.loss:.4f} nats per token")
    output(f"  perplexity     {result.perplexity:.3f}")
    if result.bits_per_byte is not None:
        others = [f"{name} {baselines[key]:.3f}" for key, name in BASELINES.items() if key in baselines]
        compared = f"   (compare {', '.join(others)})" if others else ""
        output(f"  bits per byte  {result.bits_per_byte:.4f}{compared}")
    for name, part in by_source.items():
        bits = "" if part.bits_per_byte is None else f", {part.bits_per_byte:.4f} bits per byte"
        output(f"  {name}: loss {part.loss:.4f}{bits}, {part.num_tokens:,} tokens")


def _document(saved: "SavedModel", result: "HeldOutLoss", baselines: Mapping[str, float]) -> dict[str, Any]:
    return {
        "model": str(saved.folder),
        "step": saved.step,
        **_numbers(result),
        "baselines": dict(baselines),
    }


def _numbers(result: "HeldOutLoss") -> dict[str, Any]:
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "num_tokens": result.num_tokens,
        "text_bytes": result.text_bytes,
    }


def _writable_output(saved: "SavedModel", directory: Path, options: argparse.Namespace, output: Output) -> Path | None:
    """The file for the result, after a check that it can be written; None: there is none.

    Raises:
        OutputError: the file that was asked for cannot be written. The default one is only reported.
    """
    path = options.output or _default_output(saved, directory)
    if path is None:
        return None
    try:
        _make_writable(path)
    except OutputError as error:
        if options.output is not None:
            raise
        output(f"the result is shown only, not kept: {error} (--output FILE writes it elsewhere)")
        return None
    return path


def _default_output(saved: "SavedModel", directory: Path) -> Path | None:
    """The run's eval/step-N.json for its own data; that of other data has its name, and a part of its manifest's hash."""
    if saved.run_directory is None:
        return None
    name = f"step-{saved.step:08d}"
    own = saved.data_directory
    if own is None or directory.resolve() != own.resolve():
        digest = sha256_of_file(directory / "manifest.json")[:8]
        name += f"-{re.sub('[^A-Za-z0-9._-]', '_', directory.resolve().name)}-{digest}"
    return saved.run_directory / "eval" / f"{name}.json"


def _make_writable(path: Path) -> None:
    """Make the folder of the result, and check before the evaluation that the file can be written after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be made: {error.strerror or error}") from error
    check_writable(path)
