"""dsllm export: a checkpoint as a Hugging Face folder."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsllm.cli.output import Report, add_json_option, json_report
from dsllm.errors import CheckpointError

if TYPE_CHECKING:  # imported when the command runs
    from dsllm.checkpoint.hugging_face_export import Dtype
    from dsllm.evaluate.load import SavedModel

DTYPES: "tuple[Dtype, ...]" = ("float32", "bfloat16", "float16")
"""The keys of DTYPES in dsllm.checkpoint.hugging_face_export, which imports torch."""
OF_PRECISION: "dict[str, Dtype]" = {"bf16": "bfloat16", "fp16": "float16"}
"""The dtype of the parameters in training, where it is not float32."""


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        DsllmError: there is no such checkpoint or tokenizer, no Hugging Face architecture matches the model, or the
            folder cannot be written.
    """
    options = _parse(arguments)
    with json_report(options.json) as report:
        return _run(options, report)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsllm export",
        description="Write a model as a folder that transformers' AutoModelForCausalLM and AutoTokenizer load.",
    )
    parser.add_argument("model", type=Path, help="a run directory (its newest checkpoint) or a checkpoint")
    parser.add_argument("--to", type=Path, required=True, help="folder to write: one that does not exist, or is empty")
    parser.add_argument(
        "--replace", action="store_true", help="replace an exported model that is in the folder already"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the parameters in training")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest weight file, in 10^9 bytes (default 5)")
    parser.add_argument("--data", type=Path, help="prepared directory with the tokenizer; default: the run's")
    parser.add_argument("--tokenizer", type=Path, help="folder of the prepared tokenizer; default: the run's")
    parser.add_argument("--without-tokenizer", action="store_true", help="write the model without its tokenizer")
    add_json_option(parser, "folder, files, bytes and dtype")
    options = parser.parse_args(arguments)
    if not 0 < options.shard_gb < math.inf:  # NaN is not
        parser.error(f"--shard-gb must be a finite number above 0, but it is {options.shard_gb}")
    return options


def _run(options: argparse.Namespace, report: Report) -> int:
    from dsllm.checkpoint.hugging_face_export import Export, export_hugging_face
    from dsllm.evaluate.load import open_saved
    from dsllm.evaluate.model_tokenizer import find_tokenizer, open_tokenizer

    saved = open_saved(options.model, print)
    if saved.is_hugging_face:
        raise CheckpointError(f"{saved.folder}: is a Hugging Face folder already")
    tokenizer = options.tokenizer or find_tokenizer(saved, options.data)
    opened = open_tokenizer(tokenizer)
    dtype: Dtype = options.dtype or OF_PRECISION.get(saved.precision or "", "float32")
    export = Export(
        config=saved.config,
        context_length=saved.context_length,
        end_of_text_id=opened.end_of_text_id,
        begin_of_text_id=opened.begin_of_text_id,
        dtype=dtype,
        shard_bytes=int(options.shard_gb * 1e9),
        tokenizer=None if options.without_tokenizer else tokenizer,
        replace=options.replace,
    )
    files = export_hugging_face(saved.reader, export, options.to)
    result = _result(saved, files, dtype, options.to)
    _show(result)
    report(result)
    return 0


def _result(saved: "SavedModel", files: list[Path], dtype: str, folder: Path) -> dict[str, Any]:
    sizes = [{"name": file.name, "bytes": file.stat().st_size} for file in files]
    return {
        "model": str(saved.folder),
        "step": saved.step,
        "folder": str(folder),
        "dtype": dtype,
        "files": sizes,
        "bytes": sum(file["bytes"] for file in sizes),
    }


def _show(result: dict[str, Any]) -> None:
    weights = [file for file in result["files"] if file["name"].endswith(".safetensors")]
    others = [file["name"] for file in result["files"] if file not in weights]
    size = sum(file["bytes"] for file in weights)
    print(f"{result['model']} (step {result['step']:,}) exported to {result['folder']}:")
    print(f"  {size / 1e6:,.1f} MB of {result['dtype']} weights in {len(weights)} file{'s' * (len(weights) != 1)}")
    print(f"  {', '.join(others)}")
