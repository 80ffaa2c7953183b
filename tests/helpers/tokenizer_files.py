"""Small tokenizers of every kind that is met in the field, as the content of a tokenizer.json or of a SentencePiece model."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = (Path(__file__).parents[1] / "data" / "golden.txt").read_text(encoding="utf-8")[:20_000]
BEGIN, END = "<|begin|>", "<|endoftext|>"
HARD = [
    "def f(x):\n    return  x  # two  spaces\n\n\n\ttabs\n",
    " leading, trailing ",
    "",
    "naïve café, Ελληνικά, 日本語, 🙂👩‍👩‍👧, \u200b",
    "aaaa bbbb 123456 x=1;y='2' don 't . ? ! n't",
    "ﬁ ① Å ÅÅ half-width ﾊﾝｶｸ",
]


@cache
def byte_level(begin: bool = True) -> dict[str, Any]:
    """Byte-level BPE with BEGIN, id 0, and END."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BEGIN, END] if begin else [END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return json.loads(tokenizer.to_str())


@cache
def prefixed() -> dict[str, Any]:
    """As Llama-2's: a space in front of a text, byte fallback, and a decoder that takes the space away."""
    alphabet = sorted({*TEXT.replace(" ", "\u2581"), "\u2581"})
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", BEGIN, END, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    # Only for training, so that no token contains the end of a word and the space after it.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return content


def changed(content: dict[str, Any], **fields: Any) -> str:
    """A tokenizer.json with other values for some of its fields; those of the model begin with `model_`."""
    model = {key.removeprefix("model_"): value for key, value in fields.items() if key.startswith("model_")}
    others = {key: value for key, value in fields.items() if not key.startswith("model_")}
    return json.dumps({**content, **others, "model": {**content["model"], **model}})


def part(value: Any) -> Any:
    """The JSON of a part of a tokenizer."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    for kind, field in (
        (processors.PostProcessor, "post_processor"),
        (normalizers.Normalizer, "normalizer"),
        (pre_tokenizers.PreTokenizer, "pre_tokenizer"),
        (decoders.Decoder, "decoder"),
    ):
        if isinstance(value, kind):
            setattr(tokenizer, field, value)
            return json.loads(tokenizer.to_str())[field]
    raise AssertionError(value)


def template(single: str, begin: int = 0, end: int = 1) -> Any:
    """A post-processor that adds tokens, for example `<|begin|> $A <|endoftext|>`."""
    return part(processors.TemplateProcessing(single=single, special_tokens=[(BEGIN, begin), (END, end)]))


@cache
def sentencepiece_model(kind: str = "bpe", text: str = TEXT, **more: Any) -> bytes:
    """A SentencePiece model that ends texts with END.

    Args:
        more: settings of SentencePiece's trainer, in place of those here
    """
    model = io.BytesIO()
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    tokens = {"unk_id": 0, "eos_id": 1, "eos_piece": END, "bos_id": 2, "bos_piece": BEGIN, "pad_id": -1}
    settings = {"model_type": kind, "vocab_size": 500, "minloglevel": 2} | exact | tokens | more
    sentencepiece.SentencePieceTrainer.Train(sentence_iterator=iter(text.splitlines()), model_writer=model, **settings)
    return model.getvalue()
