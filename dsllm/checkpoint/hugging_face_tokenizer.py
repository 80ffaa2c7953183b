"""Writes the tokenizer of an exported model, in files that transformers 4 and 5 load as a PreTrainedTokenizerFast."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from dsllm.errors import CheckpointError
from dsllm.untrusted_files import read_json

INFO_FILE, JSON_FILE, SENTENCEPIECE_FILE = "tokenizer_info.json", "tokenizer.json", "tokenizer.model"
SPACE = "\u2581"
"""What SentencePiece writes for a space."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Types of SentencePiece pieces (sentencepiece_model.proto)."""
UNIGRAM, BPE = 1, 2
"""Types of SentencePiece models."""


def write_tokenizer(source: Path, folder: Path, context_length: int) -> None:
    """Write a prepared tokenizer's files into the folder of an exported model.

    A tokenizer.json is written without what would make its ids differ from those of training: tokens that its post-processor
    adds, truncation, padding, BPE dropout. A text begins with the begin-of-text token if documents did in training. A
    SentencePiece model is converted to a tokenizer.json that gives the same ids, because
    transformers' own conversion does not; its tokenizer.model is copied too, for llama.cpp. (If two ways to cut a very long
    text have the same score up to fp32 rounding, a converted unigram model may choose the other one.)

    Args:
        source: the prepared folder with tokenizer_info.json and tokenizer.json or tokenizer.model
        context_length: the model's, in tokens
    Raises:
        CheckpointError: there is no such tokenizer, or it cannot be written exactly.
    """
    try:
        info = read_json(source / INFO_FILE)
        end_of_text, begin_of_text = info["end_of_text"], info.get("begin_of_text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source}: not a prepared tokenizer ({error}): export without a tokenizer") from error
    unknown = None
    if (source / JSON_FILE).is_file():
        tokenizer = _as_in_training(source / JSON_FILE, end_of_text)
    elif (source / SENTENCEPIECE_FILE).is_file():
        tokenizer, unknown = _convert(source / SENTENCEPIECE_FILE)
        shutil.copyfile(source / SENTENCEPIECE_FILE, folder / SENTENCEPIECE_FILE)
    else:
        raise CheckpointError(f"{source}: contains neither {JSON_FILE} nor {SENTENCEPIECE_FILE}")
    _put_in_front(tokenizer, begin_of_text)
    tokenizer.save(str(folder / JSON_FILE))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin_of_text or end_of_text,
        "eos_token": end_of_text,
        "unk_token": unknown,
        "model_max_length": context_length,
        "add_bos_token": begin_of_text is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")


def _as_in_training(path: Path, end_of_text: str) -> Tokenizer:
    """A tokenizer.json that encodes as in training."""
    try:
        content = read_json(path)
        content |= {
            "truncation": None,
            "padding": None,
            "post_processor": _without_tokens(content.get("post_processor")),
        }
        if "dropout" in content["model"]:
            content["model"]["dropout"] = None
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        raise CheckpointError(f"{path}: cannot be read: {error}: export without a tokenizer") from error
    added = tokenizer.get_added_tokens_decoder()
    index = tokenizer.token_to_id(end_of_text)
    if index is not None and not (index in added and added[index].special):
        tokenizer.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    return tokenizer


def _without_tokens(processor: Any) -> Any:
    """A post-processor without the parts that add tokens: byte-level ones only move offsets."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        parts = [part for part in map(_without_tokens, processor.get("processors", [])) if part is not None]
        return {**processor, "processors": parts} if parts else None
    return processor if processor.get("type") == "ByteLevel" else None


def _put_in_front(tokenizer: Tokenizer, begin_of_text: str | None) -> None:
    """Let a text begin with a token."""
    if begin_of_text is None:
        return
    index = tokenizer.token_to_id(begin_of_text)
    tokenizer.add_special_tokens([AddedToken(begin_of_text, special=True, normalized=False)])
    template = processors.TemplateProcessing(
        single=[begin_of_text, "$A"], pair=[begin_of_text, "$A", "$B:1"], special_tokens=[(begin_of_text, index)]
    )
    there = tokenizer.post_processor
    tokenizer.post_processor = template if there is None else processors.Sequence([there, template])


def _convert(path: Path) -> tuple[Tokenizer, str]:
    """Convert a SentencePiece model to a tokenizer of the `tokenizers` library; returns that and the unknown token."""
    proto = ModelProto()
    proto.ParseFromString(path.read_bytes())
    problems = list(_obstacles(proto))
    if problems:
        raise CheckpointError(
            f"{path}: cannot be written as a tokenizer.json with the same ids ({'; '.join(problems)}): "
            "export without a tokenizer"
        )
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown_id = next(i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    byte_fallback = proto.trainer_spec.byte_fallback
    model: models.Model
    if proto.trainer_spec.model_type == UNIGRAM:
        model = models.Unigram(pieces, unknown_id, byte_fallback)
    else:
        ids = {piece: index for index, (piece, _) in enumerate(pieces)}
        unknown = pieces[unknown_id][0]
        model = models.BPE(ids, _merges(proto), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)
    prefix = proto.normalizer_spec.add_dummy_prefix
    steps = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for piece in proto.pieces:
        if piece.type in (CONTROL, UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
    return tokenizer, pieces[unknown_id][0]


def _obstacles(proto: ModelProto) -> Iterator[str]:
    """The features of a SentencePiece model that cannot be converted exactly."""
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        yield "it is neither a unigram nor a BPE model"
    if proto.normalizer_spec.name != "identity" or proto.normalizer_spec.precompiled_charsmap:
        yield f"it normalises text by {proto.normalizer_spec.name or 'its own rules'}, not by identity"
    if proto.normalizer_spec.remove_extra_whitespaces:
        yield "it removes extra spaces"
    if not proto.normalizer_spec.escape_whitespaces:
        yield "it does not escape spaces"
    if proto.trainer_spec.treat_whitespace_as_suffix:
        yield "it treats a space as the end of a word"
    if any(piece.type == USER_DEFINED for piece in proto.pieces):
        yield "it has user-defined symbols"


def _merges(proto: ModelProto) -> list[tuple[str, str]]:
    """BPE merges in SentencePiece's order: by the score of the merged piece, best first."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    found = []
    for piece, score in scores.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in scores and pair[1] in scores]
        found += [(score, pair) for pair in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    found.sort(key=lambda entry: -entry[0])  # stable: pairs of one piece keep their order
    return [pair for _, pair in found]
