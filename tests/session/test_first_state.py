"""What a new run starts from: the initial values of its seed, or the weights of the same model."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig
from dsllm.engine.processes.process_group import World
from dsllm.errors import CheckpointError
from dsllm.model.initial_state import InitialValues
from dsllm.parameters import parameter_table
from dsllm.session.first_state import first_state
from dsllm.slices import WEIGHTS, Region, whole
from tests.helpers.preparing import golden_run
from tests.helpers.ranks import run_ranks
from tests.helpers.saved_run import MODEL, save_run
from tests.helpers.tiny import tiny_run


def run_of(directory: Path, **model: object) -> RunConfig:
    """A run whose saved weights have other moments, and which may start from itself."""
    config = golden_run(sequence_length=64)
    changed = dataclasses.replace(MODEL, **model)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, directory=str(directory)), model=changed)


def weights_of_first_state(world: World, config: RunConfig) -> tuple[dict, list[str], list[str]]:
    """The first values of each parameter, what there is of them, and what was reported."""
    lines: list[str] = []
    state = first_state(config, world, lines.append)
    table = parameter_table(config.model, config.context_length)
    found = {row.name: state.read(row.name, WEIGHTS, Region(whole(row.shape), 0, 5)).tolist() for row in table}
    keys = {key for row in table for key in state.keys(row.name)}
    assert all(state.scalars(row.name) == {} for row in table)
    return found, sorted(keys), lines


def test_without_a_source_the_seed_decides():
    config = tiny_run()
    ((found, keys, lines),) = run_ranks(1, weights_of_first_state, config)
    initial = InitialValues(parameter_table(config.model, config.context_length), config.run.seed)
    name = "layers.0.mlp.up.weight"
    shape = next(row.shape for row in parameter_table(config.model, config.context_length) if row.name == name)
    assert found[name] == initial.read(name, WEIGHTS, Region(whole(shape), 0, 5)).tolist()
    assert keys == [WEIGHTS] and not lines


def test_a_saved_model_gives_its_weights_and_no_optimizer_state(tmp_path):
    directory, model = save_run(run_of(tmp_path / "run"))
    results = run_ranks(2, weights_of_first_state, run_of(tmp_path / "new", init_from=str(directory)))
    assert results[0] == results[1]
    found, keys, lines = results[0]
    assert keys == [WEIGHTS] and lines == [f"starting from the weights of {directory}"]
    for name, parameter in model.named_parameters():
        assert torch.equal(torch.tensor(found[name]), parameter.detach().flatten()[:5]), name


def refusal(world: World, config: RunConfig) -> str:
    with pytest.raises(CheckpointError) as caught:
        first_state(config, world, print)
    return str(caught.value)


OTHERS: dict[str, ModelConfig | dict] = {
    "rope_theta": {"rope_theta": 5e5},
    "norm_epsilon": {"norm_epsilon": 1e-6},
    "num_heads": {"num_heads": 2, "num_kv_heads": 1},
    "tie_embeddings": {"tie_embeddings": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("field", OTHERS)
def test_another_model_is_refused_by_its_fields(tmp_path, field):
    directory, _ = save_run(run_of(tmp_path / "run"))
    one, two = run_ranks(2, refusal, run_of(tmp_path / "new", init_from=str(directory), **OTHERS[field]))
    assert one == two
    assert f"model.init_from {directory}: is another model than the run's:" in one and f"- model.{field}: " in one


def test_a_long_list_is_cut(tmp_path):
    directory, _ = save_run(run_of(tmp_path / "run"))
    (text,) = run_ranks(1, refusal, run_of(tmp_path / "new", init_from=str(directory), hidden_size=64))
    # width and head size; embedding, head, final norm; in each of 2 layers 7 matrices and 2 norms
    assert text.count("\n- ") == 9 and f"\n- and {2 + 3 + 2 * 9 - 8} more\n" in text
    assert yaml.safe_load(text.partition("or write\n")[2])["model"]["hidden_size"] == 32  # the section to paste


def test_a_folder_that_is_not_there_is_named(tmp_path):
    (text,) = run_ranks(1, refusal, run_of(tmp_path / "new", init_from=str(tmp_path / "nowhere")))
    assert text == f"model.init_from {tmp_path / 'nowhere'}: no such folder"
