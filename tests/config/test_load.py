"""A run loads as written, and everything wrong with it is reported at once: file and line, field, problem, suggestion."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from dsllm.config.load import load_run, run_from_dict, run_to_dict
from dsllm.config.run import RunConfig
from dsllm.config.yaml_file import read_yaml, write_yaml
from dsllm.errors import ConfigError

GOOD = """\
run: {seed: 5}
data:
  sources:
    - {name: books, kind: files, paths: [books], weight: 2}
    - {name: web, kind: files, paths: [web], weight: 1}
  sequence_length: 64
model: {num_layers: 2, hidden_size: 32, num_heads: 4}
train:
  total_tokens: 2e6
  global_batch_sequences: 8
  micro_batch_sequences: 2
  optimizer: {learning_rate: 1e-3}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "books.yaml"
    path.write_text(GOOD)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run(str(path), overrides)
    return caught.value.problems


def test_defaults_then_file_then_overrides(file):
    config = load_run(
        str(file), ["train.optimizer.learning_rate=5e-4", "data.sources.1.weight=3", "log.tensorboard=false"]
    )
    assert config.train.optimizer.learning_rate == 5e-4
    assert config.train.optimizer.beta2 == 0.95  # a default
    assert [s.weight for s in config.data.sources] == [2, 3]
    assert config.log.tensorboard is False


def test_numbers_follow_yaml_1_2(file):
    config = load_run(str(file), [])
    assert config.train.total_tokens == 2_000_000 and isinstance(config.train.total_tokens, int)
    assert config.train.optimizer.learning_rate == 1e-3


def test_names_and_directories_follow_from_the_file(file):
    config = load_run(str(file), [])
    assert (config.run.name, config.run.directory, config.data.directory) == ("books", "runs/books", "data/books")
    named = load_run(str(file), ["run.name=other"])
    assert (named.run.directory, named.data.directory) == ("runs/other", "data/other")


def test_a_run_survives_being_saved(file, tmp_path):
    config = load_run(str(file), ["model.size=gpt2-355m"])
    path = tmp_path / "saved.yaml"
    path.write_text(write_yaml(run_to_dict(config)))
    assert load_run(str(path), []) == config == run_from_dict(run_to_dict(config), "checkpoint")


def test_a_size_is_taken_under_the_fields_given(file):
    config = load_run(str(file), ["model.size=gpt2-355m"])
    assert config.model.num_layers == 2 and config.model.norm == "layernorm"


def test_every_problem_is_reported_at_once_with_its_place(file):
    file.write_text(GOOD.replace("num_layers: 2", "num_layres: 2").replace("seed: 5", "seed: five"))
    found = problems(file, "train.precision=fp8", "chekpoint.every_steps=3")
    assert len(found) == 4
    text = "\n".join(found)
    assert f"{file}:7: model.num_layres: unknown key; did you mean 'num_layers'?" in text
    assert f"{file}:1: run.seed: input should be a valid integer" in text and "'five'" in text
    assert "override 'train.precision=fp8': train.precision" in text and "'fp32_compute_bf16'" in text
    assert "fp8 is refused until a GPU run has proven its numbers: use bf16" in text
    assert "override 'chekpoint.every_steps=3': chekpoint: unknown key; did you mean 'checkpoint'?" in text


def test_a_key_in_the_wrong_section_is_found(file):
    (text,) = problems(file, "total_tokens=5")
    assert "did you mean 'train.total_tokens'?" in text


