"""Text to token ids and back, with one interface for the `tokenizers` library and for SentencePiece.

Encoding adds no special tokens, and reads none out of the text: a document about language models that contains the
characters `<|endoftext|>` does not end there. It has no randomness either: the same text always has the same ids.
"""

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import sentencepiece
import tokenizers

from dsllm import files
from dsllm.errors import DataError

DEFAULT_END_OF_TEXT = "<|endoftext|>"
INFO_FILE = "tokenizer_info.json"
INFO_VERSION = 1
JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"
"""The character that stands for a space in SentencePiece's pieces; in a text it is an ordinary character."""
MOST_IDS = 2**31 - 1
"""Token shards store ids in at most 32 bits, signed."""
_SAMPLE = "A text: naïve, 日本語, 🙂, 3.14\n\tx = [1]"
_LEAD = "\n"


class Tokenizer(ABC):
    """Encodes and decodes text with one vocabulary. tokenizer_files.py and prepare/train_tokenizer.py make tokenizers."""

    kind: str
    """The library that encodes: tokenizers or sentencepiece."""
    origin: str
    """Name of the file it was read from, for messages."""
    vocab_size: int
    """Largest token id + 1, with special tokens."""
    end_of_text: str
    """The token that ends every document."""
    end_of_text_id: int
    """Its id."""
    begin_of_text: str | None = None
    """The token that begins every document; None (default): documents begin with their text."""
    begin_of_text_id: int | None = None
    """Its id."""
    notes: tuple[str, ...] = ()
    """What the file asks for and is not done, one sentence each."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text; adds no end-of-text token.

        Raises:
            DataError: the tokenizer has no id for a part of the text, not even one for what is unknown.
        """

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

    @abstractmethod
    def tokens(self) -> dict[int, str]:
        """Every id and the library's name of its token, special tokens included."""

    @abstractmethod
    def special_tokens(self) -> list[str]:
        """The tokens that no text contains."""

    @abstractmethod
    def special_id(self, token: str) -> int:
        """The id of a special token.

        Raises:
            DataError: there is none of this name; lists the special tokens.
        """

    def with_begin_of_text(self, token: str | None) -> Self:
        """Let documents and prompts begin with this token, or with none; returns the tokenizer itself.

        Raises:
            DataError: it is not a special token of the tokenizer.
        """
        self.begin_of_text_id = None if token is None else self.special_id(token)
        self.begin_of_text = token
        return self

    def document(self, ids: Sequence[int]) -> list[int]:
        """A document as it is stored and trained on: its text's ids, with the tokens that begin and end it."""
        begin = [] if self.begin_of_text_id is None else [self.begin_of_text_id]
        return [*begin, *ids, self.end_of_text_id]

    @property
    def prompt_start(self) -> int:
        """What a prompt follows: the begin-of-text token, else the end-of-text of the document before it."""
        return self.end_of_text_id if self.begin_of_text_id is None else self.begin_of_text_id

    def encode_rests(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that continue a document: without the space that some tokenizers put in front of a text."""
        if not self._puts_something_in_front:
            return self.encode_batch(texts)
        lead = self.encode(_LEAD)
        whole = self.encode_batch([_LEAD + text for text in texts])
        return [
            ids[len(lead) :] if ids[: len(lead)] == lead else self.encode(text)
            for text, ids in zip(texts, whole, strict=True)
        ]

    @cached_property
    def _puts_something_in_front(self) -> bool:
        return self.encode(_LEAD) + self.encode("a") != self.encode(_LEAD + "a")

    def save(self, folder: Path) -> None:
        """Write the tokenizer into a folder that `load_tokenizer` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        name, content = self.model_file()
        files.write_atomically(folder / name, content)
        info = {
            "format_version": INFO_VERSION,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "end_of_text_id": self.end_of_text_id,
        }
        if self.begin_of_text is not None:
            info |= {"begin_of_text": self.begin_of_text, "begin_of_text_id": self.begin_of_text_id}
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
            DataError: it is not a tokenizer.json, cannot encode, or does not have the end-of-text token.
        """
        self.origin = origin
        with _library_errors(f"{origin}: not a tokenizer.json that tokenizers {tokenizers.__version__} reads"):
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        self._content = content
        # The file may have been saved with settings that cut documents short, or that read special tokens out of text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        if isinstance(self._tokenizer.model, tokenizers.models.BPE) and self._tokenizer.model.dropout:
            share = self._tokenizer.model.dropout
            self._tokenizer.model.dropout = None
            self.notes = (
                f"{origin} asks for BPE dropout {share:.3g}: switched off, so that a text always has the same ids",
            )
        self.end_of_text = end_of_text
        self.end_of_text_id = self.special_id(end_of_text)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if self.vocab_size > MOST_IDS:
            raise DataError(f"{origin}: has the token id {self.vocab_size - 1:,}; ids go up to {MOST_IDS - 1:,}")
        self.encode(_SAMPLE)

    def special_tokens(self) -> list[str]:
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]

    def special_id(self, token: str) -> int:
        """The id of a token. Marks the token as special, because a text could contain it otherwise."""
        try:
            found = self._tokenizer.token_to_id(token)
        except (TypeError, UnicodeError):  # not a string, or with surrogates
            found = None
        added = self._tokenizer.get_added_tokens_decoder()
        if found is None:
            raise _no_special_token(token, self.origin, self.special_tokens())
        if found not in added or not added[found].special:
            self._tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
            assert self._tokenizer.token_to_id(token) == found, "marking a token as special keeps its id"
        return found

    def tokens(self) -> dict[int, str]:
        return {index: token for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items()}

    def added_in_front(self) -> list[int]:
        """The ids that the file's own post-processor puts in front of a text, as transformers does."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=True).ids
        starts = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
        return list(full[: starts[0]]) if starts else []

    def encode(self, text: str) -> list[int]:
        with _library_errors(f"{self.origin}: this tokenizer cannot encode the text"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # _fast leaves out character offsets, which take a third of the time.
        with _library_errors(f"{self.origin}: this tokenizer cannot encode the text"):
            return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        with _library_errors(f"{self.origin}: this tokenizer cannot decode"):
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
            self.vocab_size = processor.get_piece_size()
            self._pieces: list[str] = processor.id_to_piece(list(range(self.vocab_size)))
            self._id_of_byte = {
                int(self._pieces[i][1:-1], 16): i for i in range(self.vocab_size) if processor.is_byte(i)
            }
            processor.decode(processor.encode(_SAMPLE))
        except Exception as error:
            raise DataError(f"{origin}: not a SentencePiece model, or damaged") from error
        self.origin = origin
        self._processor = processor
        self._content = content
        self.end_of_text = end_of_text
        self.end_of_text_id = self.special_id(end_of_text)
        # The model encodes a space and the character SPACE as the same piece. A model that puts no space in front of a
        # text can encode a text in parts: then SPACE is encoded as its bytes, between the parts.
        self._has_prefix = any(self._pieces[i].startswith(SPACE) for i in processor.encode("a")[:1])
        self._can_spell_space = len(self._id_of_byte) == 256 and not self._has_prefix

    def special_tokens(self) -> list[str]:
        return [self._pieces[i] for i in range(self.vocab_size) if self._processor.is_control(i)]

    def special_id(self, token: str) -> int:
        if token not in self.special_tokens():
            raise _no_special_token(token, self.origin, self.special_tokens())
        return int(self._processor.piece_to_id(token))

    def tokens(self) -> dict[int, str]:
        return dict(enumerate(self._pieces))

    def encode(self, text: str) -> list[int]:
        if SPACE not in text or not self._can_spell_space:
            return self._processor.encode(text)
        spelled = [self._id_of_byte[byte] for byte in SPACE.encode()]
        first, *rest = (self._processor.encode(part) for part in text.split(SPACE))
        return first + [i for part in rest for i in [*spelled, *part]]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        # A model's vocabulary may be larger than its tokenizer's.
        return self._processor.decode([i for i in ids if 0 <= i < self.vocab_size])

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        table = self._bytes_of_token
        content = b"".join(table[i] for i in ids if 0 <= i < self.vocab_size)
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
                table.append(self._pieces[index].replace(SPACE, " ").encode())
        return table

    def model_file(self) -> tuple[str, bytes]:
        return MODEL_FILE, self._content


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


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turn an error of the `tokenizers` library into a DataError; a panic in Rust is not an Exception in Python."""
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise DataError(f"{what}: {reason}") from error


def _no_special_token(token: str, origin: str, candidates: Sequence[str]) -> DataError:
    names = ", ".join(repr(c) for c in candidates[:10]) or "none"
    return DataError(
        f"{origin}: has no special token {token!r} to begin or end documents with: set tokenizer.end_of_text or "
        f"tokenizer.begin_of_text (--end-of-text, --begin-of-text of dsllm generate) to one of its special tokens: {names}"
    )
