"""dsllm evaluate, generate and export, from a run directory to their output."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

from dsllm.checkpoint import hugging_face_export
from dsllm.cli import run_command
from dsllm.cli.export import DTYPES
from dsllm.config.run import RunConfig
from dsllm.data.manifest import load_manifest
from dsllm.data.validation import ValidationBatches
from dsllm.model.transformer import Transformer
from tests.helpers.models import CONTEXT, tokens_for
from tests.helpers.saved_run import MODEL, prepare_golden, save_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path, Transformer]:
    """A run with prepared data and one checkpoint."""
    config = prepare_golden(tmp_path_factory.mktemp("saved"))
    return config, *save_run(config)


def command(name: str, *words: object) -> int:
    return run_command(name, [str(word) for word in words])


@torch.no_grad()
def test_evaluate_measures_every_held_out_token_once(saved, capsys):
    config, directory, model = saved
    assert command("evaluate", directory) == 0
    report = json.loads((directory / "eval" / "step-00000007.json").read_text())
    data = Path(config.data.directory)
    manifest = load_manifest(data)
    total, count = 0.0, 0
    for batch in ValidationBatches(data, manifest, sequence_length=CONTEXT, micro_batch_sequences=1):
        logits = model(batch.inputs)[batch.weights > 0]
        total += F.cross_entropy(logits, batch.targets[batch.weights > 0], reduction="sum").item()
        count += int(batch.weights.sum())
    held_out = manifest.sources[0].validation
    assert report["num_tokens"] == count == sum(shard.num_tokens for shard in held_out)
    assert report["text_bytes"] == sum(shard.text_bytes for shard in held_out)
    assert report["loss"] == pytest.approx(total / count, rel=1e-5)  # fp32, other batches
    assert report["bits_per_byte"] == pytest.approx(total / math.log(2) / report["text_bytes"], rel=1e-5)
    assert report["baselines"]["xz_9_bits_per_byte"] > 1
    shown = capsys.readouterr().out
    assert f"{report['bits_per_byte']:.4f}" in shown and "xz -9" in shown and "gzip -9" in shown and "unigram" in shown


def test_evaluate_takes_a_window_a_stride_and_a_share_of_the_text(saved, tmp_path: Path):
    _, directory, _ = saved
    words = ["--stride", 16, "--sequence-length", 32, "--max-sequences", 5, "--output", tmp_path / "e.json"]
    assert command("evaluate", directory, *words, "--precision", "bf16") == 0
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["num_tokens"] <= 5 * 32
    assert (report["sequence_length"], report["stride"], report["precision"]) == (32, 16, "bf16")


def test_an_export_is_the_same_model_to_transformers_and_to_us(saved, tmp_path: Path, capsys):
    config, directory, model = saved
    assert command("export", directory, "--to", tmp_path / "hf") == 0
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())
    tokens = tokens_for(MODEL)
    with torch.no_grad():
        wanted = model(tokens)
        assert float((theirs(tokens).logits - wanted).abs().max() / wanted.abs().max()) < 5e-6
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("First Citizen:\n")["input_ids"]
    assert tokenizer.decode(ids) == "First Citizen:\n" and tokenizer.eos_token == "<|endoftext|>"

    assert command("evaluate", tmp_path / "hf", "--data", config.data.directory, "--output", tmp_path / "e.json") == 0
    assert command("evaluate", directory, "--output", tmp_path / "f.json") == 0
    one, other = (json.loads((tmp_path / name).read_text()) for name in ("e.json", "f.json"))
    assert one["loss"] == other["loss"]

    capsys.readouterr()
    assert command("generate", tmp_path / "hf", "--prompt", "First", "--greedy", "--max-tokens", 20) == 0
    ours = capsys.readouterr().out
    start = [tokenizer.eos_token_id, *tokenizer("First")["input_ids"]]
    out = theirs.generate(torch.tensor([start]), max_new_tokens=20, do_sample=False)[0, 1:]
    assert ours == tokenizer.decode(out, skip_special_tokens=True) + "\n"


def test_generate_continues_the_prompt_and_a_seed_repeats_it(saved, capsys):
    _, directory, _ = saved
    texts = []
    for seed in (1, 1, 2):
        words = ["--prompt", "First Citizen", "--max-tokens", 30, "--temperature", 2, "--top-p", 1, "--seed", seed]
        assert command("generate", directory, *words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("First Citizen") for text in texts)
    assert command("generate", directory, "--samples", 2, "--seed", 1, *words[:-2]) == 0
    assert capsys.readouterr().out == texts[1] + texts[2]


def test_each_result_as_json_is_alone_on_standard_output(saved, tmp_path: Path, capfd):
    _, directory, model = saved
    manifest = load_manifest(Path(saved[0].data.directory))

    def result(name: str, *words: object) -> dict:
        assert command(name, directory, *words, "--json", "-") == 0
        output = capfd.readouterr()
        document = json.loads(output.out)  # one document, and nothing else
        assert document["format_version"] == 1 and document["step"] == 7 and output.err
        return document

    measured = result("evaluate", "--max-sequences", 2)
    assert measured == json.loads((directory / "eval" / "step-00000007.json").read_text())

    words = ["--prompt", "First", "--max-tokens", 5, "--samples", 2, "--seed", 3]
    written = result("generate", *words)
    assert command("generate", directory, *words) == 0
    assert "".join(f"First{sample['text']}\n" for sample in written["samples"]) == capfd.readouterr().out
    assert [sample["seed"] for sample in written["samples"]] == [3, 4]
    assert all(len(sample["tokens"]) <= 5 for sample in written["samples"]) and written["prompt"] == "First"
    assert written["prompt_tokens"][0] == manifest.tokenizer.end_of_text_id

    exported = result("export", "--to", tmp_path / "hf", "--dtype", "bfloat16")
    there = {file.name: file.stat().st_size for file in (tmp_path / "hf").iterdir()}
    assert {file["name"]: file["bytes"] for file in exported["files"]} == there
    assert exported["bytes"] == sum(there.values()) > 2 * sum(p.numel() for p in model.parameters())
    assert (exported["folder"], exported["dtype"]) == (str(tmp_path / "hf"), "bfloat16")


def test_a_result_that_cannot_be_written_is_refused_before_the_evaluation(saved, tmp_path: Path, capsys):
    (tmp_path / "file").touch()
    assert command("evaluate", saved[1], "--output", tmp_path / "file" / "e.json") == 1
    output = capsys.readouterr()
    assert "file: cannot be made" in output.err and "perplexity" not in output.out


def test_the_dtypes_are_those_of_the_writer():
    assert list(DTYPES) == list(hugging_face_export.DTYPES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "nowhere"], "no such folder"),
        (["evaluate", "RUN", "--data", "nowhere"], "run `dsllm prepare CONFIG`"),
        (["evaluate", "RUN", "--sequence-length", "65"], "beyond the model's context of 64"),
        (["evaluate", "RUN", "--stride", "65"], "beyond the 64 tokens"),
        (["generate", "RUN", "--prompt", "long " * 100], "shorten the prompt"),
        (["generate", "RUN", "--data", "nowhere"], "--data"),
        (["export", "RUN", "--to", "RUN"], "not empty"),
        (["export", "RUN", "--to", "RUN/hf", "--tokenizer", "nowhere"], "no such file"),
    ],
)
def test_what_does_not_fit_is_refused(saved, words: list[str], message: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(words[0], *(word.replace("RUN", str(saved[1])) for word in words[1:])) == 1
    assert message in capsys.readouterr().err


def test_a_model_with_too_small_a_vocabulary_is_refused(saved, tmp_path: Path, capsys):
    config = dataclasses.replace(
        saved[0],
        run=dataclasses.replace(saved[0].run, directory=str(tmp_path / "run")),
        model=dataclasses.replace(MODEL, vocab_size=300),
    )
    directory, _ = save_run(config)
    assert command("evaluate", directory) == command("generate", directory) == 1
    assert capsys.readouterr().err.count("300") == 2


def test_an_export_without_tokenizer_and_in_another_dtype(saved, tmp_path: Path):
    words = ["--without-tokenizer", "--dtype", "bfloat16", "--shard-gb", "0.00005"]
    assert command("export", saved[1], "--to", tmp_path / "hf", *words) == 0
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert "tokenizer.json" not in names and "model.safetensors.index.json" in names
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16


def test_an_export_gives_way_only_when_asked_and_only_a_model(saved, tmp_path: Path, capsys):
    words = ["--without-tokenizer", "--to", tmp_path / "hf"]
    assert command("export", saved[1], *words) == 0
    assert command("export", saved[1], *words) == 1 and "give --replace" in capsys.readouterr().err
    assert command("export", saved[1], *words, "--replace", "--dtype", "bfloat16") == 0
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    (tmp_path / "hf" / "config.json").unlink()
    assert command("export", saved[1], *words, "--replace") == 1


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_a_size_of_shards_that_is_none_is_refused(saved, size: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command("export", saved[1], "--to", tmp_path / "hf", f"--shard-gb={size}")
    assert "--shard-gb must be a finite number above 0" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_an_export_follows_a_link_to_a_folder(saved, tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for more in ([], ["--replace"]):
        assert command("export", saved[1], "--to", tmp_path / "link", *more) == 0
        assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
