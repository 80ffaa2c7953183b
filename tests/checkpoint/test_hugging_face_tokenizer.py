"""An exported tokenizer gives the same ids in transformers as the prepared one gives here."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from dsllm.checkpoint.hugging_face_tokenizer import write_tokenizer
from dsllm.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer, byte_level_tokenizer
from dsllm.data.tokenizer_files import load_tokenizer, named_begin_of_text
from dsllm.errors import CheckpointError
from tests.helpers import tokenizer_files
from tests.helpers.tokenizer_files import BEGIN, byte_level, changed, part, prefixed, template

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
    return tokenizer_files.sentencepiece_model(kind, TEXT, vocab_size=600, bos_id=-1, **more)


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
        ({"user_defined_symbols": "<sep>"}, "user-defined symbols"),
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


def field_variants() -> dict[str, str]:
    """Contents of tokenizer.json that are met in the field and that could make an export differ from training."""
    byte, llama = byte_level(), prefixed()
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": BEGIN,
    }  # fmt: skip
    sequence = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]),
        ]
    )
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    spaces = [*byte["added_tokens"], {"id": 400, "content": "    ", **added}, {"id": 401, "content": "<tool>", **added}]
    metaspace = {
        scheme: part(pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))
        for scheme in ("first", "always", "never")
    }
    return {
        "begins": changed(byte, post_processor=template(f"{BEGIN} $A")),
        "ends": changed(byte, post_processor=template(f"$A {END}")),
        "both": changed(byte, post_processor=template(f"{BEGIN} $A {END}")),
        "llama-3": changed(byte, post_processor=part(sequence)),
        "bert": changed(byte, post_processor=part(processors.BertProcessing((END, 1), (BEGIN, 0)))),
        "roberta": changed(byte, post_processor=part(processors.RobertaProcessing((END, 1), (BEGIN, 0), True, False))),
        "cut-and-filled": changed(byte, truncation=truncation, padding=padding),
        "dropout": changed(byte, model_dropout=0.5),
        "prefix-space": changed(byte, pre_tokenizer=part(pre_tokenizers.ByteLevel(add_prefix_space=True))),
        "normalised": changed(
            byte, normalizer=part(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
        ),
        "added": changed(byte, added_tokens=spaces),
        "end-not-special": changed(byte, added_tokens=[token | {"special": False} for token in byte["added_tokens"]]),
        "llama-2": changed(
            llama, post_processor=part(processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)]))
        ),
        **{
            f"metaspace-{scheme}": changed(
                llama, normalizer=None, pre_tokenizer=value, decoder=part(decoders.Metaspace(prepend_scheme=scheme))
            )
            for scheme, value in metaspace.items()
        },
    }


VARIANTS = (
    "begins", "ends", "both", "llama-3", "bert", "roberta", "cut-and-filled", "dropout", "prefix-space", "normalised", "added",
    "end-not-special", "llama-2", "metaspace-first", "metaspace-always", "metaspace-never",
)  # fmt: skip


@pytest.mark.parametrize("begins", [False, True], ids=["text-first", "begin-first"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_gives_the_ids_of_training(variant: str, begins: bool, tmp_path: Path):
    """As a user calls it, with special tokens: the begin-of-text of training, and nothing that training never saw."""
    ours = JsonTokenizer(field_variants()[variant], END, "test").with_begin_of_text(BEGIN if begins else None)
    theirs = exported(ours, tmp_path)
    for text in [*TEXT.splitlines()[:50], *HARD, f"quotes {END} and {BEGIN}, <tool>"]:
        ids = ours.encode(text)
        found = theirs(text, split_special_tokens=True)["input_ids"]
        assert found == ours.document(ids)[:-1], repr(text)
        assert theirs.decode(found, skip_special_tokens=True) == ours.decode(ids)
        assert ours.encode(text) == ids  # no randomness
    assert theirs(END)["input_ids"][-1] == theirs.eos_token_id == ours.end_of_text_id
    assert theirs.bos_token_id == ours.prompt_start and theirs.pad_token is None
    # opened as a Hugging Face folder, it begins texts as in training
    again = load_tokenizer(tmp_path / "theirs")
    assert again.end_of_text == END and again.encode(TEXT[:500]) == ours.encode(TEXT[:500])
    assert named_begin_of_text(tmp_path / "theirs", again) == (BEGIN if begins else None)


def test_the_variants_differ_from_training_where_they_are_only_copied():
    """So that the test above could fail."""
    for name in ("begins", "ends", "both", "llama-3", "bert", "roberta", "cut-and-filled", "llama-2"):
        copied = tokenizers.Tokenizer.from_str(field_variants()[name])
        assert copied.encode(TEXT[:100]).ids != JsonTokenizer(field_variants()[name], END, "").encode(TEXT[:100]), name
    random = tokenizers.Tokenizer.from_str(field_variants()["dropout"])
    assert len({tuple(random.encode(TEXT[:100]).ids) for _ in range(5)}) > 1


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_with_a_begin_of_text(kind: str, tmp_path: Path):
    ours = SentencePieceTokenizer(tokenizer_files.sentencepiece_model(kind), END, "test").with_begin_of_text(BEGIN)
    theirs = exported(ours, tmp_path)
    for text in [*TEXT.splitlines()[:50], *HARD]:
        assert theirs(text)["input_ids"] == ours.document(ours.encode(text))[:-1], repr(text)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 3}', '{"model": {"type": "X"}}', "{" * 10**5])
def test_a_damaged_tokenizer_is_refused(content: str, tmp_path: Path):
    (tmp_path / "tokenizer_info.json").write_text(json.dumps({"end_of_text": END}))
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        write_tokenizer(tmp_path, tmp_path, 64)
    (tmp_path / "tokenizer_info.json").write_text(content or "3")
    with pytest.raises(CheckpointError, match="not a prepared tokenizer"):
        write_tokenizer(tmp_path, tmp_path, 64)
