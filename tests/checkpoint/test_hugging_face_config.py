"""config.json files as published models have them: each is read and computes what transformers computes, or is refused by name.

hugging_face_configs.json has the fields of 49 of them, with their real sizes; the tests make them small.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dsllm.checkpoint.hugging_face_config import config_from_json
from dsllm.errors import CheckpointError
from tests.helpers.hugging_face import deviation, our_logits, shrunk, some_tokens, their_logits, write_folder

STORED = json.loads((Path(__file__).parent / "hugging_face_configs.json").read_text())
READ, REFUSED = STORED["read"], STORED["refused"]

# Both sides compute in fp32 and differ by the order of sums only: about 1e-6 of the largest logit.
RELATIVE = 1e-5


@pytest.mark.parametrize("name", READ)
def test_a_published_config_is_read_with_the_logits_of_transformers(name: str, tmp_path: Path):
    folder = write_folder(tmp_path, shrunk(READ[name]))
    tokens = some_tokens()
    assert deviation(our_logits(folder, tokens), their_logits(folder, tokens)) < RELATIVE


@pytest.mark.parametrize("name", READ)
def test_a_published_config_is_read_in_its_own_size(name: str):
    fields = READ[name]
    config = config_from_json(fields, "config.json")
    assert config.vocab_size == fields["vocab_size"]
    assert config.hidden_size == fields.get("hidden_size", fields.get("n_embd"))


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_computes_something_else_is_refused_by_the_name_of_the_field(name: str):
    fields, named = REFUSED[name]
    with pytest.raises(CheckpointError, match=r"^folder/config\.json: fields that are not implemented: ") as refusal:
        config_from_json(fields, "folder/config.json")
    assert f"{named}: " in str(refusal.value)


ROPE: dict[str, list[Any]] = {
    "rope_theta": [10000.0, 500000],
    "rotary_emb_base": [10000, 500.0],
    "rotary_pct": [0.25, 0.5, 1.0],
    "partial_rotary_factor": [0.5, 1.0],
    "rope_scaling": [None, {}, {"rope_type": "default"}, "llama3", {"type": "linear", "factor": 2.0}],
    "rope_parameters": [None, {}, {"rope_type": "default"}, {"rope_theta": 500000.0}, {"rope_theta": 1e4}, "llama3"],
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BASES = {"llama": READ["llama-2-7b"], "gpt_neox": READ["pythia-70m"], "qwen2": READ["qwen2-0.5b"]}


def some_rope_fields(kind: str, choice: random.Random) -> dict[str, Any]:
    """A config.json of a kind with some of the rotary fields that exist, inside and outside of the newer form."""
    fields = {name: value for name, value in shrunk(BASES[kind]).items() if name not in ROPE}
    fields["num_hidden_layers"] = 1
    own = (
        {"rope_theta", "partial_rotary_factor"}
        if kind != "gpt_neox"
        else {"rotary_emb_base", "rotary_pct", "rope_theta"}
    )
    for name in choice.sample(sorted(own | {"rope_scaling", "rope_parameters"}), choice.randint(1, 3)):
        value = choice.choice(ROPE[name])
        if value == "llama3":
            value = LLAMA3 | {"original_max_position_embeddings": 32}
        if isinstance(value, dict) and value and choice.random() < 0.4:
            value = value | {"rope_theta": choice.choice([1e4, 5e5])}
        if isinstance(value, dict) and value and kind == "gpt_neox" and choice.random() < 0.4:
            value = value | {"partial_rotary_factor": choice.choice([0.25, 0.5])}
        fields[name] = value
    return fields


def refused_or_right(fields: dict[str, Any], folder: Path) -> bool:
    """Whether a config is read; if so, its logits are those of transformers."""
    try:
        config_from_json(fields, "config.json")
    except CheckpointError:
        return False
    write_folder(folder, fields)
    tokens = some_tokens()
    assert deviation(our_logits(folder, tokens), their_logits(folder, tokens)) < RELATIVE, fields
    return True


@pytest.mark.parametrize("kind", BASES)
def test_no_combination_of_rotary_fields_is_read_as_something_else(kind: str, tmp_path: Path):
    """20 of each kind; `slow`: 300 more of each."""
    choice = random.Random(f"{kind} 1")
    read = [refused_or_right(some_rope_fields(kind, choice), tmp_path / str(i)) for i in range(20)]
    assert 4 <= sum(read) < 20


@pytest.mark.long
@pytest.mark.parametrize("kind", BASES)
def test_no_combination_of_300_is_read_as_something_else(kind: str, tmp_path: Path):
    choice = random.Random(f"{kind} 2")
    for i in range(300):
        refused_or_right(some_rope_fields(kind, choice), tmp_path / str(i))


OUTSIDE = {
    "a base": (
        "llama-2-7b",
        {"rope_theta": 500000.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 5e5},
    ),
    "a share": (
        "pythia-70m",
        {"rotary_pct": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_fraction": 0.5},
    ),
    "a base of NeoX": (
        "pythia-70m",
        {"rotary_emb_base": 500, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 500.0},
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_rotary_field_outside_of_incomplete_rope_parameters_counts(name: str, tmp_path: Path):
    base, change, wanted = OUTSIDE[name]
    fields = shrunk(READ[base] | change)
    config = config_from_json(fields, "config.json")
    assert {field: getattr(config, field) for field in wanted} == wanted
    assert refused_or_right(fields, tmp_path)
