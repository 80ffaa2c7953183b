"""Tokenizers are read by what their files contain; what they are not is named; damage is an error or does no harm."""

import base64
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from dsllm.data.tokenizer import JsonTokenizer
from dsllm.data.tokenizer_files import load_pretrained, load_tokenizer, named_begin_of_text
from dsllm.errors import DataError
from tests.helpers.tokenizer_files import (
    BEGIN,
    END,
    HARD,
    TEXT,
    byte_level,
    changed,
    prefixed,
    sentencepiece_model,
    template,
)

TIKTOKEN = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))


def write(folder: Path, **files: Any) -> Path:
    """Write files; `__` in a name stands for a dot."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        content = json.dumps(content) if isinstance(content, dict | list) else content
        content = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("tokenizer.model", TIKTOKEN, "tiktoken.*give the tokenizer.json"),
        ("vocab.tiktoken", TIKTOKEN, "tiktoken"),
        ("tekken.json", b'{"config": {"pattern": "x"}, "vocab": [], "special_tokens": []}', "tekken"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git lfs pull"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git lfs pull"),
        ("tokenizer.json", b"<!DOCTYPE html><html></html>", "a web page"),
        ("merges.txt", b"#version: 0.2\na b\n", r"give the vocab\.json"),
        ("tokenizer.json", b"[1, 2]", "a JSON list"),
        ("tokenizer.json", b"", "is empty"),
        ("tokenizer.model", b"  \n", "is empty"),
        ("tokenizer.json", b'{"model": 3, "a": "b"}', r"neither a tokenizer\.json"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}', "not readable JSON"),
        ("tokenizer.json", b'{"model": {"type": "Magic"}}', "not a tokenizer.json"),
        ("tokenizer.json", b'{"a":' * 100_000, "nested too deeply"),
        ("tokenizer.model", b"\n\x01\xff", "not a SentencePiece model, or damaged$"),
        ("tokenizer.model", b"PK\x03\x04 a zip", "not a SentencePiece model"),
    ],
)
def test_what_a_file_is_not_is_named(name: str, content: bytes, named: str, tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=named) as error:
        load_tokenizer(path)
    assert name in str(error.value) and "src/" not in str(error.value)


def test_the_content_decides_and_not_the_name(tmp_path: Path):
    folder = write(tmp_path / "a", **{"tokenizer.model.v3": sentencepiece_model()})
    assert load_tokenizer(folder).kind == load_tokenizer(folder / "tokenizer.model.v3").kind == "sentencepiece"
    odd = write(tmp_path / "b", **{"llama.model": b"\xef\xbb\xbf" + changed(byte_level()).encode()})
    assert load_tokenizer(odd).encode("a text") == JsonTokenizer(changed(byte_level()), END, "").encode("a text")


def test_devices_and_huge_files_are_not_read(tmp_path: Path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is a device"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with (tmp_path / "huge.model").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="bytes long"):
        load_tokenizer(tmp_path / "huge.model")
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer("a\0b")


@pytest.mark.parametrize("value", ["<|begin|>", {"content": "<|begin|>", "lstrip": False}], ids=["string", "object"])
@pytest.mark.parametrize("file", ["tokenizer_config__json", "special_tokens_map__json"])
def test_the_end_of_text_is_the_one_that_the_folder_names(file: str, value: object, tmp_path: Path):
    folder = write(tmp_path / "a", tokenizer__json=changed(byte_level()), **{file: {"eos_token": value}})
    assert load_tokenizer(folder).end_of_text == load_tokenizer(folder / "tokenizer.json").end_of_text == BEGIN
    assert load_tokenizer(folder, END).end_of_text == END


def test_a_run_takes_the_named_end_of_text_only_where_its_own_is_the_default_and_missing(tmp_path: Path):
    content = changed(byte_level()).replace(END, "</s>")
    named = {"eos_token": "</s>", "bos_token": BEGIN}
    folder = write(tmp_path / "a", tokenizer__json=content, tokenizer_config__json=named)
    tokenizer = load_pretrained(folder, END, None)
    assert tokenizer.end_of_text == "</s>" and tokenizer.begin_of_text is None
    assert "documents end with </s>" in tokenizer.notes[0]
    with pytest.raises(DataError, match=r"no special token '<eos>'.*tokenizer\.end_of_text"):
        load_pretrained(folder, "<eos>", None)
    write(folder, tokenizer__json=changed(byte_level()))  # has the default
    assert load_pretrained(folder, END, None).end_of_text == END
    write(folder, tokenizer_config__json={"eos_token": "nowhere"}, tokenizer__json=content)
    with pytest.raises(DataError, match="no special token"):
        load_pretrained(folder, END, None)


def test_a_token_in_front_of_texts_is_reported_and_taken_only_when_asked(tmp_path: Path):
    content = changed(byte_level(), post_processor=template(f"{BEGIN} $A"))
    folder = write(tmp_path / "a", tokenizer__json=content)
    plain, asked = load_pretrained(folder, END, None), load_pretrained(folder, END, BEGIN)
    assert plain.begin_of_text is None and "tokenizer.begin_of_text: '<|begin|>'" in plain.notes[0]
    assert asked.begin_of_text_id == 0 and not asked.notes
    ids = plain.encode("a text")
    assert plain.document(ids) == [*ids, 1] and asked.document(ids) == [0, *ids, 1]
    assert (plain.prompt_start, asked.prompt_start) == (1, 0)
    asked.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.begin_of_text, again.begin_of_text_id) == (BEGIN, 0) and again.encode(BEGIN) == plain.encode(
        BEGIN
    ) != [0]
    plain.save(tmp_path / "plain")
    assert "begin" not in (tmp_path / "plain" / "tokenizer_info.json").read_text()  # as before the field existed
    with pytest.raises(DataError, match="no special token '<bos>'"):
        load_pretrained(folder, END, "<bos>")


@pytest.mark.parametrize(
    ("single", "config", "begins"),
    [
        (f"{BEGIN} $A", {}, BEGIN),
        (f"{BEGIN} $A {END}", {"bos_token": END}, BEGIN),
        ("$A", {"bos_token": BEGIN}, BEGIN),
        ("$A", {"bos_token": BEGIN, "add_bos_token": False}, None),
        (f"{BEGIN} $A", {"bos_token": BEGIN, "add_bos_token": False}, None),
        ("$A", {}, None),
        ("$A", {"bos_token": "nowhere"}, None),
    ],
)
def test_what_a_folder_says_about_the_beginning(single: str, config: dict, begins: str | None, tmp_path: Path):
    content = changed(byte_level(), post_processor=template(single))
    folder = write(tmp_path / "a", tokenizer__json=content, tokenizer_config__json=config)
    assert named_begin_of_text(folder, load_tokenizer(folder, END)) == begins


def gpt2_folder(folder: Path, **more: Any) -> Path:
    """GPT-2's pair of files without special tokens, and others."""
    content = copy.deepcopy(byte_level(begin=False))
    content["model"]["vocab"] = {token: index - 1 for token, index in content["model"]["vocab"].items() if index}
    tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": []})).model.save(str(write(folder)))
    return write(folder, **more)


