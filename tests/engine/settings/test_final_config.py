"""The final DeepSpeed config: complete, decided by one side each, and every clash in one error."""

import dataclasses
import json
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from dsllm.config.paths import presets_directory
from dsllm.engine.settings.final_config import final_config, gradient_accumulation
from dsllm.engine.settings.json_file import read_deepspeed_json
from dsllm.engine.settings.layout import Layout
from dsllm.engine.settings.table import TABLE
from dsllm.errors import ConfigError
from dsllm.mesh import Mesh
from dsllm.parameters import parameter_table
from tests.helpers.tiny import MODEL, SEQUENCE_LENGTH, tiny_run

CPU = Layout(mesh=Mesh(data=2), device="cpu", precision="fp32")
GPU = Layout(mesh=Mesh(data=2), device="cuda", precision="bf16")
FP16 = Layout(mesh=Mesh(data=2), device="cuda", precision="fp16")
GPUS = Layout(mesh=Mesh(data=16), device="cuda", precision="bf16", ranks_by_node=(8, 8))
NVME = {"device": "nvme", "nvme_path": "/nvme"}


def zero_of(zero: dict[str, Any], layout: Layout = CPU, **top: Any) -> dict[str, Any]:
    config = tiny_run(global_batch_sequences=2 * layout.data_size)
    return final_config(config, {"zero_optimization": zero, **top}, layout)


def problems(given: dict, layout: Layout = CPU, **train: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        final_config(tiny_run(**train), given, layout)
    return caught.value.problems


@pytest.mark.parametrize("stage", range(4))
def test_keys_whose_default_surprises_are_written_out(stage):
    final = final_config(tiny_run(gradient_clipping=0.0), {"zero_optimization": {"stage": stage}}, GPU)
    assert final["gradient_clipping"] == 0.0  # DeepSpeed's own default is 1.0
    assert (
        final["train_batch_size"],
        final["train_micro_batch_size_per_gpu"],
        final["gradient_accumulation_steps"],
    ) == (8, 2, 2)
    if stage:
        assert final["zero_optimization"]["memory_efficient_linear"] is False
        assert final["data_types"] == {"grad_accum_dtype": "fp32"} and final["communication_data_type"] == "fp32"


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("layout", [CPU, GPU], ids=["cpu", "gpu"])
def test_what_is_written_exists_at_the_stage(stage, layout):
    zero = zero_of({"stage": stage}, layout)["zero_optimization"]
    rows = {key.name: key for key in TABLE.values() if key.block == "zero_optimization"}
    assert all(stage in rows[name].stages for name in zero)
    expected = {key.name for key in rows.values() if key.default is not None and stage in key.stages}
    assert set(zero) == expected


@pytest.mark.parametrize("file", sorted((presets_directory() / "ds_configs").glob("*.json")), ids=lambda p: p.name)
@pytest.mark.parametrize("layout", [CPU, GPU], ids=["cpu", "gpu"])
def test_deepspeed_takes_what_the_shipped_files_become(file, layout, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    final = final_config(tiny_run(), read_deepspeed_json(str(file)), layout)
    assert "auto" not in json.dumps(final)
    parsed = DeepSpeedConfig({**final, "train_batch_size": 4})  # as one process sees it
    assert parsed.zero_config.stage == final["zero_optimization"]["stage"]


def test_auto_and_absent_and_equal_are_no_clash():
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "auto_cast": False},
        "optimizer": "auto",
        "tensorboard": {"enabled": False},
        "flops_profiler": {"enabled": False},
        "zero_optimization": {"stage": 2, "overlap_comm": "auto", "offload_optimizer": {"device": "none"}},
    }
    final = final_config(tiny_run(), given, CPU)
    assert final["zero_optimization"]["overlap_comm"] is False and "tensorboard" not in final
    assert set(final["fp16"]) == {
        *("enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")
    }


