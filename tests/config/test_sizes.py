"""A named size fills in the fields that the run does not set, and the documented table of sizes is true."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from dsllm.config.model import ModelConfig
from dsllm.config.sizes import SIZES, resolve_size
from dsllm.counts import parameter_count
from tests.helpers.sizes import PUBLISHED

PAGE = (Path(__file__).parents[2] / "docs" / "model.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_a_valid_model_without_vocabulary_or_context(name: str):
    section, problem = resolve_size({"size": name})
    config = TypeAdapter(ModelConfig).validate_python(section)
    assert problem is None
    assert config.vocab_size is None and config.context_length is None
    assert config.num_heads % config.kv_heads == 0 and config.num_heads * config.head_width == config.hidden_size


def test_given_fields_win_over_the_size():
    section, _ = resolve_size({"size": "llama-20m", "num_layers": 2})
    assert section["num_layers"] == 2 and section["hidden_size"] == SIZES["llama-20m"]["hidden_size"]


def test_an_unknown_size_is_a_problem_that_suggests_the_nearest():
    section, problem = resolve_size({"size": "lama-20m"})
    assert section == {"size": "lama-20m"}
    assert "did you mean 'llama-20m'" in problem


def test_a_section_without_size_is_unchanged():
    assert resolve_size({"num_layers": 3}) == ({"num_layers": 3}, None)


@pytest.mark.parametrize("name", SIZES)
def test_the_table_of_sizes_in_the_documents_is_true(name: str):
    vocab_size, context_length = PUBLISHED[name]
    model = TypeAdapter(ModelConfig).validate_python(SIZES[name] | {"vocab_size": vocab_size})
    heads = str(model.num_heads) if model.kv_heads == model.num_heads else f"{model.num_heads} ({model.kv_heads})"
    total = parameter_count(model, context_length, padded=False).total
    facts = [model.num_layers, model.hidden_size, heads, model.mlp_width]
    row = [f"`{name}`", *map(str, facts), f"{vocab_size:,}", f"{context_length:,}", f"{total:,}"]
    assert f"| {' | '.join(row)} |" in PAGE