def test_gpt2s_pair_with_added_tokens_is_read_as_transformers_reads_it(tmp_path: Path):
    size = 399
    added = {END: size, "<|im_start|>": size + 1, "<sep>": size + 2}
    folder = gpt2_folder(
        tmp_path / "a",
        added_tokens__json=added,
        special_tokens_map__json={"eos_token": END, "additional_special_tokens": ["<|im_start|>"]},
    )
    for path in (folder, folder / "vocab.json"):
        ours = load_tokenizer(path)
        assert (ours.end_of_text, ours.end_of_text_id, ours.vocab_size) == (END, size, size + 3)
        assert {token: ours.special_id(token) for token in added} == added
    ours = load_tokenizer(folder)
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder, unk_token=END, bos_token=END)
    for text in [*HARD, TEXT[:2000], f"a <sep> b{END}c"]:
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text), text
    assert size + 2 in ours.encode("a <sep>") and size + 1 not in ours.encode("<|im_start|>")


def test_added_tokens_are_read_from_the_config_too_with_gaps_between_their_ids(tmp_path: Path):
    decoder = {"450": {"content": END, "special": True}, "460": {"content": "<x>", "special": False}}
    ours = load_tokenizer(gpt2_folder(tmp_path / "a", tokenizer_config__json={"added_tokens_decoder": decoder}))
    assert (ours.end_of_text_id, ours.vocab_size) == (450, 461) and ours.encode("<x>") == [460]
    for wrong, named in (
        ({"a": 5000}, "another token or id"),
        ({END: "x"}, "not a number"),
        ({"<y>": 5}, "another token"),
    ):
        with pytest.raises(DataError, match=named):
            load_tokenizer(gpt2_folder(tmp_path / "b", added_tokens__json=wrong))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format_version": 2}, "format version 2; this dsllm reads 1: update dsllm"),
        ({"format_version": None}, "damaged"),
        ({"end_of_text": 3}, "damaged"),
        ({"begin_of_text": []}, "damaged"),
        ({"end_of_text": "<no>"}, "no special token"),
        ({"end_of_text_id": 5}, "of another tokenizer"),
        ({"vocab_size": 5}, "of another tokenizer"),
    ],
)
def test_a_saved_tokenizer_that_does_not_fit_its_record_is_refused(change: dict, named: str, tmp_path: Path):
    JsonTokenizer(changed(byte_level()), END, "").save(tmp_path)
    info = tmp_path / "tokenizer_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | change))
    with pytest.raises(DataError, match=named):
        load_tokenizer(tmp_path)