def test_every_clash_in_one_error():
    given = {
        "train_batch_size": 64,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW"},
        "gradient_clipp1ng": 1,
        "zero_optimization": {
            "stage": 4,
            "overlap_com": True,
            "reduce_bucket_size": "big",
            "check_grad_overflow": False,
        },
        "elasticity": {"enabled": True},
    }
    text = "\n".join(problems(given))
    assert len(problems(given)) == 10
    assert "train_batch_size is 64, but the run says 8" in text
    assert "gradient_clipping is 0.5, but the run says 1.0 (train.gradient_clipping)" in text
    assert "bf16.enabled is True, but the run says False (train.precision)" in text
    assert "optimizer belongs to the run: set train.optimizer" in text
    assert (
        "gradient_clipp1ng: unknown key (DeepSpeed would ignore it silently); did you mean 'gradient_clipping'?" in text
    )
    assert "overlap_com: unknown key; did you mean 'overlap_comm'?" in text
    assert "stage: must be at most 3, but it is 4" in text
    assert "reduce_bucket_size: must be a whole number, but it is 'big'" in text
    assert "check_grad_overflow: without it a non-finite gradient ruins the weights" in text
    assert "elasticity: removed from DeepSpeed 0.19; a dsllm run resumes on any number of ranks" in text


def test_a_batch_that_does_not_divide_is_one_problem_among_the_others():
    found = problems({"train_batch_size": 64, "optimizer": {"type": "AdamW"}}, global_batch_sequences=9)
    assert len(found) == 3
    assert "9 is not divisible" in found[0] and "the run says 9" in found[1] and "optimizer belongs" in found[2]


def test_every_problem_with_offload_in_one_error():
    zero = {
        "stage": 3,
        "offload_optimizer": {
            "device": "nvme",
            "nvme_path": "relative",
            "buffer_count": 3,
            "pin_memory": 1,
            "ratio": 0.5,
            "fast_init": True,
            "super_offload": True,
            "cpuadam_cores_perc": 0.8,
            "bufer_count": 4,
        },
        "offload_param": {"device": "disk", "buffer_size": 1.5, "max_in_cpu": -1},
        "zero_hpz_partition_size": 3,
        "zero_quantized_weights": True,
        "zero_quantized_gradients": True,
    }
    aio = {"block_size": 1000, "queue_depth": 0, "use_gds": True, "thread_count": 1}
    found = problems({"zero_optimization": zero, "aio": aio, "zero_force_ds_cpu_optimizer": True})
    expected = [
        "offload_optimizer.nvme_path: must be absolute",
        "offload_optimizer.buffer_count: 3 is too few",
        "offload_optimizer.pin_memory: must be true or false, but it is 1",
        "offload_optimizer.ratio: it needs DeepSpeed's own CPU Adam",
        "offload_optimizer.fast_init: it shortens",
        "offload_optimizer.super_offload: it steps in processes of its own",
        "offload_optimizer.cpuadam_cores_perc: it belongs to super_offload",
        "offload_optimizer.bufer_count: unknown key; did you mean 'buffer_count'?",
        "offload_param.device: must be 'none', 'cpu' or 'nvme', but it is 'disk'",
        "offload_param.buffer_size: must be a whole number, but it is 1.5",
        "offload_param.max_in_cpu: must be at least 0, but it is -1",
        "zero_hpz_partition_size: 3 does not divide the 2 ranks of a node",
        "zero_quantized_weights: its kernels are CUDA's",
        "zero_quantized_gradients: on one node DeepSpeed accepts it and leaves it out silently",
        "zero_quantized_gradients: its kernels are CUDA's",
        "aio.block_size: direct I/O works in whole pages",
        "aio.queue_depth: must be at least 1, but it is 0",
        "aio.use_gds: GPUDirect Storage is not proven here",
        "aio.thread_count: unknown key",
        "zero_force_ds_cpu_optimizer: it requires DeepSpeed's own CPU Adam",
    ]
    for words in expected:
        assert any(words in problem for problem in found), words
    assert len(found) == len(expected), found


