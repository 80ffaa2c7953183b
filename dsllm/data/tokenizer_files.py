"""Finds and reads a tokenizer's files: which of them there are is decided by content, which tokens are special by name."""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from dsllm.data.tokenizer import (
    DEFAULT_END_OF_TEXT,
    INFO_FILE,
    INFO_VERSION,
    JSON_FILE,
    MODEL_FILE,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    byte_level_tokenizer,
)
from dsllm.errors import DataError
from dsllm.untrusted_files import GIT_LFS_POINTER, UntrustedFileError, parse_json, read_bounded, read_json

VOCAB_FILE = "vocab.json"
ADDED_FILE = "added_tokens.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
_ADDED_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@dataclass(frozen=True, kw_only=True)
class NamedTokens:
    """The special tokens that a Hugging Face folder names. None: it does not say."""

    end: str | None = None
    begin: str | None = None
    adds_begin: bool | None = None
    """Whether texts begin with `begin`."""
    all_special: frozenset[str] = frozenset()
    """Every special token that is named."""


def load_tokenizer(path: str | Path, end_of_text: str | None = None, begin_of_text: str | None = None) -> Tokenizer:
    """Load a tokenizer.json, GPT-2's vocab.json with merges.txt, a SentencePiece model, or a folder from `save`.

    Args:
        path: the file, or the folder that contains it. Of GPT-2's pair give the vocab.json or the folder.
        end_of_text: the token that ends every document. None (default): the eos_token of a tokenizer_config.json in the
            same folder, else <|endoftext|>. A folder from `save` names its own.
        begin_of_text: the token that begins every document; None (default): documents begin with their text. A folder
            from `save` names its own.

    Raises:
        DataError: there is no tokenizer, or it does not have these tokens (the message lists its special tokens).
    """
    path = Path(path).expanduser()
    try:
        if not path.exists():
            raise DataError(f"tokenizer {path}: no such file or folder")
        if (path / INFO_FILE).is_file():
            return _load_saved(path)
        file = _file_in(path) if path.is_dir() else path
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"tokenizer {path}: cannot be read: {error}") from error
    wanted = end_of_text or named_tokens(file.parent).end or DEFAULT_END_OF_TEXT
    return _read(file, wanted).with_begin_of_text(begin_of_text)


def load_pretrained(path: str | Path, end_of_text: str, begin_of_text: str | None) -> Tokenizer:
    """Load the tokenizer that a run names, as `load_tokenizer` does.

    Where end_of_text is the config's default and the tokenizer does not have it, the eos_token that its folder names is
    taken, which `notes` reports; as it does a token that the file puts in front of texts and the run does not.

    Raises:
        DataError: there is no such tokenizer, or it does not have these tokens.
    """
    path = Path(path).expanduser()
    if (path / INFO_FILE).is_file():
        tokenizer = load_tokenizer(path)
        return tokenizer if begin_of_text is None else tokenizer.with_begin_of_text(begin_of_text)
    try:
        tokenizer = load_tokenizer(path, end_of_text, begin_of_text)
    except DataError:
        named = named_tokens(path if path.is_dir() else path.parent).end if end_of_text == DEFAULT_END_OF_TEXT else None
        if named in (None, end_of_text):
            raise
        tokenizer = load_tokenizer(path, named, begin_of_text)
        tokenizer.notes += (f"documents end with {named}, the eos_token of its {CONFIG_FILE}",)
    begin = named_begin_of_text(path, tokenizer)
    if begin_of_text is None and begin not in (None, tokenizer.end_of_text):
        tokenizer.notes += (
            f"documents begin without {begin}, which this tokenizer puts in front of a text: to continue the training of "
            f"a model that knows it, set tokenizer.begin_of_text: {begin!r}",
        )
    return tokenizer


