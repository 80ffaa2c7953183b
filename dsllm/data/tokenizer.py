"""Text to token ids and back, with one interface for the `tokenizers` library and for SentencePiece.

Encoding adds no special tokens, and reads none out of the text: a document about language models that contains the
characters `<|endoftext|>` does not end there.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece
import tokenizers

from dsllm import files
from dsllm.errors import DataError

DEFAULT_END_OF_TEXT = "<|endoftext|>"
INFO_FILE = "tokenizer_info.json"
JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"
"""The character that stands for a space in SentencePiece's pieces; in a text it is an ordinary character."""


class Tokenizer(ABC):
    """Encodes and decodes text with one vocabulary. `load_tokenizer` and prepare/train_tokenizer.py make tokenizers."""

    kind: str
    """The library that encodes: tokenizers or sentencepiece."""
    vocab_size: int
    """Largest token id + 1, with special tokens."""
    end_of_text: str
    """The token that ends every document."""
    end_of_text_id: int
    """Its id."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text; adds no end-of-text token."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, as `encode` returns them; in parallel if the library can."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out, and bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids, which may end inside a character; special tokens are left out."""

    @abstractmethod
    def model_file(self) -> tuple[str, bytes]:
        """Name and content of the file with the vocabulary."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer into a folder that `load_tokenizer` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        name, content = self.model_file()
        files.write_atomically(folder / name, content)
        info = {
            "format_version": 1,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "end_of_text_id": self.end_of_text_id,
        }
        files.write_atomically(folder / INFO_FILE, json.dumps(info, indent=1) + "\n")


class JsonTokenizer(Tokenizer):
    """A tokenizer.json: byte-level BPE or another model of the `tokenizers` library."""

    kind = "tokenizers"

    def __init__(self, content: str, end_of_text: str, origin: str):
        """Read the content of a tokenizer.json.

        Args:
            content: text of the file.
            end_of_text: the token that ends every document.
            origin: name of the file, for messages.

        Raises:
            DataError: it is not a tokenizer.json, or does not have the end-of-text token.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:
            raise DataError(
                f"{origin}: not a tokenizer.json that tokenizers {tokenizers.__version__} reads: {error}"
            ) from error
        self._content = content
        self.end_of_text = end_of_text
        self.end_of_text_id = self._special_id(end_of_text, origin)
        # The file may have been saved with settings that cut documents short, or that read special tokens out of text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def _special_id(self, token: str, origin: str) -> int:
        """The id of a token. Marks the token as special, because a text could contain it otherwise."""
        found = self._tokenizer.token_to_id(token)
        added = self._tokenizer.get_added_tokens_decoder()
        if found is None:
            raise _no_end_of_text(token, origin, [t.content for t in added.values() if t.special])
        if found not in added or not added[found].special:
            self._tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
            assert self._tokenizer.token_to_id(token) == found, "marking a token as special keeps its id"
        return found

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # _fast leaves out character offsets, which take a third of the time.
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        if self._bytes_of_token is None:
            return self.decode(ids).encode()
        table = self._bytes_of_token
        return b"".join(table.get(i, b"") for i in ids)

    @cached_property
    def _bytes_of_token(self) -> dict[int, bytes] | None:
        """The bytes of each token; special tokens have none. None: the model is not byte-level."""
        decoder = json.loads(self._content).get("decoder") or {}
        kinds = {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))}
        if "ByteLevel" not in kinds:
            return None
        byte_of_character = {character: byte for byte, character in byte_characters().items()}
        table = {}
        added = self._tokenizer.get_added_tokens_decoder()
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index in added:
                table[index] = b"" if added[index].special else token.encode()
            elif all(character in byte_of_character for character in token):
                table[index] = bytes(byte_of_character[character] for character in token)
            else:
                table[index] = token.encode()
        return table

    def model_file(self) -> tuple[str, bytes]:
        return JSON_FILE, self._content.encode()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model: unigram or BPE."""

    kind = "sentencepiece"

    def __init__(self, content: bytes, end_of_text: str, origin: str):
        """Read the content of a .model.

        Args:
            content: bytes of the file.
            end_of_text: the token that ends every document.
            origin: name of the file, for messages.

        Raises:
            DataError: it is not a SentencePiece model, or does not have the end-of-text token.
        """
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise DataError(f"{origin}: not a SentencePiece model: {error}") from error
        self._processor = processor
        self._content = content
        self.vocab_size = processor.get_piece_size()
        controls = [processor.id_to_piece(i) for i in range(self.vocab_size) if processor.is_control(i)]
        if end_of_text not in controls:
            raise _no_end_of_text(end_of_text, origin, controls)
        self.end_of_text = end_of_text
        self.end_of_text_id = processor.piece_to_id(end_of_text)
        self._id_of_byte = {
            int(processor.id_to_piece(i)[1:-1], 16): i for i in range(self.vocab_size) if processor.is_byte(i)
        }
        # The model encodes a space and the character SPACE as the same piece. A model that puts no space in front of a
        # text can encode a text in parts: then SPACE is encoded as its bytes, between the parts.
        self._has_prefix = any(processor.id_to_piece(i).startswith(SPACE) for i in processor.encode("a")[:1])
        self._can_spell_space = len(self._id_of_byte) == 256 and not self._has_prefix

    def encode(self, text: str) -> list[int]:
        if SPACE not in text or not self._can_spell_space:
            return self._processor.encode(text)
        spelled = [self._id_of_byte[byte] for byte in SPACE.encode()]
        first, *rest = (self._processor.encode(part) for part in text.split(SPACE))
        return first + [i for part in rest for i in [*spelled, *part]]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        table = self._bytes_of_token
        content = b"".join(table[i] for i in ids)
        return content.removeprefix(b" ") if self._has_prefix else content

    @cached_property
    def _bytes_of_token(self) -> list[bytes]:
        """The bytes of each piece; control pieces have none."""
        byte_of_id = {index: bytes([byte]) for byte, index in self._id_of_byte.items()}
        table = []
        for index in range(self.vocab_size):
            if index in byte_of_id or self._processor.is_control(index):
                table.append(byte_of_id.get(index, b""))
            else:
                table.append(self._processor.id_to_piece(index).replace(SPACE, " ").encode())
        return table

    def model_file(self) -> tuple[str, bytes]:
        return MODEL_FILE, self._content


def load_tokenizer(path: str | Path, end_of_text: str = DEFAULT_END_OF_TEXT) -> Tokenizer:
    """Load a tokenizer.json, GPT-2's vocab.json with merges.txt, a SentencePiece .model, or a folder from `save`.

    Args:
        path: the file, or the folder that contains it. Of GPT-2's pair give the vocab.json or the folder.
        end_of_text: the token that ends every document. Not used for a folder from `save`, which names its own.

    Raises:
        DataError: there is no tokenizer, or it does not have the end-of-text token (the message lists its special tokens).
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"tokenizer {path}: no such file or folder")
    if (path / INFO_FILE).is_file():
        end_of_text = _saved_end_of_text(path / INFO_FILE)
    file = _file_in(path) if path.is_dir() else path
    try:
        if file.name.endswith(".model"):
            return SentencePieceTokenizer(file.read_bytes(), end_of_text, str(file))
        if file.name.endswith("vocab.json"):
            return JsonTokenizer(_from_gpt2_pair(file, end_of_text), end_of_text, str(file))
        return JsonTokenizer(file.read_text(encoding="utf-8"), end_of_text, str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"tokenizer {file}: cannot be read: {error}") from error


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte: the same character if it is printable Latin-1, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def byte_level_tokenizer(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    """A BPE model, trained or not, that splits text by GPT-2's word pattern and maps bytes to characters."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _saved_end_of_text(info_file: Path) -> str:
    try:
        return str(json.loads(info_file.read_text(encoding="utf-8"))["end_of_text"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{info_file}: damaged ({error!r}): prepare the data again") from error


def _file_in(folder: Path) -> Path:
    """Find the tokenizer's file in a folder."""
    for name in (JSON_FILE, "vocab.json", MODEL_FILE):
        if (folder / name).is_file():
            return folder / name
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return models[0]
    raise DataError(
        f"tokenizer {folder}: contains no tokenizer.json, no vocab.json with merges.txt, and not exactly one .model file"
    )


def _from_gpt2_pair(vocab_file: Path, end_of_text: str) -> str:
    """Make a tokenizer.json from GPT-2's pair of files."""
    merges_file = vocab_file.with_name(vocab_file.name.removesuffix("vocab.json") + "merges.txt")
    if not merges_file.is_file():
        raise DataError(f"tokenizer {vocab_file}: needs {merges_file.name} in the same folder")
    try:
        model = tokenizers.models.BPE.from_file(str(vocab_file), str(merges_file))
    except Exception as error:
        raise DataError(f"tokenizer {vocab_file}: not GPT-2's pair of files: {error}") from error
    tokenizer = byte_level_tokenizer(model)
    if tokenizer.token_to_id(end_of_text) is not None:  # adding an unknown token would grow the vocabulary
        tokenizer.add_special_tokens([end_of_text])
    return tokenizer.to_str(pretty=True)


def _no_end_of_text(token: str, origin: str, candidates: Sequence[str]) -> DataError:
    names = ", ".join(repr(c) for c in candidates[:10]) or "none"
    return DataError(
        f"{origin}: has no special token {token!r} to end documents with: "
        f"set tokenizer.end_of_text to one of its special tokens: {names}"
    )