VALUES = (None, True, -1, 2**63, 1e308, "x", "", [], {}, [[]], {"type": "BPE"}, "\ud800")


def wrong_value(rng: random.Random, content: bytes) -> bytes:
    """A JSON file with one value of another type, or without it."""
    value = node = json.loads(content)
    while node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
            node = node[key]
        elif isinstance(node, dict) and rng.random() < 0.3:
            del node[key]
            break
        else:
            node[key] = copy.deepcopy(rng.choice(VALUES))
            break
    return json.dumps(value).encode()


def truncated(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def flipped(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 50))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def inserted(rng: random.Random, content: bytes) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + rng.randbytes(rng.randrange(40)) + content[place + rng.randrange(40) :]


DAMAGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (truncated, flipped, inserted, wrong_value)


def damage(folder: Path, name: str, seed: int, num_inputs: int) -> int:
    """Load a folder with one file damaged in many ways; returns how many loaded. Any other error than a DataError fails."""
    rng, sound, loaded = random.Random(seed), (folder / name).read_bytes(), 0
    others = {path: path.read_bytes() for path in folder.iterdir() if path.name != name}
    for number in range(num_inputs):
        ways = DAMAGES if sound.startswith(b"{") else DAMAGES[:3]
        content = ways[number % len(ways)](rng, sound)
        (folder / name).write_bytes(content)
        try:
            tokenizer = load_tokenizer(folder)
            ids = tokenizer.encode(HARD[3])
            assert isinstance(tokenizer.decode(ids), str) and all(0 <= i < tokenizer.vocab_size for i in ids)
            tokenizer.tokens(), tokenizer.decode_bytes(ids), tokenizer.encode_rests(["a b"])
            loaded += 1
        except DataError as error:
            assert str(folder) in str(error)
        assert (folder / name).read_bytes() == content and {p: p.read_bytes() for p in others} == others
    return loaded


KINDS = ("byte_level", "prefixed", "bpe", "unigram", "pair")


def folder_of(kind: str, folder: Path) -> tuple[Path, list[str]]:
    """A folder with a tokenizer, and the files to damage."""
    config = {"eos_token": END, "bos_token": {"content": BEGIN}, "add_bos_token": False}
    if kind == "pair":
        gpt2_folder(folder, added_tokens__json={END: 399}, tokenizer_config__json=config)
        return folder, ["vocab.json", "merges.txt", "added_tokens.json"]
    if kind in ("bpe", "unigram"):
        return write(folder, tokenizer__model=sentencepiece_model(kind), tokenizer_config__json=config), [
            "tokenizer.model"
        ]
    content = changed(byte_level() if kind == "byte_level" else prefixed())
    write(folder, tokenizer__json=content, special_tokens_map__json=config)
    return folder, ["tokenizer.json", "special_tokens_map.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_an_error_or_do_no_harm(kind: str, tmp_path: Path):
    """40 inputs per file; 9 files, so 360 inputs."""
    folder, names = folder_of(kind, tmp_path / "a")
    for seed, name in enumerate(names):
        sound = (folder / name).read_bytes()
        assert damage(folder, name, seed, 40) < 40
        (folder / name).write_bytes(sound)
        assert load_tokenizer(folder).end_of_text == END


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_an_error_or_do_no_harm(kind: str, tmp_path: Path):
    """1,000 inputs per file, 9,000 in all."""
    folder, names = folder_of(kind, tmp_path / "a")
    for seed, name in enumerate(names, 100):
        sound = (folder / name).read_bytes()
        damage(folder, name, seed, 1000)
        (folder / name).write_bytes(sound)


def test_a_damaged_record_of_a_saved_tokenizer_is_an_error_or_does_no_harm(tmp_path: Path):
    """100 inputs."""
    JsonTokenizer(changed(byte_level()), END, "").save(tmp_path / "a")
    assert damage(tmp_path / "a", "tokenizer_info.json", 7, 100) < 100