def named_begin_of_text(path: Path, tokenizer: Tokenizer) -> str | None:
    """The token that texts begin with by the files of a Hugging Face folder, as transformers encodes them. None: none."""
    named = named_tokens(path if path.is_dir() else path.parent)
    if named.adds_begin is False:
        return None
    in_front = tokenizer.added_in_front() if isinstance(tokenizer, JsonTokenizer) else []
    known = tokenizer.tokens()
    if len(in_front) == 1:
        return known[in_front[0]]
    return named.begin if named.begin in known.values() else None


def named_tokens(folder: Path) -> NamedTokens:
    """The special tokens in a folder's tokenizer_config.json and special_tokens_map.json, where there are any.

    Raises:
        DataError: one of the files cannot be read.
    """
    fields: dict[str, Any] = {}
    for name in (SPECIAL_FILE, CONFIG_FILE):  # the second counts where both say something
        fields |= {key: value for key, value in _json_object(folder / name).items() if value is not None}
    single = {key: _content(value) for key, value in fields.items() if key.endswith("_token")}
    several = fields.get("additional_special_tokens") or fields.get("extra_special_tokens") or []
    listed = [_content(value) for value in several] if isinstance(several, list) else []
    adds = fields.get("add_bos_token")
    return NamedTokens(
        end=single.get("eos_token"),
        begin=single.get("bos_token"),
        adds_begin=adds if isinstance(adds, bool) else None,
        all_special=frozenset(token for token in [*single.values(), *listed] if token),
    )


def _content(value: object) -> str | None:
    """A token is a string, or an object with its content."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _json_object(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    try:
        value = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UntrustedFileError) as error:
        raise DataError(f"{path}: cannot be read: {_reason(error)}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: is not a JSON object")
    return value


def _load_saved(folder: Path) -> Tokenizer:
    """The tokenizer in a folder from `save`."""
    path = folder / INFO_FILE
    info = _json_object(path)
    version, end, begin = (info.get(name) for name in ("format_version", "end_of_text", "begin_of_text"))
    if isinstance(version, int) and version > INFO_VERSION:
        raise DataError(f"{path}: format version {version}; this dsllm reads {INFO_VERSION}: update dsllm")
    if version != INFO_VERSION or not isinstance(end, str) or not isinstance(begin, str | None):
        raise DataError(f"{path}: damaged (format_version, end_of_text or begin_of_text): prepare the data again")
    tokenizer = _read(_file_in(folder), end).with_begin_of_text(begin)
    found = (tokenizer.vocab_size, tokenizer.end_of_text_id)
    if found != (info.get("vocab_size", found[0]), info.get("end_of_text_id", found[1])):
        raise DataError(f"{path}: damaged, or of another tokenizer than the file in its folder: prepare the data again")
    return tokenizer


def _file_in(folder: Path) -> Path:
    """Find the tokenizer's file in a folder."""
    for name in (JSON_FILE, VOCAB_FILE, MODEL_FILE):
        if (folder / name).is_file():
            return folder / name
    models = sorted(path for path in folder.glob("*.model*") if path.is_file())
    if len(models) == 1:
        return models[0]
    raise DataError(
        f"tokenizer {folder}: contains no tokenizer.json, no vocab.json with merges.txt, and not exactly one .model file"
    )


def _read(file: Path, end_of_text: str) -> Tokenizer:
    """Read a file as what it contains, whatever its name."""
    try:
        content = read_bounded(file)
        if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            _refuse_known_others(file, content)
            return SentencePieceTokenizer(content, end_of_text, str(file))
        value = parse_json(content)
        if isinstance(value.get("model"), dict):
            return JsonTokenizer(content.decode("utf-8-sig"), end_of_text, str(file))
        if "config" in value and isinstance(value.get("vocab"), list):
            raise DataError(f"tokenizer {file}: is Mistral's tekken format, which is not read: {_ADVICE}")
        if not all(isinstance(index, int) for index in value.values()):
            raise DataError(f"tokenizer {file}: is neither a tokenizer.json (it has no model) nor a vocab.json")
        return JsonTokenizer(_from_gpt2_pair(file, value, end_of_text), end_of_text, str(file))
    except (OSError, UntrustedFileError) as error:
        raise DataError(f"tokenizer {file}: cannot be read: {_reason(error)}") from error


