"""Small runs to prepare, from files that a test writes."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsllm.config.data import DataConfig, SourceConfig, TokenizerConfig
from dsllm.config.run import RunConfig, RunSection
from dsllm.data.manifest import Manifest
from dsllm.prepare.pipeline import prepare

GOLDEN = Path(__file__).parents[1] / "data" / "golden.txt"
"""120 kB of public-domain English; see the README next to it."""

HARD_TEXTS = (
    "",
    " ",
    "  a  b\t\tc\n\n\n    d \r\n e\rf ",
    "\n",
    "<|endoftext|> </s> <unk> <0x41>",
    "\u2581 \u2581\u2581a\u2581",  # what SentencePiece writes for a space
    "\x00\x01\x1b\x7f",
    "\ufeffbyte order mark, \u2028 line separator, \u00a0 hard space, \u3000 wide space",
    "e\u0301 \ufb01 \u00b2 \u212b",  # what a normaliser would change
    "日本語 Ελληνικά עברית 😀👨‍👩‍👧",
    "\U0010ffff\ud7ff\ue000",
)
"""Texts that tokenizers are known to alter."""


def golden_run(**data: Any) -> RunConfig:
    """The speeches of the golden text, a tenth held out, with a small byte-level BPE."""
    source = SourceConfig(name="golden", paths=(str(GOLDEN),), text_documents="paragraphs")
    return tiny_run([source], **{"validation_share": 0.1, "shard_megabytes": 0.04, **data})


def tiny_run(sources: Sequence[SourceConfig], tokenizer: TokenizerConfig | None = None, **data: Any) -> RunConfig:
    """A run over some sources, prepared in this process."""
    return RunConfig(
        run=RunSection(name="tiny"),
        data=DataConfig(sources=tuple(sources), **{"num_workers": 1, **data}),
        tokenizer=tokenizer or TokenizerConfig(vocab_size=320),
    )


def with_tokenizer(config: RunConfig, **fields: Any) -> RunConfig:
    """The same run with another tokenizer."""
    return dataclasses.replace(config, tokenizer=TokenizerConfig(**fields))


def prepared(config: RunConfig, directory: Path, **options: Any) -> tuple[Manifest, dict[str, Any], list[str]]:
    """Prepare; returns the manifest, the data card and the lines that were reported."""
    lines: list[str] = []
    manifest = prepare(config, directory, lines.append, **options)
    return manifest, json.loads((directory / "data_card.json").read_text()), lines


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    """A .jsonl file of texts."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