def test_a_union_is_one_problem(file):
    (text,) = problems(file, "train.activation_checkpointing=some")
    assert "'none', 'full', 'attention' or 'mlp'" in text and "integer" in text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.hidden_size=33", "model.num_heads: hidden_size 33 is not divisible by 4"),
        ("model.num_kv_heads=3", "num_heads 4 is not divisible by 3"),
        ("model.context_length=32", "32 is shorter than data.sequence_length 64"),
        ("model.size=llama-9b", "did you mean"),
        ("train.micro_batch_sequences=0", "must be above 0"),
        ("train.micro_batch_sequences=9", "is more than global_batch_sequences 8"),
        ("train.activation_checkpointing=0", "every k-th block with k >= 1, but it is 0"),
        (
            "train={kernels: liger, compile: true}",
            "liger and train.compile cannot be combined, because the compiler fuses",
        ),
        ("train.activation_offload=true", "has no effect while train.activation_checkpointing is none"),
        ("train.schedule.decay_steps=5", "must be wsd for decay_steps and decay_tokens, but it is cosine"),
        ("data.validation_share=1.5", "must be in [0, 1)"),
        ("data.sources.1.name=books", "is already the name of source 0"),
        ("data.sources.0.name=a/b", "becomes part of file names"),
        ("data.sources.0.paths=[]", "must be set for kind files"),
        ("data.sources=[]", "needs at least one source"),
        ("tokenizer.kind=pretrained", "tokenizer.path: must be set for kind pretrained"),
        ("tokenizer.vocab_size=100", "must be at least 257"),
        ("run.name=a b", "becomes a folder's name"),
        ("train.total_tokens=2.5", "valid integer"),
        ("train", "write it as key.path=value"),
        ("data.sources.7.weight=1", "there is no '7'"),
    ],
)
def test_what_cannot_work_is_refused(file, override, says):
    assert any(says in text for text in problems(file, override)), problems(file, override)