_ADVICE = "give the tokenizer.json of the same model, which its Hugging Face folder contains"


def _refuse_known_others(file: Path, content: bytes) -> None:
    """Name files that are often taken for a SentencePiece model."""
    first = content[:1000].split(b"\n", 1)[0].strip()
    kind = None
    if first.startswith(GIT_LFS_POINTER):
        raise DataError(
            f"tokenizer {file}: is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder"
        )
    if _is_tiktoken_line(first):
        kind = "a vocabulary of tiktoken (as Llama 3's tokenizer.model), not a SentencePiece model"
    elif first.startswith(b"#version") or file.name.endswith("merges.txt"):
        raise DataError(f"tokenizer {file}: is the list of merges: give the vocab.json next to it, or the folder")
    elif first.startswith((b"<!DOCTYPE", b"<html")):
        kind = "a web page, not a tokenizer"
    elif first.startswith(b"["):
        kind = "a JSON list, not a tokenizer"
    elif not content.strip():
        kind = "empty"
    if kind is not None:
        raise DataError(f"tokenizer {file}: is {kind}: {_ADVICE}")


def _is_tiktoken_line(line: bytes) -> bool:
    """Whether a line is a token in base64 and its rank."""
    words = line.split(b" ")
    if len(words) != 2 or not words[1].isdigit():
        return False
    try:
        return bool(base64.b64decode(words[0], validate=True))
    except binascii.Error:
        return False


def _from_gpt2_pair(file: Path, vocab: Mapping[str, int], end_of_text: str) -> str:
    """Make a tokenizer.json from GPT-2's pair of files, and from the added tokens of the same folder."""
    merges_file = file.with_name(file.name.removesuffix(VOCAB_FILE) + "merges.txt")
    if not merges_file.is_file():
        raise DataError(f"tokenizer {file}: needs {merges_file.name} in the same folder")
    added = _added_tokens(file, vocab)
    try:
        known, merges = tokenizers.models.BPE.read_file(str(file), str(merges_file))
        model = tokenizers.models.BPE(known | {content: index for index, (content, _) in added.items()}, merges)
    except Exception as error:
        raise DataError(f"tokenizer {file}: not GPT-2's pair of files: {error}") from error
    content: dict[str, Any] = json.loads(byte_level_tokenizer(model).to_str())
    if end_of_text in vocab:
        added[vocab[end_of_text]] = (end_of_text, True)
    content["added_tokens"] = [
        {"id": index, "content": token, "special": special or token == end_of_text, **_ADDED_TOKEN}
        for index, (token, special) in sorted(added.items())
    ]
    return json.dumps(content, indent=2, ensure_ascii=False)


def _added_tokens(file: Path, vocab: Mapping[str, int]) -> dict[int, tuple[str, bool]]:
    """The tokens that a slow tokenizer's folder adds to its vocabulary: id -> token and whether it is special."""
    named = named_tokens(file.parent)
    found: dict[int, tuple[str, bool]] = {}
    for token, index in _json_object(file.parent / ADDED_FILE).items():
        if not isinstance(index, int) or index < 0:
            raise DataError(f"{file.parent / ADDED_FILE}: the id of {token!r} is {index!r}, not a number")
        found[index] = (token, token in named.all_special)
    decoder = _json_object(file.parent / CONFIG_FILE).get("added_tokens_decoder")
    for index, token in decoder.items() if isinstance(decoder, dict) else ():
        content = _content(token)
        if content is not None and str(index).isdigit():
            special = isinstance(token, dict) and token.get("special") is True
            found[int(index)] = (content, special or content in named.all_special)
    by_id = {index: token for token, index in vocab.items()}
    clash = [f"{token!r} as {index}" for index, (token, _) in found.items() if by_id.get(index, token) != token]
    clash += [f"{token!r} as {index}" for index, (token, _) in found.items() if vocab.get(token, index) != index]
    if clash:
        raise DataError(f"{file.parent / ADDED_FILE}: adds {clash[0]}, but {file.name} has another token or id there")
    return found


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
