"""The final DeepSpeed config: complete, owned by one side each, and every clash in one error."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dsllm.config.paths import presets_directory
from dsllm.engine.settings.final_config import (
    ZERO_KEYS,
    ZERO_REFUSED,
    Layout,
    final_config,
    gradient_accumulation,
    read_deepspeed_json,
)
from dsllm.errors import ConfigError
from tests.helpers.tiny import tiny_run

CPU = Layout(world_size=2, device="cpu", precision="fp32")
GPU = Layout(world_size=2, device="cuda", precision="bf16")


def problems(given: dict, layout: Layout = CPU, **train) -> list[str]:
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


@pytest.mark.parametrize("file", sorted((presets_directory() / "ds_configs").glob("*.json")), ids=lambda p: p.name)
@pytest.mark.parametrize("layout", [CPU, GPU], ids=["cpu", "gpu"])
def test_deepspeed_takes_what_the_shipped_files_become(file, layout, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    final = final_config(tiny_run(), read_deepspeed_json(str(file)), layout)
    assert "auto" not in json.dumps(final)
    parsed = DeepSpeedConfig({**final, "train_batch_size": 4})  # as one process sees it
    assert parsed.zero_config.stage == final["zero_optimization"]["stage"]


def test_the_tables_name_deepspeeds_keys():
    known = {name for key, f in DeepSpeedZeroConfig.model_fields.items() for name in (key, f.alias)}
    assert set(ZERO_KEYS) <= known


def test_auto_and_absent_and_equal_are_no_clash():
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "optimizer": "auto",
        "zero_optimization": {"stage": 2, "overlap_comm": "auto", "offload_optimizer": {"device": "none"}},
    }
    assert final_config(tiny_run(), given, CPU)["zero_optimization"]["overlap_comm"] is False


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
    assert "stage: must be 0, 1, 2 or 3, but it is 4" in text
    assert "reduce_bucket_size: must be a whole number, but it is 'big'" in text
    assert "check_grad_overflow: without it a non-finite gradient ruins the weights" in text
    assert "elasticity: a dsllm run resumes on any number of ranks" in text


@pytest.mark.parametrize("key", sorted(ZERO_REFUSED))
def test_known_bad_zero_keys_are_refused_with_the_reason(key):
    bad = key not in ("check_grad_overflow", "compute_grad_norm", "load_from_fp32_weights")
    (text,) = problems({"zero_optimization": {"stage": 1, key: bad}})
    assert ZERO_REFUSED[key] in text


def test_memory_efficient_linear_is_refused():
    assert "rounds twice" in problems({"zero_optimization": {"stage": 3, "memory_efficient_linear": True}})[0]


def test_fp16_at_stage_0_and_on_cpu():
    both = problems({}, Layout(world_size=2, device="cpu", precision="fp16"))
    assert "no fp16" in both[0] and "never applied" in both[1]
    assert len(problems({}, Layout(world_size=2, device="cuda", precision="fp16"))) == 1


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    config = tiny_run(global_batch_sequences=10, micro_batch_sequences=4)
    with pytest.raises(
        ConfigError, match=r"use train.global_batch_sequences 8 or 16; or train.micro_batch_sequences 1 or 5"
    ):
        gradient_accumulation(config, 2)
    assert gradient_accumulation(tiny_run(), 4) == 1


@pytest.mark.parametrize("text", ["", "[1]", '{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}'])
def test_a_file_that_is_no_deepspeed_json(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.json"):
        read_deepspeed_json(str(path))


def test_a_missing_json_says_where_it_was_looked_for():
    with pytest.raises(ConfigError, match=r"absent\.json .looked in the working directory"):
        read_deepspeed_json("absent.json", Path("/tmp"))


FP16 = Layout(world_size=2, device="cuda", precision="fp16")


@pytest.mark.parametrize(
    ("given", "layout", "says"),
    [
        ({"communication_data_type": "bf16"}, FP16, ["bf16 keeps 3 bits less than fp16: use fp32 or fp16"]),
        ({"communication_data_type": "fp16"}, GPU, ["fp16 overflows where bf16 does not: use fp32 or bf16"]),
        ({"communication_data_type": "fp16"}, CPU, ["fp16 with train.precision fp32 would overflow: use fp32 or bf16"]),
        ({"communication_data_type": "int8"}, GPU, ["must be 'fp32' or 'bf16', but it is 'int8'"]),
        ({"communication_data_type": ["fp32"]}, GPU, ["must be 'fp32' or 'bf16', but it is ['fp32']"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, FP16, ["would add up fp16 gradients in a third type"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, CPU, ["would round fp32 gradients to bf16 at every addition"]),
        ({"data_types": "fp32"}, GPU, ["data_types: must be an object, but it is 'fp32'"]),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, GPU, ["data_types.grad_acum_dtype: unknown key"]),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, GPU, ["fp8 is refused until a GPU run"]),
        ({"fp8": {"enabled": True}}, GPU, ["fp8 is refused until a GPU run"]),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, GPU, ["torch_autocast belongs to the run"]),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 0}},
            GPU,
            ["at ZeRO stage 0: DeepSpeed has no such optimizer there"],
        ),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16", "fp8": True, "amp": True},
            Layout(world_size=2, device="cpu", precision="fp16"),
            ["Apex AMP was removed", "fp8 is refused", "no fp16", "third type", "bf16 keeps 3 bits less"],
        ),
    ],
)  # fmt: skip
def test_wrong_types_are_refused_with_all_reasons_at_once(given, layout, says):
    given = {"zero_optimization": {"stage": 2}} | given
    found = problems(given, layout)
    assert len(found) == len(says), found
    assert all(any(text in problem for problem in found) for text in says), found


@pytest.mark.parametrize("layout", [CPU, GPU, FP16], ids=["fp32", "bf16", "fp16"])
def test_types_that_are_asked_for_are_handed_on(layout):
    own = {"fp32": "bf16"}.get(layout.precision, layout.precision)
    given = {"zero_optimization": {"stage": 2}, "communication_data_type": own}
    assert final_config(tiny_run(), given, layout)["communication_data_type"] == own
    if layout.precision != "fp32":
        given |= {"data_types": {"grad_accum_dtype": own}}
        assert final_config(tiny_run(), given, layout)["data_types"] == {"grad_accum_dtype": own}
