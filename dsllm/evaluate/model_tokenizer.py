"""The tokenizer of a saved model: where it is, what begins and ends a text, and whether prepared data is made with it."""

from pathlib import Path

import numpy as np

from dsllm.data.manifest import FILE_NAME as DATA_MANIFEST
from dsllm.data.manifest import Manifest, check_tokenizer, load_manifest
from dsllm.data.shards import Shard
from dsllm.data.tokenizer import INFO_FILE, Tokenizer
from dsllm.data.tokenizer_files import NamedTokens, load_tokenizer, named_begin_of_text, named_tokens
from dsllm.data.tokenizer_folder import check_same, hash_of_tokenizer
from dsllm.errors import CheckpointError, DataError
from dsllm.evaluate.load import SavedModel
from dsllm.untrusted_files import UntrustedFileError, read_json

SAMPLE = (
    "The quick brown fox: 12345.67 + x_1 == y[2]\n\n\tdef f(a):\n        return  a  # naïve café, 日本語, Привет, 🙂\n"
)
SAMPLE_TOKENS = 4000
"""Of each source's held-out text, compared in addition to SAMPLE."""


def find_tokenizer(saved: SavedModel, data: Path | None = None) -> Path:
    """Folder of the tokenizer that a model was trained with.

    That of the prepared data, if given; otherwise the one in the Hugging Face folder, in the run directory, or in the data
    that the run was trained on.

    Raises:
        DataError: there is none, or it is not the one that the model was trained with.
    """
    if data is None and saved.is_hugging_face:
        return saved.folder
    in_run = saved.run_directory / "tokenizer" if saved.run_directory else None
    if data is None and in_run is not None and in_run.is_dir():
        check_same(in_run, saved.tokenizer_sha256)
        return in_run
    prepared = data or saved.data_directory or Path()
    if (prepared / DATA_MANIFEST).is_file():
        manifest = load_manifest(prepared)
        check_tokenizer(prepared, manifest)
        return prepared / manifest.tokenizer.directory
    raise DataError(f"{prepared}: no prepared data, so no tokenizer: give its folder with --data")


def open_tokenizer(path: Path, end_of_text: str | None = None, begin_of_text: str | None = None) -> Tokenizer:
    """The tokenizer in a prepared folder, in a file, or in a Hugging Face folder.

    Args:
        end_of_text: the token that ends a text; None (default): the one that the folder names
        begin_of_text: the token that begins a text; None (default): the one that a prepared folder names, or that
            transformers puts in front of a text by the files of a Hugging Face folder

    Raises:
        DataError: there is none, or it does not have these tokens.
    """
    tokenizer = load_tokenizer(path, end_of_text)
    if begin_of_text is None and not (path / INFO_FILE).is_file():
        begin_of_text = named_begin_of_text(path, tokenizer)
    return tokenizer if begin_of_text is None else tokenizer.with_begin_of_text(begin_of_text)


def open_tokenizer_of(
    saved: SavedModel, path: Path, end_of_text: str | None = None, begin_of_text: str | None = None
) -> Tokenizer:
    """The tokenizer of a saved model, as `open_tokenizer` opens it.

    Where the tokenizer's files name no special tokens, as those of a lone SentencePiece model, a text begins with the
    bos_token_id of a Hugging Face folder, if that is a special token.

    Raises:
        DataError: there is no such tokenizer.
        CheckpointError: the folder's files are damaged.
    """
    tokenizer = open_tokenizer(path, end_of_text, begin_of_text)
    silent = named_tokens(path if path.is_dir() else path.parent) == NamedTokens()
    if saved.is_hugging_face and silent and tokenizer.begin_of_text is None and not (path / INFO_FILE).is_file():
        first = _ids(saved, "bos_token_id")
        token = tokenizer.tokens().get(first[0]) if len(first) == 1 else None
        if token is not None and token in tokenizer.special_tokens():
            tokenizer.with_begin_of_text(token)
    return tokenizer


