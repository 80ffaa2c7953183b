"""dsllm export: a checkpoint as a Hugging Face folder."""

import argparse
from pathlib import Path

from dsllm.checkpoint.hugging_face_export import DTYPES, Dtype, Export, export_hugging_face
from dsllm.errors import CheckpointError
from dsllm.evaluate.load import SavedModel, find_tokenizer, open_saved, open_tokenizer

OF_PRECISION: dict[str, Dtype] = {"bf16": "bfloat16", "fp16": "float16"}


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        DsllmError: there is no such checkpoint or tokenizer, no Hugging Face architecture holds the model, or the
            folder cannot be written.
    """
    options = _parse(arguments)
    saved = open_saved(options.model, print)
    if saved.is_hugging_face:
        raise CheckpointError(f"{saved.folder}: is a Hugging Face folder already")
    tokenizer = options.tokenizer or find_tokenizer(saved, options.data)
    export = Export(
        config=saved.config,
        context_length=saved.context_length,
        end_of_text_id=open_tokenizer(tokenizer).end_of_text_id,
        dtype=options.dtype or OF_PRECISION.get(saved.precision or "", "float32"),
        shard_bytes=int(options.shard_gb * 1e9),
        tokenizer=None if options.without_tokenizer else tokenizer,
        replace=options.replace,
    )
    files = export_hugging_face(saved.reader, export, options.to)
    _show(saved, files, export, options.to)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsllm export",
        description="Write a model as a folder that transformers' AutoModelForCausalLM and AutoTokenizer load.",
    )
    parser.add_argument("model", type=Path, help="a run directory (its newest checkpoint) or a checkpoint")
    parser.add_argument("--to", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--replace", action="store_true", help="a model that is in the folder already gives way to this one"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: that of the parameters in training")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest weight file, in 10^9 bytes (default 5)")
    parser.add_argument("--data", type=Path, help="prepared directory with the tokenizer; default: the run's")
    parser.add_argument("--tokenizer", type=Path, help="folder of the prepared tokenizer; default: the run's")
    parser.add_argument("--without-tokenizer", action="store_true", help="write the model alone")
    options = parser.parse_args(arguments)
    if options.shard_gb <= 0:
        parser.error(f"--shard-gb must be above 0, but it is {options.shard_gb}")
    return options


def _show(saved: SavedModel, files: list[Path], export: Export, folder: Path) -> None:
    weights = [file for file in files if file.suffix == ".safetensors"]
    size = sum(file.stat().st_size for file in weights)
    print(f"{saved.folder} (step {saved.step:,}) exported to {folder}:")
    print(f"  {size / 1e6:,.1f} MB of {export.dtype} weights in {len(weights)} files")
    print(f"  {', '.join(file.name for file in files if file not in weights)}")