def number_fields(branch: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Key path of every field of a run that takes a number; in lists, of the first entry."""
    for field in dataclasses.fields(branch):
        arms = [field.type, *get_args(field.type)]
        inner = [arm for arm in arms if dataclasses.is_dataclass(arm)]
        here = (*path, field.name, "0") if inner and "tuple" in str(field.type) else (*path, field.name)
        for branch_below in inner:
            yield from number_fields(branch_below, here)
        if {int, float} & set(arms):
            yield here


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_every_number_of_a_run_must_be_finite(tmp_path, value):
    tree: dict = {}
    fields = list(number_fields(RunConfig))
    assert (
        len(fields) > 50
        and ("model", "rope_scaling", "factor") in fields
        and ("data", "sources", "0", "weight") in fields
    )
    for path in fields:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    tree["data"]["sources"] = [{"name": "a", "kind": "embedded", **tree["data"]["sources"]["0"]}]
    file = tmp_path / "numbers.yaml"
    file.write_text(write_yaml(tree))
    lines = read_yaml(file)[1]
    found = problems(file)
    for path in fields:
        start = f"{file}:{lines[path]}: {'.'.join(path)}: "
        assert any(text.startswith(start) and "finite number, but it is" in text for text in found), path
    assert len(found) == len(fields)


def test_an_override_that_is_too_large_for_a_number_is_refused(file):
    (text,) = problems(file, "train.optimizer.learning_rate=1e999")
    assert text == (
        "override 'train.optimizer.learning_rate=1e999': train.optimizer.learning_rate: "
        "input should be a finite number, but it is inf"
    )


def test_a_suggestion_is_found_in_every_kind_of_branch(file):
    found = problems(
        file, "data.sources.0.wieght=1", "model.rope_scaling={facter: 2}", "train.optimizer.lerning_rate=1"
    )
    assert [text.split("did you mean ")[1] for text in found] == ["'weight'?", "'factor'?", "'learning_rate'?"]


def test_weights_for_some_sources_only(file):
    file.write_text(GOOD.replace(", weight: 1", ""))
    assert "['books'] have a weight and ['web'] have none" in problems(file)[0]


def test_a_missing_file_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "absent.yaml (looked in the working directory" in problems(Path("absent.yaml"))[0]


@pytest.mark.parametrize("text", ["- a\n", "a: [", "run: {seed: 1}\nrun: {seed: 2}\n", "\xff"])
def test_a_file_that_is_no_run(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    assert str(path) in problems(path)[0]


def test_empty_sections_mean_the_defaults(file):
    file.write_text(GOOD + "checkpoint:\n  # every_steps: 5\n")
    assert load_run(str(file), []).checkpoint.every_steps == 500


def test_no_file_is_the_embedded_recipe():
    config = load_run(None, [])
    assert isinstance(config, RunConfig) and config.run.name == "pydocs"


def test_yaml_1_2_scalars(tmp_path):
    path = tmp_path / "scalars.yaml"
    path.write_text("a: 010\nb: yes\nc: 1:30\nd: 2e6\ne: 1e-3\nf: .inf\ng: 0x10\nh: '5'\ni: 1.0\nj: on\nk: null\n")
    value, lines = read_yaml(path)
    assert value == {
        "a": 10, "b": "yes", "c": "1:30", "d": 2_000_000, "e": 0.001, "f": float("inf"), "g": 16, "h": "5", "i": 1.0,
        "j": "on", "k": None,
    }  # fmt: skip
    assert lines[("d",)] == 4
    path.write_text(write_yaml(value))
    assert read_yaml(path)[0] == value


def test_an_override_of_an_aliased_value_changes_one_place(file):
    web = "{name: web, kind: files, paths: [web], weight: 1}"
    file.write_text(GOOD.replace("{name: books", "&one {name: books").replace(web, "{<<: *one, name: web}"))
    config = load_run(str(file), ["data.sources.0.weight=5", "data.sources.0.paths.0=other"])
    assert [(s.name, s.weight, s.paths) for s in config.data.sources] == [
        ("books", 5, ("other",)),
        ("web", 2, ("books",)),
    ]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.sources.0.paths=corpus.txt", "must be a list, but it is 'corpus.txt': write [corpus.txt]"),
        ("train.total_tokens.x=1", "'2000000' has no 'x' to set"),
        ("data.sources.²=1", "there is no '²': the list has 2 entries"),
        ("data.sources.9999999999999999999999.name=1", "the list has 2 entries"),
        ("model.rope_scaling.0=1", "there is no list 'rope_scaling' in the file"),
        ("run.directory=data/books", "run.directory: data/books is also data.directory"),
        ("run.name=" + "x" * 100_000 + "/", "..."),
        ("train.total_tokens=[" + "1," * 1000 + "]", "characters)"),
        ("train.timeout_minutes=1e9", "must be at most 525,600"),
        ("data.sources=&a [*a]", "*a is inside what it stands for"),
    ],
    ids=lambda text: text[:30],
)
def test_overrides_that_cannot_work(file, override, says):
    if says == "...":
        assert "becomes a folder's name" in problems(file, override)[0]
    else:
        found = problems(file, override)
        assert any(says in text for text in found) and all(len(text) < 2500 for text in found), found


def test_a_name_that_nobody_wrote_says_where_it_comes_from(tmp_path):
    path = tmp_path / "my rün.yaml"
    path.write_text("train: {total_tokens: 2e6}\n")
    (text,) = problems(path)
    assert text == (
        f"{path}: run.name: 'my rün' becomes a folder's name: use letters, digits, '.', '-' and '_'. "
        "The name is that of the file: rename it, or set run.name"
    )
    assert load_run(str(path), ["run.name=mine"]).run.name == "mine"


def test_a_folder_in_place_of_a_run_file(tmp_path):
    with pytest.raises(ConfigError, match="is a folder without a YAML file"):
        load_run(str(tmp_path))
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"is a folder: name the run's YAML file in it, for example .*/a\.yaml"):
        load_run(str(tmp_path))


def test_the_file_of_a_run_is_not_replaced_by_its_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("run: {name: a, directory: .}\ndata: {directory: ../data}\n")
    assert problems(Path("run.yaml")) == [
        f"{tmp_path}/run.yaml:1: run.directory: . contains run.yaml, which the run would replace by its record: name another"
    ]
    Path("status.json").write_text("{}")  # a run has trained here, and this is its record
    assert load_run("run.yaml").run.directory == "."
