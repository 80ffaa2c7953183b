"""dsllm evaluate: text of the model's own tokenizer only, each source by itself, and a result that replaces no other."""

import dataclasses
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

from dsllm.checkpoint.hugging_face_export import Export, export_hugging_face
from dsllm.cli import evaluate as evaluate_command
from dsllm.cli import run_command
from dsllm.cli.terminal import status_line
from dsllm.config.data import SourceConfig, TokenizerConfig
from dsllm.config.run import RunConfig
from dsllm.data.manifest import load_manifest
from dsllm.data.shards import Shard
from dsllm.evaluate.perplexity import HeldOutLoss, joined
from dsllm.model.transformer import Transformer
from tests.helpers.models import CONTEXT, LLAMA, WeightsOf, random_model
from tests.helpers.preparing import GOLDEN, prepared, tiny_run
from tests.helpers.saved_run import MODEL, prepare_golden, save_run
from tests.helpers.tokenizer_files import BEGIN, END, byte_level, changed, sentencepiece_model, template

RESULT = "step-00000007.json"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with prepared data."""
    return prepare_golden(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def run(golden: RunConfig, tmp_path: Path) -> Path:
    """A run directory with a checkpoint and its tokenizer, as training leaves it."""
    directory = tmp_path / "run"
    config = dataclasses.replace(golden, run=dataclasses.replace(golden.run, directory=str(directory)))
    save_run(config)
    shutil.copytree(Path(golden.data.directory) / "tokenizer", directory / "tokenizer")
    return directory


def command(*words: object) -> int:
    return run_command("evaluate", [str(word) for word in words])


def result_of(path: Path) -> dict:
    return json.loads(path.read_text())


def other_data(golden: RunConfig, directory: Path, **tokenizer: object) -> Path:
    """The first half of the golden text, prepared with another or with the same tokenizer."""
    text = directory.with_suffix(".txt")
    text.write_text(GOLDEN.read_text()[:60_000])
    source = SourceConfig(name="half", paths=(str(text),), text_documents="paragraphs")
    prepared(tiny_run([source], TokenizerConfig(**tokenizer), validation_share=0.1), directory)
    return directory


def test_text_of_another_tokenizer_is_refused_and_the_runs_result_stays(run: Path, golden, tmp_path: Path, capsys):
    assert command(run) == 0
    before = (run / "eval" / RESULT).read_bytes()
    other = other_data(golden, tmp_path / "other", vocab_size=300)
    capsys.readouterr()
    assert command(run, "--data", other) == 1
    output = capsys.readouterr()
    assert (
        "was prepared with another tokenizer" in output.err and "id " in output.err and "perplexity" not in output.out
    )
    assert [path.name for path in (run / "eval").iterdir()] == [RESULT]
    assert (run / "eval" / RESULT).read_bytes() == before


def test_other_text_of_the_same_tokenizer_gets_a_result_of_its_own(run: Path, golden, tmp_path: Path):
    assert command(run) == 0
    before = (run / "eval" / RESULT).read_bytes()
    tokenizer = json.loads((run / "tokenizer" / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))  # the same in another form
    path = str(tmp_path / "tokenizer.json")
    other = other_data(golden, tmp_path / "other half", kind="pretrained", path=path)
    assert command(run, "--data", other) == 0
    (mine, theirs) = sorted((run / "eval").iterdir(), key=lambda file: len(file.name))
    assert mine.name == RESULT and mine.read_bytes() == before
    assert theirs.name.startswith("step-00000007-other_half-") and result_of(theirs)["data"] == str(other)
    assert command(run, "--data", golden.data.directory) == 0  # its own data by name
    assert len(list((run / "eval").iterdir())) == 2


def test_an_export_is_measured_on_text_of_its_own_tokenizer_only(run: Path, golden, tmp_path: Path, capsys):
    assert run_command("export", [str(run), "--to", str(tmp_path / "hf")]) == 0
    assert command(tmp_path / "hf", "--data", golden.data.directory) == 0
    other = other_data(golden, tmp_path / "other", vocab_size=300)  # fewer ids than the model
    capsys.readouterr()
    assert command(tmp_path / "hf", "--data", other) == 1
    assert "was prepared with another tokenizer" in capsys.readouterr().err
    for file in (tmp_path / "hf").glob("tokenizer*"):
        file.unlink()
    assert command(tmp_path / "hf", "--data", golden.data.directory) == 0
    assert "not checked that" in capsys.readouterr().out


def test_a_lone_sentencepiece_model_is_compared_too(tmp_path: Path, capsys):
    """Its folder names no end-of-text; that of the data is one of its tokens."""
    folder = hugging_face_folder(tmp_path / "hf", CONTEXT, "", vocab_size=500)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model("bpe").replace(END.encode(), b"<-endoftext->"))
    (tmp_path / "a.txt").write_text(GOLDEN.read_text()[:20_000])
    source = SourceConfig(name="a", paths=(str(tmp_path / "a.txt"),), text_documents="paragraphs")
    path = str(folder / "tokenizer.model")
    for kind, fields, code in (
        ("same", {"kind": "pretrained", "path": path, "end_of_text": "<-endoftext->"}, 0),
        ("other", {"vocab_size": 300, "end_of_text": "<-endoftext->"}, 1),
    ):
        prepared(tiny_run([source], TokenizerConfig(**fields), validation_share=0.1), tmp_path / kind)
        assert command(folder, "--data", tmp_path / kind, "--output", tmp_path / "e.json") == code
        assert "not checked" not in capsys.readouterr().out


def test_a_tokenizer_of_other_merges_is_another_tokenizer(run: Path, golden, tmp_path: Path, capsys):
    """The same ids for the same tokens, but another way to cut a text."""
    content = json.loads((run / "tokenizer" / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    other = other_data(golden, tmp_path / "other", kind="pretrained", path=str(tmp_path / "tokenizer.json"))
    assert command(run, "--data", other) == 1
    assert "texts get other ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b'{"baselines": {"xz_9', b"\xff\x00", b"[]", b"null", b'{"baselines": 3}', b"", None]
)
def test_a_damaged_data_card_costs_the_baselines_only(content: bytes | None, run: Path, golden, tmp_path: Path, capsys):
    data = shutil.copytree(golden.data.directory, tmp_path / "data")
    (data / "data_card.json").unlink()
    if content is None:
        (data / "data_card.json").mkdir()
    else:
        (data / "data_card.json").write_bytes(content)
    assert command(run, "--data", data, "--output", tmp_path / "e.json") == 0
    result = result_of(tmp_path / "e.json")
    assert result["baselines"] == {} and result["loss"] > 0
    assert "data_card.json: shows no baselines" in capsys.readouterr().out


def test_baselines_that_are_no_numbers_are_left_out(run: Path, golden, tmp_path: Path):
    data = shutil.copytree(golden.data.directory, tmp_path / "data")
    card = {"baselines": {"xz_9_bits_per_byte": "x", "gzip_9_bits_per_byte": None, "unigram_bits_per_byte": 4.5}}
    (data / "data_card.json").write_text(json.dumps(card))
    assert command(run, "--data", data, "--output", tmp_path / "e.json") == 0
    assert result_of(tmp_path / "e.json")["baselines"] == {"unigram_bits_per_byte": 4.5}


def test_a_result_that_cannot_be_kept_is_shown(run: Path, tmp_path: Path, capsys):
    (run / "eval").write_text("a file in the way")
    assert command(run, "--json", tmp_path / "r.json") == 0
    output = capsys.readouterr()
    assert "shown only, not kept" in output.out and "perplexity" in output.out
    assert result_of(tmp_path / "r.json")["loss"] > 0 and (run / "eval").read_text() == "a file in the way"
    assert command(run, "--output", run / "eval" / "e.json") == 1  # what was asked for is an error


def two_sources(directory: Path) -> RunConfig:
    text = GOLDEN.read_text()
    sources = []
    for name, part in (("long", text[:60_000]), ("short", text[60_000:70_000].upper())):
        (directory / f"{name}.txt").write_text(part)
        path = (str(directory / f"{name}.txt"),)
        sources.append(SourceConfig(name=name, paths=path, text_documents="paragraphs", weight=0.5))
    config = tiny_run(sources, validation_share=0.1, sequence_length=CONTEXT, directory=str(directory / "data"))
    prepared(config, directory / "data")
    run = dataclasses.replace(config.run, directory=str(directory / "run"))
    return dataclasses.replace(config, model=MODEL, run=run)


@torch.no_grad()
def expected(model: Transformer, ids: list[int], first: int) -> float:
    """The summed loss of a stream of tokens in windows of the context, computed plainly."""
    total = 0.0
    for start in range(0, len(ids), CONTEXT):
        targets = ids[start : start + CONTEXT]
        inputs = [ids[start - 1] if start else first, *targets[:-1]]
        total += F.cross_entropy(model(torch.tensor([inputs]))[0], torch.tensor(targets), reduction="sum").item()
    return total


def test_each_source_has_numbers_of_its_own(tmp_path: Path, capsys):
    config = two_sources(tmp_path)
    directory, model = save_run(config)
    assert command(directory) == 0
    result = result_of(directory / "eval" / RESULT)
    manifest = load_manifest(tmp_path / "data")
    total = count = size = 0
    for source in manifest.sources:
        (record,) = source.validation
        ids = [int(i) for i in Shard(tmp_path / "data" / record.prefix).read(0, record.num_tokens)]
        loss = expected(model, ids, manifest.tokenizer.end_of_text_id)
        found = result["sources"][source.name]
        assert (found["num_tokens"], found["text_bytes"]) == (len(ids), record.text_bytes)
        assert found["loss"] == pytest.approx(loss / len(ids), rel=1e-5)  # fp32, other batches
        total, count, size = total + loss, count + len(ids), size + record.text_bytes
    assert (result["num_tokens"], result["text_bytes"]) == (count, size)
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    shown = capsys.readouterr().out
    assert "  long: loss" in shown and "  short: loss" in shown
    assert command(directory, "--max-sequences", 4, "--output", tmp_path / "e.json") == 0
    assert result_of(tmp_path / "e.json")["sources"] == {}  # a sample over all of them


def test_token_shards_without_text_have_a_loss_and_no_bits_per_byte(run: Path, golden, tmp_path: Path, capsys):
    shards = load_manifest(Path(golden.data.directory)).sources[0].train
    paths = tuple(str(Path(golden.data.directory) / shard.prefix) for shard in shards)
    source = SourceConfig(name="ids", kind="megatron", paths=paths)
    tokenizer = TokenizerConfig(kind="pretrained", path=str(run / "tokenizer"))
    prepared(tiny_run([source], tokenizer, validation_share=0.1), tmp_path / "data")
    assert command(run, "--data", tmp_path / "data", "--output", tmp_path / "e.json") == 0
    result = result_of(tmp_path / "e.json")
    assert result["loss"] > 0 and result["bits_per_byte"] is None and result["text_bytes"] is None
    assert "bits per byte" not in capsys.readouterr().out


def hugging_face_folder(folder: Path, context_length: int, tokenizer: str, vocab_size: int = 400) -> Path:
    config = dataclasses.replace(LLAMA, vocab_size=vocab_size, context_length=context_length)
    export = Export(config=config, context_length=context_length, end_of_text_id=1, begin_of_text_id=0)
    export_hugging_face(WeightsOf(random_model(config)), export, folder)
    (folder / "tokenizer.json").write_text(tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "bos_token": BEGIN}))
    return folder


@pytest.mark.parametrize("begins", [False, True])
def test_a_long_context_is_not_filled_up_and_the_first_token_follows_the_models_begin(
    begins: bool, tmp_path: Path, capsys
):
    content = changed(byte_level(), post_processor=template(f"{BEGIN} $A"))
    folder = hugging_face_folder(tmp_path / "hf", 131_072, content)
    (tmp_path / "a.txt").write_text(GOLDEN.read_text()[:20_000])
    source = SourceConfig(name="a", paths=(str(tmp_path / "a.txt"),), text_documents="paragraphs")
    fields = {"kind": "pretrained", "path": str(folder), "begin_of_text": BEGIN if begins else None}
    prepared(tiny_run([source], TokenizerConfig(**fields), validation_share=0.1), tmp_path / "data")
    computed: list[int] = []

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, Transformer):
            computed.append(inputs[0].numel())

    hook = register_module_forward_pre_hook(count)
    try:
        assert command(folder, "--data", tmp_path / "data", "--output", tmp_path / "e.json") == 0
    finally:
        hook.remove()
    result = result_of(tmp_path / "e.json")
    assert sum(computed) == result["num_tokens"] < 2000 and result["sequence_length"] == 131_072
    (record,) = load_manifest(tmp_path / "data").sources[0].validation
    ids = [int(i) for i in Shard(tmp_path / "data" / record.prefix).read(0, record.num_tokens)]
    assert (ids[0] == 0) == begins
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = theirs(torch.tensor([[1 if begins else 0, *ids[:-1]]])).logits[0]
    loss = F.cross_entropy(logits, torch.tensor(ids)).item()
    assert result["loss"] == pytest.approx(loss, rel=1e-4)  # fp32, up to 2,000 positions
    assert ("tokenizer.begin_of_text: '<|begin|>'" in capsys.readouterr().out) == (not begins)


def test_weights_that_are_not_finite_are_named_and_nothing_is_written(run: Path, golden, tmp_path: Path, capsys):
    assert run_command("export", [str(run), "--to", str(tmp_path / "hf")]) == 0
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "e.json").write_text("before")
    assert command(tmp_path / "hf", "--data", golden.data.directory, "--output", tmp_path / "e.json") == 1
    output = capsys.readouterr()
    assert "weights are not finite" in output.err and "layers.1.mlp" in output.err and "perplexity" not in output.out
    assert (tmp_path / "e.json").read_text() == "before"


def test_what_overflows_in_fp16_only_is_named_too():
    result = HeldOutLoss(loss=math.nan, num_tokens=5, text_bytes=5)
    assert joined([result, HeldOutLoss(loss=1.0, num_tokens=1, text_bytes=None)]).text_bytes is None
    assert math.isnan(joined([result]).loss)


def test_prepared_data_is_not_a_model(golden, capsys):
    assert command(golden.data.directory) == 1
    assert "is prepared data, not a model" in capsys.readouterr().err


def test_progress_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys):
    with status_line() as status:
        status("loading")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with status_line() as status:
        progress = evaluate_command._Progress(status, 2)
        progress.step()
        progress.step()  # too soon after the first to be shown
    shown = capsys.readouterr().err
    assert "micro-batch 1 of 2" in shown and "2 of 2" not in shown and shown.endswith("\r\x1b[K")


NAMES = ("manifest.json", "data_card.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_info.json")


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_of_the_data_are_an_error_or_do_no_harm(name: str, run: Path, golden, tmp_path: Path, capsys):
    """12 inputs per file, 48 in all: cut, flipped, and of the wrong kind. The run and its result stay as they were."""
    data, rng = shutil.copytree(golden.data.directory, tmp_path / "data"), random.Random(name)
    assert command(run, "--data", data, "--output", tmp_path / "sound.json") == 0
    sound, wanted = (data / name).read_bytes(), result_of(tmp_path / "sound.json")["loss"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    flips = [bytearray(sound) for _ in range(4)]
    for flipped in flips:
        flipped[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
    cut = [sound[: rng.randrange(len(sound))] for _ in range(3)]
    for content in [*flips, *cut, b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000]:
        (data / name).write_bytes(content)
        (tmp_path / "e.json").unlink(missing_ok=True)
        if command(run, "--data", data, "--output", tmp_path / "e.json") == 0:
            assert result_of(tmp_path / "e.json")["loss"] == wanted
        else:
            assert not (tmp_path / "e.json").exists() and str(data) in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
