"""An exported tokenizer gives the same ids in transformers as the prepared one gives here."""

import io
import json
import os
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers

from dsllm.checkpoint.hugging_face_tokenizer import write_tokenizer
from dsllm.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer, byte_level_tokenizer
from dsllm.errors import CheckpointError

END = "<|endoftext|>"
TEXT = (Path(__file__).parents[1] / "data" / "golden.txt").read_text(encoding="utf-8")
HARD = [
    "def f(x):\n    return  x  # two  spaces\n\n\n\ttabs\n",
    " leading, trailing ",
    "",
    "naïve café, Ελληνικά, 日本語, 🙂👩‍👩‍👧, \u200b",
    "aaaa bbbb 123456 x=1;y='2'",
]


def byte_bpe() -> Tokenizer:
    tokenizer = byte_level_tokenizer(tokenizers.models.BPE())
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return JsonTokenizer(tokenizer.to_str(), END, "test")


def sentencepiece_model(kind: str, **more) -> bytes:
    model = io.BytesIO()
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True} | more
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type=kind,
        vocab_size=600,
        unk_id=0,
        eos_id=1,
        eos_piece=END,
        bos_id=-1,
        pad_id=-1,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def exported(tokenizer: Tokenizer, folder: Path):
    """The tokenizer as transformers loads it."""
    tokenizer.save(folder / "ours")
    (folder / "theirs").mkdir()
    write_tokenizer(folder / "ours", folder / "theirs", context_length=64)
    return transformers.AutoTokenizer.from_pretrained(folder / "theirs", local_files_only=True)


def check(ours: Tokenizer, theirs) -> None:
    for text in [*TEXT.splitlines(), *HARD]:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text_id
    assert theirs.model_max_length == 64


def test_byte_level_bpe(tmp_path: Path):
    ours = byte_bpe()
    theirs = exported(ours, tmp_path)
    check(ours, theirs)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == ours.encode(TEXT)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece(kind: str, prefix: bool, tmp_path: Path):
    # By lines: over a very long text SentencePiece sums a unigram model's scores in fp32 and may break a tie otherwise.
    content = sentencepiece_model(kind, add_dummy_prefix=prefix, allow_whitespace_only_pieces=True)
    ours = SentencePieceTokenizer(content, END, "test")
    check(ours, exported(ours, tmp_path))
    assert (tmp_path / "theirs" / "tokenizer.model").read_bytes() == content


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text by nmt_nfkc"),
        ({"remove_extra_whitespaces": True}, "removes extra spaces"),
        ({"user_defined_symbols": ["<sep>"]}, "user-defined symbols"),
    ],
)
def test_a_sentencepiece_model_without_an_exact_counterpart_is_refused(settings: dict, named: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match="cannot be written") as refusal:
        exported(SentencePieceTokenizer(sentencepiece_model("bpe", **settings), END, "test"), tmp_path)
    assert named in str(refusal.value)


def test_a_folder_that_is_no_prepared_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="not a prepared tokenizer"):
        write_tokenizer(tmp_path, tmp_path, 64)
    (tmp_path / "tokenizer_info.json").write_text(json.dumps({"end_of_text": END}))
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        write_tokenizer(tmp_path, tmp_path, 64)


def test_a_published_sentencepiece_model_on_code(tmp_path: Path):
    # Mistral's tokenizer: 32,000 pieces, BPE, byte fallback, dummy prefix
    data = os.environ.get("DSLLM_TEST_DATA")
    if not data:
        pytest.skip("DSLLM_TEST_DATA is not set")
    ours = SentencePieceTokenizer((Path(data) / "tokenizers" / "mistral_v1.model").read_bytes(), "</s>", "mistral")
    theirs = exported(ours, tmp_path)
    lines = [
        line
        for path in sorted(Path(transformers.__file__).parent.glob("*.py"))[:3]
        for line in path.read_text().splitlines()
    ]
    assert len(lines) > 300
    for line in lines[:2000]:
        assert theirs(line, add_special_tokens=False)["input_ids"] == ours.encode(line), repr(line)