@pytest.mark.parametrize("layout", [CPU, GPU], ids=["fp32", "bf16"])
def test_stage_auto_is_stage_0_in_every_check_and_in_the_result(layout):
    assert zero_of({"stage": "auto"}, layout) == zero_of({"stage": 0}, layout) == zero_of({}, layout)


@pytest.mark.parametrize("stage", ["auto", 0])
def test_stage_auto_does_not_hide_what_stage_0_computes_wrongly(stage):
    given = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "fp16"}}
    assert "never applied" in problems(given, FP16)[0]
    given = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert "at ZeRO stage 0: DeepSpeed has no such optimizer there" in problems(given, GPU)[0]


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    config = tiny_run(global_batch_sequences=10, micro_batch_sequences=4)
    with pytest.raises(
        ConfigError, match=r"use train.global_batch_sequences 8 or 16; or train.micro_batch_sequences 1 or 5"
    ):
        gradient_accumulation(config, 2)
    assert gradient_accumulation(tiny_run(), 4) == 1


def test_the_batch_is_divided_by_the_data_axis_only():
    layout = Layout(mesh=Mesh(data=2, tensor=2), device="cuda", precision="bf16")
    assert final_config(tiny_run(), {}, layout)["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize("layout", [CPU, GPU, FP16], ids=["fp32", "bf16", "fp16"])
def test_types_that_are_asked_for_are_handed_on(layout):
    own = {"fp32": "bf16"}.get(layout.precision, layout.precision)
    given = {"zero_optimization": {"stage": 2}, "communication_data_type": own}
    assert final_config(tiny_run(), given, layout)["communication_data_type"] == own
    if layout.precision != "fp32":
        given |= {"data_types": {"grad_accum_dtype": own}}
        assert final_config(tiny_run(), given, layout)["data_types"] == {"grad_accum_dtype": own}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_to_cpu_is_written_out_and_keeps_torchs_adamw(stage):
    final = zero_of({"stage": stage, "offload_optimizer": {"device": "cpu"}})
    assert final["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert final["zero_force_ds_cpu_optimizer"] is False and "aio" not in final


@pytest.mark.parametrize("off", [{"device": "none"}, "auto", False, None, {}])
def test_without_offload_nothing_is_added(off):
    final = zero_of({"stage": 2, "offload_optimizer": off, "offload_param": off})
    assert not {"offload_optimizer", "offload_param", "zero_hpz_partition_size"} & set(final["zero_optimization"])
    assert "zero_force_ds_cpu_optimizer" not in final


def test_nvme_is_written_out():
    final = zero_of({"stage": 3, "offload_optimizer": NVME, "offload_param": NVME | {"max_in_cpu": 0}})
    optimizer, param = (final["zero_optimization"][key] for key in ("offload_optimizer", "offload_param"))
    assert optimizer["buffer_count"] == 4  # what AdamW works on at once
    assert optimizer["nvme_path"] == param["nvme_path"] and optimizer["nvme_path"].startswith("/nvme/dsllm-tiny-")
    largest = max(row.num_elements for row in parameter_table(MODEL, SEQUENCE_LENGTH))
    assert param["buffer_size"] == -(-largest // 2)  # a rank's share of the largest parameter
    assert final["zero_optimization"]["stage3_max_reuse_distance"] == 0
    assert final["aio"]["block_size"] == 2**20 and final["aio"]["use_gds"] is False


def test_hpz_auto_is_all_ranks_of_a_host():
    assert (
        zero_of({"stage": 3, "zero_hpz_partition_size": "auto"}, GPUS)["zero_optimization"]["zero_hpz_partition_size"]
        == 8
    )
    assert zero_of({"stage": 3}, GPUS)["zero_optimization"]["zero_hpz_partition_size"] == 1
    assert (
        "zero_hpz_partition_size"
        not in zero_of({"stage": 2, "zero_hpz_partition_size": "auto"}, GPUS)["zero_optimization"]
    )


UNEVEN = Layout(mesh=Mesh(data=6), device="cuda", precision="bf16", ranks_by_node=(4, 2))


def test_uneven_hosts_are_refused_only_where_a_setting_needs_even_ones():
    assert zero_of({"stage": 3}, UNEVEN)["zero_optimization"]["stage"] == 3
    assert zero_of({"stage": 2, "zero_hpz_partition_size": "auto"}, UNEVEN)
    # groups of two neighbouring ranks stay within a host
    assert (
        zero_of({"stage": 3, "zero_hpz_partition_size": 2}, UNEVEN)["zero_optimization"]["zero_hpz_partition_size"] == 2
    )
    with pytest.raises(
        ConfigError, match='"auto" is all ranks of a host, but the hosts have 4 and 2 ranks: give a number'
    ):
        zero_of({"stage": 3, "zero_hpz_partition_size": "auto"}, UNEVEN)
    with pytest.raises(ConfigError, match="4 does not divide the 2 and 4 ranks of a node"):
        zero_of({"stage": 3, "zero_hpz_partition_size": 4}, UNEVEN)


@pytest.mark.parametrize("zero", [{"zero_hpz_partition_size": "auto"}, {"zero_hpz_partition_size": 4}])
def test_rules_about_hosts_wait_until_the_hosts_are_known(zero):
    """Before the ranks meet each host would answer for itself, and those that refuse would leave the others waiting."""
    unknown = dataclasses.replace(UNEVEN, ranks_by_node=None)
    zero_of({"stage": 3, **zero}, unknown)
    with pytest.raises(ConfigError, match="zero_hpz_partition_size"):
        zero_of({"stage": 3, **zero}, UNEVEN)


ADAMW = {"type": "AdamW"}
TRAINERS_ZERO_3 = {  # as transformers' documentation gives it
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "optimizer": {
        "type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip


def test_the_json_of_transformers_trainer_is_taken():
    final = final_config(tiny_run(), TRAINERS_ZERO_3, CPU)
    assert "optimizer" not in final and "scheduler" not in final
    assert final["zero_optimization"]["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize(
    "block, says",
    [
        (ADAMW | {"params": {"lr": 3e-5, "eps": "auto"}},
         "params.lr is 3e-05, but belongs to the run: set train.optimizer.learning_rate"),
        ({"type": "Lamb", "params": {"lr": "auto"}}, "type is 'Lamb', but the run trains with AdamW"),
        (ADAMW | {"params": {"adam_w_mode": False}},
         "params.adam_w_mode is False, but belongs to the run: set train.optimizer"),
        (ADAMW | {"params": 3}, "params must be an object, but it is 3"),
        (ADAMW | {"legacy_fusion": True}, "legacy_fusion is True, but belongs to the run"),
    ],
)  # fmt: skip
def test_values_of_an_optimizer_are_refused_by_name(block, says):
    (text,) = problems({"optimizer": block})
    assert text.startswith(f"ds_configs/zero1.json: optimizer.{says}")


def test_values_of_a_scheduler_are_refused_by_name():
    (text,) = problems({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}})
    assert "scheduler.params.warmup_num_steps is 100, but belongs to the run: set train.schedule.warmup_steps" in text


@pytest.mark.parametrize("block", ["offload_optimizer", "offload_param"])
def test_offload_without_a_device_is_not_dropped_silently(block):
    (text,) = problems({"zero_optimization": {"stage": 3, block: {"pin_memory": True}}})
    assert f"{block}.device: is missing, so nothing would be offloaded" in text


def test_variables_in_the_nvme_path_are_refused():
    offload = {"device": "nvme", "nvme_path": "/local/$USER"}
    found = problems({"zero_optimization": {"stage": 3, "offload_optimizer": offload}})
    assert any("variables are not replaced here" in text for text in found)
