"""The data branch of a run: which text, how it is split, and how long a sequence is."""

from dataclasses import dataclass, field
from typing import Literal

from dsllm.config.fields import FORBID_UNKNOWN_KEYS, changeable


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One named origin of documents."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    name: str
    """Short name, unique in the run: letters, digits, '-' and '_'; part of the shard file names."""
    kind: Literal["embedded", "files", "dataset", "megatron"] = "files"
    """embedded: text that every Python installation has. files: .txt, .md, .jsonl, .json (also compressed) and .parquet.
    dataset: a name on the Hugging Face hub or a local folder, read through the `datasets` library.
    megatron: finished .bin/.idx token shards, used in place."""
    paths: tuple[str, ...] = ()
    """files: files, directories and globs. megatron: path prefixes, without .bin or .idx. embedded: which parts of it
    (topics, docstrings, sources). Empty (default): all. Docstrings are not repeated where sources are read."""
    dataset: str | None = None
    """dataset: the hub name or the folder."""
    subset: str | None = None
    """dataset: the name of its configuration, where it has several. None (default): the only one."""
    dataset_split: str = "train"
    """dataset: the split to read."""
    text_field: str = "text"
    """The column or JSON key that holds the document's text; `doc.text` is also the key `text` in an object `doc`."""
    encoding: str = "utf-8"
    """files: the encoding of text and JSON files, by a name that Python knows: utf-8, latin-1, cp1252, utf-16, shift_jis."""
    weight: float | None = None
    """Share of the training samples, relative to the other sources. Give it to all sources or to none. None (default): in
    proportion to their tokens."""
    text_documents: Literal["file", "lines", "paragraphs"] = "file"
    """What one document of a .txt file is: the whole file, each line, or each run of lines between empty lines."""
    on_bad_input: Literal["error", "skip"] = "error"
    """What to do with what cannot be read: stop with its name, or skip it, count it and report it in the data card."""
    max_megabytes: float | None = None
    """Read at most this much text (10^6 bytes of UTF-8). None (default): all of it."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where documents come from, and how they become sequences."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    directory: str | None = changeable(None)
    """Folder of the prepared token shards. None (default): data/NAME."""
    sources: tuple[SourceConfig, ...] = field(default_factory=lambda: (SourceConfig(name="pydocs", kind="embedded"),))
    """Where the documents come from. Default: one source, the text that every Python installation has
    (`[{name: pydocs, kind: embedded}]`)."""
    sequence_length: int = 1024
    """Tokens per packed sequence."""
    document_mask: bool = False
    """A token attends to tokens of its own document only, however many are packed into its sequence."""
    validation_share: float = 0.01
    """Share of the documents held out for validation, chosen by the hash of each document's text."""
    deduplicate: bool = True
    """Drop documents whose text was seen before, over all sources."""
    shard_megabytes: float = 64.0
    """Text per token shard file (10^6 bytes of UTF-8): the unit of work of a preparing process."""
    num_workers: int = changeable(0)
    """Preparing processes; 0: one per core. Does not change what is written."""
    prefetch: bool = changeable(True)
    """Read the next step's sequences in a thread while this step computes. The samples and their order are the same.
    Switch it off to measure how long reading takes, or to save the memory of one more step of token ids."""
    verify: Literal["background", "start", "off"] = changeable("background")
    """When the token shards are compared with the checksums of their manifest, each once per run: behind training (a damaged
    one ends the run at the next step), before the first step, or not at all."""
    verify_megabytes_per_second: float = changeable(100.0)
    """How fast all ranks together read for data.verify: background (10^6 bytes)."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Text to token ids: trained from the corpus, or loaded."""

    __pydantic_config__ = FORBID_UNKNOWN_KEYS

    kind: Literal["byte_bpe", "sentencepiece_unigram", "sentencepiece_bpe", "pretrained"] = "byte_bpe"
    """byte_bpe: byte-level BPE (tokenizers). sentencepiece_*: SentencePiece. pretrained: load `path`."""
    vocab_size: int = 32000
    """Number of tokens to train, the end-of-text token included; not used by pretrained."""
    path: str | None = None
    """pretrained: a tokenizer.json, a folder with it or with vocab.json and merges.txt, or a SentencePiece model."""
    end_of_text: str = "<|endoftext|>"
    """The token that ends every document. If a pretrained tokenizer does not have the default, the eos_token that its
    tokenizer_config.json names is used."""
    begin_of_text: str | None = None
    """The token that begins every document, to continue the training of a model that knows one (Llama's). None (default):
    documents begin with their text."""
    train_megabytes: float = 50.0
    """Text to train from (10^6 bytes of UTF-8), taken evenly over the training documents."""
