"""Trains a tokenizer from a sample of the training documents: byte-level BPE, or SentencePiece unigram or BPE."""

import io
from collections.abc import Callable, Iterable, Iterator

import sentencepiece
import tokenizers

from dsllm.config.data import TokenizerConfig
from dsllm.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer, byte_level_tokenizer
from dsllm.errors import DataError
from dsllm.prepare.write_shards import cut

_SENTENCE_CHARACTERS = 4000  # SentencePiece silently drops "sentences" longer than max_sentence_length
_SENTENCE_BYTES = 4 * _SENTENCE_CHARACTERS


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, report: Callable[[str], None]) -> Tokenizer:
    """Train a tokenizer of `config.vocab_size` tokens, including the end-of-text token; deterministic.

    Byte-level BPE makes a smaller vocabulary and reports it where the texts are too few.

    Raises:
        DataError: SentencePiece cannot make a vocabulary of this size from the texts.
    """
    if config.kind == "byte_bpe":
        return _train_byte_bpe(texts, config, report)
    return _train_sentencepiece(texts, config)


def _train_byte_bpe(texts: Iterable[str], config: TokenizerConfig, report: Callable[[str], None]) -> Tokenizer:
    tokenizer = byte_level_tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,  # a pair that occurs once is no evidence
        special_tokens=[token for token in (config.end_of_text, config.begin_of_text) if token is not None],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = (part for text in texts for part in cut(text))
    tokenizer.train_from_iterator(parts, trainer)
    trained = JsonTokenizer(tokenizer.to_str(pretty=True), config.end_of_text, "the trained tokenizer")
    trained.with_begin_of_text(config.begin_of_text)
    if trained.vocab_size < config.vocab_size:
        report(
            f"tokenizer: {trained.vocab_size} tokens instead of tokenizer.vocab_size {config.vocab_size}: "
            "no other pair of tokens occurs twice in the training text"
        )
    return trained


def _train_sentencepiece(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """SentencePiece set so that decoding returns any text unchanged: no normalisation, and byte fallback."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=config.kind.removeprefix("sentencepiece_"),
            vocab_size=config.vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # indentation
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            unk_id=0,
            eos_id=1,
            eos_piece=config.end_of_text,
            bos_id=-1 if config.begin_of_text is None else 2,
            bos_piece=config.begin_of_text or "<s>",  # the default, which stands for nothing without an id
            pad_id=-1,
            max_sentence_length=_SENTENCE_BYTES,
            num_threads=8,  # fixed, because the scores' last bits depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        too_many = "too high" in reason
        advice = "lower it, or give it more text (data.sources, tokenizer.train_megabytes)" if too_many else "raise it"
        raise DataError(
            f"tokenizer.vocab_size {config.vocab_size} does not fit the training text: {advice}. "
            f"SentencePiece: {reason}"
        ) from error
    trained = SentencePieceTokenizer(model.getvalue(), config.end_of_text, "the trained tokenizer")
    return trained.with_begin_of_text(config.begin_of_text)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """The texts in parts that are short enough for SentencePiece."""
    for text in texts:
        for part in cut(text, _SENTENCE_CHARACTERS):
            yield part.replace("\0", " ")  # some releases of SentencePiece skip text with a NUL
