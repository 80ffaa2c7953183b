"""Every setting that the config accepts finds its rows in the parity table, or is named."""

from pathlib import Path
from typing import Any

import pytest
from dsllm.parity.cover import FACTORS
from dsllm.parity.coverage import OUTSIDE, UNTOUCHED, coverage

from dsllm.config.train import PRECISIONS
from dsllm.engine.settings.final_config import OWNED_BY_JSON, ZERO_KEYS
from dsllm.engine.settings.json_file import read_deepspeed_json
from dsllm.engine.settings.layout import Layout
from dsllm.engine.settings.offload import OFFLOAD_OPTIMIZER, OFFLOAD_PARAM, OPTIMIZER_KEYS, PARAM_KEYS, ZEROPP_KEYS
from dsllm.errors import ConfigError
from dsllm.mesh import Mesh
from dsllm.parity.combinations import Combination
from dsllm.parity.tiny_run import run_of

JSONS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def named(key: str) -> bool:
    return key in UNTOUCHED or any(name.partition("=")[0] == key for name in OUTSIDE)


def test_every_accepted_top_level_key_is_a_factor_or_named():
    composed = {"zero_optimization", "data_types"}  # grad_accum_dtype is data_types' only key
    assert not [key for key in OWNED_BY_JSON - composed if key not in FACTORS and not named(key)]
    assert "grad_accum_dtype" in FACTORS


def test_every_accepted_zero_key_is_a_factor_or_named():
    keys = {*ZERO_KEYS, *ZEROPP_KEYS} - {"stage"}
    assert not [key for key in keys if key not in FACTORS and not named(f"zero_optimization.{key}")]


def test_every_accepted_offload_key_is_a_factor_or_named():
    of_nvme = {"nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write"}
    for block, keys in ((OFFLOAD_OPTIMIZER, OPTIMIZER_KEYS), (OFFLOAD_PARAM, PARAM_KEYS)):
        assert block in FACTORS and named(f"zero_optimization.{block}")  # to the CPU a factor, to NVMe named
        rest = set(keys) - of_nvme - {"device"}
        assert not [key for key in rest if not named(f"zero_optimization.{block}.{key}")]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("file", JSONS, ids=lambda file: file.stem)
def test_every_shipped_config_finds_its_rows(file: Path, precision: Any):
    given = read_deepspeed_json(str(file))
    row = Combination(precision=precision, world_size=4, accumulation=3)
    layout = Layout(mesh=Mesh(data=4), device="cuda", precision=precision)
    try:
        found = coverage(run_of(row, 0), given, layout)
    except ConfigError as error:
        assert precision == "fp16" and "stage 0" in str(error)
        return
    stage = given["zero_optimization"]["stage"]
    assert (found.base.stage, found.base.precision, found.base.world_size) == (stage, precision, 4)
    assert all((r.stage, r.precision) == (stage, precision) for rows in found.settings.values() for r in rows)
    assert "tied" in found.settings and all(found.settings.values())
    assert bool(found.outside) == ("nvme" in file.stem)


def test_a_setting_leads_to_rows_that_have_it():
    given = {
        "communication_data_type": "bf16",
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5},
    }
    config = run_of(Combination(precision="bf16", activation_checkpointing="mlp"), 0)
    found = coverage(config, given, Layout(mesh=Mesh(data=1), device="cpu", precision="bf16"))
    assert all(row.overlap_comm is True for row in found.settings["overlap_comm"])
    assert all(row.communication_data_type == "bf16" for row in found.settings["communication_data_type"])
    assert all(row.activation_checkpointing == "mlp" for row in found.settings["activation_checkpointing"])
    assert {row.reduce_bucket_size for row in found.settings["reduce_bucket_size"]} == {1_000, 1_000_000}
