"""Whether a run that starts from a model has that model's tokenizer: with another one, its weights are about other tokens."""

from pathlib import Path
from typing import Any

from dsllm.data.manifest import load_manifest
from dsllm.errors import DataError
from dsllm.run_directory import TOKENIZER
from dsllm.untrusted_files import UntrustedFileError, read_json


def other_tokenizer(source: Path, data_directory: Path) -> str | None:
    """What a user should know about the tokenizer of prepared data, for a run that starts from a model.

    Returns:
        None: the token ids mean the same as in the model's tokenizer, or that tokenizer is not there to compare
    """
    try:
        own = _tokens(data_directory / load_manifest(data_directory).tokenizer.directory)
    except DataError:
        return None
    # a run, its checkpoint, a Hugging Face folder
    for folder in (source / TOKENIZER, source.parent.parent / TOKENIZER, source):
        models = _tokens(folder)
        if own and models:
            common = own.keys() & models.keys()
            num_other = sum(own[index] != models[index] for index in common)
            if not num_other:
                return None
            return (
                f"{num_other:,} of {len(common):,} token ids of {data_directory} mean other tokens than in {folder}, so the "
                "weights know nothing about them. To train with that tokenizer, set tokenizer.kind: pretrained, "
                f"tokenizer.path: {folder} and another data.directory"
            )
    return None


def _tokens(folder: Path) -> dict[int, str]:
    """The token of each id in a folder's tokenizer.json; empty: there is none that can be read."""
    try:
        content = read_json(folder / "tokenizer.json")
        vocabulary: Any = content["model"]["vocab"]
        found = (
            {index: token for token, index in vocabulary.items()}
            if isinstance(vocabulary, dict)
            else {index: entry[0] for index, entry in enumerate(vocabulary)}
        )
        return found | {entry["id"]: entry["content"] for entry in content.get("added_tokens", [])}
    except (OSError, UntrustedFileError, LookupError, TypeError, AttributeError):
        return {}
