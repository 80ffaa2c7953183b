"""dsllm generate: prompts begin as in training, words that cannot be are refused, and a reader may leave."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dsllm.checkpoint.hugging_face_export import Export, export_hugging_face
from dsllm.cli import run_command
from tests.helpers.models import CONTEXT, LLAMA, WeightsOf, random_model
from tests.helpers.saved_run import prepare_golden, save_run
from tests.helpers.tokenizer_files import BEGIN, END, byte_level, changed, prefixed, sentencepiece_model, template

BYTES = changed(byte_level(), post_processor=template(f"{BEGIN} $A"))


def folder_of(folder: Path, tokenizer: str, **config: object) -> Path:
    """A Hugging Face folder of a random model."""
    model_config = dataclasses.replace(LLAMA, vocab_size=600)
    export = Export(config=model_config, context_length=CONTEXT, end_of_text_id=1, begin_of_text_id=0)
    export_hugging_face(WeightsOf(random_model(model_config)), export, folder)
    (folder / "tokenizer.json").write_text(tokenizer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": BEGIN} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def generated(folder: Path, *words: object, prompt: str = "The river") -> dict:
    """The result as a JSON document."""
    file = folder.parent / "result.json"
    options = ["--prompt", prompt, "--greedy", "--max-tokens", 12, "--json", file, *words]
    assert run_command("generate", [str(word) for word in (folder, *options)]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("tokenizer", "config"),
    [
        (BYTES, {}),
        (BYTES, {"bos_token": None}),
        (changed(prefixed(), post_processor=template(f"{BEGIN} $A", begin=1, end=2)), {}),
    ],
    ids=["template", "template-alone", "template-llama-2"],
)
def test_a_prompt_begins_as_transformers_begins_it(tokenizer: str, config: dict, tmp_path: Path, capsys):
    folder = folder_of(tmp_path / "hf", tokenizer, **config)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = theirs("The river", return_tensors="pt", return_token_type_ids=False)
    result = generated(folder)
    assert result["prompt_tokens"] == prompt.input_ids[0].tolist()
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=1)[0]
    assert result["samples"][0]["tokens"] == [i for i in out[len(result["prompt_tokens"]) :].tolist() if i != 1]
    shown = capsys.readouterr().out.splitlines()
    assert "\n".join(shown).startswith("The river" + result["samples"][0]["text"].split("\n")[0].rstrip("\r"))


@pytest.mark.parametrize(("words", "first"), [([], 1), (["--begin-of-text", BEGIN], 0), (["--end-of-text", BEGIN], 0)])
def test_without_a_begin_of_text_a_prompt_follows_an_end_of_text(words: list[str], first: int, tmp_path: Path):
    folder = folder_of(tmp_path / "hf", changed(byte_level()), bos_token=None)
    assert generated(folder, *words)["prompt_tokens"][0] == first


@pytest.mark.parametrize(("index", "first"), [(2, 2), (1, 1), (0, 1), (300, 1), (None, 1), (5000, 1)])
def test_a_lone_sentencepiece_model_begins_with_the_special_token_of_the_config(
    index: int | None, first: int, tmp_path: Path
):
    """Which is BEGIN, id 2; 0 is its unknown token, and 300 a piece of text."""
    folder = folder_of(tmp_path / "hf", "")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    content = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(content | {"bos_token_id": index}))
    assert generated(folder)["prompt_tokens"][0] == first


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_any_of_a_models_several_ends_ends_a_text(file: str, tmp_path: Path):
    folder = folder_of(tmp_path / "hf", BYTES)
    tokens = generated(folder)["samples"][0]["tokens"]
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {"eos_token_id": [1, tokens[5]]}))
    sample = generated(folder)["samples"][0]
    assert sample["tokens"] == tokens[: tokens.index(tokens[5])] and sample["ended"] == "end_of_text"
    (folder / file).write_text(json.dumps(content | {"eos_token_id": "x"}))
    assert run_command("generate", [str(folder)]) == 1


def test_the_space_that_a_model_writes_is_shown(tmp_path: Path, capsys):
    folder = folder_of(tmp_path / "hf", changed(prefixed()))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    vocabulary = prefixed()["model"]["vocab"]
    word = next(token for token in vocabulary if token.startswith("\u2581") and token[1:].isalpha())
    with torch.no_grad():
        prompt = generated(folder, prompt="The")["prompt_tokens"]
        state = model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        model.lm_head.weight[vocabulary[word]] = 100 * state
    model.save_pretrained(folder)
    capsys.readouterr()
    result = generated(folder, "--max-tokens", 1, prompt="The")
    assert result["samples"][0]["text"] == f" {word[1:]}"
    assert capsys.readouterr().out == f"The {word[1:]}\n"


def test_an_empty_text_says_that_the_model_ended_it(tmp_path: Path, capsys):
    folder = folder_of(tmp_path / "hf", BYTES)
    first = generated(folder)["samples"][0]["tokens"][0]
    content = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(content | {"eos_token_id": [first]}))
    capsys.readouterr()
    assert generated(folder)["samples"][0] == {"seed": 0, "tokens": [], "text": "", "ended": "end_of_text"}
    output = capsys.readouterr()
    assert output.out == "The river\n" and "sample 1: the model ended the text at once" in output.err
    assert generated(folder, "--max-tokens", 0)["samples"][0]["ended"] == "max_tokens"
    assert "at once" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "99999999999999999999"], "--seed cannot be .* it must be from -9223372036854775808"),
        (["--seed", str(2**64 - 1), "--samples", "2"], "for the last sample too"),
        (["--seed", str(-(2**63) - 1)], "--seed"),
        (["--top-p", "2"], "--top-p cannot be 2.0: it must be above 0 and at most 1"),
        (["--top-p", "nan"], "--top-p"),
        (["--temperature", "-1"], "it must be 0 or more"),
        (["--temperature", "nan"], "--temperature"),
        (["--prompt", "a\udcff"], "--prompt is not UTF-8 text: byte 0xff at character 2"),
        (["--prompt", "\ud800"], "half a character"),
        (["--end-of-text", "\udcff"], "--end-of-text is not UTF-8"),
        (["--samples", "0"], "1 or more"),
        (["--max-tokens", "9" * 5000], "invalid int"),
    ],
)
def test_words_that_cannot_be_are_refused_before_the_model_is_looked_for(words: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as error:
        run_command("generate", ["nowhere", *words])
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "words",
    [
        ["--temperature", "1e-40"],
        ["--temperature", "inf"],
        ["--top-k", "9" * 30],
        ["--top-p", "1e-9"],
        ["--seed", "-1"],
    ],
)
def test_odd_words_that_can_be_are_obeyed(words: list[str], tmp_path: Path, capsys):
    folder = folder_of(tmp_path / "hf", BYTES)
    assert run_command("generate", [str(folder), "--max-tokens", "3", *words]) == 0
    if words[1] in ("1e-40", "1e-9"):
        greedy = generated(folder, "--max-tokens", 3, prompt="")["samples"][0]["text"]
        assert capsys.readouterr().out.count(greedy + "\n") == 2


@pytest.mark.parametrize("words", [[], ["--greedy"]])
def test_weights_that_are_not_finite_are_named(words: list[str], tmp_path: Path, capsys):
    folder = folder_of(tmp_path / "hf", BYTES)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert run_command("generate", [str(folder), *words]) == 1
    assert "layers.1.mlp" in capsys.readouterr().err


def test_what_is_no_model_is_named(tmp_path: Path, capsys):
    config = prepare_golden(tmp_path)
    run, _ = save_run(config)
    for path, message in (
        (config.data.directory, "is prepared data, not a model: give a run directory"),
        (run / "checkpoints" / "step-00000003", "no such folder; there are step-00000007"),
        (tmp_path / "step-3", "no such folder\n"),
    ):
        assert run_command("generate", [str(path)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_in_a_process_a_reader_may_leave_and_a_terminal_may_have_another_encoding(tmp_path: Path):
    folder = folder_of(tmp_path / "hf", BYTES)
    command = [sys.executable, "-m", "dsllm", "generate", str(folder), "--prompt", "naïve 日本", "--max-tokens", "20"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(b"na?ve ??") and not done.stderr
    shell = f"{' '.join(command[:-4])} --samples 50 --prompt abc | head -c 2; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, timeout=120)
    assert done.stdout == b"ab0\n" and not done.stderr
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert (
        done.returncode == 1
        and b"standard output: cannot be written" in done.stderr
        and b"Traceback" not in done.stderr
    )


OPTIONS = (
    "prompt max-tokens samples temperature top-k top-p seed precision data tokenizer end-of-text begin-of-text json greedy "
    "sequence-length stride max-sequences output"
)
WORDS = [f"--{name}" for name in OPTIONS.split(" ")]
VALUES = (
    *["0", "1", "-1", "1e-40", "1e400", "nan", "inf", "-inf", "0x10", "1_0", "x", "=", "--", "--help"],
    "",
    " ",
    "9" * 5000,
    "\udcff",  # a byte that is not UTF-8; a process cannot be given NUL, or other halves of characters
    "日",
)


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_any_words_end_in_words(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """400 lists of random words for each command; no model is there, so each ends with a non-zero code or with help."""
    monkeypatch.chdir(tmp_path)
    sys.stderr.reconfigure(errors="backslashreplace")  # as in a process
    rng = random.Random(name)
    for _ in range(400):
        words = [rng.choice(WORDS if rng.random() < 0.5 else VALUES) for _ in range(rng.randrange(1, 7))]
        try:
            code = run_command(name, ["nowhere", *words] if rng.random() < 0.7 else words)
        except SystemExit as error:
            code = error.code
            assert code == 2 or (code == 0 and "--help" in words), words
        else:
            assert code in (1, 2), words
        assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_in_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    folder = folder_of(tmp_path / "hf", BYTES)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert (
            run_command("generate", [str(folder), "--samples", "100000", "--max-tokens", "50", "--temperature", "9"])
            == 130
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert "interrupted" in capsys.readouterr().err


NUMBERS = [
    "0",
    "1",
    "-1",
    "2",
    "1e-40",
    "1e-7",
    "1e-300",
    "1e40",
    "1e400",
    "0.5",
    "1.0000001",
    "nan",
    "inf",
    "-inf",
    "18446744073709551615",
    "-9223372036854775809",
    "x",
]
NUMBERS += ["9" * 30, "-" + "9" * 30, "9" * 5000]


def test_any_numbers_give_a_text_or_are_refused(tmp_path: Path, capsys):
    """100 lists of random numbers, with a model."""
    folder, rng, written = folder_of(tmp_path / "hf", BYTES), random.Random(1), 0
    for _ in range(100):
        names = rng.sample(["--temperature", "--top-k", "--top-p", "--seed"], rng.choice([1, 1, 1, 2]))
        words = [word for name in names for word in (name, rng.choice(NUMBERS))]
        try:
            assert run_command("generate", [str(folder), "--prompt", "a", "--max-tokens", "2", *words]) == 0, words
            written += 1
        except SystemExit as error:
            assert error.code == 2 and not capsys.readouterr().out, words
        capsys.readouterr()
    assert 20 < written < 80