def begin_of_text_of(saved: SavedModel) -> tuple[str, int] | None:
    """The token that the texts of a Hugging Face folder begin with, and its id; None: none, or not known."""
    if not saved.is_hugging_face:
        return None
    try:
        tokenizer = open_tokenizer_of(saved, find_tokenizer(saved))
    except DataError:
        return None  # a folder without tokenizer
    token, index = tokenizer.begin_of_text, tokenizer.begin_of_text_id
    return None if token is None or index is None else (token, index)


def end_ids(saved: SavedModel, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text: the tokenizer's end-of-text first, then those of a Hugging Face folder's generation_config.json.

    Where that file is missing, its config.json counts, as in transformers.
    """
    others = _ids(saved, "eos_token_id") if saved.is_hugging_face else []
    return tuple(dict.fromkeys([tokenizer.end_of_text_id, *others]))


def _ids(saved: SavedModel, field: str) -> list[int]:
    """The token ids in a field of a Hugging Face folder's generation_config.json; without that file, of its config.json."""
    path = saved.folder / "generation_config.json"
    path = path if path.is_file() else saved.folder / "config.json"
    try:
        fields = read_json(path)
    except (OSError, UntrustedFileError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    value = fields.get(field) if isinstance(fields, dict) else None
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(index) is int and index >= 0 for index in values):
        raise CheckpointError(f"{path}: {field} is {value!r}, not a token id or a list of them")
    return values


def check_same_tokenizer(saved: SavedModel, directory: Path, manifest: Manifest) -> str | None:
    """Check that prepared data was made with a model's own tokenizer; returns why that cannot be known, else None.

    The same files, or another form of the same tokenizer: no id has another token, and both encode a sample of the held-out
    text in the same way.

    Raises:
        DataError: it was made with another tokenizer: the model has never seen such ids, and a loss would mean little.
    """
    if saved.tokenizer_sha256 == manifest.tokenizer.sha256:
        return None
    try:
        own = find_tokenizer(saved)
        if (own / INFO_FILE).is_file() and hash_of_tokenizer(own) == manifest.tokenizer.sha256:
            return None
        datas = load_tokenizer(directory / manifest.tokenizer.directory)
        models = _opened(own, datas.end_of_text)
    except DataError as error:
        return f"not checked that {directory} was made with the model's tokenizer: {error}"
    difference = _difference(models, datas, [SAMPLE, *_held_out(directory, manifest, datas)])
    if difference is not None:
        raise DataError(
            f"{directory} was prepared with another tokenizer than the one of {saved.folder} ({own}): {difference}. "
            "Prepare the text with tokenizer.kind: pretrained and tokenizer.path naming the model's"
        )
    return None


def _opened(folder: Path, end_of_text: str) -> Tokenizer:
    """A model's tokenizer; one whose folder names no end-of-text, with that of the data."""
    try:
        return open_tokenizer(folder)
    except DataError:
        return open_tokenizer(folder, end_of_text)


def _difference(models: Tokenizer, datas: Tokenizer, texts: list[str]) -> str | None:
    known = models.tokens()
    for index, token in sorted(datas.tokens().items()):
        if known.get(index, token) != token:  # an added token that the model's has not may not even occur
            return f"id {index} is {token!r} in the data and {known[index]!r} in the model's"
    other = [text for text in texts if models.encode(text) != datas.encode(text)]
    # A tokenizer that was converted to another library's form may break a few ties in another way.
    if SAMPLE in other or 10 * len(other) > len(texts):
        return f"{len(other)} of {len(texts)} texts get other ids, for example {other[0][:40]!r}"
    return None


def _held_out(directory: Path, manifest: Manifest, tokenizer: Tokenizer) -> list[str]:
    """The beginning of each source's held-out text."""
    texts = []
    for source in manifest.sources:
        for record in source.validation[:1]:
            shard = Shard(directory / record.prefix)
            stop = record.first_token + min(record.num_tokens, SAMPLE_TOKENS)
            ids = np.asarray(shard.read(record.first_token, stop))
            parts = np.split(ids, np.flatnonzero(ids == tokenizer.end_of_text_id) + 1)
            texts += [tokenizer.decode([int(i) for i in part]) for part in parts]
    return texts
