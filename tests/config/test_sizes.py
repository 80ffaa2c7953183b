"""Named sizes fill what was not given, and only that."""

import pytest
from pydantic import TypeAdapter

from dsllm.config.model import ModelConfig
from dsllm.config.sizes import PUBLISHED, SIZES, resolve_size


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


def test_an_unknown_size_is_answered_with_the_nearest():
    section, problem = resolve_size({"size": "lama-20m"})
    assert section == {"size": "lama-20m"}
    assert "did you mean 'llama-20m'" in problem


def test_a_section_without_size_is_left_alone():
    assert resolve_size({"num_layers": 3}) == ({"num_layers": 3}, None)


def test_every_size_says_what_it_was_published_with():
    assert list(PUBLISHED) != [] and set(PUBLISHED) == set(SIZES)
