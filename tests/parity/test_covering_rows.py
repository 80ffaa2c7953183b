"""Every setting that the config accepts finds its rows in the parity table, or is named."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dsllm.config.train import PRECISIONS
from dsllm.engine.settings.json_file import read_deepspeed_json
from dsllm.engine.settings.key import Covered, NotCovered, Untouched
from dsllm.engine.settings.layout import Layout
from dsllm.engine.settings.table import TABLE
from dsllm.errors import ConfigError
from dsllm.mesh import Mesh
from dsllm.parity.combinations import DEEPSPEED_SETTINGS, Combination
from dsllm.parity.covering_rows import CoveringRows, covering_rows, settings_without_rows
from dsllm.parity.pairwise import FACTORS
from dsllm.parity.tiny_run import run_of

JSONS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def test_every_key_that_the_table_of_keys_calls_covered_is_a_factor():
    covered = [key for key in TABLE.values() if isinstance(key.parity, Covered)]
    assert len(covered) == len(DEEPSPEED_SETTINGS) and set(DEEPSPEED_SETTINGS) <= set(FACTORS)


def test_the_page_names_every_key_that_no_row_has():
    named = [name.partition("=")[0] for name, _ in settings_without_rows()]
    assert len(named) == len({*named}), "a setting is named twice"
    assert {key.path for key in TABLE.values() if isinstance(key.parity, Untouched | NotCovered)} < set(named)
    assert {"zero_optimization.offload_param.device", "train.compile"} < set(named)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("file", JSONS, ids=lambda file: file.stem)
def test_every_shipped_config_finds_its_rows(file: Path, precision: Any):
    given = read_deepspeed_json(str(file))
    row = Combination(precision=precision, world_size=4, accumulation=3)
    layout = Layout(mesh=Mesh(data=4), device="cuda", precision=precision)
    try:
        found = covering_rows(run_of(row, 0), given, layout)
    except ConfigError as error:
        assert precision == "fp16" and "stage 0" in str(error)
        return
    stage = given["zero_optimization"]["stage"]
    assert (found.base.stage, found.base.precision, found.base.world_size) == (stage, precision, 4)
    assert all((r.stage, r.precision) == (stage, precision) for rows in found.settings.values() for r in rows)
    assert "tied" in found.settings and all(found.settings.values())
    assert bool(found.not_covered) == ("nvme" in file.stem)


def found_for(given: dict[str, Any], data_size: int = 1, **run: Any) -> CoveringRows:
    """The rows that cover a bf16 run."""
    row = Combination(precision="bf16", world_size=data_size, **run)
    return covering_rows(run_of(row, 0), given, Layout(mesh=Mesh(data=data_size), device="cpu", precision="bf16"))


def test_a_setting_leads_to_rows_that_have_it():
    given = {
        "communication_data_type": "bf16",
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5},
    }
    found = found_for(given, activation_checkpointing="mlp")
    assert all(row.deepspeed["overlap_comm"] is True for row in found.settings["overlap_comm"])
    assert all(row.deepspeed["communication_data_type"] == "bf16" for row in found.settings["communication_data_type"])
    assert all(row.activation_checkpointing == "mlp" for row in found.settings["activation_checkpointing"])
    assert {row.deepspeed["reduce_bucket_size"] for row in found.settings["reduce_bucket_size"]} == {1_000, 1_000_000}


@pytest.mark.parametrize("data_size, rows_of", [(1, 1), (2, 2), (3, 2), (4, 4), (64, 4)])
def test_a_run_is_covered_by_the_largest_number_of_ranks_that_it_has(data_size: int, rows_of: int):
    assert found_for({"zero_optimization": {"stage": 1}}, data_size).base.world_size == rows_of


def test_what_no_row_has_is_named_with_what_is_known_of_it():
    nvme = {"device": "nvme", "nvme_path": "/nvme"}
    zero = {"stage": 3, "offload_optimizer": nvme, "offload_param": {"device": "cpu"}}
    found = found_for({"zero_optimization": zero})
    assert set(found.not_covered) == {"aio", "zero_optimization.offload_optimizer.device=nvme"}
    assert "offload_optimizer" not in found.settings and found.settings["offload_param"]
    config = run_of(Combination(precision="bf16"), 0)
    compiled = dataclasses.replace(config, train=dataclasses.replace(config.train, compile=True))
    layout = Layout(mesh=Mesh(), device="cpu", precision="bf16")
    assert set(covering_rows(compiled, {}, layout).not_covered) == {"train.compile"}
